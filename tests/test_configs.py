"""Every file of configs/ is a valid run, on its own mesh and on resolved ones, of stated size."""

import dataclasses
import importlib
import pathlib

import pytest

from deepseek_jax import config as configs
from deepseek_jax.parallel import mesh
from deepseek_jax.plan.count import count
from deepseek_jax.train import schedule
from tests.equations import cost

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def load(name):
    return configs.parse(importlib.import_module(f"configs.{name}").get_config())


def settings(model):
    """A model under the published names, for tests/equations/cost.py."""
    return {
        "hidden_size": model.d_model,
        "num_attention_heads": model.heads,
        "q_lora_rank": model.q_latent,
        "kv_lora_rank": model.kv_latent,
        "qk_nope_head_dim": model.d_nope,
        "qk_rope_head_dim": model.d_rope,
        "v_head_dim": model.d_value,
        "n_routed_experts": model.experts,
        "n_shared_experts": model.shared_experts,
        "moe_intermediate_size": model.d_expert,
        "intermediate_size": model.d_dense,
        "vocab_size": model.vocab,
        "num_hidden_layers": model.layers,
        "first_k_dense_replace": model.dense_layers,
        "num_experts_per_tok": model.top_k,
        "num_nextn_predict_layers": model.mtp_depth,
        "topk_method": "noaux_tc",  # a router bias always, zero in V2's models
    }


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
            schedule.micro_batches(config.batch, tokens) * config.batch.micro_sequences == sequences
        )
        hyper = schedule.hyper(config.schedule, step=step, tokens=tokens)
        assert (hyper.learning_rate, hyper.mtp_weight, hyper.bias_speed) == (7.3e-6, 0.1, 0.0)
