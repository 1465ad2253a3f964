"""Time and memory of loading and converting a checkpoint, beside reading it with `cat`.

"touch" is the time of writing as many bytes into newly allocated memory. Loading onto a CPU cannot
be faster than `cat` and "touch" together; on virtual machines "touch" can be most of it.

A checkpoint of random BF16 weights is written to a temporary folder, in files of half a gigabyte,
and read from the page cache. Each load runs in a process of its own, whose peak memory is that of
loading alone; on a mesh of emulated devices it includes the parts of all devices. The checkpoint is
then converted to a workdir and back, for which neither is held in memory.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.checkpoint.hf import config_json, export
from deepseek_jax.checkpoint.hf.names import Piece, TensorLayout
from deepseek_jax.config import Config, ModelConfig
from deepseek_jax.model import params
from deepseek_jax.model.transformer import abstract_model

MESHES = {"one device": {}, "gpu 4": {"gpu": 4}}
_TOUCH = """
import sys, time
import numpy as np
begin = time.perf_counter()
np.empty(int(sys.argv[1]), np.uint8)[:] = 1
print(time.perf_counter() - begin)
"""
_LOAD = """
import json, resource, sys, time
import jax
devices, folder, rules, sizes = json.loads(sys.argv[1])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", devices)
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import MeshConfig
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.axes import Layout
from deepseek_jax.precision.recipes import BFLOAT16
from pathlib import Path
where = ()
if devices > 1:
    where = Layout(rules, sizes, 0), meshes.build(MeshConfig(**sizes))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
model = jax.block_until_ready(open_checkpoint(Path(folder)).load(BFLOAT16, *where))
seconds = time.perf_counter() - begin
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, before, after]))
"""
_CONVERT = """
import json, resource, sys, time
from pathlib import Path
import jax
jax.config.update("jax_platforms", "cpu")
jax.devices()
from deepseek_jax import config as configs
from deepseek_jax.checkpoint import conversion
from deepseek_jax.checkpoint.load import open_checkpoint
source, target, base, most = json.loads(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
opened = open_checkpoint(Path(source))
if base:
    conversion.to_run(opened, Path(target), configs.parse(json.loads(base)))
else:
    conversion.to_published(opened, Path(target), "bfloat16", most)
seconds = time.perf_counter() - begin
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([seconds, before, after]))
"""
_FILE_BYTES = 1 << 29


def measure(config: Config, *, gigabytes: float = 4.0, rounds: int = 3) -> dict[str, Any]:
    """Measures loads, as medians over `rounds`, and conversions, once.

    Memory is the peak less the memory of the process before; `beside_weights_GiB` is also less the
    weights.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = sized(config.model, gigabytes)
        generate(model, folder)
        files = sorted(folder.glob("*.safetensors"))
        total = sum(file.stat().st_size for file in files)
        seconds: dict[str, list[float]] = {case: [] for case in ("cat", "touch", *MESHES)}
        peaks: dict[str, list[float]] = {case: [] for case in MESHES}
        for _ in range(rounds):
            seconds["cat"].append(_cat(files))
            seconds["touch"].append(_touch(total))
            for case, sizes in MESHES.items():
                spent, before, after = _load(folder, config, sizes)
                seconds[case].append(spent)
                peaks[case].append((after - before) / 2**20)
        largest = max(file.stat().st_size for file in files)
        converts = [
            _convert(folder, folder / "run", config.to_json(), largest),
            _convert(folder / "run", folder / "again", "", largest),
        ]
    cat, touch = (float(np.median(seconds[case])) for case in ("cat", "touch"))
    return {
        "checkpoint_GiB": total / 2**30,
        "largest_file_GiB": largest / 2**30,
        "cat_seconds": cat,
        "touch_seconds": touch,
        "loads": [
            {
                "onto": case,
                "seconds": float(np.median(seconds[case])),
                "of_cat": float(np.median(seconds[case])) / cat,
                "of_both": float(np.median(seconds[case])) / (cat + touch),
                "peak_GiB": float(np.median(peaks[case])),
                "beside_weights_GiB": float(np.median(peaks[case])) - total / 2**30,
            }
            for case in MESHES
        ],
        "converts": [
            {"to": to, **row}
            for to, row in zip(("a workdir", "a checkpoint"), converts, strict=True)
        ],
    }


def sized(model: ModelConfig, gigabytes: float) -> ModelConfig:
    """Model with as many experts as a BF16 checkpoint of `gigabytes` has room for."""
    wide = dataclasses.replace(
        model, vocab=1024, layers=5, dense_layers=1, d_model=1024, d_dense=2048, heads=4,
        q_latent=512, kv_latent=256, d_nope=128, d_rope=64, d_value=128, d_expert=1024, groups=1,
        top_groups=1, top_k=4, mtp_depth=0,
    )  # fmt: skip
    one, two = (_parameters(dataclasses.replace(wide, experts=4 * n)) for n in (1, 2))
    more = (gigabytes * 1e9 / 2 - one) / (two - one)
    return dataclasses.replace(wide, experts=4 * (1 + max(0, int(more))))


def _parameters(model: ModelConfig) -> int:
    return sum(int(np.prod(w.shape)) for w in params.describe(abstract_model(model)))


def generate(model: ModelConfig, folder: Path) -> None:
    """Writes a checkpoint of random weights."""
    random = np.random.default_rng(0)
    noise = random.standard_normal(1 << 24, np.float32).astype(export.BF16)

    def read(piece: Piece) -> np.ndarray:
        size = int(np.prod(piece.shape))
        start = int(random.integers(0, len(noise) - size)) if size < len(noise) else 0
        return np.resize(noise[start : start + size], piece.shape)

    described = config_json.in_format(config_json.published(model), "bfloat16")
    source = export.WeightSource(model, TensorLayout(biased=model.score != "softmax"), read)
    export.write(folder, described, source, "bfloat16", _FILE_BYTES)


def _cat(files: list[Path]) -> float:
    begin = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - begin


def _touch(count: int) -> float:
    done = subprocess.run(
        [sys.executable, "-c", _TOUCH, str(count)], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def _load(folder: Path, config: Config, sizes: dict[str, int]) -> tuple[float, float, float]:
    """(seconds, peak KiB before, peak KiB after) of loading in a new process."""
    whole = dict.fromkeys(dataclasses.asdict(config.mesh), 1) | sizes
    devices = int(np.prod(list(whole.values())))
    return _run_script(_LOAD, [devices, str(folder), dict(config.layout.rules), whole])


def _convert(source: Path, target: Path, base: str, largest: int) -> dict[str, float]:
    """Figures of a conversion: to a workdir with config `base`, or to a checkpoint if it is ""."""
    spent, before, after = _run_script(_CONVERT, [str(source), str(target), base, _FILE_BYTES])
    peak = (after - before) * 2**10
    return {"seconds": spent, "peak_GiB": peak / 2**30, "of_largest_file": peak / largest}


def _run_script(script: str, given: list[Any]) -> tuple[float, float, float]:
    """Runs a script in a new process -> the three numbers that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(given)],
        capture_output=True,
        text=True,
        check=True,
    )
    spent, before, after = json.loads(done.stdout)
    return spent, before, after
