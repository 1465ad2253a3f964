"""Held-out scores: read early, and never the reason that a trained run is lost."""

import shutil
from types import SimpleNamespace

import pytest
import runs

from deepseek_jax.data import corpus
from deepseek_jax.errors import RunError
from deepseek_jax.train import last_score


def test_the_text_is_read_at_the_start(tmp_path):
    """Its files may be gone at the end."""
    text = runs.documents(tmp_path / "text")
    config = runs.tiny(text)
    opened = corpus.prepare(config.data, vocab=config.model.vocab)
    kept = last_score.text_of(config, opened)
    shutil.rmtree(text)
    shutil.rmtree(tmp_path / "cache")
    seen = []

    def make_score():
        return lambda params, bias, tokens, valid: seen.append(int(valid.sum())) or scored

    scored = last_score.evaluation.Score(nats=6.0, targets=3)
    now = SimpleNamespace(params=None, bias=None, ema=None)
    found = last_score.scores(make_score, now, kept)
    assert found["held_out_loss"] == 2.0 and found["held_out_bytes"] == kept.held_out.bytes > 0
    assert found["trained_loss"] == 2.0 and found["trained_bytes"] == kept.trained.bytes > 0
    assert seen == [int(part.valid.sum()) for part in (kept.held_out, kept.trained)]
    assert seen[0] == seen[1]


def test_no_text_is_read_where_none_is_scored(tmp_path):
    assert last_score.text_of(runs.tiny(tmp_path, evaluation={"tokens": 0}), None) is None


@pytest.mark.parametrize("error", [ValueError("out of memory"), RunError("a peer is lost")])
def test_a_run_whose_scoring_fails_has_no_scores_and_a_warning(caplog, error):
    def fails():
        raise error

    if isinstance(error, RunError):
        with pytest.raises(RunError, match=r"^a peer is lost$"):
            last_score.scores(fails, None, None)
        return
    assert last_score.scores(fails, None, None) == {}
    assert caplog.messages == [
        "no score on held-out text (out of memory); the same command scores again"
    ]


def test_held_out_text_without_bytes_has_a_loss_alone():
    scored = last_score.evaluation.Score(nats=6.0, targets=3)
    marks = SimpleNamespace(sequences=None, valid=None, bytes=0, gzip_bytes=20)
    text = last_score.Texts(held_out=marks, trained=marks)
    now = SimpleNamespace(params=None, bias=None, ema=None)
    assert last_score.scores(lambda: lambda *_: scored, now, text) == {
        "held_out_loss": 2.0, "held_out_bytes": 0, "trained_loss": 2.0, "trained_bytes": 0,
    }  # fmt: skip
