"""Loss of a head in steps equals its loss at once; `test_pipeline_step.py` has MTP beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from deepseek_jax.model.loss import head_loss
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.overlap import run_to_end
from deepseek_jax.train.last_stage import PARTS, _LossHead


@pytest.mark.parametrize(
    "rows, chunk",
    [(PARTS - 1, 64), (PARTS, 64), (3 * PARTS + 1, 64), (12 * PARTS, 5)],
    ids=["fewer than parts", "one each", "one is left", "more than chunks hold"],
)
def test_a_head_in_steps(rows, chunk):
    rng = np.random.default_rng(0)
    hidden, table = (jnp.float32(rng.normal(size=shape)) for shape in ((rows, 6), (6, 11)))
    targets, weights = jnp.int32(rng.integers(0, 11, rows)), jnp.float32(rng.random(rows))
    gradients = jax.grad(head_loss, (0, 1), has_aux=True)
    with axes.active(small.layout_of({})):
        head = _LossHead(table, targets[None], weights[None], chunk)
        head.rows = hidden[None]
        run_to_end(head.steps(range(PARTS // 2)))
        run_to_end(head.steps(range(PARTS // 2, PARTS)))
        head.rest()
        (d_hidden, d_table), entropies = gradients(hidden, table, targets, weights, rows)
    got = head.gradient()[0], head.d_table, head.entropies()[0]
    small.assert_close(got, (d_hidden, d_table, entropies))
