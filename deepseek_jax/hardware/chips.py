"""Peaks of one accelerator, from the maker's datasheet.

Peaks are dense (no sparsity) and in FLOP/s, a multiply-add counting two; memory is in bytes and
bytes/s, decimal; prices are in dollars. Sources of the numbers:

- NVIDIA datasheets, SXM form (A100 80 GB, H100, H200), HGX B200 and GB200 NVL72 divided by their 8
  and 72 GPUs: peaks (from the H100 on printed with sparsity, twice these), memory, its bandwidth.
- NVIDIA A100 and H100 architecture whitepapers: SMs, L2 and shared memory of each SM.
- XLA's descriptions of devices, `xla/backends/gpu/target_config/specs/*.txtpb`: SMs, L2 and shared
  memory of B200 and GB200.
- H800: the DeepSeek-V3 report (132 SMs, section 3.2.2) and "Insights into DeepSeek-V3" (ISCA 2025):
  an H100 with less NVLink bandwidth and float64 throughput; the exact float64 peak is not
  published.
- AMD's Instinct MI300X datasheet and the accelerator table of the ROCm documentation.
- Prices: [V3] the DeepSeek-V3 report, table 1, which assumes that renting an H800 costs $2 an hour;
  [NEBIUS] and [LAMBDA] those clouds' prices on demand of an instance with 8 GPUs, divided by 8, in
  SkyPilot's catalog v8 (commits 0082b04 and 0f40703). Prices change: a plan can be given another.
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
      sms: streaming multiprocessors; compute units of AMD.
      l2_bytes, shared_bytes_per_sm: last cache before memory, and shared memory of each
        multiprocessor.
      dollars_per_hour: price of one device for an hour; None where no source was read.
    """

    name: str
    peak_flops_per_s: Mapping[str, float]
    hbm_bytes: int
    hbm_bytes_per_s: float
    sms: int
    l2_bytes: int
    shared_bytes_per_sm: int
    dollars_per_hour: float | None


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
    dollars_per_hour=2.95,  # [NEBIUS]; [LAMBDA] 3.99
)

# About 1 TFLOP/s of float64; the links are in `network.py`.
H800 = dataclasses.replace(
    H100,
    name="h800",
    peak_flops_per_s={**H100.peak_flops_per_s, "float64": 1e12},
    dollars_per_hour=2.0,  # [V3]
)

# The H100's compute with other memory: 141 GB of HBM3e.
H200 = dataclasses.replace(
    H100,
    name="h200",
    hbm_bytes=141 * 10**9,
    hbm_bytes_per_s=4.8e12,
    dollars_per_hour=3.50,  # [NEBIUS]
)

# Air-cooled, 8 in an HGX node.
B200 = Chip(
    name="b200",
    peak_flops_per_s={
        "float64": 40e12,
        "tf32": 1125e12,
        "bfloat16": 2250e12,
        "float16": 2250e12,
        "float8": 4500e12,
    },
    hbm_bytes=180 * 10**9,
    hbm_bytes_per_s=7.7e12,
    sms=148,
    l2_bytes=132_644_864,
    shared_bytes_per_sm=228 * 1024,
    dollars_per_hour=5.50,  # [NEBIUS]; [LAMBDA] 6.69
)

# Liquid-cooled with faster clocks, 72 in a rack of one NVLink domain.
GB200 = Chip(
    name="gb200",
    peak_flops_per_s={
        "float64": 45e12,
        "tf32": 1250e12,
        "bfloat16": 2500e12,
        "float16": 2500e12,
        "float8": 5000e12,
    },
    hbm_bytes=186 * 10**9,
    hbm_bytes_per_s=8e12,
    sms=152,
    l2_bytes=135_528_448,
    shared_bytes_per_sm=228 * 1024,
    dollars_per_hour=None,
)

# The 80 GB SXM form; its matrix units do not multiply float8.
A100 = Chip(
    name="a100",
    peak_flops_per_s={
        "float64": 19.5e12,
        "tf32": 156e12,
        "bfloat16": 312e12,
        "float16": 312e12,
    },
    hbm_bytes=80 * 10**9,
    hbm_bytes_per_s=2.039e12,
    sms=108,
    l2_bytes=40 * 10**6,
    shared_bytes_per_sm=164 * 1024,
    dollars_per_hour=2.79,  # [LAMBDA]
)

# Peaks of the matrix cores at 2.1 GHz; the last cache is AMD's Infinity Cache.
MI300X = Chip(
    name="mi300x",
    peak_flops_per_s={
        "float64": 163.4e12,
        "tf32": 653.7e12,
        "bfloat16": 1307.4e12,
        "float16": 1307.4e12,
        "float8": 2614.9e12,
    },
    hbm_bytes=192 * 10**9,
    hbm_bytes_per_s=5.3e12,
    sms=304,
    l2_bytes=256 * 2**20,
    shared_bytes_per_sm=64 * 1024,
    dollars_per_hour=None,
)

CHIPS = {chip.name: chip for chip in (H100, H800, H200, B200, GB200, A100, MI300X)}


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


# Forms of these chips that are slower than the one above, and parts of a chip.
_OTHER_FORMS = {"pcie", "nvl", "mig", "40gb"}


def peak_flops_per_s(device_kind: str, dtype: str) -> float | None:
    """Dense peak of a device for matmuls of `dtype`, in FLOP/s.

    Args:
      device_kind: name of the device as JAX gives it, "NVIDIA H100 80GB HBM3".
      dtype: dtype of the operands, "bfloat16".

    Returns:
      None for a CPU, an unknown chip, a slower form, or a dtype that the matrix units do
      not multiply (float32 on NVIDIA GPUs).
    """
    if _OTHER_FORMS & set(device_kind.lower().replace("-", " ").split()):
        return None
    try:
        known = chip(device_kind)
    except ValueError:
        return None
    return None if known is None else known.peak_flops_per_s.get(dtype)
