"""Tests that need a GPU. They run without the settings of the CPU tests:

PYTHONPATH=tests:. python -m pytest --noconftest tests/gpu

The speed of the kernels, and whether they are right: `settle.py`.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations.grouped import by_loop

from deepseek_jax.precision import grouped

pytestmark = [
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="this machine has no GPU"),
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning"),
]

# Rows of each expert: even; ragged, with an empty one and rows that are nobody's; all for one.
SIZES = {"even": (128, 128, 128, 128), "ragged": (3, 0, 301, 77), "one": (0, 512, 0, 0)}
ROWS, EXPERTS, WIDE, OUT = 512, 4, 384, 200

# Four steps of a small model in this process's own backend, as JSON.
STEPS = """
import json, small, trainer
config = small.config(**{changes!r})
t = trainer.Trainer(config)
metrics = t.run(4)
print(json.dumps({{"loss": [float(m["loss"]) for m in metrics],
                   "grad_norm": [float(m["grad_norm"]) for m in metrics]}}))
"""


@pytest.mark.parametrize("dtype, rtol", [("float32", 1e-6), ("bfloat16", 4e-3)])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_grouped_matmul_and_its_gradients(sizes, dtype, rtol):
    """Each result to rtol of its norm: float32 sums in another order, or bfloat16's rounding."""
    keys = jax.random.split(jax.random.key(1), 3)
    rows = jax.random.normal(keys[0], (ROWS, WIDE), dtype)
    weight = jax.random.normal(keys[1], (EXPERTS, WIDE, OUT), dtype)
    pull = jax.random.normal(keys[2], (ROWS, OUT), dtype)

    @jax.jit
    def run(rows, weight, pull):
        out, back = jax.vjp(
            lambda rows, weight: grouped.grouped_matmul(
                rows, weight, jnp.asarray(sizes, jnp.int32), likely=ROWS
            ),
            rows,
            weight,
        )
        return out, *back(pull)

    assert "__gpu$xla.gpu.triton" in run.lower(rows, weight, pull).as_text(), "not the kernel"
    for got, want in zip(run(rows, weight, pull), by_loop(rows, weight, sizes, pull), strict=True):
        error = np.linalg.norm(np.asarray(got).astype(np.float64) - want)
        assert error <= rtol * np.linalg.norm(want)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layout_recompute": "report", "layout_micro_batches_in_flight": 2, "model_mtp_depth": 2},
        {"layout_recompute": "full", "optimizer_moments": "bfloat16", "optimizer_ema_decay": 0.9},
    ],
    ids=["plain", "two in flight, MTP", "EMA in host memory"],
)
def test_training_is_that_of_a_cpu(changes):
    """Losses and gradient norms of four steps in float32."""
    found = {platform: steps(changes, platform) for platform in ("cuda", "cpu")}
    for name, want in found["cpu"].items():
        np.testing.assert_allclose(found["cuda"][name], want, rtol=2e-5, err_msg=name)


def steps(changes, platform):
    out = subprocess.run(
        [sys.executable, "-c", STEPS.format(changes=changes)],
        env={
            **os.environ,
            "JAX_PLATFORMS": f"{platform},cpu" if platform == "cuda" else "cpu",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process holds most of the memory
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])
