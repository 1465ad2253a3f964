"""Experts that `transformers` 5 stores stacked, under the names of single experts.

`mlp.experts.gate_up_proj` [E, 2F, D] holds the gate's rows of each expert before those of its
up-projection, `mlp.experts.down_proj` [E, D, F] the down-projections (E experts, D model width, F
width of an expert). The rows of one expert's matrix lie one after another in the file, so each is a
tensor of its own at a later position. No value is read or copied.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from deepseek_jax.checkpoint.hf.names import SCALE
from deepseek_jax.checkpoint.hf.safetensors import Tensor
from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.precision.fp8_tiles import BLOCK

_STACK = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)(_scale_inv)?")


def single_experts(
    folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The same tensors, with the matrices of each expert in place of stacks.

    Raises:
      ConfigError: a stack of another shape, or FP8 blocks that span two matrices.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if found := _STACK.fullmatch(name):
            _check(folder, config, name, tensor)
            halves = ("gate_proj", "up_proj") if found[2] == "gate_up_proj" else ("down_proj",)
            for number, part in enumerate(_parts(tensor, len(halves))):
                expert, half = divmod(number, len(halves))
                out[f"{found[1]}{expert}.{halves[half]}.weight{found[3] or ''}"] = part
        else:
            out[name] = tensor
    return out


def _check(folder: Path, config: ModelConfig, name: str, tensor: Tensor) -> None:
    rows, columns = config.d_model, config.d_expert
    if "gate_up_proj" in name:
        rows, columns = 2 * config.d_expert, config.d_model
    if name.endswith(SCALE):
        if rows == 2 * config.d_expert and config.d_expert % BLOCK:
            raise ConfigError(
                f"{folder}: {name} has blocks that hold rows of a gate and of an up-projection, as "
                f"moe_intermediate_size={config.d_expert} is no multiple of {BLOCK}; expected one "
                "tensor for each expert, or the stack in BF16 or F32"
            )
        rows, columns = -(-rows // BLOCK), -(-columns // BLOCK)
    expected = (config.experts, rows, columns)
    if tensor.shape != expected:
        raise ConfigError(
            f"{folder} does not hold the model of its config.json: {name} (found {tensor}, "
            f"expected {list(expected)}: experts stacked as transformers does, or one tensor for "
            "each expert)"
        )


def _parts(tensor: Tensor, halves: int) -> Iterator[Tensor]:
    """The matrices in a stack, in the order of their bytes."""
    experts, rows, columns = tensor.shape
    shape = (rows // halves, columns)
    size = math.prod(shape) * tensor.dtype.itemsize
    for number in range(experts * halves):
        start = tensor.start + number * size
        yield Tensor(tensor.file, tensor.dtype, shape, tensor.content, start)
