"""Sizes of an engine that cannot work, told before anything is loaded or compiled."""

import numbers
from collections.abc import Sequence

from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.hardware import machine_memory
from deepseek_jax.serve import latent_cache

_INT32 = 2**31 - 1  # positions are int32
_STEP = 64  # tokens; a length that is a multiple of it serves many requests with one program


def length_for(prompts: Sequence[Sequence[int]], max_tokens: int) -> int:
    """Tokens of a slot that holds the longest prompt and `max_tokens` more, in whole steps of 64.

    Programs are compiled for one length of the slots. Prompts that differ by a few tokens thereby
    find the programs that were kept.
    """
    return -(-(max(map(len, prompts)) + max_tokens) // _STEP) * _STEP


def check_numbers(config: ModelConfig, *, slots: int, length: int, drafts: int, steps: int) -> None:
    """Checks each size of `Engine` by itself.

    Raises:
      ConfigError: The first one outside its range.
    """
    ranges = (
        ("slots", slots, 1, _INT32),
        ("length", length, 1, _INT32),
        ("drafts", drafts, 0, length),  # a slot keeps no more than it holds
        ("steps", steps, 1, _INT32),
    )
    for name, value, least, most in ranges:
        if not isinstance(value, numbers.Integral) or not least <= value <= most:
            raise ConfigError(
                f"engine.{name}={value}; expected at least {least} and at most {most}"
            )
    if drafts and not config.mtp_depth:
        raise ConfigError(
            f"engine.drafts={drafts} drafts with MTP modules, and this model has none; set "
            "engine.drafts=0"
        )


def check_room(config: ModelConfig, slots: int, length: int, cache: str, drafts: int) -> None:
    """Checks that the memory of a device, or of a CPU's machine, holds the cache of its own slots.

    Raises:
      ConfigError: It has less, weights aside.
    """
    each = latent_cache.bytes_per_token(config, cache, mtp=drafts > 0)
    needed = slots * length * each
    had = machine_memory.device_bytes() or machine_memory.host_bytes()
    if had is not None and needed > had:
        raise ConfigError(
            f"a latent cache of {slots} slots on a device, each of engine.length={length} tokens "
            f"(a prompt and its request.max_tokens), takes {machine_memory.text(needed)} of "
            f"{machine_memory.text(had)}; set a smaller length or fewer engine.slots, or "
            "engine.cache=fp8"
        )
