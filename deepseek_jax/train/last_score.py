"""Scores of a trained run on held-out text, which is read before the first step."""

import logging
from typing import Any

import jax
from jax.sharding import Mesh

from deepseek_jax.config import Config
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.scoring import HeldOut, held_out
from deepseek_jax.errors import RunError, reason
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.train import evaluation, state

_log = logging.getLogger(__name__)


def text_of(config: Config, corpus: Corpus) -> HeldOut | None:
    """The text to score at the end, read now: nothing that happens to the files costs it."""
    if not config.evaluation.tokens:
        return None
    return held_out(corpus, length=config.batch.length, tokens=config.evaluation.tokens)


def scores(
    config: Config, layout: Layout, mesh: Mesh, now: state.TrainState, text: HeldOut
) -> dict[str, Any]:
    """Scores on held-out text; without them, after a warning, where scoring fails.

    The run is trained by now: its summary, pictures and checkpoint are not lost with them.
    """
    try:
        return _scored(config, layout, mesh, now, text)
    except RunError:
        raise
    except Exception as error:
        _log.warning("no score on held-out text (%s); the same command scores again", reason(error))
        return {}


def _scored(
    config: Config, layout: Layout, mesh: Mesh, now: state.TrainState, text: HeldOut
) -> dict[str, Any]:
    """Bits per byte of the weights, and of their average, on text outside the training data."""
    score = evaluation.make_score(config, layout, mesh)
    scored = score(now.params, now.bias, text.sequences, text.valid)
    out = {"held_out_loss": scored.nats / scored.targets, "held_out_bytes": text.bytes}
    if text.bytes:  # token files may hold marks alone
        out["held_out_bits_per_byte"] = scored.bits_per_byte(text.bytes)
        out["gzip_bits_per_byte"] = 8 * text.gzip_bytes / text.bytes
    if now.ema is not None and text.bytes:
        on_device = jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), now.ema)
        average = jax.device_put(now.ema, on_device)
        scored = score(average, now.bias, text.sequences, text.valid)
        out["ema_bits_per_byte"] = scored.bits_per_byte(text.bytes)
    return out
