"""Test set-up: eight emulated CPU devices, quick cached compiles, no implicit rank promotion."""

import gc
import importlib.metadata
import os
import signal
import tempfile

gc.set_threshold(100_000, 50, 100)  # collecting the many objects of traced programs is slow
if hasattr(signal, "SIGHUP"):  # `nohup` ignores it, also in the processes that tests start
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Read when JAX starts, here and in the processes that tests start. Compiling takes most of the
# tests' time, and nearly every program runs a few steps on a few numbers only.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jax") < "0.11":  # later releases do not have this flag
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
# Workers and the runs that tests start share one compilation cache.
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax  # noqa: E402
import pytest  # noqa: E402
import runs  # noqa: E402

from deepseek_jax.runtime import background  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes():
    """No silent mixing of dtypes, for model and precision code."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A folder of thirty documents, to train on."""
    return runs.documents(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture
def one_device(monkeypatch):
    """Limits a run to one of the eight devices; the others stay idle."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """A failed save marks its process, whose other tests it does not concern."""
    yield
    background._waiting.discard(0)
