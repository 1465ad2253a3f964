"""Training batches: this process's rows of each micro-batch, prefetched by Grain.

Micro-batch m has the sequences of the stream (`packing.py`) from m * micro_sequences on, an equal
contiguous part for each process. Grain prefetches in threads. The position is one number, the
sequences consumed, so that a run resumes exactly on any number of processes.
"""

import functools
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from deepseek_jax.config import ConfigError, DataConfig
from deepseek_jax.data import split
from deepseek_jax.data.corpus import Corpus, Facts, is_made_anew, prepare
from deepseek_jax.data.packing import Stream

_ENDLESS = 1 << 48  # Grain needs a length; more sequences than any run consumes
_THREADS = 2
_READ_AHEAD = 64  # sequences

# Field of a state -> config keys to change back if it differs.
_KEYS = {
    "digest": "data.path, data.tokenizer or data.held_out",
    "seed": "seed",
    "length": "batch.length",
    "fim_rate": "data.fim_rate",
}


def load_grain() -> None:
    """Imports grain, before another thread imports anything.

    While grain is imported, etils replaces Python's `__import__` in all threads, and what one of
    them imports meanwhile may be broken (seen with grain 0.2.18: a module of JAX, traced then).
    """
    import grain  # noqa: F401


class TrainData:
    """Endless iterator over micro-batches.

    Args:
      config: Data section of the config.
      vocab: `model.vocab`.
      length: `batch.length`, tokens that a sequence predicts.
      micro_sequences: `batch.micro_sequences`, over all processes.
      seed: Seed of order and fill-in-the-middle, at least 0.
      process_index: Index of this process among those that share a micro-batch.
      process_count: Number of processes that share a micro-batch.
      say: Receives a line on each slow operation.
      corpus: Open corpus; None prepares that of the config.
      resumes: State that `restore` will be given, whose corpus is prepared at once.

    Raises:
      ConfigError: Bad data, or processes that do not divide the micro-batch.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        vocab: int,
        length: int,
        micro_sequences: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        say: Callable[[str], None] = lambda text: None,
        corpus: Corpus | None = None,
        resumes: Mapping[str, Any] | None = None,
    ):
        if micro_sequences % process_count:
            raise ConfigError(
                f"batch.micro_sequences={micro_sequences} does not split over {process_count} "
                f"processes; set batch.micro_sequences to a multiple of {process_count}"
            )
        self._prepare = lambda rule: prepare(config, vocab=vocab, say=say, rule=rule)
        self._made_anew = functools.cache(lambda: is_made_anew(config))
        older = resumes is not None and _rule_of(resumes) < split.RULE and self._made_anew()
        self._rule = 2 if older else split.RULE
        self._named = bool(config.path)
        self.corpus = corpus or self._prepare(self._rule)
        self._stream = Stream(self.corpus, length=length, seed=seed, fim_rate=config.fim_rate)
        self._micro, self._rows = micro_sequences, micro_sequences // process_count
        self._first_row = process_index * self._rows
        self._consumed = 0
        self._batches = self._open()

    @property
    def facts(self) -> Facts:
        """Counts of the corpus."""
        return self.corpus.facts

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """Rows of this process in the next micro-batch, [rows, length + 1] int32."""
        batch = next(self._batches)
        self._consumed += self._micro
        return batch

    def state(self) -> dict[str, Any]:
        """Position and identity of the stream, as JSON values."""
        return {"consumed": self._consumed, **self._identity()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues at the position of `state`, taken with any number of processes.

        Raises:
          ConfigError: A state of another stream: other documents, tokenizer, seed, length or
            fill-in-the-middle rate.
        """
        rule = _rule_of(state)
        if rule < self._rule == split.RULE and self._made_anew():
            self._take(2)
        if rule == 1 and self.corpus.apart:
            self._take(1)
        for key, now in self._identity().items():
            if key == "digest" and "split" not in state:
                now = self.corpus.older_digest
            if key == "split" or state.get(key) == now:
                continue
            if key == "digest" and not self._named:
                raise ConfigError(
                    "the checkpoint's data is not that of data.path='', the source of Python "
                    f"{platform.python_version()}; go on under the Python that began the run, with "
                    "the same data.tokenizer and data.held_out, or start in a new workdir"
                )
            raise ConfigError(
                f"{_KEYS[key]} changed since the checkpoint: "
                f"{'the hash of the data' if key == 'digest' else key} was {state.get(key)!r} and "
                f"is {now!r}; change it back, or start in a new workdir"
            )
        self.close()
        self._consumed = state["consumed"]
        self._batches = self._open()

    def close(self) -> None:
        """Stops prefetching."""
        self._batches.close()

    def _take(self, rule: int) -> None:
        """Continues with the corpus as an older rule split it."""
        self.corpus, self._rule = self._prepare(rule), rule
        old = self._stream
        self._stream = Stream(self.corpus, length=old.length, seed=old.seed, fim_rate=old.fim_rate)

    def _identity(self) -> dict[str, Any]:
        stream = self._stream
        return {
            "digest": self.corpus.digest,
            "split": self._rule,
            "seed": stream.seed,
            "length": stream.length,
            "fim_rate": stream.fim_rate,
        }

    def _open(self) -> Any:
        import grain

        rows = _Rows(self._stream, self._consumed + self._first_row, self._rows, self._micro)
        options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_READ_AHEAD)
        data = grain.MapDataset.source(rows).to_iter_dataset(options)
        return iter(data.batch(self._rows, drop_remainder=True))


def _rule_of(state: Mapping[str, Any]) -> int:
    """Rule that made the corpus of a state (`split.py`); the first one kept no number."""
    return state.get("split", 1)


class _Rows:
    """Rows of one process: the first `rows` of every `stride` sequences, from `first` on."""

    def __init__(self, stream: Stream, first: int, rows: int, stride: int):
        self._stream, self._first, self._rows, self._stride = stream, first, rows, stride

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> np.ndarray:
        batch, row = divmod(index, self._rows)
        return self._stream.shuffled(self._first + batch * self._stride + row)
