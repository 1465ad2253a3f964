"""Text from a checkpoint: prompts are encoded, decoded by an engine and told as they grow."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint.load import Checkpoint
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model import execution, params, remat
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.serve import latent_cache, sizes
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.requests import Counts, Request

_SPECIAL = re.compile(r"<[|｜][^<>|｜\s]{1,64}[|｜]>")  # usual form of the name of a special token


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """Conversion between text and token ids, as a checkpoint has it.

    Attributes:
      directory: the checkpoint's directory, for messages.
      tokenizer: None where there is no tokenizer.json.
      stop: ids that end a text.
    """

    directory: Path
    tokenizer: Tokenizer | None
    stop: tuple[int, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "TextCodec":
        """The tokenizer and the stop ids of an opened checkpoint."""
        return cls(checkpoint.directory, checkpoint.tokenizer, checkpoint.stop_tokens)

    def encode(self, text: str, special: bool = False) -> tuple[int, ...]:
        """Ids of BOS, where there is one, and of the text: how documents begin in training.

        Args:
          text: a prompt.
          special: True reads the names of special tokens in `text`, such as `<｜User｜>`, as those
            tokens, and adds no BOS before one that is written there. False spells such a name in
            letters, as in training data. Both warn of a name that is spelled in letters.

        Raises:
          ConfigError: no tokenizer, or text that is not Unicode.
        """
        if self.tokenizer is None:
            raise ConfigError(
                f"{self.directory} has no tokenizer.json to encode a prompt with; give "
                "prompt_tokens=1,2"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"a prompt is not UTF-8 text: character {error.start} is half a surrogate pair or "
                "a stray byte"
            ) from error
        named = self.tokenizer.special_in(text)
        if special:
            ids: list[int] = self.tokenizer.encode_special(text)
            unknown = [name for name in _SPECIAL.findall(text) if name not in named]
            if unknown:
                warnings.warn(
                    f"the prompt has {unknown[0]}, which is no special token of "
                    f"{self.directory}; it is encoded as letters",
                    stacklevel=2,
                )
        else:
            ids = next(self.tokenizer.encode([text])).tolist()
            if named:
                warnings.warn(
                    f"the prompt spells out the special token {named[0]}, which is encoded as "
                    "letters; --special_tokens sends the token itself",
                    stacklevel=2,
                )
        bos = self.tokenizer.marks.bos
        written = bos is None or (special and ids[:1] == [bos])
        return (*(() if written else (bos,)), *ids)

    def decode(self, tokens: Sequence[int]) -> str | None:
        """Text of some ids; None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode(tokens)


def open_engine(
    checkpoint: Checkpoint,
    base: Config,
    *,
    mesh: Mapping[str, int],
    slots: int,
    length: int,
    cache: str | None,
    stop: tuple[int, ...],
    drafts: int,
    steps: int = 8,
) -> Engine:
    """Loads the weights of a checkpoint into a decoding engine.

    Args:
      base: layout and precision; its model is replaced by the checkpoint's.
      mesh: devices along mesh axes; empty for one device.
      slots: request slots at least; rounded up to a multiple of the devices of the data axes.
      cache: format of the latent cache; None for the dtype of activations.
      length, stop, drafts, steps: as for `Engine`.

    Raises:
      ConfigError: weights that cannot be read, a layout that does not fit, or a cache that is
        larger than the memory of a device, before the weights are read.
    """
    model = checkpoint.model
    sizes.check_numbers(model, slots=slots, length=length, drafts=drafts, steps=steps)
    config = meshes.forward_config(dataclasses.replace(base, model=model), mesh, length)
    if config.mesh.pipe > 1:
        raise ConfigError(f"mesh.pipe={config.mesh.pipe}: generation has no pipeline")
    devices = jax.devices() if mesh else jax.devices()[:1]
    grid, layout = meshes.build(config.mesh, devices), meshes.layout(config)
    parts = config.mesh.replica * config.mesh.node * config.mesh.gpu
    how = execution.of(config, execution.recipe_of(config, serving=True))
    how = dataclasses.replace(how, remat=remat.NONE)
    cache = cache or latent_cache.default_format(how.recipe)
    here = -(-slots // parts)
    sizes.check_room(model, here, length, cache, drafts)
    with jax.set_mesh(grid):
        stored = checkpoint.load(how.recipe, layout, grid)
        loaded = params.prepare(stored, how.recipe)
    return Engine(
        loaded,
        how,
        layout,
        grid,
        slots=here * parts,
        length=length,
        cache=cache,
        stop=stop,
        drafts=drafts,
        steps=steps,
    )


def generate(
    server: Engine,
    requests: Sequence[Request],
    words: TextCodec,
    tell: Callable[[str], None],
    begin: Sequence[str] = (),
) -> dict[str, Any]:
    """Decodes some requests to their end.

    Args:
      tell: called with text as it is made if there is one request, else with each finished text
        after its number.
      begin: text that is told before that of each request, such as the prompts.

    Returns:
      `requests`, a row of prompt_tokens, tokens, text (None without a tokenizer), seed and
      finish_reason for each; and `timing`. The reason is "stop" for a text that ended with a stop
      token, and "length" for one of max_tokens tokens without a stop token at its end.
    """
    begin = begin or [""] * len(requests)
    numbers = [server.add(request) for request in requests]
    made: dict[int, list[int]] = {number: [] for number in numbers}
    shown = ""
    if len(requests) == 1:
        tell(begin[0])
    while server.busy:
        for delta in server.step():
            tokens = made[delta.request]
            tokens += delta.tokens
            if len(requests) == 1:
                text = _so_far(words, tokens, delta.done)
                tell(text[len(shown) :])
                shown = text
            elif delta.done:
                number = numbers.index(delta.request)
                tell(f"[{number}] {begin[number]}{_so_far(words, tokens, True)}\n")
    if len(requests) == 1:
        tell("\n")
    found = [
        {
            "prompt_tokens": list(request.prompt),
            "tokens": made[n],
            "text": words.decode(made[n]),
            "seed": request.seed,
            "finish_reason": "stop" if made[n][-1] in words.stop else "length",
        }
        for n, request in zip(numbers, requests, strict=True)
    ]
    return {"requests": found, "timing": timing(server.counts)}


def _so_far(words: TextCodec, tokens: Sequence[int], done: bool) -> str:
    """Text of the ids so far, less a last character of which bytes are still missing."""
    text = words.decode(tokens)
    if text is None:
        return " ".join(map(str, tokens))
    return text if done else text.rstrip("\ufffd")


def timing(counts: Counts) -> dict[str, Any]:
    """Seconds and tokens per second; a prompt's first token counts as prefill, which makes it."""

    def per_second(tokens: int, seconds: float) -> float | None:
        return tokens / seconds if seconds else None

    out: dict[str, Any] = {
        "compile_seconds": counts.compile_seconds,
        "prefill_seconds": counts.prefill_seconds,
        "prefill_tokens_per_second": per_second(counts.prompt_tokens, counts.prefill_seconds),
        "decode_seconds": counts.decode_seconds,
        "decode_tokens_per_second": per_second(counts.tokens, counts.decode_seconds),
    }
    if len(counts.accepted) and counts.steps:
        out["acceptance"] = [float(taken / counts.steps) for taken in counts.accepted]
        out["tokens_per_step"] = 1.0 + sum(out["acceptance"])
    return out
