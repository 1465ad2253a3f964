"""Documents laid out to be scored: every token predicted once, and the bytes they stand for.

Bits per byte is the summed loss over `valid` in bits over `bytes`; `8 * gzip_bytes / bytes` is the
same number for `gzip -9` on the same bytes.
"""

import dataclasses
import gzip

import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.data.corpus import Corpus


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
    marks = corpus.marks
    bos = [] if marks.bos is None else [marks.bos]
    # The first token has nothing to be predicted from: BOS, or the EOS of a document before.
    stream = [] if bos else [np.array([marks.eos])]
    for document in taken:
        stream += [np.array(bos, np.int64), corpus.body(document), np.array([marks.eos])]
    ids = np.concatenate(stream).astype(np.int32)
    text = b"".join(corpus.text(document) for document in taken)
    rows = -(-(len(ids) - 1) // length)
    padded = np.full(rows * length + 1, marks.eos, np.int32)
    padded[: len(ids)] = ids
    index = np.arange(rows)[:, None] * length + np.arange(length + 1)
    return HeldOut(
        sequences=padded[index],
        valid=index[:, 1:] < len(ids),
        bytes=len(text),
        gzip_bytes=len(gzip.compress(text, 9)),
        documents=len(taken),
    )
