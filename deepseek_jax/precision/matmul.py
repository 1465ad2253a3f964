"""Matmul recipes: what precision the model's products run in, as a value with one signature.

Sensitive parts (router, norms, softmax, loss) do not ask a recipe: they are float32 always
(section 3.3.1 of the report).
"""

import dataclasses

import jax
import jax.numpy as jnp

from deepseek_jax.config import ConfigError
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

    def einsum(self, subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        """One linear layer: contraction of an activation with a weight."""
        precision = "highest" if self.compute == jnp.float32 else None  # no TF32 behind our back
        product = jnp.einsum(
            subscripts,
            x.astype(self.compute),
            weight.astype(self.compute),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
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
