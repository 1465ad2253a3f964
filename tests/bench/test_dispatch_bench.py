"""`bench dispatch`: messages, bytes and copies of a dispatch, and the pieces of one GPU."""

import dataclasses
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.sharding import SingleDeviceSharding
from runs import ROOT

from configs import v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.aot import cluster, compiled, hlo
from deepseek_jax.bench import dispatch, dispatch_pieces
from deepseek_jax.bench.dispatch_pieces import DispatchCase, DispatchPiece
from deepseek_jax.bench.grouped import Shape
from deepseek_jax.config import MeshConfig
from deepseek_jax.hardware import chips
from deepseek_jax.model.router import select_experts
from deepseek_jax.parallel import axes
from deepseek_jax.parallel.experts.exchange import Exchange
from deepseek_jax.parallel.experts.traffic import message_bytes
from deepseek_jax.precision.payload import FP8_PAYLOAD
from deepseek_jax.table import text

TOKENS = 16


def tiny(buffer):
    config = configs.parse(v3_tiny.get_config())
    return dataclasses.replace(
        config, layout=dataclasses.replace(config.layout, capacity_factor=buffer)
    )


def copies(mesh, way, router):
    """Copies of a token to other nodes, and to other GPUs of the same node: with sets."""
    config = dispatch.sized(tiny(2.0), mesh, way)
    node, gpu = config.mesh.node, config.mesh.gpu
    chosen = dispatch.choose(router, TOKENS * node * gpu, config.model)
    slow = fast = 0
    for number, experts in enumerate(chosen):
        home = divmod(number // TOKENS, gpu)
        there = {divmod(int(e) // dispatch.EXPERTS_PER_DEVICE, gpu) for e in experts}
        if way == "flat":
            slow += sum(place[0] != home[0] for place in there)
            fast += sum(place[0] == home[0] and place != home for place in there)
        else:  # over the slow network to the GPU of the same number, from there to the others
            slow += sum(n != home[0] for n in {n for n, _ in there})
            fast += sum(g != home[1] for _, g in there)
    return slow / len(chosen), fast / len(chosen)


def test_messages_and_copies_of_both_ways():
    found = dispatch.measure(tiny(math.inf), tokens=TOKENS, repeats=1, meshes=("2x4",))
    messages = {(row["way"], row["over"]): row for row in found["messages"]}
    assert set(messages) == {("flat", "node gpu"), ("two_hop", "node"), ("two_hop", "gpu")}
    assert all(row["messages"] == 4 and row["as_compiled"] for row in messages.values())
    wide = 4 * dispatch.WIDTH + 4 * 8 + 2 * 8  # float32 as it is, weights, names
    assert messages["two_hop", "node"]["send"] == 2 * TOKENS * wide
    assert messages["flat", "node gpu"]["send"] == 8 * TOKENS * wide
    assert len(found["time"]) == 6
    for row in found["time"]:
        want = copies("2x4", row["way"], row["router"])
        assert (row["slow"], row["fast"]) == pytest.approx(want, rel=1e-6)
        assert row["served"] == row["rounds"] == 1 and row["milliseconds"] > 0
        assert row["nodes"] == 1  # half of two groups, each of which is a node
        assert row["of_flat"] == 1 or row["way"] == "two_hop"
    balanced, _, one = found["time"][::2]
    assert one["busiest"] > balanced["busiest"] >= 1


def test_small_buffers_take_rounds():
    """On one node both ways are one hop, and one program."""
    found = dispatch.measure(tiny(0.5), tokens=TOKENS, repeats=1, meshes=("1x8",))
    assert [row["over"] for row in found["messages"]] == ["gpu", "gpu"]
    assert all(row["messages"] == 4 and row["as_compiled"] for row in found["messages"])
    for row in found["time"]:
        assert row["served"] <= 0.5 and row["rounds"] >= 2
        assert row["fast"] < copies("1x8", "flat", row["router"])[1] and row["slow"] == 0


def test_routers():
    model = dispatch.sized(tiny(2.0), "4x2", "flat").model
    load = {}
    for router in dispatch.ROUTERS:
        chosen = dispatch.choose(router, 512, model)
        assert chosen.shape == (512, 8) and all(len(set(token)) == 8 for token in chosen.tolist())
        assert max(len(set(token // 16)) for token in chosen) == 2  # of 4 groups
        load[router] = np.sort(np.bincount(chosen.ravel(), minlength=64))[::-1]
    assert load["one"][0] == 512 and load["one"][1] < 200
    assert load["balanced"][0] < 2 * load["balanced"][-1]
    assert load["skewed"][0] > 5 * load["skewed"][-1]


@pytest.mark.parametrize(
    "name, flags, devices",
    [("dispatch", "", 8), ("moe", "", 1), ("dispatch", "--emulate_devices=3", 3)],
)
def test_devices_are_emulated(name, flags, devices):
    code = (
        "import jax; from deepseek_jax.bench import __main__ as bench; "
        f"bench.flags.FLAGS(['bench', *{flags.split()}]); bench._emulate({name!r}); "
        "print(jax.device_count())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [str(devices)], done.stderr


def test_tables_are_as_wide_as_their_cells():
    found = {"empty": [], "table": [{"x": True, "longer": 1.5}, {"x": False, "longer": None}]}
    assert text(found).splitlines() == [
        "table",
        "    x     longer",
        "  yes      1.500",
        "   no  not known",
    ]


# Pieces of one GPU, on this host and compiled for a virtual one.

CASE = DispatchCase(16, 256, 4, 2, 32, 4, 2, "bfloat16", (Shape(48, 3, 16, 32),), steps=2)


@pytest.fixture(scope="module")
def moves():
    return dispatch_pieces.moves(tiny(1.0), CASE)


def layout():
    sizes = dict(pipe=1, replica=1, node=CASE.nodes, gpu=CASE.gpus, tensor=1)
    return axes.Layout({"experts": ("node", "gpu")}, sizes, zero=0)


def test_the_route_of_one_is_that_of_the_mesh(moves):
    """Route of the first device, against 4 x 2 devices that exchange tokens."""
    config, key = tiny(1.0), jax.random.split(jax.random.key(0), 3)[0]
    every = jax.random.uniform(key, (1, 8 * CASE.tokens, CASE.experts))
    model = dispatch_pieces._model(config, CASE)
    experts = select_experts(every, jnp.zeros((CASE.experts,)), model)[0][0]
    _, _, named = moves[0].changes
    np.testing.assert_array_equal(named, experts[: CASE.tokens] + 1)

    def local(experts):
        with axes.active(layout()):
            way = dispatch_pieces.hops(config, CASE)
            everything, weights = jnp.ones(experts.shape, jnp.bool_), jnp.ones(experts.shape)
            tokens = jnp.zeros((CASE.tokens, 128))
            mine = way.send(Exchange(tokens, weights, experts, everything, CASE.experts)).route
            return jax.tree.map(lambda x: x[None], mine)

    both = P(("node", "gpu"))
    mesh = jax.make_mesh((4, 2), ("node", "gpu"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    run = jax.shard_map(local, mesh=mesh, in_specs=both, out_specs=both, check_vma=False)
    want = jax.tree.map(lambda x: x[0], jax.device_get(jax.jit(run)(experts)))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(moves[0].fixed), want)


def test_buffers_of_the_pieces_are_those_of_the_messages(moves):
    with axes.active(layout()):
        plan = dispatch_pieces.hops(tiny(1.0), CASE).plan(CASE.tokens, CASE.top_k, CASE.experts)
    want = message_bytes(plan, FP8_PAYLOAD, CASE.width, CASE.dtype, CASE.top_k)
    out_slow, out_fast, out_local, _, home_fast, home_slow = moves
    nbytes = [out_fast.changes.nbytes, out_local.changes.nbytes]
    assert nbytes == want["send"]
    assert [home_slow.changes.nbytes, home_fast.changes.nbytes] == want["combine"]
    # What has to be read, and what has to be written.
    assert out_slow.bytes == 2 * CASE.tokens * CASE.width + want["send"][0]
    filled = int(home_slow.fixed.hops[0].used.sum())
    per_slot = want["combine"][0] // (plan.hops[0].parts * plan.hops[0].slots)
    result = (2 * CASE.width + CASE.top_k) * CASE.tokens
    assert home_slow.bytes == filled * per_slot + result and filled > 0


def test_repeating_changes_nothing(moves):
    pieces = moves + dispatch_pieces.matmuls(CASE, "cpu")
    assert {p.name for p in pieces[6:]} == {"dense 16 x 32", "shares 16 x 32"}
    for piece in pieces:
        want = jax.jit(piece.run)(piece.changes, piece.fixed)
        state = jax.tree.map(jnp.copy, piece.changes), jax.tree.map(jnp.zeros_like, want)
        changes, out = dispatch_pieces.repeated(piece, 3)(state, piece.fixed)
        jax.tree.map(np.testing.assert_array_equal, changes, piece.changes)
        jax.tree.map(np.testing.assert_array_equal, out, want)


def test_each_run_waits_for_the_last():
    """Arguments of the next run depend on the result, but change for one impossible value only."""
    given, out = (jnp.ones((2, 3)), jnp.ones(3)), jnp.ones((4, 5), jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, dispatch_pieces._after(given, out), given)
    rare = jax.lax.bitcast_convert_type(jnp.uint16(0x5A5A), jnp.bfloat16)
    changed, other = dispatch_pieces._after(given, out.at[0, 0].set(rare))
    np.testing.assert_array_equal(changed, [[0, 1, 1], [1, 1, 1]])
    np.testing.assert_array_equal(other, given[1])


def test_every_run_of_a_piece_is_in_the_loop_of_an_h100(moves):
    """The loop computes the result again in each step and copies no large array."""
    if problem := cluster.missing():
        pytest.skip(problem)
    mesh = cluster.mesh(MeshConfig(pipe=1, replica=1, node=1, gpu=1, tensor=1))
    place = SingleDeviceSharding(mesh.devices.flat[0])

    def abstract(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    for piece in moves:
        out = jax.eval_shape(piece.run, piece.changes, piece.fixed)
        state = abstract(piece.changes), abstract(out)
        traced = dispatch_pieces.repeated(piece, 7).trace(state, abstract(piece.fixed))
        program = traced.lower(lowering_platforms=("cuda",)).compile()
        module = hlo.parse(program.as_text())
        loops = [c for c, (inside, n) in compiled.scheduled(module).items() if n == 7]
        lines = [line for c in loops for line in module.computations[c].values()]
        largest = max(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(out))
        assert any(line.bytes == largest and line.opcode == "fusion" for line in lines), piece.name
        assert not [copy for copy in compiled.copies(module) if copy.bytes >= 1024], piece.name


def test_one_gpu_has_its_tables(moves, monkeypatch):
    monkeypatch.setattr(dispatch_pieces, "moves", lambda config, case: moves)
    found = dispatch_pieces.measure(tiny(1.0), case=CASE, repeats=1)
    assert [row["piece"] for row in found["moves"]][:2] == ["pack slow hop", "pack fast hop"]
    assert len(found["moves"]) == 6 and len(found["matmuls"]) == 2
    for row in found["moves"] + found["matmuls"]:
        assert row["microseconds"] > 0 and row["times_floor"] is None
        assert row.get("gb_per_s", 0) + row.get("tflops_per_s", 0) > 0


def test_the_floor_is_the_slower_of_memory_and_matrix_units():
    piece = DispatchPiece("", lambda *_: None, (), (), bytes=3_350_000, flops=989_500_000)
    assert piece.floor_seconds(chips.H100, "bfloat16") == pytest.approx(1e-6)
    more = dataclasses.replace(piece, flops=2 * piece.flops)
    assert more.floor_seconds(chips.H100, "bfloat16") == pytest.approx(2e-6)
