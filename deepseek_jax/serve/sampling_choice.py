"""Sampling settings of `generate`: flags, a checkpoint's generation_config.json, or defaults."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from deepseek_jax.checkpoint.load import Checkpoint
from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import shown
from deepseek_jax.serve.requests import NUMBERS

# Defaults for a model that states none. They suit a small model: the likeliest token each time soon
# repeats itself, and without top_p a wrong token that the text does not recover from comes early.
TEMPERATURE, TOP_P = 0.8, 0.9

FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class SamplingChoice:
    """Sampling settings of all requests of a command, and their sources.

    Attributes:
      temperature, top_p: as in `Request`.
      sources: source of the temperature and of top_p: "flag", "generation_config.json" or
        "default".
    """

    temperature: float
    top_p: float
    sources: tuple[str, str]

    def told(self, seeds: Sequence[int]) -> str:
        """Line that tells the settings, their sources and the seeds of the requests."""
        if self.temperature == 0:
            return f"temperature 0 ({self.sources[0]}): the likeliest token each time"
        seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
        return (
            f"temperature {self.temperature:g} ({self.sources[0]}), top_p {self.top_p:g} "
            f"({self.sources[1]}), {seed}; --temperature=0 takes the likeliest token each time"
        )

    def fields(self) -> dict[str, Any]:
        """The same as fields of a JSON object."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "temperature_from": self.sources[0],
            "top_p_from": self.sources[1],
        }


def sampling_of(
    checkpoint: Checkpoint, temperature: float | None, top_p: float | None
) -> SamplingChoice:
    """Settings for texts of a checkpoint.

    A value that is given comes first, then what generation_config.json states, then the default.
    `do_sample: false` states temperature 0. Its other settings, such as top_k, are not applied.

    Args:
      temperature, top_p: values that were given; None for those that were not.

    Raises:
      ConfigError: a stated value that would be used and is none; the message names the file.
    """
    stated = dict(checkpoint.generation)
    sampled = stated.get("do_sample")
    if temperature is None and not (sampled is None or isinstance(sampled, bool)):
        raise ConfigError(
            f"{checkpoint.directory / FILE}: do_sample is {shown(sampled)}; expected true or "
            "false; set request.temperature"
        )
    if sampled is False:
        stated["temperature"] = 0.0

    def one(name: str, given: float | None, default: float) -> tuple[float, str]:
        if given is not None:
            return given, "flag"
        if stated.get(name) is not None:
            return _checked(checkpoint, name, stated[name]), FILE
        return default, "default"

    heat, of_heat = one("temperature", temperature, TEMPERATURE)
    share, of_share = one("top_p", top_p, TOP_P)
    return SamplingChoice(heat, share, (of_heat, of_share))


def _checked(checkpoint: Checkpoint, name: str, value: Any) -> float:
    """A stated number that a request can have."""
    kind, holds, words = NUMBERS[name]
    if not isinstance(value, kind) or isinstance(value, bool) or not holds(value):
        raise ConfigError(
            f"{checkpoint.directory / FILE}: {name} is {shown(value)}; expected {words}; set "
            f"request.{name}"
        )
    return float(value)
