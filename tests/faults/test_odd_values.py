"""Training with the smallest and the largest value that a key accepts: it runs, or says why not."""

import json
import math

import pytest
import runs
from faults.values import at, base, changed

from deepseek_jax import config as configs
from deepseek_jax.config import ConfigError
from deepseek_jax.config.values import leaves
from deepseek_jax.errors import RunError
from deepseek_jax.train import loop

pytestmark = pytest.mark.slow

SMALLEST = 1.2e-38
FLOATS = (
    0.0, SMALLEST, 1e-30, 1e-20, 1e-12, 1e-8, 1e-4, 0.01, 0.5, 0.9999999, 1.0, 1.0000001, 9.0,
    100.0, 1000.0, 1e6, 1e18, 9e18,
)  # fmt: skip
SIZES = (0, 1, 2, 3, 4, 5, 6, 8, 16, 24, 33, 64, 300)
COUNTS = (*SIZES, 10_000, 2**31, 2**62)


def tiny():
    """tiny.py over eight devices with YaRN, for two steps."""
    values = changed(changed(base(), "mesh.gpu", -1), "model.yarn_factor", 4.0)
    return changed(changed(values, "schedule.tokens", 500), "evaluation.tokens", 64)


def extremes():
    """(key, value) of the smallest and the largest accepted value of each number."""
    for key, value in leaves(configs.parse(tiny())):
        endless = key == "schedule.tokens"
        if endless or key.startswith("mesh.") or type(value) not in (int, float):
            continue
        counts = SIZES if key.startswith(("model.", "batch.")) else COUNTS
        fine = [x for x in (FLOATS if type(value) is float else counts) if accepted(key, x)]
        for extreme in sorted({*fine[:1], *fine[-1:]} - {value}):
            yield key, extreme


def accepted(key, value):
    try:
        configs.parse(changed(tiny(), key, value))
    except ConfigError:
        return False
    return True


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return runs.documents(tmp_path_factory.mktemp("odd") / "text")


@pytest.mark.parametrize(("key", "value"), list(extremes()), ids=str)
def test_two_steps(text, tmp_path, key, value):
    values = changed(tiny(), key, value)
    values = changed(values, "data.path", str(text))
    values = changed(values, "data.cache", str(text.parent / "cache"))
    config = configs.parse(values)
    assert at(config, key) == value
    try:
        loop.train(config, tmp_path / "run", screen=False)
    except (ConfigError, RunError) as error:
        assert str(error).isprintable() and len(str(error)) < 300
        return
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all(math.isfinite(row[name]) for row in rows for name in ("loss", "grad_norm"))
