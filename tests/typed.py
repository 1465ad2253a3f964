"""Commands in this process: `typed` is a fixture of the folders whose conftest.py imports it."""

import importlib
import sys
import warnings

import pytest
from absl import app, flags

from deepseek_jax import command


@pytest.fixture
def typed(monkeypatch, capsys):
    """typed(command, *arguments) -> (exit code, stdout, stderr), in this process.

    The commands are modules that define flags, each of which only one module of a process can do.
    """
    values = flags.FLAGS.__dict__
    whole = dict(values)
    own = [n for module, n in values["__flags_by_module"].items() if module.startswith("absl")]
    fresh = dict(flags.FlagValues().__dict__)
    fresh["__flags"] = {name: whole["__flags"][name] for f in own for name in (g.name for g in f)}

    def swap(to):
        values.clear()
        values.update(to)

    def run(name, *arguments):
        module = f"deepseek_jax.{name}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.setattr(command, "start_processes", lambda *_: None)  # pytest keeps its devices
        monkeypatch.setattr(app, "run", lambda run, flags_parser: run(flags_parser(sys.argv)))
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back later
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        swap({**fresh, "__flags": dict(fresh["__flags"])})
        code = 0
        try:
            loaded = importlib.import_module(module)
            named = arguments and not str(arguments[0]).startswith("-")
            command.run(loaded.main, getattr(loaded, "NAMES", ()) if named else ())
        except SystemExit as stop:
            code = stop.code
        finally:
            swap(whole)
        return code, *capsys.readouterr()

    return run
