"""`bench pipeline`: masked ticks compute all chunks, skipped ticks the planned ones only."""

import pytest

from configs import v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.bench import pipeline


@pytest.mark.parametrize("skip", [False, True], ids=["mask", "skip"])
@pytest.mark.parametrize(("kind", "ticks"), [("dualpipe", 16), ("1f1b", 14)])
def test_devices_compute_what_the_schedule_says(kind, ticks, skip):
    row = pipeline._counted(kind, 4, 8, skip)
    assert row["ticks"] == ticks
    assert row["forward_planned"] == row["backward_planned"] == 8
    ran = row["forward_planned"] if skip else row["ticks"]
    assert row["forward_ran"] == row["backward_ran"] == ran
    assert row["forward_useful"] == row["backward_useful"] == 1


@pytest.mark.parametrize("recompute", ["none", "report", "full"])
def test_deferring_gradients_computes_nothing_twice(recompute):
    """Input and weight gradients together take as many FLOPs as a whole backward pass, to 2 %."""
    row = pipeline._halves(configs.parse(v3_tiny.get_config()), recompute)
    assert row["halves_of_whole"] == pytest.approx(1, abs=0.02)
    assert 0.3 < row["weights"] / row["whole"] < 0.5
