"""Corpus: tokenised documents, memory-mapped, with a held-out share.

Text is tokenised once into `data.cache`, in a folder whose name is a hash of the content of the
documents, the tokenizer and the held-out share. A folder appears by an atomic rename, so that any
number of processes may start at once and share the first complete one. Token files stay in place;
the cache has only the index of their documents.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from deepseek_jax.config import ConfigError, DataConfig
from deepseek_jax.data import token_files, tokenizer
from deepseek_jax.data.source import Source, open_source
from deepseek_jax.data.source import token_files as find_token_files
from deepseek_jax.data.tokenizer import Marks, Tokenizer

FORMAT = 1  # version of the cache, part of every key
_SPLIT_SEED = 20241226  # the same split in every run: a held-out document stays held out
_SAMPLE = 1 << 16  # tokens that a digest covers


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
      shards: Ids of one stream, in one or more memory-mapped arrays.
      spans: [D, 2] int64, start and stop of each document in the stream, without marks.
      training: Numbers of the documents to train on.
      held_out: Numbers of the held-out documents.
      marks: Ids of the marks around documents.
      tokenizer: Tokenizer; None for token files without a known tokenizer.
      text: Document number -> UTF-8 bytes, or stored ids without a tokenizer.
      digest: Hash that changes with the training stream.
      facts: Counts.
    """

    shards: tuple[np.ndarray, ...]
    spans: np.ndarray
    training: np.ndarray
    held_out: np.ndarray
    marks: Marks
    tokenizer: Tokenizer | None
    text: Callable[[int], bytes]
    digest: str
    facts: Facts

    def body(self, document: int) -> np.ndarray:
        """Tokens of a document, [N], without marks; a view, not a copy."""
        start, stop = self.spans[document]
        for shard in self.shards:
            if start < len(shard):
                return shard[start:stop]
            start, stop = start - len(shard), stop - len(shard)
        raise IndexError(document)

    @property
    def around(self) -> int:
        """Number of marks around each document: EOS, and BOS if there is one."""
        return 1 + (self.marks.bos is not None)


def prepare(
    config: DataConfig, *, vocab: int, say: Callable[[str], None] = lambda text: None
) -> Corpus:
    """Opens the corpus of a config, and builds it first if the cache does not have it.

    Args:
      config: Data section of the config.
      vocab: `model.vocab`, above all ids.
      say: Receives a line on each slow operation and on skipped files.

    Raises:
      ConfigError: Bad data, a bad tokenizer or a bad cache.
    """
    if not 0 <= config.held_out < 1:
        raise ConfigError(f"data.held_out={config.held_out}; expected at least 0 and below 1")
    if not 0 <= config.fim_rate <= 1:
        raise ConfigError(f"data.fim_rate={config.fim_rate}; expected a probability, from 0 to 1")
    if files := find_token_files(config.path):
        corpus = _from_tokens(config, files, vocab, say)
    else:
        corpus = _from_text(config, vocab, say)
    if config.fim_rate and corpus.marks.fim is None:
        raise ConfigError(
            f"data.fim_rate={config.fim_rate}, but {corpus.facts.tokenizer} has no "
            "fill-in-the-middle marks; set data.fim_rate=0, or data.tokenizer to one that has them"
        )
    return corpus


def _from_text(config: DataConfig, vocab: int, say: Callable[[str], None]) -> Corpus:
    source = open_source(config.path, config.text_key, say)
    made_of = [source.digest, tokenizer.identity(config.tokenizer, vocab), str(config.held_out)]

    def build(folder: Path) -> None:
        _tokenise(source, config, vocab, folder, say)

    folder = _cached(config.cache, made_of, build)
    with _reading(folder):
        meta = json.loads((folder / "meta.json").read_text())
        size, description = meta["bytes"], meta["tokenizer"]
        words = tokenizer.read(folder / "tokenizer.json")
        documents = np.load(folder / "documents.npy")  # [D, 3]: start, stop, row of the source
        tokens = np.memmap(folder / "tokens.bin", meta["dtype"], "r").view(np.ndarray)
        if len(tokens) != documents[-1, 1]:
            raise ValueError(f"{len(tokens)} tokens, not {documents[-1, 1]}")
    words.description = description
    tokenizer.fitting(words, vocab)
    rows = documents[:, 2]
    return _corpus(
        (tokens,),
        documents[:, :2],
        words.marks,
        words,
        lambda document: source[int(rows[document])].encode(),
        share=config.held_out,
        size=size,
        description=words.description,
    )


def _tokenise(
    source: Source, config: DataConfig, vocab: int, folder: Path, say: Callable[[str], None]
) -> None:
    """Writes a folder of the cache; a tokenizer is trained on the training documents only."""
    sizes = [len(source[row].encode()) for row in range(len(source))]
    rows = np.flatnonzero(sizes)
    training, _ = split(len(rows), config.held_out)
    if config.tokenizer == "bpe":
        say(f"data: training a tokenizer on {len(training):,} documents")
    words = tokenizer.make(
        config.tokenizer, vocab=vocab, texts=(source[int(rows[i])] for i in training)
    )
    say(f"data: tokenising {sum(sizes) / 1e6:,.1f} MB with {words.description}")
    dtype = "<u2" if words.size <= 1 << 16 else "<u4"
    lengths = []
    with (folder / "tokens.bin").open("wb") as stream:
        for ids in words.encode(source[int(row)] for row in rows):
            stream.write(ids.astype(dtype).tobytes())
            lengths.append(len(ids))
    stops = np.cumsum(lengths)
    np.save(folder / "documents.npy", np.stack([stops - lengths, stops, rows], axis=1))
    words.save(folder / "tokenizer.json")
    meta = {"dtype": dtype, "bytes": sum(sizes), "tokenizer": words.description}
    (folder / "meta.json").write_text(json.dumps(meta))


def _from_tokens(
    config: DataConfig, files: list[Path], vocab: int, say: Callable[[str], None]
) -> Corpus:
    """Opens token files.

    With data.tokenizer="bpe", which cannot be trained on ids, the ids of BOS and EOS are those of
    `tokenizer.OWN_MARKS`, and fill-in-the-middle takes the first ids that the files do not use.
    """
    words, marks = None, Marks(eos=tokenizer.OWN_MARKS.index(tokenizer.EOS), bos=0, fim=None)
    if config.tokenizer != "bpe":
        words = tokenizer.make(config.tokenizer, vocab=vocab, texts=())
        marks = words.marks
    shards = tuple(token_files.open_shard(file, vocab) for file in files)
    made_of = [f"{marks.eos} {marks.bos}"]
    for file, ids in zip(files, shards, strict=True):
        stat = file.stat()
        made_of.append(f"{file.absolute()} {ids.dtype} {stat.st_size} {stat.st_mtime_ns}")

    def build(folder: Path) -> None:
        say(f"data: looking for documents in {sum(map(len, shards)):,} tokens")
        found = token_files.scan(shards, eos=marks.eos, bos=marks.bos)
        np.save(folder / "documents.npy", found.spans)
        meta = {"largest": found.largest, "has_bos": found.has_bos}
        (folder / "meta.json").write_text(json.dumps(meta))

    folder = _cached(config.cache, made_of, build)
    with _reading(folder):
        meta = json.loads((folder / "meta.json").read_text())
        used, has_bos = meta["largest"] + 1, meta["has_bos"]
        spans = np.load(folder / "documents.npy")
    if used > vocab:
        raise ConfigError(
            f"model.vocab={vocab} is too small for data.path={config.path!r}, whose ids reach "
            f"{used - 1}; set model.vocab to at least {used}, or data.path to other tokens"
        )
    if words is not None and used > words.size:
        raise ConfigError(
            f"data.path={config.path!r} has ids up to {used - 1}, and data.tokenizer "
            f"({words.description}) ends at {words.size - 1}; set data.tokenizer to the one "
            "that wrote the files"
        )
    if words is None:
        first = max(used, len(tokenizer.OWN_MARKS))
        if config.fim_rate and first + 3 > vocab:
            raise ConfigError(
                f"data.fim_rate={config.fim_rate} needs three unused ids, and the ids of "
                f"data.path={config.path!r} leave too few below model.vocab={vocab}; set "
                f"data.fim_rate=0, model.vocab to at least {first + 3}, or data.tokenizer to the "
                "tokenizer.json that wrote them"
            )
        if config.fim_rate:
            marks = dataclasses.replace(marks, fim=(first, first + 1, first + 2))
        say("data: these token files have no data.tokenizer; assuming id 1 as end of text")
    if not has_bos:
        marks = dataclasses.replace(marks, bos=None)

    def text(document: int) -> bytes:
        ids = corpus.body(document)
        return ids.tobytes() if words is None else words.decode(ids).encode()

    corpus = _corpus(
        shards,
        spans,
        marks,
        words,
        text,
        share=config.held_out,
        size=sum(ids.nbytes for ids in shards),
        description=words.description if words else "token files of an unnamed tokenizer",
    )
    return corpus


def _corpus(
    shards: tuple[np.ndarray, ...],
    spans: np.ndarray,
    marks: Marks,
    words: Tokenizer | None,
    text: Callable[[int], bytes],
    *,
    share: float,
    size: int,
    description: str,
) -> Corpus:
    training, held_out = split(len(spans), share)
    around = 1 + (marks.bos is not None)
    lengths = spans[:, 1] - spans[:, 0]
    hasher = hashlib.blake2b(f"{marks} {share}".encode(), digest_size=16)
    hasher.update(lengths.astype("<i8").tobytes())
    hasher.update(shards[0][:_SAMPLE].astype("<u4").tobytes())
    facts = Facts(
        documents=len(spans),
        held_out_documents=len(held_out),
        tokens=int(lengths.sum()) + around * len(spans),
        bytes=size,
        tokenizer=description,
        eos=marks.eos,
    )
    return Corpus(shards, spans, training, held_out, marks, words, text, hasher.hexdigest(), facts)


def split(documents: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits document numbers -> (training, in order; held out, shuffled).

    A positive share holds out at least one document, and the same ones in every run over as many
    documents.

    Raises:
      ConfigError: Too few documents to hold out some and train on others.
    """
    count = max(1, round(share * documents)) if share else 0
    if documents <= count:
        raise ConfigError(
            f"data.path holds {documents} documents, too few to hold out data.held_out={share} of "
            "them and train on the rest; add documents, or set data.held_out=0"
        )
    order = np.random.default_rng([_SPLIT_SEED, documents]).permutation(documents)
    return np.sort(order[count:]), order[:count]


@contextlib.contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turns errors of reading a folder of the cache into a ConfigError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"data.cache: {folder} is damaged ({reason}); delete it to build it again"
        ) from error


def _cached(cache: str, made_of: Sequence[str], build: Callable[[Path], None]) -> Path:
    """Cache folder whose key is a hash of `made_of`; `build` fills it if it does not exist."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "deepseek_jax")
    root = Path(cache or root).expanduser()
    key = hashlib.blake2b("\n".join([str(FORMAT), *made_of]).encode(), digest_size=16).hexdigest()
    folder = root / key
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
    except OSError as error:
        raise ConfigError(
            f"the cache folder {root} cannot be written ({error.strerror}); set data.cache to a "
            "writable folder"
        ) from error
    try:
        build(scratch)
        scratch.chmod(0o755)  # readable for other users of a shared cache
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with an equal folder
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder
