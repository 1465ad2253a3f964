"""Products of two arrays with sums in float32, from which every recipe builds its matmuls."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata


def exact_einsum(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum of a and b, float32 out; float32 operands keep all their bits."""
    exact = "highest" if a.dtype == jnp.float32 else None  # never TF32
    return jnp.einsum(subscripts, a, b, precision=exact, preferred_element_type=jnp.float32)


def row_product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`exact_einsum` that sums over the rows of both, as in "MD,MF->DF": a weight's gradient.

    XLA's fast matmul for CPUs (YNNPACK) only sums over the last axis of its left operand; other
    products take up to twice the time (measured). On a CPU the narrower operand is therefore
    transposed in memory first, and made the left one.
    """
    of_a, of_b, of_out = subscripts.replace("->", ",").split(",")
    rows = "".join(letter for letter in of_a if letter not in of_out)

    def narrow_first(a: jax.Array, b: jax.Array) -> jax.Array:
        (narrow, of_narrow), (wide, of_wide) = sorted(((a, of_a), (b, of_b)), key=_size)
        left, right = _common(of_narrow, of_out), _common(of_wide, of_out)
        turned = transposed(f"{of_narrow}->{left}{rows}", narrow)
        product = exact_einsum(f"{left}{rows},{of_wide}->{left}{right}", turned, wide)
        if left + right == of_out:
            return product
        return transposed(f"{left}{right}->{of_out}", product)

    plain = functools.partial(exact_einsum, subscripts)
    return lax.platform_dependent(a, b, cpu=narrow_first, default=plain)


def transposed(subscripts: str, x: jax.Array) -> jax.Array:
    """The transpose of x as a pass of its own over memory, in a program for CPUs.

    XLA for CPUs transposes an array in memory in tiles. Fused with the operations that make the
    array, the same transpose goes element by element and takes four times as long (measured);
    `lax.optimization_barrier` is gone before fusion. Fusion never crosses a call, so the transpose
    is a function that XLA may not inline.
    """
    transpose = jax.jit(functools.partial(jnp.einsum, subscripts))
    with set_xla_metadata(inlineable="false"):
        return transpose(x)


def broadcast(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`jnp.broadcast_to`, whose gradient is summed in float32 and rounded once."""
    return jnp.broadcast_to(x.astype(jnp.float32), shape).astype(x.dtype)


@jax.custom_vjp
def table_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table, VD at integers M in [0, V) -> MD.

    The gradient of a table row is a sum over all positions that read it, thousands for a frequent
    token. It is summed in float32, whatever the dtype of the table, and rounded once. The order of
    each sum is fixed, on a GPU too.
    """
    return table.at[index].get(mode="promise_in_bounds")


_SavedRows = tuple[jax.Array, int, jax.Array]  # index M, V, an empty array of the table's dtype


def _table_rows_forward(table: jax.Array, index: jax.Array) -> tuple[jax.Array, _SavedRows]:
    return table_rows(table, index), (index, table.shape[0], jnp.zeros((0,), table.dtype))


def _table_rows_backward(saved: _SavedRows, d_rows: jax.Array) -> tuple[jax.Array, None]:
    index, rows, like = saved
    d_table = lax.platform_dependent(
        index,
        d_rows,
        cpu=functools.partial(sums_by_scatter, rows),
        default=functools.partial(sums_by_matmul, rows),
    )
    return d_table.astype(like.dtype), None


table_rows.defvjp(_table_rows_forward, _table_rows_backward)


def sums_by_scatter(rows: int, index: jax.Array, x: jax.Array) -> jax.Array:
    """Sums of the rows of x MD that have the same index M in [0, rows) -> (rows)D float32.

    A CPU adds the rows of a scatter one after the other; a GPU adds them atomically, in any order,
    even where the indices are sorted.
    """
    order = jnp.argsort(index, stable=True)
    x = x[order].astype(jnp.float32)
    return jax.ops.segment_sum(x, index[order], rows, indices_are_sorted=True)


BLOCK = 1024  # rows that a matmul of `sums_by_matmul` adds


def sums_by_matmul(rows: int, index: jax.Array, x: jax.Array) -> jax.Array:
    """`sums_by_scatter` without atomic additions: in an order that is the same on every run.

    In a block of rows, a matmul with the matrix of equal indices makes the sum of each index, and
    the first row of an index adds it to the result. Blocks follow one another.
    """
    block = min(BLOCK, index.shape[0])
    padding = -index.shape[0] % block
    index = jnp.pad(index, (0, padding), constant_values=rows)  # out of bounds: dropped
    x = jnp.pad(x, ((0, padding), (0, 0)))
    number = jnp.arange(block, dtype=index.dtype)

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, x = part
        equal = index[:, None] == index[None]
        first = ~jnp.tril(equal, -1).any(1)
        sums = exact_einsum("IJ,JD->ID", equal.astype(x.dtype), x)
        place = jnp.where(first, index, rows + number)
        return total.at[place].add(sums, mode="drop", unique_indices=True), None

    start = jnp.zeros((rows, x.shape[1]), jnp.float32)
    return lax.scan(add, start, (index.reshape(-1, block), x.reshape(-1, block, x.shape[1])))[0]


def _size(operand: tuple[jax.Array, str]) -> int:
    return operand[0].size


def _common(letters: str, others: str) -> str:
    return "".join(letter for letter in letters if letter in others)
