"""The end of a pipeline: MTP modules, whose messages travel under the matmuls of the heads.

A module's block is a MoE layer on one micro-batch, and no other chunk is beside it. But the loss of
the head before it needs nothing of the module, and is as much work as several layers. That head's
rows go in eight parts:

    forward     attention    dispatch, 1 2           experts    combine, 3 4
    backward                 combine gradient, 5 6   experts    dispatch gradient, 7 8   attention

The last head has no module after it, and is alone. A part of more than one chunk of logits is a
loop; where the vocabulary is split, there are messages in it, and XLA lets no other travel by.
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.model.execution import Execution
from deepseek_jax.model.flights import hops_of
from deepseek_jax.model.mtp import join
from deepseek_jax.model.stage import Stage, alone
from deepseek_jax.model.transformer import Transformer
from deepseek_jax.parallel.turns import Steps, into, straight, take_turns
from deepseek_jax.train.loss import head_loss
from deepseek_jax.train.objective import Sums, counted, no_layers, targets_of

PARTS = 8


def forward_turns(hops: int) -> list[str]:
    """A module's steps ("m") and the parts of the head before it ("h")."""
    return ["mm", "m" * hops + "hh", "mmm", "m" * hops + "hh"]


def backward_turns(hops: int) -> list[str]:
    return ["m" * hops + "hh", "mm", "m" * hops + "hh", "mm"]


@dataclasses.dataclass(frozen=True)
class Ending:
    """How the end of a model is run, and what its loss counts.

    Attributes:
      how: of the MTP modules.
      chunk: rows whose logits are held at once.
      mtp_weight, alpha, sequences: as `objective` takes them.
    """

    how: Execution
    chunk: int
    mtp_weight: jax.Array
    alpha: float
    sequences: jax.Array

    def gradients(
        self, ends: Transformer, y: jax.Array, tokens: jax.Array
    ) -> tuple[Transformer, jax.Array, Sums]:
        """Of what `objective` makes of the last layer's output.

        Args:
          ends: a model without layers (`staged.ends`).
          y: BSD.
          tokens: B(S+1) int32.

        Returns:
          The gradients of `ends` and of y, and what to record.
        """
        depth = ends.config.mtp_depth
        targets, each = targets_of(tokens, depth, self.mtp_weight, self.sequences)
        heads = [
            _Head(ends.head.table[...], targets[k], each[k], self.chunk) for k in range(depth + 1)
        ]
        out, pull_norm = jax.vjp(lambda norm, y: norm(y), ends.norm, y)
        embedded, pull_embedded = jax.vjp(lambda table: table(tokens, self.how), ends.embedding)
        modules = []
        state = out
        for k in range(1, depth + 1):
            module = _Module(self, jax.tree.map(operator.itemgetter(k - 1), ends.mtp), k)
            heads[k - 1].rows = out
            state, out = module.forward(state, embedded, heads[k - 1])
            modules.append(module)
        heads[depth].rows = out
        straight(heads[depth].parts(1, 1))

        d_embedded, d_state = jnp.zeros_like(embedded), jnp.zeros_like(y)
        for module, head, last in zip(modules[::-1], heads[-2::-1], heads[:0:-1], strict=True):
            d_state, more = module.backward(last.gradient(), d_state, head)
            d_embedded = d_embedded + more
        d_norm, d_y = pull_norm(heads[0].gradient() + d_state)

        grads: Any = jax.tree.map(lambda leaf: leaf, ends)
        grads.embedding, grads.norm = pull_embedded(d_embedded)[0], d_norm
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
        return Sums(counted(entropies, weights), balance, load, traffic)


class _Head:
    """The loss of one head, part by part.

    Attributes:
      rows: BSD, what the head reads.
      d_table: DV float32, of the parts that are done.
    """

    rows: jax.Array

    def __init__(self, table: jax.Array, targets: jax.Array, weights: jax.Array, chunk: int):
        """targets and weights BS."""
        self._table, self._chunk, self._targets, self._weights = table, chunk, targets, weights
        self._done: list[tuple[jax.Array, jax.Array]] = []
        self.d_table = jnp.zeros(table.shape, jnp.float32)

    def parts(self, count: int, of: int = PARTS) -> Steps[None]:
        """So many of its parts, a step each."""
        total = self._targets.size
        rows = self.rows.reshape(total, -1)
        targets, weights = self._targets.reshape(-1), self._weights.reshape(-1)
        for _ in range(count):
            number = len(self._done)
            mine = slice(total * number // of, total * (number + 1) // of)
            chunk = max(1, min(self._chunk, mine.stop - mine.start))
            run = jax.grad(head_loss, (0, 1), has_aux=True)
            given = rows[mine], self._table, targets[mine], weights[mine]
            (d_rows, d_table), entropies = run(*given, chunk)
            self.d_table = self.d_table + d_table
            self._done.append(((yield d_rows), entropies))

    def gradient(self) -> jax.Array:
        """Of `rows`."""
        return jnp.concatenate([d_rows for d_rows, _ in self._done]).reshape(self.rows.shape)

    def entropies(self) -> jax.Array:
        """BS, in nats."""
        return jnp.concatenate([each for _, each in self._done]).reshape(self._targets.shape)


class _Module:
    """MTP module k on its way there and back.

    Attributes:
      sums: load, balance and traffic of its block, as `Stage.forward` returns them.
      gradients: of the module, after backward.
    """

    sums: Any
    gradients: Any

    def __init__(self, ending: Ending, module: Any, k: int):
        self._how, self._module, self._k = ending.how, module, k
        balance = ending.alpha / ending.sequences
        experts = module.block.feed.config.experts
        self._stage = Stage([alone(module.block)], ending.how, experts, balance)

    def forward(
        self, state: jax.Array, embedded: jax.Array, head: _Head
    ) -> tuple[jax.Array, jax.Array]:
        """state BSD and all embeddings -> (the next state, what the next head reads), both BSD."""
        enter, weights = jax.checkpoint(self._enter, prevent_cse=False), self._module.joining()
        x, self._pull_in = jax.vjp(enter, weights, state, embedded)
        turns = forward_turns(hops_of(self._how))
        done: dict[str, Any] = {}
        work = self._stage.forward(x, jnp.bool_(True))
        take_turns({"m": into(done, "m", work), "h": head.parts(PARTS // 2)}, turns)
        state, self._kept, self.sums = done["m"]
        out, self._pull_out = jax.vjp(lambda norm, x: norm(x), self._module.out_norm, state)
        return state, out

    def backward(
        self, d_out: jax.Array, d_state: jax.Array, head: _Head
    ) -> tuple[jax.Array, jax.Array]:
        """The gradients of what `forward` returned -> those of state and embeddings."""
        d_norm, d_x = self._pull_out(d_out)
        turns = backward_turns(hops_of(self._how))
        done: dict[str, Any] = {}
        work = self._stage.backward(self._kept, d_x + d_state, jnp.bool_(True))
        take_turns({"m": into(done, "m", work), "h": head.parts(PARTS // 2)}, turns)
        d_x, (of_block,), _ = done["m"]
        of_join, d_state, d_embedded = self._pull_in(d_x)
        self.gradients = self._all(of_join, of_block, d_norm)
        return d_state, d_embedded

    def _enter(self, weights: Any, state: jax.Array, embedded: jax.Array) -> jax.Array:
        """Position i reads token i + k, and zeros past the end."""
        length = state.shape[1]
        missing = max(0, self._k + length - embedded.shape[1])
        ahead = jnp.pad(embedded, ((0, 0), (0, missing), (0, 0)))
        embedding_norm, hidden_norm, project = weights
        token = ahead[:, self._k : self._k + length]
        return join(embedding_norm, hidden_norm, project, state, token, self._how)

    def _all(self, of_join: Any, of_block: dict[str, Any], d_norm: Any) -> Any:
        grads = jax.tree.map(lambda leaf: leaf, self._module)
        grads.embedding_norm, grads.hidden_norm, project = of_join
        grads.project = jax.tree.map(lambda _: project, grads.project)
        grads.out_norm, feed = d_norm, grads.block.feed
        for name, value in of_block.items():
            setattr(grads.block if hasattr(grads.block, name) else feed, name, value)
        return grads
