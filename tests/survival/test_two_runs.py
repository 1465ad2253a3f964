"""Two runs in one workdir: the second is refused, and goes on once the first is dead."""

import json
import signal
import time

import pytest
import runs

pytestmark = pytest.mark.slow


def test_the_second_run_is_refused_by_name_until_the_first_is_killed(text, tmp_path):
    config = runs.tiny(text, schedule={"tokens": 400 * 512}, evaluation={"tokens": 0})
    flags = runs.arguments(config, tmp_path / "run")
    first = runs.start_main(flags)
    try:
        deadline = time.monotonic() + 150
        while not runs.checkpoints(tmp_path / "run"):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        second = runs.start_main(flags)
        out, err = second.communicate(timeout=100)
        held = json.loads((tmp_path / "run" / ".lock").read_text())
        assert held["pid"] == first.pid
        assert (second.returncode, out) == (2, "")
        assert err.startswith(
            f"error: --workdir={tmp_path / 'run'} is in use by process {first.pid} on "
            f"{held['host']} since {held['since']}"
        )
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    assert (tmp_path / "run" / ".lock").exists()  # nobody removed it
    third = runs.start_main(flags)
    try:
        while (seen := third.stdout.readline()) and "resumed from step" not in seen:
            pass
        assert seen
    finally:
        third.kill()
        third.communicate()
