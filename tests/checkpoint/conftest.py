"""Fixture of the store's tests."""

import pytest

from deepseek_jax.checkpoint.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "checkpoints", keep=3)
    yield store
    store.close()
