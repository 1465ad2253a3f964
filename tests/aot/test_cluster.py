"""Programs compiled for a cluster that is not there: traffic, overlap, and what is said without."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.aot import cluster, compiled, cost_model
from deepseek_jax.config import ConfigError, MeshConfig

needs_plugin = pytest.mark.skipif(cluster.missing() is not None, reason=cluster.missing() or "")

SIZES = MeshConfig(pipe=1, replica=1, node=4, gpu=8, tensor=1)
TOKENS, WIDTH, HIDDEN, LAYERS = 4096, 2048, 4096, 3
SENT = TOKENS * WIDTH * 2  # bytes, bfloat16
AXES = ("node", "gpu")


def layer(x, w, v):
    """An exchange over both hops, with a GEMM pair before and after."""
    x = lax.all_to_all(jax.nn.relu(x @ w) @ v, "node", 0, 0, tiled=True)
    x = lax.all_to_all(x, "gpu", 0, 0, tiled=True)
    return jax.nn.relu(x @ w) @ v


def chunks(x, y, w, v):
    for i in range(LAYERS):
        x, y = layer(x, w[i], v[i]), layer(y, w[i], v[i])
    return x, y


def chain(x, w, v):
    """Nothing is independent of anything: no exchange can be hidden."""
    return lax.scan(lambda x, wv: (layer(x, *wv), None), x, (w, v))[0]


def lowered(f, chunks, mesh):
    def array(shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    tokens, whole = P(AXES), P()
    x = array((mesh.shape["node"] * mesh.shape["gpu"] * TOKENS, WIDTH), tokens)
    weights = array((LAYERS, WIDTH, HIDDEN), whole), array((LAYERS, HIDDEN, WIDTH), whole)
    specs = (tokens,) * chunks + (whole, whole)
    out = specs[:chunks] if chunks > 1 else tokens
    local = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    return jax.jit(local).lower(*(x,) * chunks, *weights)


@pytest.fixture(scope="module")
def mesh():
    return cluster.mesh(SIZES)


@pytest.fixture(scope="module")
def two_chunks(mesh):
    low = lowered(chunks, 2, mesh)
    return low, compiled.read(cluster.compile_for(low), mesh)


@pytest.fixture(scope="module")
def one_chain(mesh):
    low = lowered(chain, 1, mesh)
    return low, compiled.read(cluster.compile_for(low), mesh)


@needs_plugin
def test_the_mesh_is_that_of_the_run(mesh):
    assert mesh.axis_names == ("pipe", "replica", "node", "gpu", "tensor")
    assert dict(mesh.shape) == dataclasses.asdict(SIZES)
    assert set(mesh.axis_types) == {AxisType.Explicit}
    # Eight GPUs of a host lie along gpu.
    hosts = [[d.process_index for d in node] for node in mesh.devices.reshape(4, 8)]
    assert hosts == [[host] * 8 for host in range(4)]
    assert len(jax.devices()) == 8 and jax.devices()[0].platform == "cpu"  # those of this process


@needs_plugin
def test_axes_and_bytes_of_every_all_to_all(two_chunks):
    exchanges = two_chunks[1].collectives
    assert [c.kind for c in exchanges] == ["all-to-all"] * 2 * 2 * LAYERS
    for axis, group in (("node", 4), ("gpu", 8)):
        along = [c for c in exchanges if c.axes == (axis,)]
        assert len(along) == 2 * LAYERS
        assert {(c.bytes, c.group, c.times, c.inside) for c in along} == {(SENT, group, 1, "entry")}
        sent = SENT * (group - 1) / group  # all but its own part
        want = (sent, 0) if axis == "node" else (0, sent)
        assert {(c.slow_bytes, c.fast_bytes) for c in along} == {want}


@needs_plugin
def test_every_gemm_is_counted(two_chunks, one_chain):
    each = 2 * TOKENS * WIDTH * HIDDEN
    flops = [g.flops * g.times for g in two_chunks[1].gemms]
    assert flops == [each] * 2 * 4 * LAYERS
    # In a loop: its four GEMMs, each as often as there are layers.
    assert [(g.flops, g.times) for g in one_chain[1].gemms] == [(each, LAYERS)] * 4


@needs_plugin
def test_gemms_are_found_in_fusions_too(mesh):
    fused = cluster.compile_for(lowered(chain, 1, mesh), {"xla_gpu_enable_triton_gemm": True})
    gemms = compiled.read(fused, mesh).gemms
    assert [(g.op, g.times) for g in gemms] == [("dot", LAYERS)] * 4
    assert {g.flops for g in gemms} == {2 * TOKENS * WIDTH * HIDDEN}


@needs_plugin
def test_one_chunk_s_exchange_runs_beside_the_other_s_gemms(two_chunks):
    exchanges = two_chunks[1].collectives
    hidden = [c for c in exchanges if c.overlapped]
    assert len(hidden) >= 2 * LAYERS, [(c.name, c.is_sync, len(c.gemms)) for c in exchanges]
    assert {axis for c in hidden for axis in c.axes} == {"node", "gpu"}


@needs_plugin
def test_a_chain_has_nothing_to_hide_behind(one_chain):
    exchanges = one_chain[1].collectives
    assert [(c.axes, c.inside, c.times) for c in exchanges] == [
        (("node",), "while", LAYERS),
        (("gpu",), "while", LAYERS),
    ]
    assert not any(c.overlapped or c.gemms for c in exchanges)
    timeline = cost_model.replay(one_chain[1], cost_model.costs(one_chain[1], cost_model.Rates()))
    assert timeline.hidden_share == pytest.approx(0, abs=1e-9)


@needs_plugin
def test_without_async_collectives_nothing_overlaps(two_chunks, mesh):
    option = {"xla_gpu_disable_async_collectives": "ALLTOALL"}
    program = compiled.read(cluster.compile_for(two_chunks[0], option), mesh)
    assert len(program.collectives) == 4 * LAYERS
    assert not any(c.overlapped for c in program.collectives)


@needs_plugin
def test_a_cost_profile_hides_more(two_chunks, mesh):
    low, plain = two_chunks
    told = compiled.read(cost_model.compile_profiled(low, mesh), mesh)
    before, after = (
        cost_model.replay(p, cost_model.costs(p, cost_model.Rates())) for p in (plain, told)
    )
    assert before.compute == pytest.approx(after.compute)
    assert after.total < 0.98 * before.total
    assert after.hidden_share > before.hidden_share + 0.05
    # What is not GEMMs is the memory traffic of a relu and of the weights' slices.
    floor = 2 * 4 * LAYERS * 2 * TOKENS * WIDTH * HIDDEN / cost_model.Rates().flops
    assert floor < after.compute < 1.2 * floor


@needs_plugin
def test_links_that_differ_change_the_schedule_s_length(two_chunks):
    """The slow hop weighs as much as its link is slow: 3 of 4 parts at 50 GB/s, 7 of 8 at 160."""
    program = two_chunks[1]
    waits = cost_model.replay(program, cost_model.costs(program, cost_model.Rates())).waits
    seconds = {axis: [w.seconds for w in waits if w.collective.axes == (axis,)] for axis in AXES}
    assert seconds["node"] == pytest.approx([SENT * 3 / 4 / 50e9] * 2 * LAYERS)
    assert seconds["gpu"] == pytest.approx([SENT * 7 / 8 / 160e9] * 2 * LAYERS)


@needs_plugin
def test_peak_memory_and_copies(two_chunks):
    program = two_chunks[1]
    weights, tokens = 2 * LAYERS * WIDTH * HIDDEN * 2, SENT
    assert program.peak_bytes >= weights + 4 * tokens  # arguments and results
    # Less than every intermediate at once: four of TOKENS x WIDTH and two of TOKENS x HIDDEN.
    assert program.peak_bytes < weights + (4 + 2 * LAYERS * (4 + 2 * HIDDEN // WIDTH)) * tokens
    assert [c.bytes for c in program.copies] == sorted(c.bytes for c in program.copies)[::-1]


@needs_plugin
def test_the_cluster_of_the_report():
    """2,048 GPUs: pipe 16 x replica 2 x node 8 x gpu 8."""
    mesh = cluster.mesh(MeshConfig(pipe=16, replica=2, node=8, gpu=8, tensor=1))
    assert mesh.devices.size == 2048
    program = compiled.read(cluster.compile_for(lowered(chain, 1, mesh)), mesh)
    node, gpu = program.collectives
    assert (node.axes, node.group, node.slow_bytes) == (("node",), 8, SENT * 7 / 8)
    assert (gpu.axes, gpu.group, gpu.fast_bytes) == (("gpu",), 8, SENT * 7 / 8)


@needs_plugin
def test_an_unknown_option_is_an_error(one_chain):
    with pytest.raises(Exception, match="xla_gpu_no_such_option"):
        cluster.compile_for(one_chain[0], {"xla_gpu_no_such_option": True})


@pytest.mark.parametrize(
    ("installed", "platforms", "message"),
    [
        ({}, "cpu", r"needs the CUDA plugin of JAX: pip install -e \"\.\[cluster\]\""),
        ({"jax-cuda13-plugin": "0.1.0"}, "cpu", "jax-cuda13-plugin 0.1.0 differ.*same version"),
        ({"jax-cuda12-plugin": jax.__version__}, None, "JAX_PLATFORMS is not set.*=cpu"),
        ({"jax-cuda13-plugin": jax.__version__}, "cuda", "JAX_PLATFORMS is cuda"),
        ({"jax-cuda13-plugin": jax.__version__}, "cpu", "needs NVIDIA's ptxas"),
    ],
)
def test_what_is_missing_is_said(monkeypatch, tmp_path, installed, platforms, message):
    monkeypatch.setattr(cluster, "_version", installed.get)
    monkeypatch.setattr(cluster, "_PTXAS", tmp_path / "ptxas")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(cluster, "_platforms", lambda: platforms)
    with pytest.raises(ConfigError, match=message):
        cluster.mesh(SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"node": -1}, "needs the size of every axis"),
        ({"tensor": 2}, "mesh.gpu=8 x mesh.tensor=2 is 16 GPUs in one node"),
    ],
)
def test_meshes_that_no_cluster_has(change, message):
    with pytest.raises(ConfigError, match=message):
        cluster.mesh(dataclasses.replace(SIZES, **change))
