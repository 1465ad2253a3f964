"""Progress of a process: its sections, its file, and the time since it last changed."""

import json
import time

import pytest

from deepseek_jax.runtime import progress


@pytest.fixture
def publisher(tmp_path):
    made = progress.Publisher(1, 2)
    yield made
    made.close()


def test_sections_and_steps(publisher):
    assert publisher.now.section == "join"
    publisher.enter("start")
    with publisher.inside("compile"):
        assert publisher.now.section == "compile"
    assert publisher.now.section == "start"
    publisher.dispatched(7)
    publisher.dispatched(8)
    assert (publisher.now.section, publisher.now.step) == ("first_step", 8)
    assert publisher.now.median_step_seconds is None
    publisher.done()
    assert publisher.now.section == "step"
    publisher.dispatched(9)
    publisher.done()
    assert (publisher.now.section, publisher.now.step) == ("step", 9)
    assert publisher.now.median_step_seconds > 0
    with publisher.inside("save"):
        assert publisher.now.section == "save"
    assert publisher.now.section == "step"


def test_a_section_that_fails_is_the_last_one(publisher):
    with pytest.raises(ValueError), publisher.inside("compile"):
        raise ValueError
    publisher.ended(1, "broken")
    assert (publisher.now.section, publisher.now.code) == ("compile", 1)


def test_the_clock_starts_again_with_each_step(publisher):
    publisher.dispatched(1)
    time.sleep(0.1)
    assert publisher.seconds >= 0.1
    publisher.enter("first_step")  # where it is already
    assert publisher.seconds >= 0.1
    publisher.dispatched(2)
    assert publisher.seconds < 0.1


def test_the_file_follows(publisher, tmp_path):
    publisher.attach(tmp_path, 4)
    file = tmp_path / "progress" / "process_1.json"
    assert json.loads(file.read_text())["section"] == "join"
    publisher.enter("save")
    until = time.monotonic() + 10
    while json.loads(file.read_text())["section"] != "save":
        assert time.monotonic() < until
        time.sleep(0.02)
    told = json.loads(file.read_text())
    assert told.keys() == {
        "process", "processes", "host", "pid", "attempt", "section", "step", "time",
        "median_step_seconds", "beat", "code", "reason",
    }  # fmt: skip
    assert (told["process"], told["processes"], told["attempt"]) == (1, 2, 4)
    beats = told["beat"]
    until = time.monotonic() + 10
    while json.loads(file.read_text())["beat"] == beats:
        assert time.monotonic() < until
        time.sleep(0.05)
    publisher.ended(0)
    told = json.loads(file.read_text())
    assert (told["section"], told["code"]) == ("ended", 0)
    assert [path.name for path in file.parent.iterdir()] == ["process_1.json"]


def test_a_folder_that_cannot_be_written_stops_nothing(publisher, tmp_path):
    (tmp_path / "progress").write_text("a file")
    publisher.attach(tmp_path, 0)
    publisher.enter("save")
    assert publisher.now.section == "save"
    publisher.ended(1, "x")
    assert (publisher.now.code, publisher.now.reason) == (1, "x")
    assert (tmp_path / "progress").read_text() == "a file"


def test_writes_of_a_large_run_are_few():
    assert progress.interval(2) == 1.0
    assert progress.interval(2048) == pytest.approx(20.48)
