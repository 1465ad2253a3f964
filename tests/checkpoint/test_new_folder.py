"""Targets of a conversion: on their own disk, never through a link, whole or not at all."""

import os

import pytest

from deepseek_jax.checkpoint import new_folder
from deepseek_jax.config import ConfigError


def fill(target, content="new"):
    with new_folder.appearing(target) as folder:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "0").write_text(content)
        (folder / "config.json").write_text(content)
        return folder


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


MADE = ["checkpoints", "checkpoints/0", "config.json"]


def test_an_absent_target_appears_by_a_rename(tmp_path):
    inside = fill(tmp_path / "some" / "out")
    assert inside == tmp_path / "some" / ".out.converting"
    assert tree(tmp_path) == ["some", "some/out", *(f"some/out/{name}" for name in MADE)]


def test_an_empty_folder_is_filled_in_place(tmp_path, monkeypatch):
    """The folder itself stays: it may be a mount point, or the working directory of a shell."""
    target = tmp_path / "disk"
    target.mkdir()
    (target / "lost+found").mkdir()
    before = target.stat().st_ino
    link = tmp_path / "link"
    link.symlink_to(target)
    assert fill(link) == target / ".converting"
    assert tree(target) == [*MADE, "lost+found"] and target.stat().st_ino == before
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    fill(new_folder.Path("."))
    assert tree(here) == MADE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "here", "link"]


@pytest.mark.parametrize("there", [True, False], ids=["empty", "absent"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError(28, "full"), ConfigError])
def test_nothing_is_left_after_an_error(there, error, tmp_path):
    target = tmp_path / "out"
    if there:
        target.mkdir()
    with (
        pytest.raises((ConfigError, KeyboardInterrupt, SystemExit)),
        new_folder.appearing(target) as folder,
    ):
        (folder / "half").write_text("")
        raise error
    assert tree(tmp_path) == (["out"] if there else [])


def test_an_error_while_files_move_up_leaves_none(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    rename, names = os.rename, []

    def failing(old, new):
        names.append(new.name)
        if new.name == "config.json":
            raise OSError(5, "Input/output error")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(ConfigError, match="cannot be written"):
        fill(target)
    assert names == ["checkpoints", "config.json"] and tree(tmp_path) == ["out"]


def test_what_a_killed_process_left_inside_is_used_again(tmp_path):
    left = tmp_path / "out" / ".converting"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    (left / "link").symlink_to(tmp_path)
    fill(tmp_path / "out")
    assert tree(tmp_path / "out") == MADE


@pytest.mark.parametrize("there", [True, False], ids=["empty", "absent"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_nothing_is_written_or_removed_through_a_planted_link(there, kind, tmp_path):
    target, others = tmp_path / "out", tmp_path / "others"
    others.mkdir()
    (others / "mine").write_text("kept")
    planted = target / ".converting" if there else tmp_path / ".out.converting"
    planted.parent.mkdir(exist_ok=True)
    planted.symlink_to(others) if kind == "link" else planted.write_text("kept")
    with pytest.raises(ConfigError, match=rf"{planted}, which target={target} is made in, is no"):
        fill(target)
    assert tree(others) == ["mine"] and (others / "mine").read_text() == "kept"


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    (tmp_path / ".out.converting").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="belongs to another user; remove it"):
        fill(tmp_path / "out")


def test_targets_that_are_taken_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    for name, words in {
        "": "exists and is not an empty folder",
        "file": "exists and is not an empty folder",
        "file/below": r"cannot be written \(Not a directory\)",
        "nowhere": r"cannot be written \(No such file or directory\)",
        "x" * 300: r"cannot be written \(File name too long\)",
    }.items():
        with pytest.raises(ConfigError, match=words):
            fill(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]


def test_a_full_disk_is_refused(tmp_path, monkeypatch):
    usage = new_folder.shutil._ntuple_diskusage(10**9, 0, 5 << 20)
    monkeypatch.setattr(new_folder.shutil, "disk_usage", lambda folder: usage)
    new_folder.check_space(tmp_path, tmp_path / "out", 4_180_000)
    with pytest.raises(ConfigError, match="5,247,074 bytes are needed and its disk has 5,242,880"):
        new_folder.check_space(tmp_path, tmp_path / "out", 4 << 20)
