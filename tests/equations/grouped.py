"""Grouped matmul and its gradients in float64, one expert after another."""

import numpy as np


def by_loop(rows, weight, sizes, pull):
    """One expert after another: out, and the gradients of sum(out * pull) in rows and weight."""
    rows, weight, pull = (np.asarray(part).astype(np.float64) for part in (rows, weight, pull))
    out, d_rows, d_weight = np.zeros_like(pull), np.zeros_like(rows), np.zeros_like(weight)
    ends = np.cumsum(sizes)
    for expert, (end, size) in enumerate(zip(ends, sizes, strict=True)):
        mine = slice(end - size, end)
        out[mine] = rows[mine] @ weight[expert]
        d_rows[mine] = pull[mine] @ weight[expert].T
        d_weight[expert] = rows[mine].T @ pull[mine]
    return out, d_rows, d_weight
