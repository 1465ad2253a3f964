"""Each key of the config with wrong values: one line that names the key, or a sensible config."""

import sys

import pytest
import runs
from absl import flags
from faults.values import KEYS, NESTED, SECTIONS, TEXTS, WRONG, at, base, changed, fault
from ml_collections import config_flags

from deepseek_jax import command
from deepseek_jax import config as configs
from deepseek_jax.config import ConfigError
from deepseek_jax.hardware import xla_options
from deepseek_jax.train import workdir

TINY = base()
ONE_OF_EACH_TYPE = (
    "model.layers", "model.init_std", "model.normalise_weights", "data.path", "layout.stage_layers",
    "layout.rules.heads",
)  # fmt: skip


def faults_of(keys, values, parse):
    """Number of cases, and a line for each that is neither refused well nor sensible."""
    found, cases = [], 0
    for key in keys:
        for name, value in values.items():
            what = fault(lambda key=key, value=value: parse(key, value), key)
            cases += 1
            found += [f"{key} = {name}: {what}"] if what else []
    return cases, found


def test_wrong_values_in_a_dictionary():
    cases, found = faults_of(
        (*KEYS, *SECTIONS), WRONG, lambda key, value: configs.parse(changed(TINY, key, value))
    )
    assert cases > 1400
    assert not found, "\n".join(found)


@pytest.fixture
def typed(monkeypatch):
    """Parses --config.KEY=TEXT into a checked config."""
    known = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", lock_config=True, flag_values=known)
    monkeypatch.setattr(command.flags, "FLAGS", known)

    def parse(key, text):
        arguments = ["main", f"--config={runs.TINY}", "--config.mesh.gpu=1"]
        arguments = [*arguments, f"--config.{key}={text}"]
        monkeypatch.setattr(sys, "argv", arguments)  # where ml_collections finds the overrides
        known.unparse_flags()
        for name in [name for name in known if name.startswith("config.")]:
            delattr(known, name)
        command._parse_flags(arguments)
        return configs.parse(known["config"].value)

    return parse


@pytest.mark.parametrize(
    "keys", [ONE_OF_EACH_TYPE, pytest.param(KEYS, marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_wrong_texts_of_flags(typed, keys):
    _, found = faults_of(keys, dict(zip(TEXTS, TEXTS, strict=True)), typed)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("key", "text", "want"),
    [
        ("seed", "1_000", 1000),
        ("seed", "0x10", 16),
        ("seed", " 3 ", 3),
        ("model.init_std", "1e-3", 1e-3),
        ("model.normalise_weights", "false", False),
        ("layout.stage_layers", "[2]", (2,)),
        ("layout.stage_layers", "()", ()),
    ],
)
def test_what_a_flag_accepts(typed, key, text, want):
    assert at(typed(key, text), key) == want


@pytest.mark.parametrize(
    ("key", "value", "want"),
    [
        ("seed", 3.0, 3),
        ("model.init_std", 1, 1.0),
        ("schedule.bias_speed", -0.0, "0.0"),
    ],
)
def test_numbers_are_taken_where_they_are_exact(key, value, want):
    got = at(configs.parse(changed(TINY, key, value)), key)
    assert got == want or str(got) == want


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schedule.learning_rate", 1e30, "is 1e+30; it must be below 2**63, about 9.2e18"),
        ("optimizer.clip", float("inf"), "is inf; it must be below 2**63, about 9.2e18"),
        ("model.init_std", 1e30, "is 1e+30; it must be above 0, from 1e-12 to 100"),
        ("optimizer.eps", 1e-320, "is 1e-320; it must be above 0, from 1e-20 to 1"),
        ("optimizer.weight_decay", 1e-320, "it must be at least 1.2e-38, because float32 takes"),
        ("model.rope_theta", 1e-320, "it must be above 1"),
        ("optimizer.b1", 1 - 1e-9, "it must be at most 0.99999994, because float32 rounds it to 1"),
        ("model.norm_eps", float("nan"), "is nan; it must be a number"),
        ("optimizer.weight_decay", 200.0, "schedule.learning_rate=0.01 times optimizer.weight_dec"),
        ("batch.length", 5000, "8 sequences of batch.length=5000, so that the schedule.warmup_ste"),
        ("layout.attention_block", 1, None),
        ("layout.stage_layers", (1, 2), "layout.stage_layers=(1, 2) must be 1 number, one for ea"),
        ("layout.stage_layers", (2,), None),
        ("data.text_key", "", "nothing in it can be seen; give a name or a path"),
        ("data.path", "\udcff", "has bytes that are not UTF-8"),
        ("data.path", "x" * 5000, "of 5000 characters; it must have at most 4096"),
        ("layout.cost_profile", "a\0b", "has a control character"),
    ],
)
def test_the_bound_that_failed_is_named(key, value, words):
    values = changed(TINY, key, value)
    if words is None:
        configs.parse(values)
        return
    with pytest.raises(ConfigError) as error:
        configs.parse(values)
    assert key in str(error.value) and words in str(error.value)


def test_a_hint_is_found_at_once_for_any_size():
    experts = 2**61 - 1  # a prime
    values = changed(changed(TINY, "model.experts", experts), "model.groups", experts - 1)
    with pytest.raises(ConfigError, match=r"set model\.groups=1$"):
        configs.parse(values)


def test_blocks_of_attention_are_few():
    values = changed(changed(TINY, "batch.length", 2048), "layout.attention_block", 1)
    values = changed(values, "schedule.warmup_steps", 0)
    with pytest.raises(ConfigError, match=r"makes 2048 blocks.*set layout\.attention_block=2$"):
        configs.check_blocks(configs.parse(values))


BROKEN = {
    "empty": b"",
    "cut": b'{"seed": 0, "model": {',
    "binary": bytes(range(256)),
    "UTF-16": '{"seed": 0}'.encode("utf-16"),
    "nested": b"[" * 100_000,
    "nested value": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "list": b"[1, 2]",
    "text": b'"seed"',
    "null": b"null",
    "twice": b'{"seed": 0, "seed": 1}',
    "digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "no section": b'{"seed": 0, "model": 3}',
    "nothing in it": b"{}",
    "list of sections": b'{"seed": 0, "model": [], "layout": {"buffer": 1}}',
    "section of renamed keys": b'{"layout": 3, "model": {}}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_workdir_with_a_broken_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json") as error:
        workdir.check(tmp_path, configs.parse(TINY))
    assert str(error.value).endswith("give another --workdir")
    assert str(error.value).isprintable() and len(str(error.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("values", [[], 3, None, {"layout": {"buffer": 1.0}}, {1: 2}, NESTED])
def test_a_saved_config_that_is_none(values):
    with pytest.raises(ConfigError) as error:
        configs.parse_saved(values)
    assert str(error.value).isprintable() and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("none.pbtxt", None, "is not a file that can be read (No such file or directory)"),
        ("x" * 300 + ".pbtxt", None, "is not a file that can be read (File name too long)"),
        ("folder.pbtxt", "", "is not a file that can be read (Is a directory)"),
        ("other.txt", b"costs {}", "is not a file that ends in .pbtxt"),
        ("bytes.pbtxt", b"\xff\xfe", "is not a file that can be read (no text)"),
        ("zeros.pbtxt", bytes(8), "holds no text"),
        ("right.pbtxt", b"costs {}", ""),
    ],
)
def test_a_cost_profile_is_read_before_the_run(tmp_path, name, content, why):
    file = tmp_path / name
    if content == "":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    if not why:
        assert xla_options.options("cpu", str(file)) == xla_options.options("cpu")
        return
    with pytest.raises(ConfigError, match=r"^layout\.cost_profile=") as error:
        xla_options.options("cpu", str(file))
    assert why in str(error.value) and "plan step" in str(error.value)
