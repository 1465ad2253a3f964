"""Small random checkpoints in the published layout, one for each rule that models differ in.

`make(variant, seed)` gives settings and float32 weights under their published names, [out, in];
`write` stores them as a folder that any reader of published models opens. Norm gains differ from
one, so that a norm left out or applied twice shows; scores are spread, so that float32 and float64
choose the same experts (`Routing.margin` says by how much).
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "kv_lora_rank": 24,
    "max_position_embeddings": 256,
    "moe_intermediate_size": 24,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "v_head_dim": 12,
    "vocab_size": 256,
}


def _yarn(mscale: float, mscale_all_dim: float) -> dict[str, Any]:
    """Four times the original length of 64, so positions past it are cheap to test."""
    return {
        "type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 32,
        "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale_all_dim,
    }  # fmt: skip


_V2 = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "n_group": 4,
    "topk_group": 2, "topk_method": "group_limited_greedy", "scoring_func": "softmax",
    "norm_topk_prob": False, "routed_scaling_factor": 16.0, "n_shared_experts": 2,
}  # fmt: skip

# What each variant changes; "yarn_ratio" scales cosines and sines, which no released model does.
_CHANGES: dict[str, dict[str, Any]] = {
    "v3": {},
    "no_q_latent": {"q_lora_rank": None},
    "yarn": {"rope_scaling": _yarn(1.0, 1.0)},
    "yarn_v2": {"rope_scaling": _yarn(0.707, 0.707)},
    "yarn_ratio": {"rope_scaling": _yarn(1.0, 0.707)},
    "mtp": {"num_nextn_predict_layers": 1},
    "mtp2": {"num_nextn_predict_layers": 2},
    "v2": _V2,
    "v2_lite": {
        **_V2, "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
        "routed_scaling_factor": 1.0, "rope_scaling": _yarn(0.707, 0.707),
    },
    "v32": {  # fewer positions are selected than there are tokens
        "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32",
        "index_n_heads": 16, "index_head_dim": 16, "index_topk": 20,
        "num_nextn_predict_layers": 1,
    },
    "moonlight": {
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2,
        "routed_scaling_factor": 2.446, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
    },
    "v4_values": {"scoring_func": "sqrtsoftplus", "swiglu_limit": 0.75},
    "kimi_k2": {
        "model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827,
        "rope_theta": 50000.0, "rope_scaling": _yarn(1.0, 1.0) | {"beta_fast": 1},
    },
}  # fmt: skip
VARIANTS = tuple(_CHANGES)
# Those that `transformers` computes too: its V3 knows neither V4's score nor its clamp.
OF_TRANSFORMERS = tuple(variant for variant in VARIANTS if variant != "v4_values")

# Negative enough that s + b < 0 for most experts: a mask of 0 for the dropped groups then chooses
# from them, a mask of -inf does not.
_BIAS_CENTRE = {"no_q_latent": -0.8}


def make(
    variant: str, seed: int = 0, **changes: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(settings, weights) of one of `VARIANTS`; the same seed gives the same arrays.

    `changes` are settings with other values than those of the variant.
    """
    settings = {**_V3, **_CHANGES[variant], **changes}
    random = np.random.default_rng(seed)
    weights = {
        name: _draw(random, name, shape, _BIAS_CENTRE.get(variant, 0.0))
        for name, shape in shapes(settings)
    }
    for name in list(weights):  # the MTP modules' copies of the shared tables
        if name.endswith("shared_head.head.weight"):
            weights[name] = weights["lm_head.weight"].copy()
        elif name.startswith("model.layers.") and name.endswith("embed_tokens.weight"):
            weights[name] = weights["model.embed_tokens.weight"].copy()
    return settings, weights


def make_fp8(
    seed: int = 0, released: bool = False
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(settings, tensors as stored, their exact values) of an MTP model whose blocks are ragged.

    Blocks get any scale; or, if `released`, the one that puts their largest value at 448, and the
    rest BF16 as in released checkpoints (else some of it float16).
    """
    settings, _ = make("mtp")
    settings |= {"hidden_size": 136, "intermediate_size": 200, "kv_lora_rank": 130}
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    random = np.random.default_rng(seed)
    stored: dict[str, np.ndarray] = {}
    exact: dict[str, np.ndarray] = {}
    for name, shape in shapes(settings):
        value = random.standard_normal(shape).astype(np.float32)
        if "_proj" in name and "eh_proj" not in name:
            blocks = tuple(-(-size // 128) for size in shape)
            scale = random.uniform(0.01, 2.0, blocks).astype(np.float32)
            quantised = np.empty(shape, ml_dtypes.float8_e4m3fn)
            exact[name] = np.empty(shape, np.float32)
            for row, column in np.ndindex(*blocks):
                here = tuple(slice(128 * i, 128 * i + 128) for i in (row, column))
                if released:
                    scale[row, column] = np.abs(value[here]).max() / np.float32(448)
                    value[here] /= scale[row, column]
                quantised[here] = value[here].astype(quantised.dtype)
                exact[name][here] = quantised[here].astype(np.float32) * scale[row, column]
            stored[name], stored[name + "_scale_inv"] = quantised, scale
        elif name.endswith("e_score_correction_bias"):
            stored[name] = exact[name] = value
        else:
            wide = ml_dtypes.bfloat16 if len(shape) == 2 or released else np.float16
            stored[name] = value.astype(wide)
            exact[name] = stored[name].astype(np.float32)
    for layer_name, name in (
        ("shared_head.head.weight", "lm_head.weight"),
        ("embed_tokens.weight", "model.embed_tokens.weight"),
    ):
        for copy in [n for n in stored if n.startswith("model.layers.") and n.endswith(layer_name)]:
            stored[copy], exact[copy] = stored[name].copy(), exact[name].copy()
    return settings, stored, exact


def tokens(
    settings: Mapping[str, Any], seed: int = 0, batch: int = 2, length: int = 48
) -> np.ndarray:
    """Random tokens, (batch, length) int32; with YaRN at least 160 long, past the original 64."""
    length = max(length, 160) if settings.get("rope_scaling") else length
    random = np.random.default_rng((seed, 1))
    return random.integers(0, settings["vocab_size"], (batch, length)).astype(np.int32)


def write(
    directory: str | Path,
    settings: Mapping[str, Any],
    weights: Mapping[str, np.ndarray],
    shards: int = 1,
) -> None:
    """config.json, and model.safetensors or `shards` numbered files with an index."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(settings), indent=1))
    if shards == 1:
        save_file(dict(weights), folder / "model.safetensors")
        return
    names = sorted(weights)
    where: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:06}.safetensors"
        here = names[shard::shards]  # dealt, so that one layer lies in several files
        save_file({name: weights[name] for name in here}, folder / file)
        where |= dict.fromkeys(here, file)
    total = sum(array.nbytes for array in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def shapes(settings: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every published name of a model with these settings, and its shape."""
    d, vocab = settings["hidden_size"], settings["vocab_size"]
    layers = settings["num_hidden_layers"]
    yield "model.embed_tokens.weight", (vocab, d)
    for layer in range(layers + settings.get("num_nextn_predict_layers", 0)):
        own = f"model.layers.{layer}"
        yield f"{own}.input_layernorm.weight", (d,)
        yield f"{own}.post_attention_layernorm.weight", (d,)
        yield from _attention(settings, f"{own}.self_attn")
        if layer < settings["first_k_dense_replace"]:
            yield from _swiglu(f"{own}.mlp", d, settings["intermediate_size"])
        else:
            yield from _moe(settings, f"{own}.mlp")
        if layer >= layers:
            for name in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{own}.{name}.weight", (d,)
            yield f"{own}.eh_proj.weight", (d, 2 * d)
            yield f"{own}.embed_tokens.weight", (vocab, d)
            yield f"{own}.shared_head.head.weight", (vocab, d)
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (vocab, d)


def _attention(settings: Mapping[str, Any], own: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, heads = settings["hidden_size"], settings["num_attention_heads"]
    q, c = settings["q_lora_rank"], settings["kv_lora_rank"]
    n, r, v = (settings[f"{name}_head_dim"] for name in ("qk_nope", "qk_rope", "v"))
    if q:
        yield f"{own}.q_a_proj.weight", (q, d)
        yield f"{own}.q_a_layernorm.weight", (q,)
        yield f"{own}.q_b_proj.weight", (heads * (n + r), q)
    else:
        yield f"{own}.q_proj.weight", (heads * (n + r), d)
    yield f"{own}.kv_a_proj_with_mqa.weight", (c + r, d)
    yield f"{own}.kv_a_layernorm.weight", (c,)
    yield f"{own}.kv_b_proj.weight", (heads * (n + v), c)
    yield f"{own}.o_proj.weight", (d, heads * v)
    if settings.get("index_topk"):
        yield from _indexer(settings, f"{own}.indexer")


def _indexer(settings: Mapping[str, Any], own: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, heads, width = (settings[k] for k in ("hidden_size", "index_n_heads", "index_head_dim"))
    yield f"{own}.wq_b.weight", (heads * width, settings["q_lora_rank"])
    yield f"{own}.wk.weight", (width, d)
    yield f"{own}.k_norm.weight", (width,)
    yield f"{own}.k_norm.bias", (width,)
    yield f"{own}.weights_proj.weight", (heads, d)


def _moe(settings: Mapping[str, Any], own: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    d, width = settings["hidden_size"], settings["moe_intermediate_size"]
    experts, shared = settings["n_routed_experts"], settings["n_shared_experts"]
    yield f"{own}.gate.weight", (experts, d)
    if settings["topk_method"] == "noaux_tc":
        yield f"{own}.gate.e_score_correction_bias", (experts,)
    for expert in range(experts):
        yield from _swiglu(f"{own}.experts.{expert}", d, width)
    if shared:
        yield from _swiglu(f"{own}.shared_experts", d, shared * width)


def _swiglu(own: str, d: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{own}.gate_proj.weight", (width, d)
    yield f"{own}.up_proj.weight", (width, d)
    yield f"{own}.down_proj.weight", (d, width)


def _draw(
    random: np.random.Generator, name: str, shape: tuple[int, ...], bias_centre: float
) -> np.ndarray:
    """Products keep their size (std in^-1/2), gains lie around one, tables have unit rows."""
    noise = random.standard_normal(shape)
    if name.endswith("e_score_correction_bias"):
        value = bias_centre + 0.1 * noise
    elif name.endswith(".bias"):
        value = 0.2 * noise
    elif len(shape) == 1:
        value = 1 + 0.2 * noise
    elif "embed_tokens" in name:
        value = noise
    else:
        value = noise * shape[-1] ** -0.5
    return value.astype(np.float32)
