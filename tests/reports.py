"""Made-up rows of a run, and reports of them."""

import json

import numpy as np

from deepseek_jax.train.report import Report

LAYERS, EXPERTS = 3, 8


def row(step, **changes):
    rng = np.random.default_rng(step)
    load = rng.dirichlet(np.ones(EXPERTS) * 20, LAYERS)
    return {
        "step": step, "tokens": 1000 * step, "loss": 8 / step, "mtp_loss": 9 / step,
        "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_second": 100.0,
        "max_violation": float(load.max() * EXPERTS - 1), "expert_load": load.tolist(), **changes,
    }  # fmt: skip


def run(workdir, steps, *, first=0, total=10_000, **options):
    done = Report(workdir, total_tokens=total, **options)
    done.begin(first, 1000 * first)
    for step in steps:
        done.step(row(step))
    return done


def rows_of(workdir):
    """Strict JSON: bare NaN is an error here."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def steps_of(workdir):
    return [row["step"] for row in rows_of(workdir)]


SUMMARY = {
    "held_out_bits_per_byte": 2.3051, "gzip_bits_per_byte": 2.3649, "held_out_bytes": 412_345,
    "held_out_loss": 3.5,
}  # fmt: skip
LAST_WORD = "held-out 2.31 bits per byte (gzip -9: 2.36) on 412,345 bytes"
