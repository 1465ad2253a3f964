"""Checkpoints: what is read back, on which mesh, and after which accident."""

import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.checkpoint.chunks import axes_to_cut
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import ConfigError

if jax.config.jax_num_cpu_devices != 8:
    jax.config.update("jax_num_cpu_devices", 8)

REPOSITORY = Path(__file__).parents[2]
META = {"tokens": 10**13, "data": {"epoch": 0, "position": [1, 2]}, "loss": 0.1}


def shardings(devices: int, spec: P, memory: str | None = None):
    mesh = jax.make_mesh(
        (devices,), ("gpu",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )
    return NamedSharding(mesh, spec, memory_kind=memory)


def example(seed: int = 0, devices: int = 8, dim: int = 0):
    """A state like a train state: masters, bfloat16 moments, an average in host memory."""
    rng = np.random.default_rng(seed)
    spec = P(*[None] * dim, "gpu")
    split, whole = shardings(devices, spec), shardings(devices, P())
    pinned = shardings(devices, spec, "pinned_host")
    weight = rng.normal(size=(64, 128)).astype(np.float32)
    return {
        "params": {"w": jax.device_put(weight, split), "b": jax.device_put(weight[0], whole)},
        "moments": [jax.device_put(jnp.asarray(weight * k, jnp.bfloat16), split) for k in (1, 2)],
        "average": jax.device_put(weight + 1, pinned),
        "step": jax.device_put(np.int32(seed), whole),
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "checkpoints", keep=3)
    yield store
    store.close()


def written(store: Store, *steps: int) -> Path:
    """The store's directory, with these steps in it."""
    for step in steps:
        store.save(step, example(step), {**META, "step": step})
    store.wait()
    return store._directory


def reopened(store: Store) -> Store:
    return Store(store._directory, keep=3)


def data_file(step: Path) -> Path:
    """The largest file of array data; small leaves are kept inside the index."""
    return max(step.glob("state/*/d/*"), key=lambda file: file.stat().st_size)


def test_nothing_saved_is_none_and_writes_nothing(store):
    assert store.restore(abstract(example())) is None
    assert store.newest_meta() is None and store.steps() == []
    assert not store._directory.exists()


def test_every_leaf_and_meta_come_back_exactly(store):
    written(store, 7)
    step, state, meta = reopened(store).restore(abstract(example()))
    assert (step, meta) == (7, {**META, "step": 7})
    assert_same(state, example(7))
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(example()), strict=True):
        assert leaf.sharding == want.sharding  # the mesh and the memory it was asked for
    assert reopened(store).newest_meta() == meta


def one_device():
    place = SingleDeviceSharding(jax.devices()[3])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), example())


@pytest.mark.parametrize(
    "target",
    [lambda: abstract(example(devices=4)), lambda: abstract(example(dim=1)), one_device],
    ids=["half the devices", "other dimension", "one device"],
)
def test_restores_onto_another_mesh(store, target):
    written(store, 1)
    _, state, _ = reopened(store).restore(target())
    assert_same(state, example(1))
    for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(target()), strict=True):
        assert leaf.sharding == want.sharding


def test_partial_reads_only_what_is_asked(store):
    written(store, 1)
    asked = {"params": abstract(example())["params"]}
    _, state, _ = reopened(store).restore(asked, partial=True)
    assert_same(state, {"params": example(1)["params"]})
    with pytest.raises(ConfigError, match=r"average \(found float32\[64, 128\], expected nothing"):
        reopened(store).restore(asked)


def test_a_donated_state_is_saved_as_it_was(store):
    state = example(1)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s["params"]), donate_argnums=0)
    before = jax.tree.map(lambda x: np.array(x), state["params"])
    store.save(1, {"params": state["params"]}, {})
    for _ in range(3):
        state["params"] = step({"params": state["params"]})
    _, saved, _ = store.restore({"params": abstract(state["params"])})
    assert_same(saved["params"], before)


def test_keeps_the_newest(store):
    directory = written(store, 10, 20, 30, 40, 50)
    assert store.steps() == [30, 40, 50]
    assert sorted(p.name for p in directory.iterdir()) == ["30", "40", "50"]


def test_a_step_is_written_once(store):
    directory = written(store, 5)
    before = (directory / "5").stat().st_mtime_ns
    written(store, 5)
    assert (directory / "5").stat().st_mtime_ns == before


def test_refuses_to_save_behind_a_step_it_did_not_restore(store):
    written(store, 20)
    other = reopened(store)
    with pytest.raises(ConfigError, match=r"already holds step 20.*another workdir"):
        other.save(10, example(), {})
    other.restore(abstract(example()))
    written(other, 21)
    assert other.steps() == [20, 21]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint\.keep is 0"):
        Store(tmp_path, keep=0)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


ACCIDENTS = {
    "no files": lambda d: [shutil.rmtree(d), d.mkdir()],
    "no record": lambda d: (d / "_CHECKPOINT_METADATA").unlink(),
    "short record": lambda d: truncate(d / "_CHECKPOINT_METADATA"),
    "wrong record": lambda d: (d / "_CHECKPOINT_METADATA").write_text(
        (d / "_CHECKPOINT_METADATA").read_text().replace('"tokens": 1', '"tokens": 2')
    ),
    "no tree": lambda d: (d / "state" / "_METADATA").unlink(),
    "short tree": lambda d: truncate(d / "state" / "_METADATA"),
    "no index": lambda d: (d / "state" / "manifest.ocdbt").unlink(),
    "no data": lambda d: data_file(d).unlink(),
    "short data": lambda d: truncate(data_file(d)),
    "flipped data": lambda d: flip(data_file(d)),
}


@pytest.mark.parametrize("accident", ACCIDENTS)
def test_a_broken_step_is_skipped_with_one_warning(store, accident, caplog, capfd):
    directory = written(store, 1, 2, 3)
    ACCIDENTS[accident](directory / "3")
    resumed = reopened(store)
    with caplog.at_level(logging.WARNING):
        step, state, meta = resumed.restore(abstract(example()))
    assert (step, meta["step"], int(state["step"])) == (2, 2, 2)
    assert_same(state, example(2))
    [warning] = caplog.records
    assert f"{directory}/3 cannot be read" in warning.getMessage()
    assert "\n" not in warning.getMessage()
    assert capfd.readouterr().err == ""

    written(resumed, 3)  # the same number again: nothing is in the way, nothing good is removed
    assert resumed.steps() == [1, 2, 3] and (directory / "3.broken").is_dir()
    step, state, _ = reopened(store).restore(abstract(example()))
    assert step == 3
    assert_same(state, example(3))


def test_leaves_are_read_in_parts(store, monkeypatch):
    """From chunks of the size that was asked for, whatever the sharding that wrote them."""
    monkeypatch.setattr("deepseek_jax.checkpoint.leaves.CHUNK_BYTES", 1 << 10)
    written(store, 1)
    leaves, want = reopened(store).open(abstract(example())), example(1)
    for name, value in (("params.w", want["params"]["w"]), ("step", want["step"])):
        value = np.asarray(value)
        assert leaves.read(name).tobytes() == value.tobytes()
        chunks = list(leaves.chunks(name))
        assert sum(chunk.size for chunk in chunks) == value.size
        assert max(chunk.nbytes for chunk in chunks) <= 1 << 10
    np.testing.assert_array_equal(leaves.read("params.w", (3, slice(5, 9))), value_of(want)[3, 5:9])


def test_leaves_are_made_in_parts(store, monkeypatch):
    """And read as if they had been saved whole; a step that stopped half-way counts as damaged."""
    monkeypatch.setattr("deepseek_jax.checkpoint.leaves.CHUNK_BYTES", 1 << 10)
    state = example(1)
    state["zeros"] = jax.device_put(np.zeros((300,), np.float32), shardings(8, P()))
    whole = {"params": state["params"], "zeros": state["zeros"], "step": state["step"]}
    values = {name: np.asarray(leaf) for name, leaf in named(whole).items()}
    sizes = []

    def part_of(name, part):
        sizes.append(values[name][part].nbytes)
        return values[name][part]

    store.save_parts(4, named(whole), part_of, META)
    assert max(sizes) <= 1 << 10
    step, got, meta = reopened(store).restore(abstract(whole))
    assert (step, meta) == (4, META)
    assert_same(got, whole)
    np.testing.assert_array_equal(reopened(store).open(whole).read("params.w"), values["params.w"])

    other = Store(store._directory.with_name("other"), keep=1)
    with pytest.raises(KeyError):
        other.save_parts(0, named(whole), lambda name, part: {}[name], META)
    with pytest.raises(ConfigError, match="none can be read"):
        reopened(other).restore(abstract(whole))


def named(state):
    flat = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def value_of(state):
    return np.asarray(state["params"]["w"])


@pytest.mark.parametrize(
    "shape, cut",
    [
        ((58, 32, 7168, 2, 2048), (0, 1)),  # an expert of V3 is read as a whole
        ((58, 1536, 128, 192), (0,)),
        ((129280, 7168), ()),  # in chunks, of no special shape
        ((58, 7168), None),
    ],
)
def test_stacks_are_cut_between_layers_and_experts(shape, cut):
    assert axes_to_cut(shape, np.dtype(np.float32)) == cut


@pytest.mark.parametrize("accident", ["no data", "short data", "flipped data", "no index"])
def test_a_broken_step_is_not_read_in_parts_either(store, accident, caplog, capfd):
    directory = written(store, 1, 2)
    ACCIDENTS[accident](directory / "2")
    with caplog.at_level(logging.WARNING):
        leaves = reopened(store).open(abstract(example()))
    np.testing.assert_array_equal(leaves.read("params.w"), value_of(example(1)))
    [warning] = caplog.records
    assert f"{directory}/2 cannot be read" in warning.getMessage()
    assert capfd.readouterr().err == ""


def test_broken_steps_do_not_count_as_kept(tmp_path):
    first = Store(tmp_path, keep=2)
    directory = written(first, 10, 20)
    shutil.copytree(directory / "20", directory / "30")  # not the step that its record says
    for broken in (20, 30):
        data_file(directory / str(broken)).unlink()
    resumed = Store(tmp_path, keep=2)
    assert resumed.restore(abstract(example()))[0] == 10
    written(resumed, 11)
    assert resumed.steps() == [10, 11]


def test_never_starts_over_when_nothing_can_be_read(store):
    directory = written(store, 1, 2)
    for step in (1, 2):
        data_file(directory / str(step)).unlink()
    with pytest.raises(ConfigError, match=rf"{directory} holds 2 checkpoints and none can be read"):
        reopened(store).restore(abstract(example()))


def test_another_model_is_named_leaf_by_leaf(store):
    written(store, 1)
    other = abstract(example())
    other["params"]["w"] = jax.ShapeDtypeStruct((64, 32), np.float32)
    other["params"]["gate"] = jax.ShapeDtypeStruct((4,), np.float32)
    other["moments"][0] = jax.ShapeDtypeStruct((64, 128), np.float32)
    del other["average"], other["step"]
    with pytest.raises(ConfigError) as error:
        reopened(store).restore(other)
    message = str(error.value)
    assert "holds another model" in message and "another workdir" in message
    assert "params.w (found float32[64, 128], expected float32[64, 32])" in message
    assert "params.gate (found nothing, expected float32[4])" in message
    assert "moments.0 (found bfloat16[64, 128], expected float32[64, 128])" in message
    assert "and 2 more" in message


class FullDisk:
    def result(self):
        raise OSError("No space left on device")


def test_a_save_that_failed_is_reported_and_can_be_repeated(store, monkeypatch):
    written(store, 1)
    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.v1.save_async", lambda *args, **kwargs: FullDisk())
        store.save(2, example(2), {})
    with pytest.raises(OSError, match="No space left"):
        store.save(3, example(3), {})
    written(store, 2, 3)
    assert store.steps() == [1, 2, 3]


SAVER = """
import itertools, sys
import jax, jax.numpy as jnp, numpy as np
from deepseek_jax.checkpoint.store import Store

store = Store(sys.argv[1], keep=2)
one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
names = [f"w{i}" for i in range(8)]
abstract = {n: jax.ShapeDtypeStruct((64, 64), np.float32, sharding=one) for n in names}
found = store.restore(abstract)
start = 0
if found:
    start, state, meta = found
    assert meta == {"step": start}, (start, meta)
    for name in names:
        assert (np.asarray(state[name]) == start).all(), (start, name)
print("from", start, flush=True)
for step in itertools.count(start + 1):
    store.save(step, {n: jnp.full((64, 64), step, jnp.float32) for n in names}, {"step": step})
    print("step", step, flush=True)
"""


def run_saver(directory: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", SAVER, str(directory)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_kill_at_any_moment_leaves_a_whole_step(tmp_path):
    rng = random.Random(0)
    reached = 0
    for _ in range(5):
        saver = run_saver(tmp_path)
        first = saver.stdout.readline().split()
        assert first, saver.communicate()[1]
        # What was announced before the kill is at most two saves ahead of what was committed.
        assert first[0] == "from" and int(first[1]) >= reached - 2
        while int(saver.stdout.readline().split()[1]) < int(first[1]) + 5:
            pass
        time.sleep(rng.uniform(0, 0.1))
        saver.send_signal(signal.SIGKILL)
        out, err = saver.communicate()
        assert err == ""
        reached = max([int(line.split()[1]) for line in out.splitlines()], default=reached)
    store = Store(tmp_path, keep=2)
    one = SingleDeviceSharding(jax.devices()[0])
    leaf = jax.ShapeDtypeStruct((64, 64), np.float32, sharding=one)
    step, state, meta = store.restore({f"w{i}": leaf for i in range(8)})
    assert meta == {"step": step} and step >= reached - 2
    assert all((np.asarray(value) == step).all() for value in state.values())


TWO = """
import json, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from deepseek_jax.parallel import processes
from deepseek_jax.checkpoint.store import Store

port, rank, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
processes.start(f"localhost:{port}", 2, rank, emulate_devices=4)
mesh = jax.make_mesh((8,), ("gpu",), axis_types=(jax.sharding.AxisType.Auto,))
split = NamedSharding(mesh, P("gpu"))

def make(value):
    whole = np.arange(16 * 512, dtype=np.float32).reshape(16, 512) * value
    one = NamedSharding(mesh, P())
    return {
        "w": jax.make_array_from_callback(whole.shape, split, lambda i: whole[i]),
        "b": jax.make_array_from_callback((512,), one, lambda i: whole[1][i]),
    }

abstract = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    for name, x in make(0).items()
}
store = Store(directory, keep=2)
assert store.restore(abstract) is None
for step in (1, 2, 3):
    store.save(step, make(step), {"step": step})
store.close()
jax.experimental.multihost_utils.sync_global_devices("saved")
if rank == 0:  # what process 1 wrote of step 3 is lost
    for path in (directory / "3" / "state" / "ocdbt.process_1" / "d").iterdir():
        path.unlink()
jax.experimental.multihost_utils.sync_global_devices("broken")
store = Store(directory, keep=2)
step, state, meta = store.restore(abstract)
same = [np.array_equal(a.data, b.data) for n in state
        for a, b in zip(state[n].addressable_shards, make(step)[n].addressable_shards)]
store.save(3, make(3), {"step": 3})
store.close()
print(json.dumps([step, meta, all(same), len(same), store.steps()]), flush=True)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_two_processes_write_and_read_one_checkpoint(tmp_path):
    port = free_port()
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(port), str(rank), str(tmp_path)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        results = [peer.communicate(timeout=100) for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    for peer, (out, err) in zip(peers, results, strict=True):
        assert peer.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == [2, {"step": 2}, True, 8, [2, 3]]
    warnings = [err.count("cannot be read") for _, err in results]
    assert warnings == [1, 0]  # process 0 speaks for all

    mesh_of_one = SingleDeviceSharding(jax.devices()[0])
    wanted = {
        "w": jax.ShapeDtypeStruct((16, 512), np.float32, sharding=mesh_of_one),
        "b": jax.ShapeDtypeStruct((512,), np.float32, sharding=mesh_of_one),
    }
    step, state, _ = Store(tmp_path, keep=2).restore(wanted)
    assert step == 3
    np.testing.assert_array_equal(
        state["w"], np.arange(16 * 512, dtype=np.float32).reshape(16, 512) * 3
    )
