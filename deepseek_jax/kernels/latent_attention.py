"""Attention of new tokens to cached latents on a Hopper GPU: absorbed decoding of MLA.

    out[m] = sum over t <= p[m] of exp(scale (q[m] . c[t] + r[m] . k[t]) - l[m]) c[t]
    l[m]   = log of the sum over t <= p[m] of exp(scale (q[m] . c[t] + r[m] . k[t]))

B requests, M = S H rows of queries of a request (heads of one token, then those of the next), T
positions of the cache, C width of latents c (V3: 512), R of rotary keys k (V3: 64), p the position
of a row's token. All heads share the keys, and the latent is key and value: a block of 64 positions
is loaded once into shared memory and multiplied twice.

A thread block has 64 rows of one request and a part of its positions. Three warpgroups share it:

    producer           loads blocks of 64 positions into two slots, c and k
    consumers 0 and 1  scores of 32 of the positions each; exchange of the rows' maxima; softmax;
                       exchange of the weights; sum over 64 positions of half of the columns C

Sums of 64 x C float32 fill the registers of two warpgroups; hence 64 rows, and hence a request with
128 rows is read by two thread blocks, which run side by side: the second reading is expected to
come from L2. Thread blocks with few requests share out the positions of each (`splits`), and XLA
joins their results, each of which is rounded to bfloat16.

Why no read meets a write of the same memory, beyond what `warp_specialised.py` says of the slots:

- Maxima: written before the first meeting of a step, read between it and the second. The next ones
  are written after the second.
- Weights: written before the second meeting, and read after it by the tensor cores. Both consumers
  wait for these before the first meeting of the next step, after which the next ones are written.
- Output: consumers put it where the queries were, after the last step's second meeting, when both
  have computed their scores.

Not run on a GPU.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from deepseek_jax.kernels.matmul_tiling import H100_SMS
from deepseek_jax.kernels.warp_specialised import PRODUCER, Ring, span

ROWS = 64  # of queries in a thread block
KEYS = 64  # positions of a step
HALF = KEYS // 2  # positions of a consumer
STAGES = 2
_LEAST_STEPS = 8  # of a thread block, so that the join costs less than it saves
_LOG2E = math.log2(math.e)
_LOWEST = -1e30  # maximum of a row that has seen no position
_LEAST_SUM = 1e-30  # of weights; a row that has seen a position has at least one
_PRODUCER_REGISTERS, _CONSUMER_REGISTERS = 40, 232


def takes(query_latent: jax.Array, latent: jax.Array, key_rope: jax.Array) -> bool:
    """Whether the kernel computes these: bfloat16; 128 divides C, and 64 divides R and T."""
    arrays = query_latent, latent, key_rope
    length, width = latent.shape[1:]
    small = width <= 512 and key_rope.shape[2] == 64  # shared memory
    fits = length % KEYS == 0 and width % 128 == 0 and small
    return fits and all(array.dtype == jnp.bfloat16 for array in arrays)


def splits_for(requests: int, rows: int, length: int, sms: int = H100_SMS) -> int:
    """Thread blocks for the positions of 64 rows, so that about all SMs have one."""
    blocks = requests * -(-rows // ROWS)
    most = max(1, length // (KEYS * _LEAST_STEPS))
    return max(1, min(most, sms // blocks))


def attend(
    query_latent: jax.Array,
    query_rope: jax.Array,
    latent: jax.Array,
    key_rope: jax.Array,
    positions: jax.Array,
    *,
    scale: float,
    splits: int | None = None,
    interpret: Any = None,
) -> jax.Array:
    """Mean of the latents of each request, weighted for each head of each new token.

    Args:
      query_latent, query_rope: BSHC and BSHR bfloat16.
      latent, key_rope: BTC and BTR bfloat16, finite at all positions.
      positions: BS int32, of the new tokens; a token sees its own position and those before.
      splits: thread blocks for the positions of each request; None for a number that fills a GPU.
      interpret: parameters of Pallas's interpreter, which runs on any platform; None for a GPU.

    Returns:
      BSHC bfloat16.
    """
    batch, new, heads, width = query_latent.shape
    rows, length = new * heads, latent.shape[1]
    splits = splits or splits_for(batch, rows, length)
    padding = (0, 0), (0, -rows % ROWS)

    def as_rows(x: jax.Array) -> jax.Array:
        return jnp.pad(x.reshape(batch, rows, -1), (*padding, (0, 0)))  # BSHX -> BMX

    of_rows = jnp.pad(jnp.repeat(positions, heads, axis=1), padding)  # BM
    seen = jnp.minimum(positions.max(1) + 1, length)
    out, sums = _call(splits, scale, interpret, batch, -(-rows // ROWS) * ROWS, latent, key_rope)(
        (seen + KEYS - 1) // KEYS,
        of_rows,
        as_rows(query_latent),
        as_rows(query_rope),
        latent,
        key_rope,
    )
    return _joined(out, sums)[:, :rows].reshape(batch, new, heads, width)


def _joined(out: jax.Array, sums: jax.Array) -> jax.Array:
    """Mean of the parts, PBMC, weighted by their sums, whose logarithms (base 2) are PBM."""
    if out.shape[0] == 1:
        return out[0]
    shares = jax.nn.softmax(sums * math.log(2), axis=0)
    return (shares[..., None] * out.astype(jnp.float32)).sum(0).astype(out.dtype)


def _call(
    splits: int,
    scale: float,
    interpret: Any,
    batch: int,
    rows: int,
    latent: jax.Array,
    key_rope: jax.Array,
) -> Any:
    """The kernel as a function of (steps of each request B, p, q, r, c, k)."""
    width, narrow, dtype = latent.shape[2], key_rope.shape[2], latent.dtype

    def latent_attention(*refs: Any, **scratch: Any) -> None:
        fields = ("steps", "positions", "query", "query_rope", "latent", "key_rope", "out", "sums")
        given: dict[str, Any] = dict(zip(fields, refs, strict=True))
        _Kernel(scale=scale, splits=splits, **given, **scratch).run()

    def tile(*shape: int) -> Any:
        transforms = plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(2 * HALF)
        return plgpu.SMEM(shape, dtype, transforms=transforms)

    return plgpu.kernel(
        latent_attention,
        out_type=(
            jax.ShapeDtypeStruct((splits, batch, rows, width), dtype),
            jax.ShapeDtypeStruct((splits, batch, rows), jnp.float32),
        ),
        grid=(rows // ROWS, splits, batch),
        grid_names=("tile", "split", "request"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=dict(
            query_smem=tile(2, ROWS, width // 2),
            query_rope_smem=tile(ROWS, narrow),
            position_smem=plgpu.SMEM((ROWS,), jnp.int32),
            latent_smem=tile(STAGES, KEYS, width),
            key_rope_smem=tile(STAGES, KEYS, narrow),
            weight_smem=tile(2, ROWS, HALF),
            row_smem=plgpu.SMEM((2, ROWS), jnp.float32),
            loaded=plgpu.Barrier(num_arrivals=4),
            full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            empty=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            meeting=plgpu.Barrier(num_arrivals=2),
        ),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, reduction_scratch_bytes=0
        ),
        interpret=interpret,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kernel:
    """Work of a thread block: references to global memory, then shared memory and barriers."""

    scale: float
    splits: int
    steps: Any
    positions: Any
    query: Any
    query_rope: Any
    latent: Any
    key_rope: Any
    out: Any
    sums: Any
    query_smem: Any
    query_rope_smem: Any
    position_smem: Any
    latent_smem: Any
    key_rope_smem: Any
    weight_smem: Any
    row_smem: Any
    loaded: Any
    full: Any
    empty: Any
    meeting: Any

    def run(self) -> None:
        """Gives each warpgroup its work."""
        warpgroup, request = lax.axis_index("warpgroup"), lax.axis_index("request")
        steps = self.steps[request]
        each = lax.div(steps + self.splits - 1, self.splits)
        first = lax.axis_index("split") * each
        count = jnp.clip(steps - first, 0, each)

        def producer() -> None:
            plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
            self._produce(request, first, count)

        def consumer() -> None:
            plgpu.set_max_registers(_CONSUMER_REGISTERS, action="increase")
            self._consume(warpgroup, request, first, count)

        lax.cond(warpgroup == PRODUCER, producer, consumer)

    @property
    def _ring(self) -> Ring:
        return Ring(self.full, self.empty, None, STAGES)

    def _rows(self) -> Any:
        return pl.ds(lax.axis_index("tile") * ROWS, ROWS)

    def _produce(self, request: jax.Array, first: jax.Array, count: jax.Array) -> None:
        own = request, self._rows()
        plgpu.copy_gmem_to_smem(self.positions.at[own], self.position_smem, self.loaded)
        for half in range(2):
            there = *own, self._half(half)
            plgpu.copy_gmem_to_smem(self.query.at[there], self.query_smem.at[half], self.loaded)
        plgpu.copy_gmem_to_smem(self.query_rope.at[own], self.query_rope_smem, self.loaded)

        def load(step: jax.Array, carry: None) -> None:
            slot = self._ring.acquire(step)
            there = request, pl.ds((first + step) * KEYS, KEYS)
            self._ring.load(self.latent.at[there], self.latent_smem, slot)
            self._ring.load(self.key_rope.at[there], self.key_rope_smem, slot)
            return carry

        lax.fori_loop(0, count, load, None)
        self._ring.drain(count)

    def _consume(
        self, consumer: jax.Array, request: jax.Array, first: jax.Array, count: jax.Array
    ) -> None:
        plgpu.barrier_wait(self.loaded)
        width = self.query_smem.shape[2]

        def step(number: jax.Array, carry: Any) -> Any:
            return self._add_step(consumer, first, number, carry)

        begin = (
            jnp.zeros((ROWS, width), jnp.float32),
            jnp.full((ROWS,), _LOWEST, jnp.float32),
            jnp.zeros((ROWS,), jnp.float32),
        )
        total, largest, sum_ = lax.fori_loop(0, count, step, begin)
        sum_ = jnp.maximum(self._exchange(consumer, sum_, lax.add), _LEAST_SUM)
        # Both have read their queries.
        self.query_smem[consumer] = (total / _across(sum_, total.shape)).astype(self.out.dtype)
        self._meet()  # Both have read what they exchanged.
        self.row_smem[consumer] = largest + jnp.log(sum_) * _LOG2E
        plgpu.commit_smem()
        place = lax.axis_index("split"), request, self._rows()
        there = *place, self._half(consumer)
        plgpu.copy_smem_to_gmem(self.query_smem.at[consumer], self.out.at[there])

        @pl.when(consumer == 0)
        def store_sums() -> None:
            plgpu.copy_smem_to_gmem(self.row_smem.at[0], self.sums.at[place])

        plgpu.wait_smem_to_gmem(0)

    def _half(self, number: Any) -> Any:
        """Columns of half of the latents."""
        width = self.query_smem.shape[2]
        return span(number * width, width)

    def _add_step(
        self, consumer: jax.Array, first: jax.Array, number: jax.Array, carry: Any
    ) -> Any:
        """Adds 64 positions to a consumer's sums, largest scores and sums of weights."""
        total, largest, sum_ = carry
        slot = self._ring.take(number)
        scores = self._scores(consumer, slot)
        position = (first + number) * KEYS + consumer * HALF
        position = position + lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        seen = position <= _across(self.position_smem[...], scores.shape)
        scores = jnp.where(seen, scores * (self.scale * _LOG2E), -jnp.inf)
        before = largest
        largest = self._exchange(consumer, jnp.maximum(before, scores.max(1)), lax.max)
        weights = jnp.exp2(scores - _across(largest, scores.shape))
        shrink = jnp.exp2(before - largest)
        sum_ = sum_ * shrink + weights.sum(1)
        self.weight_smem[consumer] = weights.astype(self.weight_smem.dtype)
        plgpu.commit_smem()
        self._meet()
        total = self._with_values(consumer, slot, total * _across(shrink, total.shape))
        self._ring.release(slot)
        return total, largest, sum_

    def _scores(self, consumer: jax.Array, slot: jax.Array) -> jax.Array:
        """Products of queries and keys, 64 x 32, for a consumer's half of the positions."""
        own = span(consumer * HALF, HALF)

        def product(accumulator: Any) -> jax.Array:
            for half in range(2):
                keys = self.latent_smem.at[slot, own, self._half(half)]
                plgpu.wgmma(accumulator, self.query_smem.at[half], keys.T)
            plgpu.wgmma(accumulator, self.query_rope_smem, self.key_rope_smem.at[slot, own, :].T)
            return accumulator[...]

        return pl.run_scoped(product, plgpu.ACC((ROWS, HALF), jnp.float32))

    def _with_values(self, consumer: jax.Array, slot: jax.Array, total: jax.Array) -> jax.Array:
        """total + weights values, for a consumer's half of the columns."""

        def product(accumulator: Any) -> None:
            for part in range(2):
                values = self.latent_smem.at[slot, span(part * HALF, HALF), self._half(consumer)]
                plgpu.wgmma(accumulator, self.weight_smem.at[part], values)

        return accumulate(total, product)

    def _exchange(self, consumer: jax.Array, own: jax.Array, join: Any) -> jax.Array:
        """join of a number for each row with that of the other consumer."""
        self.row_smem[consumer] = own
        self._meet()
        return join(own, self.row_smem[1 - consumer])

    def _meet(self) -> None:
        """Waits until both consumers are here."""
        plgpu.barrier_arrive(self.meeting)
        plgpu.barrier_wait(self.meeting)


def _across(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each row, repeated along the columns."""
    return lax.broadcast_in_dim(rows, shape, [0])


def accumulate(total: jax.Array, product: Callable[[Any], None]) -> jax.Array:
    """total, with what the tensor cores add to an accumulator that begins with it.

    JAX's interpreter has no accumulator that begins with a value; tests add to a fresh one there.
    """
    return pl.run_state(product)(plgpu.ACC.init(total))
