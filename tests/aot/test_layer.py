"""Traffic and overlap of one V3 layer, read from its program for 2,048 H100s (section 3.2.2).

Pipe 16 x replica 2 x node 8 x gpu 8; nothing runs here.
"""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import pytest
import small

from configs import v3_671b
from deepseek_jax import config as configs
from deepseek_jax.aot import cluster, compiled, layer
from deepseek_jax.model.router import select_experts, visits
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.experts import dispatch
from deepseek_jax.parallel.experts.traffic import message_bytes
from deepseek_jax.plan.messages import buffers

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")

MATMUL = 1e9  # FLOPs; counting and sorting make tiny ones


def config(**layout):
    """Config of one stage: a layer does not depend on the 16 stages."""
    c = v3_671b.get_config()
    c.mesh.update(pipe=1, replica=2, node=8, gpu=8, tensor=1)
    c.layout.update(recompute="report", attention_block=2048, **layout)
    c.precision.recipe = "bfloat16"  # compiles sooner than FP8, with the same messages
    c.batch.micro_sequences = 1 * 2 * 8 * 8  # one of 4096 tokens on each device
    return configs.parse(c)


def messages(config):
    """The all-to-alls of the first round, which is not in a loop."""
    mesh = cluster.mesh(dataclasses.replace(config.mesh, pipe=16))
    program = compiled.read(cluster.compile_for(layer.lower(config, mesh)), mesh, layer.KERNELS)
    return [c for c in program.collectives if c.kind == "all-to-all" and c.inside == "entry"]


def planned(config):
    """Bytes of each hop's message, for each of the four times a token crosses it."""
    model = config.model
    with axes.active(meshes.layout(config)):
        way = dispatch.of(config)
        plan = way.plan(config.batch.length, model.top_k, model.experts)
    return plan, message_bytes(plan, way.payload, model.d_model, jnp.bfloat16, model.top_k)


def copies_per_token(config, hop):
    plan, found = planned(config)
    per_copy = found["send"][hop] // (plan.hops[hop].parts * plan.hops[hop].slots)
    return found["send"][hop] / per_copy / config.batch.length / config.layout.capacity_factor


def test_two_micro_batches_in_flight():
    """Bytes of the plan on their axes, each message under a matmul of the other micro-batch."""
    found = messages(config(micro_batches_in_flight=2))
    plan, want = planned(config())
    assert [hop.over for hop in plan.hops] == [("node",), ("gpu",)]
    # Twice, for two micro-batches: recomputation asks for no message again.
    want = collections.Counter(
        (over, each[hop])
        for hop, over in enumerate([("node",), ("gpu",)])
        for each in want.values()
        for _ in range(2)
    )
    assert collections.Counter((c.axes, c.bytes) for c in found) == want
    assert len(found) == 16
    for c in found:
        # The slow hop connects GPUs of one number, the fast hop those of one node.
        assert (c.slow_bytes > 0, c.fast_bytes > 0) == (c.axes == ("node",), c.axes == ("gpu",))
        assert c.group == 8
        assert not c.is_sync, c
        assert any(gemm.flops > MATMUL for gemm in c.gemms), c


def test_four_copies_cross_between_nodes_where_flat_sends_eight():
    flat = config(dispatch="flat")
    want, two_hop = planned(flat)[1], planned(config())[1]
    assert copies_per_token(flat, 0) == pytest.approx(8)
    assert copies_per_token(config(), 0) == pytest.approx(4)
    assert two_hop["send"][0] == want["send"][0] / 2


@pytest.mark.slow  # the program of two hops is compiled above
def test_flat_messages_are_those_of_the_plan():
    flat = config(dispatch="flat")
    _, want = planned(flat)
    found = messages(flat)
    assert sorted(c.bytes for c in found) == sorted(each[0] for each in want.values())
    assert all(c.axes == ("node", "gpu") and c.group == 64 for c in found)


def test_nodes_that_a_token_visits():
    """With random scores, the slow hop sends as many copies as its buffer is sized for."""
    model = config().model
    scores = jax.random.uniform(jax.random.key(0), (1, 4096, model.experts))
    experts, _ = select_experts(scores, jnp.zeros(model.experts), model)
    nodes = visits(experts, model.experts, 8).sum() / 4096
    gpus = visits(experts, model.experts, 64).sum() / 4096
    assert 3.9 < nodes <= 4 and 6.5 < gpus < 8
    each = [int(visits(experts[:, i : i + 1], model.experts, 8).sum()) for i in range(256)]
    assert max(each) <= 4


@pytest.mark.parametrize("recipe", ["bfloat16", "fp8"])
def test_a_layer_is_lowered_in_its_recipe(recipe):
    """In FP8 the weights are E4M3 arguments, and each gradient is one float32 array."""
    c = small.config(precision_recipe=recipe, mesh_node=2, mesh_gpu=2)
    lowered = layer.lower(c, cluster.mesh(c.mesh))
    assert ("f8E4M3FN" in lowered.as_text()) == (recipe == "fp8")
    arrays, gradients = map(jax.tree.leaves, (lowered.args_info[0][0], lowered.out_info[0]))
    narrow = sum(array.dtype == jnp.float8_e4m3fn for array in arrays)  # each beside its scales
    assert (narrow > 0) == (recipe == "fp8") and len(gradients) == len(arrays) - narrow
    assert not any(gradient.dtype == jnp.float8_e4m3fn for gradient in gradients)


# (dispatch, what the payload travels in, nodes, GPUs of each)
SLOW = pytest.mark.slow
LAYOUTS = [
    ("two_hop", "fp8", 2, 4),
    pytest.param("two_hop", "compute", 4, 2, marks=SLOW),
    pytest.param("flat", "fp8", 2, 2, marks=SLOW),
    pytest.param("two_hop", "fp8", 1, 4, marks=SLOW),
    pytest.param("flat", "compute", 4, 1, marks=SLOW),
]


@pytest.mark.parametrize(("way", "payload", "nodes", "gpus"), LAYOUTS)
def test_planned_bytes_are_those_of_small_programs(way, payload, nodes, gpus):
    """Each hop's bytes as `plan` has them, on layouts of one and of two hops."""
    c = small.config(
        precision_recipe="bfloat16", precision_dispatch=payload, precision_kernels="portable",
        mesh_node=nodes, mesh_gpu=gpus, layout_dispatch=way, layout_recompute="report",
    )  # fmt: skip
    mesh = cluster.mesh(c.mesh)
    program = compiled.read(cluster.compile_for(layer.lower(c, mesh)), mesh)
    sent = [each for each in program.collectives if each.kind == "all-to-all"]
    tokens = c.batch.micro_sequences * c.batch.length // (nodes * gpus)
    by_hop = list(zip(*buffers(c, tokens).values(), strict=True))
    axes_of = [("node",), ("gpu",)] if way == "two_hop" else [("node", "gpu")]
    axes_of = [tuple(a for a in each if getattr(c.mesh, a) > 1) for each in axes_of]
    axes_of = [each for each in axes_of if each]
    want = {over: sorted(set(hop)) for over, hop in zip(axes_of, by_hop, strict=True)}
    found = collections.defaultdict(set)
    for each in sent:
        found[each.axes].add(each.bytes)
    assert {over: sorted(sizes) for over, sizes in found.items()} == want
