"""Fixtures: text to train on, and a run on one of the eight devices."""

import jax
import numpy as np
import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of thirty documents."""
    folder = tmp_path_factory.mktemp("corpus") / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = "the loss of a token is what the next one costs when it surprises us".split()  # noqa: SIM905
    for number in range(30):
        (folder / f"{number:02}.txt").write_text(" ".join(rng.choice(words, 120)))
    return folder


@pytest.fixture
def one_device(monkeypatch):
    """Limits a run to one device; the other seven stay idle."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
