"""A file that grows by whole pieces."""

import shutil

import pytest
from disks import full

from deepseek_jax.train.append import AppendedFile


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before ")
    return path


@pytest.mark.parametrize("room", [0, 3])
def test_a_piece_that_does_not_fit_leaves_nothing_and_the_next_one_is_whole(path, room):
    file = AppendedFile(path)
    file.append(b"first ")
    with full("file", room), pytest.raises(OSError, match="No space left"):
        file.append(b"second ")
    assert path.read_bytes() == b"before first "
    file.append(b"third")
    assert path.read_bytes() == b"before first third"
    file.close()
    file.close()


def test_a_file_that_was_removed_is_not_made_again(path):
    file = AppendedFile(path)
    file.append(b"first ")
    path.unlink()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            file.append(b"second ")
    assert not path.exists()


def test_a_file_that_was_replaced_is_gone_on_with(path, tmp_path):
    file = AppendedFile(path)
    file.append(b"first ")
    shutil.copyfile(path, tmp_path / "copy")
    (tmp_path / "copy").replace(path)
    file.append(b"second")
    assert path.read_bytes() == b"before first second"
