"""Stores in other processes: one that is killed while it saves, and two that share a checkpoint."""

import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from deepseek_jax.checkpoint.store import Store

REPOSITORY = Path(__file__).parents[2]

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
        # At most two announced saves are not committed when the process is killed.
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
from deepseek_jax.runtime import processes
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
if rank == 0:  # remove the files of process 1 in step 3
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


def two_processes(program: str, folder: Path) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of both processes that run a program on one store."""
    port = free_port()
    peers = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(port), str(rank), str(folder)],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        told = [peer.communicate(timeout=100) for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
    return [(peer.returncode, *both) for peer, both in zip(peers, told, strict=True)]


def test_two_processes_write_and_read_one_checkpoint(tmp_path):
    results = two_processes(TWO, tmp_path)
    for code, out, err in results:
        assert code == 0, err
        assert json.loads(out.splitlines()[-1]) == [2, {"step": 2}, True, 8, [2, 3]]
    warnings = [err.count("cannot be read") for _, _, err in results]
    assert warnings == [1, 0]  # only process 0 warns

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


ONE_FULL = """
import resource, sys
from pathlib import Path
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from deepseek_jax.errors import RunError
from deepseek_jax.runtime import processes
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.checkpoint import store as module

module._PATIENCE_SECONDS = 0.5
port, rank, directory = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
processes.start(f"localhost:{port}", 2, rank, emulate_devices=1)
mesh = jax.make_mesh((2,), ("gpu",), axis_types=(jax.sharding.AxisType.Auto,))
split = NamedSharding(mesh, P("gpu"))
whole = np.random.default_rng(0).standard_normal((2, 1 << 18)).astype(np.float32)
state = {"w": jax.make_array_from_callback(whole.shape, split, lambda i: whole[i])}
try:
    with Store(directory, keep=2) as store:
        store.save(1, state, {})
        store.settle()
        if rank == 1:  # its writes fail, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        store.save(2, state, {})
        store.settle()
except RunError as error:
    print(error, flush=True)
"""


def test_a_save_that_fails_in_one_process_ends_both(tmp_path):
    """The other one does not wait in orbax for the one that failed, neither now nor at its exit."""
    for code, out, err in two_processes(ONE_FULL, tmp_path):
        assert code == 0 and "Traceback" not in err, err
        assert out == (
            f"checkpoint {tmp_path}/2 cannot be written (File too large). Make it writable; the "
            "newest checkpoint is step 1, from which the same command goes on\n"
        )
    assert Store(tmp_path, keep=2).steps() == [1]
