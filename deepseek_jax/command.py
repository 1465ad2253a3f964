"""Shared parts of the command modules: flags, start-up, and one clear message for bad input."""

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from deepseek_jax import config_file, config_keys
from deepseek_jax.config import MESH_AXES, Config, ConfigError, parse, parse_saved
from deepseek_jax.config.hints import one_line
from deepseek_jax.runtime import signals

LONGEST_NAME = 255  # bytes, on every file system in use
LONGEST_PATH = 3840  # bytes: the 4,096 of Linux, less the names of a run's files

if TYPE_CHECKING:  # imported where it is used: JAX must not meet its devices before start-up
    from deepseek_jax.checkpoint.load import Checkpoint


def define_config_flag() -> Any:
    """Defines --config=FILE.py with overrides --config.any.key=value, to pass to `read_config`."""
    holder = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
    flags.FLAGS["config"].parser = _ConfigParser()
    flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS["config"])  # for --help
    return holder


def read_config(holder: Any) -> Config:
    """The checked config of a flag of `define_config_flag`; ConfigError where it was not given."""
    if holder.value is None:
        raise ConfigError("no config; pass --config=configs/v3_tiny.py or another file of configs/")
    # `convert` makes workdirs whose config.py returns the config.json beside it, which may be old.
    file = _config_path(sys.argv) or Path()
    if file.name == "config.py" and file.with_name("config.json").is_file():
        return parse_saved(holder.value.to_dict())
    return parse(holder.value)


def default_config() -> Config:
    """Config of this project's v3_tiny.py."""
    return parse(config_file.load(config_file.published() / "v3_tiny.py"))


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


def path(name: str, value: str) -> Path:
    """The path that --NAME=VALUE gives, with ~ resolved; ConfigError for what cannot be a path."""
    given = f"--{name}={value if len(value) < 100 else value[:60] + '...'}"
    if not value:
        raise ConfigError(f"--{name} is empty; give a path")
    try:
        raw = value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"--{name}={value!r} is not UTF-8; give another path") from error
    if b"\0" in raw:
        raise ConfigError(f"--{name}={value!r} has a null character; give another path")
    if len(raw) > LONGEST_PATH or max(map(len, raw.split(b"/"))) > LONGEST_NAME:
        raise ConfigError(
            f"{given} is too long: names have up to {LONGEST_NAME} bytes, paths {LONGEST_PATH:,}"
        )
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{given}: {error}; write the path out, from /") from error


def folder(flag: Any) -> Path:
    """The existing folder that a flag names; ConfigError if it is none."""
    found = path(flag.name, flag.value)
    if not found.is_dir():
        raise ConfigError(f"--{flag.name}={flag.value} is not a folder")
    return found


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
    file = _config_path(sys.argv)
    return file.stem if file else "run"


def define_process_flags() -> None:
    """Defines the flags that `start_processes` reads."""
    flags.DEFINE_integer("emulate_devices", None, "Pretend to have this many CPU devices.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for several processes.")
    flags.DEFINE_integer("processes", None, "How many processes there are.")
    flags.DEFINE_integer("process", None, "The number of this process, from 0.")
    flags.DEFINE_integer(
        "join_timeout", None, "Seconds to wait for the other processes; default: deadlines.join."
    )
    flags.DEFINE_string(
        "attempt", "", "Name of this start, the same in all its processes; others cannot join."
    )
    flags.DEFINE_string(
        "compilation_cache",
        None,
        "Folder of compiled programs, or off; default: JAX_COMPILATION_CACHE_DIR, else the user's "
        "cache folder.",
    )


def start_processes(join_timeout: int = 300) -> None:
    """Connects the processes and opens the folder of compiled programs.

    Call it before anything asks JAX for a device.

    Args:
      join_timeout: seconds to wait for the other processes, unless the flag says otherwise.
    """
    from deepseek_jax.runtime import compiled_programs, processes

    values = flags.FLAGS
    processes.start(
        values.coordinator,
        values.processes,
        values.process,
        values.emulate_devices,
        join_timeout=join_timeout if values.join_timeout is None else values.join_timeout,
        attempt=values.attempt,
    )
    given = values.compilation_cache
    compiled_programs.keep(
        given if given in (None, "off") else str(path("compilation_cache", given))
    )


def run(main: Callable[..., None], names: Sequence[str] = ()) -> None:
    """Runs a command; every error ends it with one line and the exit code of `endings`.

    Args:
      names: values of the one positional argument, which `main` is given; empty for a `main`
        without arguments.
    """
    from deepseek_jax import endings
    from deepseek_jax.runtime import environment

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

    sys.excepthook = sys.__excepthook__  # that of `startup` has done its work
    code, line, at_once = 0, "", False
    try:
        signals.working()
        environment.check()
        _check_overrides(sys.argv)
        try:
            app.run(guarded, flags_parser=_parse_flags)
        except SystemExit as stop:  # of absl, or the exit code of `main`
            code = stop.code if isinstance(stop.code, int) else 0
        endings.part()
    except BaseException as error:
        code, line = endings.of(error, _workdir())
        at_once = endings.at_once(error)
        endings.part(error)
    endings.leave(code, line, at_once=at_once)


def run_without_jax(main: Callable[[], None]) -> None:
    """Runs a command that computes nothing; JAX is imported for the words of an error alone."""

    def guarded(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise ConfigError(f"unexpected argument {arguments[1]!r}; flags look like --once")
        main()

    sys.excepthook = sys.__excepthook__
    try:
        signals.working()
        app.run(guarded, flags_parser=_parse_flags)
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:
            sys.stdout.flush()
            return
        from deepseek_jax import endings

        endings.leave(*endings.of(error, None))


def _workdir() -> Path | None:
    """Folder of --workdir, for a command that has this flag and was given it."""
    given = flags.FLAGS["workdir"].value if "workdir" in flags.FLAGS else None
    return Path(given) if given else None


class _ConfigParser(flags.ArgumentParser):
    """Takes the config that `_check_overrides` has read, so that a file runs once."""

    read: ConfigDict | None = None

    def parse(self, argument: str) -> ConfigDict:
        config, _ConfigParser.read = _ConfigParser.read, None
        return config_file.load(path("config", argument)) if config is None else config

    def flag_type(self) -> str:
        return "config file"


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(one_line(str(error))) from error


def _config_path(arguments: list[str]) -> Path | None:
    """The file of --config; ConfigError where it is empty or given twice."""
    found = []
    for position, argument in enumerate(arguments[1:], 1):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            following = arguments[position + 1 : position + 2]
            found.append(value if equals else "".join(following))
    if len(found) > 1:
        raise ConfigError(f"--config is given {len(found)} times; give one file")
    return path("config", found[0]) if found else None


def _check_overrides(arguments: list[str]) -> None:
    """Reads the config file and checks that it has every overridden key; absl names neither."""
    try:
        arguments = flags.FLAGS.read_flags_from_files(arguments, force_gnu=False)
    except (flags.Error, OSError, ValueError) as error:
        raise ConfigError(f"--flagfile: {error}") from error
    file = _config_path(arguments)
    overrides = [
        name.removeprefix("config.")
        for argument in arguments[1:]
        if argument.startswith("-")
        # --noconfig.KEY is False
        for name in [argument.lstrip("-").partition("=")[0].removeprefix("no")]
        if name.startswith("config.")
    ]
    if file is None:
        if overrides:
            raise ConfigError(f"--config.{overrides[0]} changes a config; give --config=FILE, too")
        return
    config = config_file.load(file)
    for key in overrides:
        config_keys.check(config, key)
    _ConfigParser.read = config
