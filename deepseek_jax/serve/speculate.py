"""Self-speculation: the MTP modules draft, and the main model verifies all drafts in one forward.

Draft. The known tokens of a request end at position n, and the main model has read all before n. At
position i, module k reads the hidden state of depth k - 1 at i and token i + k (section 2.2). At
n - 1 the chain of modules therefore drafts the tokens n + 1, n + 2, ..., each module reading the
draft of the module before. The cache entry of module k at position i is final once token i + k is
known. Each step runs the last W positions through every module again, so that the drafts equal
those of the training form.

With more drafts than modules the last module goes on alone, one position further each time: its own
output replaces the main model's hidden state, and its last draft is the token.

Verify. Rejection sampling keeps the distribution of the main model: a draft d, sampled with
probability q(d), is accepted with probability min(1, p(d) / q(d)); the first rejected draft is
replaced by a sample from max(p - q, 0), renormalised. At temperature 0, p and q are one-hot and the
result equals greedy decoding.

B request slots, D drafts, W window, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import decoding
from deepseek_jax.model.decoding import Weights
from deepseek_jax.model.execution import Execution
from deepseek_jax.serve.batch_state import State
from deepseek_jax.serve.decode import Step, logits_of
from deepseek_jax.serve.sampling import Settings, distribution, draw, uniform

DRAFT, ACCEPT = 1, 2  # purposes of random numbers; 0 is the token itself


def window(config: ModelConfig, drafts: int) -> int:
    """Window W: a step adds up to drafts + 1 tokens, and module k is final k positions later."""
    return drafts + min(drafts, config.mtp_depth)


def stepper(drafts: int) -> Step:
    """Decoding step of up to drafts + 1 tokens per request."""

    def step(model: Weights, how: Execution, state: State) -> tuple[State, jax.Array, jax.Array]:
        slots = state.slots
        state, tokens, q = draft(model, how, state, drafts)
        positions = slots.last[:, None] + jnp.arange(drafts + 1)[None]
        read = jnp.concatenate([slots.at(slots.last[:, None]), tokens], axis=1)
        hidden, cache = decoding.decode(model, read, how, state.cache, positions)
        p = distribution(logits_of(model, hidden), slots.settings)
        chosen, accepted = verify(p, q, tokens, slots.settings, slots.length)
        recent = jnp.concatenate([state.hidden_window, hidden], axis=1)
        kept = accepted[:, None] + 1 + jnp.arange(state.hidden_window.shape[1])[None]
        hidden_window = jnp.take_along_axis(recent, kept[..., None], axis=1)
        return (
            dataclasses.replace(state, cache=cache, hidden_window=hidden_window),
            chosen,
            accepted + 1,
        )

    return step


def draft(
    model: Weights, how: Execution, state: State, drafts: int
) -> tuple[State, jax.Array, jax.Array]:
    """Drafts BD that follow each request's last token, and their distributions BDV (q)."""
    modules, size, room = (
        model.config.mtp_depth,
        state.hidden_window.shape[1],
        state.slots.text.shape[1],
    )
    settings, last = state.slots.settings, state.slots.last

    def one(carry, module, number, draft):
        slots, cache, hidden, recent = carry
        read = slots.at(recent + number + 1)
        positions = jnp.where(recent < 0, room, recent)  # positions before the start are dropped
        hidden, out, cache = decoding.predict(
            model, module, number, hidden, read, how, cache, positions
        )
        q = distribution(logits_of(model, out[:, -1]), settings)
        token = draw(q, settings, last + draft, DRAFT)
        return (slots.with_drafts(last + draft, token), cache, hidden, recent), (token, q)

    def next_module(carry, module, number):
        return one(carry, module, number, number + 1)

    def last_module_again(carry, draft):
        slots, cache, hidden, recent = carry
        return one((slots, cache, hidden, recent + 1), final, modules - 1, draft)

    recent = last[:, None] - size + jnp.arange(size)[None]  # BW, positions before the last token
    carry = state.slots, state.cache, state.hidden_window, recent
    carry, made = decoding.run_layers(model.mtp, min(drafts, modules), next_module, carry)
    if drafts > modules:
        final = decoding.layer_of(model.mtp, modules - 1)
        slots, cache, hidden, recent = carry
        carry = slots, cache, hidden[:, -1:], recent[:, -1:]
        carry, more = lax.scan(last_module_again, carry, jnp.arange(modules + 1, drafts + 1))
        made = jax.tree.map(lambda *both: jnp.concatenate(both), made, more)
    tokens, q = (jnp.moveaxis(x, 0, 1) for x in made)  # DB... -> BD...
    return dataclasses.replace(state, cache=carry[1]), tokens, q


def verify(
    p: jax.Array, q: jax.Array, drafts: jax.Array, settings: Settings, first: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Accepts a prefix of the drafts and samples the token that follows it.

    Args:
      p: B(D+1)V, the main model's distribution at each draft and after the last.
      q: BDV, the distribution that each draft was sampled from.
      drafts: BD, draft tokens.
      settings: Sampling settings.
      first: B, position of the first draft.

    Returns:
      Tokens B(D+1) and the number of accepted drafts B, which come first; the token after them is
      valid too, and the rest is padding.
    """
    count = drafts.shape[1]
    p_of, q_of = (jnp.take_along_axis(x, drafts[..., None], axis=2)[..., 0] for x in (p[:, :-1], q))

    def chances(number):
        return uniform(settings, first + number, ACCEPT)

    chance = jax.vmap(chances, out_axes=1)(jnp.arange(count))
    taken = chance * q_of < p_of  # chance < p/q, without a division by 0
    accepted = jnp.cumprod(taken.astype(jnp.int32), axis=1).sum(1)

    padded = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))  # after the last draft: a plain sample from p
    p_next, q_next = (
        jnp.take_along_axis(x, accepted[:, None, None], axis=1)[:, 0] for x in (p, padded)
    )
    rest = jnp.maximum(p_next - q_next, 0.0)
    rest = jnp.where(
        rest.sum(-1, keepdims=True) > 0, rest, p_next
    )  # 0 only by rounding: p equals q
    following = draw(rest, settings, first + accepted)
    order = jnp.arange(count + 1)[None]
    tokens = jnp.pad(drafts, ((0, 0), (0, 1)))
    return jnp.where(order < accepted[:, None], tokens, following[:, None]), accepted
