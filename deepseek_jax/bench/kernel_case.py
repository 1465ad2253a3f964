"""Time of a GPU kernel beside other forms of the same computation, in turns in one run.

A form runs many times in one program, each time after the time before, so that launches wait for
nothing: the time includes the loop's counter, a kernel of a few microseconds at most. Operands of
less than 50 MB, the L2 of an H100, may stay there between runs; the cases are larger where memory
sets the time.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from deepseek_jax.hardware import xla_options
from deepseek_jax.hardware.chips import Chip

# Forms: by a kernel; what runs in its place without one; the same product of BF16 operands.
KERNEL, PORTABLE, BFLOAT16 = "kernel", "portable", "bfloat16"
Operands = tuple[Any, ...]
Form = Callable[..., Any]

_LOOP_SECONDS = 0.02  # of a program at the speed of the floor: its launch is 1 % of it
_MOST_TIMES = 400
_LONGEST_FAULT = 200  # characters


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """A computation that a kernel does.

    Attributes:
      piece: kind of computation, "linear forward".
      name: its place in the model, "W^O".
      shape: sizes, in an order that belongs to the kind.
      check: name of the check that the kernel must have passed.
      draw: seed, a uint32 -> operands of each form.
      forms: the computation as a function of its operands, by form.
      bytes: least memory traffic: operands and results of the kernel once.
      flops: operations, a multiply-add counting two; 0 where there is no product.
      dtype: dtype whose peak bounds the products of the kernel, as `hardware/chips.py` names it.
      goal: TFLOP/s that the kernel should reach; without `flops`, share of memory speed; or None.
      by_bytes: whether its rate is that of bytes.
    """

    piece: str
    name: str
    shape: tuple[int, ...]
    check: str
    draw: Callable[[jax.Array], Mapping[str, Operands]]
    forms: Mapping[str, Form]
    bytes: int
    flops: int = 0
    dtype: str = "float8"
    goal: float | None = None
    by_bytes: bool = False

    def __str__(self) -> str:
        return f"{self.piece}, {self.name}"

    def floor_seconds(self, chip: Chip) -> float:
        """Least seconds by the chip's peak and its memory bandwidth."""
        compute = self.flops / chip.peak_flops_per_s[self.dtype]
        return max(compute, self.bytes / chip.hbm_bytes_per_s)

    def only(self, name: str, kernel: Form, check: str) -> "KernelCase":
        """The same operands for another kernel alone."""

        def draw(seed: jax.Array) -> Mapping[str, Operands]:
            return {KERNEL: self.draw(seed)[KERNEL]}

        return dataclasses.replace(
            self, piece="tiling", name=name, check=check, draw=draw, forms={KERNEL: kernel}
        )


SEED = jax.ShapeDtypeStruct((), jnp.uint32)


def numbers(seed: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Numbers from -2 to 2 without a pattern: a hash of their places, which compiles at once.

    With normal numbers by `jax.random`, operands would take longer to compile than kernels.
    """
    bits = lax.iota(jnp.uint32, math.prod(shape)) + seed * jnp.uint32(0x9E3779B9)
    for factor in (0x85EBCA6B, 0xC2B2AE35):  # the last steps of MurmurHash3
        bits = (bits ^ (bits >> 16)) * jnp.uint32(factor)
    signed = lax.bitcast_convert_type(bits, jnp.int32).astype(jnp.float32)
    return (signed * jnp.float32(2.0**-30)).astype(dtype).reshape(shape)


def traffic(draw: Callable[[jax.Array], Mapping[str, Operands]], form: Form) -> int:
    """Bytes of the operands and results of a portable form, each once."""
    operands = jax.eval_shape(draw, SEED)[PORTABLE]
    leaves = jax.tree.leaves((operands, jax.eval_shape(form, *operands)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def row_major(x: jax.Array) -> jax.Array:
    """x in this order in memory, in which kernels read it."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def repeated(form: Form, times: int) -> Any:
    """Jitted (result, operands) -> result of the last of `times` runs, in place of the first.

    The barrier makes each run wait for the one before; without it, XLA would compute one. Without
    an order of the operands in memory, it would transpose them once, before the loop, where that
    spares a transposition in it.
    """

    def loop(out: Any, operands: Operands) -> Any:
        def again(_: Any, carry: tuple[Operands, Any]) -> tuple[Operands, Any]:
            operands, _ = lax.optimization_barrier(carry)
            return operands, form(*jax.tree.map(row_major, operands))

        return lax.fori_loop(0, times, again, (operands, out))[1]

    return jax.jit(loop, donate_argnums=0)


def measured(
    case: KernelCase, refused: Mapping[str, str], chip: Chip | None, rounds: int
) -> dict[str, Any]:
    """Row of a case: median seconds of each form, in turns; a form that fails has its reason.

    Args:
      refused: reason by name of the check, of kernels that may not run.
      chip: of this device; None where it is not known.
      rounds: number of turns.
    """
    seconds, faults = _seconds(case, refused, _times(case, chip), rounds)
    spent = seconds.get(KERNEL)
    floor = None if chip is None else case.floor_seconds(chip)
    counted = case.bytes if case.by_bytes or not case.flops else case.flops
    unit = "TFLOP/s" if counted == case.flops else "TB/s"
    goal = case.goal
    if goal is not None and not case.flops:
        goal = None if chip is None else goal * chip.hbm_bytes_per_s / 1e12
    rate = None if spent is None else counted / spent / 1e12
    return {
        "piece": case.piece,
        "name": case.name,
        "shape": list(case.shape),
        "microseconds": None if spent is None else 1e6 * spent,
        "rate": rate,
        "unit": unit,
        "floor_microseconds": None if floor is None else 1e6 * floor,
        "of_floor": None if floor is None or spent is None else floor / spent,
        **{f"{form}_microseconds": _scaled(seconds.get(form)) for form in (BFLOAT16, PORTABLE)},
        "goal": goal,
        "reached": None if goal is None or rate is None else rate >= goal,
        "faults": faults,
    }


def _scaled(seconds: float | None) -> float | None:
    return None if seconds is None else 1e6 * seconds


def _times(case: KernelCase, chip: Chip | None) -> int:
    """Runs of a form in one program."""
    if chip is None:
        return 1
    return int(np.clip(_LOOP_SECONDS / case.floor_seconds(chip), 3, _MOST_TIMES))


def _seconds(
    case: KernelCase, refused: Mapping[str, str], times: int, rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds by form, and reasons of those that have none."""
    faults = {KERNEL: refused[case.check]} if case.check in refused else {}
    forms = {name: form for name, form in case.forms.items() if name not in faults}
    try:
        operands = drawn(case, forms)(jnp.uint32(0))
    except Exception as error:
        return {}, faults | {"operands": reason(error)}
    with ThreadPoolExecutor() as pool:
        made = {
            name: pool.submit(_prepared, form, operands[name], times)
            for name, form in forms.items()
        }
    runs = {}
    for name, future in made.items():
        try:
            runs[name] = future.result()
        except Exception as error:
            faults[name] = reason(error)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for name in [*runs] * (1 + rounds):
        if name in faults:
            continue
        try:
            taken[name].append(runs[name]())
        except Exception as error:
            faults[name] = reason(error)
    # The first turn is not counted: it loads libraries, and their choice of an algorithm.
    return {k: float(np.median(v[1:])) for k, v in taken.items() if k not in faults}, faults


def drawn(case: KernelCase, forms: Iterable[str]) -> Any:
    """Jitted seed -> operands of these forms."""
    return jax.jit(lambda seed: {name: case.draw(seed)[name] for name in forms})


def _prepared(form: Form, operands: Operands, times: int) -> Callable[[], float]:
    """Compiled program; a call runs it once, and returns the seconds of one of its runs."""
    out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(form, *operands))
    options = xla_options.options(jax.default_backend())
    program = repeated(form, times).lower(out, operands).compile(options)
    state = [out]

    def run() -> float:
        begin = time.perf_counter()
        state[0] = jax.block_until_ready(program(state[0], operands))
        return (time.perf_counter() - begin) / times

    return run


def reason(error: Exception) -> str:
    """Error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_FAULT]


HEADER = (
    f"{'piece':24} {'array':28} {'sizes':22} {'kernel':>10} {'rate':>14} {'of floor':>8}"
    f" {'floor':>9} {'BF16':>10} {'portable':>10}  goal"
)


def line(row: Mapping[str, Any]) -> str:
    """Row of `measured` as a line of text under `HEADER`; times are microseconds."""

    def number(key: str, digits: int = 1) -> str:
        return "-" if row[key] is None else f"{row[key]:,.{digits}f}"

    sizes = " x ".join(map(str, row["shape"]))
    digits = 0 if row["unit"] == "TFLOP/s" else 2
    rate = "-" if row["rate"] is None else f"{number('rate', digits)} {row['unit']}"
    goal = "-"
    if row["goal"] is not None:
        met = {True: "reached", False: "missed", None: "not measured"}[row["reached"]]
        goal = f"{number('goal', digits)}, {met}"
    shown = (
        f"{row['piece']:24} {row['name']:28} {sizes:22} {number('microseconds'):>10} {rate:>14}"
        f" {number('of_floor', 2):>8} {number('floor_microseconds'):>9}"
        f" {number('bfloat16_microseconds'):>10} {number('portable_microseconds'):>10}  {goal}"
    )
    return shown + "".join(f"; {form}: {reason}" for form, reason in row["faults"].items())
