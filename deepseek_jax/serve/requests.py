"""Requests to an engine, the tokens that it adds to them, and its counters."""

import dataclasses
import numbers
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.serve.sampling import HOTTEST


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue, with its sampling settings; without them, the likeliest tokens.

    The command `generate` has other defaults, see `serve/sampling_choice.py`.

    Attributes:
      prompt: Token ids, at least one.
      max_tokens: Most tokens to generate; at least 1.
      temperature: Softmax temperature, from 0 to 1e30; 0 takes the most likely token, and so does
        any value below 1e-6, the rounding error of logits.
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
        try:
            ids = tuple(operator.index(token) for token in self.prompt)
        except TypeError as error:
            raise ConfigError("request.prompt has to be token ids, as (1, 2, 3)") from error
        if not ids:
            raise ConfigError("an empty prompt; give at least one token, such as BOS")
        object.__setattr__(self, "prompt", ids)
        for name, (kind, holds, words) in NUMBERS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or not holds(value):
                raise ConfigError(f"request.{name}={value!r}; expected {words}")

    def check_fits(self, vocab: int, length: int) -> None:
        """Checks that a model of `vocab` tokens has the prompt, and a slot of `length` the rest.

        Raises:
          ConfigError: A request that can never run there.
        """
        prompt, total = self.prompt, len(self.prompt) + self.max_tokens
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ConfigError(
                f"a prompt has tokens from {min(prompt)} to {max(prompt)}; this model has 0 to "
                f"{vocab - 1}"
            )
        if total > length:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and request.max_tokens={self.max_tokens} "
                f"need room for {total}, and a slot has {length}; set engine.length={total}"
            )


# Type, test and words for each number of a request; NaN passes no test.
NUMBERS: Mapping[str, tuple[Any, Callable[[Any], bool], str]] = {
    "max_tokens": (numbers.Integral, lambda x: x >= 1, "a whole number, at least 1"),
    "temperature": (numbers.Real, lambda x: 0 <= x <= HOTTEST, "a number from 0 to 1e30"),
    "top_p": (numbers.Real, lambda x: 0 < x <= 1, "a number above 0, up to 1"),
    "seed": (numbers.Integral, lambda x: 0 <= x < 2**32, "a whole number, 0 to 2**32 - 1"),
}


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
