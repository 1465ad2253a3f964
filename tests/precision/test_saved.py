"""Residuals that a recompute policy saves keep their numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from deepseek_jax.model import remat
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.precision.saved import Saved, save
from deepseek_jax.train import optimizer, step
from deepseek_jax.train import state as states


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float32])
def test_a_saved_residual_keeps_its_numbers(dtype):
    """The largest of the dtype among them, which jax.checkpoint rounds to NaN in E4M3."""
    largest = float(jnp.finfo(dtype).max)
    x = jnp.asarray([0.0, 1.0, 240.0, 256.0, 448.0, -448.0, largest, -largest], jnp.float32)

    def run(x):
        kept = save(Saved.GATE_UP, x.astype(dtype))
        return jnp.sin(x) * kept.astype(jnp.float32)

    layer = remat.BY_NAME["report"].step(run)
    out, d_x = jax.jit(lambda x: (jax.vjp(layer, x)[0], jax.vjp(layer, x)[1](jnp.ones_like(x))))(x)
    kept = np.asarray(x.astype(dtype).astype(jnp.float32))
    np.testing.assert_allclose(out, np.sin(x) * kept, rtol=1e-5)
    assert np.isfinite(d_x[0]).all()


@pytest.mark.parametrize("recompute", sorted(remat.BY_NAME))
def test_no_residual_of_a_step_in_fp8_is_rounded(recompute):
    """No reduce_precision of a dtype whose largest exponent holds numbers, in the whole step."""
    config = small.config(
        precision_recipe="fp8", precision_dispatch="fp8", layout_recompute=recompute
    )
    layout, adam = meshes.layout(config), optimizer.build(config.optimizer)
    mesh = meshes.build(config.mesh)
    start = states.abstract(config, states.shardings(config, layout, mesh, adam), adam)
    rest = step.abstract_arguments(config, layout, mesh)
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(step.make_step(config, layout, mesh, adam))(start, *rest)
    text = str(program)
    rounded = [line for line in text.splitlines() if "= reduce_precision" in line]
    assert "f8_e4m3fn" in text
    assert [line for line in rounded if "f8_e4m3fn" in line.split("=")[0]] == []
