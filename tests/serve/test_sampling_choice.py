"""Sampling settings of `generate`: their sources, and the lines that tell of them."""

import json

import pytest
import serving

from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError
from deepseek_jax.serve import sampling_choice
from deepseek_jax.serve.sampling_choice import FILE, sampling_of

OURS = (sampling_choice.TEMPERATURE, sampling_choice.TOP_P)


@pytest.fixture
def opened(tmp_path):
    """Opens the fixture's checkpoint with the given generation settings beside it."""
    serving.fill(tmp_path)

    def open_it(settings):
        (tmp_path / FILE).write_text(json.dumps(settings))
        return open_checkpoint(tmp_path)

    return open_it


@pytest.mark.parametrize(
    "stated, given, want, sources",
    [
        ({}, (None, None), OURS, ("default", "default")),
        ({"temperature": None, "do_sample": True}, (None, 1), (OURS[0], 1), ("default", "flag")),
        ({"temperature": 0.3, "top_p": 0.95}, (None, None), (0.3, 0.95), (FILE, FILE)),
        ({"temperature": 1, "top_p": 2}, (None, 0.5), (1, 0.5), (FILE, "flag")),
        ({"temperature": 0.6, "do_sample": False}, (None, None), (0, OURS[1]), (FILE, "default")),
        ({"do_sample": False}, (0.7, None), (0.7, OURS[1]), ("flag", "default")),
    ],
)
def test_flags_come_before_the_checkpoint_and_that_before_defaults(
    opened, stated, given, want, sources
):
    found = sampling_of(opened(stated), *given)
    assert (found.temperature, found.top_p, found.sources) == (*want, sources)


@pytest.mark.parametrize(
    "stated",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": True},
        {"do_sample": "false"},
    ],
    ids=str,
)
def test_a_stated_value_that_is_none_is_refused_where_it_is_used(opened, stated):
    checkpoint, name = opened(stated), next(iter(stated))
    flag = "temperature" if name == "do_sample" else name
    words = rf"{FILE}: {name} is .*; expected (a number|true or false).*; set request\.{flag}"
    with pytest.raises(ConfigError, match=words):
        sampling_of(checkpoint, None, None)
    assert sampling_of(checkpoint, 0.5, 0.5).sources == ("flag", "flag")
