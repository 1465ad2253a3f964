"""Scores of a trained run on held-out and training text, which are read before the first step."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from deepseek_jax.config import Config
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.scoring import HeldOut, held_out, trained
from deepseek_jax.errors import RunError, reason
from deepseek_jax.train import evaluation, state, survival

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Texts:
    """Text to score at the end of a run.

    Attributes:
      held_out: documents that are not trained on.
      trained: as many tokens of the documents that are.
    """

    held_out: HeldOut
    trained: HeldOut


def text_of(config: Config, corpus: Corpus) -> Texts | None:
    """The text to score at the end, read now: nothing that happens to the files costs it."""
    length, tokens = config.batch.length, config.evaluation.tokens
    if not tokens:
        return None
    apart = held_out(corpus, length=length, tokens=tokens)
    return Texts(apart, trained(corpus, length=length, tokens=int(apart.valid.sum())))


def scores(
    make_score: Callable[[], evaluation.ScoreFn], now: state.TrainState, text: Texts
) -> dict[str, Any]:
    """Scores on held-out and training text; without them, after a warning, where scoring fails.

    The run is trained by now: its summary, pictures and checkpoint are not lost with them.
    """
    try:
        with survival.naming_the_lost():
            return _scored(make_score(), now, text)
    except RunError:
        raise
    except Exception as error:
        _log.warning("no score on held-out text (%s); the same command scores again", reason(error))
        return {}


def _scored(score: evaluation.ScoreFn, now: state.TrainState, text: Texts) -> dict[str, Any]:
    """Loss and bits per byte of the weights on both texts, and of their average on the first."""
    out = _fields(score, now.params, now.bias, text.held_out, "held_out", "gzip")
    out |= _fields(score, now.params, now.bias, text.trained, "trained", "trained_gzip")
    if now.ema is not None and text.held_out.bytes:
        on_device = jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), now.ema)
        average = jax.device_put(now.ema, on_device)
        held = text.held_out
        scored = score(average, now.bias, held.sequences, held.valid)
        out["ema_bits_per_byte"] = scored.bits_per_byte(held.bytes)
    return out


def _fields(
    score: evaluation.ScoreFn,
    params: nnx.State,
    bias: nnx.State,
    text: HeldOut,
    name: str,
    gzip: str,
) -> dict[str, Any]:
    """The scores of a text as fields of `summary.json`."""
    scored = score(params, bias, text.sequences, text.valid)
    out = {f"{name}_loss": scored.nats / scored.targets, f"{name}_bytes": text.bytes}
    if text.bytes:  # token files may hold marks alone
        out[f"{name}_bits_per_byte"] = scored.bits_per_byte(text.bytes)
        out[f"{gzip}_bits_per_byte"] = 8 * text.gzip_bytes / text.bytes
    return out
