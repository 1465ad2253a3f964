"""Temporary bytes of the compiled gradient program, as the compiler reports them; nothing is run.

The claim: logits exist for one chunk of one head. So temporaries do not grow with vocabulary times
tokens, and a further MTP module costs the same at any vocabulary: its own activations.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.bench.train import sized
from deepseek_jax.config import Config
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.train import state
from deepseek_jax.train.step import make_gradients

DEPTHS, VOCABULARIES, CHUNKS = (0, 1, 4), (8192, 32_768), (128, 512, 2048)
RECOMPUTE = ("none", "report", "full")


def measure(config: Config) -> dict[str, Any]:
    """Rows of bytes, each table changing one thing from MTP depth 1, vocabulary 8192, chunk 512.

    In `depth`, `per_module` is the increment over the row before for each module that was added,
    and `logits` one whole set of float32 logits, which that increment must not hold.
    """
    return {
        "depth": [row for vocab in VOCABULARIES for row in _depths(config, vocab)],
        "chunk": [
            {"chunk": chunk, "temp": temp_bytes(_of(config, loss_chunk=chunk))} for chunk in CHUNKS
        ],
        "recompute": [
            {"recompute": name, "temp": temp_bytes(_of(config, recompute=name))}
            for name in RECOMPUTE
        ],
    }


def _depths(config: Config, vocab: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for depth in DEPTHS:
        one = _of(config, mtp_depth=depth, vocab=vocab)
        row = {"vocab": vocab, "depth": depth, "temp": temp_bytes(one), "per_module": None}
        if rows:
            row["per_module"] = (row["temp"] - rows[-1]["temp"]) // (depth - rows[-1]["depth"])
        row["logits"] = 4 * one.batch.micro_sequences * one.batch.length * vocab
        rows.append(row)
    return rows


def _of(config: Config, **changes: Any) -> Config:
    """The measured config with keys of `model` or `layout` changed."""
    model = {"mtp_depth": 1} | {k: v for k, v in changes.items() if k in ("mtp_depth", "vocab")}
    rest = {k: v for k, v in changes.items() if k not in model}
    small = sized(config, **model)
    return dataclasses.replace(small, layout=dataclasses.replace(small.layout, unroll=1, **rest))


def temp_bytes(config: Config) -> int:
    """Temporaries of the gradient program of one micro-batch on one device."""
    mesh, layout = meshes.build(config.mesh), meshes.layout(config)
    _, weights, bias = state.split(abstract_model(config.model))
    shape = (1, config.batch.micro_sequences, config.batch.length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(mesh):
        gradients = jax.jit(make_gradients(config, layout, mesh))
        weight = jax.ShapeDtypeStruct((), jnp.float32)
        compiled = gradients.lower(weights, bias, tokens, count, weight).compile()
    return compiled.memory_analysis().temp_size_in_bytes
