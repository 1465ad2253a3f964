"""Command lines of convert, evaluate and generate: each error is one line that names a flag."""

import collections
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import serving
from equations import checkpoints
from safetensors.numpy import load_file

import deepseek_jax
from deepseek_jax import command
from deepseek_jax.config import ConfigError
from deepseek_jax.serve import generation
from deepseek_jax.train import evaluation


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
    ("convert", {"scales": "e8m0"}, "--scales=e8m0 is of FP8 blocks; add --format=fp8"),
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
    ("evaluate", {"stride": 0}, "--stride=0"),
    ("evaluate", {"stride": 4}, "--stride=4 is for documents apart; add --documents"),
    (
        "evaluate",
        {"stride": 9, "length": 8, "documents": True},
        "--stride=9; expected 1 to --length=8",
    ),
    ("evaluate", {"dtype": "float64"}, "--dtype=float64"),
    ("evaluate", {"mesh": "gpu:x"}, "--mesh has 'gpu:x'"),
    ("evaluate", {"mesh": "gpu:--2"}, "--mesh has 'gpu:--2'"),
    ("evaluate", {"mesh": "gpu:3", "text_key": "body"}, "needs 3 devices and there are 8"),
    ("generate", {"promt": "a"}, "Unknown command line flag 'promt'"),
    ("generate", {"prompt": None}, "needs --checkpoint=DIR and --prompt=TEXT"),
    ("generate", {"checkpoint": "{0}/no"}, "--checkpoint={0}/no is not a folder"),
    ("generate", {"prompt_tokens": "1,b"}, "--prompt_tokens='1,b'; expected ids"),
    ("generate", {"prompt_tokens": "1,2,"}, "--prompt_tokens='1,2,'; expected ids"),
    ("generate", {"prompt_tokens": "-1"}, "--prompt_tokens='-1'; expected ids"),
    ("generate", {"prompt_tokens": "\u0661"}, "--prompt_tokens='\u0661'; expected ids"),
    ("generate", {"prompt_tokens": ""}, "--prompt_tokens=''; expected ids"),
    ("generate", {"prompt_tokens": "9" * 5000}, f"--prompt_tokens='{'9' * 80}...'; expected ids"),
    ("generate", {"prompt_tokens": 512}, "tokens from 512 to 512; this model has 0 to 511"),
    ("generate", {"prompt": "\udcff"}, "a prompt is not UTF-8 text: character 0 is half"),
    ("generate", {"max_tokens": 0}, "--max_tokens=0"),
    (
        "generate",
        {"max_tokens": 2**30},
        "--cache_length=1073741888 tokens (a prompt and its --max_t",
    ),
    (
        "generate",
        {"max_tokens": 10**30},
        "--cache_length=1000000000000000000000000000064; expected",
    ),
    ("generate", {"cache_length": 20}, "and --max_tokens=128 need room for 130, and a slot has 20"),
    ("generate", {"temperature": "inf"}, "--temperature=inf; expected a number from 0 to 1e30"),
    ("generate", {"top_p": "nan"}, "--top_p=nan; expected a number above 0, up to 1"),
    ("generate", {"seed": 2**32}, "--seed=4294967296; expected a whole number, 0 to 2**32 - 1"),
    ("generate", {"speculate": 2**40}, "--speculate=1099511627776; expected at least 0"),
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
    ("generate", {"mesh": "pipe:8"}, "--mesh=pipe:8: generation has no pipeline"),
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


def test_a_score_beyond_numbers_is_null_in_json(typed, folder, monkeypatch):
    def score(*_, **given):
        return {"loss": 710.0, "perplexity": float("inf"), "stride": given["stride"]}

    monkeypatch.setattr(evaluation, "score_checkpoint", score)
    files = (f"--checkpoint={folder}", f"--data={folder}/rows.jsonl")
    for more, stride in (((), None), (("--documents",), 256), (("--documents", "--stride=3"), 3)):
        code, out, _ = typed("evaluate", *files, "--json", *more)
        assert code == 0 and "Infinity" not in out
        assert json.loads(out) == {"loss": 710.0, "perplexity": None, "stride": stride}
    assert "perplexity                                     inf" in typed("evaluate", *files)[1]


class OpenedFiles:
    """Paths of the files that this process opens while `recording`.

    An audit hook sees every way to open a file from Python, and cannot be removed again.
    """

    def __init__(self) -> None:
        self.recording = False
        self.paths: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.recording and event == "open" and isinstance(arguments[0], str | os.PathLike):
            self.paths.append(os.fspath(arguments[0]))

    def below(self, folder: Path) -> dict[str, int]:
        """How often each file of a folder was opened; its subfolders are left out."""
        paths = map(Path, self.paths)
        return dict(collections.Counter(path.name for path in paths if path.parent == folder))


@pytest.fixture(scope="module")
def opened_files():
    files = OpenedFiles()
    yield files
    files.recording = False


@pytest.fixture(scope="module")
def sharded(folder, tmp_path_factory):
    """The same checkpoint in two files with an index, and with generation settings."""
    target = tmp_path_factory.mktemp("sharded")
    settings = json.loads((folder / "config.json").read_text())
    checkpoints.write(target, settings, load_file(folder / "model.safetensors"), shards=2)
    shutil.copyfile(folder / "tokenizer.json", target / "tokenizer.json")
    (target / "generation_config.json").write_text('{"eos_token_id": 1}')
    return target


WEIGHTS = (
    "config.json", "model.safetensors.index.json", "model-00001-of-000002.safetensors",
    "model-00002-of-000002.safetensors",
)  # fmt: skip
TEXT = ("tokenizer.json",)
OPENS = {
    "load": ((), WEIGHTS),
    "generate": (
        ("--checkpoint={0}", "--prompt=a", "--max_tokens=2"),
        (*WEIGHTS, *TEXT, "generation_config.json"),
    ),
    "evaluate": (
        ("--checkpoint={0}", "--data={1}/rows.jsonl", "--text_key=body"),
        (*WEIGHTS, *TEXT, "generation_config.json"),
    ),
    "convert": (
        ("--source={0}", "--target={2}/new", "--format=fp8"),
        (*WEIGHTS, *TEXT, "generation_config.json"),
    ),
}


@pytest.mark.parametrize("name", OPENS)
def test_a_checkpoint_is_opened_once(name, typed, sharded, folder, opened_files, tmp_path):
    arguments, files = OPENS[name]
    opened_files.paths.clear()
    opened_files.recording = True
    if name == "load":
        deepseek_jax.load(sharded, dtype=None)
    else:
        given = (argument.format(sharded, folder, tmp_path) for argument in arguments)
        code, _, err = typed(name, *given)
        assert code == 0, err
    opened_files.recording = False
    assert opened_files.below(sharded) == dict.fromkeys(files, 1)


def test_a_workdir_is_opened_once(opened_files):
    workdir = Path(__file__).parents[1] / "fixtures" / "workdir_before_renames"
    opened_files.paths.clear()
    opened_files.recording = True
    model = deepseek_jax.load(workdir, dtype=None)
    opened_files.recording = False
    assert opened_files.below(workdir) == {"config.json": 1}
    assert model.how.recipe.name == "float32"  # as the run was trained


@pytest.fixture
def no_config_file(monkeypatch):
    """A package outside the repository has no configs/."""
    monkeypatch.setattr(command, "default_config", lambda: pytest.fail("configs/ was looked for"))


@pytest.mark.parametrize(
    "stated, flags, want",
    [
        ("float32", (), "float32"),
        ("bfloat16", (), "bfloat16"),
        ("float32", ("--dtype=bfloat16",), "bfloat16"),
        ("bfloat16", ("--config=configs/v3_tiny.py",), "float32"),
    ],
)
def test_a_checkpoint_runs_in_the_dtype_that_it_states(
    stated, flags, want, typed, folder, tmp_path, monkeypatch, no_config_file
):
    settings = json.loads((folder / "config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"torch_dtype": stated}))
    engines, scored = [], []

    class Recorded(generation.Engine):
        def __init__(self, model, how, *rest, **options):
            engines.append((how.recipe.name, model.head.table.dtype.name, options["cache"]))
            super().__init__(model, how, *rest, **options)

    def recorded(config, layout, mesh, **_):
        scored.append((config.precision.recipe, config.precision.dispatch))
        return lambda masters, bias, *rest: evaluation.Score(
            scored.append(masters.head.table.dtype.name) or 1.0, 1
        )

    monkeypatch.setattr(generation, "Engine", Recorded)
    monkeypatch.setattr(evaluation, "make_score", recorded)
    here = (f"--checkpoint={tmp_path}", *flags)
    code, _, err = typed("generate", *here, "--prompt_tokens=1,2", "--max_tokens=2", "--json")
    assert (code, err) == (0, "")
    assert engines == [(want, want, want)]
    code, _, err = typed("evaluate", *here, f"--data={folder}/rows.jsonl", "--text_key=body")
    assert (code, err) == (0, "")
    assert scored == [(want, "compute"), want]


def test_a_dtype_that_is_not_computed_in_is_told(typed, folder, tmp_path, no_config_file):
    settings = json.loads((folder / "config.json").read_text())
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"torch_dtype": "float16"}))
    flags = (f"--checkpoint={tmp_path}", "--prompt_tokens=1,2", "--max_tokens=1", "--json")
    words = f"{tmp_path}/config.json states dtype 'float16'; computing in float32"
    with pytest.warns(UserWarning, match=words):
        code, _, err = typed("generate", *flags)
    assert (code, err) == (0, "")
