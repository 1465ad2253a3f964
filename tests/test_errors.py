"""Words for the cause of an error."""

import errno

import pytest

from deepseek_jax.errors import reason


def caused(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error, words",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "folder/file"),
            "No space left on device",
        ),
        (OSError(0, "it is not a regular file"), "it is not a regular file"),
        (caused(RuntimeError("cannot save"), OSError(errno.EROFS, "Read-only")), "Read-only"),
        (ValueError("write failed:\n Permission denied [open]"), "Permission denied"),
        (ValueError("a value\n of \x1b[1m two lines"), r"a value of \x1b[1m two lines"),
        (KeyError("hash"), "KeyError: 'hash'"),
        (MemoryError(), "MemoryError"),
        (RecursionError("maximum recursion depth exceeded"), "it is nested too deeply"),
        (ValueError("x" * 300), "x" * 200),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else type(value).__name__,
)
def test_the_cause_is_told_in_a_few_words(error, words):
    assert reason(error) == words
