"""Folder of saved steps between two saves: leftovers removed, and a first look at its disk."""

import shutil
from pathlib import Path


def remove_leftovers(directory: Path) -> None:
    """Removes what killed processes and failed saves have left."""
    for path in directory.glob("*.*"):
        if path.suffix == ".deleted" or ".orbax-checkpoint-tmp" in path.name:
            shutil.rmtree(path, ignore_errors=True)


def check_writable(directory: Path) -> None:
    """Raises OSError where nothing can be made in `directory`, or it is no directory.

    In orbax the same error leaves threads that wait for a folder which another one cannot make: for
    20 minutes, also at Python's exit (seen with orbax 0.12.8).
    """
    probe = directory / "probe.deleted"
    probe.mkdir()
    probe.rmdir()
