"""Text from a checkpoint: opened, tokenised, served, and told as it comes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from deepseek_jax.checkpoint import load
from deepseek_jax.checkpoint.hf.safetensors import read_json
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data import tokenizer as tokenizers
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.model import execution, remat
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.requests import Counts, Request


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """What a folder says about text.

    Attributes:
      tokenizer: None where there is no tokenizer.json.
      stop: tokens that end a text.
    """

    tokenizer: Tokenizer | None
    stop: tuple[int, ...]

    @classmethod
    def of(cls, directory: Path) -> "TextCodec":
        file = directory / "tokenizer.json"
        made = tokenizers.read(file) if file.is_file() else None
        for name in ("generation_config.json", "config.json"):
            if (directory / name).is_file():
                found = read_json(directory / name).get("eos_token_id")
                if found is not None:
                    return cls(made, tuple(found) if isinstance(found, list) else (found,))
        return cls(made, () if made is None else (made.marks.eos,))

    def encode(self, text: str, directory: Path) -> tuple[int, ...]:
        """BOS, where there is one, and the text: how documents begin in training."""
        if self.tokenizer is None:
            raise ConfigError(
                f"{directory} has no tokenizer.json to read --prompt with; give --prompt_tokens=1,2"
            )
        bos, (ids,) = self.tokenizer.marks.bos, self.tokenizer.encode([text])
        return (*(() if bos is None else (bos,)), *map(int, ids))

    def decode(self, tokens: Sequence[int]) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode(tokens)


def open_engine(
    directory: Path,
    base: Config,
    *,
    mesh: Mapping[str, int],
    slots: int,
    length: int,
    cache: str,
    stop: tuple[int, ...],
    drafts: int,
    steps: int = 8,
) -> Engine:
    """A server for a Hugging Face directory or a run's workdir.

    Args:
      base: layout and precision; its model is replaced by the checkpoint's.
      mesh: devices along mesh axes; empty for one device.
      slots: at least; rounded up to what the data axes divide.
      length, cache, stop, drafts, steps: see `Engine`.

    Raises:
      ConfigError: a checkpoint that cannot be read, or a layout that does not fit.
    """
    model = load.model_of(directory)
    config = meshes.forward_config(dataclasses.replace(base, model=model), mesh, length)
    if config.mesh.pipe > 1:
        raise ConfigError(f"--mesh has pipe:{config.mesh.pipe}; generation has no pipeline")
    devices = jax.devices() if mesh else jax.devices()[:1]
    grid, layout = meshes.build(config.mesh, devices), meshes.layout(config)
    parts = config.mesh.replica * config.mesh.node * config.mesh.gpu
    how = dataclasses.replace(execution.of(config), remat=remat.NONE)
    with jax.set_mesh(grid):
        loaded = load.load(directory, how.recipe.compute, layout, grid)
    return Engine(
        loaded,
        how,
        layout,
        grid,
        slots=-(-slots // parts) * parts,
        length=length,
        cache=cache,
        stop=stop,
        drafts=drafts,
        steps=steps,
    )


def generate(
    server: Engine, requests: Sequence[Request], words: TextCodec, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Serves some requests to their end.

    Args:
      tell: gets text as it comes where there is one request, else each whole text with its number.

    Returns:
      `requests`: of each prompt_tokens, tokens and text (None without a tokenizer); and `timing`.
    """
    numbers = [server.add(request) for request in requests]
    made: dict[int, list[int]] = {number: [] for number in numbers}
    shown = ""
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
                tell(f"[{number}] {_so_far(words, tokens, True)}\n")
    if len(requests) == 1:
        tell("\n")
    found = [
        {"prompt_tokens": list(request.prompt), "tokens": made[n], "text": words.decode(made[n])}
        for n, request in zip(numbers, requests, strict=True)
    ]
    return {"requests": found, "timing": timing(server.counts)}


def _so_far(words: TextCodec, tokens: Sequence[int], done: bool) -> str:
    """The text of some tokens; a character whose bytes are not all there yet waits."""
    text = words.decode(tokens)
    if text is None:
        return " ".join(map(str, tokens))
    return text if done else text.rstrip("\ufffd")


def timing(counts: Counts) -> dict[str, Any]:
    """Seconds and rates, of decoding without each prompt's first token, which prefill makes."""

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
