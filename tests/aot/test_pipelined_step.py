"""The ticks of DualPipe, compiled for 2,048 H100s: pipe 16 x replica 2 x node 8 x gpu 8.

All that is compiled needs `-m slow`: one layer of V3's sizes in each stage, without embedding and
head, in minutes; and the whole model, as `python -m deepseek_jax.plan step` does, in ten and more.
The scheduler then gets the costs of `cost_model`, by which it places messages. Nothing runs here.
"""

import collections
import re
from pathlib import Path

import pytest
from tiny import get_config as small

from configs import v3_671b
from deepseek_jax import config as configs
from deepseek_jax.aot import cluster, compiled, cost_model, hlo, pipelined_step, products
from deepseek_jax.config import ConfigError
from deepseek_jax.kernels.kernel_names import OUTER, PRODUCT, QUANTISE
from deepseek_jax.parallel.pipeline import schedule
from deepseek_jax.parallel.pipeline.lockstep import lockstep
from deepseek_jax.precision.scopes import FORWARD, INPUT_GRADIENT, PRODUCTS, WEIGHT_GRADIENT
from deepseek_jax.train import step

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")


def compiled_with_our_costs(config, mesh, lowered, folder):
    """Compiled program, its steady ticks, and the model's end."""
    rates = cost_model.Rates()
    # Machine code, most of the time, is made once: costs change when a kernel runs, not the kernel.
    once = {
        "xla_gpu_kernel_cache_file": str(folder / "kernels"),
        "xla_gpu_enable_llvm_module_compilation_parallelism": True,  # nothing is kept without
    }
    first = compiled.read(cluster.compile_for(lowered, once), mesh, pipelined_step.KERNELS)
    costs = cost_model.text(pipelined_step.costs(first, rates))
    second = cluster.compile_for(lowered, once, profile=costs)
    done = compiled.read(second, mesh, pipelined_step.KERNELS)
    return done, pipelined_step.read(done, rates), pipelined_step.read_last(done, rates)


def runs_both_chunks(program, pair, layers):
    """Two ticks of a forward and a backward chunk, each two hops out and two home in a layer."""
    axes = collections.Counter(c.axes for c in pair.messages)
    assert axes == {("node",): 8 * layers, ("gpu",): 8 * layers}
    # The chunks of a tick are independent; both depend on the tick before.
    assert pipelined_step.dependences(program, pair.computation) == []
    assert not any(copy.bytes > 32 * 2**20 for copy in pair.copies)


@pytest.fixture(scope="module")
def one_layer():
    """Config of V3, mesh, and the lowered ticks with one layer."""
    config = configs.parse(v3_671b.get_config())
    mesh = cluster.mesh(config.mesh)
    return config, mesh, pipelined_step.lower_alone(config, mesh)


@pytest.mark.slow
def test_a_tick_keeps_and_multiplies_in_fp8(one_layer):
    config, mesh, lowered = one_layer
    program = compiled.read(cluster.compile_for(lowered), mesh, pipelined_step.KERNELS)
    pair = pipelined_step.read(program, cost_model.Rates())
    runs_both_chunks(program, pair, layers=1)
    # In FP8, or before a norm: tokens after the slow hop; inputs of SwiGLU, of the routed and of
    # the shared expert, both as bytes; the layer's input, and that of its experts; query latents.
    slots = lockstep_slots(config)
    kept = {array.shape[1:]: array.dtype for array in pair.kept if array.shape[:1] == (slots,)}
    crossed, copies, words = 4096 * 4 * 5 // 4, 4096 * 8 * 5 // 4, (7168 + 7168 // 128) // 4
    assert {
        shape: dtype for shape, dtype in kept.items() if len(shape) > 1 and shape[-1] > 1000
    } == {
        (crossed, words): "u32",
        (copies, 4096): "u8",
        (1, 4096, 4096): "u8",
        (1, 4096, 7168): "bf16",
        (1, 4096, 1536): "bf16",
    }
    # Each tick: 9 linear layers, and the experts' 2 of them again in a round of overflow; backward
    # computes W^DKV, MLA's 2 up-projections and the experts' 2 of such a round again.
    found = products.counts(program.module, pipelined_step.KERNELS)
    forward, backward = 2 * (9 + 2 + 3 + 2), 2 * (9 + 2)
    assert {key: count for key, count in found.items() if key[0] != products.OTHER} == {
        (FORWARD, True): forward,
        (INPUT_GRADIENT, True): backward,
        (WEIGHT_GRADIENT, True): backward,
    }
    # Quantised by kernels: forward the rows of 7 inputs, of which one is also the message to the
    # experts, and of 2 more that are kept; in backward the rows of 3 that are computed again, the
    # tokens of 8, gradients of 7 outputs once, that of the experts' first product twice, and that
    # of the second one for its message and for its tokens. A round of overflow: a message and an
    # input forward; in backward these again, the tokens of 2, one that is kept, 2 gradients twice.
    rounds = 2 * (2 + 2 + 2 + 1 + 2 * 2)
    assert products.kernel_counts(program.module) == {
        PRODUCT: forward + backward,
        OUTER: backward,
        QUANTISE: 2 * (7 + 2) + 2 * (3 + 8 + 7 + 2 + 2) + rounds,
    }
    assert not list(products.fp8_casts(program.module))
    # Sums are in float32, and in a fixed order: no scatter adds atomically.
    for line, dtype in hlo.sums(program.module):
        assert dtype == "f32" and (line.opcode != "scatter" or line.unique), line
    assert program.peak_bytes < 20 * 2**30


@pytest.mark.slow
def test_each_chunk_hides_the_messages_of_the_other(one_layer, tmp_path):
    program, pair, last = compiled_with_our_costs(*one_layer, tmp_path)
    assert last is None
    runs_both_chunks(program, pair, layers=1)
    assert not any(message.is_sync for message in pair.messages)
    assert pipelined_step.under_the_other(pair) == len(pair.messages) == 16
    assert pair.hidden_share > 0.88


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory):
    """Program, two ticks and the end of V3's step: 61 layers and MTP over 16 stages."""
    config = configs.parse(v3_671b.get_config())
    mesh = cluster.mesh(config.mesh)
    folder = tmp_path_factory.mktemp("whole_model")
    return compiled_with_our_costs(config, mesh, step.lower(config, mesh), folder)


@pytest.mark.slow
def test_each_chunk_of_the_whole_model_hides_messages(whole_model):
    _, pair, _ = whole_model
    assert not any(message.is_sync for message in pair.messages)
    assert sum(bool(pipelined_step.under(message)) for message in pair.messages) >= 62
    # Kernels halve the estimated computation that messages have to lie under.
    assert pair.hidden_share > 0.9


@pytest.mark.slow
def test_the_whole_published_model(whole_model):
    """With the transfer of weights and the optimiser."""
    program, pair, last = whole_model
    runs_both_chunks(program, pair, layers=4)
    assert pipelined_step.under_the_other(pair) >= 55
    # MTP module of the end ranks under the main head: dispatch and combine over both hops.
    assert len(last.messages) == 8
    for message in last.messages:
        assert not message.is_sync and pipelined_step.under(message), message
    assert last.hidden_share > 0.97
    assert program.peak_bytes < 72 * 2**30  # of 80 GB, which are 74.5 GiB
    found = products.counts(program.module, pipelined_step.KERNELS)
    assert {kind for kind, in_fp8 in found if in_fp8} == set(PRODUCTS)
    assert all(kind == products.OTHER for kind, in_fp8 in found if not in_fp8)
    # Four MoE layers in each of two ticks, as above; the others are of the dense layers and of MTP.
    # Where a slot may have a dense layer, the shared expert is in a branch of its own, and so its
    # input is quantised apart from the message.
    assert found[FORWARD, True] == 2 * 4 * (9 + 2 + 3 + 2) + 34
    assert found[INPUT_GRADIENT, True] == found[WEIGHT_GRADIENT, True] == 2 * 4 * (9 + 2) + 18
    assert products.kernel_counts(program.module) == {
        PRODUCT: found[FORWARD, True] + found[INPUT_GRADIENT, True],
        OUTER: found[WEIGHT_GRADIENT, True],
        QUANTISE: 2 * (3 * (10 + 22 + 11) + 9 + 22 + 11) + 74,
    }


def pipelined(**mesh):
    c = small()
    c.mesh.update(**{"pipe": 2, "node": 2, "gpu": 2, **mesh})
    return configs.parse(c)


def test_a_whole_step_is_lowered_for_the_cluster():
    """With embedding, head, moving the weights to their ranks, and the optimiser."""
    config = pipelined()
    text = step.lower(config, cluster.mesh(config.mesh)).as_text()
    assert "num_partitions = 8" in text and text.count("all_to_all") > 16


@pytest.mark.parametrize(
    ("mesh", "file", "message"),
    [
        ({"pipe": 1}, None, "set mesh.pipe above 1"),
        ({"node": 1, "gpu": 1}, None, "set mesh.node or mesh.gpu above 1"),
        ({}, Path("costs.txt"), "--costs=costs.txt must end in .pbtxt"),
        ({}, Path("/no/costs.pbtxt"), "there is no folder /no"),
    ],
)
def test_what_cannot_be_read_is_refused_before_it_is_compiled(mesh, file, message):
    def lower(config, mesh):
        raise AssertionError("lowered before the check")

    with pytest.raises(ConfigError, match=re.escape(message)):
        pipelined_step.measure(pipelined(**mesh), lower, file)


def test_ticks_of_one_chunk_each_are_not_there_to_show():
    c = small()
    c.mesh.update(pipe=2, node=2, gpu=2)
    c.layout.pipeline = "1f1b"
    config = configs.parse(c)
    with pytest.raises(
        ConfigError, match=r"layout\.pipeline=1f1b .*; set layout\.pipeline=dualpipe "
    ):
        pipelined_step.lower_alone(config, cluster.mesh(config.mesh))


def lockstep_slots(config):
    made = schedule.BY_NAME[config.layout.pipeline](config.mesh.pipe, 2 * config.mesh.pipe)
    return lockstep(made).slots["kept"]
