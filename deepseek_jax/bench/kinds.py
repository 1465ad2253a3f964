"""Bits per byte of a run trained on the default text, for each kind of Python file, beside gzip.

All files are outside the training data: held-out ones; tests, which the default text leaves out
with their folder; tables, which it leaves out by their content (`data/library.py`). A file is heavy
in data if more than a tenth of its bytes are in lines that begin with a literal. `gzip -9` reads
the files of a kind as one stream, so that it may refer to the file before; the model does not see
further back than one sequence.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.checkpoint.load import Checkpoint, open_checkpoint
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data import library, scoring
from deepseek_jax.data.corpus import prepare
from deepseek_jax.model import execution
from deepseek_jax.model.params import split
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.mesh import forward_config
from deepseek_jax.train import evaluation

TOKENS = 1 << 15  # at most, of each kind
DATA_HEAVY = 0.1
_SEED = 0


def measure(config: Config, *, directory: Path) -> dict[str, Any]:
    """Scores the newest checkpoint of a workdir on each kind of file.

    Args:
      config: not used; the run's own config is.
      directory: the workdir.

    Raises:
      ConfigError: no run, or one on a text of its own.
    """
    checkpoint = open_checkpoint(directory)
    run, words = checkpoint.run, checkpoint.tokenizer
    if run is None or words is None or run.data.path:
        raise ConfigError(
            f"--checkpoint={directory} is no run on the default text; give the workdir of a run "
            "with data.path=''"
        )
    length = run.batch.length
    rows = []
    run = forward_config(run, {}, length)
    grid, layout = meshes.build(run.mesh, jax.devices()[:1]), meshes.layout(run)
    with jax.set_mesh(grid):
        _, weights, bias = split(checkpoint.load(execution.of(run).recipe, layout, grid))
        score = evaluation.make_score(run, layout, grid)
        for kind, texts in _kinds(run, checkpoint).items():
            laid = scoring.of_text(texts, words, length=length, tokens=TOKENS)
            scored = score(weights, bias, laid.sequences, laid.valid)
            rows.append(
                {
                    "kind": kind,
                    "files": laid.documents,
                    "bytes": laid.bytes,
                    "nats_per_token": scored.nats / scored.targets,
                    "bits_per_byte": scored.bits_per_byte(laid.bytes),
                    "gzip_bits_per_byte": 8 * laid.gzip_bytes / laid.bytes,
                }
            )
    return {"kinds": rows}


def _kinds(run: Config, checkpoint: Checkpoint) -> dict[str, list[str]]:
    """Texts of each kind, in a fixed random order; kinds without files are left out."""
    corpus = prepare(run.data, vocab=checkpoint.model.vocab)
    held = [corpus.text(int(document)) for document in corpus.held_out]
    heavy = [library.literal_share(text) > DATA_HEAVY for text in held]
    root = library.root()
    tables = sorted(set(library.modules(root, tables=True)) - set(library.modules(root)))
    tests = sorted((root / "test").glob("test_*.py"))
    modules = [text.decode() for text, many in zip(held, heavy, strict=True) if not many]
    kinds = {
        "ordinary modules": modules,
        "modules heavy in data": [t.decode() for t, many in zip(held, heavy, strict=True) if many],
        "tests": _read(tests),
        "tables": _read(tables),
    }
    return {kind: texts for kind, texts in kinds.items() if texts}


def _read(files: list[Path]) -> list[str]:
    order = np.random.default_rng(_SEED).permutation(len(files))
    return [files[i].read_bytes().decode(errors="replace") for i in order[:200]]
