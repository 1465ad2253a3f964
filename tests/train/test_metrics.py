"""`metrics.jsonl`: each step once, whole numbers, and no trace of an interrupted run."""

import jax.numpy as jnp
import numpy as np
import pytest
from reports import row, rows_of, run, steps_of

from deepseek_jax.config import ConfigError
from deepseek_jax.train import metrics


def test_a_row_is_in_the_file_once_step_returns(tmp_path):
    going = run(tmp_path, [1, 2], screen=False)
    assert steps_of(tmp_path) == [1, 2]
    going.close()
    going.close()


def test_rows_keep_full_numbers_and_round_only_the_load(tmp_path):
    going = run(tmp_path, [], screen=False)
    loss = np.float32(1) / np.float32(3)
    going.step(row(1, loss=loss, grad_norm=jnp.float32(0.1), expert_load=jnp.full((2, 3), 1 / 3)))
    going.close()
    (kept,) = rows_of(tmp_path)
    assert kept["loss"] == float(loss)
    assert kept["grad_norm"] == float(np.float32(0.1))
    assert kept["expert_load"] == [[0.333333] * 3] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), jnp.inf])
def test_what_is_not_finite_becomes_null(tmp_path, bad):
    going = run(tmp_path, [], screen=True)
    going.step(row(1, loss=bad, expert_load=[[bad, 0.5]]))
    going.close()
    (kept,) = rows_of(tmp_path)
    assert kept["loss"] is None and kept["expert_load"] == [[None, 0.5]]


def test_resuming_drops_what_was_written_past_the_checkpoint(tmp_path):
    run(tmp_path, range(1, 8), screen=False).close()
    run(tmp_path, range(5, 10), first=4, screen=False).close()
    assert steps_of(tmp_path) == list(range(1, 10))


def test_a_new_run_starts_an_empty_file(tmp_path):
    run(tmp_path, [1, 2, 3], screen=False).close()
    run(tmp_path, [1], screen=False).close()
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    run(tmp_path, [1, 2, 3], screen=False).close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    run(tmp_path, [4], first=3, screen=False).close()
    # Without its newline alone (cut 1) the third row is still whole.
    assert steps_of(tmp_path) == ([1, 2, 3, 4] if cut == 1 else [1, 2, 4])


def test_torn_bytes_and_repeated_steps_are_dropped(tmp_path):
    lines = [b'{"step": 1}', b"\xff\xfe", b"[]", b'{"step": 1}', b'{"tokens": 2}', b'{"step": 2}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    run(tmp_path, [3], first=2, screen=False).close()
    assert steps_of(tmp_path) == [1, 2, 3]


def test_the_old_file_survives_a_crash_while_it_is_rewritten(tmp_path, monkeypatch):
    run(tmp_path, [1, 2, 3], screen=False).close()
    before = (tmp_path / "metrics.jsonl").read_text()

    def crash(*_):
        raise OSError("killed")

    monkeypatch.setattr(metrics.Path, "replace", crash)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl cannot be written \(killed\)"):
        run(tmp_path, [], first=1, screen=False)
    assert (tmp_path / "metrics.jsonl").read_text() == before
