"""V3.2 beside `transformers`: logits, selected positions, greedy tokens, beyond index_topk tokens.

    pip install -e ".[transformers]" && PYTHONPATH=tests:. python tests/transformers/indexer.py

A random model of `transformers` is saved as it saves models, and one is written as published, with
YaRN past its original length. Each is opened by both, and what we save is opened by `transformers`
again. Not part of CI, where torch is not installed. Prints a line for each, and fails where one
differs.

Positions are compared as sets, which must be equal. With 16 heads few index scores are exactly 0,
where the two packages would break a tie differently.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from equations import checkpoints
from round_trip import TOLERANCE, greedy
from transformers import AutoModelForCausalLM, DeepseekV32Config
from transformers.utils import logging

import deepseek_jax

GREEDY = 8  # tokens of `round_trip.greedy`
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(3):
            root = Path(folder) / str(seed)
            of_transformers(root / "saved", seed)
            settings, weights = checkpoints.make("v32", seed)
            checkpoints.write(root / "published", settings | {"rope_scaling": plain(YARN)}, weights)
            for name in ("saved", "published"):
                wrong += not compare(root / name, f"seed {seed}, {name}")
                deepseek_jax.load(root / name).save(root / f"{name} by us")
                wrong += not compare(root / f"{name} by us", f"seed {seed}, {name} by us")
    sys.exit(bool(wrong))


def plain(yarn: dict) -> dict:
    """YaRN's settings in the older spelling."""
    older = {key: value for key, value in yarn.items() if key not in ("rope_type", "rope_theta")}
    return {"type": "yarn", **older}


def of_transformers(folder: Path, seed: int) -> None:
    """Saves a random model of `transformers`, whose weights are wide enough to tell positions."""
    torch.manual_seed(seed)
    config = DeepseekV32Config(
        vocab_size=256, hidden_size=64, intermediate_size=96, moe_intermediate_size=24,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=16,
        num_experts_per_tok=4, n_group=4, topk_group=2, q_lora_rank=32, kv_lora_rank=24,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, first_k_dense_replace=1,
        index_n_heads=16, index_head_dim=32, index_topk=40, max_position_embeddings=256,
        rope_parameters=YARN, initializer_range=0.15,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def compare(folder: Path, name: str) -> bool:
    """Prints the differences between both packages for a folder; True where there is none."""
    ours = deepseek_jax.load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.random.default_rng(1).integers(0, ours.config.vocab, (2, 160)).astype(np.int32)
    chosen: list[np.ndarray] = []
    for layer in theirs.model.layers:
        layer.self_attn.indexer.register_forward_hook(lambda *call: chosen.append(call[2].numpy()))
    with torch.no_grad():
        want = theirs(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    chosen, own = chosen[: ours.config.layers], ours.selected(tokens)
    different = sum(differing(np.asarray(a), b) for a, b in zip(own, chosen, strict=True))
    queries = ours.config.layers * tokens.size
    difference = float(np.abs(np.asarray(ours(tokens).logits) - want).max())
    same = greedy(ours, theirs, tokens[:, :-GREEDY])
    fine = difference < TOLERANCE and same and not different
    print(
        f"{name}: logits differ by {difference:.1e}, {different} of {queries} sets of "
        f"{ours.config.index_top_k} positions differ, {GREEDY} greedy tokens "
        f"{'equal' if same else 'DIFFER'}{'' if fine else '  <-- WRONG'}",
        flush=True,
    )
    return fine


def differing(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Queries whose sets of positions differ; both BTK, theirs with positions after the query."""
    count = 0
    for batch, query in np.ndindex(*ours.shape[:2]):
        own = {int(position) for position in ours[batch, query] if position >= 0}
        want = {int(position) for position in theirs[batch, query] if position <= query}
        count += own != want
    return count


if __name__ == "__main__":
    main()
