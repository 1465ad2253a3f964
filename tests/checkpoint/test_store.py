"""Checkpoint store: steps that are saved, restored onto any mesh, kept, and refused."""

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from stored import META, abstract, assert_same, example, reopened, written

from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import ConfigError


def test_nothing_saved_is_none_and_writes_nothing(store):
    assert store.restore(abstract(example())) is None
    assert store.newest_meta() is None and store.steps() == []
    assert not store._directory.exists()


def test_every_leaf_and_meta_come_back_exactly(store):
    written(store, 7)
    step, state, meta = reopened(store).restore(abstract(example()))
    assert (step, meta) == (7, {**META, "step": 7})
    assert_same(state, example(7))
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(example()), strict=True):
        assert leaf.sharding == want.sharding  # the mesh and the memory it was asked for
    assert reopened(store).newest_meta() == meta


def one_device():
    place = SingleDeviceSharding(jax.devices()[3])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), example())


@pytest.mark.parametrize(
    "target",
    [lambda: abstract(example(devices=4)), lambda: abstract(example(dim=1)), one_device],
    ids=["half the devices", "other dimension", "one device"],
)
def test_restores_onto_another_mesh(store, target):
    written(store, 1)
    _, state, _ = reopened(store).restore(target())
    assert_same(state, example(1))
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(target()), strict=True):
        assert leaf.sharding == want.sharding


def test_partial_reads_only_what_is_asked(store):
    written(store, 1)
    asked = {"params": abstract(example())["params"]}
    _, state, _ = reopened(store).restore(asked, partial=True)
    assert_same(state, {"params": example(1)["params"]})
    with pytest.raises(ConfigError, match=r"average \(found float32\[64, 128\], expected nothing"):
        reopened(store).restore(asked)


def test_a_donated_state_is_saved_as_it_was(store):
    state = example(1)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s["params"]), donate_argnums=0)
    before = jax.tree.map(lambda x: np.array(x), state["params"])
    store.save(1, {"params": state["params"]}, {})
    for _ in range(3):
        state["params"] = step({"params": state["params"]})
    _, saved, _ = store.restore({"params": abstract(state["params"])})
    assert_same(saved["params"], before)


def test_keeps_the_newest(store):
    directory = written(store, 10, 20, 30, 40, 50)
    assert store.steps() == [30, 40, 50]
    assert sorted(p.name for p in directory.iterdir()) == ["30", "40", "50"]


def test_a_step_is_written_once(store):
    directory = written(store, 5)
    before = (directory / "5").stat().st_mtime_ns
    written(store, 5)
    assert (directory / "5").stat().st_mtime_ns == before


def test_refuses_to_save_behind_a_step_it_did_not_restore(store):
    written(store, 20)
    other = reopened(store)
    with pytest.raises(ConfigError, match=r"already holds step 20.*another workdir"):
        other.save(10, example(), {})
    other.restore(abstract(example()))
    written(other, 21)
    assert other.steps() == [20, 21]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep is 0"):
        Store(tmp_path, keep=0)


def test_another_model_is_named_leaf_by_leaf(store):
    written(store, 1)
    other = abstract(example())
    other["params"]["w"] = jax.ShapeDtypeStruct((64, 32), np.float32)
    other["params"]["gate"] = jax.ShapeDtypeStruct((4,), np.float32)
    other["moments"][0] = jax.ShapeDtypeStruct((64, 128), np.float32)
    del other["average"], other["step"]
    with pytest.raises(ConfigError) as error:
        reopened(store).restore(other)
    message = str(error.value)
    assert "holds another model" in message and "another workdir" in message
    assert "params.w (found float32[64, 128], expected float32[64, 32])" in message
    assert "params.gate (found nothing, expected float32[4])" in message
    assert "moments.0 (found bfloat16[64, 128], expected float32[64, 128])" in message
    assert "and 2 more" in message


class FullDisk:
    def result(self):
        raise OSError("No space left on device")


def test_a_save_that_failed_is_reported_and_can_be_repeated(store, monkeypatch):
    written(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.v1.save_async", lambda *args, **kwargs: FullDisk())
        store.save(2, example(2), {})
    with pytest.raises(OSError, match="No space left"):
        store.save(3, example(3), {})
    written(store, 2, 3)
    assert store.steps() == [1, 2, 3]
