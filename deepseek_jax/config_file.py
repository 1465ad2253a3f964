"""The file of --config: run once, and every error in it told in one line.

A config file may import its neighbours and the configs of this project as `configs.NAME`. Nothing
else beside it can be imported: its folder is never on sys.path, where a file such as grain.py would
replace a package.
"""

import contextlib
import importlib.machinery
import importlib.util
import inspect
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from deepseek_jax.config import ConfigError
from deepseek_jax.config_keys import no_such_key
from deepseek_jax.errors import reason
from deepseek_jax.runtime.signals import Stopped

PACKAGE = Path(__file__).resolve().parent
LARGEST = 1 << 20  # bytes
MODULE = "deepseek_jax_config_file"


def published() -> Path:
    """The folder of this project's configs: in an installed package, or beside it."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parent / "configs"


def load(path: Path) -> ConfigDict:
    """Loads the ConfigDict that get_config() of a file returns, locked.

    Raises:
      ConfigError: names the file, the line where there is one, and the error.
    """
    source = _read(path)
    module = types.ModuleType(MODULE)
    module.__file__ = str(path)
    with _told(path), _neighbours(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        sys.modules[MODULE] = module
        exec(compile(source, str(path), "exec"), module.__dict__)
    make = getattr(module, "get_config", None)
    if make is None:
        raise ConfigError(f"--config={path}: no get_config() in it; configs/v3_tiny.py shows one")
    if not callable(make) or _needs_arguments(make):
        raise ConfigError(
            f"--config={path}: get_config must be a function without arguments; "
            "configs/v3_tiny.py shows one"
        )
    with _told(path), _neighbours(path):
        config = make()
    if not isinstance(config, ConfigDict) or isinstance(config, FrozenConfigDict):
        raise ConfigError(
            f"--config={path}: get_config() returned {type(config).__name__}, and must return the "
            "ConfigDict; configs/v3_tiny.py shows one"
        )
    with _told(path):
        config.to_dict()  # computes references, and needs keys that can be sorted
        return config.lock()


def _read(path: Path) -> bytes:
    name = f"--config={path}"
    try:
        if not path.exists():
            raise ConfigError(f"{name}: no such file; this project's configs are in {published()}")
        if not path.is_file():
            raise ConfigError(f"{name} is no file; give a Python file such as configs/v3_tiny.py")
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{name} has {path.stat().st_size:,} bytes, too many for a config")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} cannot be read ({reason(error)})") from error


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Any error of the file's code, sys.exit() included, as one line."""
    try:
        yield
    except Stopped:
        raise
    except SyntaxError as error:
        line = f": line {error.lineno}" if error.filename == str(path) and error.lineno else ""
        said = f"{error.msg}; a config is a Python file with get_config()"
        raise ConfigError(f"--config={path}{line}: {said}") from error
    except BaseException as error:
        line = _line(error, path)
        if isinstance(error, AttributeError | KeyError):  # of a ConfigDict without such a key
            said = no_such_key(error)
        else:
            said = f"{type(error).__name__}: {_message(error)}".removesuffix(": ")
        said = " ".join(said.split())
        raise ConfigError(f"--config={path}{line}: {said}") from error


def _message(error: BaseException) -> str:
    """The text of an error of any class; "" where its class cannot say it."""
    try:
        return str(error)
    except Exception:
        return ""


def _line(error: BaseException, path: Path) -> str:
    """The last line of the file that was running, as ": line 7"."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            found = f": line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _needs_arguments(make: Any) -> bool:
    try:
        inspect.signature(make).bind()
    except (TypeError, ValueError):
        return True
    return False


@contextlib.contextmanager
def _neighbours(path: Path) -> Iterator[None]:
    """Lets `configs` be imported: from the folder of that name near the file, then from ours."""
    before = {name: sys.modules.pop(name) for name in _loaded()}
    near = path.resolve().parent.parent / "configs"
    folders = [str(folder) for folder in dict.fromkeys((near, published())) if folder.is_dir()]
    finder = _Configs(folders)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in _loaded():
            del sys.modules[name]
        sys.modules.update(before)


def _loaded() -> list[str]:
    return [name for name in sys.modules if name == "configs" or name.startswith("configs.")]


class _Configs:
    """Finds the package `configs`, and nothing else, in given folders."""

    def __init__(self, folders: list[str]):
        self._folders = folders

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "configs":
            return None
        first = Path(self._folders[0], "__init__.py") if self._folders else Path()
        if first.is_file():
            return importlib.util.spec_from_file_location(
                name, first, submodule_search_locations=self._folders
            )
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = self._folders
        return spec
