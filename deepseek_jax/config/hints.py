"""Words of error messages: values and texts on one line, and names that were meant."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

from deepseek_jax.config.schema import ConfigError

_LONGEST = 60  # characters of a value in a message


def need(holds: bool, message: str) -> None:
    """Raises ConfigError with `message` unless `holds`."""
    if not holds:
        raise ConfigError(message)


def did_you_mean(name: str, known: Iterable[Any]) -> str:
    """Question with the known name nearest to `name`, to end a message; empty if none is near."""
    near = difflib.get_close_matches(name[:_LONGEST], map(str, known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def shown(value: Any, longest: int = _LONGEST) -> str:
    """A value as a message shows it: on one line, and a long one without its middle."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, or too deep a table
        text = f"{'an' if isinstance(value, int) else 'a'} {type(value).__name__}, too long to show"
    text = re.sub(r"\s+", " ", text)
    return text if len(text) <= longest else f"{text[: longest - 12]}...{text[-8:]}"


def name_shown(name: Any, longest: int = _LONGEST) -> str:
    """A name as a message shows it: without quotes where it is printable and short."""
    text = str(name) if isinstance(name, str) else shown(name, longest)
    return text if text.isprintable() and len(text) <= longest else shown(name, longest)


def one_line(text: object, longest: int = 250) -> str:
    """A path, or a text of others, on one printable line; a long one without its middle."""
    line = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(text))
    end = min(60, longest // 3)
    return line if len(line) <= longest else f"{line[: longest - 3 - end]}...{line[-end:]}"
