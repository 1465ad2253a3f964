"""Variables of the environment that make JAX fail or compute otherwise than the program says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax

from deepseek_jax.config import ConfigError

MOST_EMULATED = 1024  # devices


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
    """XLA aborts a process at a flag that it does not know, and at a value that it cannot read."""
    if not given:
        return
    if not given.lstrip().startswith("-") and not Path(given.strip()).is_file():
        raise ConfigError(f"XLA_FLAGS={given!r} is neither flags, as --NAME=VALUE, nor a file")
    count = re.search(r"--xla_force_host_platform_device_count=(-?\d+)", given)
    if count and not 1 <= int(count[1][:9]) <= MOST_EMULATED:
        raise ConfigError(f"XLA_FLAGS has {count[0]}; expected 1 to {MOST_EMULATED:,} devices")
    # Another process reads them first, which takes a tenth of a second.
    read = [sys.executable, "-I", "-c", "from jaxlib import _jax; _jax.CompileOptions()"]
    tried = subprocess.run(read, capture_output=True, text=True, errors="replace", check=False)
    found = re.search(r"\] (Unknown flag.*|Couldn't interpret.*)", tried.stderr)
    if tried.returncode < 0 or found:
        why = found[1].rstrip(".") if found else f"XLA cannot read {given!r}"
        raise ConfigError(f"{why}; remove it from XLA_FLAGS, or mend it")
