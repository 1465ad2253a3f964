"""Damage to files: flipped bytes, lost ends, lost files."""

import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

FLIPS = (0.0, 0.02, 0.3, 0.5, 0.77, 0.98, 1.0)  # places in a file
ENDS = (0.0, 0.01, 0.5, 0.9, 1.0)  # of a file that lost the rest; 1.0 lacks a byte


def flipped(at: int, mask: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[at] ^= mask
        file.write_bytes(data)

    return damage


def cut(size: int) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:size])

    return damage


def files_of(folder: Path) -> list[Path]:
    """Every file below a folder, by its path from there."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def damages(
    size: int, flips: Collection[float] = FLIPS, ends: Collection[float] = ENDS
) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Name and act of some kinds of damage to a file of this size."""
    yield "lost", Path.unlink
    if size:
        for share in flips:
            at = min(int(share * size), size - 1)
            yield f"bit of byte {at} of {size} flipped", flipped(at, 1 << at % 8)
            yield f"byte {at} of {size} inverted", flipped(at, 0xFF)
        for length in sorted({min(int(share * size), size - 1) for share in ends}):
            yield f"cut to {length} of {size} bytes", cut(length)


def few_damages(size: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Less than half of `damages`, of every kind."""
    return damages(size, flips=(0.0, 0.5, 0.98), ends=(0.0, 1.0))


def many_flips(size: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every third byte inverted, and every twenty-first length."""
    for at in range(0, size, 3):
        yield f"byte {at} of {size} inverted", flipped(at, 0xFF)
    for length in range(0, size, 21):
        yield f"cut to {length} of {size} bytes", cut(length)


def fresh(original: Path, copy: Path) -> Path:
    """A copy of a folder in place of the one that was there."""
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(original, copy))
