"""Writes a model as a Hugging Face directory: tensors in numbered files, an index, config.json.

Formats: `float32`; `bfloat16`, matrices rounded to BF16; `fp8`, the matrices that the released
checkpoint keeps in FP8 (those of attention and feed-forward networks) in blocks of 128x128 with
float32 scales, the rest as in bfloat16. MTP projections are BF16 in the released checkpoint; one
that comes in FP8 stays FP8. Router biases are float32 in all formats. Norms, routers and the head
weights of indexers, which the model keeps in float32, are BF16 if that changes none of their
values, else float32.

Reading the directory again gives the same bits: in float32 always; in bfloat16 for weights that
BF16 holds; in fp8 for weights that came from FP8 blocks, even by way of our own float32 masters
(`checkpoint/hf/fp8_blocks.py`). Weights that are in FP8 now are written as they are, unless scales
of another kind are asked for (`SCALES`).
"""

import dataclasses
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from deepseek_jax.checkpoint.hf import fp8_blocks, language_part, safetensors
from deepseek_jax.checkpoint.hf.config_json import UNQUANTISED
from deepseek_jax.checkpoint.hf.names import SCALE, Piece, TensorLayout, pieces, to_published
from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.transformer import Transformer, abstract_model
from deepseek_jax.precision.fp8_tiles import BLOCK, E4M3, spread

FORMATS = ("bfloat16", "float32", "fp8")
# Scales of FP8 blocks: as the source has them (any, where it has none); powers of two in float32,
# as V3.1 stores them; or the same powers in E8M0, a byte each.
SCALES = ("kept", "power_of_two", "e8m0")
BF16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)

Read = Callable[[Piece], np.ndarray]


@dataclasses.dataclass(frozen=True)
class WeightSource:
    """Values of an export.

    Attributes:
      config: sizes and rules of the model.
      layout: whether router biases are published, and the order of rotary rows.
      read: gives a published tensor, [out, in], in any float dtype but FP8.
      stored: gives the FP8 values and scales of a tensor that the source keeps in FP8, else None.
      former: gives the scales that a tensor had when it came in FP8, else None.
      others: tensors of parts beside the text model, which are written as they are.
    """

    config: ModelConfig
    layout: TensorLayout
    read: Read
    stored: Callable[[str], tuple[np.ndarray, np.ndarray] | None] = lambda name: None
    former: Callable[[str], np.ndarray | None] = lambda name: None
    others: Mapping[str, safetensors.Tensor] = dataclasses.field(default_factory=dict)


def of_model(model: Transformer, layout: TensorLayout) -> WeightSource:
    """The weights of a model on one device, in the dtypes that they have there."""
    found = to_published(model.config, model, layout)

    def stored(name: str) -> tuple[np.ndarray, np.ndarray] | None:
        return (found[name], found[name + SCALE]) if name + SCALE in found else None

    def read(piece: Piece) -> np.ndarray:
        pair, value = stored(piece.name), found[piece.name]
        return value if pair is None else value.astype(np.float32) * spread(pair[1], value.shape)

    return WeightSource(model.config, layout, read, stored)


def write(
    folder: Path,
    settings: Mapping[str, Any],
    source: WeightSource,
    form: str,
    shard_bytes: int,
    scales: str = "kept",
) -> None:
    """Fills an existing folder; one tensor at a time is in memory.

    Args:
      settings: content of the config.json to write.
      form: one of `FORMATS`.
      shard_bytes: a file is closed before it would grow past this; one tensor may be larger.
      scales: one of `SCALES`. A matrix that is in FP8 with other scales is quantised again, which a
        warning says.
    """
    (folder / "config.json").write_text(json.dumps(dict(settings), indent=2) + "\n")
    quantised = language_part.of(settings).get("quantization_config") or {}
    scale_dtype = safetensors.E8M0 if scales == "e8m0" else FLOAT32
    groups = _groups(source, form, _unquantised(quantised), scale_dtype)
    shards = _shards(groups, shard_bytes)
    _warn_of_parts_of_blocks(itertools.chain.from_iterable(shards))
    others = _shards_of_others(source.others, shard_bytes)
    blocks = _Blocks(source, quantised.get("scale_fmt") == "ue8m0", scales != "kept")
    count, before = len(shards) + len(others), language_part.prefix(settings)
    files = [safetensors.SINGLE] if count == 1 else _names(count)
    where: dict[str, str] = {}
    total = 0
    for file, shard in zip(files, shards, strict=False):
        kinds = (pair for group in shard for pair in group.tensors.items())
        expected = {before + name: kind for name, kind in kinds}
        values = ((before + name, value) for name, value in _values(shard, source, blocks))
        safetensors.write(folder / file, expected, values)
        where |= dict.fromkeys(expected, file)
        total += sum(map(_bytes, shard))
    for file, other in zip(files[len(shards) :], others, strict=True):
        safetensors.write_raw(folder / file, other)
        where |= dict.fromkeys(other, file)
        total += sum(tensor.nbytes for tensor in other.values())
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / safetensors.INDEX).write_text(json.dumps(index, indent=2) + "\n")
    if blocks.again:
        warnings.warn(
            f"{len(blocks.again)} FP8 tensors had scales that are no powers of two, and were "
            f"quantised again, {blocks.again[0]} the first",
            stacklevel=2,
        )


def _warn_of_parts_of_blocks(groups: Iterable["_Group"]) -> None:
    """Says so where `transformers`, which divides sizes by numbers of blocks, misreads FP8."""
    cut = [
        group
        for group in groups
        if group.tensors[group.name][0] == E4M3
        and any(size > BLOCK and size % BLOCK for size in group.piece.shape)
    ]
    if cut:
        warnings.warn(
            f"{len(cut)} FP8 matrices end with a part of a block, {cut[0].name} "
            f"{list(cut[0].piece.shape)} the first: transformers 5.24 misreads or refuses them; "
            "export in bfloat16 for it (docs/serving.md)",
            stacklevel=3,
        )


def most_bytes(model: ModelConfig, form: str) -> int:
    """Size of the tensors of `write`, or a little more; no table of the tensors is made.

    Norms and routers are counted as float32, and scales of FP8 blocks as a hundredth of the values.
    """
    weights = list(params.describe(abstract_model(model)))
    copies = [weight for weight in weights if weight.path in ("embedding.table", "head.table")]
    total = 0.0
    for weight in weights + copies * model.mtp_depth:
        wide = form == "float32" or weight.sensitive or not weight.trained
        blocks = form == "fp8" and (".attention." in weight.path or ".feed." in weight.path)
        total += math.prod(weight.shape) * (4 if wide else 1.01 if blocks else 2)
    return math.ceil(total)


@dataclasses.dataclass(frozen=True)
class _Group:
    """A published tensor to write, with its scales if it has some.

    Attributes:
      name: name of the tensor; for a copy of a shared table not the name of `piece`.
      tensors: dtype and shape of each stored tensor, by name.
    """

    name: str
    piece: Piece
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]


def _unquantised(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Modules that a `quantization_config` leaves as they are."""
    return tuple(name for key in UNQUANTISED for name in settings.get(key) or ())


def _groups(
    source: WeightSource, form: str, unquantised: tuple[str, ...], scale_dtype: np.dtype
) -> Iterator[_Group]:
    for name, piece in _with_copies(source.config, source.layout):
        dtype = _dtype(piece, source, form)
        if dtype == E4M3 and any(f".{module}." in f".{name}" for module in unquantised):
            dtype = BF16
        tensors = {name: (dtype, piece.shape)}
        if dtype == E4M3:
            tensors[name + SCALE] = (scale_dtype, tuple(-(-size // BLOCK) for size in piece.shape))
        yield _Group(name, piece, tensors)


def _with_copies(config: ModelConfig, layout: TensorLayout) -> Iterator[tuple[str, Piece]]:
    """Name and piece of every tensor, each MTP layer's copies of embedding and head included."""
    everything = list(pieces(config, layout))
    shared = {
        "embed_tokens.weight": next(p for p in everything if p.path == "embedding.table"),
        "shared_head.head.weight": next(p for p in everything if p.path == "head.table"),
    }
    for piece in everything:
        yield piece.name, piece
        if piece.path == "mtp.project":
            layer = piece.name.removesuffix("eh_proj.weight")
            for name, table in shared.items():
                yield layer + name, table


def _dtype(piece: Piece, source: WeightSource, form: str) -> np.dtype:
    if form == "float32" or piece.path.endswith("router.bias"):
        return FLOAT32
    if len(piece.shape) == 1 or piece.path.endswith(("router.centroids", "indexer.head_weights")):
        value = source.read(piece).astype(np.float32)
        return BF16 if (value.astype(BF16).astype(np.float32) == value).all() else FLOAT32
    in_blocks = ".attention." in piece.path or ".feed." in piece.path
    if form == "fp8" and piece.path == "mtp.project":
        in_blocks = source.stored(piece.name) is not None
    return E4M3 if form == "fp8" and in_blocks else BF16


def _shards(groups: Iterable[_Group], most: int) -> list[list[_Group]]:
    """Splits the groups, in their order, into files of at most `most` bytes."""
    shards: list[list[_Group]] = [[]]
    held = 0
    for group in groups:
        size = _bytes(group)
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(group)
        held += size
    return shards


def _shards_of_others(
    others: Mapping[str, safetensors.Tensor], most: int
) -> list[dict[str, safetensors.Tensor]]:
    """Splits the other parts' tensors, in their order, into files of at most `most` bytes."""
    shards: list[dict[str, safetensors.Tensor]] = []
    held = most
    for name, tensor in others.items():
        if held + tensor.nbytes > most:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += tensor.nbytes
    return shards


def _bytes(group: _Group) -> int:
    sizes = (int(np.prod(shape)) * dtype.itemsize for dtype, shape in group.tensors.values())
    return sum(sizes)


def _names(count: int) -> list[str]:
    return [f"model-{number + 1:05}-of-{count:06}.safetensors" for number in range(count)]


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """FP8 blocks of a source's matrices.

    Attributes:
      powers_of_two: whether new scales are powers of two.
      convert: whether blocks in FP8 with other scales are made anew then.
      again: names of those that were.
    """

    source: WeightSource
    powers_of_two: bool
    convert: bool
    again: list[str] = dataclasses.field(default_factory=list)

    def of(self, name: str, piece: Piece) -> tuple[np.ndarray, np.ndarray]:
        """E4M3 values and float32 scales of a tensor."""
        pair = self.source.stored(name)
        if pair is not None and self.convert and not fp8_blocks.are_powers_of_two(pair[1]).all():
            self.again.append(name)
            pair = None
        if pair is None:
            wide = self.source.read(piece).astype(np.float32, copy=False)
            former = self.source.former(name)
            if former is not None and former.shape != piece.scales.shape:
                former = None  # of a model of other sizes
            pair = fp8_blocks.quantise_blocks(wide, powers_of_two=self.powers_of_two, former=former)
        return pair


def _values(
    shard: Iterable[_Group], source: WeightSource, blocks: _Blocks
) -> Iterator[tuple[str, np.ndarray]]:
    for group in shard:
        dtype, _ = group.tensors[group.name]
        if dtype == E4M3:
            values, scales = blocks.of(group.name, group.piece)
            table = group.name + SCALE
            yield group.name, values
            yield table, scales.astype(group.tensors[table][0], copy=False)
        else:
            yield group.name, source.read(group.piece).astype(dtype, copy=False)
