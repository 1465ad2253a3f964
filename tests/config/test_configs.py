"""Files of configs/: each is valid on its own and on a resolved mesh, and has the stated size."""

import dataclasses

import pytest
from all_configs import NAMES, load, settings
from equations import cost

from deepseek_jax import config as configs
from deepseek_jax.model.count import count
from deepseek_jax.parallel import mesh
from deepseek_jax.train import token_schedule


@pytest.mark.parametrize("name", NAMES)
def test_it_is_valid_and_its_parameters_follow_the_formula(name):
    config = load(name)
    devices = 8 if -1 in dataclasses.astuple(config.mesh) else None
    if devices:
        configs.check(dataclasses.replace(config, mesh=mesh.resolve(config.mesh, devices)))
    counted, want = count(config.model), cost.parameters(settings(config.model))
    assert counted.total == want.main
    assert counted.activated == want.activated
    assert counted.activated - counted.input_table == want.activated_without_table
    assert counted.mtp == want.mtp
    assert configs.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("name", "total", "activated"),
    [
        ("v2_lite_16b", 15.706, 2.451),
        ("moonlight_16b", 15.960, 2.579),
        ("v3_671b", 671.026, 36.626),
        ("v3_2_671b", 671.878, 37.477),
        ("kimi_k2_1t", 1026.408, 31.687),
    ],
)
def test_published_sizes_in_billions(name, total, activated):
    counted = count(load(name).model)
    assert round(counted.total / 1e9, 3) == total
    assert round((counted.activated - counted.input_table) / 1e9, 3) == activated


def test_v3_16b_is_v2_lite_with_the_v3_router():
    small, lite, full = (load(name).model for name in ("v3_16b", "v2_lite_16b", "v3_671b"))
    assert count(small).total == count(lite).total
    assert (small.score, small.normalise_weights) == (full.score, full.normalise_weights)


@pytest.mark.parametrize(
    ("name", "length", "sequences"), [("v3_671b_32k", 32_768, 1920), ("v3_671b_128k", 131_072, 480)]
)
def test_context_extension_is_1000_steps_at_one_learning_rate(name, length, sequences):
    config, published = load(name), load("v3_671b")
    assert dataclasses.replace(config.model, yarn_factor=1.0) == published.model
    assert config.model.yarn_factor == 40
    assert config.schedule.tokens == 1000 * length * sequences
    for step in (0, 1, 500, 999):
        tokens = step * length * sequences
        assert (
            token_schedule.micro_batches(config.batch, tokens) * config.batch.micro_sequences
            == sequences
        )
        hyper = token_schedule.hyper(config.schedule, step=step, tokens=tokens)
        assert (hyper.learning_rate, hyper.mtp_weight, hyper.bias_speed) == (7.3e-6, 0.1, 0.0)


@pytest.mark.parametrize(
    ("name", "steps", "sequences", "rate"),
    [("v3_2_671b_warm_up", 1000, 16, 1e-3), ("v3_2_671b", 15_000, 480, 7.3e-6)],
)
def test_v3_2_is_v3_at_128k_with_an_indexer(name, steps, sequences, rate):
    config, long = load(name), load("v3_671b_128k")
    assert dataclasses.replace(config.model, index_heads=0) == long.model
    assert (config.model.index_heads, config.model.index_width) == (64, 128)
    assert config.schedule.tokens == steps * sequences * 131_072
    assert config.batch.sequences == sequences
    hyper = token_schedule.hyper(config.schedule, step=steps - 1, tokens=config.schedule.tokens - 1)
    assert (hyper.learning_rate, hyper.bias_speed) == (rate, 0.0)


def test_the_mlperf_recipe_is_the_published_model_with_its_own_schedule():
    """Learning rates by the benchmark's rule, at its smallest batch and along its cosine."""
    config, published = load("mlperf_deepseekv3_671b"), load("v3_671b")
    assert dataclasses.replace(config.model, yarn_factor=1.0) == published.model
    step = config.batch.length * config.batch.sequences
    assert config.schedule.tokens == 12_000 * step

    def at(index):
        return token_schedule.hyper(config.schedule, step=index, tokens=index * step)

    base = 2.4e-5 * (15_360 / 16_384) ** 0.5
    assert at(4).learning_rate == pytest.approx(base, rel=1e-4)
    assert at(0).learning_rate == pytest.approx(base / 4, rel=1e-4)
    middle = 4 + (12_000 - 4) // 2
    assert at(middle).learning_rate == pytest.approx((base + 1e-8) / 2, rel=1e-4)
    assert at(12_000).learning_rate == 1e-8
    for index in (0, 1, 11_999):
        assert (at(index).mtp_weight, at(index).bias_speed) == (0.1, 0.001)
        assert (
            token_schedule.micro_batches(config.batch, index * step) * config.batch.micro_sequences
            == config.batch.sequences
        )
