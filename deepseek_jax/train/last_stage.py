"""End of a pipeline: the MTP modules, whose all-to-alls overlap with the matmuls of the heads.

An MTP module's block is a MoE layer on one micro-batch, and has no second chunk to hide its
all-to-alls under. The loss of the head before it does not depend on the module and costs as much as
several layers, so the two overlap. The head runs in eight parts of its rows. Each part has a step
of matmuls (h) and, for a sharded vocabulary, a step of collectives (H), which XLA never overlaps
with another collective:

    forward     attention H    dispatch h H h             experts H    combine h H h    H
    backward                   combine gradient h H h     experts H    dispatch gradient h H h
                attention H

The gradients of a part are computed beside the logits of the next one. The last head, which has no
module after it, runs alone, as do rows that do not fit into eight chunks.
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.execution import Execution
from deepseek_jax.model.loss import entropy_of, everywhere, gradients_of, head_loss, logits_of
from deepseek_jax.model.mtp import join
from deepseek_jax.model.overlapped.layer_pass import hops_of
from deepseek_jax.model.overlapped.stage import Stage, single_layer
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.overlap import Steps, interleave, storing, with_scope
from deepseek_jax.precision import weight_gradients
from deepseek_jax.train.objective import Sums, counted, no_layers, targets_of

PARTS = 8  # of a head's rows that overlap with a module: half in its forward, half in its backward


def forward_turns(hops: int) -> list[str]:
    """Turns of a module's forward: its steps ("m") and those of the head before it ("h").

    Args:
      hops: of a message to the experts: 0, 1 or 2.
    """
    return ["mmh", *_beside_hops(hops), "mmh", *_beside_hops(hops), "h"]


def backward_turns(hops: int) -> list[str]:
    """Turns of a module's backward, as `forward_turns`."""
    return [*_beside_hops(hops), "mmh", *_beside_hops(hops), "mh"]


def _beside_hops(hops: int) -> list[str]:
    """Turns of one message, each of whose hops is a step of the module."""
    return ["mh", "h|m", "mh"] if hops == 2 else ["m" * hops + "hhh"]


@dataclasses.dataclass(frozen=True)
class LastStage:
    """Execution of a model's end, and the weights of its loss.

    Attributes:
      how: execution of the MTP modules.
      chunk: rows of one part; the logits of two parts are held at once.
      mtp_weight, alpha, sequences: as in `objective`.
      index: weight of the indexers' loss, summed over queries; None without.
    """

    how: Execution
    chunk: int
    mtp_weight: jax.Array
    alpha: float
    sequences: jax.Array
    index: jax.Array | None = None

    def gradients(
        self, ends: Transformer, y: jax.Array, tokens: jax.Array
    ) -> tuple[Transformer, jax.Array, Sums]:
        """Gradients of `objective` as a function of the last layer's output.

        Args:
          ends: a model without layers (`stage_params.ends`).
          y: BSD, the last layer's output.
          tokens: B(S+1) int32.

        Returns:
          Gradients of `ends` and of y, and the sums to record.
        """
        depth = ends.config.mtp_depth
        targets, each = targets_of(tokens, depth, self.mtp_weight, self.sequences)
        heads = [
            _LossHead(ends.head.table[...], targets[k], each[k], self.chunk)
            for k in range(depth + 1)
        ]
        out, vjp_norm = jax.vjp(lambda norm, y: norm(y), ends.norm, y)
        embedded, vjp_embedded = jax.vjp(lambda table: table(tokens, self.how), ends.embedding)
        modules = []
        state = out
        for k in range(1, depth + 1):
            module = _OverlappedMTP(self, jax.tree.map(operator.itemgetter(k - 1), ends.mtp), k)
            heads[k - 1].rows = out
            state, out = module.forward(state, embedded, heads[k - 1])
            modules.append(module)
        heads[depth].rows = out
        heads[depth].rest()

        d_embedded, d_state = jnp.zeros_like(embedded), jnp.zeros_like(y)
        for module, head, last in zip(modules[::-1], heads[-2::-1], heads[:0:-1], strict=True):
            d_state, more = module.backward(last.gradient(), d_state, head)
            head.rest()
            d_embedded = d_embedded + more
        d_norm, d_y = vjp_norm(heads[0].gradient() + d_state)

        grads: Any = weight_gradients.carriers(ends)
        grads.embedding, grads.norm = vjp_embedded(d_embedded)[0], d_norm
        d_table = sum(head.d_table for head in heads)
        grads.head = jax.tree.map(lambda _: d_table, ends.head)
        if modules:
            of_modules = [module.gradients for module in modules]
            grads.mtp = jax.tree.map(lambda *parts: jnp.stack(parts), *of_modules)
        return grads, d_y, self._sums(ends, heads, modules, each)

    def _sums(self, ends: Any, heads: Any, modules: Any, weights: jax.Array) -> Sums:
        entropies = jnp.stack([head.entropies() for head in heads])
        balance = sum((module.sums[1].sum() for module in modules), jnp.zeros(()))
        layers = [(module.sums[0], module.sums[2]) for module in modules]
        layers = layers or [no_layers(ends.config.experts)]
        load, traffic = jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)
        index = None
        if self.index is not None:
            index = sum((module.sums[3].sum() for module in modules), jnp.zeros(()))
        return Sums(counted(entropies, weights), balance, load, traffic, index)


class _LossHead:
    """Loss of one head and its gradients, computed part by part.

    Attributes:
      rows: BSD, the head's input.
      d_table: DV float32, gradient of the table from the parts that are done.
    """

    rows: jax.Array
    _ready: Any

    def __init__(self, table: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int):
        """Head of a table DV, with targets and weights BS."""
        self._table, self._chunk = table, chunk
        self._targets, self._weights = targets.reshape(-1), weights.reshape(-1)
        self._done: list[tuple[jax.Array, jax.Array]] = []
        self.d_table = jnp.zeros(table.shape, jnp.float32)

    def steps(self, parts: range) -> Steps[None]:
        """Two steps for each part, matmuls and collectives; one more to begin with part 0."""
        if self._targets.size < PARTS:  # too few rows to divide: empty steps, as turns count them
            for _ in range(2 * len(parts) + (not parts.start)):
                yield ()
            return
        if not parts.start:
            here = self._gathered(0)
            logits = logits_of(here[0], self._table)
            scored = entropy_of(logits, here[1])
            self._ready = yield here, logits, scored, self._gathered(1)
        for k in parts:
            here, logits, scored, ahead = self._ready
            entropy = scored.entropy
            d_rows, d_table = gradients_of(here[0], self._table, logits, scored, here[2])
            self.d_table = self.d_table + d_table
            here, logits = ahead, ahead and logits_of(ahead[0], self._table)
            d_rows, self.d_table, logits = yield d_rows, self.d_table, logits
            d_rows = axes.fan_in(d_rows, "vocab").astype(self.rows.dtype)
            scored = here and entropy_of(logits, here[1])
            ready = here, logits, scored, self._gathered(k + 2)
            d_rows, self._ready = yield d_rows, ready
            self._done.append((d_rows, axes.own(entropy, "vocab")))

    def rest(self) -> None:
        """Computes the rows that are in no part, in one loop."""
        first, total = sum(len(entropy) for _, entropy in self._done), self._targets.size
        if first == total:
            return
        run = jax.grad(head_loss, (0, 1), has_aux=True)
        rows, targets, weights = self._slice(first, total)
        chunk = min(self._chunk, total - first)
        (d_rows, d_table), entropies = run(rows, self._table, targets, weights, chunk)
        self.d_table = self.d_table + d_table
        self._done.append((d_rows, entropies))

    def _gathered(self, part: int) -> Any:
        """Rows, targets and weights of a part, from all devices; None past the last part."""
        size = min(self._chunk, self._targets.size // PARTS)
        return everywhere(*self._slice(size * part, size * (part + 1))) if part < PARTS else None

    def _slice(self, start: int, end: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        rows = self.rows.reshape(self._targets.size, -1)
        return rows[start:end], self._targets[start:end], self._weights[start:end]

    def gradient(self) -> jax.Array:
        """Gradient of `rows`, BSD."""
        return jnp.concatenate([d_rows for d_rows, _ in self._done]).reshape(self.rows.shape)

    def entropies(self) -> jax.Array:
        """Cross entropies BS, in nats."""
        each = jnp.concatenate([entropies for _, entropies in self._done])
        return each.reshape(self.rows.shape[:-1])


class _OverlappedMTP:
    """Forward and backward of MTP module k, overlapped with the head before it.

    Attributes:
      sums: load, balance, traffic and index loss of the block, as `Stage.forward` returns them.
      gradients: of the module, set by `backward`.
    """

    sums: Any
    gradients: Any

    def __init__(self, last_stage: LastStage, module: Any, k: int):
        self._how, self._module, self._k = last_stage.how, module, k
        balance = last_stage.alpha / last_stage.sequences
        experts = module.block.feed.config.experts
        layer, how = single_layer(module.block), last_stage.how
        self._stage = Stage([layer], how, experts, balance, index=last_stage.index)

    def forward(
        self, state: jax.Array, embedded: jax.Array, head: _LossHead
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the module, and half of the head's parts.

        Args:
          state: BSD, the previous module's output, or the main model's.
          embedded: embeddings of all tokens.
          head: the head before the module.

        Returns:
          The next state and the next head's input, both BSD.
        """
        enter, weights = jax.checkpoint(self._enter, prevent_cse=False), self._module.joining()
        x, self._vjp_in = weight_gradients.vjp(enter, weights, state, embedded)
        turns = forward_turns(hops_of(self._how))
        done: dict[str, Any] = {}
        work = with_scope("mtp", self._stage.forward(x, jnp.bool_(True)))
        loss = with_scope("loss", head.steps(range(PARTS // 2)))
        interleave({"m": storing(done, "m", work), "h": loss}, turns)
        state, self._kept, self.sums = done["m"]
        out, self._vjp_out = jax.vjp(lambda norm, x: norm(x), self._module.out_norm, state)
        return state, out

    def backward(
        self, d_out: jax.Array, d_state: jax.Array, head: _LossHead
    ) -> tuple[jax.Array, jax.Array]:
        """Runs the backward pass and the other half of the head's parts.

        Args:
          d_out, d_state: gradients of the next head's input and of the next state.
          head: as in `forward`.

        Returns:
          Gradients of the state and of the embeddings that `forward` was given.
        """
        d_norm, d_x = self._vjp_out(d_out)
        turns = backward_turns(hops_of(self._how))
        done: dict[str, Any] = {}
        work = with_scope("mtp", self._stage.backward(self._kept, d_x + d_state, jnp.bool_(True)))
        loss = with_scope("loss", head.steps(range(PARTS // 2, PARTS)))
        interleave({"m": storing(done, "m", work), "h": loss}, turns)
        d_x, (of_block,), _ = done["m"]
        of_join, d_state, d_embedded = self._vjp_in(d_x)
        self.gradients = self._all(of_join, of_block, d_norm)
        return d_state, d_embedded

    def _enter(self, weights: Any, state: jax.Array, embedded: jax.Array) -> jax.Array:
        """Input of the module's block: position i reads the embedding of token i + k, or zeros."""
        length = state.shape[1]
        missing = max(0, self._k + length - embedded.shape[1])
        ahead = jnp.pad(embedded, ((0, 0), (0, missing), (0, 0)))
        embedding_norm, hidden_norm, project = weights
        token = ahead[:, self._k : self._k + length]
        return join(embedding_norm, hidden_norm, project, state, token, self._how)

    def _all(self, of_join: Any, of_block: dict[str, Any], d_norm: Any) -> Any:
        grads = weight_gradients.carriers(self._module)
        grads.embedding_norm, grads.hidden_norm, project = of_join
        grads.project = jax.tree.map(lambda _: project, grads.project)
        grads.out_norm, feed = d_norm, grads.block.feed
        for name, value in of_block.items():
            setattr(grads.block if hasattr(grads.block, name) else feed, name, value)
        return grads
