"""Shared parts of the command modules: flags, start-up, and one clear message for bad input."""

import contextlib
import dataclasses
import difflib
import importlib
import os
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from deepseek_jax.config import MESH_AXES, RENAMED, Config, ConfigError, parse, parse_saved, renamed
from deepseek_jax.config.hints import one_line
from deepseek_jax.errors import RunError

if TYPE_CHECKING:  # imported where it is used: JAX must not meet its devices before start-up
    from deepseek_jax.checkpoint.load import Checkpoint


def define_config_flag() -> Any:
    """Defines --config=FILE.py with overrides --config.any.key=value, to pass to `read_config`."""
    return config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)


def read_config(holder: Any) -> Config:
    """The checked config of a flag of `define_config_flag`; ConfigError where it was not given."""
    if holder.value is None:
        raise ConfigError("no config; pass --config=configs/v3_tiny.py or another file of configs/")
    # `convert` makes workdirs whose config.py returns the config.json beside it, which may be old.
    path = _config_path(sys.argv) or Path()
    if path.name == "config.py" and path.with_name("config.json").is_file():
        return parse_saved(holder.value.to_dict())
    return parse(holder.value)


def default_config() -> Config:
    """Config of configs/v3_tiny.py in the working directory, else in the folder of this package."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[1]):
        if (folder / "configs" / "v3_tiny.py").is_file():
            sys.path.insert(0, str(folder))
            return parse(importlib.import_module("configs.v3_tiny").get_config())
    raise ConfigError("no configs/v3_tiny.py here; pass --config=FILE")


def config_of(checkpoint: "Checkpoint", given: Config | None, dtype: str | None) -> Config:
    """The config of a forward pass: `given` by --config, else the checkpoint's own.

    Args:
      dtype: dtype of weights and matmuls instead of the config's; None keeps that.
    """
    from deepseek_jax.checkpoint import load

    if given is None:
        return checkpoint.config(dtype)
    return given if dtype is None else load.with_recipe(given, dtype)


def parse_mesh(parts: list[str]) -> dict[str, int]:
    """Sizes by mesh axis from ["node:2", "gpu:4"]."""
    sizes = {}
    for part in parts:
        name, _, size = part.partition(":")
        if name not in MESH_AXES or not re.fullmatch("-?[0-9]+", size) or name in sizes:
            raise ConfigError(
                f"--mesh has {part!r}; expected each of {', '.join(MESH_AXES)} at most once, as "
                "node:2,gpu:4"
            )
        sizes[name] = int(size)
    return sizes


def folder(flag: Any) -> Path:
    """The existing folder that a flag names; ConfigError if it is none."""
    if not Path(flag.value).is_dir():
        raise ConfigError(f"--{flag.name}={flag.value} is not a folder")
    return Path(flag.value)


@contextlib.contextmanager
def naming(flag_of: Mapping[str, str]) -> Iterator[None]:
    """Rewrites the keys in a ConfigError to the flags of a command.

    The rest of the package names config keys and parameters; a command sets them by its own flags.

    Args:
      flag_of: flag by config key or parameter, as {"data.path": "--data"}.
    """
    try:
        yield
    except ConfigError as error:
        text = re.sub(r"(?<![\w./-])mesh\.(\w+)=(-?\d+)", r"--mesh=\1:\2", str(error))
        for key, flag in {"mesh.*": "--mesh", **flag_of}.items():
            text = re.sub(rf"(?<![\w./-]){re.escape(key)}(?![\w-])", flag, text)
        raise ConfigError(text) from error


def config_name() -> str:
    """Name of the run: the file name of --config without its ending, else "run"."""
    path = _config_path(sys.argv)
    return path.stem if path else "run"


def define_process_flags() -> None:
    """Defines the flags that `start_processes` reads."""
    flags.DEFINE_integer("emulate_devices", None, "Pretend to have this many CPU devices.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for several processes.")
    flags.DEFINE_integer("processes", None, "How many processes there are.")
    flags.DEFINE_integer("process", None, "The number of this process, from 0.")


def start_processes() -> None:
    """Connects the processes; call it before anything asks JAX for a device."""
    from deepseek_jax.runtime import processes

    values = flags.FLAGS
    processes.start(values.coordinator, values.processes, values.process, values.emulate_devices)


def run(main: Callable[..., None], names: Sequence[str] = ()) -> None:
    """Runs a command; ConfigError and RunError end it with one line and exit code 2 or 1.

    Args:
      names: values of the one positional argument, which `main` is given; empty for a `main`
        without arguments.
    """

    def guarded(arguments: list[str]) -> None:
        chosen = arguments[1:2] if names else []
        if names and (not chosen or chosen[0] not in names):
            found = f"there is no {chosen[0]!r}" if chosen else "no NAME given"
            raise ConfigError(f"{found}; name one of {', '.join(names)}")
        if len(arguments) > 1 + len(chosen):
            raise ConfigError(
                f"unexpected argument {arguments[-1]!r}; flags look like --config=FILE"
            )
        logging.set_verbosity(logging.WARNING)
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
        main(*chosen)

    _tune_memory()
    try:
        _check_overrides(sys.argv)
        app.run(guarded, flags_parser=_parse_flags)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


# glibc's heap uses huge pages and keeps freed memory for the next step: blocks up to 32 MiB (the
# most that it allows), 1 GiB in all.
_MALLOC = {"hugetlb": 1, "mmap_threshold": 32 << 20, "trim_threshold": 1 << 30}


def _tune_memory() -> None:
    """Starts this program again, once, with glibc's heap set up for a step's temporaries.

    XLA's CPU client and its matmuls allocate temporaries anew each time. In fresh pages of 4 KiB a
    quarter of a small model's step goes into page faults (measured: `bench train` with and without
    an empty GLIBC_TUNABLES). glibc reads these settings at start-up only.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in _MALLOC.items())
        environment = os.environ | {"GLIBC_TUNABLES": tunables}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, TypeError, ValueError) as error:
        raise ConfigError(one_line(str(error))) from error


def _config_path(arguments: list[str]) -> Path | None:
    for position, argument in enumerate(arguments[1:], 1):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            following = arguments[position + 1 : position + 2]
            return Path(value if equals else "".join(following))
    return None


def _check_overrides(arguments: list[str]) -> None:
    """Checks that the config file has every overridden key; absl's errors name neither."""
    path = _config_path(arguments)
    if path is None:
        return
    if not path.is_file():
        raise ConfigError(f"--config={path}: no such file; see configs/")
    # A config file may import its neighbours as `configs.NAME` from any working directory.
    sys.path.insert(0, str(path.resolve().parent.parent))
    make = runpy.run_path(str(path)).get("get_config")
    if make is None:
        raise ConfigError(f"--config={path}: no get_config() in it; configs/v3_tiny.py shows one")
    try:
        make()
    except (AttributeError, KeyError) as error:  # ConfigDict's, for a key that it does not have
        raise ConfigError(f"--config={path}: {_no_such_key(error)}") from error
    for argument in arguments[1:]:
        name = argument.lstrip("-").partition("=")[0].removeprefix("no")  # --noconfig.KEY is False
        if argument.startswith("-") and name.startswith("config."):
            _check_key(make(), name.removeprefix("config."))


def _no_such_key(error: Exception) -> str:
    """Message for a ConfigDict's error about an unknown key, with the nearest key that exists."""
    # Setting says 'Key "NAME" does not exist', reading "'NAME'" alone.
    found = re.search(r"""Key \W?["'](\w+)|^\W*["'](\w+)\W*$""", str(error))
    if not found:
        return str(error)
    name = found[1] or found[2]
    for old in RENAMED:
        if old.endswith(f".{name}"):
            return renamed(old)
    sections = [field.type for field in dataclasses.fields(Config)]
    parts = [part for part in sections if dataclasses.is_dataclass(part)]
    known = sorted({field.name for part in parts for field in dataclasses.fields(part)})
    near = difflib.get_close_matches(name, known, n=1)
    return f"there is no key {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def _check_key(config: ConfigDict, key: str) -> None:
    here: Any = config
    *sections, last = key.split(".")
    for depth, part in enumerate([*sections, last]):
        if not isinstance(here, ConfigDict) or part not in here:
            known = list(here.keys()) if isinstance(here, ConfigDict) else []
            if message := renamed(key):
                raise ConfigError(f"--config.{message}")
            near = difflib.get_close_matches(part, known, n=1)
            path = ".".join([*sections[:depth], near[0]]) if near else ", ".join(known)
            hint = f"did you mean --config.{path}?" if near else f"known here: {path}"
            raise ConfigError(f"unknown key --config.{key}; {hint}")
        here = here[part]
    if isinstance(here, ConfigDict):
        raise ConfigError(f"--config.{key} is a section; set one of {', '.join(here.keys())}")
