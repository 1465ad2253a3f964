"""A profile of a run: files for TensorBoard and Perfetto, and the same losses as without one."""

import gzip
import json

import numpy as np
import runs

from deepseek_jax.train import loop


def test_a_profile_is_left_beside_an_unchanged_run(text, tmp_path, one_device):
    config = runs.tiny(text, schedule={"tokens": 5 * 256}, evaluation={"tokens": 0})
    loop.train(config, tmp_path / "plain", screen=False)
    loop.train(config, tmp_path / "run", screen=False, profile_steps=2)
    np.testing.assert_array_equal(runs.losses(tmp_path / "run"), runs.losses(tmp_path / "plain"))
    [folder] = (tmp_path / "run" / "profile" / "plugins" / "profile").iterdir()
    [space] = folder.glob("*.xplane.pb")
    assert space.stat().st_size > 0
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    steps = [event["args"]["step_num"] for event in events if event.get("name") == "train"]
    assert sorted(map(int, steps)) == [3, 4]
    assert not (tmp_path / "plain" / "profile").exists()
