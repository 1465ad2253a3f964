"""What `bench pipeline` counts: masked ticks compute everything, skipped ones what is planned."""

import pytest

from deepseek_jax.bench import pipeline


@pytest.mark.parametrize("skip", [False, True], ids=["mask", "skip"])
def test_devices_compute_what_the_schedule_says(skip):
    row = pipeline._counted("dualpipe", 4, 8, skip)
    assert row["forward_planned"] == row["backward_planned"] == 8
    ran = row["forward_planned"] if skip else row["ticks"]
    assert row["forward_ran"] == row["backward_ran"] == ran
    assert row["forward_useful"] == row["backward_useful"] == 1
