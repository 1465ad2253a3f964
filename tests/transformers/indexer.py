"""V3.2 beside `transformers`: logits, selected positions, greedy tokens, beyond index_topk tokens.

    pip install -e ".[transformers]" && PYTHONPATH=tests:. python tests/transformers/indexer.py

A random model of `transformers` is saved as it saves models, and one is written as published, with
YaRN past its original length. Each is opened by both, and what we save is opened by `transformers`
again. Not part of CI, where torch is not installed. Prints a line for each, and fails where one
differs.

With few heads many index scores are exactly 0, as ReLU leaves them, and the choice among equal
scores is free: we take the first positions, `torch.topk` any. So `torch.topk` first runs as it is,
and positions of the first layer that differ must have equal scores; then it is replaced by a stable
sort, which takes the first positions too, and sets of positions, logits and tokens must be equal in
all layers. Numbers of heads as arguments choose some.
"""

import contextlib
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from equations import checkpoints
from round_trip import TOLERANCE, greedy
from transformers import AutoModelForCausalLM, DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Indexer
from transformers.utils import logging

import deepseek_jax

GREEDY = 8  # tokens of `round_trip.greedy`
EQUAL = 1e-6  # scores that differ by less may be equal but for rounding
Top = namedtuple("Top", ["values", "indices"])
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed, heads in enumerate(map(int, sys.argv[1:] or (16, 16, 64, 4, 2, 1))):
            root, label = Path(folder) / str(seed), f"{heads:2} heads"
            of_transformers(root / "saved", seed, heads)
            settings, weights = checkpoints.make("v32", seed, index_n_heads=heads)
            checkpoints.write(root / "published", settings | {"rope_scaling": plain(YARN)}, weights)
            for name in ("saved", "published"):
                wrong += not compare(root / name, f"{label}, {name}")
                deepseek_jax.load(root / name).save(root / f"{name} by us")
                wrong += not compare(root / f"{name} by us", f"{label}, {name} by us")
    sys.exit(bool(wrong))


def plain(yarn: dict) -> dict:
    """YaRN's settings in the older spelling."""
    older = {key: value for key, value in yarn.items() if key not in ("rope_type", "rope_theta")}
    return {"type": "yarn", **older}


def of_transformers(folder: Path, seed: int, heads: int) -> None:
    """Saves a random model of `transformers`, whose weights are wide enough to tell positions."""
    torch.manual_seed(seed)
    config = DeepseekV32Config(
        vocab_size=256, hidden_size=64, intermediate_size=96, moe_intermediate_size=24,
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=16,
        num_experts_per_tok=4, n_group=4, topk_group=2, q_lora_rank=32, kv_lora_rank=24,
        qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, first_k_dense_replace=1,
        index_n_heads=heads, index_head_dim=32, index_topk=40, max_position_embeddings=256,
        rope_parameters=YARN, initializer_range=0.15,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def compare(folder: Path, name: str) -> bool:
    """Prints the differences between both packages for a folder; True where there is none."""
    ours = deepseek_jax.load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = np.random.default_rng(1).integers(0, ours.config.vocab, (2, 160)).astype(np.int32)
    asked, own = torch.tensor(tokens, dtype=torch.int64), ours.selected(tokens)
    with torch.no_grad(), top_k(stable=False) as found:
        theirs(asked)
    scores, chosen = found[0]
    free, other = differing(own[0], chosen, scores)
    with top_k(stable=True) as found:
        with torch.no_grad():
            want = theirs(asked).logits.numpy()
        layers = zip(own, found, strict=True)
        apart = sum(sum(differing(a, b, scores)) for a, (scores, b) in layers)
        same = greedy(ours, theirs, tokens[:, :-GREEDY])
    difference = float(np.abs(np.asarray(ours(tokens).logits) - want).max())
    fine = difference < TOLERANCE and same and not apart and not other
    print(
        f"{name}: {free} of {tokens.size} sets differ among equal scores, {other} otherwise; with "
        f"the first of equal scores, {apart} of {len(own) * tokens.size} sets differ, logits by "
        f"{difference:.1e}, {GREEDY} greedy tokens {'equal' if same else 'DIFFER'}"
        f"{'' if fine else '  <-- WRONG'}",
        flush=True,
    )
    return fine


@contextlib.contextmanager
def top_k(*, stable: bool) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Scores BST and choice BSK of each call of an indexer of `transformers`.

    Args:
      stable: whether the first of equal scores are taken.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    plain, indexer = torch.Tensor.topk, DeepseekV32Indexer.forward
    asked: list[bool] = []

    def topk(scores: torch.Tensor, count: int, dim: int = -1, **how: bool) -> Top:
        if not asked:
            return plain(scores, count, dim=dim, **how)
        if stable:
            order = scores.sort(dim=dim, descending=True, stable=True)
            top = Top(*(part.narrow(dim, 0, count) for part in order))
        else:
            top = Top(*plain(scores, count, dim=dim, **how))
        found.append((scores.numpy(), top.indices.numpy()))
        return top

    def forward(*args: object, **more: object) -> torch.Tensor:
        asked.append(True)
        try:
            return indexer(*args, **more)
        finally:
            asked.clear()

    torch.Tensor.topk, DeepseekV32Indexer.forward = topk, forward
    try:
        yield found
    finally:
        torch.Tensor.topk, DeepseekV32Indexer.forward = plain, indexer


def differing(ours: np.ndarray, theirs: np.ndarray, scores: np.ndarray) -> tuple[int, int]:
    """Queries whose positions differ: in places of equal scores alone, and otherwise.

    Args:
      ours, theirs: BSK; positions after the query are -1 in ours, and left out of theirs.
      scores: BST of theirs.
    """
    count, ours = [0, 0], np.asarray(ours)
    for batch, query in np.ndindex(*ours.shape[:2]):
        own = [int(position) for position in ours[batch, query] if position >= 0]
        want = [int(position) for position in theirs[batch, query] if position <= query]
        exact = len(set(own)) == len(own) == len(want) == min(ours.shape[2], query + 1)
        changed = sorted(set(own) ^ set(want))
        if changed or not exact:
            swapped = scores[batch, query, changed]
            count[not (exact and np.ptp(swapped) <= EQUAL)] += 1
    return count[0], count[1]


if __name__ == "__main__":
    main()
