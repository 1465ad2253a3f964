"""Peak memory of a row of docs/data/compiled_memory.json, compiled again; for the row's file.

PYTHONPATH=tests:. .venv/bin/python tests/compiled_memory.py NAME

Needs the CUDA plugin (`pip install -e ".[cluster]"`) and minutes; prints the row as the compiler
reports it now. Without NAME it prints the names.
"""

import importlib
import json
import pathlib
import sys

import jax

from deepseek_jax import config as configs
from deepseek_jax.aot import cluster, compiled
from deepseek_jax.train import step

FILE = pathlib.Path(__file__).parents[1] / "docs/data/compiled_memory.json"


def rows():
    """Rows of the file by name."""
    return {row["name"]: row for row in json.loads(FILE.read_text())["rows"]}


def config_of(row):
    """The config of a row, with its overrides."""
    config = importlib.import_module(f"configs.{row['config']}").get_config()
    for key, value in row["overrides"].items():
        config.update_from_flattened_dict({key: value})
    return configs.parse(config)


def reported(row):
    """Peak bytes of a device that the compiler reports for a row's step."""
    config = config_of(row)
    mesh = cluster.mesh(config.mesh)
    return compiled.read(cluster.compile_for(step.lower(config, mesh)), mesh).peak_bytes


def main(name=""):
    if name not in rows():
        sys.exit(f"name one of {', '.join(rows())}")
    jax.config.update("jax_platforms", "cpu")
    row = rows()[name]
    print(json.dumps({**row, "jax": jax.__version__, "peak_bytes": reported(row)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
