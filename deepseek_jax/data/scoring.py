"""Documents laid out to be scored: every token predicted once, and the bytes they stand for.

Bits per byte is the summed loss over `valid` in bits over `bytes`; `8 * gzip_bytes / bytes` is the
same number for `gzip -9` on the same bytes.
"""

import dataclasses
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.data import token_files
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.source import Source
from deepseek_jax.data.tokenizer import Marks, Tokenizer


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Whole documents, packed as in training but without fill-in-the-middle.

    Attributes:
      sequences: [N, length + 1] int32; neighbours share a token, the last is padded with EOS.
      valid: [N, length] bool, which of the targets `sequences[:, 1:]` count: all but the padding.
      bytes: length of the documents in UTF-8.
      gzip_bytes: what `gzip -9` makes of them, one after another.
      documents: how many they are.
    """

    sequences: np.ndarray
    valid: np.ndarray
    bytes: int
    gzip_bytes: int
    documents: int


def held_out(corpus: Corpus, *, length: int, tokens: int) -> HeldOut:
    """The corpus's held-out documents, as far as `tokens` targets go.

    Raises:
      ConfigError: none were held out.
    """
    if not len(corpus.held_out):
        raise ConfigError("data.held_out=0 leaves nothing to evaluate on; set data.held_out=0.02")
    return lay_out(corpus, corpus.held_out, length=length, tokens=tokens)


def lay_out(corpus: Corpus, documents: np.ndarray, *, length: int, tokens: int) -> HeldOut:
    """Packs those of some documents that fit into `tokens` targets; the shortest if none does."""
    spans = corpus.spans[documents]
    lengths = spans[:, 1] - spans[:, 0] + corpus.around
    taken, total = [], 0
    for document, size in zip(documents, lengths, strict=True):
        if total + size <= tokens:
            taken.append(int(document))
            total += int(size)
    taken = taken or [int(documents[np.argmin(lengths)])]
    bodies = [corpus.body(document) for document in taken]
    text = b"".join(corpus.text(document) for document in taken)
    return _packed(bodies, text, corpus.marks, length)


def of_text(source: Source, words: Tokenizer, *, length: int, tokens: int) -> HeldOut:
    """Documents in their order, whole but for the last, where `tokens` targets end."""
    bodies: list[np.ndarray] = []
    texts: list[bytes] = []
    left = tokens
    for document in range(len(source)):
        text = source[document]
        if left <= 0 or not text:
            continue
        body = next(words.encode([text]))
        if len(body) > left:
            body = body[:left]
            text = words.decode(body)
        bodies.append(body)
        texts.append(text.encode())
        left -= len(body) + 1 + (words.marks.bos is not None)
    return _packed(bodies, b"".join(texts), words.marks, length)


def _packed(bodies: Sequence[np.ndarray], text: bytes, marks: Marks, length: int) -> HeldOut:
    """Documents between their marks, one after another, and the bytes that they stand for."""
    bos = [] if marks.bos is None else [marks.bos]
    # The first token has nothing to be predicted from: BOS, or the EOS of a document before.
    stream = [] if bos else [np.array([marks.eos])]
    for body in bodies:
        stream += [np.array(bos, np.int64), body, np.array([marks.eos])]
    ids = np.concatenate(stream).astype(np.int32)
    sequences, valid = _rows(ids, length, marks.eos)
    return HeldOut(
        sequences=sequences,
        valid=valid,
        bytes=len(text),
        gzip_bytes=len(gzip.compress(text, 9)),
        documents=len(bodies),
    )


def _rows(ids: np.ndarray, length: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """A stream cut into rows [N, length + 1] that share one token, and which targets count."""
    rows = -(-(len(ids) - 1) // length)
    padded = np.full(rows * length + 1, padding, np.int32)
    padded[: len(ids)] = ids
    index = np.arange(rows)[:, None] * length + np.arange(length + 1)
    return padded[index], index[:, 1:] < len(ids)


def of_tokens(
    files: Sequence[Path], *, vocab: int, length: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of token files as they are: no mark is added, and the first of a file is given.

    Args:
      files: a `.npy` file may hold a table [N, T] instead of a stream: then each row is a text of
        its own, and `length` does not matter.
      tokens: how many targets at most.

    Returns:
      sequences [N, length + 1] int32 and valid [N, length] bool, as in `HeldOut`.

    Raises:
      ConfigError: a file that holds no token ids, or ids that the model does not have.
    """
    if table := _table(files):
        parts = [table]
    else:
        shards = [token_files.open_shard(file, vocab) for file in files]
        longest = max(map(len, shards)) - 1
        if not longest:
            raise ConfigError(f"{files[0]} holds one token; expected at least two")
        length = min(length, longest)
        parts = [_rows(ids[: tokens + 1], length, 0) for ids in shards if len(ids) > 1]
    sequences, valid = (np.concatenate(part) for part in zip(*parts, strict=True))
    lowest, highest = int(sequences.min()), int(sequences.max())
    if lowest < 0 or highest >= vocab:
        raise ConfigError(
            f"{files[0].parent if len(files) > 1 else files[0]} holds ids from {lowest} to "
            f"{highest}; the model's go from 0 to {vocab - 1}"
        )
    return sequences, valid & (np.cumsum(valid).reshape(valid.shape) <= tokens)


def _table(files: Sequence[Path]) -> tuple[np.ndarray, np.ndarray] | None:
    if len(files) > 1 or files[0].suffix.lower() != ".npy":
        return None
    try:
        ids = np.load(files[0], mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        return None  # opening it as a stream says what is wrong
    if ids.ndim != 2 or ids.dtype.kind not in "ui" or not ids.size or ids.shape[1] < 2:
        return None
    return ids.astype(np.int32), np.ones((len(ids), ids.shape[1] - 1), bool)
