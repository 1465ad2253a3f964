"""Peaks of one accelerator, from the maker's datasheet.

Peaks are dense (no sparsity) and in FLOP/s, a multiply-add counting two; memory is in bytes and
bytes/s, decimal. Sources of the numbers:

- NVIDIA H100 and H200 datasheets, SXM form: peaks (printed there with sparsity, twice these),
  memory and its bandwidth.
- NVIDIA H100 architecture whitepaper: 132 SMs, 50 MB of L2, 228 KB of shared memory in each SM.
- H800: the DeepSeek-V3 report (132 SMs, section 3.2.2) and "Insights into DeepSeek-V3" (ISCA 2025):
  an H100 with less NVLink bandwidth and float64 throughput; the exact float64 peak is not
  published.
"""

import dataclasses
import difflib
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Chip:
    """Numbers of one device.

    Attributes:
      peak_flops_per_s: dtype name -> dense peak of the matrix units; a dtype that the matrix units
        do not multiply is missing.
      hbm_bytes, hbm_bytes_per_s: device memory and its bandwidth.
      sms: streaming multiprocessors.
      l2_bytes, shared_bytes_per_sm: L2 cache, and shared memory of each multiprocessor.
    """

    name: str
    peak_flops_per_s: Mapping[str, float]
    hbm_bytes: int
    hbm_bytes_per_s: float
    sms: int
    l2_bytes: int
    shared_bytes_per_sm: int


H100 = Chip(
    name="h100",
    peak_flops_per_s={
        "float64": 67e12,
        "tf32": 494.7e12,
        "bfloat16": 989.5e12,
        "float16": 989.5e12,
        "float8": 1979e12,
    },
    hbm_bytes=80 * 10**9,
    hbm_bytes_per_s=3.35e12,
    sms=132,
    l2_bytes=50 * 10**6,
    shared_bytes_per_sm=228 * 1024,
)

# About 1 TFLOP/s of float64; the links are in `network.py`.
H800 = dataclasses.replace(
    H100, name="h800", peak_flops_per_s={**H100.peak_flops_per_s, "float64": 1e12}
)

# The H100's compute with other memory: 141 GB of HBM3e.
H200 = dataclasses.replace(H100, name="h200", hbm_bytes=141 * 10**9, hbm_bytes_per_s=4.8e12)

CHIPS = {chip.name: chip for chip in (H100, H800, H200)}


def chip(name: str) -> Chip | None:
    """The chip of this name in any spelling ("H800", "NVIDIA H100 80GB HBM3").

    Returns:
      The chip, or None for "cpu": the peak of a host differs between machines and is measured.

    Raises:
      ValueError: no chip has this name; the message names the closest one.
    """
    words = name.lower().replace("-", " ").split()
    if "cpu" in words:
        return None
    found = [CHIPS[word] for word in words if word in CHIPS]
    if len(found) == 1:
        return found[0]
    near = [n for word in words for n in difflib.get_close_matches(word, CHIPS, n=1)]
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(CHIPS)}, cpu"
    raise ValueError(f"unknown chip {name!r}; {hint}")


# Forms of these chips that run slower than the SXM form, and parts of a chip.
_OTHER_FORMS = {"pcie", "nvl", "mig"}


def peak_flops_per_s(device_kind: str, dtype: str) -> float | None:
    """Dense peak of a device for matmuls of `dtype`, in FLOP/s.

    Args:
      device_kind: name of the device as JAX gives it, "NVIDIA H100 80GB HBM3".
      dtype: dtype of the operands, "bfloat16".

    Returns:
      None for a CPU, an unknown chip, another form than SXM, or a dtype that the matrix units do
      not multiply (float32 on NVIDIA GPUs).
    """
    if _OTHER_FORMS & set(device_kind.lower().replace("-", " ").split()):
        return None
    try:
        known = chip(device_kind)
    except ValueError:
        return None
    return None if known is None else known.peak_flops_per_s.get(dtype)
