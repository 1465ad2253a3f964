"""Ends of a run in a workdir: the code that is counted, and errors that are no lost process."""

import pytest
import small

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import AGAIN, LostPeer
from deepseek_jax.runtime import progress, restarts
from deepseek_jax.train import survival

RESET = "UNKNOWN: Gloo AllGather failed: Read error [127.0.0.1]:31932: Connection reset by peer"


@pytest.fixture
def of_several(monkeypatch):
    """A process of a run whose collective fails."""
    monkeypatch.setattr(survival.joining, "lost", lambda text: "1 is gone" if RESET in text else "")
    monkeypatch.setattr(survival.native_output, "keep", lambda *_: None)
    yield
    progress.current.close()


def test_a_lost_process_before_training_is_counted_as_one(of_several, tmp_path):
    with pytest.raises(LostPeer, match="1 is gone"):  # noqa: SIM117
        with survival.surviving(small.config(), tmp_path, tmp_path / "checkpoints"):
            raise RuntimeError(RESET)
    start = restarts.last(tmp_path)
    assert (start.code, start.reason) == (AGAIN, "1 is gone")


def test_a_refused_start_that_quotes_the_last_one_stays_refused(of_several):
    """Launch scripts would start it again for ever."""
    with pytest.raises(ConfigError, match="The last one: UNKNOWN"), survival.naming_the_lost():
        raise ConfigError(f"6 starts in a row failed. The last one: {RESET}. Mend the cause")
