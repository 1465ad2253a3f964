"""A whole training step of V3, compiled for 2,048 H100s: minutes and gigabytes, so not in CI.

python -m pytest tests/cluster

`tests/plan/test_tick.py` guards a layer of it. Limits are the figures reached; the goals of memory
and of other chunks' GEMMs are in README.md.
"""

import pytest

from configs import v3_671b
from deepseek_jax import config as configs
from deepseek_jax.plan import cluster, tick
from deepseek_jax.train import lowered

pytestmark = pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "")


def test_a_tick_hides_its_messages():
    c = v3_671b.get_config()
    c.layout.recompute = "full"
    found = tick.measure(configs.parse(c), lowered.lower)
    given = {row["costs"]: row for row in found["two ticks"]}
    row = given["ours"]
    assert row["messages"] == row["asynchronous"] == 64  # 4 layers, 2 ticks, 2 chunks, 4 hops
    assert row["under_a_gemm"] >= 63
    assert row["under_the_other"] >= 54
    assert row["hidden"] >= 0.97
    assert row["largest_copy_MiB"] <= 32
    assert found["peak_GiB"] <= 104
