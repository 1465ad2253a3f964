"""Description of an H100 for XLA's GPU compiler, to compile without one.

The numbers are those of XLA's public `h100_sxm.txtpb`, a `stream_executor.GpuTargetConfigProto`, in
the units of its fields: counts, bytes, bytes/s, GHz. The four version lines are added here, for the
CUDA and cuDNN of jax 0.10 to 0.12. Without them XLA silently replaces FP8 matmuls by bfloat16 ones.
`cub_version` is left out on purpose: with it, compiling a sort needs a real device.
"""

import json
from typing import Any

# The text form quotes strings, except the values of the fields in _ENUMS.
H100_SXM: dict[str, Any] = {
    "platform_name": "CUDA",
    "device_description_str": "NVIDIA H100 80GB HBM3",
    "dnn_version_info": {"major": 9, "minor": 10},
    "gpu_device_info": {
        "name": "NVIDIA H100 80GB HBM3",
        "device_vendor": "NVIDIA Corporation",
        "cuda_compute_capability": {"major": 9, "feature_extension": "ACCELERATED_FEATURES"},
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "registers_per_block_limit": 65536,
        "registers_per_core_limit": 65536,
        "shared_memory_per_block": 49152,
        "shared_memory_per_block_optin": 232448,
        "shared_memory_per_core": 233472,
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "core_count": 132,
        "fpus_per_core": 128,
        "clock_rate_ghz": 1.98,
        "memory_bandwidth": 3352320000000,
        "l2_cache_size": 52428800,
        "device_memory_size": 84942979072,
        "device_address_bits": 64,
        "ecc_enabled": True,
        "device_interconnect_info": {"active_links": 18},
        "driver_version": "13.0.0",
        "runtime_version": "12.9.0",
        "compile_time_toolkit_version": "12.9.0",
        "dnn_version": "9.12.0",
    },
}
_ENUMS = {"feature_extension"}


def text(config: dict[str, Any] = H100_SXM) -> str:
    """Protobuf text form, for `topologies.get_topology_desc(target_config=...)`."""
    return "\n".join(_field(name, value) for name, value in config.items())


def _field(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"{name} {{ {' '.join(_field(n, v) for n, v in value.items())} }}"
    return f"{name}: {value if name in _ENUMS else json.dumps(value)}"
