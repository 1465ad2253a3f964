"""`bench speculate`: a run is trained once and read again, and the table has every row."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import small

from deepseek_jax.bench import speculate
from deepseek_jax.checkpoint.store import Store
from deepseek_jax.model import params
from deepseek_jax.model.transformer import abstract_model


def test_rows(tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.mkdir()
    words = ["one", "two", "three", "four", "five"]
    rng = np.random.default_rng(0)
    for number in range(20):
        (text / f"{number}.txt").write_text(" ".join(rng.choice(words, 80)))
    data = dict(data_path=str(text), data_cache=str(tmp_path), data_held_out=0.2)
    # One dense layer and a shallow draft: quick to compile.
    data |= dict(data_tokenizer="byte", evaluation_tokens=0)  # a run that scores no text itself
    config = small.config(model_vocab=264, model_layers=1, **data)
    trained = []

    def train(config, workdir):
        trained.append(config.model.mtp_depth)
        state = {"params": {}, "bias": {}}
        for weight in params.describe(abstract_model(config.model)):
            value = rng.normal(size=weight.shape).astype(np.float32)
            state["params" if weight.trained else "bias"][weight.path] = jnp.asarray(value)
        store = Store(workdir / "checkpoints", keep=1)
        store.save(1, state, {})
        store.close()
        (workdir / "config.json").write_text(config.to_json())
        (workdir / "summary.json").write_text(json.dumps({"stopped": False}))

    monkeypatch.setattr(speculate.loop, "train", train)
    monkeypatch.setattr(speculate, "GOALS", {2: 2.5})
    sizes = dict(folder=tmp_path / "runs", prompts=2, tokens=6, rounds=1)
    found = speculate.measure(config, **sizes)
    rows = found["speculate"]
    assert [(r["depth"], r["drafts"], r["temperature"]) for r in rows] == [(2, 2, 0), (2, 2, 1)]
    for row in rows:
        first, second = map(float, row["acceptance"].split())
        assert 0 <= second <= first <= 1
        assert row["tokens_per_step"] == pytest.approx(1 + first + second, abs=0.02)
        assert row["speed_up"] == pytest.approx(row["tokens_per_second"] / row["plain"])
    own = speculate._trained(config, 2, tmp_path / "runs" / "speculate_2")
    assert own.model.mtp_depth == 2 and trained == [2]
