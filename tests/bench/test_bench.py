"""The bench commands: what they refuse, and the claims that need no clock."""

import pathlib
import subprocess
import sys

import pytest

from configs import v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.bench import memory, moe

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no NAME given"),
        (("mo",), "there is no 'mo'; name one of train, moe, memory"),
        (("moe", "more"), "unexpected argument 'more'"),
    ],
)
def test_names(arguments, message):
    command = [sys.executable, "-m", "deepseek_jax.bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def tiny():
    return configs.parse(v3_tiny.get_config())


def test_an_mtp_module_costs_the_same_at_any_vocabulary(tiny):
    def extra(vocab):
        one, two = (memory._of(tiny, mtp_depth=depth, vocab=vocab) for depth in (1, 2))
        return memory.temp_bytes(two) - memory.temp_bytes(one)

    logits = 4 * 2048 * (16_384 - 2048)  # what a whole set would add between the two vocabularies
    assert abs(extra(16_384) - extra(2048)) < logits / 10


def test_moe_rows(tiny):
    rows = moe.measure(tiny, rounds=1)["layers"]
    assert [row["experts"] for row in rows] == [16, 32, 64]
    assert rows[0]["ratio"] == 1 and all(row["seconds"] > 0 for row in rows)
