"""Command lines of convert, evaluate and generate: each error is one line that names a flag."""

import importlib
import json
import shutil
import sys
import warnings

import numpy as np
import pytest
import serving
from absl import app, flags
from equations import checkpoints

from deepseek_jax import command
from deepseek_jax.config import ConfigError


@pytest.fixture
def typed(monkeypatch, capsys):
    """typed(command, *arguments) -> (exit code, stdout, stderr), in this process.

    The commands are modules that define flags, each of which only one module of a process can do.
    """
    values = flags.FLAGS.__dict__
    whole = dict(values)
    own = [n for module, n in values["__flags_by_module"].items() if module.startswith("absl")]
    fresh = dict(flags.FlagValues().__dict__)
    fresh["__flags"] = {name: whole["__flags"][name] for f in own for name in (g.name for g in f)}

    def swap(to):
        values.clear()
        values.update(to)

    def run(name, *arguments):
        module = f"deepseek_jax.{name}"
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        monkeypatch.setattr(command, "_tune_memory", lambda: None)
        monkeypatch.setattr(command, "start_processes", lambda: None)  # pytest keeps its devices
        monkeypatch.setattr(app, "run", lambda run, flags_parser: run(flags_parser(sys.argv)))
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back later
        swap({**fresh, "__flags": dict(fresh["__flags"])})
        code = 0
        try:
            command.run(importlib.import_module(module).main)
        except SystemExit as stop:
            code = stop.code
        finally:
            swap(whole)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer of bytes, and a text in two forms."""
    folder = serving.fill(tmp_path_factory.mktemp("checkpoint"))
    (folder / "rows.jsonl").write_text(json.dumps({"body": "a text"}) + "\n")
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    np.save(folder / "floats.npy", np.zeros(3))
    return folder


CONVERT = {"source": "{0}", "target": "{0}/new"}
EVALUATE = {"checkpoint": "{0}", "data": "{0}/rows.jsonl"}
GENERATE = {"checkpoint": "{0}", "prompt": "a"}

MISTAKES = [
    ("convert", {"confgi": 1}, "Unknown command line flag 'confgi'"),
    ("convert", {"source": None}, "needs --source=DIR and --target=DIR"),
    ("convert", {"target": ""}, "needs --source=DIR and --target=DIR"),
    ("convert", {"source": "{0}/no"}, "--source={0}/no is not a folder"),
    ("convert", {"target": "{0}"}, "--target={0} exists and is not an empty folder"),
    ("convert", {"target": "{0}/empty.txt"}, "--target={0}/empty.txt exists"),
    ("convert", {"target": "{0}/empty.txt/x"}, "--target={0}/empty.txt/x cannot be written"),
    ("convert", {"format": "int8"}, "--format=int8"),
    ("convert", {"shard_gb": 0}, "--shard_gb=0.0; expected a number above 0"),
    ("convert", {"shard_gb": "inf"}, "--shard_gb=inf"),
    ("convert", {"shard_gb": "nan"}, "--shard_gb=nan"),
    ("convert", {"shard_gb": "big"}, "--shard_gb=big"),
    ("convert", {"config": "{0}/no.py"}, "--config={0}/no.py: no such file"),
    ("convert", {"config": "configs/v3_tiny.py", "format": "fp8"}, "--config is the recipe"),
    ("evaluate", {"dta": "x"}, "Unknown command line flag 'dta'"),
    ("evaluate", {"data": None}, "needs --checkpoint=DIR and --data=PATH"),
    ("evaluate", {"checkpoint": "{0}/no"}, "--checkpoint={0}/no is not a folder"),
    ("evaluate", {"data": "{0}/no"}, "--data='{0}/no' does not exist"),
    ("evaluate", {"data": "{0}/empty.txt"}, "--data: {0}/empty.txt is empty; set --data to"),
    ("evaluate", {"data": "{0}/latin.txt"}, "or set --data to other files"),
    ("evaluate", {"data": "{0}/floats.npy"}, "--data: {0}/floats.npy is float64"),
    ("evaluate", {}, "no field --text_key='text'; it has keys 'body': set --text_key"),
    ("evaluate", {"length": 1}, "--length=1"),
    ("evaluate", {"tokens": "few"}, "--tokens=few"),
    ("evaluate", {"dtype": "float64"}, "--dtype=float64"),
    ("evaluate", {"mesh": "gpu:x"}, "--mesh has 'gpu:x'"),
    ("evaluate", {"mesh": "gpu:--2"}, "--mesh has 'gpu:--2'"),
    ("evaluate", {"mesh": "gpu:3", "text_key": "body"}, "needs 3 devices and there are 8"),
    ("generate", {"promt": "a"}, "Unknown command line flag 'promt'"),
    ("generate", {"prompt": None}, "needs --checkpoint=DIR and --prompt=TEXT"),
    ("generate", {"checkpoint": "{0}/no"}, "--checkpoint={0}/no is not a folder"),
    ("generate", {"prompt_tokens": "1,b"}, "--prompt_tokens='1,b'; expected ids"),
    ("generate", {"max_tokens": 0}, "--max_tokens=0"),
    ("generate", {"temperature": -1}, "--temperature=-1"),
    ("generate", {"temperature": "nan"}, "--temperature=nan"),
    ("generate", {"top_p": 0}, "--top_p=0"),
    ("generate", {"speculate": -1}, "--speculate=-1"),
    ("generate", {"slots": 0}, "--slots=0"),
    ("generate", {"cache_length": 0}, "--cache_length=0"),
    ("generate", {"cache": "int8"}, "--cache=int8"),
    ("generate", {"mesh": "rack:2"}, "--mesh has 'rack:2'"),
    ("generate", {"mesh": "gpu:3"}, "needs 3 devices and there are 8; change --mesh"),
    ("generate", {"mesh": "tensor:8"}, "(--mesh=tensor:8); change the mesh"),
    ("generate", {"mesh": "pipe:8"}, "--mesh has pipe:8; generation has no pipeline"),
]


@pytest.mark.parametrize("name, given, words", MISTAKES, ids=str)
def test_mistakes_name_the_flag(name, given, words, typed, folder):
    before = sorted(folder.iterdir())
    usual = {"convert": CONVERT, "evaluate": EVALUATE, "generate": GENERATE}[name]
    both = {key: value for key, value in {**usual, **given}.items() if value is not None}
    code, out, err = typed(name, *(f"--{k}={v}".format(folder) for k, v in both.items()))
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ") and words.format(folder) in err, err
    assert len(err.splitlines()) == 1 and "data." not in err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    "key, flag",
    [
        ("batch.length=9 is past", "--length=9 is past"),
        (
            "the 4 devices (mesh.node=2 x mesh.gpu=-1)",
            "the 4 devices (--mesh=node:2 x --mesh=gpu:-1)",
        ),
        ("set batch.length_of=1, /a/batch.length", "set batch.length_of=1, /a/batch.length"),
    ],
)
def test_keys_are_told_as_flags(key, flag):
    with pytest.raises(ConfigError) as error, command.naming({"batch.length": "--length"}):
        raise ConfigError(key)
    assert str(error.value) == flag


def test_a_tokenizer_of_another_model_is_named(typed, folder, tmp_path):
    settings, weights = checkpoints.make("v3")  # 256 tokens, which bytes and their marks are not
    checkpoints.write(tmp_path, settings, weights)
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    data = ["--text_key=body", f"--data={folder}/rows.jsonl"]
    code, _, err = typed("evaluate", f"--checkpoint={tmp_path}", *data)
    assert code == 2 and f"{tmp_path}/tokenizer.json has ids up to 261" in err
    (tmp_path / "tokenizer.json").write_text("{")
    code, _, err = typed("evaluate", f"--checkpoint={tmp_path}", *data)
    assert code == 2 and f"--checkpoint: {tmp_path}/tokenizer.json is not a tokenizer" in err


def test_rows_are_scored_by_the_field_that_is_named(typed, folder):
    flags = ["--text_key=body", "--length=8", "--config=configs/v3_tiny.py", "--json"]
    flags += ["--config.layout.unroll=1", "--config.batch.micro_sequences=1"]
    code, out, err = typed(
        "evaluate", f"--checkpoint={folder}", f"--data={folder}/rows.jsonl", *flags
    )
    assert (code, err) == (0, ""), err
    found = json.loads(out)
    assert (found["bytes"], found["tokens"]) == (len("a text"), len("a text") + 1)
