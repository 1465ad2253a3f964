"""Temporary bytes of the compiled gradient program, as the compiler reports them; nothing runs.

The claim: logits exist for one chunk of one head at a time. At any MTP depth, temporaries therefore
grow with the vocabulary by the head's gradient and one chunk of logits, not by logits of a batch.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.bench.train import sized
from deepseek_jax.config import Config
from deepseek_jax.model import params
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.train.step import make_gradients

DEPTHS, VOCABULARIES, CHUNKS = (0, 1, 4), (8192, 32_768), (128, 512, 2048)
RECOMPUTE = ("none", "report", "full")


def measure(config: Config) -> dict[str, Any]:
    """Tables of bytes; each changes one size from MTP depth 1, vocabulary 8192 and chunk 512.

    In `depth`, `per_module` is the increment over the row before, per added module: its saved
    activations above all. `growth` is the increment by the larger vocabulary at that depth, and
    `logits_growth` that of one head's float32 logits: the claim is growth < logits_growth.
    The compiler reports peaks, so that increments are not exact sums.
    """
    return {
        "depth": _depths(config),
        "chunk": [
            {"chunk": chunk, "temp": temp_bytes(with_sizes(config, loss_chunk=chunk))}
            for chunk in CHUNKS
        ],
        "recompute": [
            {"recompute": name, "temp": temp_bytes(with_sizes(config, recompute=name))}
            for name in RECOMPUTE
        ],
    }


def _depths(config: Config) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    smallest: dict[int, int] = {}
    for vocab in VOCABULARIES:
        before: tuple[int, int] | None = None
        for depth in DEPTHS:
            one = with_sizes(config, mtp_depth=depth, vocab=vocab)
            temp, tokens = temp_bytes(one), one.batch.micro_sequences * one.batch.length
            row: dict[str, Any] = {"vocab": vocab, "depth": depth, "temp": temp}
            row["per_module"] = (temp - before[1]) // (depth - before[0]) if before else None
            row["growth"] = temp - smallest.setdefault(depth, temp)
            row["logits_growth"] = 4 * tokens * (vocab - VOCABULARIES[0])
            before = (depth, temp)
            rows.append(row)
    return rows


def with_sizes(config: Config, *, mtp_depth: int = 1, vocab: int = 8192, **layout: Any) -> Config:
    """Config of the benchmark with an MTP depth, a vocabulary and keys of `layout`."""
    small = sized(config, mtp_depth=mtp_depth, vocab=vocab)
    return dataclasses.replace(small, layout=dataclasses.replace(small.layout, unroll=1, **layout))


def temp_bytes(config: Config) -> int:
    """Temporary bytes of the gradient program of one micro-batch on one device."""
    mesh, layout = meshes.build(config.mesh), meshes.layout(config)
    _, weights, bias = params.split(abstract_model(config.model))
    shape = (1, config.batch.micro_sequences, config.batch.length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    with jax.set_mesh(mesh):
        gradients = jax.jit(make_gradients(config, layout, mesh))
        weight = jax.ShapeDtypeStruct((), jnp.float32)
        compiled = gradients.lower(weights, bias, tokens, count, weight).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None  # CPU and GPU both have one
    return analysis.temp_size_in_bytes
