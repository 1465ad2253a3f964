"""Starts of a run that are counted, and the crash loop that is stopped."""

import dataclasses
import json

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import AGAIN
from deepseek_jax.runtime import progress, restarts


def test_starts_without_progress_are_stopped(tmp_path):
    for number in range(3):
        start = restarts.begin(tmp_path, 40, most=2)
        assert (start.attempt, start.without_progress) == (number, number)
        restarts.ended(tmp_path, start, AGAIN, "process 3 is gone")
    with pytest.raises(
        ConfigError, match=r"3 starts in a row .* after step 40, .* process 3 is gone"
    ):
        restarts.begin(tmp_path, 40, most=2)
    assert restarts.begin(tmp_path, 40, most=0).attempt == 3


@pytest.mark.parametrize("code, step", [(0, 40), (AGAIN, 60)])
def test_a_good_end_and_a_new_checkpoint_begin_to_count_again(tmp_path, code, step):
    for _ in range(2):
        restarts.ended(tmp_path, restarts.begin(tmp_path, 40, most=9), 1, "")
    start = restarts.begin(tmp_path, 40, most=9)
    assert start.without_progress == 2
    restarts.ended(tmp_path, start, code, "")
    assert restarts.begin(tmp_path, step, most=9).without_progress == 0


def test_a_start_that_was_killed_counts_and_another_process_says_why(tmp_path):
    start = restarts.begin(tmp_path, 0, most=1)
    for _ in range(1):
        start = restarts.begin(tmp_path, 0, most=1)
    told = dataclasses.replace(
        progress.Publisher(1, 2).now, attempt=start.attempt, code=AGAIN, reason="process 0 is gone"
    )
    file = tmp_path / progress.FOLDER / "process_1.json"
    progress.replace(file, dataclasses.asdict(told))
    with pytest.raises(ConfigError, match=r"2 starts in a row .* The last one: process 0 is gone"):
        restarts.begin(tmp_path, 0, most=1)


def test_a_record_that_cannot_be_read_counts_nothing(tmp_path):
    (tmp_path / progress.FOLDER).mkdir()
    odd = dataclasses.asdict(restarts.Start(0, 0, 0, 0.0)) | {"attempt": None, "step": "a"}
    for text in ("", "[]", '{"attempt": 3}', json.dumps(odd)):
        (tmp_path / progress.FOLDER / restarts.NAME).write_text(text)
        assert restarts.begin(tmp_path, 0, most=1).attempt == 0


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / progress.FOLDER).touch()
    with pytest.raises(ConfigError, match=rf"{tmp_path}/progress cannot be written \(File exists"):
        restarts.begin(tmp_path, 0, most=1)


def test_a_start_that_never_began_leaves_nothing(tmp_path):
    restarts.begin(tmp_path, 0, most=1)
    restarts.forget(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    first = restarts.begin(tmp_path, 3, most=1)
    before = restarts.last(tmp_path)
    assert before == first
    restarts.begin(tmp_path, 3, most=1)
    restarts.forget(tmp_path, before)
    assert restarts.last(tmp_path) == first


def test_the_record_is_what_the_docstring_says(tmp_path):
    restarts.begin(tmp_path, 5, most=1)
    told = json.loads((tmp_path / progress.FOLDER / restarts.NAME).read_text())
    assert told.keys() == {"attempt", "step", "without_progress", "time", "code", "reason"}
