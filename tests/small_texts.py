"""A few documents, with non-ASCII text and unusual white space."""

import json
from pathlib import Path

import numpy as np

VOCAB = 512
WORDS = ["the", "quick", "fox", "naïve", "東京", "🎉", "jumps\tover\n\n", "", "lazy(dog):\r\n"]


def some_texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Documents of 1 to `longest` words, non-ASCII among them."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]


def write_jsonl(file: Path, texts: list[str], key: str = "text") -> str:
    file.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))
    return str(file)
