"""Documents scored apart, in rolling windows: each token of a document once, nothing else.

A document stands after one BOS (EOS where a tokenizer has no BOS), sees no other document, and its
end is not scored. A document of more than `length` tokens is read in windows of `length` tokens:
the first predicts that many, and each later one the next `stride`, with as many tokens before them
as fit. With stride = length this is the rolling log-likelihood of lm-evaluation-harness.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.data import scoring
from deepseek_jax.data.tokenizer import Marks

BLOCK = 256  # windows that are laid out at once


def windows(targets: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows over a document of `targets` tokens after a first one, at position 0.

    Yields:
      First and last position of a window, which has at most `length` + 1 tokens, and the number of
      its last tokens that count.
    """
    last = min(length, targets)
    yield 0, last, last
    while last < targets:
        new = min(stride, targets - last)
        last += new
        yield last - length, last, new


def lay_out(
    bodies: Sequence[np.ndarray], marks: Marks, length: int, stride: int
) -> tuple[Iterator[tuple[np.ndarray, np.ndarray]], int]:
    """Windows of documents, in blocks.

    Args:
      bodies: Ids of each document without marks, at least one.
      marks: BOS, or else EOS, is put before each document.
      length: Most tokens that a window reads.
      stride: Tokens that a later window of a document predicts, from 1 to `length`.

    Returns:
      Blocks of sequences [N, W + 1] int32 and valid [N, W] bool, True for the targets
      `sequences[:, 1:]` that count; and W, which is `length`, or the longest document if that is
      shorter.
    """
    first = marks.eos if marks.bos is None else marks.bos
    width = min(length, max(map(len, bodies)))
    return _blocks(_rows(bodies, first, width, stride)), width


def _blocks(
    rows: Iterator[tuple[np.ndarray, np.ndarray]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    while block := list(itertools.islice(rows, BLOCK)):
        sequences, valid = zip(*block, strict=True)
        yield np.stack(sequences), np.stack(valid)


def _rows(
    bodies: Iterable[np.ndarray], first: int, width: int, stride: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Windows one after another, padded at their ends, which causal attention never reads."""
    for body in bodies:
        ids = np.concatenate([[first], body]).astype(np.int32)
        for start, last, new in windows(len(body), width, stride):
            sequence, valid = np.full(width + 1, first, np.int32), np.zeros(width, bool)
            sequence[: last - start + 1] = ids[start : last + 1]
            valid[last - start - new : last - start] = True
            yield sequence, valid


def of_tokens(files: Sequence[Path], marks: Marks, *, vocab: int, tokens: int) -> list[np.ndarray]:
    """Documents of token files, without marks, until they have `tokens` tokens; the last is cut.

    Raises:
      ConfigError: A file without token ids, ids that the model does not have, or no document.
    """
    found: list[np.ndarray] = []
    for stream in scoring.open_tokens(files, vocab):
        for row in stream if stream.ndim == 2 else (stream,):
            for body in documents_of(row, marks):
                if tokens > 0:
                    found.append(scoring.checked(body[:tokens], vocab, files))
                    tokens -= len(found[-1])
    if not found:
        raise ConfigError(f"{files[0]} holds no documents, only end-of-text ids")
    return found


def documents_of(ids: np.ndarray, marks: Marks) -> Iterator[np.ndarray]:
    """Documents of a stream of ids: what stands between EOS, without a BOS before it."""
    start = 0
    for stop in [*np.flatnonzero(ids == marks.eos), len(ids)]:
        start += int(start < stop and marks.bos is not None and ids[start] == marks.bos)
        if start < stop:
            yield ids[start:stop]
        start = stop + 1
