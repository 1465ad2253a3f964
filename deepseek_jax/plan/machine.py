"""Machine of a plan: chip, network, efficiencies and price; seconds that work takes on it."""

import dataclasses
import math

from deepseek_jax.config import ConfigError
from deepseek_jax.hardware.chips import Chip
from deepseek_jax.hardware.efficiency import PUBLISHED, Efficiency
from deepseek_jax.hardware.network import Network
from deepseek_jax.plan.layer_work import Matmul, PartWork
from deepseek_jax.plan.messages import Message

TILE = 128  # rows and columns of the result that a thread block computes


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Seconds of a piece of work, in the categories of the published trace.

    Attributes:
      matmul: Products of linear layers.
      core: Attention core.
      quantise: Making FP8 tiles.
      pointwise: All else.
    """

    matmul: float = 0.0
    core: float = 0.0
    quantise: float = 0.0
    pointwise: float = 0.0

    @property
    def total(self) -> float:
        return self.matmul + self.core + self.quantise + self.pointwise

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __mul__(self, factor: float) -> "Seconds":
        return Seconds(*(factor * part for part in self.parts))

    @property
    def parts(self) -> tuple[float, float, float, float]:
        return self.matmul, self.core, self.quantise, self.pointwise


@dataclasses.dataclass(frozen=True)
class Machine:
    """A kind of GPU cluster.

    Attributes:
      chip: Peaks and memory of a device.
      network: Links of a device.
      efficiency: Sustained shares of both.
      communication_sms: Multiprocessors that messages take from matmuls.
    """

    chip: Chip
    network: Network
    efficiency: Efficiency = PUBLISHED
    communication_sms: int = 0

    def seconds(self, piece: PartWork, *, backward: bool, recipe: str) -> Seconds:
        """Seconds of a piece of work alone on the device."""
        share, memory = self.efficiency, self.chip.hbm_bytes_per_s
        core = share.attention_backward if backward else share.attention_forward
        quantise = share.quantise_backward if backward else share.quantise_forward
        pointwise = share.pointwise_backward if backward else share.pointwise_forward
        peak = self.peak(recipe if recipe == "float32" else "bfloat16") * self._free
        return Seconds(
            sum(self.matmul_seconds(matmul, recipe) for matmul in piece.matmuls),
            piece.core_flops / (core * peak),
            piece.quantised_bytes / (quantise * memory),
            (piece.pointwise_bytes / pointwise + piece.streamed_bytes / share.streaming) / memory,
        )

    def matmul_seconds(self, matmul: Matmul, recipe: str) -> float:
        """Seconds of one product, as `hardware/efficiency.py` states them."""
        format_ = recipe if matmul.linear or recipe == "float32" else "bfloat16"
        sms = self.chip.sms - self.communication_sms
        each = matmul.rows / matmul.groups
        tiles = matmul.groups * math.ceil(each / TILE) * math.ceil(matmul.columns / TILE)
        padded = math.ceil(each / TILE) * TILE / each  # rows of a last tile that is not full
        waves = tiles / (sms * math.ceil(tiles / sms))
        speed = self._matmul_share(matmul, format_) * self.peak(format_) * waves * self._free
        compute = matmul.flops * min(padded, TILE) / speed
        itemsize = 1 if format_ == "fp8" else 4 if format_ == "float32" else 2
        moved = itemsize * matmul.contraction * (matmul.rows + matmul.groups * matmul.columns)
        moved += (4 if matmul.gradient else 2) * matmul.rows * matmul.columns
        return max(compute, moved / (self.efficiency.streaming * self.chip.hbm_bytes_per_s))

    def _matmul_share(self, matmul: Matmul, format_: str) -> float:
        share = self.efficiency
        fp8 = format_ == "fp8"
        if fp8 and matmul.gradient:
            grouped = matmul.groups > 1
            return share.grouped_weight_gradient_fp8 if grouped else share.weight_gradient_fp8
        half = share.half_contraction_fp8 if fp8 else share.half_contraction_bf16
        rate = share.matmul_fp8 if fp8 else share.matmul_bf16
        rate *= matmul.contraction / (matmul.contraction + half)
        if not fp8 and matmul.groups > 1:
            gradient = share.grouped_weight_gradient_bf16
            rate *= gradient if matmul.gradient else share.grouped_bf16
        return rate

    @property
    def _free(self) -> float:
        """Share of the multiprocessors that compute."""
        return 1 - self.communication_sms / self.chip.sms

    def peak(self, recipe: str) -> float:
        """Peak FLOP/s of a recipe's products.

        Raises:
          ConfigError: The chip does not multiply this format.
        """
        name = {"fp8": "float8", "bfloat16": "bfloat16", "float32": "tf32"}[recipe]
        if name not in self.chip.peak_flops_per_s:
            raise ConfigError(
                f"--hardware={self.chip.name} does not multiply {name}; set "
                "--config.precision.recipe=bfloat16"
            )
        return self.chip.peak_flops_per_s[name]

    def message_seconds(self, message: Message, *, overlapped: bool) -> float:
        """Seconds of a message's payload; both links at once, the slower one counts.

        Args:
          overlapped: Whether other messages and matmuls run beside it.
        """
        factor = self.efficiency.all_to_all if overlapped else 1.0
        slow = message.slow_bytes / self.network.between_bytes_per_s
        return max(slow, message.fast_bytes / self.network.inside_bytes_per_s) / factor
