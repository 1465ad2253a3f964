"""Scoring a checkpoint: the published loss on any mesh, bits per byte, and what is refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import small
from equations import checkpoints

import deepseek_jax
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError
from deepseek_jax.data import tokenizer
from deepseek_jax.parallel import mesh
from deepseek_jax.train import evaluation

TINY = Path(__file__).parents[1] / "fixtures" / "hf_tiny"


def scored(directory, data, length=16, tokens=2**62, **mesh):
    base = small.config(batch_micro_sequences=2, batch_sequences=2, batch_ramp_sequences=2)
    return evaluation.score_checkpoint(
        open_checkpoint(directory), str(data), base, mesh=mesh, length=length, tokens=tokens
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose tokenizer is bytes, and a text."""
    folder = tmp_path_factory.mktemp("bytes")
    settings, weights = checkpoints.make("v3")
    settings["vocab_size"] = 264
    random = np.random.default_rng(0)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name] = random.standard_normal((264, 48)).astype(np.float32)
    checkpoints.write(folder, settings, weights)
    words = tokenizer.make("byte", vocab=264, texts=())
    words.save(folder / "tokenizer.json")
    return folder


def test_the_published_loss_of_rows_of_tokens_on_a_mesh(tmp_path):
    with np.load(TINY / "expected.npz") as expected:
        ids, want = expected["input_ids"], expected["loss"]
    np.save(tmp_path / "ids.npy", ids)
    found = scored(TINY, tmp_path / "ids.npy", node=2, gpu=2, tensor=2)
    assert found["loss"] == pytest.approx(want, abs=1e-5)
    assert found["tokens"] == ids.shape[0] * (ids.shape[1] - 1)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["bits_per_byte"] is None and found["bytes"] is None


def test_bits_per_byte_of_a_text(folder, tmp_path):
    text = "a word, and another one.\n" * 3
    (tmp_path / "text.txt").write_text(text)
    found = scored(folder, tmp_path / "text.txt")
    ids = [0, *(6 + byte for byte in text.encode()), 1]  # BOS, the bytes, EOS
    assert (found["bytes"], found["tokens"]) == (len(text), len(ids) - 1)
    model, nats = deepseek_jax.load(folder), 0.0
    for start in range(0, len(ids) - 1, 16):
        part = np.array([ids[start : start + 17]])
        nats += float(model.loss(part)) * (part.shape[1] - 1)
    assert found["loss"] == pytest.approx(nats / (len(ids) - 1), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)
    part = scored(folder, tmp_path / "text.txt", tokens=10)
    assert (part["bytes"], part["tokens"]) == (10, 11)


def test_what_is_refused(folder, tmp_path):
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ConfigError, match=r"hf_tiny has no tokenizer.json.*token file \(.npy"):
        scored(TINY, tmp_path / "text.txt")
    np.save(tmp_path / "ids.npy", np.array([3, 264, 5]))
    with pytest.raises(ConfigError, match=r"ids from 3 to 264; the model's go from 0 to 263"):
        scored(folder, tmp_path / "ids.npy")
    np.save(tmp_path / "one.npy", np.array([3]))
    with pytest.raises(ConfigError, match="holds one token; expected at least two"):
        scored(folder, tmp_path / "one.npy")
    np.save(tmp_path / "two.npy", np.array([3, 4]))
    with pytest.raises(ConfigError, match="needs 3 devices and there are 8"):
        scored(folder, tmp_path / "two.npy", gpu=3)


def test_one_device_is_not_for_several_processes(monkeypatch):
    monkeypatch.setattr(evaluation.jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"one device cannot serve 2 processes; .* --mesh=gpu:8"):
        mesh.forward_config(small.config(), {}, 16)


def test_a_perplexity_beyond_every_float_is_infinite():
    assert evaluation.perplexity(1.0) == pytest.approx(math.e)
    assert evaluation.perplexity(710.0) == evaluation.perplexity(math.inf) == math.inf
