"""Default text: the source files of the running Python's standard library, without its tables.

A file is a table, and left out, if one of two things is true of its content:
  - more than half of its bytes are in lines that begin with a literal, which is a number or a
    string after any brackets and signs, and no triple-quoted string: codec and entity tables,
    aliases, the settings of the build;
  - a comment in its first 1,000 bytes says that a program generated it.
Such files repeat one pattern, which any model predicts: with them, a score on held-out text says
little about ordinary modules. Tests and copies of other packages are left out by their folders.
"""

import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from deepseek_jax.data import files as listing

SKIPPED = (
    "test", "tests", "idlelib", "lib2to3", "ensurepip", "site-packages", "dist-packages",
)  # fmt: skip

_BEFORE_A_LITERAL = b" \t([{+-"
_LITERAL = re.compile(rb"""[bBuU]?(?:'(?!'')|"(?!"")|[0-9])""")
_GENERATED = re.compile(rb"^(?:#.*generated (?:by|from)|This file is .*generated)", re.M | re.I)
_HEAD = 1000  # bytes in which a file says that it was generated


def root() -> Path:
    """Folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def modules(folder: Path, *, tables: bool = False) -> list[Path]:
    """Python files under a folder, sorted; tables are left out unless `tables` is true.

    Raises:
      ConfigError: A folder that cannot be listed, or a file that cannot be read.
    """
    found, _ = listing.under(folder, SKIPPED)
    python = [file for file in found if file.suffix == ".py"]
    return [f for f in python if tables or not is_table(listing.Content(f).all())]


def is_table(content: bytes) -> bool:
    """Whether a Python file is a table, as the head of this module says."""
    if _GENERATED.search(content[:_HEAD]):
        return True
    return literal_share(content) > 0.5


def literal_share(content: bytes) -> float:
    """Share of the bytes of a Python file that are in lines that begin with a literal."""
    return sum(map(len, _literal_lines(content))) / max(len(content), 1)


def _literal_lines(content: bytes) -> Iterator[bytes]:
    """Yields the lines that begin with a literal."""
    for line in content.split(b"\n"):
        if _LITERAL.match(line.lstrip(_BEFORE_A_LITERAL)):
            yield line
