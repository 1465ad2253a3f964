"""Matmul recipes: what precision the model's products run in, as a value with one signature.

Sensitive parts (router, norms, softmax, loss) do not ask a recipe: they are float32 always
(section 3.3.1 of the report).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from deepseek_jax.config import ConfigError
from deepseek_jax.precision.einsum import exact_einsum, row_product
from deepseek_jax.precision.grouped import grouped_matmul


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Operands in `compute`, products accumulated in float32, results in `compute`.

    Attributes:
      name: what `precision.recipe` calls it.
      compute: dtype of weights and activations in matmuls and between them.
    """

    name: str
    compute: jnp.dtype

    @property
    def matmul_dtype(self) -> str:
        """Dtype whose peak bounds the products, as `hardware/chips.py` names it."""
        return self.name  # these recipes are named after it

    def einsum(self, subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        """One linear layer: contraction of an activation with a weight."""
        product = _linear(subscripts, x.astype(self.compute), weight.astype(self.compute))
        return product.astype(self.compute)

    def grouped(
        self, rows: jax.Array, weight: jax.Array, sizes: jax.Array, likely: int
    ) -> jax.Array:
        """One linear layer of all experts at once: `precision/grouped.py`."""
        rows, weight = rows.astype(self.compute), weight.astype(self.compute)
        return grouped_matmul(rows, weight, sizes, likely=likely)


FLOAT32 = Recipe("float32", jnp.dtype(jnp.float32))
BFLOAT16 = Recipe("bfloat16", jnp.dtype(jnp.bfloat16))
_RECIPES = {recipe.name: recipe for recipe in (FLOAT32, BFLOAT16)}


def recipe(name: str) -> Recipe:
    if name not in _RECIPES:
        raise ConfigError(f"precision.recipe is {name!r}; known recipes: {', '.join(_RECIPES)}")
    return _RECIPES[name]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(subscripts, x, weight):
    return exact_einsum(subscripts, x, weight).astype(x.dtype)


def _forward(subscripts, x, weight):
    return _linear(subscripts, x, weight), (x, weight)


def _backward(subscripts, saved, d_out):
    """d_x = d_out weight^T and d_weight = x^T d_out, their operands in the dtype of forward's."""
    x, weight = saved
    (of_x, of_weight), of_out = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    d_x = exact_einsum(f"{of_out},{of_weight}->{of_x}", d_out, weight)
    d_weight = row_product(f"{of_x},{of_out}->{of_weight}", x, d_out)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_linear.defvjp(_forward, _backward)
