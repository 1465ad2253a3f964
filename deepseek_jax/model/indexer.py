"""Lightning indexer of V3.2: the positions that a query attends to (DeepSeek Sparse Attention).

Section 2.1 of the DeepSeek-V3.2-Exp report. The index score of a query at t for a position s is

    I_{t,s} = sum_j w_{t,j} ReLU(q_{t,j} . k_s)                                      (equation 1)

and a query attends to the `index_top_k` positions s <= t with the largest scores (equation 2). The
queries q come from MLA's query latent; the key k, which all heads share, and the weights w come
from the normalised input of the layer. The factors J^-1/2 and I^-1/2 of the released code are in w.

The released code rotates queries and keys by a Hadamard matrix, which changes no product, and then
rounds them to FP8 in tiles of 1x128. Here they stay in the dtype of activations; the cache keeps
keys in FP8 if its format is "fp8".

B batch, S query, T position, D model width, Q query latent, J head of the indexer, I its width,
R rotary width, K positions that are chosen.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from deepseek_jax.config import ModelConfig
from deepseek_jax.model import params, rotary
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.norm import LayerNorm
from deepseek_jax.precision.einsum import exact_einsum

KEY_NORM_EPS = 1e-6  # epsilon of the key's LayerNorm in the released code
FEW_QUERIES = 8  # of a decoding step with drafts

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines of `rotary.cos_sin`, SR or BSR
Index = tuple[jax.Array, jax.Array, jax.Array]  # queries BSJI, weights BSJ float32, keys BTI


class LightningIndexer(nnx.Module):
    """Queries, weights and keys of the index scores; the same on every tensor-parallel rank."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        model, heads = ("model", config.d_model), (None, config.index_heads)
        width, std = ("head_width", config.index_width), config.init_std
        self.query_up = params.weight(
            rngs, ("q_latent", config.q_latent), heads, width, std=std, roles="ioo"
        )  # QJI
        self.key_down = params.weight(rngs, model, width, std=std, roles="io")  # DI
        self.key_norm = LayerNorm(config.index_width, eps=KEY_NORM_EPS, axis="head_width")
        self.head_weights = params.weight(rngs, model, heads, std=std, sensitive=True)  # DJ
        self.config = config

    def key(self, x: jax.Array, how: Execution, rotation: Rotation) -> jax.Array:
        """Keys k BSI of x BSD, rotated: what decoding caches."""
        key = self.key_norm(how.recipe.einsum("BSD,DI->BSI", x, self.key_down[...]))
        return rotated_by_hadamard(rotary.rotate_halves(key, *rotation))

    @jax.named_scope("indexer")
    def query(
        self, x: jax.Array, latent: jax.Array, how: Execution, rotation: Rotation
    ) -> tuple[jax.Array, jax.Array]:
        """Queries q BSJI of the query latents BSQ, and weights w BSJ float32 of x BSD."""
        query = how.recipe.einsum("BSQ,QJI->BSJI", latent, self.query_up[...])
        query = rotary.rotate_halves(query, *(part[..., None, :] for part in rotation))
        weights = exact_einsum("BSD,DJ->BSJ", x.astype(jnp.float32), self.head_weights[...])
        scale = (self.config.index_heads * self.config.index_width) ** -0.5
        return rotated_by_hadamard(query), scale * weights


def hadamard(width: int) -> np.ndarray:
    """Hadamard matrix II of 1 and -1; times its transpose a multiple of the identity.

    A width that is no power of two is rotated in equal runs, the longest that are one: a matrix of
    blocks, with 0 between them.
    """
    matrix: np.ndarray = np.ones((1, 1))
    run = width & -width
    while len(matrix) < run:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return np.kron(np.eye(width // run), matrix)


def rotated_by_hadamard(x: jax.Array) -> jax.Array:
    """x ...I times the matrix: outliers are spread over all elements, and no product changes."""
    width = x.shape[-1]
    matrix = jnp.asarray(hadamard(width), x.dtype)
    scale = (width & -width) ** -0.5  # apart: bfloat16 holds 1 and -1 exactly
    return (scale * exact_einsum("...X,XY->...Y", x, matrix)).astype(x.dtype)


@jax.named_scope("indexer")
def index_scores(query: jax.Array, weights: jax.Array, key: jax.Array) -> jax.Array:
    """I of equation 1, BST float32, for queries BSJI, their weights BSJ and keys BTI.

    The products of many queries are made head by head, and again in backward, so that those of one
    head are in memory. For few queries one matmul reads the keys once, as its left operand: on a
    CPU five times as fast as with the keys on the right (measured).
    """
    if query.shape[1] <= FEW_QUERIES:
        products = exact_einsum("BTI,BSJI->BTSJ", key, query)
        return jnp.sum(weights[:, None] * jax.nn.relu(products), axis=3).swapaxes(1, 2)

    @jax.checkpoint
    def add(total: jax.Array, of_head: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        query, weights = of_head
        products = exact_einsum("BSI,BTI->BST", query, key)
        return total + weights[..., None] * jax.nn.relu(products), None

    start = jnp.zeros((*query.shape[:2], key.shape[1]), jnp.float32)
    return lax.scan(add, start, (jnp.moveaxis(query, 2, 0), jnp.moveaxis(weights, 2, 0)))[0]


def among_the_largest(scores: jax.Array, count: int) -> jax.Array:
    """Whether each of the scores ...T float32 is among the `count` largest, ...T bool.

    Exactly `count` are; of equal ones those that come first, as with `lax.top_k`. The least of them
    is found bit by bit, by counting: on a CPU six times as fast as `lax.top_k`, which sorts many
    rows (measured).
    """
    bits = lax.bitcast_convert_type(_one_zero(scores), jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)  # integers in the same order
    order = lax.bitcast_convert_type(order ^ jnp.int32(-(2**31)), jnp.uint32)

    def raised(least: jax.Array, bit: jax.Array) -> tuple[jax.Array, None]:
        higher = least | (jnp.uint32(1) << bit)
        enough = (order >= higher).sum(-1, keepdims=True) >= count
        return jnp.where(enough, higher, least), None

    least = jnp.zeros((*scores.shape[:-1], 1), jnp.uint32)
    least, _ = lax.scan(raised, least, jnp.arange(31, -1, -1, dtype=jnp.uint32))
    above, equal = order > least, order == least
    left = count - above.sum(-1, keepdims=True)  # at least 1
    number = lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)

    def further(end: jax.Array, bit: jax.Array) -> tuple[jax.Array, None]:
        later = end + (jnp.int32(1) << bit)
        few = (equal & (number < later)).sum(-1, keepdims=True) < left
        return jnp.where(few, later, end), None  # fewer than `left` are before `end`

    bits_of_length = jnp.arange(scores.shape[-1].bit_length() - 1, -1, -1, dtype=jnp.int32)
    end, _ = lax.scan(further, jnp.zeros(least.shape, jnp.int32), bits_of_length)
    return above | (equal & (number <= end))


def chosen_positions(scores: jax.Array, positions: jax.Array, count: int) -> jax.Array:
    """Positions BSK int32 of the `count` largest scores BST that are not after the query.

    Args:
      positions: BS, of the queries; a query with fewer positions up to itself gets later ones, too.
    """
    past = positions[:, :, None] >= jnp.arange(scores.shape[-1])[None, None]
    return lax.top_k(jnp.where(past, _one_zero(scores), -jnp.inf), count)[1]


def _one_zero(scores: jax.Array) -> jax.Array:
    """The scores with 0 in place of -0, which `lax.top_k` puts below it."""
    return jnp.where(scores == 0, 0.0, scores)
