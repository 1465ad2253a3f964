"""Recipes: dtypes of operands, sums and results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from deepseek_jax.config import ConfigError
from deepseek_jax.precision import fp8_tiles, recipes
from deepseek_jax.precision.fp8_weights import Linear

pytestmark = pytest.mark.usefixtures("strict_dtypes")

SIZES = np.array([5, 0, 11], np.int32)


def normal(*shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def einsum(recipe, x, weight):
    return recipe.einsum("BSD,DF->BSF", x[None], weight)[0]


def grouped(recipe, x, weight):
    """Every expert has the same weight, so that all rows see `weight`."""
    experts = jnp.broadcast_to(weight, (len(SIZES), *weight.shape))
    return recipe.grouped(x, experts, SIZES, x.shape[0])


@pytest.mark.parametrize("product", [einsum, grouped])
def test_float32_is_float64_to_its_last_digits(product):
    x, weight = normal(16, 256, seed=0), normal(256, 24, seed=1)
    got = product(recipes.FLOAT32, jnp.asarray(x), jnp.asarray(weight))
    assert got.dtype == jnp.float32
    small.assert_close(got, x.astype(np.float64) @ weight.astype(np.float64), rtol=1e-6)


@pytest.mark.parametrize("product", [einsum, grouped])
def test_bfloat16_rounds_operands_and_result_and_nothing_between(product):
    x, weight = normal(16, 256, seed=0), normal(256, 24, seed=1)
    got = product(recipes.BFLOAT16, jnp.asarray(x), jnp.asarray(weight))
    assert got.dtype == jnp.bfloat16
    rounded = [part.astype(jnp.bfloat16).astype(np.float64) for part in (x, weight)]
    # One rounding to 8 bits is off by 2^-8 of the number at most; sums kept in it lose far more.
    np.testing.assert_allclose(
        np.asarray(got, np.float64), rounded[0] @ rounded[1], rtol=2**-8, atol=1e-5
    )


@pytest.mark.parametrize("product", [einsum, grouped])
def test_bfloat16_sums_in_float32(product):
    """256 + 1 is 256 in bfloat16, so a sum kept in it never reaches 512."""
    x = np.ones((16, 257), np.float32)
    x[:, 0] = 256
    got = product(recipes.BFLOAT16, jnp.asarray(x), jnp.ones((257, 8), jnp.float32))
    np.testing.assert_array_equal(got.astype(np.float32), 512)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("product", [einsum, grouped])
def test_masters_get_float32_gradients(product, name):
    x, weight = normal(16, 32, seed=0), normal(32, 8, seed=1)

    def total(x, weight):
        return product(recipes.recipe(name), x, weight).astype(jnp.float32).sum()

    d_x, d_weight = jax.grad(total, (0, 1))(jnp.asarray(x), jnp.asarray(weight))
    assert d_x.dtype == d_weight.dtype == jnp.float32
    rtol = 1e-6 if name == "float32" else 2**-7  # operands and gradients, each rounded to 8 bits
    small.assert_close(d_x, np.broadcast_to(weight.sum(1), x.shape), rtol)
    small.assert_close(d_weight, np.broadcast_to(x.sum(0)[:, None], weight.shape), rtol)


SHAPES = {
    "BSD,DX->BSX": [(2, 5, 8), (8, 6)],
    "BSQ,QHX->BSHX": [(2, 5, 8), (8, 3, 4)],
    "BSHW,HWD->BSD": [(2, 5, 3, 4), (3, 4, 8)],
    "XBSD,XDY->BSY": [(2, 3, 5, 4), (2, 4, 6)],
}


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
@pytest.mark.parametrize("subscripts", SHAPES)
def test_backward_is_the_two_transposed_products(subscripts, name):
    recipe = recipes.recipe(name)
    dtype = recipe.activation_dtype
    x, weight = (normal(*shape, seed=i) for i, shape in enumerate(SHAPES[subscripts]))
    x, weight = (np.asarray(jnp.asarray(part, dtype), np.float64) for part in (x, weight))
    of_x, of_weight, of_out = subscripts.replace("->", ",").split(",")
    pull = normal(*np.einsum(subscripts, x, weight).shape, seed=2)
    pull = np.asarray(jnp.asarray(pull, dtype), np.float64)

    def run(x, weight, pull):
        out, back = jax.vjp(lambda *a: recipe.einsum(subscripts, *a), x, weight)
        return back(pull.astype(out.dtype))

    args = (jnp.asarray(part, dtype) for part in (x, weight, pull))
    got = [np.asarray(part, np.float64) for part in jax.jit(run)(*args)]
    want = [
        np.einsum(f"{of_out},{of_weight}->{of_x}", pull, weight),
        np.einsum(f"{of_x},{of_out}->{of_weight}", x, pull),
    ]
    # bfloat16: one rounding of the result to 8 bits, of operands that are exact.
    tolerance = dict(rtol=1e-5, atol=1e-6) if name == "float32" else dict(rtol=2**-8, atol=1e-5)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, **tolerance)


@pytest.mark.parametrize("product", [einsum, grouped])
def test_float32_asks_for_all_of_it(product):
    """On a GPU the default would be TF32, with 10 bits."""
    arguments = [jnp.ones((16, 64)), jnp.ones((64, 8))]
    text = str(jax.make_jaxpr(lambda *a: product(recipes.FLOAT32, *a))(*arguments))
    assert text.count("Precision.HIGHEST") >= text.count("dot_general") > 0


def test_by_name():
    assert recipes.recipe("float32") is recipes.FLOAT32
    assert recipes.recipe("bfloat16") is recipes.BFLOAT16
    with pytest.raises(ConfigError, match=r"precision\.recipe is 'float64'.*float32, bfloat16"):
        recipes.recipe("float64")


@pytest.mark.parametrize("linear", [None, Linear.whole("io", (5, 7))], ids=["plain", "linear"])
@pytest.mark.parametrize(
    "recipe", [recipes.FLOAT32, recipes.BFLOAT16, recipes.FP8], ids=lambda r: r.name
)
def test_preparing_a_stored_weight_is_preparing_its_master(recipe, linear):
    master = jnp.asarray(normal(5, 7, seed=0))
    stored = master.astype(recipe.stored_dtype(linear=linear is not None))
    ready, want = (recipe.prepare(x, sensitive=False, linear=linear) for x in (stored, master))
    jax.tree.map(np.testing.assert_array_equal, ready, want)
    assert recipe.prepare(master, sensitive=True) is master


def test_preparing_a_weight_in_fp8_changes_nothing():
    linear = Linear.whole("io", (200, 140))
    once = recipes.FP8.prepare(
        jnp.asarray(normal(200, 140, seed=0)), sensitive=False, linear=linear
    )
    again = recipes.FP8.prepare(once, sensitive=False, linear=linear)
    assert again.values is once.values and again.scales is once.scales


@pytest.mark.parametrize("recipe, each", [(recipes.FLOAT32, 4), (recipes.BFLOAT16, 2)])
def test_bytes_of_a_prepared_weight(recipe, each):
    assert recipe.prepared_bytes((3, 5), sensitive=False) == 15 * each
    assert recipe.prepared_bytes((3, 5), sensitive=True) == 60


def test_bytes_of_a_prepared_weight_count_all_its_arrays():
    class Tiled(recipes.Recipe):
        def prepare(self, weight, *, sensitive, linear=None):
            return weight if sensitive else fp8_tiles.quantise_tiles(weight, power_of_two=True)

    recipe = Tiled("tiled", jnp.dtype(jnp.bfloat16))
    assert recipe.prepared_bytes((3, 256), sensitive=False) == 3 * (256 + 2 * 4)
