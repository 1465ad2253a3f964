"""Least memory of a run: sizes that cannot exist are refused before anything is allocated."""

import dataclasses
import math

import pytest
import small

from deepseek_jax.config import ConfigError
from deepseek_jax.hardware import machine_memory
from deepseek_jax.model import least_memory
from deepseek_jax.model.count import weights
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.precision.recipes import BFLOAT16, FLOAT32, FP8

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(machine_memory, "host_bytes", lambda: 16 * GIB)


def with_sizes(section="model", **sizes):
    config = small.config(optimizer_ema_decay=0.9)
    changed = dataclasses.replace(getattr(config, section), **sizes)
    return dataclasses.replace(config, **{section: changed})


def refused(config):
    with pytest.raises(ConfigError) as error:
        least_memory.check_training(config)
    message = str(error.value)
    assert message.isprintable() and len(message) < 300
    assert message.endswith("and there are 16 GiB; lower a size, or use more devices")
    return message


@pytest.mark.parametrize(
    ("section", "sizes", "words"),
    [
        ("model", {"layers": 2**31}, "model.layers=2147483648, model.d_model=32, "),
        ("model", {"vocab": 2**31}, "model.vocab=2147483648, model.d_model=32, "),
        ("model", {"experts": 2**62}, "model.experts=4611686018427387904, model.d_model=32, "),
        ("model", {"d_nope": 2**31}, "model.d_nope=2147483648, "),
        (
            "batch",
            {"sequences": 2**31},
            "batch.sequences=2147483648, batch.length=16: at least 136 GiB of host memory are "
            "needed (136 GiB for the tokens of a step), ",
        ),
        (
            "batch",
            {"sequences": 10**7, "micro_sequences": 10**7},
            "batch.micro_sequences=10000000, model.d_model=32, batch.length=16: at least ",
        ),
        ("batch", {"length": 10**8}, "batch.length=100000000, "),
    ],
    ids=str,
)
def test_sizes_that_cannot_exist(section, sizes, words):
    assert refused(with_sizes(section, **sizes)).startswith(words)


def test_a_run_that_fits_is_let_through(monkeypatch):
    config = with_sizes()
    least_memory.check_training(config)
    monkeypatch.setattr(machine_memory, "host_bytes", lambda: None)  # a system that does not tell
    least_memory.check_training(with_sizes(layers=2**31))


def test_devices_of_a_cpu_share_its_memory(monkeypatch):
    config, layout = with_sizes(), meshes.layout(with_sizes())
    need = least_memory.state(config, layout).bytes
    monkeypatch.setattr(machine_memory, "host_bytes", lambda: 7 * need)  # there are eight
    with pytest.raises(ConfigError, match="weights, gradients and moments"):
        least_memory.check_training(config)


def test_an_accelerator_has_memory_of_its_own(monkeypatch):
    config, layout = with_sizes(), meshes.layout(with_sizes())
    need = least_memory.state(config, layout).bytes
    monkeypatch.setattr(least_memory.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(machine_memory, "device_bytes", lambda: 2 * need)
    least_memory.check_training(config)
    monkeypatch.setattr(machine_memory, "device_bytes", lambda: need)
    with pytest.raises(ConfigError, match="of memory of a device are needed"):
        least_memory.check_training(config)


@pytest.mark.parametrize(("recipe", "need"), [(FLOAT32, "142 TiB"), (BFLOAT16, "72.3 TiB")])
def test_weights_alone(recipe, need):
    model = with_sizes(layers=2**31).model
    with pytest.raises(ConfigError, match=r"^model\.layers=2147483648, ") as error:
        least_memory.check_weights(model, recipe)
    assert f"{need} of host memory are needed" in str(error.value)
    least_memory.check_weights(with_sizes().model, recipe)


def test_blocks_take_a_byte_each(monkeypatch):
    model = with_sizes().model
    each = {weight.path: weight for weight in weights(model)}
    blocks = {path for path, weight in each.items() if weight.roles is not None}
    wide = {path for path, weight in each.items() if weight.sensitive}
    need = sum(
        (1 if path in blocks else 4 if path in wide else 2) * math.prod(weight.shape)
        for path, weight in each.items()
    )
    monkeypatch.setattr(machine_memory, "host_bytes", lambda: need)
    least_memory.check_weights(model, FP8, blocks=blocks)
    for fewer in (blocks - {"moe_layers.feed.experts.down"}, frozenset()):
        with pytest.raises(ConfigError, match="for weights"):
            least_memory.check_weights(model, FP8, blocks=fewer)


class Compiled:
    """A compiled step with so many bytes of temporaries."""

    def __init__(self, count):
        self.temp_size_in_bytes = count

    def memory_analysis(self):
        return self


def test_a_compiled_step_that_cannot_run():
    config = with_sizes()
    least_memory.check_compiled(Compiled(16 * GIB), config)
    with pytest.raises(ConfigError, match=r"^batch\.micro_sequences=8, .*temporaries of a step"):
        least_memory.check_compiled(Compiled(17 * GIB), config)
