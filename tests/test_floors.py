"""Floors of the package: imports go strictly down, never round, and some libraries have one owner.

Two folders on one floor never import each other.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "deepseek_jax"

FLOORS = (
    ("config", "errors", "table", "host_cpu"),
    ("hardware", "kernels", "data", "runtime"),
    ("precision",),
    ("parallel",),
    ("model",),
    ("checkpoint",),
    ("train", "serve"),
    ("aot",),
    ("plan",),
    ("bench",),
)
COMMANDS = len(FLOORS)  # every other file at the top of the package, and every __main__.py
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}

OWNERS = {
    "orbax": "checkpoint/store.py",
    "tensorstore": "checkpoint/chunks.py",
}  # library -> the only module that may import it
FLAGS = ("absl.flags", "absl.app", "ml_collections.config_flags", "argparse", "click")

# What Flax keeps beside a parameter's value, and its functions that read that.
METADATA_METHODS = {"get_metadata", "set_metadata", "has_metadata"}
METADATA_FUNCTIONS = {
    "with_partitioning", "with_metadata", "transform_metadata", "get_named_sharding",
    "get_partition_spec", "logical_to_mesh", "logical_axis_rules",
}  # fmt: skip
METADATA_OWNER = "model/params.py"


def modules(package: Path) -> dict[str, str]:
    """Path below the package -> source."""
    return {
        path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")
    }


def floor(path: str) -> int | None:
    """The floor of a module; None for the package's own __init__.py, which every module imports."""
    head, *rest = path.split("/")
    if path == "__init__.py":
        return None
    if rest and rest[-1] == "__main__.py":
        return COMMANDS
    return FLOOR.get(head.removesuffix(".py"), COMMANDS)


def imported(path: str, source: str) -> list[tuple[int, str]]:
    """(line, dotted name) of every import, at any depth of the code, relative ones resolved."""
    here = ["deepseek_jax", *path.split("/")[:-1]]
    names = []
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = here[: len(here) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and _dynamic(node):
            names.append((node.lineno, node.args[0].value))
    return names


def _dynamic(call: ast.Call) -> bool:
    """importlib.import_module("name") or __import__("name")."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    named = bool(call.args) and isinstance(getattr(call.args[0], "value", None), str)
    return name in ("import_module", "__import__") and named


def violations(sources: dict[str, str]) -> list[str]:
    """Every broken rule, as "path:line reason"."""
    found = []
    for path, source in sources.items():
        here = floor(path)
        for line, name in imported(path, source):
            top, *rest = name.split(".")
            if top == "deepseek_jax" and rest and here is not None:
                target = rest[0]
                inside = any(p == f"{target}.py" or p.startswith(f"{target}/") for p in sources)
                command = rest[1:2] == ["__main__"]
                there = COMMANDS if command else FLOOR.get(target, COMMANDS)
                own = path.split("/")[0].removesuffix(".py")
                beside = there == here < COMMANDS and target != own
                if inside and (there > here or beside):
                    found.append(f"{path}:{line} floor {here} imports {name} of floor {there}")
            if top in OWNERS and path != OWNERS[top]:
                found.append(f"{path}:{line} imports {name}; only {OWNERS[top]} may")
            if name.startswith(FLAGS) and here != COMMANDS:
                found.append(f"{path}:{line} imports {name}; only command modules read flags")
        found += [
            f"{path}:{line} uses {name}; only {METADATA_OWNER} touches flax metadata"
            for line, name in metadata_uses(path, source)
            if path != METADATA_OWNER
        ]
    return found


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Modules that import one another, each circle once, as dotted names."""
    named = {path.removesuffix(".py").replace("/", "."): path for path in sources}
    named = {name.removesuffix(".__init__"): path for name, path in named.items()}
    uses: dict[str, set[str]] = {}
    for name, path in named.items():
        uses[name] = set()
        for _, target in imported(path, sources[path]):
            dotted = target.removeprefix("deepseek_jax.")
            known = (dotted, dotted.rpartition(".")[0])
            uses[name] |= {other for other in known[:1] if other in named and other != name} or {
                other for other in known[1:] if other in named and other != name
            }
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, above: list[str]) -> None:
        if name in above:
            found.append(above[above.index(name) :])
        elif name not in done:
            for other in sorted(uses[name]):
                visit(other, [*above, name])
            done.add(name)

    for name in sorted(uses):
        visit(name, [])
    return found


def metadata_uses(path: str, source: str) -> list[tuple[int, str]]:
    """(line, expression) of `variable.get_metadata`, `nnx.get_named_sharding` and their like."""
    found = []
    for node in ast.walk(ast.parse(source, path)):
        if isinstance(node, ast.Attribute):
            if node.attr in METADATA_METHODS | METADATA_FUNCTIONS:
                found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flax"):
            names = {alias.name for alias in node.names} & METADATA_FUNCTIONS
            found += [(node.lineno, name) for name in names]
    return found


def test_the_package_keeps_to_its_floors():
    sources = modules(PACKAGE)
    assert "config/schema.py" in sources
    assert violations(sources) == []


def test_no_modules_import_each_other():
    assert circles(modules(PACKAGE)) == []


def test_a_planted_circle_is_found():
    above = "from deepseek_jax.parallel import mesh"
    below = "from deepseek_jax.parallel.axes import Layout"
    sources = {**HOUSE, "parallel/axes.py": above, "parallel/mesh.py": below}
    assert circles(sources) == [["parallel.axes", "parallel.mesh"]]


def test_every_folder_has_a_floor():
    folders = {path.split("/")[0] for path in modules(PACKAGE) if "/" in path}
    assert folders <= set(FLOOR), "give the new folder a floor in FLOORS"


HOUSE = {
    "__init__.py": "", "config/rules.py": "", "config/parse.py": "", "main.py": "",
    "processes.py": "", "model/mla.py": "",
    "parallel/axes.py": "", "parallel/mesh.py": "", "train/loop.py": "", "plan/__init__.py": "",
    "plan/__main__.py": "", "checkpoint/store.py": "", "serve/engine.py": "",
    "hardware/chips.py": "", "data/corpus.py": "",
}  # fmt: skip


@pytest.mark.parametrize(
    "path, source, reason",
    [
        (
            "parallel/axes.py",
            "from deepseek_jax.model import mla",
            "floor 3 imports deepseek_jax.mo",
        ),
        ("parallel/axes.py", "from deepseek_jax.model.mla import A", "floor 3 imports"),
        ("parallel/axes.py", "import deepseek_jax.model.mla", "floor 3 imports"),
        ("parallel/axes.py", "from deepseek_jax import model", "floor 3 imports"),
        ("parallel/axes.py", "from ..model import mla", "floor 3 imports"),
        ("parallel/axes.py", "from .. import model", "floor 3 imports"),
        ("parallel/axes.py", "def f():\n  from deepseek_jax.model import mla", "axes.py:2 floor 3"),
        ("parallel/axes.py", "import importlib as i\ni.import_module('deepseek_jax.model')", ":2"),
        ("config/rules.py", "from deepseek_jax.parallel.axes import names", "floor 0 imports"),
        ("model/mla.py", "from deepseek_jax.train.loop import run", "floor 4 imports"),
        ("train/loop.py", "from deepseek_jax.main import main", "floor 6 imports"),
        ("train/loop.py", "from deepseek_jax import processes", "floor 6 imports"),
        ("train/loop.py", "import deepseek_jax.plan.__main__", "floor 6 imports"),
        ("train/loop.py", "import orbax.checkpoint", "only checkpoint/store.py"),
        ("main.py", "from orbax.checkpoint import v1", "only checkpoint/store.py"),
        ("train/loop.py", "from absl import flags", "only command modules"),
        ("config/parse.py", "from ml_collections import config_flags", "only command modules"),
        ("plan/__init__.py", "import argparse", "only command modules"),
        ("model/mla.py", "from flax import nnx\nnnx.with_partitioning(f, s)", "mla.py:2 uses"),
        ("model/mla.py", "from flax import nnx as x\nx.get_partition_spec(s)", "mla.py:2 uses"),
        ("model/mla.py", "import flax.nnx as n\nn.spmd.get_named_sharding(s)", "mla.py:2 uses"),
        ("model/mla.py", "from flax.nnx import with_metadata", "mla.py:1 uses"),
        ("train/loop.py", "axes = variable.get_metadata('axes')", "loop.py:1 uses"),
        ("train/loop.py", "from deepseek_jax.serve import engine", "floor 6 imports"),
        ("hardware/chips.py", "from deepseek_jax.data import corpus", "floor 1 imports"),
    ],
)
def test_a_planted_violation_is_caught(path, source, reason):
    found = violations({**HOUSE, path: source})
    assert len(found) == 1 and reason in found[0], found


@pytest.mark.parametrize(
    "path, source",
    [
        ("model/mla.py", "from deepseek_jax.parallel import axes"),
        ("parallel/mesh.py", "from deepseek_jax.parallel.axes import Layout\nfrom . import axes"),
        ("main.py", "from absl import app, flags\nfrom deepseek_jax.train import loop"),
        ("plan/__main__.py", "from absl import flags\nfrom deepseek_jax import processes"),
        ("checkpoint/store.py", "from orbax.checkpoint import v1"),
        ("model/params.py", "from flax import nnx\nnnx.get_named_sharding(s, mesh)"),
        ("model/mla.py", "import jax\nfrom flax import nnx\njax.vmap(f)\nnnx.Param(x)"),
        ("__init__.py", "from deepseek_jax.checkpoint import store"),
        ("train/loop.py", "import deepseek_jax\nfrom deepseek_jax import __version__"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert violations({**HOUSE, path: source}) == []
