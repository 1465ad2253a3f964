"""`plan --search`: bounds hold, proposals fit and parse, losers say why."""

import dataclasses
import importlib
import random

import pytest
from all_configs import load
from small_v3 import SMALL

from deepseek_jax import config as configs
from deepseek_jax.config import ConfigError
from deepseek_jax.plan import candidates, machine_lookup, search, search_text, step_time
from deepseek_jax.plan.memory_floor import MemoryFloor, is_traced
from deepseek_jax.plan.peak import peak_bytes
from deepseek_jax.plan.time_bound import TimeBound

H800 = machine_lookup.find("h800")


def sample(config, devices, count=12):
    found = list(candidates.candidates(config, devices, H800))
    return random.Random(0).sample(found, count)


@pytest.mark.parametrize("execution", search.EXECUTIONS)
def test_no_step_is_shorter_than_its_bound(execution):
    bound = TimeBound(H800, execution)
    for config in sample(SMALL, 16):
        machine = machine_lookup.with_messages(H800, config)
        planned = step_time.step_time(step_time.times(config, machine), execution)
        assert 0 < bound.seconds(config) <= planned.pipeline * (1 + 1e-9)


def test_no_memory_is_smaller_than_its_floor():
    floor = MemoryFloor()
    for config in sample(SMALL, 16):
        if not is_traced(config):
            assert 0 < floor.bytes(config) <= peak_bytes(config, "asynchronous")


@pytest.fixture(scope="module")
def found():
    return search.search(SMALL, 16, H800, execution="asynchronous")


def test_the_fastest_that_fit_are_proposed(found):
    """Against every third candidate of those that fit without a trace, timed one by one."""
    best, timed = {}, 0
    for config in candidates.candidates(SMALL, 16, H800):
        if config.mesh.pipe == 1 or config.layout.recompute != "report":
            continue
        timed += 1
        if timed % 3 or search.planned_bytes(config, "asynchronous") > found["room_bytes"]:
            continue
        machine = machine_lookup.with_messages(H800, config)
        seconds = step_time.step_time(step_time.times(config, machine)).total
        family = search.family_of(config)
        best[family] = min(best.get(family, seconds), seconds)
    rows = found["proposed"] + found["slower"]
    times = [row["seconds"] for row in rows]
    assert times == sorted(times) and len(times) == 3 + search.SLOWER
    staged = [row for row in rows if row["pipeline"]]
    for row in staged:
        family = search.Family(tuple(row["mesh"].values()), row["pipeline"])
        assert row["seconds"] <= best.pop(family, row["seconds"]) * (1 + 1e-9)
    assert len(best) > 5 and min(best.values()) >= times[-1]
    assert all(row["peak_bytes"] <= found["room_bytes"] for row in rows)


def test_proposals_parse_as_they_are(found):
    base = importlib.import_module("configs.v3_671b").get_config()
    for section in ("model", "mesh", "batch"):
        base[section].update(dataclasses.asdict(getattr(SMALL, section)))
    for row in found["proposed"]:
        config = base.copy_and_resolve_references()
        for flag in row["overrides"]:
            key, _, value = flag.removeprefix("--config.").partition("=")
            section, name = key.split(".")
            config[section][name] = type(config[section][name])(value)
        parsed = configs.parse(config)
        assert dataclasses.asdict(parsed.mesh) == row["mesh"]
        assert parsed.layout.recompute == row["recompute"]
        assert search.planned_bytes(parsed, "asynchronous") == row["peak_bytes"]


def test_losers_say_why(found):
    for row in found["slower"]:
        parts = dict(row["behind"])
        assert parts.pop("total") == pytest.approx(sum(parts.values()))
    shown = search_text.text(found)
    assert "s slower" in shown and "--config." in shown
    assert f"{found['given']['seconds']:.4g} s" in shown


def test_nothing_fits():
    tiny = dataclasses.replace(H800.chip, hbm_bytes=2_200_000_000)
    with pytest.raises(ConfigError, match="no layout of 16 devices fits: the smallest needs"):
        search.search(SMALL, 16, dataclasses.replace(H800, chip=tiny))


def test_devices_that_split_nothing():
    with pytest.raises(ConfigError, match="no layout of 11 devices passes"):
        search.search(SMALL, 11, H800)


def test_a_chip_without_fp8_is_given_bfloat16():
    assert candidates.recipes(SMALL, machine_lookup.find("a100").chip) == ("bfloat16",)


def test_sequences_of_128k_fit_no_pipeline():
    """docs/limits.md: the inputs of all layers of one sequence exceed the memory of a device."""
    config = load("v3_671b_128k")
    model = config.model
    inputs = 2 * model.layers * config.batch.length * model.d_model
    assert inputs > 114e9 > H800.chip.hbm_bytes
    assert peak_bytes(config) / 2**30 == pytest.approx(483, abs=1)
    assert config.mesh.gpu * config.mesh.tensor == H800.network.gpus_per_node


@pytest.mark.slow
def test_no_layout_fits_sequences_of_128k():
    with pytest.raises(ConfigError, match="no layout of 2048 devices fits: the smallest needs 44"):
        search.search(load("v3_671b_128k"), 2048, H800)
