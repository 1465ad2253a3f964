"""A workdir written before keys and modules were renamed.

`fixtures/workdir_before_renames` is a run of `tiny.py` on its `text.txt`, 6 steps, made by the last
commit before the renames. The losses of the steps after it are those of that commit, too.
"""

import dataclasses
import json
import runpy
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import runs

from deepseek_jax import command
from deepseek_jax.checkpoint import conversion, load
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError, parse, parse_saved
from deepseek_jax.config.renamed import RENAMED
from deepseek_jax.train import loop, workdir

FIXTURE = Path(__file__).parents[1] / "fixtures" / "workdir_before_renames"
NEXT = {7: (3.5950918, 3.7677615), 8: (3.5476782, 3.7243023)}  # step -> loss, MTP loss
SCHEDULE = dict(tokens=2000, decay_start=1024, decay_end=1200, final_start=1400, warmup_steps=2)


def test_it_resumes(tmp_path, one_device):
    shutil.copytree(FIXTURE, tmp_path / "run")
    config = runs.tiny(
        FIXTURE / "text.txt",
        data=dict(cache=str(tmp_path / "cache")),
        schedule=SCHEDULE,
        batch=dict(ramp_tokens=100_000),
        evaluation=dict(tokens=0),
    )
    loop.train(config, tmp_path / "run", screen=False)
    rows = {row["step"]: row for row in runs.rows(tmp_path / "run")}
    assert sorted(rows) == list(range(1, 9))
    for step, want in NEXT.items():
        got = rows[step]["loss"], rows[step]["mtp_loss"]
        np.testing.assert_allclose(got, want, rtol=1e-5)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert "capacity_factor" in kept["layout"] and "buffer" not in kept["layout"]


def test_it_converts(tmp_path):
    conversion.to_published(open_checkpoint(FIXTURE), tmp_path / "out", "float32", 1 << 30)
    model = load.load(tmp_path / "out")
    ours = load.load(FIXTURE)
    np.testing.assert_array_equal(model.head.table[...], ours.head.table[...])


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_an_old_key_is_refused_with_its_new_name(old, new):
    values = json.loads((FIXTURE / "config.json").read_text())
    with pytest.raises(ConfigError, match=f"{old} is now called {new}"):
        parse(values)
    section, name = new.split(".")
    assert getattr(getattr(parse_saved(values), section), name) == 1.25


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_a_converted_folder_that_never_ran_is_read_under_the_new_names(
    tmp_path, monkeypatch, old, new
):
    """Its config.py hands the old config.json to --config."""
    shutil.copy(FIXTURE / "config.json", tmp_path)
    (tmp_path / "config.py").write_text(conversion._LAUNCHER)
    values = runpy.run_path(str(tmp_path / "config.py"))["get_config"]()
    monkeypatch.setattr(sys, "argv", ["main", f"--config={tmp_path}/config.py"])
    config = command.read_config(types.SimpleNamespace(value=values))
    assert config == parse_saved(json.loads((FIXTURE / "config.json").read_text()))
    monkeypatch.setattr(sys, "argv", ["main", "--config=configs/other.py"])
    with pytest.raises(ConfigError, match=f"{old} is now called {new}"):
        command.read_config(types.SimpleNamespace(value=values))


def test_a_renamed_key_that_a_run_may_not_change_is_compared_under_its_new_name(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(RENAMED, "model.width", "model.d_model")
    values = json.loads((FIXTURE / "config.json").read_text())
    values["model"]["width"] = values["model"].pop("d_model")
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = parse_saved(values)
    workdir.check(tmp_path, config)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=64))
    with pytest.raises(ConfigError, match=r"holds a run with model\.d_model=32"):
        workdir.check(tmp_path, other)


def test_a_key_under_both_names_is_refused():
    values = json.loads((FIXTURE / "config.json").read_text())
    values["layout"]["capacity_factor"] = 3.0
    with pytest.raises(ConfigError, match=r"both; remove layout\.buffer"):
        parse_saved(values)


@pytest.mark.parametrize("use", ["config.layout.buffer = 2.0", "_ = 2 * config.layout.buffer"])
def test_a_config_file_that_uses_an_old_key_is_refused_with_its_new_name(tmp_path, use):
    file = tmp_path / "mine.py"
    file.write_text(
        f"from configs import v3_tiny\ndef get_config():\n"
        f"    config = v3_tiny.get_config()\n    {use}\n    return config\n"
    )
    with pytest.raises(ConfigError, match=r"layout\.buffer is now called layout\.capacity_factor"):
        command._check_overrides(["main", f"--config={file}"])
