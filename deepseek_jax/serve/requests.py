"""Requests to an engine, the tokens that it adds to them, and its counters."""

import dataclasses

import numpy as np

from deepseek_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue, with its sampling settings.

    Attributes:
      prompt: Token ids, at least one.
      max_tokens: Most tokens to generate; at least 1.
      temperature: Softmax temperature, at least 0; 0 takes the most likely token.
      top_p: Share of the probability to sample from (nucleus sampling), in (0, 1].
      seed: Seed of this request's random numbers, from 0 to 2**32 - 1.

    Raises:
      ConfigError: A request that no engine can run; the message names the field.
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
            raise ConfigError(f"request.max_tokens={self.max_tokens}; expected at least 1")
        if not self.temperature >= 0:
            raise ConfigError(f"request.temperature={self.temperature}; expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"request.top_p={self.top_p}; expected above 0, up to 1")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"request.seed={self.seed}; expected 0 to 2**32 - 1")


@dataclasses.dataclass(frozen=True)
class Delta:
    """Tokens that one call of `Engine.step` added to one request.

    Attributes:
      request: Number of the request, as `Engine.add` returned it.
      tokens: Token ids in order; a stop token is the last.
      done: True if the request has ended.
    """

    request: int
    tokens: list[int]
    done: bool


@dataclasses.dataclass
class Counts:
    """Counters of an engine, over all requests.

    Attributes:
      accepted: D int64; [i] counts the steps in which draft i was accepted.
      compile_seconds: Time of compiling both programs.
      prefill_seconds: Time in calls that read prompts.
      decode_seconds: Time in calls that decode.
      prompt_tokens: Prompt tokens read.
      tokens: Tokens made by decoding; prefill makes the first token of each request.
      steps: Decoding steps, summed over the request slots that ran.
    """

    accepted: np.ndarray
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    steps: int = 0
