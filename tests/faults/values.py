"""Values that a key of the config may be given by mistake, and what an accepted one must be."""

import math

import numpy as np
import tiny

from deepseek_jax import config as configs
from deepseek_jax.config import ConfigError
from deepseek_jax.config.values import leaves

NESTED = []
for _ in range(100_000):
    NESTED = [NESTED]

WRONG = {
    "None": None, "True": True, "False": False,
    "empty": "", "blank": "  ", "word": "three", "line": "a\nb", "NUL": "a\0b", "byte ff": "\udcff",
    "long": "x" * 5000, "bytes": b"x", "object": object(), "complex": 1j,
    "0": 0, "-1": -1, "-2": -2, "1": 1, "2": 2, "3": 3, "7": 7, "1000": 1000, "2**31": 2**31,
    "2**63 - 1": 2**63 - 1, "2**63": 2**63, "10**400": 10**400, "-10**400": -(10**400),
    "10**5000": 10**5000,
    "0.0": 0.0, "-0.0": -0.0, "0.5": 0.5, "2.5": 2.5, "1e3": 1e3, "1 - 1e-9": 1 - 1e-9,
    "1e-320": 1e-320, "1e-39": 1e-39, "1e-30": 1e-30, "1e18": 1e18, "1e30": 1e30, "1e300": 1e300,
    "-1e-320": -1e-320, "inf": math.inf, "-inf": -math.inf, "nan": math.nan,
    "[]": [], "[1]": [1], "(1, 1, 1)": (1, 1, 1), "(1, 2)": (1, 2), "(-1, 3)": (-1, 3),
    "(2,)": (2,),
    "[0.5]": [0.5], "nested": NESTED, "{}": {}, "{'a': 1}": {"a": 1}, "{3: 1}": {3: ("gpu",)},
    "int64": np.int64(2), "float32": np.float32(0.5), "float64": np.float64(0.25),
    "float32 nan": np.float32("nan"), "bool_": np.bool_(True), "str_": np.str_("full"),
    "array": np.zeros((3, 3)),
}  # fmt: skip

# What a flag may be given: the texts of the values above, and other ways to write numbers.
TEXTS = (
    "", " ", "three", "None", "True", "nan", "inf", "-inf", "1e308", "1e-320", "-0.0", "0", "-1",
    "1", "2", "3.0", "1e3", "1_000", "0x10", " 3 ", "\u0663", "9" * 400, "9" * 5000, "2147483648",
    "(1,)", "[1]", "(1, 2)", "(-1, 3)", "{}", "x" * 5000, "\udcff", "a\nb", "=", "'", "[" * 300,
)  # fmt: skip


def base():
    """tiny.py on one device, as a dictionary."""
    values = tiny.get_config().to_dict()
    values["mesh"]["gpu"] = 1
    return values


KEYS = tuple(key for key, _ in leaves(configs.parse(base()))) + tuple(
    f"layout.rules.{axis}" for axis in base()["layout"]["rules"]
)
SECTIONS = tuple(sorted({key.split(".")[0] for key in KEYS} - {"seed"}))


def changed(values, key, value):
    """A dictionary of sections with another value at a dotted key."""
    first, _, rest = key.partition(".")
    return {**values, first: changed(values[first], rest, value) if rest else value}


def at(values, key):
    for part in key.split("."):
        values = values[part] if isinstance(values, dict) else getattr(values, part)
    return values


def fault(attempt, key):
    """What is wrong about the answer to a value of `key`; "" for one line, or a sensible config."""
    try:
        config = attempt()
    except ConfigError as error:
        return _bad_line(str(error), key)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return nonsense(config)


def _bad_line(text, key):
    name = key.split(".")[-1] if key.startswith("layout.rules") else key
    if name not in text:
        return f"does not name the key: {text[:200]}"
    if "\n" in text or not text.isprintable():
        return f"is not one line: {text[:200]!r}"
    return f"has {len(text)} characters: {text[:300]}" if len(text) >= 300 else ""


def nonsense(config):
    """Why an accepted config has no sense; "" if it has."""
    for key, value in leaves(config):
        if isinstance(value, float):
            single = abs(float(np.float32(value)))
            if not math.isfinite(single) or (value and single < np.finfo(np.float32).tiny):
                return f"accepted {key}={value}, which is {single} in float32"
            if math.copysign(1, value) < 0:
                return f"accepted {key}={value}"
        elif type(value) is int and not -1 <= value < 2**63:
            return f"accepted {key}={value}"
        elif isinstance(value, str) and not value.isprintable():
            return f"accepted {key}={value!r}"
    return _together(config)


def _together(config):
    """Why values do not go together in an accepted config; "" if they do."""
    optimizer, schedule, layout = config.optimizer, config.schedule, config.layout
    if any(np.float32(x) >= 1 for x in (optimizer.b1, optimizer.b2, optimizer.ema_decay)):
        return "accepted a decay of 1 in float32"
    rates = schedule.learning_rate, schedule.decayed_learning_rate, schedule.final_learning_rate
    if max(rates) * optimizer.weight_decay >= 1:
        return "accepted a decay of the weights of 1 or more in a step"
    stages = config.mesh.pipe * (
        2 if layout.pipeline == "dualpipev" and config.mesh.pipe > 1 else 1
    )
    given = layout.stage_layers
    fits = len(given) == stages and sum(given) == config.model.layers and min(given) >= 0
    if given and config.mesh.pipe > 0 and not fits:
        return f"accepted layout.stage_layers={given}"
    if configs.from_json(config.to_json()) != config:
        return "is another config after JSON"
    return ""
