"""Scoring a checkpoint: the published loss on any mesh, bits per byte, and what is refused."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small
from equations import checkpoints

import deepseek_jax
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError
from deepseek_jax.data import tokenizer
from deepseek_jax.errors import RunError
from deepseek_jax.parallel import mesh
from deepseek_jax.train import evaluation

TINY = Path(__file__).parents[1] / "fixtures" / "hf_tiny"


def scored(directory, data, length=16, tokens=2**62, stride=None, **mesh):
    base = small.config(batch_micro_sequences=2, batch_sequences=2, batch_ramp_sequences=2)
    rest = dict(mesh=mesh, length=length, tokens=tokens, stride=stride)
    return evaluation.score_checkpoint(open_checkpoint(directory), str(data), base, **rest)


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
    assert (part["bytes"], part["tokens"]) == (10, 10)


@pytest.mark.parametrize("stride", [16, 5])
def test_documents_apart_are_scored_as_each_alone(folder, tmp_path, stride):
    """One forward pass for each target, over the tokens that its window shows before it."""
    texts = ["a word, and another one.\n" * 2, "", "short", "of sixteen bytes"]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "rows.jsonl").write_text(rows)
    found = scored(folder, tmp_path / "rows.jsonl", stride=stride)
    model, width = deepseek_jax.load(folder), 16
    nats = []
    for text in filter(None, texts):
        ids = np.array([0, *(6 + byte for byte in text.encode())])
        logits = {}
        for target in range(1, len(ids)):
            # The last target of this one's window: the first 16, then every `stride`.
            last = width + max(0, -(-(target - width) // stride)) * stride
            last = min(last, len(ids) - 1)
            start = max(0, last - width)
            if last not in logits:
                window = np.zeros((1, width), np.int32)
                window[0, : last - start] = ids[start:last]
                logits[last] = np.asarray(model(window).logits[0], np.float64)
            row = logits[last][target - 1 - start]
            nats.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[target]])
    size = sum(map(len, texts))
    assert (found["tokens"], found["bytes"], found["documents"]) == (len(nats), size, 3)
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(np.sum(nats) / math.log(2) / size, rel=1e-5)


def test_a_loss_beyond_numbers_is_told(folder, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("text")
    for nats, perplexity in ((5 * 709.0, math.exp(709)), (5 * 710.0, math.inf)):
        fixed = evaluation.Score(nats, 5)
        monkeypatch.setattr(evaluation, "make_score", lambda *_, one=fixed, **__: lambda *_: one)
        assert scored(folder, tmp_path / "text.txt")["perplexity"] == perplexity
    lost = evaluation.Score(math.nan, 5)
    monkeypatch.setattr(evaluation, "make_score", lambda *_, **__: lambda *_: lost)
    with pytest.raises(RunError, match=r"^the loss is not a number: activations overflow"):
        scored(folder, tmp_path / "text.txt")


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
    np.save(tmp_path / "wide.npy", np.array([[3, 2**32 + 4]]))  # 4 in 32 bits
    with pytest.raises(ConfigError, match="ids from 3 to 4294967300"):
        scored(folder, tmp_path / "wide.npy")
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    for stride in (None, 4):
        with pytest.raises(ConfigError, match="documents to score hold no text"):
            scored(folder, tmp_path / "rows.jsonl", stride=stride)
    with pytest.raises(ConfigError, match=r"^stride=17; expected 1 to batch\.length=16$"):
        scored(folder, tmp_path / "text.txt", stride=17)
    with pytest.raises(ConfigError, match="needs 3 devices and there are 8"):
        scored(folder, tmp_path / "two.npy", gpu=3)


def test_one_device_is_not_for_several_processes(monkeypatch):
    monkeypatch.setattr(evaluation.jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"one device cannot serve 2 processes; .* --mesh=gpu:8"):
        mesh.forward_config(small.config(), {}, 16)


@pytest.mark.parametrize(
    "run, settings, length",
    [
        (128, {}, 128),
        (None, {"max_position_embeddings": 4096}, 1024),
        (None, {"max_position_embeddings": 512}, 512),
        (None, {"max_position_embeddings": None}, 1024),
        (None, {}, 1024),
    ],
)
def test_a_checkpoint_is_scored_at_the_length_of_its_run(run, settings, length):
    made_by = None if run is None else SimpleNamespace(batch=SimpleNamespace(length=run))
    assert evaluation.length_of(SimpleNamespace(run=made_by, text_settings=settings)) == length


def test_a_perplexity_beyond_every_float_is_infinite():
    assert evaluation.perplexity(1.0) == pytest.approx(math.e)
    assert evaluation.perplexity(710.0) == evaluation.perplexity(math.inf) == math.inf
