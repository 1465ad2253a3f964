"""Speed of each GPU kernel at V3's sizes, beside the floor, BF16, and the portable form.

On a Hopper GPU: first the checks that a run makes of its kernels, and those of kernels that no run
uses yet. Then a row for each kernel and size, printed as it is measured, the most important first;
rows that do not fit into `--budget` seconds are named. Then PyTorch's block-scaled product where it
is installed, and other tilings, at the very end those of clusters, which no run uses.

    kernel, BF16, portable   microseconds of a run, measured in turns
    rate                     TFLOP/s or TB/s of the kernel
    floor, of floor          least microseconds by the chip's peak and memory, over the kernel's
    goal                     rate that the kernel should reach

A kernel that fails its check, or raises, has a row with the reason. On a CPU, portable forms are
measured at the config's widths, in turns with BF16: a check of the program, not of any GPU.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.bench import (
    attention_cases,
    kernel_case,
    measured_rates,
    product_cases,
    quantiser_cases,
    torch_products,
    v3_sizes,
)
from deepseek_jax.bench.grouped import known_chip
from deepseek_jax.bench.kernel_case import KERNEL, KernelCase
from deepseek_jax.bench.product_cases import PAIRS, LinearSizes
from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.kernels.kernel_names import (
    ATTENTION,
    ATTENTION_PADDED,
    LATENT_ATTENTION,
    OUTER,
    PRODUCT,
    QUANTISE,
)
from deepseek_jax.kernels.matmul_tiling import H100_SMS
from deepseek_jax.model import attention_check
from deepseek_jax.precision import fp8_checks, fp8_quantise_problems
from deepseek_jax.precision.fp8_hopper import HopperProducts
from deepseek_jax.precision.fp8_hopper_quantise import HopperQuantiser
from deepseek_jax.runtime import kernel_check
from deepseek_jax.runtime.kernel_check import Check

BUDGET = 480.0  # seconds
LONGEST_ROW = 120.0  # seconds, after which a kernel is taken to hang
SMALL_LENGTH = 512  # tokens, on a CPU
RIGHT = "right"  # result of a check
IN_A_RUN = (PRODUCT, OUTER, QUANTISE, ATTENTION, LATENT_ATTENTION)  # checks of kernels in use
Say = Callable[[str], None]


def measure(
    config: Config,
    *,
    say: Say = print,
    budget: float | None = None,
    out: Path | None = None,
    rounds: int = 5,
) -> dict[str, Any]:
    """Measures the tables `checks`, `rows`, `torch` and `left_out`, and counts goals reached.

    Args:
      config: its model gives the sizes on a CPU; a GPU has V3's.
      say: prints a line.
      budget: seconds after which no further row begins; None for `BUDGET`.
      out: file of measured rates, see `measured_rates.py`; None for none.
      rounds: turns of which a time is the median.

    Raises:
      RunError: a kernel does not end.
    """
    bench = _Bench(say, BUDGET if budget is None else budget, rounds)
    if out is not None:
        bench.rates = measured_rates.RateFile(out, bench.device.device_kind)
    if bench.device.platform != "gpu":
        say(
            "bench kernels is for a Hopper GPU, and this machine has no GPU: portable forms only, "
            "at the config's widths"
        )
        bench.refused = dict.fromkeys(all_checks() | pair_check(), "it needs a Hopper GPU")
        bench.measure(small_cases(config.model), kernels=False)
        return bench.found()
    say(f"device: {bench.device.device_kind}")
    bench.check(all_checks())
    model = v3_sizes.of_v3(config.model)
    hopper = HopperProducts(sms=getattr(bench.device, "core_count", None) or H100_SMS)
    bench.measure(cases(model, v3_sizes.LENGTH, v3_sizes.GROUP, hopper))
    bench.torch(product_cases.linear_layers(model, v3_sizes.LENGTH, v3_sizes.GROUP))
    bench.measure(tiling_cases(model, hopper, pairs=False))
    in_pairs = tiling_cases(model, hopper, pairs=True)
    if bench.left() > 0:
        bench.check(pair_check())
    bench.measure(in_pairs)
    return bench.found()


def all_checks() -> dict[str, Check]:
    """Checks by name: those of a run, and those of quantisers that no run uses."""
    further = fp8_quantise_problems.further_problems(HopperQuantiser())
    sources = {quantiser_cases.SOURCES: fp8_checks.of_quantisers(further)}
    return fp8_checks.checks() | attention_check.checks() | sources


def pair_check() -> dict[str, Check]:
    """Check of products in clusters of two thread blocks, which run only here."""
    of = fp8_checks.checks(HopperProducts(sms=4, pairs=True))
    product, outer = of[PRODUCT], of[OUTER]

    def both(form: str) -> Callable[[], Any]:
        return lambda: (getattr(product, form)(), getattr(outer, form)())

    return {PAIRS: Check(both("kernel"), both("portable"), fp8_checks.HOPPER)}


def cases(model: ModelConfig, tokens: int, group: int, hopper: HopperProducts) -> list[KernelCase]:
    """All kernels at all sizes of a model, the most important first.

    Args:
      tokens, group: as in `product_cases.linear_layers`.
    """
    layers = product_cases.linear_layers(model, tokens, group)
    by_layer = [product_cases.of_layer(layer, hopper) for layer in layers]
    gate_up = _experts(layers)
    quantisers = quantiser_cases.cases(model, tokens, gate_up)
    decoding = [attention_cases.decoding(model, *cache) for cache in attention_cases.CACHES]
    return [
        *_joined(by_layer[:2]),  # W^O, and gate and up of the experts
        *attention_cases.causal(model, tokens),
        *quantisers[:5],
        *decoding[:1],
        *_joined(by_layer[2:6]),
        *quantisers[5:],
        *decoding[1:],
        *_joined(by_layer[6:]),
        *attention_cases.causal(model, tokens, ATTENTION_PADDED),
    ]


def small_cases(model: ModelConfig) -> list[KernelCase]:
    """Cases whose portable forms a CPU computes in seconds."""
    layers = product_cases.linear_layers(model, SMALL_LENGTH, 1)
    products = [product_cases.of_layer(layer, HopperProducts()) for layer in layers[:2]]
    quantisers = quantiser_cases.cases(model, SMALL_LENGTH, _experts(layers))[:5]
    attention = attention_cases.causal(model, SMALL_LENGTH)
    return [*_joined(products), *quantisers, *attention, attention_cases.decoding(model, 4, 1024)]


def tiling_cases(model: ModelConfig, hopper: HopperProducts, *, pairs: bool) -> list[KernelCase]:
    """Tilings of a large dense product, of a small one, and of the experts'."""
    layers = product_cases.linear_layers(model, v3_sizes.LENGTH, v3_sizes.GROUP)
    chosen = [layers[0], layers[1], next(each for each in layers if each.name == "W^DQ")]
    return _joined(product_cases.tilings(each, hopper, pairs=pairs) for each in chosen)


def _joined(lists: Iterable[list[KernelCase]]) -> list[KernelCase]:
    return list(itertools.chain.from_iterable(lists))


def _experts(layers: Sequence[LinearSizes]) -> LinearSizes:
    """Gate and up of the experts."""
    return next(layer for layer in layers if layer.experts)


class _Bench:
    """A run: what was measured, and the time that is left."""

    def __init__(self, say: Say, budget: float, rounds: int) -> None:
        self.say, self.rounds = say, rounds
        self.begin, self.budget = time.monotonic(), budget
        self.device = jax.devices()[0]
        self.chip = known_chip(self.device.device_kind)
        self.refused: dict[str, str] = {}
        self.rates: measured_rates.RateFile | None = None
        self.checks: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.by_torch: list[dict[str, Any]] = []
        self.left_out: list[str] = []

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.begin)

    def check(self, checks: Mapping[str, Check]) -> None:
        """Checks kernels, and says what came out."""
        for name, check in checks.items():
            begin = time.monotonic()
            seconds = max(10.0, min(kernel_check.SECONDS, self.left()))
            found = kernel_check.refused({name: check}, self.device, seconds=seconds)
            self.refused |= found
            spent = time.monotonic() - begin
            said = f"refused: {found[name]}" if found else RIGHT
            self.checks.append({"kernel": name, "result": said, "seconds": spent})
            self.say(f"check of {name}: {said} ({spent:.1f} s)")

    def measure(self, cases: Iterable[KernelCase], *, kernels: bool = True) -> None:
        """Measures cases while there is time, and says each row.

        Args:
          kernels: whether this machine could run any; else no row says that it cannot.
        """
        if not self.rows:
            self.say(kernel_case.HEADER)
        for case in cases:
            if self.left() <= 0:
                self.left_out.append(str(case))
                continue
            row = self._row(case)
            if not kernels:
                row["faults"].pop(KERNEL)
            self.rows.append(row)
            self.say(kernel_case.line(row))
            if self.rates is not None and case.piece != product_cases.TILING:
                self.rates.add(measured_rates.of_row(case, row))

    def _row(self, case: KernelCase) -> dict[str, Any]:
        def act() -> dict[str, Any]:
            return kernel_case.measured(case, self.refused, self.chip, self.rounds)

        return kernel_check.in_time(
            act, LONGEST_ROW, f"{case} has not ended in {LONGEST_ROW:.0f} s: its kernel hangs"
        )

    def torch(self, layers: Sequence[LinearSizes]) -> None:
        """Measures PyTorch's product at the sizes of dense layers."""
        if importlib.util.find_spec("torch") is None:
            self.say("torch is not installed: no comparison with its block-scaled product")
            return
        if self.left() <= 0:
            self.left_out.append("torch._scaled_mm")
            return
        wanted = torch_shapes(layers)
        for row in run_torch(wanted, self.left()):
            self.by_torch.append(row)
            rate = f"{row['tflops_per_s']:,.0f} TFLOP/s" if "tflops_per_s" in row else row["fault"]
            self.say(f"torch._scaled_mm, {row['name']}: {rate}")

    def found(self) -> dict[str, Any]:
        """Result of the run."""
        if self.left_out:
            self.say(f"no time was left for: {'; '.join(self.left_out)}")
        judged = [row["reached"] for row in self.rows if row["reached"] is not None]
        return {
            "device": self.device.device_kind,
            "seconds": time.monotonic() - self.begin,
            "kernels_refused": sum(row["result"] != RIGHT for row in self.checks),
            "rows_with_faults": sum(bool(row["faults"]) for row in self.rows),
            "goals": len(judged),
            "goals_reached": sum(judged),
            "rows_left_out": len(self.left_out),
            "checks": self.checks,
            "rows": self.rows,
            "torch": self.by_torch,
            "left_out": self.left_out,
        }


def torch_shapes(layers: Sequence[LinearSizes]) -> list[tuple[Any, ...]]:
    """Arguments of `torch_products.py`: forward and weight gradient of dense layers.

    Its scales of blocks need a number of blocks along K that 4 divides.
    """
    found: list[tuple[Any, ...]] = []
    for layer in layers:
        if layer.experts or layer.inputs % 512 or layer.outputs % 128:
            continue
        names = f"{layer.name}, forward", f"{layer.name}, weight gradient"
        found.append(("product", names[0], layer.rows, layer.outputs, layer.inputs))
        found.append(("outer", names[1], layer.inputs, layer.outputs, layer.rows))
    return found


def run_torch(wanted: Sequence[tuple[Any, ...]], seconds: float) -> list[dict[str, Any]]:
    """Rows of PyTorch's products, in a process of its own.

    Args:
      seconds: that it may take; rows that are not done then are left out.
    """
    command = [sys.executable, str(Path(torch_products.__file__))]
    flops = {name: 2.0 * m * n * k for _, name, m, n, k in wanted}
    try:
        done = subprocess.run(
            command, input=json.dumps(wanted), capture_output=True, text=True, timeout=seconds
        )
        written, fault = (
            done.stdout,
            done.stderr.strip().splitlines()[-1:] if done.returncode else [],
        )
    except subprocess.TimeoutExpired as error:
        written = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        fault = [f"not ended in {seconds:.0f} s"]
    rows = [json.loads(line) for line in written.splitlines() if line.endswith("}")]
    for row in rows:
        if "microseconds" in row:
            row["tflops_per_s"] = flops[row["name"]] / row["microseconds"] / 1e6
    return rows + [{"name": "the rest", "fault": each} for each in fault]
