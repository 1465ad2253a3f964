"""Fixtures: text to train on, and a run on one of the eight devices."""

import jax
import pytest
import runs


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of thirty documents."""
    return runs.documents(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def one_device(monkeypatch):
    """Limits a run to one device; the other seven stay idle."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
