"""Matmul recipes: the precision of the model's products, as a value with one interface.

Sensitive parts (router, norms, softmax, loss) do not ask a recipe: they are float32 always
(section 3.3.1 of the report).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.kernels.kernel_names import (
    ATTENTION,
    ATTENTION_PADDED,
    LATENT_ATTENTION,
    OUTER,
    PRODUCT,
    QUANTISE,
)
from deepseek_jax.precision import fp8_grouped, fp8_linear, fp8_operands, kept_output
from deepseek_jax.precision.einsum import exact_einsum, row_product
from deepseek_jax.precision.fp8_form import Fp8Form
from deepseek_jax.precision.fp8_hopper import H100, HopperProducts
from deepseek_jax.precision.fp8_weights import Fp8Weight, Linear, of_part
from deepseek_jax.precision.grouped import grouped_matmul
from deepseek_jax.precision.kept_input import from_fp8_input
from deepseek_jax.precision.linear_input import (
    LinearInput,
    TiledArray,
    in_dtype,
    numbers,
    with_tiled_gradient,
)
from deepseek_jax.precision.payload import Payload
from deepseek_jax.precision.saved import Saved, save


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Operands and results in `activation_dtype`, products accumulated in float32.

    A weight has three forms. The *master* is float32 and moves with each step. The *stored* form
    is an array in `stored_dtype`, as loading a checkpoint leaves it; where `keeps_blocks`, it is an
    `Fp8Weight` if the checkpoint holds FP8 blocks. The *prepared* form is made by `prepare` from
    either of the two, once per step, before ZeRO's parts are gathered; it is what gets gathered and
    what `einsum` and `grouped` take. Code outside `precision/` asks these methods about all three,
    and never which recipe it has.

    Here the prepared form is an array in `activation_dtype`. `Fp8Recipe` makes an `Fp8Weight` of
    the weight of a linear layer: quantised once per step, and gathered in that form. Gradients of
    prepared weights go through `weight_gradients`, and are arrays in every recipe.

    Attributes:
      name: the value of `precision.recipe`.
      activation_dtype: dtype of activations, in matmuls and between them.
      kernels: names in `kernels/kernel_names.py` of the kernels that compute on a GPU, where each
        passed its check. All else, and everything on another platform, is in the portable form.
    """

    name: str
    activation_dtype: jnp.dtype
    kernels: frozenset[str] = frozenset()

    def prepare(
        self, weight: Any, *, sensitive: bool, linear: Linear | None = None
    ) -> jax.Array | Fp8Weight:
        """The form of a weight that a step computes with.

        Args:
          weight: a master or a stored weight, of one layer or a stack of layers; the part of it
            that this device holds.
          sensitive: whether it stays float32 in every recipe.
          linear: dimensions of the weight of a linear layer; None for others, such as the embedding
            and the head, which are in `activation_dtype` in every recipe.
        """
        del linear
        return weight if sensitive else weight.astype(self.activation_dtype)

    def stored_dtype(self, *, linear: bool) -> jnp.dtype:
        """The narrowest dtype of weights from which `prepare` makes the same as from masters.

        Loading casts to it while it streams, before a weight reaches its device; sensitive weights
        stay as they are.

        Args:
          linear: whether the weight is that of a linear layer.
        """
        del linear
        return self.activation_dtype

    @property
    def keeps_blocks(self) -> bool:
        """Whether `prepare` leaves weights that a checkpoint holds in FP8 blocks as they are."""
        return False

    def check_scales(self, scales: np.ndarray, source: str) -> None:
        """Refuses scales of FP8 blocks that this recipe does not compute with; by default none.

        Args:
          source: the tensor that holds them, for the message.

        Raises:
          ConfigError: scales of another kind than `precision.scales`.
        """

    def prepared_bytes(
        self, shape: tuple[int, ...], *, sensitive: bool, linear: Linear | None = None
    ) -> int:
        """Bytes of the prepared form of a float32 weight; nothing is allocated."""
        prepare = functools.partial(self.prepare, sensitive=sensitive, linear=linear)
        leaves = jax.tree.leaves(jax.eval_shape(prepare, jax.ShapeDtypeStruct(shape, jnp.float32)))
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)

    @property
    def known_kernels(self) -> frozenset[str]:
        """Names of the kernels that this recipe has a use for."""
        if self.activation_dtype != jnp.bfloat16:
            return frozenset()
        return frozenset({ATTENTION, ATTENTION_PADDED, LATENT_ATTENTION})

    def with_kernels(self, names: frozenset[str], sms: int) -> "Recipe":
        """The recipe with these of its kernels in use.

        Args:
          sms: SMs of a GPU that a kernel with a thread block for each SM may use.
        """
        del sms
        return dataclasses.replace(self, kernels=names & self.known_kernels)

    @property
    def matmul_dtype(self) -> str:
        """Dtype whose peak bounds the products, as `hardware/chips.py` names it."""
        return self.name  # these recipes are named after it

    @property
    def serving(self) -> "Recipe":
        """The recipe of generation with weights that this one trained."""
        return self

    def payload(self, fp8: bool) -> Payload:
        """Encoding of rows in messages, in FP8 or in the dtype of activations."""
        return Payload(fp8)

    def einsum(self, subscripts: str, x: LinearInput, weight: Any) -> jax.Array:
        """Linear layer: contraction of an activation with a prepared weight."""
        dtype = self.activation_dtype
        return _linear(subscripts, numbers(x).astype(dtype), weight.astype(dtype)).astype(dtype)

    def grouped(self, rows: LinearInput, weight: Any, sizes: jax.Array, likely: int) -> jax.Array:
        """Linear layers of all experts at once; arguments as in `grouped_matmul`."""
        array, weight = (x.astype(self.activation_dtype) for x in (numbers(rows), weight))
        return grouped_matmul(array, weight, sizes, likely=likely)

    def grouped_for_message(
        self, rows: LinearInput, weight: Any, sizes: jax.Array, likely: int
    ) -> TiledArray:
        """`grouped`, of which a message in FP8 brings the gradient, as a `TiledArray`.

        Returns:
          MF, beside tiles of zeros, which only have the shape of the gradient's.
        """
        return with_tiled_gradient(self.grouped(rows, weight, sizes, likely))

    def from_kept(
        self,
        name: Saved,
        layer: Callable[..., Any],
        x: jax.Array,
        weight: Any,
        *rest: jax.Array,
    ) -> Any:
        """layer(x, weight, *rest), of which backward needs x: a residual with a name.

        Args:
          layer: closes over no array; it multiplies with the weight by this recipe. It may get a
            `TiledArray` for x.
          weight: a prepared weight.
        """
        return layer(save(name, x), weight, *rest)

    def from_kept_output(
        self,
        core: kept_output.Core,
        layer: Callable[[jax.Array, Any], jax.Array],
        inputs: kept_output.Inputs,
        weight: Any,
    ) -> jax.Array:
        """layer(core(*inputs), weight), of which backward needs the core's output.

        Arguments as of `kept_output.from_kept_output`.
        """
        return kept_output.from_kept_output(self._output_form, core, layer, inputs, weight)

    @property
    def _output_form(self) -> kept_output.SavedForm:
        return kept_output.UNCHANGED


FLOAT32 = Recipe("float32", jnp.dtype(jnp.float32))
BFLOAT16 = Recipe("bfloat16", jnp.dtype(jnp.bfloat16))


@dataclasses.dataclass(frozen=True)
class Fp8Recipe(Recipe):
    """Linear layers with operands in E4M3 and scales of tiles and blocks (section 3.3.2).

    All three matmuls of a linear layer, forward and both gradients, have FP8 operands and sums in
    float32; see `fp8_linear`. Activations between them are bfloat16.

    Attributes:
      power_of_two: whether scales are powers of two.
      hopper: the kernels of the products, with the SMs that they may use.
    """

    power_of_two: bool = True
    hopper: HopperProducts = H100

    def prepare(
        self, weight: Any, *, sensitive: bool, linear: Linear | None = None
    ) -> jax.Array | Fp8Weight:
        if sensitive or linear is None:
            return super().prepare(weight, sensitive=sensitive)
        if isinstance(weight, Fp8Weight):
            return of_part(weight, linear)
        return fp8_operands.blocks(weight, linear, self._form)

    def stored_dtype(self, *, linear: bool) -> jnp.dtype:
        # Blocks made of bfloat16 weights would be rounded twice.
        return jnp.dtype(jnp.float32) if linear else self.activation_dtype

    @property
    def keeps_blocks(self) -> bool:
        return True

    def check_scales(self, scales: np.ndarray, source: str) -> None:
        if self.power_of_two and not (np.frexp(scales)[0] == 0.5).all():
            raise ConfigError(
                f"{source} holds scales that are no powers of two, so its FP8 weights do not keep "
                "their bits under precision.scales=power_of_two; set precision.scales=free"
            )

    @property
    def matmul_dtype(self) -> str:
        return "float8"

    @property
    def serving(self) -> Recipe:
        # Absorbed decoding multiplies with parts of weights, along other axes.
        return dataclasses.replace(BFLOAT16, kernels=self.kernels & BFLOAT16.known_kernels)

    @property
    def known_kernels(self) -> frozenset[str]:
        quantisers = {QUANTISE} if self.power_of_two else set()
        return super().known_kernels | {PRODUCT, OUTER} | quantisers

    def with_kernels(self, names: frozenset[str], sms: int) -> Recipe:
        hopper = dataclasses.replace(self.hopper, sms=sms)
        return dataclasses.replace(self, kernels=names & self.known_kernels, hopper=hopper)

    def payload(self, fp8: bool) -> Payload:
        return Payload(fp8, self._kept_form)

    def einsum(self, subscripts: str, x: LinearInput, weight: Any) -> jax.Array:
        x = in_dtype(x, self.activation_dtype)
        return fp8_linear.einsum(subscripts, x, weight, form=self._form)

    def grouped(self, rows: LinearInput, weight: Any, sizes: jax.Array, likely: int) -> jax.Array:
        rows = in_dtype(rows, self.activation_dtype)
        return fp8_grouped.grouped_matmul(rows, weight, sizes, likely=likely, form=self._form)

    def grouped_for_message(
        self, rows: LinearInput, weight: Any, sizes: jax.Array, likely: int
    ) -> TiledArray:
        rows = in_dtype(rows, self.activation_dtype)
        return fp8_grouped.for_message(rows, weight, sizes, likely=likely, form=self._form)

    @property
    def _form(self) -> Fp8Form:
        return Fp8Form(self.power_of_two, self.kernels, self.hopper)

    @property
    def _kept_form(self) -> Fp8Form:
        """Form of residuals and messages, whose scales are powers of two always."""
        return dataclasses.replace(self._form, power_of_two=True)

    def from_kept(
        self,
        name: Saved,
        layer: Callable[..., Any],
        x: jax.Array,
        weight: Any,
        *rest: jax.Array,
    ) -> Any:
        return from_fp8_input(name, layer, self._kept_form, x, weight, *rest)

    @property
    def _output_form(self) -> kept_output.SavedForm:
        return kept_output.E5M6


FP8 = Fp8Recipe("fp8", jnp.dtype(jnp.bfloat16))
_RECIPES = {recipe.name: recipe for recipe in (FLOAT32, BFLOAT16, FP8)}


def recipe(name: str, scales: str = "power_of_two") -> Recipe:
    """The recipe that `precision.recipe` names.

    Args:
      scales: `precision.scales`: "power_of_two" or "free"; read by FP8 alone.

    Raises:
      ConfigError: no such recipe.
    """
    if name not in _RECIPES:
        raise ConfigError(f"precision.recipe is {name!r}; known recipes: {', '.join(_RECIPES)}")
    chosen = _RECIPES[name]
    if isinstance(chosen, Fp8Recipe):
        return dataclasses.replace(chosen, power_of_two=scales == "power_of_two")
    return chosen


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    return exact_einsum(subscripts, x, weight).astype(x.dtype)


_Operands = tuple[jax.Array, jax.Array]  # x and weight of `_linear`


def _forward(subscripts: str, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, _Operands]:
    return _linear(subscripts, x, weight), (x, weight)


def _backward(subscripts: str, saved: _Operands, d_out: jax.Array) -> _Operands:
    """d_x = d_out weight^T and d_weight = x^T d_out, each in the dtype of its operand."""
    x, weight = saved
    (of_x, of_weight), of_out = subscripts.split("->")[0].split(","), subscripts.split("->")[1]
    d_x = exact_einsum(f"{of_out},{of_weight}->{of_x}", d_out, weight)
    d_weight = row_product(f"{of_x},{of_out}->{of_weight}", x, d_out)
    return d_x.astype(x.dtype), d_weight.astype(weight.dtype)


_linear.defvjp(_forward, _backward)
