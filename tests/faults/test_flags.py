"""Flags of every command with values that cannot be: one line that names the flag, exit code 2."""

import pytest

TINY = "--config=configs/v3_tiny.py"
LONG = "x/" * 2500
PATHS = {
    "": "",
    "\udcff": "is not UTF-8",
    "a\0b": "has a null character",
    LONG: "is too long",
    "y" * 300: "is too long",
    "~nouser/x": "home directory",
}
WHOLE = ("", "three", "1.5", "nan", "1e3", "[1]", "\udcff", "9" * 5000)  # of an integer flag
NUMBERS = ("", "three", "[1]", "1,5", "\udcff")  # of a flag for any number

# command -> what it needs besides, flags of paths, of whole numbers, of other numbers, of choices
FLAGS = {
    "main": (
        (TINY,),
        ("workdir", "config"),
        ("stop_code", "profile", "emulate_devices", "processes", "process", "join_timeout"),
        (),
        (),
    ),
    "generate": (
        ("--checkpoint=tests/fixtures/hf_tiny", "--prompt_tokens=1"),
        ("checkpoint", "config"),
        ("max_tokens", "seed", "speculate", "slots", "cache_length", "process"),
        ("temperature", "top_p"),
        ("cache", "dtype", "mesh", "prompt_tokens"),
    ),
    "evaluate": (
        ("--checkpoint=tests/fixtures/hf_tiny", "--data=README.md"),
        ("checkpoint", "config"),
        ("length", "tokens", "emulate_devices"),
        (),
        ("dtype", "mesh"),
    ),
    "convert": (
        ("--source=tests/fixtures/hf_tiny", "--target=runs/never"),
        ("source", "target", "config"),
        (),
        ("shard_gb",),
        ("format", "scales"),
    ),
    "plan.__main__": ((TINY,), ("config",), ("devices",), (), ()),
    "bench.__main__": ((), ("config",), ("emulate_devices",), (), ()),
}


OUT_OF_RANGE = [
    ("main", "stop_code", -1),
    ("main", "stop_code", 256),
    ("generate", "max_tokens", -1),
    ("generate", "seed", -1),
    ("generate", "temperature", -1),
    ("generate", "top_p", "nan"),
    ("generate", "top_p", 1.5),
    ("generate", "top_p", -1),
    ("evaluate", "length", 0),
    ("evaluate", "tokens", 0),
    ("convert", "shard_gb", "-1"),
    ("plan.__main__", "devices", 0),
    ("plan.__main__", "devices", -1),
    ("bench.__main__", "emulate_devices", 0),
    ("bench.__main__", "emulate_devices", 10**12),
]


def cases():
    for name, (_, paths, whole, numbers, choices) in FLAGS.items():
        for flag in paths:
            yield from ((name, flag, value) for value in PATHS)
        for flag in whole:
            yield from ((name, flag, value) for value in WHOLE)
        for flag in numbers:
            yield from ((name, flag, value) for value in NUMBERS)
        for flag in choices:
            yield from ((name, flag, value) for value in ("three", "\udcff", ","))
    yield from OUT_OF_RANGE


@pytest.mark.parametrize("name, flag, value", list(cases()), ids=lambda value: repr(value)[:20])
def test_values_that_cannot_be(name, flag, value, typed):
    needed = [part for part in FLAGS[name][0] if not part.startswith(f"--{flag}=")]
    positional = ["train"] if name.startswith("bench") else []
    code, out, err = typed(name, *positional, *needed, f"--{flag}={value}")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert flag in err and len(err) < 900, err
    if flag in FLAGS[name][1]:
        assert PATHS[value] in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((TINY, TINY), "--config is given 2 times; give one file"),
        (("--config", TINY), "--config is given 2 times"),
        (("--config",), "--config is empty"),
        (("--config.seed=1",), "--config.seed changes a config; give --config=FILE, too"),
        ((TINY, "--config.=1"), "unknown key --config."),
        ((TINY, "--config.model.layers.x=1"), "--config.model.layers is one value"),
        ((TINY, "--workdir"), "workdir"),
        ((TINY, "--workdir=README.md"), "--workdir=README.md: README.md is no folder"),
        ((TINY, "--workdir=/dev/null"), "--workdir=/dev/null: /dev/null is no folder"),
    ],
    ids=str,
)
def test_what_a_command_line_cannot_say(arguments, words, typed):
    code, out, err = typed("main", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and words in err and len(err.splitlines()) == 1
