"""Corpus: tokenised documents, memory-mapped, with a held-out share.

Text is tokenised once into `data.cache` (`cache.py`), in a folder whose name is a hash of the
content of the documents, the tokenizer and the held-out share. Token files stay in place; the cache
has only the index of their documents, under a hash of their content. All tokens are therefore read
and hashed once by each process at its start, on all cores.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.config import ConfigError, DataConfig
from deepseek_jax.config.hints import one_line
from deepseek_jax.data import cache, token_files, tokenizer
from deepseek_jax.data import split as splits
from deepseek_jax.data.source import Source, open_source
from deepseek_jax.data.source import token_files as find_token_files
from deepseek_jax.data.split import split
from deepseek_jax.data.token_files import Shard
from deepseek_jax.data.tokenizer import Marks, Tokenizer
from deepseek_jax.errors import RunError

_SLOW = 1 << 30  # bytes of token files whose check is announced
_SEED = 20241226  # of the documents that a tokenizer is trained on
_SAMPLE = 1 << 16  # tokens that the digest of older runs covers


@dataclasses.dataclass(frozen=True)
class Facts:
    """Counts of a corpus, for messages.

    Attributes:
      documents: All documents.
      held_out_documents: Documents that are never trained on.
      tokens: Tokens of all documents, BOS and EOS included.
      bytes: Bytes of the text, or of the token files.
      tokenizer: Description of the tokenizer.
      eos: Id of the end-of-text mark.
    """

    documents: int
    held_out_documents: int
    tokens: int
    bytes: int
    tokenizer: str
    eos: int


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """D tokenised documents, by number.

    Attributes:
      shards: Ids of one stream, in one or more memory-mapped files.
      spans: [D, 2] int64, start and stop of each document in the stream, without marks.
      training: Numbers of the documents to train on.
      held_out: Numbers of the held-out documents.
      marks: Ids of the marks around documents.
      tokenizer: Tokenizer; None for token files without a known tokenizer.
      text: Document number -> UTF-8 bytes, or stored ids without a tokenizer.
      digest: Hash of the content of the tokens, their documents, their split and their marks.
      older_digest: Hash that older runs kept, of lengths, of the first tokens and of the marks.
      apart: True if the rule of older runs would split equal documents, and this one does not.
      facts: Counts.
    """

    shards: tuple[Shard, ...]
    spans: np.ndarray
    training: np.ndarray
    held_out: np.ndarray
    marks: Marks
    tokenizer: Tokenizer | None
    text: Callable[[int], bytes]
    digest: str
    older_digest: str
    apart: bool
    facts: Facts

    def body(self, document: int) -> np.ndarray:
        """Tokens of a document, [N], without marks; a view, not a copy.

        Raises:
          RunError: The file became shorter.
        """
        start, stop = self.spans[document]
        for shard in self.shards:
            if start < len(shard.ids):
                shard.check()
                return shard.ids[start:stop]
            start, stop = start - len(shard.ids), stop - len(shard.ids)
        raise IndexError(document)

    @property
    def around(self) -> int:
        """Number of marks around each document: EOS, and BOS if there is one."""
        return 1 + (self.marks.bos is not None)


def prepare(
    config: DataConfig,
    *,
    vocab: int,
    say: Callable[[str], None] = lambda text: None,
    rule: int = splits.RULE,
) -> Corpus:
    """Opens the corpus of a config, and builds it first if the cache does not have it.

    Args:
      config: Data section of the config.
      vocab: `model.vocab`, above all ids.
      say: Receives a line on each slow operation and on skipped files.
      rule: Rule by which the corpus is made (`split.py`); that of the run that is resumed.

    Raises:
      ConfigError: Bad data, a bad tokenizer or a bad cache.
    """
    if not 0 <= config.held_out < 1:
        raise ConfigError(f"data.held_out={config.held_out}; expected at least 0 and below 1")
    if not 0 <= config.fim_rate <= 1:
        raise ConfigError(f"data.fim_rate={config.fim_rate}; expected a probability, from 0 to 1")
    if files := find_token_files(config.path):
        corpus = _from_tokens(config, files, vocab, say, rule)
    else:
        corpus = _from_text(config, vocab, say, rule)
    if config.fim_rate and corpus.marks.fim is None:
        raise ConfigError(
            f"data.fim_rate={config.fim_rate}, but {corpus.facts.tokenizer} has no "
            "fill-in-the-middle marks; set data.fim_rate=0, or data.tokenizer to one that has them"
        )
    return corpus


def is_made_anew(config: DataConfig) -> bool:
    """Whether rule 3 makes another corpus than rule 2: of the default text, or with its own BPE."""
    if find_token_files(config.path):
        return False
    return not config.path or config.tokenizer == "bpe"


@dataclasses.dataclass(frozen=True)
class _Index:
    """Documents of a corpus, as the cache keeps them.

    Attributes:
      spans: [D, 2], start and stop of each document in the stream.
      equal: [D], the same number for equal documents; None if no two are equal.
      rows: [D], row of the source; empty for token files.
    """

    spans: np.ndarray
    equal: np.ndarray | None
    rows: np.ndarray


def _write_index(
    folder: Path, spans: np.ndarray, equal: np.ndarray, rows: np.ndarray | None = None
) -> dict[str, int]:
    """Writes the documents of an entry, and returns facts on them."""
    columns = [spans[:, 0], spans[:, 1], equal] + ([] if rows is None else [rows])
    np.save(folder / "documents.npy", np.stack(columns, axis=1).astype(np.int64))
    return {"twins": len(equal) - len(np.unique(equal))}


def _read_index(entry: cache.Entry, tokens: int, rows: int) -> _Index:
    """Reads the documents of an entry; raises Damaged if they cannot be those of its tokens.

    Args:
      entry: The entry.
      tokens: Tokens of the stream.
      rows: Rows of the source; 0 for token files.
    """
    table = entry.array("documents.npy")
    if table.ndim != 2 or table.shape[1] != 3 + bool(rows) or table.dtype != np.int64:
        raise cache.Damaged(f"documents.npy has {table.dtype} of shape {table.shape}")
    starts, stops = table[:, 0], table[:, 1]
    inside = not len(table) or (starts[0] >= 0 and stops[-1] <= tokens)
    if not inside or (starts > stops).any() or (stops[:-1] > starts[1:]).any():
        raise cache.Damaged("documents.npy has spans outside the tokens")
    row = table[:, 3] if rows else np.zeros(0, np.int64)
    if len(row) and (row[0] < 0 or row[-1] >= rows or (row[:-1] >= row[1:]).any()):
        raise cache.Damaged("documents.npy has rows outside the source")
    equal = table[:, 2] if entry.facts["twins"] else None
    return _Index(np.ascontiguousarray(table[:, :2]), equal, row)


def _from_text(config: DataConfig, vocab: int, say: Callable[[str], None], rule: int) -> Corpus:
    source = open_source(config.path, config.text_key, say, tables=rule < 3)
    words_of = tokenizer.identity(config.tokenizer, vocab, sample=rule >= 3)
    made_of = [source.digest, words_of, str(config.held_out)]
    made_of += ["rule 1"] if rule == 1 else []  # equal sources and tokenizers, another split

    def build(folder: Path) -> dict[str, Any]:
        return _tokenise(source, config, vocab, folder, say, rule)

    def read(entry: cache.Entry) -> tuple[Shard, _Index, Tokenizer, str, int]:
        facts = entry.facts
        with entry.open("tokens.bin") as descriptor:
            name = one_line(entry.folder / "tokens.bin")
            tokens = Shard(descriptor, name, np.dtype(facts["dtype"]))
        index = _read_index(entry, len(tokens.ids), len(source))
        if len(tokens.ids) != index.spans[-1, 1] or tokens.ids.max() > facts["largest"]:
            raise cache.Damaged("tokens.bin has other tokens")
        words = tokenizer.read(entry.folder / "tokenizer.json")
        words.description = facts["tokenizer"]
        return tokens, index, words, entry.hash_of("tokens.bin"), facts["bytes"]

    tokens, index, words, content, size = cache.entry(config.cache, made_of, build, read, say)
    tokenizer.fitting(words, vocab)

    def text(document: int) -> bytes:
        try:
            return source[int(index.rows[document])].encode()
        except ConfigError as error:
            raise RunError(f"the text went away after the start: {error}") from error

    return _corpus(
        (tokens,), [content], index, words.marks, words, text, config.held_out, size,
        words.description, rule, say,
    )  # fmt: skip


def _tokenise(
    source: Source,
    config: DataConfig,
    vocab: int,
    folder: Path,
    say: Callable[[str], None],
    rule: int,
) -> dict[str, Any]:
    """Writes a folder of the cache; a tokenizer is trained on the training documents only."""
    sizes, found = [], []
    for row in range(len(source)):
        text = source[row].encode()
        sizes.append(len(text))
        words_alone = b" ".join(text.split())  # other line ends or spaces make no other document
        found.append(hashlib.blake2b(words_alone, digest_size=8).digest())
    rows = np.flatnonzero(sizes)
    equal = np.frombuffer(b"".join(found), "<i8")[rows]
    training, _ = split(len(rows), config.held_out, equal, rule=rule)
    if config.tokenizer == "bpe":
        say("data: training a tokenizer")
    texts: Iterator[str] = (source[int(rows[i])] for i in training)
    if rule == splits.RULE:
        texts = _sample(source, rows[training], tokenizer.SAMPLE * vocab)
    words = tokenizer.make(config.tokenizer, vocab=vocab, texts=texts)
    say(f"data: tokenising {sum(sizes) / 1e6:,.1f} MB with {words.description}")
    dtype = "<u2" if words.size <= 1 << 16 else "<u4"
    lengths, largest = [], 0
    with (folder / "tokens.bin").open("wb") as stream:
        for ids in words.encode(source[int(row)] for row in rows):
            stream.write(ids.astype(dtype).tobytes())
            lengths.append(len(ids))
            largest = max(largest, int(ids.max(initial=0)))
    if not sum(lengths):
        raise ConfigError(
            f"data.tokenizer: {words.description} has no token for any text of data.path; set "
            "data.tokenizer to another one"
        )
    stops = np.cumsum(lengths)
    facts = _write_index(folder, np.stack([stops - lengths, stops], axis=1), equal, rows)
    words.save(folder / "tokenizer.json")
    return facts | {
        "dtype": dtype,
        "bytes": sum(sizes),
        "tokenizer": words.description,
        "largest": largest,
    }


def _sample(source: Source, rows: np.ndarray, characters: int) -> Iterator[str]:
    """Yields documents in a shuffled order, up to a number of characters; the last one is cut."""
    for row in np.random.default_rng(_SEED).permutation(rows):
        if characters <= 0:
            return
        text = source[int(row)][:characters]
        characters -= len(text)
        yield text


def _from_tokens(
    config: DataConfig, files: list[Path], vocab: int, say: Callable[[str], None], rule: int
) -> Corpus:
    """Opens token files.

    With data.tokenizer="bpe", which cannot be trained on ids, the ids of BOS and EOS are those of
    `tokenizer.OWN_MARKS`, and fill-in-the-middle takes the first ids that the files do not use.
    """
    words, marks = None, Marks(eos=tokenizer.OWN_MARKS.index(tokenizer.EOS), bos=0, fim=None)
    if config.tokenizer != "bpe":
        words = tokenizer.make(config.tokenizer, vocab=vocab, texts=())
        marks = words.marks
    if (size := sum(file.stat().st_size for file in files)) > _SLOW:
        say(f"data: checking {size / 1e9:,.1f} GB of tokens")
    opened = [token_files.open_shard(file, vocab) for file in files]
    shards, contents = tuple(shard for shard, _ in opened), [content for _, content in opened]

    def build(folder: Path) -> dict[str, Any]:
        say(f"data: looking for documents in {sum(len(s.ids) for s in shards):,} tokens")
        found = token_files.scan(shards, eos=marks.eos, bos=marks.bos)
        equal = token_files.hashes(shards, found.spans)
        facts = _write_index(folder, found.spans, equal)
        return facts | {"largest": found.largest, "has_bos": found.has_bos}

    def read(entry: cache.Entry) -> tuple[_Index, int, bool]:
        index = _read_index(entry, sum(len(shard.ids) for shard in shards), 0)
        return index, entry.facts["largest"] + 1, entry.facts["has_bos"]

    made_of = [f"{marks.eos} {marks.bos}", *contents]
    index, used, has_bos = cache.entry(config.cache, made_of, build, read, say)
    _check_ids(config, used, vocab, words)
    if words is None:
        if config.fim_rate:
            marks = dataclasses.replace(marks, fim=_unused_ids(config, used, vocab))
        say("data: these token files have no data.tokenizer; assuming id 1 as end of text")
    if not has_bos:
        marks = dataclasses.replace(marks, bos=None)

    def text(document: int) -> bytes:
        ids = corpus.body(document)
        return ids.tobytes() if words is None else words.decode(ids).encode()

    size = sum(shard.ids.nbytes for shard in shards)
    description = words.description if words else "token files of an unnamed tokenizer"
    corpus = _corpus(
        shards, contents, index, marks, words, text, config.held_out, size, description, rule, say
    )
    return corpus


def _check_ids(config: DataConfig, used: int, vocab: int, words: Tokenizer | None) -> None:
    """Raises ConfigError if token files have ids that the model or the tokenizer has not."""
    if used > vocab:
        raise ConfigError(
            f"model.vocab={vocab} is too small for data.path={one_line(config.path)!r}, whose ids "
            f"reach {used - 1}; set model.vocab to at least {used}, or data.path to other tokens"
        )
    if words is not None and used > words.size:
        raise ConfigError(
            f"data.path={one_line(config.path)!r} has ids up to {used - 1}, and data.tokenizer "
            f"({words.description}) ends at {words.size - 1}; set data.tokenizer to the one "
            "that wrote the files"
        )


def _unused_ids(config: DataConfig, used: int, vocab: int) -> tuple[int, int, int]:
    """First three ids, after those of token files and of marks, for fill-in-the-middle."""
    first = max(used, len(tokenizer.OWN_MARKS))
    if first + 3 > vocab:
        raise ConfigError(
            f"data.fim_rate={config.fim_rate} needs three unused ids, and the ids of "
            f"data.path={one_line(config.path)!r} leave too few below model.vocab={vocab}; set "
            f"data.fim_rate=0, model.vocab to at least {first + 3}, or data.tokenizer to the "
            "tokenizer.json that wrote them"
        )
    return first, first + 1, first + 2


def _corpus(
    shards: tuple[Shard, ...],
    contents: list[str],
    index: _Index,
    marks: Marks,
    words: Tokenizer | None,
    text: Callable[[int], bytes],
    share: float,
    size: int,
    description: str,
    rule: int,
    say: Callable[[str], None],
) -> Corpus:
    spans = index.spans
    training, held_out = split(len(spans), share, index.equal, rule=rule)
    apart = False
    if index.equal is not None:
        apart = not np.array_equal(held_out, split(len(spans), share)[1])
        _report_twins(index.equal, training, held_out, say)
    around = 1 + (marks.bos is not None)
    lengths = spans[:, 1] - spans[:, 0]
    hasher = hashlib.blake2b(f"{marks} {share}".encode(), digest_size=16)
    whole = hasher.copy()
    hasher.update(lengths.astype("<i8").tobytes())
    hasher.update(shards[0].ids[:_SAMPLE].astype("<u4").tobytes())
    whole.update("\n".join(contents).encode())
    whole.update(spans.astype("<i8").tobytes())
    whole.update(held_out.astype("<i8").tobytes())
    facts = Facts(
        documents=len(spans),
        held_out_documents=len(held_out),
        tokens=int(lengths.sum()) + around * len(spans),
        bytes=size,
        tokenizer=description,
        eos=marks.eos,
    )
    return Corpus(
        shards, spans, training, held_out, marks, words, text, whole.hexdigest(),
        hasher.hexdigest(), apart, facts,
    )  # fmt: skip


def _report_twins(
    equal: np.ndarray, training: np.ndarray, held_out: np.ndarray, say: Callable[[str], None]
) -> None:
    """Says how many documents are equal to others, and whether the split has them on both sides."""
    both = int(np.isin(equal[held_out], equal[training]).sum())
    say(
        f"data: {len(equal) - len(np.unique(equal)):,} documents equal an earlier one; "
        f"{both or 'no'} held-out documents equal one that is trained on"
        f"{', and their score tells little' if both else ''}"
    )
