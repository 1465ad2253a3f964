"""Fill-in-the-middle and packing (section 4.1): the endless stream of training sequences.

Every epoch has the training documents in a new order. A document is BOS, its tokens and EOS or,
with probability `fim_rate`, has prefix-suffix-middle form:

    BOS  <fim begin> prefix <fim hole> suffix <fim end> middle  EOS

The two split points are uniform over tokens (not characters, as documents are stored tokenised).
Documents are packed without attention mask between them. The stream is cut into sequences of
`length + 1` tokens that share one token with the next, so that each token is predicted once.
Sequences are then shuffled within windows of the stream, so that a batch has many documents.

Order, choice and split points depend on seed, epoch and document alone, and any sequence can be
built without those before it: neither the number of processes nor a restart changes the stream.
"""

import bisect
import dataclasses
import threading

import numpy as np

from deepseek_jax.config import ConfigError
from deepseek_jax.data.corpus import Corpus

_ORDER, _CHOICE, _SPLIT, _SHUFFLE = range(4)  # purposes of random numbers
_WINDOW = 1 << 16  # sequences that are shuffled together, at most those of an epoch


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One pass over the N training documents.

    Attributes:
      documents: [N], document numbers in the order of the epoch.
      fim: [N] bool, True for a document in fill-in-the-middle form.
      stops: [N] int64, end of each document in the tokens of the epoch.
    """

    documents: np.ndarray
    fim: np.ndarray
    stops: np.ndarray


class Stream:
    """Endless training sequences of a corpus, by number from 0.

    Args:
      corpus: Tokenised documents.
      length: Tokens that a sequence predicts.
      seed: Seed of order and fill-in-the-middle, at least 0.
      fim_rate: Probability of fill-in-the-middle form.

    Raises:
      ConfigError: A negative seed, or fewer training tokens than one sequence has.
    """

    def __init__(self, corpus: Corpus, *, length: int, seed: int, fim_rate: float):
        if seed < 0:
            raise ConfigError(f"seed={seed}; it must not be negative")
        self.corpus, self.length, self.seed, self.fim_rate = corpus, length, seed, fim_rate
        spans = corpus.spans[corpus.training]
        self._lengths = spans[:, 1] - spans[:, 0] + corpus.around
        self._plain = int(self._lengths.sum())
        if self._plain <= length:
            raise ConfigError(
                f"data.path holds {self._plain} tokens to train on, too few for one sequence of "
                f"batch.length={length} and the token after it; add text, or set batch.length "
                f"to at most {self._plain - 1}"
            )
        self.window = min(_WINDOW, self._plain // length)
        self._shuffles: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self._starts = [0]  # start of each epoch in the stream, computed on demand
        self._epochs: dict[int, Epoch] = {}

    def shuffled(self, number: int) -> np.ndarray:
        """Sequence number `number` of the shuffled stream, [length + 1] int32."""
        window, place = divmod(number, self.window)
        with self._lock:
            if window not in self._shuffles:
                shuffle = np.random.default_rng([self.seed, window, _SHUFFLE])
                kept = {n: order for n, order in self._shuffles.items() if abs(n - window) < 2}
                self._shuffles = kept | {window: shuffle.permutation(self.window)}
            order = self._shuffles[window]
        return self.sequence(window * self.window + int(order[place]))

    def sequence(self, number: int) -> np.ndarray:
        """Tokens number * length to (number + 1) * length of the stream, [length + 1] int32."""
        out = np.empty(self.length + 1, np.int32)
        filled, position = 0, number * self.length
        epoch = self._epoch_at(position)
        while filled < len(out):
            plan, start = self.epoch(epoch), self._starts[epoch]
            index = int(np.searchsorted(plan.stops, position - start, side="right"))
            while index < len(plan.stops) and filled < len(out):
                first = start + (int(plan.stops[index - 1]) if index else 0)
                pieces = self._pieces(epoch, int(plan.documents[index]), bool(plan.fim[index]))
                wrote = _copy(pieces, position - first, out[filled:])
                filled, position, index = filled + wrote, position + wrote, index + 1
            epoch = self._epoch_at(position)
        return out

    def epoch(self, number: int) -> Epoch:
        """Order and forms of an epoch; the last few are cached."""
        with self._lock:
            if number not in self._epochs:
                shuffle = np.random.default_rng([self.seed, number, _ORDER])
                order = shuffle.permutation(len(self._lengths))
                fim = self._fim(number)
                stops = np.cumsum((self._lengths + 3 * fim)[order])
                self._epochs = {n: e for n, e in self._epochs.items() if abs(n - number) < 2}
                self._epochs[number] = Epoch(self.corpus.training[order], fim[order], stops)
            return self._epochs[number]

    def _fim(self, epoch: int) -> np.ndarray:
        """True for each training document in fill-in-the-middle form, [N] bool."""
        choice = np.random.default_rng([self.seed, epoch, _CHOICE])
        return choice.random(len(self._lengths)) < self.fim_rate

    def _epoch_at(self, position: int) -> int:
        """Epoch of a position in the stream."""
        with self._lock:
            while self._starts[-1] <= position:
                marks = 3 * int(self._fim(len(self._starts) - 1).sum())
                self._starts.append(self._starts[-1] + self._plain + marks)
            return bisect.bisect_right(self._starts, position) - 1

    def _pieces(self, epoch: int, document: int, fim: bool) -> list[np.ndarray]:
        """Document with its marks, as arrays to concatenate."""
        body, marks = self.corpus.body(document), self.corpus.marks
        pieces = [body]
        if fim:
            assert marks.fim is not None  # `corpus.prepare` checks it
            begin, hole, end = (np.array([mark], np.int32) for mark in marks.fim)
            split = np.random.default_rng([self.seed, epoch, _SPLIT, document])
            a, b = np.sort(split.integers(0, len(body) + 1, 2))
            pieces = [begin, body[:a], hole, body[b:], end, body[a:b]]
        bos = [] if marks.bos is None else [np.array([marks.bos], np.int32)]
        return [*bos, *pieces, np.array([marks.eos], np.int32)]


def _copy(pieces: list[np.ndarray], skip: int, out: np.ndarray) -> int:
    """Copies the concatenated pieces from token `skip` on to `out` -> number of tokens copied."""
    filled = 0
    for piece in pieces:
        part = piece[skip : skip + len(out) - filled]
        skip = max(0, skip - len(piece))
        out[filled : filled + len(part)] = part
        filled += len(part)
    return filled
