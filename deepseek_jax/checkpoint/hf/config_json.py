"""Model settings between the Hugging Face format, a checkpoint's config.json, and ours."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_jax.checkpoint.hf import language_part, neighbours
from deepseek_jax.checkpoint.hf.names import TensorLayout
from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.config.hints import shown
from deepseek_jax.model import rotary
from deepseek_jax.precision.fp8_tiles import BLOCK

FAMILIES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",  # V3, R1, Moonlight
    "deepseek_v2": "DeepseekV2ForCausalLM",  # V2, V2-Lite
    "kimi_k2": "DeepseekV3ForCausalLM",  # Kimi K2: V3 under another name
    "deepseek_v32": "DeepseekV32ForCausalLM",  # V3.2-Exp, V3.2: V3 with a lightning indexer
}
# Published counts that must be there -> ours.
_COUNTS = {
    "vocab_size": "vocab", "num_hidden_layers": "layers", "hidden_size": "d_model",
    "intermediate_size": "d_dense", "num_attention_heads": "heads", "kv_lora_rank": "kv_latent",
    "qk_nope_head_dim": "d_nope", "qk_rope_head_dim": "d_rope", "v_head_dim": "d_value",
    "n_routed_experts": "experts", "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "d_expert",
}  # fmt: skip
# Published counts for which null or absent means zero -> ours.
_OPTIONAL = {
    "first_k_dense_replace": "dense_layers", "q_lora_rank": "q_latent",
    "n_shared_experts": "shared_experts", "num_nextn_predict_layers": "mtp_depth",
}  # fmt: skip
# Published counts of V3.2's indexer -> ours.
_INDEXER = {
    "index_n_heads": "index_heads", "index_head_dim": "index_width", "index_topk": "index_top_k",
}  # fmt: skip
_NO_INDEXER = {"index_heads": 0, "index_width": 128, "index_top_k": 2048}
_KINDS = "mlp_layer_types"  # of V3.2 in transformers 5: "dense" or "sparse" for each layer
# Keys with the only value that this model computes; absent means that value.
_FIXED = {
    "attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "moe_layer_freq": 1,
}  # fmt: skip
# Keys whose other value is read, and the value that our own models are written with.
_WRITTEN = {"tie_word_embeddings": False, "rope_interleave": True}
# Lists of modules that a quantization_config leaves as they are, by the names of its writers.
UNQUANTISED = ("modules_to_not_convert", "ignored_layers", "ignore")
_ROTARY_FORMS = ("deepseek_v3", "kimi_k2")  # families whose readers know rope_interleave=false
_GROUP_SCORE = {"noaux_tc": "top2", "group_limited_greedy": "max", "greedy": "max"}


def model_config(settings: Mapping[str, Any], *, source: Path) -> ModelConfig:
    """Our model config for published settings.

    Args:
      settings: content of a config.json.
      source: the path of that file, for messages.

    Raises:
      ConfigError: a key that is missing, or has a value that this model does not compute.
    """
    neighbours.refuse(settings, source)
    language_part.check(settings, source)
    path = f"{language_part.KEY}." if language_part.is_wrapped(settings) else ""
    settings = language_part.of(settings)
    found = _Settings(settings, source, path)
    family = found.one_of("model_type", FAMILIES)
    v3 = family != "deepseek_v2"
    if settings.get("architectures"):  # null where a config was saved without a model
        found.need("architectures", [FAMILIES[family]], default=None)
    for key, value in _FIXED.items():
        found.need(key, value, default=value)
    found.flag("tie_word_embeddings", default=False)
    if family in _ROTARY_FORMS:
        found.flag("rope_interleave", default=True)
    else:
        found.need("rope_interleave", True, default=True)

    sizes = {ours: found.count(key) for key, ours in _COUNTS.items()}
    sizes |= {ours: found.count(key, least=0, absent=0) for key, ours in _OPTIONAL.items()}
    indexed = family == "deepseek_v32"
    sizes |= {k: found.count(key) for key, k in _INDEXER.items()} if indexed else _NO_INDEXER
    sizes["dense_layers"] = min(sizes["dense_layers"], sizes["layers"])
    if indexed and settings.get(_KINDS) is not None:
        sizes["dense_layers"] = _dense_layers(found, sizes["layers"])
    if settings.get("num_key_value_heads") is not None:
        found.need("num_key_value_heads", sizes["heads"], default=None)
    method = found.one_of("topk_method", _GROUP_SCORE, default=topk_method(settings))
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
            "scoring_func",
            ("sigmoid", "softmax", "sqrtsoftplus"),
            default="sigmoid" if v3 else "softmax",
        ),
        group_score=_GROUP_SCORE[method],
        normalise_weights=normalise,
        routed_scale=scale,
        swiglu_limit=found.number("swiglu_limit", absent=0.0, zero=True),
        norm_eps=found.number("rms_norm_eps"),
        init_std=found.number("initializer_range", absent=0.02),
    )
    _check_relations(config, found)
    return config


def published(config: ModelConfig) -> dict[str, Any]:
    """Published settings for a model of ours; `model_config` reads the same model back.

    Raises:
      ConfigError: a router that neither published family has.
    """
    v3 = config.score != "softmax"
    grouped = config.groups > 1
    family = "deepseek_v3" if v3 else "deepseek_v2"
    if config.index_heads:
        if not v3:
            raise ConfigError(
                f"model.index_heads={config.index_heads} with model.score={config.score!r} has no "
                "published form; expected model.score='sigmoid'"
            )
        family = "deepseek_v32"
    score = "top2" if v3 else "max"
    if grouped and config.group_score != score:
        raise ConfigError(
            f"model.group_score={config.group_score!r} with model.score={config.score!r} has no "
            f"published form; expected model.group_score={score!r}"
        )
    if not v3 and config.normalise_weights and config.routed_scale != 1:
        raise ConfigError(
            f"model.routed_scale={config.routed_scale} beside model.normalise_weights and "
            "model.score='softmax' has no published form; expected model.routed_scale=1"
        )
    named = _COUNTS | _OPTIONAL | (_INDEXER if config.index_heads else {})
    sizes = {theirs: getattr(config, ours) for theirs, ours in named.items()}
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        **_FIXED,
        **_WRITTEN,
        **sizes,
        "q_lora_rank": config.q_latent or None,
        "num_key_value_heads": config.heads,
        "attention_dropout": 0.0,
        "ep_size": 1,
        "initializer_range": config.init_std,
        "max_position_embeddings": round(config.yarn_original * config.yarn_factor),
        "n_group": config.groups,
        "topk_group": config.top_groups,
        "topk_method": "noaux_tc" if v3 else "group_limited_greedy" if grouped else "greedy",
        "scoring_func": config.score,
        "norm_topk_prob": config.normalise_weights,
        "routed_scaling_factor": config.routed_scale,
        **({"swiglu_limit": config.swiglu_limit} if config.swiglu_limit else {}),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": _plain(config.rope_theta),
        "rope_scaling": _yarn(config),
        "use_cache": True,
    }


def _yarn(config: ModelConfig) -> dict[str, Any] | None:
    if config.yarn_factor == 1:
        return None
    return {
        "type": "yarn",
        "factor": _plain(config.yarn_factor),
        "original_max_position_embeddings": config.yarn_original,
        "beta_fast": _plain(config.yarn_beta_fast),
        "beta_slow": _plain(config.yarn_beta_slow),
        "mscale": config.yarn_mscale,
        "mscale_all_dim": config.yarn_mscale_all_dim,
    }


def _plain(number: float) -> float:
    """The number as published settings spell it: whole numbers without a fraction."""
    return int(number) if number.is_integer() else number


def understood_here_alone(settings: Mapping[str, Any]) -> list[str]:
    """Keys with a value that other readers of the family pass over, and compute another model."""
    text = language_part.of(settings)
    odd = {"swiglu_limit": bool(text.get("swiglu_limit"))}
    odd["scoring_func"] = text.get("scoring_func") == "sqrtsoftplus"
    return [key for key, found in odd.items() if found]


def in_format(settings: Mapping[str, Any], form: str, scales: str = "kept") -> dict[str, Any]:
    """Settings of the same model with its tensors stored in another form.

    Args:
      form, scales: one of `export.FORMATS` and of `export.SCALES`.
    """
    if language_part.is_wrapped(settings):
        return _in_format_around(settings, form, scales)
    out = {key: value for key, value in settings.items() if key != "quantization_config"}
    out.pop("dtype", None)  # the newer name of torch_dtype
    out["torch_dtype"] = "float32" if form == "float32" else "bfloat16"
    if form == "fp8":
        out["quantization_config"] = {
            **(settings.get("quantization_config") or {}),  # such as scale_fmt
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
        }
        if scales != "kept":
            out["quantization_config"]["scale_fmt"] = "ue8m0"
    return out


def _in_format_around(settings: Mapping[str, Any], form: str, scales: str) -> dict[str, Any]:
    """`in_format` of the text model inside; the quantisation is stated where it was, or outside."""
    key, inside = "quantization_config", language_part.KEY
    text = in_format(language_part.of(settings), form, scales)
    quantised = text.pop(key, None)
    out = {name: value for name, value in settings.items() if name != key}
    out[inside] = {
        **{name: value for name, value in settings[inside].items() if name not in (key, "dtype")},
        "torch_dtype": text["torch_dtype"],
    }
    if quantised is not None:
        place = out[inside] if settings[inside].get(key) else out
        place[key] = quantised
    return out


def topk_method(settings: Mapping[str, Any]) -> str:
    """The value of `topk_method`, or the one that its absence means."""
    settings = language_part.of(settings)
    v3 = settings.get("model_type") != "deepseek_v2"
    return settings.get("topk_method") or ("noaux_tc" if v3 else "greedy")


def tensor_layout(settings: Mapping[str, Any]) -> TensorLayout:
    """The form of the tensors beside these settings."""
    halves = language_part.of(settings).get("rope_interleave") is False
    return TensorLayout(biased=topk_method(settings) == "noaux_tc", half_split=halves)


def check_mtp(settings: Mapping[str, Any], config: ModelConfig, source: Path) -> None:
    """Raises ConfigError for MTP layers that have a dense network, as the settings count them."""
    text = language_part.of(settings)
    dense = 0 if text.get(_KINDS) is not None else text.get("first_k_dense_replace") or 0
    if config.mtp_depth and dense > config.layers:
        raise ConfigError(
            f"{source}: first_k_dense_replace is {dense}; expected at most num_hidden_layers="
            f"{config.layers} beside MTP layers, which have experts here; "
            "num_nextn_predict_layers=0 leaves them out"
        )


def _dense_layers(found: "_Settings", layers: int) -> int:
    """Number of dense layers by the list of kinds, which `transformers` follows where it is."""
    kinds = found.values[_KINDS]
    own = kinds[:layers] if isinstance(kinds, list) else []
    dense = own.count("dense")
    if len(own) < layers or own != ["dense"] * dense + ["sparse"] * (layers - dense):
        found.refuse(_KINDS, f"dense layers, then sparse ones: {layers} in all")
    return dense


def _check_relations(config: ModelConfig, found: "_Settings") -> None:
    if config.mtp_depth > 4:
        found.refuse("num_nextn_predict_layers", "from 0 to 4")
    if config.d_rope % 2:
        found.refuse("qk_rope_head_dim", "an even number")
    if config.index_heads and not config.q_latent:
        found.refuse("q_lora_rank", "1 or more, from which the indexer makes its queries")
    if config.index_heads and config.index_width < config.d_rope:
        found.refuse("index_head_dim", f"at least qk_rope_head_dim={config.d_rope}")
    if config.experts % config.groups:
        found.refuse("n_group", f"a divisor of n_routed_experts={config.experts}")
    if config.top_groups > config.groups:
        found.refuse("topk_group", f"at most n_group={config.groups}")
    per_group = config.experts // config.groups
    if config.groups > 1 and config.group_score == "top2" and per_group < 2:
        found.refuse("n_group", f"two or more of n_routed_experts={config.experts} in each")
    if config.top_k > (held := per_group * config.top_groups):
        found.refuse("num_experts_per_tok", f"at most the {held} experts of topk_group groups")
    quantised = found.below("quantization_config").values
    for key, value in {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}.items():
        if quantised and quantised.get(key) != value:
            raise ConfigError(
                f"{found.source}: quantization_config.{key} is {shown(quantised.get(key))}; "
                f"expected {value!r}"
            )
    for key in UNQUANTISED:
        names = quantised.get(key) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            found.below("quantization_config").refuse(key, "names of modules, or null")


def _rotary(found: "_Settings") -> dict[str, Any]:
    """Theta and YaRN, from `rope_scaling` or from `rope_parameters`, the newer spelling of both."""
    newer = found.values.get("rope_parameters") is not None
    spelling = "rope_parameters" if newer else "rope_scaling"
    rope = found.below(spelling)
    theta = rope if newer and "rope_theta" in rope.values else found
    kind = "rope_type" if "rope_type" in rope.values else "type"
    yarn = rope.one_of(kind, ("default", "yarn"), default="default") == "yarn"
    values: dict[str, Any] = {
        "rope_theta": theta.number("rope_theta", absent=10_000.0),  # as of the published code
        "yarn_factor": 1.0,  # off, which leaves the rest without effect
        "yarn_original": found.count("max_position_embeddings", absent=4096),
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_mscale": 1.0,
        "yarn_mscale_all_dim": 1.0,
    }
    if not yarn:
        return values
    rope.need("truncate", True, default=True)
    longest = values["yarn_original"]
    original = rope.count("original_max_position_embeddings", absent=longest)
    values |= {  # defaults of `transformers` where a key is absent
        "yarn_factor": rope.number("factor", absent=longest / original),
        "yarn_original": original,
        "yarn_beta_fast": rope.number("beta_fast", absent=32.0),
        "yarn_beta_slow": rope.number("beta_slow", absent=1.0),
        "yarn_mscale": rope.number("mscale", absent=0.0, zero=True),
        "yarn_mscale_all_dim": rope.number("mscale_all_dim", absent=0.0, zero=True),
    }
    if values["yarn_factor"] < 1:
        rope.refuse("factor", "at least 1")
    if values["yarn_beta_fast"] < values["yarn_beta_slow"]:
        rope.refuse("beta_fast", f"at least beta_slow={values['yarn_beta_slow']}")
    if values["yarn_factor"] > 1 and values["rope_theta"] == 1:
        theta.refuse("rope_theta", "another number than 1, whose logarithm YaRN divides by")
    if rope.values.get("attention_factor") is not None:
        names = ("yarn_factor", "yarn_mscale", "yarn_mscale_all_dim")
        computed = rotary.attention_factor(*(values[name] for name in names))
        if not math.isclose(rope.number("attention_factor"), computed, rel_tol=1e-6):
            rope.refuse("attention_factor", f"null, or {computed:.7g} as factor and mscale give")
    return values


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Published settings, or one object among them (at `path`); reading a value checks it."""

    values: Mapping[str, Any]
    source: Path
    path: str = ""

    def below(self, key: str) -> "_Settings":
        """The object under a key; null or an absent key is an empty one."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "an object or null")
        return _Settings(value or {}, self.source, f"{self.path}{key}.")

    def refuse(self, key: str, expected: str) -> None:
        """Raises ConfigError with the value of the key and what was expected."""
        found = shown(self.values[key]) if key in self.values else "missing"
        raise ConfigError(f"{self.source}: {self.path}{key} is {found}; expected {expected}")

    def need(self, key: str, value: Any, *, default: Any) -> None:
        """Refuses every value of the key but this one."""
        found = self.values.get(key, default)
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            self.refuse(key, repr(value))

    def one_of(self, key: str, choices: Any, *, default: str = "") -> str:
        """A value among `choices`; null, empty or an absent key is `default`."""
        value = self.values.get(key) or default
        if not isinstance(value, str) or value not in choices:
            self.refuse(key, f"one of {', '.join(choices)}")
        return value

    def count(self, key: str, *, least: int = 1, absent: int | None = None) -> int:
        """A whole number from `least` on; null or an absent key is `absent`."""
        value = self.values.get(key)
        value = absent if value is None else value
        if type(value) is not int or not least <= value < 2**63:
            self.refuse(key, f"a whole number from {least} on")
        assert isinstance(value, int)
        return value

    def number(self, key: str, *, absent: float | None = None, zero: bool = False) -> float:
        """A number from 1e-20 to 2**63, or 0 with `zero`; null or an absent key is `absent`.

        A smaller one would be 0 in float32, or make numbers that are not finite.
        """
        value = self.values.get(key)
        value = absent if value is None else value
        number = -1.0
        if isinstance(value, int | float) and type(value) is not bool and abs(value) < 2**64:
            number = float(value)
        if not (1e-20 <= number < 2**63 or (zero and number == 0)):
            self.refuse(key, f"{'0, or ' if zero else ''}a number from 1e-20 to 2**63")
        return number

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false; an absent key is `default`."""
        value = self.values.get(key, default)
        if type(value) is not bool:
            self.refuse(key, "true or false")
        return value
