"""Leaves that are read and written in chunks, without a whole leaf in memory."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from stored import (
    META,
    abstract,
    assert_same,
    example,
    named,
    reopened,
    shardings,
    value_of,
    written,
)

from deepseek_jax.checkpoint.chunks import axes_to_cut
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import ConfigError


def test_leaves_are_read_in_parts(store, monkeypatch):
    """Leaves are read in chunks of the requested size, whatever sharding wrote them."""
    monkeypatch.setattr("deepseek_jax.checkpoint.chunks.CHUNK_BYTES", 1 << 10)
    written(store, 1)
    leaves, want = reopened(store).open(abstract(example())), example(1)
    for name, value in (("params.w", want["params"]["w"]), ("step", want["step"])):
        value = np.asarray(value)
        assert leaves.read(name).tobytes() == value.tobytes()
        chunks = list(leaves.chunks(name))
        assert sum(chunk.size for chunk in chunks) == value.size
        assert max(chunk.nbytes for chunk in chunks) <= 1 << 10
    np.testing.assert_array_equal(leaves.read("params.w", (3, slice(5, 9))), value_of(want)[3, 5:9])


def test_leaves_are_made_in_parts(store, monkeypatch):
    """Leaves saved in parts are read as if saved whole; an interrupted step counts as damaged."""
    monkeypatch.setattr("deepseek_jax.checkpoint.chunks.CHUNK_BYTES", 1 << 10)
    state = example(1)
    state["zeros"] = jax.device_put(np.zeros((300,), np.float32), shardings(8, P()))
    whole = {"params": state["params"], "zeros": state["zeros"], "step": state["step"]}
    values = {name: np.asarray(leaf) for name, leaf in named(whole).items()}
    sizes = []

    def part_of(name, part):
        sizes.append(values[name][part].nbytes)
        return values[name][part]

    store.save_parts(4, named(whole), part_of, META)
    assert max(sizes) <= 1 << 10
    step, got, meta = reopened(store).restore(abstract(whole))
    assert (step, meta) == (4, META)
    assert_same(got, whole)
    np.testing.assert_array_equal(reopened(store).open(whole).read("params.w"), values["params.w"])

    other = Store(store._directory.with_name("other"), keep=1)
    with pytest.raises(KeyError):
        other.save_parts(0, named(whole), lambda name, part: {}[name], META)
    with pytest.raises(ConfigError, match="none can be used"):
        reopened(other).restore(abstract(whole))


@pytest.mark.parametrize(
    "shape, cut",
    [
        ((58, 32, 7168, 2, 2048), (0, 1)),  # an expert of V3 is read as a whole
        ((58, 1536, 128, 192), (0,)),
        ((129280, 7168), ()),  # no axis to cut: chunks of any shape
        ((58, 7168), None),
    ],
)
def test_stacks_are_cut_between_layers_and_experts(shape, cut):
    assert axes_to_cut(shape, np.dtype(np.float32)) == cut
