"""Block-scaled FP8 products by PyTorch, to compare ours with: scales of 1x128 and of 128x128.

A script of its own, which a benchmark starts: libraries of PyTorch and of JAX in one process may
differ in version. It imports nothing of this package. It reads shapes from standard input as JSON,
a list of [kind, name, rows, columns, contracted], and writes a line of JSON for each:

    {"name": "W^O", "microseconds": 700.0}  or  {"name": "W^O", "fault": "RuntimeError: ..."}

The right operand has blocks of 128x128 (kind "product") or tiles of 1x128 ("outer"). The call needs
a PyTorch of CUDA 12.9 or later, and a Hopper GPU. It has not run on one.
"""

import json
import sys
import time
from typing import Any

ROUNDS, LOOP_SECONDS = 5, 0.02
BLOCK = 128
_LONGEST_FAULT = 200  # characters


def main() -> None:
    """Reads the shapes and writes the times."""
    import torch

    for kind, name, *shape in json.load(sys.stdin):
        said: dict[str, Any]
        try:
            said = {"microseconds": 1e6 * _seconds(torch, kind, *shape)}
        except Exception as error:
            said = {"fault": " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_FAULT]}
        print(json.dumps({"name": name, **said}), flush=True)


def _seconds(torch: Any, kind: str, rows: int, columns: int, contracted: int) -> float:
    """Median seconds of a product of `rows` x `contracted` by `columns` x `contracted`."""
    left, right = (
        torch.randn(size, contracted, device="cuda").to(torch.float8_e4m3fn)
        for size in (rows, columns)
    )
    blocks = -(-contracted // BLOCK)
    # Scales of tiles have the rows next to each other in memory; those of blocks, the blocks of K.
    left_scales = torch.ones(blocks, rows, device="cuda").t()
    if kind == "outer":
        right_scales = torch.ones(blocks, columns, device="cuda")
    else:
        right_scales = torch.ones(-(-columns // BLOCK), blocks, device="cuda").t()
    dtype = torch.float32 if kind == "outer" else torch.bfloat16

    def product() -> Any:
        return torch._scaled_mm(
            left, right.t(), left_scales, right_scales, out_dtype=dtype, use_fast_accum=False
        )

    def seconds(times: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(times):
            product()
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times

    seconds(2)
    times = max(3, int(LOOP_SECONDS / seconds(3)))
    return sorted(seconds(times) for _ in range(ROUNDS))[ROUNDS // 2]


if __name__ == "__main__":
    main()
