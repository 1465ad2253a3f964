"""Damage in every kind of file of a checkpoint and of the data cache: found, never loaded.

A damaged step is either read with exactly the values that were saved (the damage is in a file that
holds none of them), or an older step serves. `-m slow` tries more damages, and every third byte.
"""

import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from damage import damages, few_damages, files_of, fresh, many_flips
from jax.sharding import SingleDeviceSharding
from small_texts import VOCAB, some_texts, write_jsonl

from deepseek_jax.checkpoint.store import Store
from deepseek_jax.config import DataConfig
from deepseek_jax.data.corpus import prepare


def state(step: int, size: int):
    """A state whose values tell its step."""
    rng = np.random.default_rng(step)
    one = SingleDeviceSharding(jax.devices()[0])
    values = {
        "params": {"w": rng.normal(size=(size, 16)).astype(np.float32)},
        "mu": {"w": rng.normal(size=(size, 16)).astype(jax.numpy.bfloat16)},
        "step": np.int32(step),
    }
    return jax.tree.map(lambda value: jax.device_put(value, one), values)


def like(size: int):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, size)
    )


def saved(folder: Path, size: int) -> Path:
    with Store(folder, keep=5) as store:
        for step in (1, 2):
            store.save(step, state(step, size), {"tokens": step})
    return folder


def restored(folder: Path, size: int) -> int:
    """The step that is read; fails unless each of its values is the one that was saved."""
    step, got, meta = Store(folder, keep=5).restore(like(size))
    assert meta == {"tokens": step}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(state(step, size)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    return step


def opened(folder: Path, size: int) -> None:
    """Reads in parts, as `generate` and `convert` do."""
    leaves = Store(folder, keep=5).open({"params": like(size)["params"]})
    read = leaves.read("params.w").tobytes()
    assert read in {np.asarray(state(n, size)["params"]["w"]).tobytes() for n in (1, 2)}


def hurt(original: Path, copy: Path, size: int, kinds) -> dict[str, int]:
    """Damages each file of step 2 in each way; damages of each kind of file that were found."""
    found: dict[str, int] = {}
    for name in files_of(original / "2"):
        kind = name.as_posix().replace(name.name, "DATA") if "d" in name.parts else str(name)
        for what, act in kinds((original / "2" / name).stat().st_size):
            run = fresh(original, copy)
            act(run / "2" / name)
            try:
                step = restored(run, size)
                opened(run, size)
            except Exception as error:
                raise AssertionError(f"{name}: {what}") from error
            found[kind] = found.get(kind, 0) + (step == 1)
    return found


@pytest.mark.parametrize(
    "kinds, least", [(few_damages, 4), pytest.param(damages, 10, marks=pytest.mark.slow)]
)
def test_no_damage_of_a_checkpoint_is_loaded(tmp_path, caplog, capfd, kinds, least):
    caplog.set_level(logging.ERROR)
    original = saved(tmp_path / "original", 64)
    assert restored(original, 64) == 2
    found = hurt(original, tmp_path / "copy", 64, kinds)
    print(found)
    assert found["_CHECKPOINT_METADATA"] > least
    assert found["state/_METADATA"] > 3 and found["state/manifest.ocdbt"] > 3
    assert max(count for kind, count in found.items() if "DATA" in kind) > least
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_hardly_a_byte_of_a_checkpoint_is_left_out(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    original = saved(tmp_path / "original", 2)
    found = hurt(original, tmp_path / "copy", 2, many_flips)
    print(found)
    assert sum(found.values()) > 500


def cached(folder: Path) -> DataConfig:
    path = write_jsonl(folder / "a.jsonl", some_texts(12))
    return DataConfig(
        path=path,
        tokenizer="byte",
        text_key="text",
        cache=str(folder / "cache"),
        fim_rate=0.0,
        held_out=0.1,
    )


def contents(config: DataConfig) -> tuple[str, list[bytes]]:
    corpus = prepare(config, vocab=VOCAB, say=lambda _: None)
    return corpus.digest, [corpus.body(n).tobytes() for n in range(len(corpus.spans))]


def hurt_cache(tmp_path: Path, kinds) -> int:
    config = cached(tmp_path)
    right = contents(config)
    cache, original = Path(config.cache), tmp_path / "original"
    fresh(cache, original)
    count = 0
    for name in files_of(original):
        for what, act in kinds((original / name).stat().st_size):
            fresh(original, cache)
            act(cache / name)
            try:
                assert contents(config) == right
            except Exception as error:
                raise AssertionError(f"{name}: {what}") from error
            count += 1
    assert len({name.name for name in files_of(original)}) > 3
    return count


def test_no_damage_of_a_cache_is_trained_on(tmp_path):
    assert hurt_cache(tmp_path, damages) > 60


@pytest.mark.slow
def test_hardly_a_byte_of_a_cache_is_left_out(tmp_path):
    assert hurt_cache(tmp_path, many_flips) > 500
