"""Windows over documents: each target once, with as much before it as fits."""

import numpy as np
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.data import rolling
from deepseek_jax.data.tokenizer import Marks

MARKS = Marks(eos=1, bos=0, fim=None)


@pytest.mark.parametrize(
    "targets, length, stride, want",
    [
        (3, 4, 4, [(0, 3, 3)]),
        (4, 4, 1, [(0, 4, 4)]),
        (9, 4, 4, [(0, 4, 4), (4, 8, 4), (5, 9, 1)]),
        (9, 4, 3, [(0, 4, 4), (3, 7, 3), (5, 9, 2)]),
        (6, 4, 1, [(0, 4, 4), (1, 5, 1), (2, 6, 1)]),
    ],
)
def test_windows(targets, length, stride, want):
    assert list(rolling.windows(targets, length, stride)) == want


@pytest.mark.parametrize("bos, first", [(0, 0), (None, 1)])
def test_every_token_of_a_document_counts_once(bos, first, monkeypatch):
    monkeypatch.setattr(rolling, "BLOCK", 2)
    bodies = [np.arange(10, 17), np.arange(20, 22), np.arange(30, 34)]
    blocks, width = rolling.lay_out(bodies, Marks(1, bos, None), 4, 2)
    sequences, valid = (np.concatenate(part) for part in zip(*blocks, strict=True))
    assert width == 4 and sequences.dtype == np.int32
    assert sequences.tolist() == [
        [first, 10, 11, 12, 13],
        [11, 12, 13, 14, 15],
        [12, 13, 14, 15, 16],
        [first, 20, 21, first, first],
        [first, 30, 31, 32, 33],
    ]
    assert sequences[:, 1:][valid].tolist() == [*np.concatenate(bodies)]
    assert rolling.lay_out(bodies, MARKS, 2**40, 1)[1] == 7  # no wider than the longest


def test_documents_of_token_files(tmp_path):
    np.save(tmp_path / "a.npy", np.array([0, 7, 8, 1, 1, 9, 1, 0, 1, 5], np.uint16))
    np.save(tmp_path / "b.npy", np.array([[0, 7, 1, 1], [0, 8, 9, 4]]))

    def read(name, tokens=100, vocab=16):
        found = rolling.of_tokens([tmp_path / name], MARKS, vocab=vocab, tokens=tokens)
        return [body.tolist() for body in found]

    assert read("a.npy") == [[7, 8], [9], [5]]
    assert read("a.npy", tokens=3) == [[7, 8], [9]]
    assert read("a.npy", tokens=1) == [[7]]
    assert read("b.npy") == [[7], [8, 9, 4]]
    with pytest.raises(ConfigError, match="ids from 7 to 8; the model's go from 0 to 7"):
        read("a.npy", vocab=8)
    np.save(tmp_path / "c.npy", np.array([0, 1, 1]))
    with pytest.raises(ConfigError, match="holds no documents, only end-of-text ids"):
        read("c.npy")
