"""Bad input: one line that names the key, exit code 2, nothing compiled and nothing written."""

import json
import sys

import pytest
import runs
from absl import app, flags

from deepseek_jax import command, main
from deepseek_jax.config import ConfigError
from deepseek_jax.data import tokenizer
from deepseek_jax.train import loop, workdir


@pytest.fixture
def refused(text, tmp_path, monkeypatch):
    """Runs training, which must be refused before it compiles; returns the message."""
    workdir = tmp_path / "runs" / "new"

    def never(*_):
        raise AssertionError("compiled or allocated before the check")

    monkeypatch.setattr(loop.state, "initialise", never)

    def run(directory=workdir, **sections):
        with pytest.raises(ConfigError) as error:
            loop.train(runs.tiny(text, **sections), directory, screen=False)
        assert not (tmp_path / "runs").exists()
        assert "\n" not in str(error.value)
        return str(error.value)

    return run


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"mesh": {"gpu": 3}}, ["mesh", "3 devices", "8"]),
        ({"mesh": {"gpu": -1, "node": 3}}, ["mesh.gpu=-1", "8"]),
        ({"mesh": {"gpu": -1, "node": -1}}, ["mesh.node", "mesh.gpu", "-1"]),
        ({"mesh": {"gpu": 4, "pipe": 2}, "layout": {"zero": 3}}, ["mesh.pipe=2", "layout.zero=1"]),
        (
            {"mesh": {"gpu": 4, "pipe": 2}, "layout": {"stage_layers": (1, 2)}},
            ["layout.stage_layers", "model.layers=2"],
        ),
        ({"model": {"experts": 12}}, ["model.experts=12", "mesh.gpu=8"]),
        ({"model": {"experts": 9}}, ["model.experts=9", "model.groups"]),
        ({"model": {"top_k": 5}}, ["model.top_k=5", "model.top_groups"]),
        ({"batch": {"micro_sequences": 4}}, ["batch.micro_sequences=4", "mesh.gpu=8"]),
        ({"batch": {"length": 1}}, ["batch.length"]),
        ({"batch": {"length": 1 << 20}, "schedule": {"warmup_steps": 0}}, ["batch.length=1048576"]),
        ({"model": {"mtp_depth": 4}, "batch": {"length": 4}}, ["model.mtp_depth=4"]),
        ({"model": {"vocab": 256}}, ["model.vocab=256"]),
        ({"model": {"layers": 2**31}}, ["model.layers=2147483648", "host memory"]),
        ({"batch": {"sequences": 2**31}}, ["batch.sequences=2147483648", "264 GiB of host memory"]),
        ({"layout": {"cost_profile": "/no.pbtxt"}}, ["layout.cost_profile=/no.pbtxt", "plan step"]),
        ({"data": {"path": "/nowhere/at/all"}}, ["data.path='/nowhere/at/all'"]),
    ],
    ids=str,
)
def test_configs_that_cannot_work(refused, sections, words):
    message = refused(**sections)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("content", [b"", b"\0\1\2", "caf\xe9".encode("latin-1")])
def test_data_that_is_no_text(refused, tmp_path, content):
    file = tmp_path / "data.txt"
    file.write_bytes(content)
    assert str(file) in refused(data={"path": str(file)})


def test_workdirs_that_cannot_be_written(refused, tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert "--workdir" in refused(file)
    assert "--workdir" in refused(file / "below")
    assert "--workdir" in refused(tmp_path / ("x" * 300))
    assert "--workdir" in refused(loop.Path("/proc/run"))


def test_workdirs_of_others(refused, text, tmp_path):
    other = tmp_path / "other"
    (other / "checkpoints" / "3").mkdir(parents=True)
    assert "config.json" in refused(other)
    kept = json.loads(runs.tiny(text).to_json())
    kept["model"]["layers"] = 7
    (other / "config.json").write_text(json.dumps(kept))
    assert "model.layers=7" in refused(other)
    (other / "config.json").write_text("{")
    assert "config.json" in refused(other)
    assert sorted(path.name for path in other.iterdir()) == ["checkpoints", "config.json"]


def test_weights_from_elsewhere_keep_their_tokenizer(refused, text, tmp_path):
    """A workdir of `convert` without one waits for it, and takes the one that is set."""
    other = tmp_path / "other"
    (other / "published").mkdir(parents=True)
    (other / "published" / "config.json").write_text("{}")
    config = runs.tiny(text, mesh={"gpu": 8})
    (other / "config.json").write_text(config.to_json())
    words = ["began from the weights of another", "data.tokenizer='byte'", "set data.tokenizer to"]
    assert all(word in (message := refused(other)) for word in words), message
    own = tmp_path / "tokenizer.json"
    tokenizer.make("byte", vocab=264, texts=()).save(own)
    chosen = runs.tiny(text, mesh={"gpu": 8}, data={"tokenizer": str(own)})
    workdir.check(other, chosen)
    (other / "config.json").write_text(chosen.to_json())
    changed = runs.tiny(text, mesh={"gpu": 8}, data={"tokenizer": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"holds a run with data.tokenizer="):
        workdir.check(other, changed)


def test_broken_checkpoints_are_not_overwritten(refused, text, tmp_path):
    other = tmp_path / "other"
    (other / "checkpoints" / "3").mkdir(parents=True)
    before = runs.tiny(text, mesh={"gpu": 1}).to_json()
    (other / "config.json").write_text(before)
    assert "none can be used" in refused(other)
    assert (other / "config.json").read_text() == before
    assert [path.name for path in (other / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--noconfig.layout.buffer"],
            "--config.layout.buffer is now called layout.capacity_factor",
        ),
        (["--config.model.layer=3"], "did you mean --config.model.layers?"),
        (["--config.model.layers=three"], "model.layers"),
        (["--config.model=3"], "section"),
        (["--confgi.seed=1"], "confgi"),
        (["stray"], "stray"),
        (["--emulate_devices=0"], "--emulate_devices=0"),
        (["--profile=0"], "--profile=0; expected at least 1"),
        (["--profile=-3"], "--profile=-3; expected at least 1"),
        (["--profile=400"], "--profile=400 begins after 2 steps, and the run has"),
        (["--profile=few"], "profile"),
    ],
)
def test_the_command_line(monkeypatch, capsys, tmp_path, arguments, words):
    code, err = typed([f"--config={runs.TINY}", *arguments], monkeypatch, capsys, tmp_path)
    assert code == 2 and err.startswith("error: ") and words in err
    assert len(err.splitlines()) == 1


def test_without_a_config_file(monkeypatch, capsys, tmp_path):
    code, err = typed(["--config=no/such.py"], monkeypatch, capsys, tmp_path)
    assert code == 2 and "no/such.py" in err and len(err.splitlines()) == 1


def typed(arguments, monkeypatch, capsys, folder):
    """(exit code, stderr) of the training command, in this process; nothing may be written."""
    given = ["main.py", f"--workdir={folder / 'run'}", *arguments]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(app, "run", lambda run, flags_parser: run(flags_parser(sys.argv)))
    with pytest.raises(SystemExit) as stop:
        try:
            command.run(main.main)
        finally:
            flags.FLAGS.unparse_flags()
    assert not (folder / "run").exists()
    return stop.value.code, capsys.readouterr().err
