"""Documents packed for scoring: every token is predicted once, and their bytes are counted.

Bits per byte is the loss in bits, summed over `valid`, divided by `bytes`. `8 * gzip_bytes / bytes`
is the same figure for `gzip -9`.
"""

import dataclasses
import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import one_line
from deepseek_jax.data import token_files
from deepseek_jax.data.corpus import Corpus
from deepseek_jax.data.source import Source
from deepseek_jax.data.tokenizer import Marks, Tokenizer

_SEED = 20241226  # of the training documents that are scored


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Documents, packed as in training but without fill-in-the-middle; the last one may be cut.

    Attributes:
      sequences: [N, length + 1] int32; neighbours share a token, and the last is padded with EOS.
      valid: [N, length] bool, False for padding among the targets `sequences[:, 1:]`.
      bytes: UTF-8 bytes of the documents.
      gzip_bytes: Bytes of the concatenated documents after `gzip -9`.
      documents: Number of documents.
    """

    sequences: np.ndarray
    valid: np.ndarray
    bytes: int
    gzip_bytes: int
    documents: int


def held_out(corpus: Corpus, *, length: int, tokens: int) -> HeldOut:
    """Packs held-out documents of a corpus, up to `tokens` targets.

    Raises:
      ConfigError: A corpus without held-out documents.
    """
    if not len(corpus.held_out):
        raise ConfigError("data.held_out=0 leaves nothing to evaluate on; set data.held_out=0.02")
    return lay_out(corpus, corpus.held_out, length=length, tokens=tokens)


def held_out_prompts(corpus: Corpus, *, count: int, length: int, tokens: int) -> np.ndarray:
    """Sequences of held-out text to decode, [count, length] int32, evenly spaced.

    They come from the first `tokens` targets of `held_out`, or from as many as `count` sequences
    have: a run with `evaluation.tokens=0` scores none, and can still be decoded.

    Raises:
      ConfigError: A corpus without held-out documents.
    """
    sequences = held_out(corpus, length=length, tokens=max(tokens, count * length)).sequences
    chosen = np.linspace(0, len(sequences) - 1, count).astype(int)
    return sequences[chosen, :length]


def trained(corpus: Corpus, *, length: int, tokens: int) -> HeldOut:
    """Packs training documents in a shuffled order, the same in every run, as `held_out` does."""
    order = np.random.default_rng(_SEED).permutation(corpus.training)
    return lay_out(corpus, order, length=length, tokens=tokens)


def lay_out(corpus: Corpus, documents: np.ndarray, *, length: int, tokens: int) -> HeldOut:
    """Packs documents in the given order, and cuts the last one to have `tokens` targets in all.

    A long document counts as much as it does in training: none is left out for its length.
    """
    bos = int(corpus.marks.bos is not None)
    bodies: list[np.ndarray] = []
    texts: list[bytes] = []
    left = tokens + bos  # the first BOS is no target
    for document in documents:
        room = left - bos
        if room <= 0:
            break
        body = corpus.body(document)
        bodies.append(body[:room])
        texts.append(_beginning(corpus, document, body, room))
        left = room - len(body) - 1
    ids = _stream(bodies, corpus.marks)[: tokens + 1]
    return _packed(ids, b"".join(texts), len(bodies), corpus.marks, length)


def _beginning(corpus: Corpus, document: int, body: np.ndarray, tokens: int) -> bytes:
    """Text of the first tokens of a document, in whole characters."""
    if tokens >= len(body):
        return corpus.text(document)
    if corpus.tokenizer is None:
        return body[:tokens].tobytes()
    return corpus.tokenizer.cut(corpus.text(document).decode(), tokens).encode()


def of_text(
    source: Source | Sequence[str], words: Tokenizer, *, length: int, tokens: int
) -> HeldOut:
    """Packs documents in their order, and cuts the last one to have `tokens` targets in all.

    Raises:
      ConfigError: Documents without text.
    """
    bos = words.marks.bos is not None
    # The first BOS is no target.
    bodies, text = read(source, words, tokens=tokens + bos, before=int(bos), after=1)
    ids = _stream(bodies, words.marks)[: tokens + 1]
    return _packed(ids, text, len(bodies), words.marks, min(length, len(ids) - 1))


def read(
    source: Source | Sequence[str],
    words: Tokenizer,
    *,
    tokens: int,
    before: int = 0,
    after: int = 0,
) -> tuple[list[np.ndarray], bytes]:
    """Reads documents in their order until they have `tokens` tokens; the last one is cut.

    Args:
      source: Text documents; those without text are left out.
      words: Tokenizer.
      tokens: Largest number of tokens.
      before, after: Tokens that a document has before and after its text.

    Returns:
      Ids of the text of each document, and its text; of the last one, whole characters.

    Raises:
      ConfigError: Documents without text.
    """
    bodies: list[np.ndarray] = []
    texts: list[bytes] = []
    for document in range(len(source)):
        if tokens <= 0:
            break
        text = source[document]
        body = next(words.encode([text]))
        if not len(body):
            continue
        room = max(tokens - before, 0)
        if len(body) > room:
            body, text = body[:room], words.cut(text, room)
        bodies.append(body)
        texts.append(text.encode())
        tokens -= before + len(body) + after
    if not bodies:
        raise ConfigError("the documents to score hold no text; set data.path to other ones")
    return bodies, b"".join(texts)


def _stream(bodies: Sequence[np.ndarray], marks: Marks) -> np.ndarray:
    """Tokens of documents with their marks; the first one is no target.

    It is BOS, or the EOS of a preceding document.
    """
    bos = [] if marks.bos is None else [marks.bos]
    stream = [] if bos else [np.array([marks.eos])]
    for body in bodies:
        stream += [np.array(bos, np.int64), body, np.array([marks.eos])]
    return np.concatenate(stream or [np.zeros(0)]).astype(np.int32)


def _packed(ids: np.ndarray, text: bytes, documents: int, marks: Marks, length: int) -> HeldOut:
    """Cuts a stream of documents into sequences, and counts the bytes of its text.

    Raises:
      ConfigError: No text, of which bits per byte would be infinite.
    """
    if not text:
        raise ConfigError(
            "the documents to score hold no text; set data.path to other ones, or data.tokenizer "
            "to the one that wrote the ids"
        )
    sequences, valid = _rows(ids, length, marks.eos)
    return HeldOut(
        sequences=sequences,
        valid=valid,
        bytes=len(text),
        gzip_bytes=len(gzip.compress(text, 9)),
        documents=documents,
    )


def _rows(ids: np.ndarray, length: int, padding: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a stream into (rows [N, length + 1] that share one token, valid targets)."""
    rows = -(-(len(ids) - 1) // length)
    padded = np.full(rows * length + 1, padding, np.int32)
    padded[: len(ids)] = ids
    index = np.arange(rows)[:, None] * length + np.arange(length + 1)
    return padded[index], index[:, 1:] < len(ids)


def of_tokens(
    files: Sequence[Path], *, vocab: int, length: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Packs the ids of token files without marks; the first token of a file is no target.

    Args:
      files: Token files. A single `.npy` file may have a table [N, T] instead of a stream; each
        row is then a separate text, and `length` is not used.
      vocab: `model.vocab`, above all ids.
      length: Targets of a sequence.
      tokens: Most targets that are valid.

    Returns:
      Sequences [N, length + 1] int32 and valid [N, length] bool, as in `HeldOut`.

    Raises:
      ConfigError: A file without token ids, or ids that the model does not have.
    """
    parts = []
    streams = open_tokens(files, vocab)
    length = min(length, max(ids.shape[-1] for ids in streams) - 1)
    if not length:
        raise ConfigError(f"{one_line(files[0])} holds one token; expected at least two")
    for ids in streams:
        if ids.ndim == 2:
            rows = checked(ids[: -(-tokens // (ids.shape[1] - 1))], vocab, files)
            parts.append((rows, np.ones((len(rows), rows.shape[1] - 1), bool)))
        elif len(ids) > 1:
            parts.append(_rows(checked(ids[: tokens + 1], vocab, files), length, 0))
    sequences, valid = (np.concatenate(part) for part in zip(*parts, strict=True))
    return sequences, valid & (np.cumsum(valid).reshape(valid.shape) <= tokens)


def open_tokens(files: Sequence[Path], vocab: int) -> list[np.ndarray]:
    """Ids of token files, memory-mapped: one table [N, T], or the stream [N] of each file.

    Raises:
      ConfigError: A file without token ids.
    """
    table = _table(files)
    return [token_files.open_shard(f, vocab)[0].ids for f in files] if table is None else [table]


def checked(ids: np.ndarray, vocab: int, files: Sequence[Path]) -> np.ndarray:
    """Ids as int32, if a model of `vocab` tokens has them all.

    Raises:
      ConfigError: An id outside, before it is narrowed to 32 bits; the message names `files`.
    """
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab:
        raise ConfigError(
            f"{one_line(files[0].parent if len(files) > 1 else files[0])} holds ids from {lowest} "
            f"to {highest}; the model's go from 0 to {vocab - 1}"
        )
    return ids.astype(np.int32)


def _table(files: Sequence[Path]) -> np.ndarray | None:
    """Table [N, T] of ids of a single `.npy` file; None for other files."""
    if len(files) > 1:
        return None
    try:
        ids = np.load(files[0], mmap_mode="r", allow_pickle=False)
    except Exception:  # of any kind; opening the file as a stream reports the error
        return None
    if (
        not isinstance(ids, np.ndarray)
        or ids.ndim != 2
        or ids.dtype.kind not in "ui"
        or not ids.size
        or ids.shape[1] < 2
    ):
        return None
    return ids
