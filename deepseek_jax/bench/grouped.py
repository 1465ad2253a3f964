"""Speed of the grouped matmul's backends, beside a dense matmul of the same FLOPs in the same run.

On a GPU: both matmuls of four experts of V3 (4096 tokens per device, 64 devices) in bfloat16, and
the least time by the chip's datasheet ("floor"). On a CPU: small matmuls in float32.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.config import Config
from deepseek_jax.hardware.chips import Chip, chip
from deepseek_jax.precision.grouped import grouped_matmul


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a grouped matmul.

    Attributes:
      rows: Rows over all experts.
      experts: Number of matrices.
      width: Width of a row, and rows of a matrix.
      out: Columns of a matrix.
    """

    rows: int
    experts: int
    width: int
    out: int

    def flops(self) -> int:
        """FLOPs of one product."""
        return 2 * self.rows * self.width * self.out

    def bytes(self, itemsize: int) -> int:
        """Least memory traffic of one product: each operand and the result once."""
        matrices = self.experts * self.width * self.out
        return itemsize * (matrices + self.rows * (self.width + self.out))

    def sizes(self) -> dict[str, np.ndarray]:
        """Rows of each expert: "balanced", equal; "skewed", half of the one before; "one", all."""
        even = np.full(self.experts, self.rows // self.experts, np.int32)
        halved = self.rows >> np.arange(1, self.experts + 1)
        halved[0] += self.rows - halved.sum()
        one = np.where(np.arange(self.experts) == 0, self.rows, 0)
        return {"balanced": even, "skewed": halved.astype(np.int32), "one": one.astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class MatmulCase:
    """Sizes for a platform.

    Attributes:
      dtype: Type of the operands.
      shapes: Shapes to measure.
      calls: Calls that are timed together, to exclude the latency of a launch.
    """

    dtype: str
    shapes: tuple[Shape, ...]
    calls: int


CPU = MatmulCase("float32", (Shape(2048, 8, 256, 256), Shape(2048, 32, 256, 256)), calls=1)
GPU = MatmulCase("bfloat16", (Shape(32_768, 4, 7168, 4096), Shape(32_768, 4, 2048, 7168)), calls=10)

PRODUCTS = {"forward": 1, "both": 3}  # pass -> number of products; "both": forward and backward


def measure(config: Config, *, case: MatmulCase | None = None, rounds: int = 5) -> dict[str, Any]:
    """Measures a table per shape, of medians over rounds in which the backends take turns.

    `of_dense` is the time of the dense matmul divided by the backend's: 1 is as fast as dense.
    `of_floor` is the least time by the chip's compute and memory, divided by the backend's.
    """
    del config  # the benchmark has its own sizes and dtype
    device = jax.devices()[0]
    case = case or (GPU if device.platform == "gpu" else CPU)
    found: dict[str, Any] = {"device": device.device_kind, "dtype": case.dtype}
    for shape in case.shapes:
        key = f"{shape.rows} rows, {shape.experts} experts, {shape.width} x {shape.out}"
        found[key] = _rows(shape, case, known_chip(device.device_kind), rounds)
    return found


def backends(platform: str) -> dict[str, Callable[..., jax.Array]]:
    """Backends of a platform: name -> function of rows, weight and sizes."""
    found: dict[str, Callable[..., jax.Array]] = {
        "dense": _dense,
        "shares": _grouped(lambda portable, kernel: portable),
        "ragged_dot": _ragged_dot,
    }
    if platform == "gpu":
        found["kernel"] = _grouped(lambda portable, kernel: kernel)
    return found


def _grouped(backend):
    return lambda rows, weight, sizes: grouped_matmul(
        rows, weight, sizes, likely=rows.shape[0], backend=backend
    )


def _ragged_dot(rows, weight, sizes):
    product = lax.ragged_dot(
        rows, weight, sizes, precision=_exact(rows), preferred_element_type=jnp.float32
    )
    return product.astype(rows.dtype)


def _dense(rows, weight, sizes):
    """Dense matmul of all rows with the first expert's matrix."""
    product = jnp.matmul(
        rows, weight[0], precision=_exact(rows), preferred_element_type=jnp.float32
    )
    return product.astype(rows.dtype)


def _exact(x):
    return "highest" if x.dtype == jnp.float32 else None  # as in the recipes


def _rows(shape: Shape, case: MatmulCase, known: Chip | None, rounds: int) -> list[dict[str, Any]]:
    """Rows of one shape: a row for each backend, pass and distribution of rows over experts."""
    keys = jax.random.split(jax.random.key(0), 3)
    rows = jax.random.normal(keys[0], (shape.rows, shape.width), case.dtype)
    weight = jax.random.normal(keys[1], (shape.experts, shape.width, shape.out), case.dtype)
    d_out = jax.random.normal(keys[2], (shape.rows, shape.out), case.dtype)

    def run(fn, form, rows, weight, sizes, d_out):
        if form == "forward":
            return fn(rows, weight, sizes)
        out, vjp = jax.vjp(lambda rows, weight: fn(rows, weight, sizes), rows, weight)
        return out, vjp(d_out)

    steps: dict[tuple[str, str, str], Callable[[], Any]] = {}
    for name, fn in backends(jax.default_backend()).items():
        for form in PRODUCTS:
            compiled = jax.jit(functools.partial(run, fn, form))
            all_sizes = shape.sizes()
            if name == "dense":  # which does not depend on the sizes
                all_sizes = {"any": all_sizes["balanced"]}
            for kind, sizes in all_sizes.items():
                steps[name, form, kind] = functools.partial(
                    compiled, rows, weight, jnp.asarray(sizes), d_out
                )
    for step in steps.values():
        jax.block_until_ready(step())
    taken = [[seconds_of(step, case.calls) for step in steps.values()] for _ in range(rounds)]
    seconds = dict(zip(steps, np.median(taken, axis=0).tolist(), strict=True))
    dense = {form: spent for (name, form, _), spent in seconds.items() if name == "dense"}
    table = []
    for (name, form, kind), spent in seconds.items():
        products = PRODUCTS[form]
        floor = None if known is None else products * _floor_seconds(shape, case.dtype, known)
        table.append(
            {
                "backend": name,
                "pass": form,
                "sizes": kind,
                "milliseconds": 1e3 * spent,
                "tflops_per_s": products * shape.flops() / spent / 1e12,
                "of_dense": dense[form] / spent,
                "of_floor": None if floor is None else floor / spent,
            }
        )
    return table


def seconds_of(step: Callable[[], Any], calls: int) -> float:
    """Mean seconds of `calls` calls that are timed together."""
    begin = time.perf_counter()
    for _ in range(calls):
        out = step()
    jax.block_until_ready(out)
    return (time.perf_counter() - begin) / calls


def _floor_seconds(shape: Shape, dtype: str, known: Chip) -> float:
    """Least seconds of one product; each of the two products of backward has the same."""
    compute = shape.flops() / known.peak_flops_per_s[dtype]
    return max(compute, shape.bytes(jnp.dtype(dtype).itemsize) / known.hbm_bytes_per_s)


def known_chip(kind: str) -> Chip | None:
    """Chip of JAX's `device_kind`; None for a CPU and for a chip without a known datasheet."""
    try:
        return chip(kind)
    except ValueError:
        return None
