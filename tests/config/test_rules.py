"""Rules of `config.check`: refused values, named keys, and advice that works."""

import copy
import dataclasses
import inspect
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import v3_671b, v3_tiny
from deepseek_jax import config as configs
from deepseek_jax.config import ConfigError

NAN, INF = float("nan"), float("inf")


def tiny(changes=None):
    """v3_tiny as a dictionary, with the values of dotted keys changed."""
    values = v3_tiny.get_config().to_dict()
    for key, value in (changes or {}).items():
        put(values, key, value)
    return values


def put(values, key, value):
    *sections, last = key.split(".")
    for section in sections:
        values = values[section]
    values[last] = value


def refused(values) -> str:
    with pytest.raises(ConfigError) as error:
        configs.parse(values)
    return str(error.value)


def advice(message) -> dict[str, str]:
    """The changes after the last "set" of a message, as dotted key -> text."""
    found = re.search(r"\bset ((?:[\w.]+=[^\s,;]+(?:, )?)+)$", message)
    return dict(part.split("=") for part in found[1].split(", ")) if found else {}


def follow(values, message):
    """`values` with the advice of a message taken."""
    values = copy.deepcopy(values)
    for key, text in advice(message).items():
        kind = float if "." in text else int if text.lstrip("-").isdigit() else str
        put(values, key, text == "True" if text in ("True", "False") else kind(text))
    return values


def settle(values):
    """Follows advice until the config works: it silences its rule, and none undoes another's."""
    said = set()
    while True:
        try:
            return configs.parse(values)
        except ConfigError as error:
            message = str(error)
        assert advice(message), message
        assert message not in said, message
        said.add(message)
        values = follow(values, message)


@pytest.mark.parametrize("published", [v3_671b, v3_tiny], ids=["671b", "tiny"])
def test_the_configs_pass_and_survive_json(published):
    config = configs.parse(published.get_config())
    assert configs.from_json(config.to_json()) == config


def sections(kind=configs.Config):
    """Every dataclass of the config, the whole first."""
    yield kind
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from sections(field.type)


@pytest.mark.parametrize("kind", list(sections()), ids=lambda kind: kind.__name__)
def test_every_key_has_a_line_of_description(kind):
    described = re.findall(r"^  (\w+): [A-Z].*\.$", inspect.getdoc(kind), re.MULTILINE)
    assert described == [field.name for field in dataclasses.fields(kind)]


# Changes to v3_tiny, and what the one message must say.
SPLIT_IN_FOUR = {"mesh.gpu": 2, "mesh.node": 2}
TENSOR = {"mesh.gpu": 1, "mesh.tensor": 2}
RULES = [
    # Ranges, one of each kind.
    ({"model.vocab": 0}, r"model\.vocab is 0; it must be at least 1"),
    ({"model.layers": -1}, r"model\.layers"),
    ({"model.q_latent": -1}, r"model\.q_latent is -1; it must be at least 0"),
    ({"model.init_std": 0.0}, r"model\.init_std is 0\.0; it must be above 0"),
    ({"model.yarn_factor": 0.5}, r"model\.yarn_factor .* at least 1"),
    ({"model.mtp_depth": 5}, r"model\.mtp_depth is 5; it must be from 0 to 4"),
    ({"model.mtp_depth": -1}, r"model\.mtp_depth"),
    ({"mesh.gpu": 0}, r"mesh\.gpu is 0; it must be at least 1, or -1"),
    ({"mesh.tensor": -2}, r"mesh\.tensor"),
    ({"layout.attention_block": 0}, r"layout\.attention_block"),
    ({"layout.loss_chunk": 0}, r"layout\.loss_chunk"),
    ({"optimizer.b1": 1.0}, r"optimizer\.b1 is 1\.0; it must be at least 0 and below 1"),
    ({"optimizer.b2": -0.1}, r"optimizer\.b2"),
    ({"optimizer.eps": 0.0}, r"optimizer\.eps"),
    ({"optimizer.clip": 0.0}, r"optimizer\.clip"),
    ({"optimizer.weight_decay": -0.1}, r"optimizer\.weight_decay"),
    ({"optimizer.ema_decay": 1.0}, r"optimizer\.ema_decay"),
    ({"schedule.learning_rate": 0.0}, r"schedule\.learning_rate"),
    ({"schedule.decayed_learning_rate": -1e-4}, r"schedule\.decayed_learning_rate"),
    ({"schedule.final_learning_rate": 0.0}, r"schedule\.final_learning_rate"),
    ({"schedule.balance_alpha": -1.0}, r"schedule\.balance_alpha"),
    ({"schedule.mtp_weight": -0.1}, r"schedule\.mtp_weight"),
    ({"schedule.bias_speed": -0.1}, r"schedule\.bias_speed"),
    ({"schedule.tokens": 0}, r"schedule\.tokens"),
    ({"batch.length": 1}, r"batch\.length is 1; it must be at least 2"),
    ({"batch.ramp_tokens": -1}, r"batch\.ramp_tokens"),
    ({"data.fim_rate": 1.1}, r"data\.fim_rate is 1\.1; it must be from 0 to 1"),
    ({"data.held_out": 0.0}, r"data\.held_out is 0\.0; it must be above 0 and below 1"),
    ({"data.held_out": 1.0}, r"data\.held_out"),
    ({"checkpoint.every_steps": 0}, r"checkpoint\.every_steps"),
    ({"checkpoint.keep": 0}, r"checkpoint\.keep"),
    ({"log.every_steps": 0}, r"log\.every_steps"),
    ({"evaluation.tokens": -1}, r"evaluation\.tokens"),
    ({"seed": -1}, r"seed is -1"),
    ({"seed": 2**32}, r"seed is 4294967296"),
    ({"model.rope_theta": NAN}, r"model\.rope_theta is nan"),
    ({"model.yarn_factor": INF}, r"model\.yarn_factor is inf"),
    ({"optimizer.clip": INF}, r"optimizer\.clip is inf"),
    ({"schedule.learning_rate": NAN}, r"schedule\.learning_rate is nan"),
    ({"model.vocab": 10**400}, r"model\.vocab"),
    # Names.
    ({"model.score": "sigmiod"}, r"model\.score .* softmax, sqrtsoftplus; did you mean sigmoid\?"),
    ({"model.group_score": "top3"}, r"model\.group_score .* did you mean top2\?"),
    ({"layout.zero": 2}, r"layout\.zero is 2; it must be one of 0, 1, 3"),
    ({"layout.dispatch": "two"}, r"layout\.dispatch .* two_hop, flat, reference"),
    ({"layout.recompute": "ful"}, r"layout\.recompute .* did you mean full\?"),
    ({"precision.recipe": "fp16"}, r"precision\.recipe .* float32, bfloat16"),
    ({"optimizer.moments": "float16"}, r"optimizer\.moments .* float32, bfloat16"),
    ({"optimizer.decayed": "none"}, r"optimizer\.decayed .* matrices, all"),
    # The model.
    ({"model.dense_layers": 5}, r"model\.dense_layers=5 is more than model\.layers=2"),
    ({"model.d_rope": 15}, r"model\.d_rope=15 is odd.* set model\.d_rope=16"),
    ({"model.yarn_beta_fast": 0.5}, r"model\.yarn_beta_fast=0\.5 .* model\.yarn_beta_slow"),
    ({"model.groups": 5}, r"model\.experts=16 .* model\.groups=5 .* set model\.groups=4"),
    ({"model.top_groups": 5}, r"model\.top_groups=5 is more than model\.groups=4"),
    ({"model.top_k": 9}, r"model\.top_k=9 .* 8 experts that model\.top_groups=2"),
    ({"model.groups": 16, "model.top_groups": 4}, r"model\.group_score='top2'.* one in each"),
    # Optimiser and schedule.
    (
        {"optimizer.moments": "bfloat16", "optimizer.b2": 0.999},
        r"optimizer\.b2=0\.999 with optimizer\.moments='bfloat16'.* set optimizer\.b2=0\.99",
    ),
    ({"schedule.decay_start": 1_999_999}, r"schedule\.decay_start=1999999 comes after schedule"),
    ({"schedule.decay_end": 1_999_999}, r"schedule\.decay_end=1999999 comes after schedule\.f"),
    ({"schedule.warmup_steps": 10_000}, r"schedule\.warmup_steps=10000 .*schedule\.decay_start"),
    # Mesh and rules.
    ({"mesh.node": -1}, r"mesh\.node and mesh\.gpu are both -1"),
    ({"layout.rules.head": ("tensor",)}, r"layout\.rules\.head: .* did you mean heads\?"),
    ({"layout.rules.heads": ("tenser",)}, r"layout\.rules\.heads: .* did you mean tensor\?"),
    ({"layout.rules.heads": ("gpu",)}, r"layout\.rules\.heads=\(gpu\): .* over \(tensor\)"),
    ({"layout.rules.expert_width": ("gpu",)}, r"layout\.rules\.expert_width=\(gpu\)"),
    ({"layout.rules.experts": ("node", "tensor")}, r"layout\.rules\.experts.* not over tensor"),
    ({"layout.rules.batch": ("pipe", "gpu")}, r"layout\.rules\.batch.* not over pipe"),
    ({"layout.rules.batch": ("gpu", "tensor")}, r"layout\.rules\.batch.* not over tensor"),
    ({"layout.rules.model": ("tensor",)}, r"layout\.rules\.model.* model cannot be split"),
    ({"layout.rules.experts": ("gpu", "node")}, r"layout\.rules\.experts.* \(node, gpu\)$"),
    ({"layout.rules.experts": ("gpu", "gpu")}, r"layout\.rules\.experts.* once.* \(gpu\)$"),
    (
        {"layout.rules.batch": ("gpu",), "mesh.node": 2},
        r"layout\.rules\.batch=\(gpu\) leaves out node.* mesh\.node=1",
    ),
    ({"layout.rules.heads": 3}, r"layout\.rules\.heads is 3; expected names"),
    ({"layout.rules.heads": ("tensor", 3)}, r"layout\.rules\.heads"),
    ({"layout.rules": 3}, r"layout\.rules is 3"),
    # Sizes over devices.
    ({"mesh.gpu": 3, "batch.micro_sequences": 3}, r"batch\.sequences=8 is no multiple"),
    (
        {"model.experts": 6, "model.groups": 2, "model.top_k": 4, **SPLIT_IN_FOUR},
        r"model\.experts=6 .* 4 devices .*mesh\.node=2 x mesh\.gpu=2.* set model\.experts=8",
    ),
    ({"model.heads": 3, **TENSOR}, r"model\.heads=3 .* set model\.heads=4"),
    ({"model.vocab": 4097, **TENSOR}, r"model\.vocab=4097 .*\(mesh\.gpu=1 x mesh\.tensor=2\)"),
    ({"model.d_dense": 383, **TENSOR}, r"model\.d_dense=383 .*\(mesh\.gpu=1 x mesh\.tensor=2\)"),
    ({"model.d_expert": 63, "mesh.tensor": 2}, r"model\.d_expert=63 .*\(mesh\.tensor=2\)"),
    (
        {"layout.dispatch": "reference", **SPLIT_IN_FOUR},
        r"layout\.dispatch='reference' .* set layout\.dispatch=flat",
    ),
    # The dispatch.
    ({"layout.capacity_factor": 0.0}, r"layout\.capacity_factor is 0\.0; it must be above 0"),
    (
        {"layout.capacity_factor": 1e-4, **SPLIT_IN_FOUR},
        r"layout\.capacity_factor=0\.0001 .* no token .* move; set layout\.capacity_factor=1\.25",
    ),
    (
        {"mesh.node": 4, "mesh.gpu": 2, "model.groups": 2, "model.experts": 16},
        r"model\.groups=2 do not map to the 4 nodes .*mesh\.node=4 .* model\.groups=4, or set la",
    ),
    (
        {"mesh.node": 2, "mesh.gpu": 2, "model.groups": 1, "model.top_groups": 1},
        r"model\.groups=1 do not map to the 2 nodes .* layout\.dispatch=flat",
    ),
    ({"layout.micro_batches_in_flight": 3}, r"in_flight is 3; it must be one of 1, 2"),
    (
        {"layout.micro_batches_in_flight": 2, "layout.dispatch": "reference"},
        r"in_flight=2 .* layout\.dispatch=reference has none; set layout\.dispatch=flat",
    ),
    (
        {
            "layout.micro_batches_in_flight": 2,
            "batch.sequences": 16,
            "batch.micro_sequences": 16,
            "batch.ramp_sequences": 16,
        },
        r"in_flight=2, .* batch\.sequences=16 make one .* set batch\.sequences=32",
    ),
    (
        {"mesh.pipe": 2, "layout.pipeline": "1f1b", "layout.defer_weight_gradients": True},
        r"layout\.pipeline=1f1b has none .* set layout\.defer_weight_gradients=False",
    ),
    ({"precision.dispatch": "fp16"}, r"precision\.dispatch .* compute, fp8"),
    # The batch.
    ({"model.mtp_depth": 4, "batch.length": 4}, r"model\.mtp_depth=4 .* batch\.length=4"),
    (
        {"model.yarn_factor": 1.5, "model.yarn_original": 64},
        r"batch\.length=128 .* model\.yarn_original=64 x model\.yarn_factor=1\.5; .*=96",
    ),
    (
        {"batch.micro_sequences": 2, **SPLIT_IN_FOUR},
        r"batch\.micro_sequences=2 .* 4 devices .* set batch\.micro_sequences=4",
    ),
    ({"batch.sequences": 20}, r"batch\.sequences=20 .* set batch\.sequences=24$"),
    ({"batch.ramp_sequences": 4}, r"batch\.ramp_sequences=4 .* set batch\.ramp_sequences=8$"),
    ({"batch.ramp_sequences": 24}, r"batch\.ramp_sequences=24 is more than batch\.sequences=8"),
]  # fmt: skip


def rule_id(case):
    return ",".join(f"{key.split('.')[-1]}={value}"[:32] for key, value in case[0].items())


@pytest.mark.parametrize("changes, words", RULES, ids=map(rule_id, RULES))
def test_each_rule_names_the_key_and_its_advice_works(changes, words):
    values = tiny(changes)
    message = refused(values)
    assert re.search(words, message), message
    assert "\n" not in message
    if advice(message):
        settle(values)


@pytest.mark.parametrize(
    "changes",
    [
        {"mesh.pipe": 2},
        {"mesh.pipe": 3, "layout.pipeline": "1f1b"},
        {"mesh.pipe": 2, "layout.ramps": "skip", "layout.defer_weight_gradients": True},
        {"model.q_latent": 0, "model.score": "softmax", "model.group_score": "max"},
        {"model.experts": 64, "model.groups": 1, "model.top_groups": 1, "model.top_k": 6},
        {"model.dense_layers": 0},
        {"model.dense_layers": 2},
        {"model.mtp_depth": 0},
        {"model.yarn_factor": 2.0, "model.yarn_original": 128},
        {"batch.length": 4096, "schedule.warmup_steps": 9},
        {"layout.dispatch": "reference", "mesh.gpu": 1},
        {"layout.dispatch": "reference"},
        {"layout.rules": {}, "mesh.gpu": 1},
        {"layout.rules.heads": "tensor"},
        {"layout.rules.heads": ()},
        {"schedule.tokens": 100_000},
        {"optimizer.moments": "bfloat16", "optimizer.b2": 0.99},
        {"mesh.replica": 2, "mesh.node": 2, "mesh.gpu": 2, "layout.zero": 3},
        {"mesh.node": 4, "mesh.gpu": 2, "layout.capacity_factor": 0.5},
        {
            "mesh.node": 2,
            "mesh.gpu": 4,
            "layout.dispatch": "flat",
            "model.groups": 1,
            "model.top_groups": 1,
        },
        {
            "layout.micro_batches_in_flight": 2,
            "batch.sequences": 16,
            "precision.dispatch": "fp8",
        },
        {"evaluation.tokens": 0, "batch.ramp_tokens": 0, "optimizer.ema_decay": 0.0},
    ],
    ids=str,
)
def test_what_works_is_let_through(changes):
    config = configs.parse(tiny(changes))
    assert configs.from_json(config.to_json()) == config


def test_a_free_axis_is_checked_once_it_is_known():
    config = configs.parse(tiny({"batch.micro_sequences": 2}))
    resolved = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, gpu=4))
    with pytest.raises(ConfigError, match=r"batch\.micro_sequences=2 .* 4 devices"):
        configs.check(resolved)
    configs.check(dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, gpu=2)))


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("model.top_kk", 4, r"unknown key model\.top_kk; did you mean model\.top_k\?"),
        ("modle", {}, r"unknown key modle; did you mean model\?"),
        ("model.top_k", "4", r"model\.top_k is '4'; expected int"),
        ("model.top_k", True, r"model\.top_k is True; expected int"),
        ("model.top_k", 2.5, r"model\.top_k is 2\.5; expected int"),
        ("model", 3, r"model is 3; expected a section"),
    ],
)
def test_keys_and_types(key, value, words):
    values = tiny()
    put(values, key, value)
    assert re.search(words, refused(values))


def test_a_missing_key_is_named():
    values = tiny()
    del values["batch"]["length"]
    assert "missing key batch.length" in refused(values)


SIZE = st.integers(1, 70)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.fixed_dictionaries(
        {
            "model.experts": SIZE,
            "model.groups": st.integers(1, 9),
            "model.top_groups": st.integers(1, 9),
            "model.top_k": st.integers(1, 20),
            "model.heads": SIZE,
            "model.d_rope": SIZE,
            "model.d_dense": SIZE,
            "model.d_expert": SIZE,
            "model.dense_layers": st.integers(0, 8),
            "model.yarn_original": st.integers(2, 200),
            "model.yarn_factor": st.sampled_from([1.0, 1.5, 2.0]),
            "mesh.replica": st.integers(1, 4),
            "mesh.node": st.integers(1, 4),
            "mesh.gpu": st.integers(1, 4),
            "mesh.tensor": st.integers(1, 4),
            "layout.capacity_factor": st.floats(1e-4, 2.0),
            "layout.micro_batches_in_flight": st.sampled_from([1, 2]),
            "layout.dispatch": st.sampled_from(["two_hop", "flat", "reference"]),
            "batch.length": st.integers(2, 300),
            "batch.sequences": SIZE,
            "batch.ramp_sequences": SIZE,
            "batch.micro_sequences": SIZE,
            "schedule.warmup_steps": st.integers(0, 10_000),
        }
    )
)
def test_following_the_advice_ends_in_a_config_that_works(changes):
    configs.check(settle(tiny(changes)))
