"""Damaged checkpoints: a broken step is skipped with one warning, and never counts as kept."""

import logging
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from stored import abstract, assert_same, data_file, example, reopened, value_of, written

from deepseek_jax.checkpoint import manifest
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import ConfigError


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def with_one(seed: int, leaf: str, value: float):
    """The example state with one element of one leaf replaced."""

    def changed(path, array):
        if jax.tree_util.keystr(path, simple=True, separator=".") != leaf:
            return array
        values = np.array(array)
        values[3, 5] = value
        return jax.device_put(values, array.sharding)

    return jax.tree.map_with_path(changed, example(seed))


def poisoned(store: Store, step: int, leaf: str, value: float) -> None:
    """Saves a step that is not finite, as a store did that looked at weights alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "require_finite", lambda *_: None)
        store.save(step, with_one(step, leaf, value), {"step": step})
    store.wait()


ACCIDENTS = {
    "no files": lambda d: [shutil.rmtree(d), d.mkdir()],
    "no record": lambda d: (d / "_CHECKPOINT_METADATA").unlink(),
    "short record": lambda d: truncate(d / "_CHECKPOINT_METADATA"),
    "wrong record": lambda d: (d / "_CHECKPOINT_METADATA").write_text(
        (d / "_CHECKPOINT_METADATA").read_text().replace('"tokens": 1', '"tokens": 2')
    ),
    "no tree": lambda d: (d / "state" / "_METADATA").unlink(),
    "short tree": lambda d: truncate(d / "state" / "_METADATA"),
    "no index": lambda d: (d / "state" / "manifest.ocdbt").unlink(),
    "no data": lambda d: data_file(d).unlink(),
    "short data": lambda d: truncate(data_file(d)),
    "flipped data": lambda d: flip(data_file(d)),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_broken_step_is_skipped_with_one_warning(store, accident, caplog, capfd):
    directory = written(store, 1, 2, 3)
    ACCIDENTS[accident](directory / "3")
    resumed = reopened(store)
    with caplog.at_level(logging.WARNING):
        step, state, meta = resumed.restore(abstract(example()))
    assert (step, meta["step"], int(state["step"])) == (2, 2, 2)
    assert_same(state, example(2))
    [warning] = caplog.records
    assert f"{directory}/3 cannot be read" in warning.getMessage()
    assert "\n" not in warning.getMessage()
    assert capfd.readouterr().err == ""

    written(resumed, 3)  # the same step again: the broken one is moved, no good one is removed
    assert resumed.steps() == [1, 2, 3] and (directory / "3.broken").is_dir()
    step, state, _ = reopened(store).restore(abstract(example()))
    assert step == 3
    assert_same(state, example(3))


@pytest.mark.parametrize("accident", ["no data", "short data", "flipped data", "no index"])
def test_a_broken_step_is_not_read_in_parts_either(store, accident, caplog, capfd):
    directory = written(store, 1, 2)
    ACCIDENTS[accident](directory / "2")
    with caplog.at_level(logging.WARNING):
        leaves = reopened(store).open(abstract(example()))
    np.testing.assert_array_equal(leaves.read("params.w"), value_of(example(1)))
    [warning] = caplog.records
    assert f"{directory}/2 cannot be read" in warning.getMessage()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("value", [np.nan, -np.inf], ids=str)
@pytest.mark.parametrize("leaf", ["params.w", "moments.1", "average"])
def test_a_step_that_is_not_finite_is_skipped_with_one_warning(store, leaf, value, caplog):
    directory = written(store, 1)
    poisoned(store, 2, leaf, value)
    resumed = reopened(store)
    with caplog.at_level(logging.WARNING):
        step, state, _ = resumed.restore(abstract(example()))
    assert step == 1
    assert_same(state, example(1))
    [warning] = caplog.messages
    assert warning == (
        f"checkpoint {directory}/2 holds NaN or infinite values, trying an older one ({leaf})"
    )
    written(resumed, 2)  # the same step again, this time finite
    assert resumed.steps() == [1, 2] and (directory / "2.broken").is_dir()
    if leaf != "params.w":  # a reader of the weights alone does not look at the rest
        return
    poisoned(resumed, 3, leaf, value)
    leaves = reopened(store).open({"params": abstract(example())["params"]})
    np.testing.assert_array_equal(leaves.read("params.w"), value_of(example(2)))


@pytest.mark.parametrize("leaf", ["params.w", "moments.1", "average"])
def test_a_state_that_is_not_finite_is_not_saved(store, leaf):
    written(store, 1)
    with pytest.raises(manifest.NotFiniteLeaves, match=rf"^{leaf}$"):
        store.save(2, with_one(2, leaf, np.inf), {})
    assert store.steps() == [1] and store.newest == 1


def test_never_goes_on_from_a_state_that_is_not_finite(store):
    directory = store._directory
    poisoned(store, 1, "average", np.nan)
    words = rf"{directory} holds 1 .*\(the newest holds NaN or infinite values: average\)"
    with pytest.raises(ConfigError, match=words):
        reopened(store).restore(abstract(example()))


def test_broken_steps_do_not_count_as_kept(tmp_path):
    first = Store(tmp_path, keep=2)
    directory = written(first, 10, 20)
    shutil.copytree(directory / "20", directory / "30")  # its record has another step
    for broken in (20, 30):
        data_file(directory / str(broken)).unlink()
    resumed = Store(tmp_path, keep=2)
    assert resumed.restore(abstract(example()))[0] == 10
    written(resumed, 11)
    assert resumed.steps() == [10, 11]


def test_never_starts_over_when_nothing_can_be_read(store):
    directory = written(store, 1, 2)
    for step in (1, 2):
        data_file(directory / str(step)).unlink()
    with pytest.raises(ConfigError, match=rf"{directory} holds 2 checkpoints and none can be used"):
        reopened(store).restore(abstract(example()))
