"""Random checkpoints of `transformers`' own classes, one for each value that others may set.

    pip install -e ".[transformers]" && PYTHONPATH=tests:. python tests/transformers/variants.py

Each is saved by `transformers` and read by us. Logits and greedy tokens must be equal, those marked
"decoded" also by the cache of `generate`; with V3.2's indexers the first of equal scores are taken,
see `indexer.py`. Then the folder is converted to a workdir and from there into each format, which
both open again: equal logits, and in float32 those of the first folder. Values that no model of
ours has must be refused by name. Prints a line for each, and fails where one differs. Not part of
CI, where torch is not installed. Names as arguments choose some; a number draws as many kinds at
random, with a seed that is another number after it.
"""

import contextlib
import dataclasses
import json
import random
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from indexer import top_k
from round_trip import TOLERANCE
from transformers import AutoModelForCausalLM, DeepseekV2Config, DeepseekV3Config, DeepseekV32Config
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config
from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25ForConditionalGeneration
from transformers.utils import logging

import deepseek_jax
from configs import v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.checkpoint import conversion
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError
from deepseek_jax.serve import generation
from deepseek_jax.serve.generation import TextCodec
from deepseek_jax.serve.requests import Request

GREEDY = 8  # tokens
LENGTH = 40
SIZES = dict(
    vocab_size=96, hidden_size=48, intermediate_size=64, moe_intermediate_size=24,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=16,
    num_experts_per_tok=4, n_group=4, topk_group=2, q_lora_rank=32, kv_lora_rank=24,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, first_k_dense_replace=1,
    max_position_embeddings=128, initializer_range=0.15,
)  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
INDEXED = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 10}
V2 = {"topk_method": "group_limited_greedy", "norm_topk_prob": False, "n_shared_experts": 2}
GREEDY_V2 = {"topk_method": "greedy", "norm_topk_prob": False}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A checkpoint to make.

    Attributes:
      family: "v3", "v2", "v32", or "k25": the text model inside Kimi K2.5.
      changes: settings beside `SIZES`.
      outer: settings around the text model.
      dtype: of the stored weights.
      shard: size of a file.
      edits: changes of the saved config.json; None removes a key.
      decoded: whether the engine decodes, too, for which it compiles two programs.
    """

    family: str = "v3"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    outer: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"
    shard: str = "1GB"
    edits: dict[str, Any] = dataclasses.field(default_factory=dict)
    decoded: bool = False


def _yarn(**changes: Any) -> dict[str, Any]:
    yarn = {key: value for key, value in (YARN | changes).items() if value is not None}
    return {"rope_parameters": yarn}


_OLDER = {"type": "yarn"} | {k: v for k, v in YARN.items() if not k.startswith("rope_")}
KINDS = {
    "plain": Kind(),
    "sharded": Kind(shard="30KB"),
    "bfloat16": Kind(dtype="bfloat16", shard="30KB"),
    "float16": Kind(dtype="float16"),
    "all dense": Kind(changes={"first_k_dense_replace": 9}, decoded=True),
    "all dense, exactly": Kind(changes={"first_k_dense_replace": 3}),
    "no dense": Kind(changes={"first_k_dense_replace": 0}, decoded=True),
    "half-split": Kind(changes={"rope_interleave": False}, decoded=True),
    "half-split, no latent": Kind(changes={"rope_interleave": False, "q_lora_rank": None}),
    "half-split, YaRN": Kind(changes={"rope_interleave": False} | _yarn(mscale=0.7)),
    "no latent": Kind(changes={"q_lora_rank": None}),
    "tied": Kind(changes={"tie_word_embeddings": True}),
    "no shared experts": Kind(changes={"n_shared_experts": 0}),
    "two shared experts": Kind(changes={"n_shared_experts": 2}),
    "one group": Kind(changes={"n_group": 1, "topk_group": 1}),
    "all groups": Kind(changes={"topk_group": 4}),
    "one expert": Kind(changes={"num_experts_per_tok": 1}),
    "not normalised": Kind(changes={"norm_topk_prob": False}),
    "no MTP": Kind(edits={"num_nextn_predict_layers": 0}),
    "no key-value heads": Kind(edits={"num_key_value_heads": None}),
    "another epsilon": Kind(changes={"rms_norm_eps": 1e-4, "routed_scaling_factor": 1.3}),
    "theta": Kind(changes={"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
    "older theta": Kind(edits={"rope_parameters": None, "rope_theta": 10000}),
    "no theta": Kind(edits={"rope_parameters": None}),
    "older YaRN": Kind(
        changes=_yarn(),
        edits={"rope_parameters": None, "rope_theta": 10000, "rope_scaling": _OLDER},
    ),
    "YaRN": Kind(changes=_yarn()),
    "YaRN ratio": Kind(changes=_yarn(mscale=0.707, mscale_all_dim=1.3), decoded=True),
    "YaRN mscale alone": Kind(changes=_yarn(mscale=0.707, mscale_all_dim=None)),
    "YaRN, no mscale": Kind(changes=_yarn(mscale=None, mscale_all_dim=None)),
    "YaRN all_dim alone": Kind(changes=_yarn(mscale=None)),
    "YaRN, zeros": Kind(changes=_yarn(mscale=0, mscale_all_dim=0)),
    "YaRN, stated factor": Kind(changes=_yarn(attention_factor=1.0)),
    "YaRN, few keys": Kind(
        changes={"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}
    ),
    "V2": Kind("v2", V2 | {"routed_scaling_factor": 16.0}),
    "V2, greedy": Kind("v2", GREEDY_V2 | {"q_lora_rank": None}),
    "V3.2": Kind("v32", INDEXED, decoded=True),
    "V3.2, sharded": Kind("v32", INDEXED, dtype="bfloat16", shard="30KB"),
    "V3.2, all dense": Kind("v32", INDEXED | {"first_k_dense_replace": 9}),
    "V3.2, no dense": Kind("v32", INDEXED | {"first_k_dense_replace": 0}),
    "V3.2, one head": Kind("v32", INDEXED | {"index_n_heads": 1}),
    "V3.2, one position": Kind("v32", INDEXED | {"index_topk": 1}),
    "V3.2, all positions": Kind("v32", INDEXED | {"index_topk": 512}),
    "V3.2, odd width": Kind("v32", INDEXED | {"index_head_dim": 11}),
    "V3.2, rotary alone": Kind("v32", INDEXED | {"index_head_dim": 8}),
    "V3.2, YaRN": Kind("v32", INDEXED | _yarn(), decoded=True),
    "V3.2, tied": Kind("v32", INDEXED | {"tie_word_embeddings": True}),
    "K2.5": Kind("k25", {"n_group": 1, "topk_group": 1}, outer={"tie_word_embeddings": False}),
    "K2.5, tied": Kind("k25", {"n_group": 1, "topk_group": 1}, shard="30KB", decoded=True),
}
REFUSED = {  # changes of a config.json -> the beginning of what is said of it
    "attention_bias": ({"attention_bias": True}, "attention_bias is True; expected False"),
    "every second layer": ({"moe_layer_freq": 2}, "moe_layer_freq is 2; expected 1"),
    "gelu": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
    "grouped queries": ({"num_key_value_heads": 2}, "num_key_value_heads is 2; expected 4"),
    "linear RoPE": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_parameters.rope_type is 'linear'; expected one of default, yarn",
    ),
    "another factor": (
        _yarn(attention_factor=2.0),
        "rope_parameters.attention_factor is 2.0; expected null, or 1 as factor and mscale give",
    ),
}


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    jax.config.update("jax_disable_most_optimizations", True)  # a program for each kind, run once
    names = sys.argv[1:]
    kinds = {name: KINDS[name] for name in names if name in KINDS}
    if names and names[0].isdigit():
        kinds = dict(drawn(*map(int, names)))
    wrong = 0
    for name, kind in (kinds or KINDS).items():
        with tempfile.TemporaryDirectory() as folder:
            said = compare(kind, Path(folder))
        wrong += "WRONG" in said
        print(f"{name:24} {said}", flush=True)
    for name, (edits, words) in () if names else REFUSED.items():
        with tempfile.TemporaryDirectory() as folder:
            said = refusal(edits, Path(folder) / "in")
        fine = words in said and "\n" not in said
        wrong += not fine
        print(f"{name:24} {'refused by name' if fine else f'{said}  <-- WRONG'}", flush=True)
    sys.exit(bool(wrong))


def drawn(count: int, seed: int = 0) -> list[tuple[str, Kind]]:
    """Kinds whose values are each drawn from those of `KINDS` of one family."""
    choose, found = random.Random(seed), []
    for number in range(count):
        family = choose.choice(("v3", "v3", "v32", "k25"))
        pool = [kind for kind in KINDS.values() if kind.family in ("v3", family) and not kind.edits]
        changes: dict[str, Any] = dict(INDEXED) if family == "v32" else {}
        for kind in choose.sample(pool, 5):
            changes |= kind.changes
        if family == "v32":
            changes |= {"rope_interleave": True}
        if family != "v3":  # transformers does not load what it saves of a K2.5 without one
            changes |= {"q_lora_rank": 32}
        groups = changes.get("n_group", SIZES["n_group"])
        changes["topk_group"] = min(changes.get("topk_group", SIZES["topk_group"]), groups)
        outer = choose.choice(({}, {"tie_word_embeddings": False}))
        dtype, shard = choose.choice(("float32", "bfloat16")), choose.choice(("1GB", "40KB"))
        found.append(
            (f"{number} of seed {seed}, {family}", Kind(family, changes, outer, dtype, shard))
        )
    return found


def make(kind: Kind, folder: Path) -> None:
    """Saves a random model as `transformers` does."""
    torch.manual_seed(0)
    settings = SIZES | kind.changes
    if kind.family == "k25":
        small = dict(num_attention_heads=2, num_hidden_layers=1, hidden_size=16)
        whole = Kimi_K25Config(
            text_config=DeepseekV3Config(**settings).to_dict(),
            vision_config=small | {"intermediate_size": 16}, projection_hidden_size=16,
            **kind.outer,
        )  # fmt: skip
        model = Kimi_K25ForConditionalGeneration(whole)
    else:
        families = {"v3": DeepseekV3Config, "v2": DeepseekV2Config, "v32": DeepseekV32Config}
        model = AutoModelForCausalLM.from_config(families[kind.family](**settings))
    with torch.no_grad():  # gains and biases that are not those of a fresh model
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in name or name.endswith("e_score_correction_bias"):
                value += 0.2 * torch.randn_like(value)
    model.to(getattr(torch, kind.dtype)).save_pretrained(folder, max_shard_size=kind.shard)
    edit(folder, kind.edits)


def edit(folder: Path, edits: dict[str, Any]) -> None:
    """Changes keys of a config.json; None removes one."""
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | edits
    removed = {key for key, value in edits.items() if value is None}
    file.write_text(json.dumps({k: v for k, v in settings.items() if k not in removed}))


def compare(kind: Kind, root: Path) -> str:
    """Difference of each comparison, in words."""
    make(kind, root / "in")
    tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, LENGTH))
    theirs, made = answers(root / "in", kind, tokens)
    tokens[0, -GREEDY:] = made  # each must be our choice, too
    theirs = theirs[:, :-GREEDY]
    logits, wrong, differences = np.asarray(deepseek_jax.load(root / "in")(tokens).logits), [], {}
    if logits[0, -GREEDY - 1 : -1].argmax(-1).tolist() != made:
        wrong.append("greedy tokens")
    if kind.decoded and decoded(root / "in", tokens[:1, :-GREEDY]) != made:
        wrong.append("decoded tokens")
    differences["logits"] = float(np.abs(logits[:, :-GREEDY] - theirs).max())
    conversion.to_run(open_checkpoint(root / "in"), root / "run", BASE)
    for form, scales in (("float32", "kept"), ("bfloat16", "kept"), ("fp8", "e8m0")):
        out = root / form
        conversion.to_published(open_checkpoint(root / "run"), out, form, 50_000, scales=scales)
        back, _ = answers(out, kind, tokens, count=0)
        again = np.asarray(deepseek_jax.load(out)(tokens).logits)
        differences[form] = float(np.abs(again - back).max())
        if form == "float32" and np.abs(back[:, :-GREEDY] - theirs).max() > TOLERANCE:
            wrong.append("the way back")
    wrong += [name for name, difference in differences.items() if not difference < TOLERANCE]
    said = ", ".join(f"{name} {difference:.0e}" for name, difference in differences.items())
    tokens_said = "greedy tokens equal" + (", decoded" if kind.decoded else "")
    return f"{said}, {f'WRONG: {wrong}' if wrong else tokens_said}"


def answers(
    folder: Path, kind: Kind, tokens: np.ndarray, count: int = GREEDY
) -> tuple[np.ndarray, list[int]]:
    """Logits of `transformers`, and greedy tokens after the first text without its last ones."""
    loader: Any = Kimi_K25ForConditionalGeneration if kind.family == "k25" else AutoModelForCausalLM
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    asked = torch.tensor(tokens)
    prompt = asked[:1, :-GREEDY]
    equal = top_k(stable=True) if kind.family == "v32" else contextlib.nullcontext()
    with torch.no_grad(), equal:
        logits = model(input_ids=asked).logits.numpy()
        if not count:
            return logits, []
        made = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    return logits, made[0, prompt.shape[1] :].tolist()


def decoded(folder: Path, prompt: np.ndarray) -> list[int]:
    """Greedy tokens of our engine, with its cache."""
    checkpoint = open_checkpoint(folder)
    engine = generation.open_engine(
        checkpoint, checkpoint.config("float32"), mesh={}, slots=1, length=LENGTH, cache=None,
        stop=(), drafts=0,
    )  # fmt: skip
    request = Request(tuple(prompt[0].tolist()), GREEDY)
    found = generation.generate(engine, [request], TextCodec.of(checkpoint), lambda text: None)
    return found["requests"][0]["tokens"]


def refusal(edits: dict[str, Any], folder: Path) -> str:
    """The message for a checkpoint with these settings."""
    make(Kind(edits=edits), folder)
    try:
        open_checkpoint(folder)
    except ConfigError as error:
        return str(error)
    return "nothing said"


BASE = configs.parse(v3_tiny.get_config())

if __name__ == "__main__":
    main()
