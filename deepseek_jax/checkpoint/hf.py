"""Published checkpoints: names, shapes and settings of the Hugging Face format, both ways.

One table, `pieces`, says which part of which of our parameters each published tensor is. A
published matrix is [out, in], ours are laid out as the einsums of `model/` read them: the transpose
of the one is a reshape of the other.

What is read and left alone: an MTP layer's copies of embedding and head (all depths share the main
model's), and tables of rotary frequencies, which follow from the settings.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from deepseek_jax.checkpoint import safetensors
from deepseek_jax.checkpoint.safetensors import FP8, Tensor
from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.transformer import Transformer, abstract_model
from deepseek_jax.precision.blocks import BLOCK, spread

FAMILIES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",  # V3, R1, Moonlight
    "deepseek_v2": "DeepseekV2ForCausalLM",  # V2, V2-Lite
}
Place = Callable[[params.Weight], Sharding]
SCALE = "_scale_inv"  # what the name of an FP8 weight's scales ends in; despite it, one multiplies

# Published counts that must be there -> ours.
_COUNTS = {
    "vocab_size": "vocab", "num_hidden_layers": "layers", "hidden_size": "d_model",
    "intermediate_size": "d_dense", "num_attention_heads": "heads", "kv_lora_rank": "kv_latent",
    "qk_nope_head_dim": "d_nope", "qk_rope_head_dim": "d_rope", "v_head_dim": "d_value",
    "n_routed_experts": "experts", "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "d_expert",
}  # fmt: skip
# Where null or absent means zero.
_OPTIONAL = {
    "first_k_dense_replace": "dense_layers", "q_lora_rank": "q_latent",
    "n_shared_experts": "shared_experts", "num_nextn_predict_layers": "mtp_depth",
}  # fmt: skip
# The only value that this model computes; absent means the same.
_FIXED = {
    "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "hidden_act": "silu",
    "moe_layer_freq": 1, "rope_interleave": True,
}  # fmt: skip
_GROUP_SCORE = {"noaux_tc": "top2", "group_limited_greedy": "max", "greedy": "max"}


@dataclasses.dataclass(frozen=True)
class Piece:
    """One published tensor, and the part of our parameter that it is.

    Attributes:
      name: published.
      shape: published, [out, in] for a matrix.
      path: our parameter, as `params.describe` names it.
      index: of the part: layer, then expert, then which half of `gate_up`.
      transposed: ours has the input in front (all but the embedding, which is looked up).
    """

    name: str
    shape: tuple[int, ...]
    path: str
    index: tuple[Any, ...]
    transposed: bool = True

    def ours(self, published: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        return (published.T if self.transposed else published).reshape(shape)

    def published(self, part: np.ndarray) -> np.ndarray:
        return part.reshape(self.shape[::-1]).T if self.transposed else part


def pieces(config: ModelConfig, *, biased: bool = True) -> Iterator[Piece]:
    """The whole model; without the router biases where `biased` is false (V2 has none)."""
    table = (config.vocab, config.d_model)
    yield Piece("model.embed_tokens.weight", table, "embedding.table", (), transposed=False)
    blocks = (
        ("dense_layers.", config.dense_layers, _dense),
        ("moe_layers.", config.moe_layers, functools.partial(_mixture, biased=biased)),
        ("mtp.", config.mtp_depth, functools.partial(_mtp, biased=biased)),
    )
    number = itertools.count()
    for stack, count, parts in blocks:
        for layer in range(count):
            prefix = f"model.layers.{next(number)}."
            for part in parts(config):
                yield dataclasses.replace(
                    part,
                    name=prefix + part.name,
                    path=stack + part.path,
                    index=(layer, *part.index),
                )
    yield Piece("model.norm.weight", (config.d_model,), "norm.scale", ())
    yield Piece("lm_head.weight", table, "head.table", ())


def _dense(config: ModelConfig) -> Iterator[Piece]:
    yield from _attention_and_norms(config, "")
    yield from _swiglu("mlp.", (config.d_model, config.d_dense), "feed.")


def _mixture(config: ModelConfig, *, biased: bool, block: str = "") -> Iterator[Piece]:
    yield from _attention_and_norms(config, block)
    gate, router = "mlp.gate.", f"{block}feed.router."
    yield Piece(f"{gate}weight", (config.experts, config.d_model), f"{router}centroids", ())
    if biased:
        yield Piece(f"{gate}e_score_correction_bias", (config.experts,), f"{router}bias", ())
    widths = (config.d_model, config.d_expert)
    for expert in range(config.experts):
        yield from _swiglu(f"mlp.experts.{expert}.", widths, f"{block}feed.experts.", expert)
    if config.shared_experts:
        widths = (config.d_model, config.d_shared)
        yield from _swiglu("mlp.shared_experts.", widths, f"{block}feed.shared.")


def _mtp(config: ModelConfig, *, biased: bool) -> Iterator[Piece]:
    yield from _mixture(config, biased=biased, block="block.")
    width = (config.d_model,)
    yield Piece("enorm.weight", width, "embedding_norm.scale", ())
    yield Piece("hnorm.weight", width, "hidden_norm.scale", ())
    yield Piece("shared_head.norm.weight", width, "out_norm.scale", ())
    halves = (config.d_model, 2 * config.d_model)  # input: [embedding ; hidden]
    yield Piece("eh_proj.weight", halves, "project", ())


def _attention_and_norms(config: ModelConfig, block: str) -> Iterator[Piece]:
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
    for name, shape, path in rows:
        yield Piece(f"self_attn.{name}.weight", shape, f"{block}attention.{path}", ())


def _swiglu(name: str, widths: tuple[int, int], path: str, *expert: int) -> Iterator[Piece]:
    d, f = widths
    yield Piece(f"{name}gate_proj.weight", (f, d), f"{path}gate_up", (*expert, slice(None), 0))
    yield Piece(f"{name}up_proj.weight", (f, d), f"{path}gate_up", (*expert, slice(None), 1))
    yield Piece(f"{name}down_proj.weight", (d, f), f"{path}down", expert)


def to_published(config: ModelConfig, tree: Any) -> dict[str, np.ndarray]:
    """Published name -> [out, in] array, a view where it can be.

    Args:
      tree: a model, or anything with its structure, such as the gradients of its parameters; what
        it does not hold is left out.
    """
    paths = [weight.path for weight in params.describe(tree)]
    ours = dict(zip(paths, map(np.asarray, jax.tree.leaves(tree)), strict=True))
    return {
        piece.name: piece.published(ours[piece.path][piece.index])
        for piece in pieces(config)
        if piece.path in ours
    }


def from_published(
    config: ModelConfig,
    read: Callable[[str], np.ndarray],
    dtype: Any,
    place: Place | None = None,
    *,
    biased: bool = True,
) -> Transformer:
    """A model on the default device from published tensors, which are read one at a time.

    Args:
      read: the values of a published name, of the shape that `pieces` says and any float dtype.
      dtype: of the weights; norms, router and biases stay float32 (`params.cast`).
      biased: False leaves the router biases zero.
    """
    abstract = jax.eval_shape(lambda m: params.cast(m, dtype), abstract_model(config))
    parts: dict[str, list[Piece]] = {}
    for piece in pieces(config, biased=biased):
        parts.setdefault(piece.path, []).append(piece)

    def fill(weight: params.Weight) -> jax.Array:
        whole = _aligned(weight.shape, np.dtype(weight.dtype))
        if weight.path not in parts:
            whole[...] = 0  # a router bias
        for piece in parts.get(weight.path, ()):
            part = whole[piece.index]
            part[...] = piece.ours(read(piece.name), part.shape)
        return jax.device_put(whole, place(weight) if place else None, may_alias=True)

    leaves = [fill(weight) for weight in params.describe(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised, at an address that a CPU device takes over without a second copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def load(folder: Path, dtype: Any = jnp.float32, place: Place | None = None) -> Transformer:
    """The model in a folder that holds config.json and safetensors files; `dtype` of its weights.

    Every check that needs no values is made before the first of them is read.

    Raises:
      ConfigError: settings that this model does not have, or a tensor that is missing, unexpected,
        of another shape, damaged, or not finite; the message says what was found and expected.
    """
    settings = safetensors.read_json(folder / "config.json")
    tensors = safetensors.open_folder(folder)
    config = model_config(settings, source=folder / "config.json")
    if not any(name.startswith(f"model.layers.{config.layers}.") for name in tensors):
        config = dataclasses.replace(config, mtp_depth=0)  # left out when it was saved
    biased = _method(settings) == "noaux_tc"
    _check_tensors(folder, config, tensors, biased)
    return from_published(config, lambda name: _values(tensors, name), dtype, place, biased=biased)


def _check_tensors(
    folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor], biased: bool
) -> None:
    """Every tensor of the model is there, in its shape, and nothing else."""
    expected = {piece.name: piece.shape for piece in pieces(config, biased=biased)}
    table = (config.vocab, config.d_model)
    for name, tensor in tensors.items():
        if copy := re.fullmatch(
            r"model\.layers\.(\d+)\.(embed_tokens|shared_head\.head)\.weight", name
        ):
            if 0 <= int(copy[1]) - config.layers < config.mtp_depth:
                expected[name] = table
        elif re.fullmatch(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", name):
            expected[name] = (config.d_rope // 2,)
        if tensor.dtype == FP8 and len(tensor.shape) == 2:
            rows, columns = tensor.shape
            expected[name + SCALE] = (-(-rows // BLOCK), -(-columns // BLOCK))
    wrong = []
    for name in sorted(expected.keys() | tensors.keys()):
        found, shape = tensors.get(name), expected.get(name)
        # FP8 is for matrices, which come with scales, and scales do not come in FP8.
        plain = name.endswith(SCALE) or len(shape or ()) != 2
        if found is None or found.shape != shape or (found.dtype == FP8 and plain):
            kind = "a float" if plain else "a float or FP8 "
            wanted = "nothing" if shape is None else f"{kind}{list(shape)}"
            wrong.append(f"{name} (found {found or 'nothing'}, expected {wanted})")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            f"{folder} does not hold the model of its config.json: {', '.join(wrong[:3])}{more}"
        )


def _values(tensors: Mapping[str, Tensor], name: str) -> np.ndarray:
    """One tensor, FP8 blocks multiplied by their scales into float32."""
    tensor = tensors[name]
    value = tensor.array
    if tensor.dtype == FP8:
        scales = tensors[name + SCALE].array.astype(np.float32)
        value = value.astype(np.float32) * spread(scales, tensor.shape)
    bad = value.size - int(np.count_nonzero(np.isfinite(value)))
    if bad:
        raise ConfigError(
            f"{tensor.file}: {name} holds {bad} values of {value.size} that are not finite, "
            "expected none"
        )
    return value


def model_config(settings: Mapping[str, Any], *, source: Path) -> ModelConfig:
    """The published settings of `source`, a config.json, as ours.

    Raises:
      ConfigError: a key that is missing, or has a value that this model does not compute.
    """
    found = _Settings(settings, source)
    family = found.one_of("model_type", FAMILIES)
    v3 = family == "deepseek_v3"
    found.need("architectures", [FAMILIES[family]], default=[FAMILIES[family]])
    for key, value in _FIXED.items():
        found.need(key, value, default=value)

    sizes = {ours: found.count(key) for key, ours in _COUNTS.items()}
    sizes |= {ours: found.count(key, least=0, absent=0) for key, ours in _OPTIONAL.items()}
    heads = sizes["heads"]
    found.need("num_key_value_heads", heads, default=heads)
    method = found.one_of("topk_method", _GROUP_SCORE, default=_method(settings))
    greedy = method == "greedy"
    normalise = found.flag("norm_topk_prob", default=v3)
    scale = found.number("routed_scaling_factor", absent=1.0)
    if not v3 and normalise and scale != 1.0:
        found.refuse("routed_scaling_factor", "1 beside norm_topk_prob, where V2's codes disagree")
    config = ModelConfig(
        **sizes,
        **_rotary(found),
        groups=1 if greedy else found.count("n_group", absent=1),
        top_groups=1 if greedy else found.count("topk_group", absent=1),
        score=found.one_of(
            "scoring_func", ("sigmoid", "softmax"), default="sigmoid" if v3 else "softmax"
        ),
        group_score=_GROUP_SCORE[method],
        normalise_weights=normalise,
        routed_scale=scale,
        norm_eps=found.number("rms_norm_eps"),
        init_std=found.number("initializer_range", absent=0.02),
    )
    _check_relations(config, found)
    return config


def _method(settings: Mapping[str, Any]) -> str:
    """`topk_method`, or what its absence means."""
    v3 = settings.get("model_type") == "deepseek_v3"
    return settings.get("topk_method") or ("noaux_tc" if v3 else "greedy")


def _check_relations(config: ModelConfig, found: "_Settings") -> None:
    if config.dense_layers > config.layers:
        found.refuse("first_k_dense_replace", f"at most num_hidden_layers={config.layers}")
    if config.mtp_depth > 4:
        found.refuse("num_nextn_predict_layers", "from 0 to 4")
    if config.d_rope % 2:
        found.refuse("qk_rope_head_dim", "an even number")
    if config.experts % config.groups:
        found.refuse("n_group", f"a divisor of n_routed_experts={config.experts}")
    if config.top_groups > config.groups:
        found.refuse("topk_group", f"at most n_group={config.groups}")
    per_group = config.experts // config.groups
    if config.groups > 1 and config.group_score == "top2" and per_group < 2:
        found.refuse("n_group", f"two or more of n_routed_experts={config.experts} in each")
    if config.top_k > (held := per_group * config.top_groups):
        found.refuse("num_experts_per_tok", f"at most the {held} experts of topk_group groups")
    quantised = found.values.get("quantization_config") or {}
    for key, value in {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}.items():
        if quantised and quantised.get(key) != value:
            raise ConfigError(
                f"{found.source}: quantization_config.{key} is {quantised.get(key)!r}; expected "
                f"{value!r}"
            )


def _rotary(found: "_Settings") -> dict[str, Any]:
    """Theta and YaRN, from `rope_scaling` or from `rope_parameters`, the newer spelling of both."""
    newer = found.values.get("rope_parameters") is not None
    spelling = "rope_parameters" if newer else "rope_scaling"
    rope = found.below(spelling)
    theta = rope if newer and "rope_theta" in rope.values else found
    kind = "rope_type" if "rope_type" in rope.values else "type"
    yarn = rope.one_of(kind, ("default", "yarn"), default="default") == "yarn"
    values: dict[str, Any] = {
        "rope_theta": theta.number("rope_theta"),
        "yarn_factor": 1.0,  # off, which leaves the rest without effect
        "yarn_original": found.count("max_position_embeddings", absent=4096),
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 1.0,
    }
    if not yarn:
        return values
    rope.need("attention_factor", None, default=None)
    rope.need("truncate", True, default=True)
    values |= {  # what is absent is as in the published code
        "yarn_factor": rope.number("factor"),
        "yarn_original": rope.count("original_max_position_embeddings"),
        "yarn_beta_fast": rope.number("beta_fast", absent=32.0),
        "yarn_beta_slow": rope.number("beta_slow", absent=1.0),
        "yarn_mscale": rope.number("mscale", absent=1.0, zero=True),
        "yarn_mscale_all_dim": rope.number("mscale_all_dim", absent=0.0, zero=True),
    }
    if values["yarn_factor"] < 1:
        rope.refuse("factor", "at least 1")
    if values["yarn_beta_fast"] <= values["yarn_beta_slow"]:
        rope.refuse("beta_fast", f"above beta_slow={values['yarn_beta_slow']}")
    return values


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Published settings, or one object among them (`path`), each value checked as it is read."""

    values: Mapping[str, Any]
    source: Path
    path: str = ""

    def below(self, key: str) -> "_Settings":
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "an object or null")
        return _Settings(value or {}, self.source, f"{self.path}{key}.")

    def refuse(self, key: str, expected: str) -> None:
        found = repr(self.values[key]) if key in self.values else "missing"
        raise ConfigError(f"{self.source}: {self.path}{key} is {found}; expected {expected}")

    def need(self, key: str, value: Any, *, default: Any) -> None:
        """The one value that works."""
        found = self.values.get(key, default)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            self.refuse(key, repr(value))

    def one_of(self, key: str, choices: Any, *, default: str = "") -> str:
        value = self.values.get(key) or default
        if not isinstance(value, str) or value not in choices:
            self.refuse(key, f"one of {', '.join(choices)}")
        return value

    def count(self, key: str, *, least: int = 1, absent: int | None = None) -> int:
        value = self.values.get(key)
        value = absent if value is None else value
        if type(value) is not int or not least <= value < 2**63:
            self.refuse(key, f"a whole number from {least} on")
        assert isinstance(value, int)
        return value

    def number(self, key: str, *, absent: float | None = None, zero: bool = False) -> float:
        value = self.values.get(key)
        value = absent if value is None else value
        number = -1.0
        if isinstance(value, int | float) and type(value) is not bool:
            number = float(value)
        if not (0 < number < 2**63 or (zero and number == 0)):
            self.refuse(key, "a number from 0 on" if zero else "a number above 0")
        return number

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.values.get(key, default)
        if type(value) is not bool:
            self.refuse(key, "true or false")
        return value
