"""Benchmarks, one module each; `python -m deepseek_jax.bench NAME` runs one."""

NAMES = (
    "train", "profile", "moe", "memory", "residuals", "layer", "kernels", "grouped", "tiles",
    "dispatch", "pipeline", "load", "decode", "speculate", "indexer", "kinds", "cache_formats",
    "precision", "skip",
)  # fmt: skip
