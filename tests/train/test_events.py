"""TensorBoard events: readable by TensorBoard, whatever happens to the disk."""

import os
import shutil

import pytest
from disks import full
from reports import row, run

from deepseek_jax.train.events import Events


def read(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder)).Reload()


def steps(folder):
    return [scalar.step for scalar in read(folder).Scalars("loss")]


def test_tensorboard_reads_the_scalars_and_forgets_the_interrupted_ones(tmp_path):
    run(tmp_path, range(1, 6), screen=False).close()
    run(tmp_path, range(4, 8), first=3, screen=False).close()
    events = read(tmp_path / "tensorboard")
    assert [scalar.step for scalar in events.Scalars("loss")] == list(range(1, 8))
    assert events.Scalars("loss")[1].value == pytest.approx(4.0)
    assert "expert_load" not in events.Tags()["scalars"]


@pytest.mark.parametrize("room", [0, 70])
def test_events_that_do_not_fit_are_dropped_and_later_ones_are_read(tmp_path, room):
    events = Events(tmp_path / "tensorboard")
    events.begin(0, 0)
    events.step(row(1))
    with full("tensorboard", room):
        for step in range(2, 30):
            with pytest.raises(OSError, match="No space left"):
                events.step(row(step))
    events.step(row(30))
    events.close()
    assert steps(tmp_path / "tensorboard") == [1, 30]


def test_events_begin_as_soon_as_there_is_room(tmp_path):
    events = Events(tmp_path / "tensorboard")
    with full("tensorboard", 5):
        for act in (lambda: events.begin(3, 0), lambda: events.step(row(4))):
            with pytest.raises(OSError, match="No space left"):
                act()
    events.step(row(5))
    events.close()
    assert steps(tmp_path / "tensorboard") == [5]


def test_a_folder_that_was_removed_is_made_again_but_not_the_workdir(tmp_path):
    events = Events(tmp_path / "run" / "tensorboard")
    (tmp_path / "run").mkdir()
    events.begin(0, 0)
    shutil.rmtree(tmp_path / "run" / "tensorboard")
    with pytest.raises(FileNotFoundError):
        events.step(row(1))
    events.step(row(2))
    assert steps(tmp_path / "run" / "tensorboard") == [2]
    shutil.rmtree(tmp_path / "run")
    for step in (3, 4):
        with pytest.raises(FileNotFoundError):
            events.step(row(step))
    assert not (tmp_path / "run").exists()


def test_a_number_beyond_float32_is_infinite(tmp_path):
    events = Events(tmp_path)
    events.begin(0, 0)
    events.step({"step": 1, "loss": 1e300})
    events.close()
    assert read(tmp_path).Scalars("loss")[0].value == float("inf")
    assert len(os.listdir(tmp_path)) == 1
