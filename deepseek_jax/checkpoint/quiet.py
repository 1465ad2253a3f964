"""Silence of orbax: what it logs on the way to an exception, which is told in one line instead."""

import functools
import logging
import sys
import warnings
from typing import Any


@functools.cache
def silence() -> None:
    """Silences orbax's log for good, in this process.

    It logs from threads of its own, at any time until a save ends. Python's reports of reads that
    orbax abandons when the read of one leaf fails are silenced, too.
    """
    logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def without_abandoned(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        abandoned = code is not None and "orbax" in code.co_filename
        if not abandoned and str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = without_abandoned
