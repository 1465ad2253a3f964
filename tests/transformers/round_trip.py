"""Exports, opened by `transformers`: the same logits and the same greedy tokens.

    pip install -e ".[transformers]" && PYTHONPATH=tests:. python tests/transformers/round_trip.py

For every kind of model: a published checkpoint is converted into a workdir and from there into each
format; what `transformers` computes from that folder is compared with what we do. Not part of CI,
where torch is not installed. Prints a line for each, and fails where one differs. Names of variants
as arguments choose some.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from equations import checkpoints
from serve import rename_kimi
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import deepseek_jax
from configs import v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.checkpoint import conversion
from deepseek_jax.checkpoint.hf import export
from deepseek_jax.checkpoint.load import open_checkpoint

TOLERANCE = 2e-4  # error between independent float32 implementations of this model
GREEDY = 8  # tokens
SHARD_BYTES = 300_000


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    base = configs.parse(v3_tiny.get_config())
    wrong = 0
    for variant in sys.argv[1:] or checkpoints.OF_TRANSFORMERS:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            found, weights = checkpoints.make(variant)
            checkpoints.write(root / "published", found, weights)
            conversion.to_run(open_checkpoint(root / "published"), root / "run", base)
            tokens = checkpoints.tokens(found)
            kinds = [(form, "kept") for form in export.FORMATS]
            kinds += [("fp8", scales) for scales in export.SCALES[1:] if variant == "v3"]
            for form, scales in kinds:
                out = root / f"{form}_{scales}"
                run = open_checkpoint(root / "run")
                conversion.to_published(run, out, form, SHARD_BYTES, scales=scales)
                rename_kimi(out)
                difference, same = compare(out, tokens)
                files = len(list(out.glob("*.safetensors")))
                fine = difference < TOLERANCE and same
                wrong += not fine
                name = form if scales == "kept" else f"{form}, {scales}"
                print(
                    f"{variant:12} {name:17} {files} files: logits differ by {difference:.1e}, "
                    f"{GREEDY} greedy tokens {'equal' if same else 'DIFFER'}"
                    f"{'' if fine else '  <-- WRONG'}",
                    flush=True,
                )
    sys.exit(bool(wrong))


def compare(folder: Path, tokens: np.ndarray) -> tuple[float, bool]:
    """Largest difference of the logits, both in float32, and whether greedy tokens are the same."""
    ours = deepseek_jax.load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        want = theirs(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    got = np.asarray(ours(tokens).logits)
    return float(np.abs(got - want).max()), greedy(ours, theirs, tokens[:, :-GREEDY])


def greedy(ours, theirs, prompt: np.ndarray) -> bool:
    theirs.generation_config.eos_token_id = None  # no text stops early
    asked = torch.tensor(prompt, dtype=torch.int64)
    with torch.no_grad():
        want = theirs.generate(
            asked,
            attention_mask=torch.ones_like(asked),  # else tokens that equal the padding are masked
            max_new_tokens=GREEDY,
            do_sample=False,
            pad_token_id=0,
        ).numpy()
    text = np.pad(prompt, ((0, 0), (0, GREEDY)))  # one shape, one program
    for end in range(prompt.shape[1], text.shape[1]):
        text[:, end] = np.asarray(ours(text).logits[:, end - 1]).argmax(-1)
    return np.array_equal(text, want)


if __name__ == "__main__":
    main()
