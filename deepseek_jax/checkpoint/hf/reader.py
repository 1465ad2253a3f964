"""Reads published checkpoints (Hugging Face layout) into our parameters, onto any sharding.

The table `names.pieces` maps each published tensor to a part of one of our parameters. A published
matrix is [out, in]; ours are laid out as the einsums of `model/` read them, so that the transpose
of a published matrix is a reshape of ours.

Two kinds of tensors are checked and not used: an MTP layer's copies of embedding and head (all
depths share the main model's, so a copy that differs is refused), and tables of rotary frequencies,
which follow from the settings. MTP layers beyond those that the settings count are left out, and so
are tensors without values. Where `tie_word_embeddings` is true and one of embedding and head is not
stored, the other is read in its place; our model has two parameters.
"""

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from deepseek_jax.checkpoint.hf import language_part, safetensors, stacked
from deepseek_jax.checkpoint.hf.config_json import check_mtp, model_config, tensor_layout
from deepseek_jax.checkpoint.hf.names import BIAS, SCALE, Piece, TensorLayout, pieces
from deepseek_jax.checkpoint.hf.parts import BF16, Slices, fill, placed
from deepseek_jax.checkpoint.hf.safetensors import Tensor
from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.transformer import Transformer, abstract_model
from deepseek_jax.precision.fp8_tiles import BLOCK, E4M3, LARGEST, spread
from deepseek_jax.precision.fp8_weights import Fp8Weight
from deepseek_jax.precision.recipes import Recipe

Place = Callable[[params.Weight], Sharding]

# An MTP layer's copies of shared tables -> the shared tables.
COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}


@dataclasses.dataclass(frozen=True)
class Published:
    """Tensors of an opened checkpoint, checked against its settings; no value has been read.

    Attributes:
      config: sizes and rules of the model.
      layout: whether routers have biases (those of V2 have none, and ours are then zero), and the
        order of rotary rows.
      pieces: the part of our parameters that each published tensor is.
      tensors: place in a file, dtype and shape of each tensor, by published name.
      others: tensors of parts beside the text model, which is the only one that is computed.
    """

    config: ModelConfig
    layout: TensorLayout
    pieces: Sequence[Piece]
    tensors: Mapping[str, Tensor]
    others: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def read(self, name: str, index: Slices | None = None) -> np.ndarray:
        """Values of a tensor, or of its part `index`.

        FP8 blocks are multiplied by their scales into float32; other values stay as stored.

        Raises:
          ConfigError: some of these values are not finite, or another in an MTP layer's copy.
        """
        tensor = self.tensors[name]
        index = tuple(slice(0, size) for size in tensor.shape) if index is None else index
        value = self._values(name, index)
        _check_finite(value, tensor, name)
        for copy in self._copies(name):
            if not _same(value, self._values(copy, index)):
                raise ConfigError(
                    f"{self.tensors[copy].file}: {copy} differs from {name}, and an MTP module of "
                    "this model has no table of its own; set num_nextn_predict_layers=0 in "
                    "config.json to leave the MTP layers out"
                )
            self.release(copy)
        return value

    def compare_copies(self) -> None:
        """Raises ConfigError where an MTP layer's copy of a table is none."""
        for name in COPIES.values():
            if self._copies(name):
                self.read(name)
                self.release(name)

    def _copies(self, name: str) -> list[str]:
        layers = range(self.config.layers, self.config.layers + self.config.mtp_depth)
        own = [copy for copy, table in COPIES.items() if table == name]
        names = (f"model.layers.{layer}.{copy}" for layer in layers for copy in own)
        return [copy for copy in names if copy in self.tensors]

    def _values(self, name: str, index: Slices) -> np.ndarray:
        tensor = self.tensors[name]
        value = tensor.array[index]
        if tensor.dtype == E4M3:
            with np.errstate(invalid="ignore"):  # values that are not finite are refused later
                value = value.astype(np.float32) * self._scales(name, index)
        return value

    def _scales(self, name: str, index: Slices) -> np.ndarray:
        """Scale of each value of a part, from the 128x128 blocks that the part overlaps."""
        blocks = tuple(slice(part.start // BLOCK, -(-part.stop // BLOCK)) for part in index)
        scales = self.tensors[name + SCALE].array[blocks].astype(np.float32)
        ends = [part.stop - block.start * BLOCK for part, block in zip(index, blocks, strict=True)]
        return spread(scales, tuple(ends))[tuple(slice(part.start % BLOCK, None) for part in index)]

    def release(self, name: str) -> None:
        """Gives back the memory that reading a tensor took."""
        for stored in (name, name + SCALE):
            if stored in self.tensors:
                self.tensors[stored].release()


@dataclasses.dataclass(frozen=True)
class Blocks:
    """FP8 values of a checkpoint and the scales of their 128x128 blocks, both as stored.

    Attributes:
      published: the checkpoint.
      recipe: refuses scales that it does not compute with.
    """

    published: Published
    recipe: Recipe

    def read(self, name: str, index: Slices) -> np.ndarray:
        """E4M3 values of a tensor's part `index`, or float32 scales where the tensor is of scales.

        Raises:
          ConfigError: values that are not finite, also of products, or scales that are refused.
        """
        tensor = self.published.tensors[name]
        value = tensor.array[index]
        if not name.endswith(SCALE):
            _check_finite(value, tensor, name)
            return value
        value = value.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            _check_finite(value * np.float32(LARGEST), tensor, name)
        self.recipe.check_scales(value, f"{tensor.file}: {name}")
        return value

    def release(self, name: str) -> None:
        """Gives back the memory that reading a tensor took."""
        self.published.tensors[name].release()


def open_folder(folder: Path, settings: Mapping[str, Any]) -> Published:
    """Opens the safetensors files of a folder and checks them against its settings.

    Args:
      settings: content of the folder's config.json.

    Raises:
      ConfigError: settings that this model does not have, or a tensor that is missing, unexpected,
        of another shape or damaged; the message says what was found and expected.
    """
    everything = safetensors.open_folder(folder)
    config = model_config(settings, source=folder / "config.json")
    tensors, others = language_part.split(settings, everything)
    tensors = _untied(settings, {n: t for n, t in tensors.items() if t.nbytes})
    if not any(name.startswith(f"model.layers.{config.layers}.") for name in tensors):
        config = dataclasses.replace(config, mtp_depth=0)  # left out when it was saved
    check_mtp(settings, config, folder / "config.json")
    tensors = stacked.single_experts(
        folder, config, _without_uncounted_mtp(folder, config, tensors)
    )
    _check_count(folder, config, len(tensors))
    layout = _layout(folder, settings, tensors)
    table = tuple(pieces(config, layout))
    _check_tensors(folder, config, tensors, table)
    return Published(config, layout, table, tensors, others)


def _layout(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> TensorLayout:
    """The form of the tensors; a model whose routers all lack a bias was made without them."""
    layout = tensor_layout(settings)
    routers = [name for name in tensors if name.endswith(".mlp.gate.weight")]
    if not layout.biased or not routers or any(name.endswith(BIAS) for name in tensors):
        return layout
    if jax.process_index() == 0:
        warnings.warn(
            f"{folder} holds no router biases ({BIAS}) for its {len(routers)} routers; they are 0",
            stacklevel=2,
        )
    return dataclasses.replace(layout, biased=False)


def _untied(settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with an embedding and a head, which are one matrix where it is stored so."""
    names = COPIES.values()
    stored = next((tensors[name] for name in names if name in tensors), None)
    if stored is None or not language_part.is_tied(settings):
        return tensors
    return {**dict.fromkeys(names, stored), **tensors}


def _without_uncounted_mtp(
    folder: Path, config: ModelConfig, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors without MTP layers beyond those of the settings, as other readers take them."""
    layer_of = {name: re.match(r"model\.layers\.(\d{1,9})\.", name) for name in tensors}
    own = (
        found[0] for name, found in layer_of.items() if found and name.endswith(".eh_proj.weight")
    )
    counted = config.layers + config.mtp_depth
    extra = {layer for layer in own if int(layer.split(".")[2]) >= counted}
    if not extra:
        return tensors
    if jax.process_index() == 0:
        warnings.warn(
            f"{folder} holds {len(extra)} more MTP layers than config.json counts "
            f"(num_nextn_predict_layers={config.mtp_depth}); they are left out",
            stacklevel=2,
        )
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not (found := layer_of[name]) or found[0] not in extra
    }


def _check_count(folder: Path, config: ModelConfig, found: int) -> None:
    """Refuses sizes that so few tensors cannot have, before a table of them is made."""
    mixtures = config.moe_layers + config.mtp_depth
    least = config.layers + 3 * config.experts * mixtures
    if found < least:
        raise ConfigError(
            f"{folder} does not hold the model of its config.json: num_hidden_layers="
            f"{config.layers} and n_routed_experts={config.experts} need {least} tensors or more "
            f"(found {found})"
        )


def load(
    source: Published, recipe: Recipe, place: Place, kept: Container[str] = frozenset()
) -> Transformer:
    """Reads the model of an opened checkpoint.

    Args:
      recipe: its `stored_dtype` is that of the weights; norms, router and biases stay float32.
      place: sharding of each parameter. A process reads the parts of its own devices, and keeps one
        layer of one device's part at a time in host memory.
      kept: paths among `blocks`, whose weights become `Fp8Weight` of the values and scales in the
        files.

    Raises:
      ConfigError: values that are not finite, or scales that the recipe does not compute with.
    """
    parts, raw = _by_path(source), Blocks(source, recipe)

    def value(weight: params.Weight) -> jax.Array | Fp8Weight:
        own = parts.get(weight.path, [])
        if weight.path not in kept:
            weight = dataclasses.replace(weight, dtype=weight.stored_dtype(recipe))
            return placed(weight, place(weight), own, source)
        narrow, scales = dataclasses.replace(weight, dtype=E4M3), weight.scales
        tables = [piece.scales for piece in own]
        return Fp8Weight(
            placed(narrow, place(narrow), own, raw), placed(scales, place(scales), tables, raw)
        )

    return params.filled(abstract_model(source.config), value)


def blocks(source: Published, recipe: Recipe) -> frozenset[str]:
    """Paths of the parameters that `load` can read as the FP8 blocks that the checkpoint holds.

    These are weights of linear layers all of whose tensors are FP8. A matrix of ours is one
    published tensor, transposed, so that its blocks are those of the tensor whatever its sizes. If
    only some tensors of a parameter are FP8, such as those of some layers, or if its rows change
    places, it is read as floats, of which `prepare` makes other blocks; a warning says so.
    """
    if not recipe.keeps_blocks:
        return frozenset()
    parts, kept = _by_path(source), set()
    for weight in params.describe(abstract_model(source.config)):
        own = parts.get(weight.path, []) if weight.roles is not None else []
        narrow = sum(source.tensors[piece.name].dtype == E4M3 for piece in own)
        moved = any(piece.half_split for piece in own)
        if own and narrow == len(own) and not moved:
            kept.add(weight.path)
        elif narrow and jax.process_index() == 0:
            warnings.warn(
                f"{narrow} of the {len(own)} tensors of {weight.path} are FP8"
                f"{', with rotary rows in halves' if moved else ''}; all of them are quantised "
                "again",
                stacklevel=2,
            )
    return frozenset(kept)


def parts_of(source: Published) -> Callable[[params.Weight, Slices], np.ndarray]:
    """Returns read(weight, held): the part `held` of one of our parameters, on the host."""
    by_layer = {
        path: {layer: list(some) for layer, some in itertools.groupby(parts, _layer)}
        for path, parts in _by_path(source).items()
    }

    def read(weight: params.Weight, held: Slices) -> np.ndarray:
        layers = by_layer.get(weight.path, {})
        stacked = weight.axes[0] == "layer"
        numbers = range(held[0].start, held[0].stop) if stacked else (0,)
        parts = [piece for number in numbers for piece in layers.get(number, ())]
        out = np.empty([span.stop - span.start for span in held], weight.dtype)
        fill(out, weight.shape, held, parts, source)
        return out

    return read


def _by_path(source: Published) -> dict[str, list[Piece]]:
    """Published tensors by the path of the parameter that they fill, in order of the layers."""
    parts: dict[str, list[Piece]] = {}
    for piece in source.pieces:
        parts.setdefault(piece.path, []).append(piece)
    return parts


def _layer(piece: Piece) -> int:
    return piece.index[0] if piece.index else 0


def _check_finite(values: np.ndarray, tensor: Tensor, name: str) -> None:
    bad = not_finite(values)
    if bad:
        raise ConfigError(
            f"{tensor.file}: {name} holds {bad} values of {values.size} that are not finite, "
            "expected none"
        )


def not_finite(values: np.ndarray) -> int:
    """Number of NaN and infinite values; counted some rows at a time to bound memory."""
    bad, rows = 0, max(1, (1 << 18) // max(1, math.prod(values.shape[1:])))
    for start in range(0, len(values), rows):
        some = values[start : start + rows]
        if some.dtype == BF16:
            bad += int(np.count_nonzero((some.view(np.uint16) & 0x7F80) == 0x7F80))
        elif some.dtype == E4M3:
            bad += int(np.count_nonzero((some.view(np.uint8) & 0x7F) == 0x7F))
        else:
            bad += some.size - int(np.count_nonzero(np.isfinite(some)))
    return bad


def _same(values: np.ndarray, others: np.ndarray) -> bool:
    """Whether two arrays hold the same values; compared some rows at a time to bound memory."""
    rows = max(1, (1 << 18) // max(1, math.prod(values.shape[1:])))
    return all(
        np.array_equal(
            values[start : start + rows].astype(np.float32),
            others[start : start + rows].astype(np.float32),
        )
        for start in range(0, len(values), rows)
    )


def _check_tensors(
    folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor], wanted: Sequence[Piece]
) -> None:
    """Raises ConfigError unless the tensors are those of the model, each in its shape."""
    expected = {piece.name: piece.shape for piece in wanted}
    table = (config.vocab, config.d_model)
    for name, tensor in tensors.items():
        if copy := re.fullmatch(
            r"model\.layers\.(\d+)\.(embed_tokens|shared_head\.head)\.weight", name
        ):
            if 0 <= int(copy[1]) - config.layers < config.mtp_depth:
                expected[name] = table
        elif re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name):
            expected[name] = (config.d_rope // 2,)
        if tensor.dtype == E4M3 and len(tensor.shape) == 2:
            expected[name + SCALE] = tuple(-(-size // BLOCK) for size in tensor.shape)
    wrong = []
    for name in sorted(expected.keys() | tensors.keys()):
        found, shape = tensors.get(name), expected.get(name)
        # E4M3 is for matrices, which come with scales; E8M0 is for scales.
        scale = name.endswith(SCALE)
        plain = scale or len(shape or ()) != 2
        narrow = found is not None and (
            (found.dtype == E4M3 and plain) or (found.dtype == safetensors.E8M0 and not scale)
        )
        if found is None or found.shape != shape or narrow:
            kind = "a float" if plain else "a float or FP8 "
            need = "nothing" if shape is None else f"{kind}{list(shape)}"
            wrong.append(f"{name} (found {found or 'nothing'}, expected {need})")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"{folder} does not hold the model of its config.json: {', '.join(wrong[:3])}{more}"
        )
