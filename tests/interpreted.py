"""Pallas Mosaic GPU kernels on a CPU: JAX's interpreter, with a limit of time.

The interpreter simulates thread blocks, warpgroups, barriers and copies. It knows no
registers, and completes a tensor core product at once.
"""

import threading

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import utils
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params
from jax._src.state.types import TransposeTransform

# A race: ordinary accesses and copies of the same memory that no barrier orders, or no fence. jax
# 0.10 does not know of fences; 0.12 does.
GPU = params.InterpretGPUParams(detect_races=True)
# Clusters and copies for both blocks of a cluster.
PAIRS = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 11)


def run(fn, *arguments, seconds=120):
    """Results of a jitted function as NumPy arrays.

    A simulated thread that fails leaves the others waiting, hence the limit.
    """
    found = []

    def work():
        try:
            found.append(jax.tree.map(np.asarray, fn(*arguments)))
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError(f"the interpreter has not ended in {seconds} seconds")
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _product(*, b_transforms, b_allocation_key_as_array, device_id, thread_id, **rest):
    """The interpreter's tensor core product, for a right operand that is read transposed."""
    *before, last = b_transforms
    if not isinstance(last, TransposeTransform):
        before, turn = b_transforms, lambda x: x
    else:
        turn = np.transpose
    memory = gpu_callbacks._get_shared_memory()
    thread = memory.get_global_thread_id(int(device_id), int(thread_id))

    def read(key, transforms):
        transforms = jax.tree.map(int, gpu_callbacks._remove_noop_transforms(tuple(transforms)))
        key = gpu_callbacks.HostAllocationKey.from_array(key)
        return key, memory.get_buffer_content(key, utils.to_range(transforms), thread)[0]

    _, left = read(rest["a_allocation_key_as_array"], rest["a_transforms"])
    _, right = read(b_allocation_key_as_array, before)
    key, total = read(rest["acc_allocation_key_as_array"], rest["acc_transforms"])
    total = total + np.matmul(left, turn(right), dtype=rest["acc_dtype"])
    memory.store_buffer_content(key, utils.to_range(rest["acc_transforms"]), total, thread)
    return rest["token"]


if not PAIRS:  # jax 0.10 cannot read an operand transposed
    gpu_callbacks.wgmma = _product
