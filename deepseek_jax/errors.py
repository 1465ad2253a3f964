"""Error of a run that cannot go on for a reason outside its config.

`ConfigError` (`config/schema.py`) is the other error that ends a command with one line.
"""

import errno
import os

# Errors of a file system that libraries in C++ pass on as text alone.
_SYSTEM = tuple(
    os.strerror(number)
    for number in (
        errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM,
        errno.ESTALE, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EEXIST,
    )
)  # fmt: skip


# Exit code of a process that ends because another one hangs or is gone: started again, the run goes
# on. Launch scripts know it.
AGAIN = 76


class RunError(RuntimeError):
    """A run that had to stop: a full disk, a lost process, a loss that is not finite.

    The message is one line that says what happened, what is kept and how to go on. A command ends
    with it and exit code 1.
    """


class SaveFailed(RunError):
    """A checkpoint that cannot be written, while all else of the run can go on."""


class LostPeer(RunError):
    """A run that had to stop because another process of it is gone; ends with code `AGAIN`."""


def reason(error: BaseException) -> str:
    """Cause of an error in a few words, on one line.

    They are those of the operating system if it is at the bottom of the error, else the error's
    own, with its type where they alone say nothing.
    """
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    for found in causes:
        if isinstance(found, OSError) and found.strerror:
            return found.strerror
    texts = [" ".join(str(found).split()) for found in causes]
    for text in texts:
        for words in _SYSTEM:
            if words in text:
                return words
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    name, text = type(error).__name__, texts[0]
    text = text if text.isprintable() else repr(text)[1:-1]
    said = f"{name}: {text}" if isinstance(error, LookupError) else text or name
    return said[:200]
