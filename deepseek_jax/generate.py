"""Text from a checkpoint: python -m deepseek_jax.generate --checkpoint=DIR --prompt=TEXT [--json].

Layout and precision are those of --config. Without it they are those of the training run that made
the checkpoint; a Hugging Face directory runs in the dtype of its config.json (`torch_dtype`; FP8
blocks in bfloat16; float32 where that is missing or float16) with dropless dispatch in that dtype.
--dtype takes the place of either's dtype. A run in FP8 generates in bfloat16.

A prompt is encoded as documents are in training: after BOS, and the names of special tokens in it,
such as <｜User｜>, are spelled in letters, with a warning. With --special_tokens such a name is
the token itself, as in `transformers`, and a prompt that begins with BOS gets no second one.

Tokens are sampled with temperature and top-p. A flag comes first, then a value that a Hugging
Face directory states in its generation_config.json, then the default; --temperature=0 takes the
likeliest token each time. A line on stderr tells the values and their sources, and at the end
whether --max_tokens cut a text off; with --json both are fields instead.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from deepseek_jax import command
from deepseek_jax.config import Config, ConfigError

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A Hugging Face directory or a run's workdir.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
PROMPT_TOKENS = flags.DEFINE_multi_string(
    "prompt_tokens", [], "A prompt as token ids, 1,2,3; may be given several times."
)
SPECIAL_TOKENS = flags.DEFINE_bool(
    "special_tokens", False, "Read names of special tokens in --prompt as those tokens."
)
MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens", 128, "Most tokens to generate for a prompt.", lower_bound=1
)
TEMPERATURE = flags.DEFINE_float(
    "temperature",
    None,
    "Sampling temperature; 0 takes the likeliest token. Default: the checkpoint's, else 0.8.",
    lower_bound=0,
)
TOP_P = flags.DEFINE_float(
    "top_p",
    None,
    "Probability mass of the tokens to sample from. Default: the checkpoint's, else 0.9.",
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the first prompt; the next has SEED + 1.", lower_bound=0
)
SPECULATE = flags.DEFINE_integer(
    "speculate",
    0,
    "Tokens that the MTP modules draft in a step; beyond their number the last one drafts again.",
    lower_bound=0,
)
CACHE = flags.DEFINE_enum(
    "cache",
    None,
    ("float32", "bfloat16", "fp8"),
    "Format of the latent cache; default: the dtype of the matmuls.",
)
SLOTS = flags.DEFINE_integer("slots", 8, "Most requests that decode at once.", lower_bound=1)
CACHE_LENGTH = flags.DEFINE_integer(
    "cache_length",
    None,
    "Tokens that a slot holds, prompt included. Default: enough for all, a multiple of 64.",
    lower_bound=1,
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ("float32", "bfloat16"),
    "Dtype of weights and matmuls. What was trained or stored in FP8 generates in bfloat16.",
)
CONFIG = command.define_config_flag()
MESH = flags.DEFINE_list("mesh", [], "Devices by mesh axis, as node:2,gpu:4; else one device.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
command.define_process_flags()

FLAG_OF = {
    "batch.length": "--cache_length", "data.tokenizer": "--checkpoint",
    "prompt_tokens": "--prompt_tokens", "--workdir": "--checkpoint",
    "request.prompt": "--prompt_tokens", "request.max_tokens": "--max_tokens",
    "request.temperature": "--temperature", "request.top_p": "--top_p", "request.seed": "--seed",
    "engine.slots": "--slots", "engine.length": "--cache_length", "engine.cache": "--cache",
    "engine.drafts": "--speculate",
}  # fmt: skip


def main() -> None:
    """Generates text as the flags say."""
    if not CHECKPOINT.value or not (PROMPT.value or PROMPT_TOKENS.value):
        raise ConfigError("generate needs --checkpoint=DIR and --prompt=TEXT")
    directory = command.folder(CHECKPOINT)
    prompt_tokens = [_ids(ids) for ids in PROMPT_TOKENS.value]
    mesh = command.parse_mesh(MESH.value)
    given = command.read_config(CONFIG) if CONFIG.value is not None else None
    command.start_processes()
    with command.naming(FLAG_OF):
        _generate(directory, prompt_tokens, mesh, given)


def _generate(
    directory: Path,
    prompt_tokens: list[tuple[int, ...]],
    mesh: dict[str, int],
    given: Config | None,
) -> None:
    from deepseek_jax.checkpoint.load import open_checkpoint
    from deepseek_jax.runtime import processes
    from deepseek_jax.runtime.agreement import raise_together
    from deepseek_jax.serve import generation, sizes
    from deepseek_jax.serve.requests import Request
    from deepseek_jax.serve.sampling_choice import sampling_of

    checkpoint = open_checkpoint(directory)

    def encoded() -> tuple[generation.TextCodec, list[tuple[int, ...]]]:
        words = generation.TextCodec.of(checkpoint)
        return words, [words.encode(text, SPECIAL_TOKENS.value) for text in PROMPT.value]

    words, prompts = raise_together(encoded)
    prompts += prompt_tokens
    chosen = sampling_of(checkpoint, TEMPERATURE.value, TOP_P.value)
    requests = [
        Request(prompt, MAX_TOKENS.value, chosen.temperature, chosen.top_p, SEED.value + number)
        for number, prompt in enumerate(prompts)
    ]
    length = CACHE_LENGTH.value or sizes.length_for(prompts, MAX_TOKENS.value)
    for request in requests:
        request.check_fits(checkpoint.model.vocab, length)
    server = generation.open_engine(
        checkpoint,
        command.config_of(checkpoint, given, DTYPE.value),
        mesh=mesh,
        slots=min(SLOTS.value, len(requests)),
        length=length,
        cache=CACHE.value,
        stop=words.stop,
        drafts=SPECULATE.value,
    )
    primary = processes.is_primary()
    live = primary and not JSON.value

    def tell(text: str) -> None:
        if live:
            print(text, end="", flush=True)

    if live:
        print(chosen.told([request.seed for request in requests]), file=sys.stderr)
    begin = [*PROMPT.value, *[""] * len(prompt_tokens)]
    found = generation.generate(server, requests, words, tell, begin)
    if live and (ends := _cut(found["requests"])):
        print(ends, file=sys.stderr)
    if primary and JSON.value:
        print(json.dumps({"sampling": chosen.fields(), **found}, indent=2))


def _cut(found: Sequence[dict[str, Any]]) -> str:
    """Line about texts that --max_tokens cut off; empty if all of them ended by themselves."""
    cut = sum(one["finish_reason"] == "length" for one in found)
    if not cut:
        return ""
    which = "the text" if len(found) == 1 else f"{cut} of {len(found)} texts"
    return f"--max_tokens={MAX_TOKENS.value} cut {which} off; a larger value goes on"


def _ids(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\s*[0-9]{1,18}\s*(,\s*[0-9]{1,18}\s*)*", text, re.ASCII):
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        raise ConfigError(f"--prompt_tokens={shown!r}; expected ids, as 1,2,3")
    return tuple(map(int, text.split(",")))


if __name__ == "__main__":
    command.run(main)
