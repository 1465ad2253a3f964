"""FP8 kernels in the whole steps of layouts, compiled for four or eight virtual H100s.

One layer alone is in `test_products.py`, DualPipe at V3's size in `test_pipelined_step.py`.
"""

import collections

import pytest
import small

from deepseek_jax.aot import cluster, compiled, pipelined_step, products
from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT, QUANTISE
from deepseek_jax.precision.scopes import FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT
from deepseek_jax.train import step

# Every part of a device has whole blocks of 128x128: where parts cut them, products are portable.
WHOLE_BLOCKS = dict(
    model_d_model=512, model_q_latent=128, model_kv_latent=128, model_d_expert=128,
    model_d_dense=512,
)  # fmt: skip
PIPELINE = dict(mesh_pipe=2, layout_recompute="attention")
LAYOUTS = {
    "ZeRO-3": dict(layout_zero=3, layout_recompute="report"),
    "two micro-batches in flight": dict(
        layout_micro_batches_in_flight=2, batch_micro_sequences=8, layout_recompute="report"
    ),
    "deferred gradients of weights": dict(**PIPELINE, layout_defer_weight_gradients=True),
    "1F1B": dict(**PIPELINE, layout_pipeline="1f1b"),
}


@pytest.mark.slow  # three minutes each
@pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_all_products_of_linear_layers_are_kernels(layout):
    """And all tiles of activations; blocks of weights that devices share are made before loops."""
    config = small.config(
        precision_recipe="fp8", precision_dispatch="fp8", model_mtp_depth=0, mesh_node=2,
        mesh_gpu=2, layout_capacity_factor=2.0, **WHOLE_BLOCKS, **layout,
    )  # fmt: skip
    mesh = cluster.mesh(config.mesh)
    lowered = step.lower(config, mesh)
    program = compiled.read(cluster.compile_for(lowered), mesh, pipelined_step.KERNELS)
    found = collections.Counter(
        (each.kind, each.kernel)
        for each in products.products(program.module, pipelined_step.KERNELS)
        if each.in_fp8
    )
    assert set(found) == {
        (FORWARD, PRODUCT), (INPUT_GRADIENT, PRODUCT), (WEIGHT_GRADIENT, OUTER)
    }  # fmt: skip
    # A deferred gradient is in the text twice, for each chunk of a rank; of these one runs.
    again = found[WEIGHT_GRADIENT, OUTER] - found[INPUT_GRADIENT, PRODUCT]
    assert again > 0 if config.layout.defer_weight_gradients else again == 0
    others = products.counts(program.module, pipelined_step.KERNELS)
    assert {kind for kind, in_fp8 in others if not in_fp8} == {products.OTHER}
    kernels = products.kernel_counts(program.module)
    assert kernels[PRODUCT] == found[FORWARD, PRODUCT] + found[INPUT_GRADIENT, PRODUCT]
    assert kernels[OUTER] == found[WEIGHT_GRADIENT, OUTER]
    assert set(kernels) == {PRODUCT, OUTER, QUANTISE}
    assert not [place for place in products.fp8_casts(program.module) if "while" in place]
