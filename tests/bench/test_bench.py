"""The bench commands: what they refuse, and the claims that need no clock."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from configs import v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.bench import memory, moe

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no NAME given"),
        (("mo",), "there is no 'mo'; name one of train, moe, memory"),
        (("moe", "more"), "unexpected argument 'more'"),
    ],
)
def test_names(arguments, message):
    command = [sys.executable, "-m", "deepseek_jax.bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def tiny():
    return configs.parse(v3_tiny.get_config())


def test_no_set_of_logits_is_held_at_depth_four(tiny):
    def shallow(config):  # one dense layer: quick to compile, and all five heads are there
        model = dataclasses.replace(config.model, layers=1, dense_layers=1)
        return dataclasses.replace(config, model=model)

    def growth(chunk):
        small, large = (
            shallow(memory.with_sizes(tiny, mtp_depth=4, vocab=vocab, loss_chunk=chunk))
            for vocab in (2048, 16_384)
        )
        return memory.temp_bytes(large) - memory.temp_bytes(small)

    logits = 4 * 2048 * (16_384 - 2048)  # what one head's whole logits grow by
    assert growth(chunk=128) < logits
    assert growth(chunk=5 * 2048) > 5 * logits  # all heads in one chunk: the measure sees them


def test_moe_rows(tiny):
    rows = moe.measure(tiny, rounds=1)["layers"]
    assert [row["experts"] for row in rows] == [16, 32, 64]
    assert rows[0]["ratio"] == 1 and all(row["seconds"] > 0 for row in rows)
