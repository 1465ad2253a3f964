#!/usr/bin/env bash
# jax 0.10.2, compiled for an H100 that is only described: x.astype(float8_e4m3fn).astype(float32)
# compiles to nothing. XLA's GPU compiler may keep excess precision (xla_allow_excess_precision is on
# by default) and drops a cast to a narrower float that a later cast undoes; XLA's CPU compiler keeps
# both casts. So quantise-and-dequantise code is tested on a CPU and does nothing on a GPU, with no
# warning. An optimization barrier between the casts keeps them, and so does the flag set to false.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q "jax==0.10.2" "jaxlib==0.10.2" "jax-cuda13-plugin==0.10.2" \
  "jax-cuda13-pjrt==0.10.2" "nvidia-cuda-nvcc==13.5.37" "nvidia-nvvm==13.5.37" "numpy==2.3.5"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON' 2>"$folder/log" || { tail -5 "$folder/log" >&2; exit 1; }
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# A stream_executor.GpuTargetConfigProto with the numbers of an H100 that this program needs.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  name: "NVIDIA H100 80GB HBM3" device_vendor: "NVIDIA Corporation"
  cuda_compute_capability { major: 9 }
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "12.9.0" compile_time_toolkit_version: "12.9.0"
  dnn_version: "9.12.0"
}
"""
FP8 = jnp.float8_e4m3fn


def plain(x):
    return 2 * x.astype(FP8).astype(jnp.float32)


def fenced(x):
    return 2 * jax.lax.optimization_barrier(x.astype(FP8)).astype(jnp.float32)


gpu = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1").devices[0]


def casts(fn, device, **options):
    """Number of casts to FP8 in the program that XLA compiles."""
    place = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    x = jax.ShapeDtypeStruct((1024,), jnp.float32, sharding=place)
    program = jax.jit(fn).lower(x).compile(compiler_options=options)
    lines = program.as_text().splitlines()
    return sum(" convert(" in line and "= f8e4m3fn" in line for line in lines)


found = {
    "CPU": casts(plain, jax.devices("cpu")[0]),
    "GPU": casts(plain, gpu),
    "GPU, barrier": casts(fenced, gpu),
    "GPU, xla_allow_excess_precision=False": casts(plain, gpu, xla_allow_excess_precision=False),
}
print(f"jax {jax.__version__}: casts to FP8 in the compiled program: {found}")
assert found["CPU"] >= 1 and found["GPU, barrier"] >= 1, "casts that were kept are gone"
assert found["GPU, xla_allow_excess_precision=False"] >= 1, "the flag no longer keeps the cast"
assert found["GPU"] == 0, "XLA:GPU now keeps the cast"
PYTHON
