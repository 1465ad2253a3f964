"""Error of a run that cannot go on for a reason outside its config.

`ConfigError` (`config/schema.py`) is the other error that ends a command with one line.
"""


class RunError(RuntimeError):
    """A run that had to stop: a full disk, a lost process, a loss that is not finite.

    The message is one line that says what happened, what is kept and how to go on. A command ends
    with it and exit code 1.
    """
