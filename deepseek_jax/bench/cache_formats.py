"""Error that a format of the latent cache makes, against a cache in float32.

Texts are decoded token by token after a prompt, once as they stand and once greedily, with each
format of `generate --cache`; weights and activations are float32, so that nothing else rounds. The
texts are held-out ones of the run in the workdir of --checkpoint, or random ids for a Hugging Face
directory. The same is done with random weights of the run's sizes.

B texts, S decoded positions, V vocabulary.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deepseek_jax.checkpoint.load import Checkpoint, open_checkpoint
from deepseek_jax.config import Config
from deepseek_jax.data import scoring
from deepseek_jax.data.corpus import prepare
from deepseek_jax.model import decoding
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.transformer import Transformer, build_model
from deepseek_jax.serve import latent_cache
from deepseek_jax.serve.decode import logits_of


def measure(
    config: Config, *, directory: Path, texts: int = 16, prompt: int = 32, tokens: int = 96
) -> dict[str, Any]:
    """Measures the table `cache_formats`: a row for each format, with trained and random weights.

    Args:
      config: not used; the checkpoint's own is.
      directory: a workdir, or a Hugging Face directory.
      texts: number of texts.
      prompt: tokens that are read at once.
      tokens: tokens that are decoded after them.
    """
    checkpoint = open_checkpoint(directory)
    text = _texts(checkpoint, texts, prompt + tokens)
    models = {
        "trained": checkpoint.load(),
        "random": build_model(checkpoint.model, jax.random.key(0)),
    }
    rows = []
    for weights, model in models.items():
        want = _logits(model, text, "float32", prompt)
        for form in latent_cache.FORMATS:
            rows.append(
                {"weights": weights, "cache": form, **_row(model, text, form, prompt, want)}
            )
    return {"texts": texts, "prompt_tokens": prompt, "tokens": tokens, "cache_formats": rows}


def _row(
    model: Transformer, text: np.ndarray, form: str, prompt: int, want: list[np.ndarray]
) -> dict[str, float]:
    forced, greedy = _logits(model, text, form, prompt)
    exact, exact_greedy = want
    target = text[:, prompt + 1 :, None]
    loss, exact_loss = (
        -np.take_along_axis(_log_softmax(x)[:, :-1], target, -1).mean() for x in (forced, exact)
    )
    log = _log_softmax(exact)
    divergence = (np.exp(log) * (log - _log_softmax(forced))).sum(-1).mean()
    chosen, exact_chosen = forced.argmax(-1), exact.argmax(-1)
    same = greedy.argmax(-1) == exact_greedy.argmax(-1)
    return {
        "bytes_per_token": latent_cache.bytes_per_token(model.config, form),
        "logits_error": float(np.std(forced - exact) / np.std(exact)),
        "divergence_nats": float(divergence),
        "loss_change_nats": float(loss - exact_loss),
        "same_first_choice": float((chosen == exact_chosen).mean()),
        "greedy_tokens_equal": float(np.logical_and.accumulate(same, axis=1).mean()),
    }


def _logits(model: Transformer, text: np.ndarray, form: str, prompt: int) -> list[np.ndarray]:
    """Logits BSV float64 after the prompt: of the text as it stands, and of greedy tokens."""
    return [
        np.asarray(_decoded(model, text, forced, form, prompt), np.float64).swapaxes(0, 1)
        for forced in (True, False)
    ]


@functools.partial(jax.jit, static_argnames=("form", "prompt"))
def _decoded(
    model: Transformer, text: jax.Array, forced: jax.Array, form: str, prompt: int
) -> jax.Array:
    """Logits SBV after each token behind the prompt, which is the text's or the likeliest."""
    batch, length = text.shape
    how = Execution()
    past = latent_cache.make(model.config, batch, length, form, mtp=False)
    hidden, kept = decoding.prefill(model, text[:, :prompt], how, mtp=False)
    past = past.admit(jnp.arange(batch), kept)

    def step(carry: Any, position: jax.Array) -> tuple[Any, jax.Array]:
        past, chosen = carry
        token = jnp.where(forced, text[:, position], chosen)[:, None]
        now = jnp.broadcast_to(position, (batch, 1))
        hidden, past = decoding.decode(model, token, how, past, now)
        logits = logits_of(model, hidden[:, 0])
        return (past, logits.argmax(-1).astype(text.dtype)), logits

    first = logits_of(model, hidden[:, -1]).argmax(-1).astype(text.dtype)
    return lax.scan(step, (past, first), jnp.arange(prompt, length))[1]


def _texts(checkpoint: Checkpoint, count: int, length: int) -> np.ndarray:
    """Tokens BS int32 of held-out text, or random ones where the checkpoint has none."""
    run = checkpoint.run
    if run is None:
        random = np.random.default_rng(0)
        return random.integers(0, checkpoint.model.vocab, (count, length), np.int32)
    documents = prepare(run.data, vocab=run.model.vocab, say=lambda text: None)
    tokens = run.evaluation.tokens
    return scoring.held_out_prompts(documents, count=count, length=length, tokens=tokens)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
