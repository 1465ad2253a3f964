"""Requests to a running engine, and what it tells of them."""

import dataclasses

import numpy as np

from deepseek_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Request:
    """Attributes:
    prompt: token ids, at least one.
    max_tokens: how many to generate at most.
    temperature: 0 takes the most likely token.
    top_p: in (0, 1], the share of probability that is drawn from.
    seed: of this request's random numbers.

    Raises:
      ConfigError: what no server can run.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError("an empty prompt; give at least one token, such as BOS")
        if self.max_tokens < 1:
            raise ConfigError(f"--max_tokens={self.max_tokens}; expected at least 1")
        if not self.temperature >= 0:
            raise ConfigError(f"--temperature={self.temperature}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top_p={self.top_p}; expected above 0, up to 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"--seed={self.seed}; expected 0 to 2**32 - 1")


@dataclasses.dataclass(frozen=True)
class Delta:
    """What one call added to one request.

    Attributes:
      request: its number, as `Engine.add` returned it.
      tokens: ids, in order; a stop token is the last.
      done: whether these are its last.
    """

    request: int
    tokens: list[int]
    done: bool


@dataclasses.dataclass
class Counts:
    """What was measured, over all requests.

    Attributes:
      accepted: drafts that were taken: [i] counts the steps in which draft i was.
      compile_seconds: spent on both programs before their first calls.
      prefill_seconds, decode_seconds: in their calls.
      prompt_tokens, tokens: read, and made by decoding (each prompt's first token is prefill's).
      steps: of decoding, summed over the slots that ran.
    """

    accepted: np.ndarray
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
