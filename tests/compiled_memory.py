"""Peak memory of the rows of docs/data/compiled_memory.json, planned, and compiled again.

PYTHONPATH=tests:. .venv/bin/python tests/compiled_memory.py         prints the error of each row
PYTHONPATH=tests:. .venv/bin/python tests/compiled_memory.py NAME    compiles a row again: minutes

Compiling needs the CUDA plugin (`pip install -e ".[cluster]"`).
"""

import importlib
import json
import pathlib
import sys

import jax

from deepseek_jax import config as configs
from deepseek_jax.aot import cluster, compiled
from deepseek_jax.plan.memory_errors import errors
from deepseek_jax.table import text
from deepseek_jax.train import step

FILE = pathlib.Path(__file__).parents[1] / "docs/data/compiled_memory.json"


def rows():
    """Rows of the file by name."""
    return {row["name"]: row for row in json.loads(FILE.read_text())["rows"]}


def load(name, overrides):
    """The config of this name with other values for some dotted keys."""
    config = importlib.import_module(f"configs.{name}").get_config()
    config.update_from_flattened_dict(overrides)
    return configs.parse(config)


def reported(row):
    """Peak bytes of a device that the compiler reports for a row's step."""
    config = load(row["config"], row["overrides"])
    mesh = cluster.mesh(config.mesh)
    return compiled.read(cluster.compile_for(step.lower(config, mesh)), mesh).peak_bytes


def main(name=None):
    jax.config.update("jax_platforms", "cpu")
    if name is None:
        print(text({"rows": errors(FILE, load)}))
        return
    if name not in rows():
        sys.exit(f"name one of {', '.join(rows())}")
    row = rows()[name]
    print(json.dumps({**row, "jax": jax.__version__, "peak_bytes": reported(row)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
