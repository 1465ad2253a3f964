"""Compiled programs on disk: read back to the bit, and never a wrong or a damaged one."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache, monitoring
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax import host_cpu
from deepseek_jax.runtime import compiled_programs
from deepseek_jax.runtime.compiled_programs import Programs

KEY = "jit_step-" + "5" * 64
SETTINGS = ("jax_compilation_cache_dir", *compiled_programs._SETTINGS)


@pytest.fixture
def programs(tmp_path):
    return Programs(tmp_path / "programs", 1000)


@pytest.fixture
def keeping(monkeypatch):
    """`compiled_programs.keep`, undone at the end of a test."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    monkeypatch.setattr(compilation_cache, "get_file_cache", compilation_cache.get_file_cache)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    yield compiled_programs.keep
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def cache_folder(value: str | None) -> Iterator[None]:
    """JAX's own setting, as JAX_COMPILATION_CACHE_DIR makes it."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", value)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def events(monkeypatch) -> list[str]:
    """Names of the cache's events from now on: `cache_hits` and `cache_misses`."""
    found: list[str] = []
    monkeypatch.setattr(monitoring, "_event_listeners", [lambda name, **_: found.append(name)])
    return found


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_a_program_is_read_back_to_the_bit(keeping, tmp_path, monkeypatch):
    """After damage to each kept file it is compiled and written again, without a word."""
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)

    def run() -> tuple[np.ndarray, list[str]]:
        compilation_cache.reset_cache()
        seen = events(monkeypatch)
        result = jax.jit(lambda x: jnp.tanh(x @ x).sum(0) / 3)(x)
        return np.asarray(result), [name.rpartition("/")[2] for name in seen]

    keeping(str(tmp_path / "kept"))
    first, cold = run()
    again, warm = run()
    assert "cache_misses" in cold and "cache_hits" not in cold
    assert "cache_hits" in warm and "cache_misses" not in warm
    for file in files(tmp_path / "kept"):
        good = file.read_bytes()
        for bad in (b"", good[:40], good[:-1], good[:99] + bytes([good[99] ^ 1]) + good[100:]):
            file.write_bytes(bad)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                mended, events_of_it = run()
            assert "cache_misses" in events_of_it and "cache_hits" not in events_of_it
            np.testing.assert_array_equal(mended, first)
    np.testing.assert_array_equal(again, first)
    assert "cache_hits" in run()[1]


def test_another_flag_or_mesh_is_another_program(keeping, tmp_path, monkeypatch):
    def run(devices: int) -> bool:
        """Whether the program for so many devices was read, not compiled."""
        jax.clear_caches()
        mesh = jax.make_mesh((devices,), ("x",), devices=jax.devices()[:devices])
        seen = events(monkeypatch)
        spread = NamedSharding(mesh, PartitionSpec("x"))
        x = jax.device_put(np.arange(8, dtype=np.float32), spread)
        np.testing.assert_array_equal(jax.jit(lambda x: x * 2 + 1)(x), np.arange(8) * 2 + 1)
        return "/jax/compilation_cache/cache_hits" in seen

    keeping(str(tmp_path / "kept"))
    assert [run(1), run(2), run(1), run(2)] == [False, False, True, True]
    flags = os.environ.get("XLA_FLAGS", "")
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_cpu_enable_fast_math=true")
    assert not run(1)
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert run(1)


def test_off_keeps_nothing(keeping, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keeping("off")
    jax.jit(lambda x: x + 17)(np.float32(0))
    assert not files(tmp_path)


def test_the_place(monkeypatch, tmp_path):
    """The flag, then JAX's own setting, then the user's cache folder."""
    assert compiled_programs._root(str(tmp_path)) == tmp_path
    with cache_folder("/jax/says"):
        assert compiled_programs._root(None) == Path("/jax/says")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/of/me")
    with cache_folder(None):
        assert compiled_programs._root(None) == tmp_path / "deepseek_jax" / "programs"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert compiled_programs._root(None) == Path("/home/of/me/.cache/deepseek_jax/programs")


def test_a_file_under_another_name_is_refused(programs):
    """A program counts only under the key that it was kept for."""
    other = KEY.replace("5", "6")
    programs.put(KEY, b"machine code")
    (file,) = files(programs._path)
    shutil.copy(file, programs._path / programs._name(other))
    assert programs.get(other) is None and programs.get(KEY) == b"machine code"
    assert [path.name for path in files(programs._path)] == [file.name]


@pytest.mark.parametrize(
    "name, value",
    [
        ("__version__", "0.10.99"),
        ("lines", lambda: ["flags : sse2\n"]),
        ("sched_getaffinity", lambda _: range(96)),
        ("XLA_FLAGS", "flags.txt"),
        ("path", ["site-packages"]),
    ],
)
def test_another_machine_reads_none_of_it(programs, tmp_path, monkeypatch, name, value):
    """Neither does another version of JAX, of a library beside it, or another file of flags."""
    programs.put(KEY, b"machine code")
    monkeypatch.chdir(tmp_path)
    Path("flags.txt").write_text("--xla_cpu_enable_fast_math=true")
    Path("site-packages/nvidia_cudnn_cu13-9.99.dist-info").mkdir(parents=True)
    if name == "XLA_FLAGS":
        monkeypatch.setenv(name, value)
    else:
        owner = {"__version__": jax, "sched_getaffinity": os, "path": sys, "lines": host_cpu}
        monkeypatch.setattr(owner[name], name, value)
    other = Programs(programs._path, 1000)
    assert other.get(KEY) is None
    monkeypatch.undo()
    assert Programs(programs._path, 1000).get(KEY) == b"machine code"


def test_the_longest_unused_go_when_the_folder_is_full(programs):
    """Six programs of 150 bytes fit into 1,000; the seventh frees a quarter of the bound."""
    keys = [KEY.replace("5", digit) for digit in "123456789"]
    for age, key in enumerate(keys[:6]):
        programs.put(key, bytes(134))
        os.utime(programs._path / programs._name(key), (age, age))
    programs.get(keys[0])  # which makes it the newest
    programs.put(keys[6], bytes(134))
    kept = [key for key in keys if programs.get(key) is not None]
    assert kept == [keys[0], *keys[3:7]]
    assert sum(file.stat().st_size for file in files(programs._path)) <= 750
    programs.put(keys[7], bytes(2000))  # larger than the whole bound
    assert programs.get(keys[7]) is None and len(files(programs._path)) == len(kept)


def test_many_writers_leave_whole_files(tmp_path):
    """Readers see a whole program or none while others replace it and make room."""
    content = [bytes([n]) * 400 for n in range(4)]
    wrong: list[bytes] = []

    def work(number: int) -> None:
        mine = Programs(tmp_path / "programs", 1000)
        for turn in range(50):
            mine.put(f"jit_f-{turn % 3}", content[number])
            found = mine.get(f"jit_f-{(turn + number) % 3}")
            if found is not None and found not in content:
                wrong.append(found)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
    assert all(file.name.endswith(".program") for file in files(tmp_path / "programs"))


def test_a_folder_that_cannot_be_costs_one_warning(tmp_path):
    (tmp_path / "file").touch()
    programs = Programs(tmp_path / "file" / "programs", 1000)
    with pytest.warns(UserWarning, match=r"not kept: .* cannot be written \(Not a dir") as told:
        for _ in range(3):
            programs.put(KEY, b"machine code")
            assert programs.get(KEY) is None
    assert len(told) == 1


def test_a_full_disk_costs_one_warning(programs, monkeypatch):
    """The programs that are there already are still read."""
    kept = KEY.replace("5", "6")
    programs.put(kept, b"machine code")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(UserWarning, match="No space left on device") as told:
        programs.put(KEY, b"machine code")
        programs.put(KEY, b"machine code")
    assert len(told) == 1 and len(files(programs._path)) == 1
    assert programs.get(kept) == b"machine code" and programs.get(KEY) is None


def test_a_run_of_several_processes_keeps_none(keeping, tmp_path, monkeypatch):
    """JAX's keys differ between them, so that one would read what another compiles."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.warns(UserWarning, match="not kept: each process of a run of several"):
        keeping(str(tmp_path / "kept"))
    jax.jit(lambda x: x + 19)(np.float32(0))
    assert not files(tmp_path)


def test_the_flag_of_a_command(tmp_path):
    """`--compilation_cache=DIR` keeps the programs of a command there, and an empty one is told."""
    command = [sys.executable, "-m", "deepseek_jax.main", "--config=configs/v3_tiny.py"]
    root = Path(__file__).parents[2]
    told = subprocess.run(
        [*command, "--compilation_cache=", f"--workdir={tmp_path}/run"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 2 and "--compilation_cache is empty" in told.stderr
