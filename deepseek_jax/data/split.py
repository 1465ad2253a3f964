"""Held-out share of a corpus: which documents are never trained on.

Equal documents are on the same side of the split, so that no held-out text is trained on, unless
more than half of all documents are equal to one another.
"""

import numpy as np

from deepseek_jax.config import ConfigError

# Number of the rule by which a corpus is made, kept in checkpoints. Rule 1 split documents whether
# they had equals or not; 1 and 2 kept the tables of the default text (`library.py`), and trained a
# tokenizer on all training documents.
RULE = 3
_SEED = 20241226  # the same split in every run: a held-out document stays held out


def split(
    documents: int, share: float, equal: np.ndarray | None = None, *, rule: int = RULE
) -> tuple[np.ndarray, np.ndarray]:
    """Splits document numbers -> (training, in order; held out, shuffled).

    A positive share holds out at least one document, and the same ones in every run over as many
    documents. Where no two are equal, both rules give the same split.

    Args:
      documents: Number of documents.
      share: `data.held_out`.
      equal: [documents], the same number for equal documents; None if no two are equal.
      rule: Rule of the split; 1 is that of older runs, which lets equal documents be apart.

    Raises:
      ConfigError: Too few documents to hold out some and train on others.
    """
    count = max(1, round(share * documents)) if share else 0
    if documents <= count:
        raise ConfigError(
            f"data.path holds {documents} documents, too few to hold out data.held_out={share} of "
            "them and train on the rest; add documents"
        )
    order = np.random.default_rng([_SEED, documents]).permutation(documents)
    if equal is None or rule == 1 or not count:
        return np.sort(order[count:]), order[:count]
    chosen = _whole_groups(equal[order], count)
    if not chosen.any():
        chosen[:count] = True
    return np.sort(order[~chosen]), order[chosen]


def _whole_groups(group: np.ndarray, count: int) -> np.ndarray:
    """True for documents of the first groups that have `count` documents together, at most.

    If no group is that small, the smallest one is taken, or none if it has over half of all.
    """
    _, first, index, size = np.unique(
        group, return_index=True, return_inverse=True, return_counts=True
    )
    held, taken = 0, np.zeros(len(size), bool)
    small = np.flatnonzero(size <= count)
    for number in small[np.argsort(first[small], kind="stable")]:
        if held == count:
            break
        if held + size[number] <= count:
            taken[number] = True
            held += int(size[number])
    if not held and size.min() <= len(group) // 2:
        taken[np.lexsort((first, size))[0]] = True
    return taken[index]
