"""Names and shapes of published tensors, and the parts of our parameters that they fill.

The rows of a head's rotary part come in pairs, (2j, 2j + 1) in ours and in most checkpoints. Where
`rope_interleave` is false, published pairs are rows (j, j + R/2) of the R rows: the same rows in
another order, in queries and keys alike, so that no product changes.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params
from deepseek_jax.precision.fp8_tiles import BLOCK
from deepseek_jax.precision.fp8_weights import Fp8Weight

BIAS = "e_score_correction_bias"  # of a router
SCALE = "_scale_inv"  # suffix of an FP8 weight's scales; despite the name they are multiplied


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """Choices of a checkpoint's writer that sizes do not tell.

    Attributes:
      biased: whether routers have biases; V2 has none.
      half_split: whether rotary pairs are rows (j, j + R/2).
    """

    biased: bool = True
    half_split: bool = False


V3_LAYOUT = TensorLayout()


@dataclasses.dataclass(frozen=True)
class Piece:
    """A published tensor, and the part of our parameter that it is.

    Attributes:
      name: published name.
      shape: published shape, [out, in] for a matrix.
      path: our parameter, as `params.describe` names it.
      index: index of the part: layer, then expert, then the half of `gate_up`.
      transposed: whether ours has the input in front (all but the embedding, which is looked up).
      half_split: for rows whose rotary pairs are (j, j + R/2): rows of a head, and R, its last.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[Any, ...]
    transposed: bool = True
    half_split: tuple[int, int] | None = None

    @property
    def order(self) -> np.ndarray | None:
        """The published row that each of our rows is; None where both orders are the same."""
        if self.half_split is None:
            return None
        head, rotary = self.half_split
        rows = np.arange(self.shape[0]).reshape(-1, head)
        halves = rows[:, head - rotary :].reshape(len(rows), 2, rotary // 2)
        rows[:, head - rotary :] = halves.swapaxes(1, 2).reshape(len(rows), rotary)
        return rows.reshape(-1)

    @property
    def scales(self) -> "Piece":
        """The scales of this tensor's FP8 blocks, as a part of those of our parameter."""
        shape = tuple(-(-size // BLOCK) for size in self.shape)
        return dataclasses.replace(self, name=self.name + SCALE, shape=shape, half_split=None)

    def published(self, part: np.ndarray) -> np.ndarray:
        """The part of our parameter in the published shape."""
        out = part.reshape(self.shape[::-1]).T if self.transposed else part
        return out if self.order is None else out[np.argsort(self.order)]


def pieces(config: ModelConfig, layout: TensorLayout = V3_LAYOUT) -> Iterator[Piece]:
    """Pieces of the whole model."""
    table = (config.vocab, config.d_model)
    yield Piece("model.embed_tokens.weight", table, "embedding.table", (), transposed=False)
    blocks = (
        ("dense_layers.", config.dense_layers, _dense),
        ("moe_layers.", config.moe_layers, _mixture),
        ("mtp.", config.mtp_depth, _mtp),
    )
    number = itertools.count()
    for stack, count, parts in blocks:
        for layer in range(count):
            prefix = f"model.layers.{next(number)}."
            for part in parts(config, layout):
                yield dataclasses.replace(
                    part,
                    name=prefix + part.name,
                    path=stack + part.path,
                    index=(layer, *part.index),
                )
    yield Piece("model.norm.weight", (config.d_model,), "norm.scale", ())
    yield Piece("lm_head.weight", table, "head.table", ())


def _dense(config: ModelConfig, layout: TensorLayout) -> Iterator[Piece]:
    yield from _attention_and_norms(config, layout, "")
    yield from _swiglu("mlp.", (config.d_model, config.d_dense), "feed.")


def _mixture(config: ModelConfig, layout: TensorLayout, block: str = "") -> Iterator[Piece]:
    yield from _attention_and_norms(config, layout, block)
    gate, router = "mlp.gate.", f"{block}feed.router."
    yield Piece(f"{gate}weight", (config.experts, config.d_model), f"{router}centroids", ())
    if layout.biased:
        yield Piece(gate + BIAS, (config.experts,), f"{router}bias", ())
    widths = (config.d_model, config.d_expert)
    for expert in range(config.experts):
        yield from _swiglu(f"mlp.experts.{expert}.", widths, f"{block}feed.experts.", expert)
    if config.shared_experts:
        widths = (config.d_model, config.d_shared)
        yield from _swiglu("mlp.shared_experts.", widths, f"{block}feed.shared.")


def _mtp(config: ModelConfig, layout: TensorLayout) -> Iterator[Piece]:
    yield from _mixture(config, layout, block="block.")
    width = (config.d_model,)
    yield Piece("enorm.weight", width, "embedding_norm.scale", ())
    yield Piece("hnorm.weight", width, "hidden_norm.scale", ())
    yield Piece("shared_head.norm.weight", width, "out_norm.scale", ())
    halves = (config.d_model, 2 * config.d_model)  # input: [embedding ; hidden]
    yield Piece("eh_proj.weight", halves, "project", ())


def _attention_and_norms(config: ModelConfig, layout: TensorLayout, block: str) -> Iterator[Piece]:
    d, heads = config.d_model, config.heads
    q_latent, kv_latent = config.q_latent, config.kv_latent
    yield Piece("input_layernorm.weight", (d,), f"{block}attention_norm.scale", ())
    yield Piece("post_attention_layernorm.weight", (d,), f"{block}feed_norm.scale", ())
    query = heads * (config.d_nope + config.d_rope)
    key_value = heads * (config.d_nope + config.d_value)
    rows: list[tuple[str, tuple[int, ...], str]] = [
        ("kv_a_proj_with_mqa", (kv_latent + config.d_rope, d), "kv_down"),
        ("kv_a_layernorm", (kv_latent,), "kv_norm.scale"),
        ("kv_b_proj", (key_value, kv_latent), "kv_up"),
        ("o_proj", (d, heads * config.d_value), "out"),
    ]
    if q_latent:
        rows += [
            ("q_a_proj", (q_latent, d), "query_down"),
            ("q_a_layernorm", (q_latent,), "query_norm.scale"),
            ("q_b_proj", (query, q_latent), "query_up"),
        ]
    else:
        rows += [("q_proj", (query, d), "query")]
    halves: dict[str, tuple[int, int]] = {}
    if layout.half_split:
        halves["q_b_proj"] = halves["q_proj"] = config.d_nope + config.d_rope, config.d_rope
        halves["kv_a_proj_with_mqa"] = kv_latent + config.d_rope, config.d_rope
    for name, shape, path in rows:
        yield Piece(
            f"self_attn.{name}.weight", shape, f"{block}attention.{path}", (),
            half_split=halves.get(name),
        )  # fmt: skip
    if config.index_heads:
        yield from _indexer(config, block)


def _indexer(config: ModelConfig, block: str) -> Iterator[Piece]:
    width, heads = config.index_width, config.index_heads
    rows: list[tuple[str, tuple[int, ...], str]] = [
        ("wq_b.weight", (heads * width, config.q_latent), "query_up"),
        ("wk.weight", (width, config.d_model), "key_down"),
        ("k_norm.weight", (width,), "key_norm.scale"),
        ("k_norm.bias", (width,), "key_norm.bias"),
        ("weights_proj.weight", (heads, config.d_model), "head_weights"),
    ]
    for name, shape, path in rows:
        yield Piece(f"self_attn.indexer.{name}", shape, f"{block}attention.indexer.{path}", ())


def _swiglu(name: str, widths: tuple[int, int], path: str, *expert: int) -> Iterator[Piece]:
    d, f = widths
    yield Piece(f"{name}gate_proj.weight", (f, d), f"{path}gate_up", (*expert, slice(None), 0))
    yield Piece(f"{name}up_proj.weight", (f, d), f"{path}gate_up", (*expert, slice(None), 1))
    yield Piece(f"{name}down_proj.weight", (d, f), f"{path}down", expert)


def to_published(
    config: ModelConfig, tree: Any, layout: TensorLayout = V3_LAYOUT
) -> dict[str, np.ndarray]:
    """Published name -> [out, in] array, a view where it can be.

    Args:
      tree: a model on one device, or a tree of its structure such as the gradients of its
        parameters; names of parameters that it does not hold are left out. A weight in FP8 gives
        two arrays: its E4M3 values, and the scales of their blocks.
    """
    paths = [weight.path for weight in params.describe(tree)]
    variables = jax.tree.leaves(tree, is_leaf=params.is_variable)
    ours = {path: variable[...] for path, variable in zip(paths, variables, strict=True)}
    found: dict[str, np.ndarray] = {}
    for piece in pieces(config, layout):
        value = ours.get(piece.path)
        if isinstance(value, Fp8Weight):
            table = piece.scales
            found[table.name] = table.published(np.asarray(value.scales)[table.index])
            value = value.values
        if value is not None:
            found[piece.name] = piece.published(np.asarray(value)[piece.index])
    return found
