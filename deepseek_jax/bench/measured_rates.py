"""File of measured times: JSON that the planner reads in place of assumed rates.

    {"device": "NVIDIA H100 80GB HBM3",
     "rows": [{"piece": "linear forward", "recipe": "fp8", "shape": [4096, 16384, 7168],
               "seconds": 8e-4, "flops": 962072674304, "bytes": 243269632}, ...]}

Pieces, their shapes, and what `flops` and `bytes` count; a kernel's operands and results once:

    linear forward, linear input gradient, linear weight gradient
        rows, inputs and outputs of the layer; one product, of operands that are quantised
    experts forward, experts input gradient, experts weight gradient
        experts, rows of all of them, inputs, outputs; one product of all experts
    attention forward, attention backward
        sequences, positions, heads, width of keys, width of values; the causal half
    latent attention
        requests, positions, heads, width of latents, of rotary keys; a new token of each request
    quantise rows, quantise tokens, quantise both
        rows, columns; no flops
    quantise blocks, quantise blocks and copy
        experts, inputs, outputs; no flops
    attention sublayer, MoE layer recompute report, MoE layer recompute full
        tokens, model width; forward and backward, flops of all GEMMs that run, no bytes

The recipe is "fp8" or "bfloat16" with kernels; followed by " portable", without. FLOP/s and bytes/s
of a row are its `flops` and `bytes` over its `seconds`.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.bench.kernel_case import BFLOAT16, KERNEL, PORTABLE, KernelCase
from deepseek_jax.config import ConfigError
from deepseek_jax.plan.measured import MeasuredRate, RateKey, read


class RateFile:
    """The rates of one device in a file, written anew after each of them.

    A file of the same device is continued, and one of another is replaced.

    Raises:
      ConfigError: The file cannot be written, or holds something else.
    """

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.device = path, device
        self.rates: dict[RateKey, MeasuredRate] = {}
        if path.exists():
            found, rates = read(path, "out")
            if found == device:
                self.rates = {rate.key: rate for rate in rates}
        self._write()

    def __contains__(self, key: RateKey) -> bool:
        return key in self.rates

    def add(self, rates: Iterable[MeasuredRate]) -> None:
        """Adds rates, and writes the file."""
        self.rates |= {rate.key: rate for rate in rates}
        self._write()

    def _write(self) -> None:
        rows = [dataclasses.asdict(rate) for rate in self.rates.values()]
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(json.dumps({"device": self.device, "rows": rows}, indent=1) + "\n")
            partial.replace(self.path)
        except OSError as error:
            raise ConfigError(f"--out={self.path} cannot be written: {error.strerror}") from error


def of_row(case: KernelCase, row: Mapping[str, Any]) -> list[MeasuredRate]:
    """Rates of a row of `kernel_case.measured`: one for each form that was timed."""
    own = "bfloat16" if case.dtype == "bfloat16" else "fp8"
    fields = {KERNEL: "microseconds", PORTABLE: "portable_microseconds"}
    names = {KERNEL: own, PORTABLE: f"{own} portable"}
    if own == "fp8":
        fields[BFLOAT16], names[BFLOAT16] = "bfloat16_microseconds", "bfloat16"
    return [
        MeasuredRate(case.piece, names[form], case.shape, row[field] / 1e6, case.flops, case.bytes)
        for form, field in fields.items()
        if row[field] is not None
    ]
