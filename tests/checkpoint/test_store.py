"""Checkpoint store: steps that are saved, restored onto any mesh, kept, and refused."""

import errno
import gc
import re
import shutil
from concurrent import futures

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from stored import META, abstract, assert_same, example, reopened, value_of, written

from deepseek_jax.checkpoint import store as stores
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import ConfigError
from deepseek_jax.errors import RunError


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
        assert leaf.sharding == want.sharding  # the requested mesh and memory
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


def test_a_step_that_is_being_read_stays_until_a_later_save(store):
    directory = written(store, 1)
    leaves = reopened(store).open(abstract(example()))
    written(store, 2, 3, 4, 5)
    assert store.steps() == [1, 3, 4, 5]
    np.testing.assert_array_equal(leaves.read("params.w"), value_of(example(1)))
    del leaves
    gc.collect()
    written(store, 6)
    assert store.steps() == [4, 5, 6] and not (directory / "1").exists()


def test_a_reader_takes_a_newer_step_where_a_run_removed_the_one_it_began(store, monkeypatch):
    written(store, 1, 2)
    reader, load = reopened(store), Store._load

    def removed(self, step, *rest):
        if step == 2:
            written(store, 3, 4, 5)
            shutil.rmtree(store._directory / "2", ignore_errors=True)
        return load(self, step, *rest)

    monkeypatch.setattr(Store, "_load", removed)
    step, state, _ = reader.restore(abstract(example()))
    assert step == 5
    assert_same(state, example(5))


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


def test_a_part_that_is_not_wanted_any_more_is_left_out(store):
    written(store, 1)
    wanted = abstract(example())
    del wanted["average"]
    step, state, _ = reopened(store).restore(wanted, spare="average")
    assert step == 1 and "average" not in state
    del wanted["moments"]
    with pytest.raises(ConfigError, match=r"moments\.0 \(found bfloat16\[64, 128\], expected noth"):
        reopened(store).restore(wanted, spare="average")


# What tensorstore and Python say of a disk, and what a run says of it.
DISKS = {
    "full": (
        ValueError('RESOURCE_EXHAUSTED: Failed writing: "x": No space left on device'),
        r"No space left on device: [\d,.]+ MB free for a checkpoint of 0\.1 MB\). Make room there",
    ),
    "quota": (OSError(errno.EDQUOT, "Quota exceeded"), r"Quota exceeded\). Make room there"),
    "read-only": (OSError(errno.EROFS, "Read-only"), r"Read-only\). Make it writable"),
    "permission": (OSError(errno.EACCES, "Denied"), r"Denied\). Make it writable"),
}


def break_saves(monkeypatch, error):
    """Makes the next saves fail in the background, as orbax does."""

    class Broken:
        def result(self):
            raise error

    monkeypatch.setattr("orbax.checkpoint.v1.save_async", lambda *args, **kwargs: Broken())


@pytest.mark.parametrize("error, words", DISKS.values(), ids=DISKS)
def test_a_save_that_failed_is_reported_and_can_be_repeated(store, monkeypatch, error, words):
    written(store, 1)
    with monkeypatch.context() as patch:
        break_saves(patch, error)
        store.save(2, example(2), {})
        futures.wait([store._pending])
        told = str(store.failure())
    assert store.failure() is None  # told once
    path = store._directory / "2"
    assert re.match(rf"checkpoint {path} cannot be written \({words}", told), told
    assert told.endswith("the newest checkpoint is step 1, from which the same command goes on")
    written(store, 2, 3)
    assert store.steps() == [1, 2, 3]


@pytest.mark.parametrize("call", ["save", "wait", "close"])
def test_a_save_that_failed_is_not_forgotten(store, monkeypatch, call):
    with monkeypatch.context() as patch:
        break_saves(patch, OSError(errno.ENOSPC, "No space left on device"))
        store.save(2, example(2), {})
    arguments = (3, example(3), {}) if call == "save" else ()
    words = r"No space left.* there is no checkpoint yet, so the same command starts again$"
    with pytest.raises(RunError, match=words):
        getattr(store, call)(*arguments)


def test_a_failed_save_does_not_hide_the_error_of_the_run(tmp_path, monkeypatch, caplog):
    with pytest.raises(ZeroDivisionError), Store(tmp_path / "checkpoints", keep=1) as store:
        break_saves(monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
        store.save(2, example(2), {})
        raise ZeroDivisionError
    [said] = caplog.messages
    assert "No space left on device" in said


def test_a_directory_that_was_removed_is_not_made_again(store):
    directory = written(store, 1)
    shutil.rmtree(directory)
    with pytest.raises(RunError, match=r"/2 cannot .* \(No such file .*Put the folder back"):
        store.save(2, example(2), {})
    assert not directory.exists()
    directory.touch()
    words = r"\(Not a directory\)\. Put the folder back; there is no checkpoint yet, so the same "
    with pytest.raises(RunError, match=words):
        store.save(2, example(2), {})


def test_a_step_that_ends_in_a_removed_workdir_is_taken_back(tmp_path, monkeypatch):
    """The workdir is removed while a write goes on, which makes its folders again."""

    def check():
        if gone:
            raise RunError("the workdir was removed")

    gone = []
    store = Store(tmp_path / "run" / "checkpoints", keep=1, check=check)
    finish = store._finish
    monkeypatch.setattr(store, "_finish", lambda *rest: [gone.append(True), finish(*rest)])
    store.save(1, example(1), {})
    with pytest.raises(RunError, match=r"^the workdir was removed$"):
        store.close()
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_never_ends_ends_where_the_folder_is_gone(tmp_path, monkeypatch):
    """As of several processes, whose orbax waits for ever after the removal of its folder."""

    def gone():
        raise RunError("the folder is gone")

    store = Store(tmp_path / "run", keep=1, check=gone)
    store._pending = futures.Future()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(stores, "raise_together", lambda attempt: attempt())
    monkeypatch.setattr(stores, "all_true", lambda fine: fine)
    monkeypatch.setattr(stores, "_LOOK_SECONDS", 0.1)
    with pytest.raises(RunError, match="the folder is gone"):
        store.settle()
