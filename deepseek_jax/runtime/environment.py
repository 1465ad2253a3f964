"""Variables of the environment that make JAX fail or compute otherwise than the program says."""

import mmap
import os
from pathlib import Path

import jax
import jaxlib

from deepseek_jax.config import ConfigError


def check() -> None:
    """Raises ConfigError for a variable that would end the process, or change what it computes."""
    if jax.config.values["jax_enable_x64"]:
        raise ConfigError(
            "64-bit mode is on (JAX_ENABLE_X64), and every dtype here is a 32-bit one; unset it"
        )
    if jax.config.values["jax_disable_jit"]:
        raise ConfigError("JAX_DISABLE_JIT is on, and a sharded step cannot run so; unset it")
    _check_xla_flags(os.environ.get("XLA_FLAGS", ""))


def _check_xla_flags(given: str) -> None:
    """XLA aborts the process at a flag that it does not know, or at one without its dashes."""
    if given and not given.lstrip().startswith("-"):  # the name of a file of flags
        if not Path(given.strip()).is_file():
            raise ConfigError(f"XLA_FLAGS={given!r} is neither flags, as --NAME=VALUE, nor a file")
        return
    names = [part.lstrip("-").partition("=")[0] for part in given.split() if part.startswith("-")]
    unknown = _unknown(dict.fromkeys(names))
    if unknown:
        raise ConfigError(f"XLA_FLAGS has --{unknown[0]}, which this XLA does not know; remove it")


def _unknown(names: dict[str, None]) -> list[str]:
    """Names that no library of jaxlib or of a plugin holds, in which XLA keeps them as text."""
    left = [name for name in names if name]
    site = Path(jaxlib.__file__).parent
    for library in [*site.glob("*.so"), *site.parent.glob("jax_plugins/*/*.so")]:
        if not left:
            break
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            left = [name for name in left if text.find(name.encode(errors="replace")) < 0]
    return left
