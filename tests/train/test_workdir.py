"""The folder of a run: whose it is, and what becomes of files that are removed meanwhile."""

import dataclasses
import json
import platform
import shutil
from types import SimpleNamespace

import pytest
import small

from deepseek_jax.config import ConfigError
from deepseek_jax.errors import RunError
from deepseek_jax.train import lock, workdir

NO_TOKENIZER = SimpleNamespace(tokenizer=None)


def on_library():
    config = small.config()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, path=""))


@pytest.fixture
def own(tmp_path):
    """The lock of a run that has a row and a checkpoint."""
    with lock.held(tmp_path / "run") as own:
        workdir.claim(own.directory, small.config(), NO_TOKENIZER)
        (own.directory / "metrics.jsonl").touch()
        (own.directory / "checkpoints" / "4").mkdir(parents=True)
        yield own


def watch(own, saved=4):
    workdir.watch(own, saved, small.config(), NO_TOKENIZER)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_rows_or_checkpoints_that_are_gone_stop_the_run(own, name):
    watch(own)
    path = own.directory / name
    path.rename(own.directory / "elsewhere")
    words = rf"{path} was removed or replaced while this run went on, so it stops .*Put it back, "
    with pytest.raises(RunError, match=words):
        watch(own)
    assert not path.exists()
    path.touch() if name == "checkpoints" else path.mkdir()
    with pytest.raises(RunError, match=words):
        watch(own)


def test_a_run_without_a_checkpoint_yet_needs_no_folder_of_them(own):
    shutil.rmtree(own.directory / "checkpoints")
    watch(own, saved=0)
    assert not (own.directory / "checkpoints").exists()
    with pytest.raises(RunError, match="checkpoints was removed"):
        watch(own, saved=4)


def test_a_config_that_is_gone_alone_is_written_again(own, caplog):
    before = (own.directory / "config.json").read_text()
    (own.directory / "config.json").unlink()
    watch(own)
    assert caplog.messages == [f"{own.directory}: wrote config.json again, which was removed"]
    assert (own.directory / "config.json").read_text() == before


def test_a_workdir_that_is_gone_is_not_made_again(own):
    shutil.rmtree(own.directory)
    with pytest.raises(RunError, match="was removed, renamed or replaced"):
        watch(own)
    assert not own.directory.exists()


def test_what_a_killed_save_left_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    workdir.check(tmp_path, small.config())
    (tmp_path / "checkpoints" / "3").mkdir()
    with pytest.raises(ConfigError, match=r"holds checkpoints but no config\.json"):
        workdir.check(tmp_path, small.config())


def test_the_library_of_another_python_is_refused(monkeypatch):
    config, now = on_library(), platform.python_version()
    meta = {"tokens": 1, **workdir.of_this_python(config)}
    assert meta["python"] == now
    for fine in (None, {}, meta):
        workdir.check_library(config, fine)
    monkeypatch.setattr(platform, "python_version", lambda: "3.99.1")
    words = (
        rf"made with Python {now}, and this is Python 3\.99\.1\. Resume it with Python {now}, or "
        r"begin a new workdir, with --config\.data\.path=FOLDER"
    )
    with pytest.raises(ConfigError, match=words):
        workdir.check_library(config, meta)
    assert workdir.of_this_python(small.config(data_path="/text")) == {}
    workdir.check_library(small.config(data_path="/text"), meta)


@pytest.mark.parametrize(
    "key, value",
    [
        ("optimizer.moments", "bfloat16"),
        ("model.layers", 7),
        ("model.experts", 64),
        ("model.mtp_depth", 3),
        ("model.rope_theta", 5.0),
        ("batch.length", 7),
        ("data.fim_rate", 0.5),
    ],
)
def test_a_key_that_a_checkpoint_depends_on_is_named(tmp_path, key, value):
    config = small.config()
    kept = json.loads(config.to_json())
    section, name = key.split(".")
    before, kept[section][name] = kept[section][name], value
    assert before != value
    (tmp_path / "config.json").write_text(json.dumps(kept))
    words = rf"holds a run with {key}={value!r}, and this config has {before!r};.*--config\.{key}="
    with pytest.raises(ConfigError, match=words):
        workdir.check(tmp_path, config)
