"""Bits per byte of each kind of file, of a small run on a small library."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from deepseek_jax.bench import kinds
from deepseek_jax.config import ConfigError
from deepseek_jax.data import library

RUN = Path(__file__).parents[1] / "fixtures" / "workdir_before_renames"
TABLE = "x = [\n" + "    1,\n" * 30 + "]\n"
HEAVY = "def f(x):\n    return x + 1\n" * 6 + TABLE[:60] + "]\n"


@pytest.fixture
def library_of_four_kinds(tmp_path, monkeypatch):
    root = tmp_path / "library"
    (root / "test").mkdir(parents=True)
    for number in range(40):
        body = HEAVY if number % 2 else "def f(x):\n    return x + 1\n" * 10
        (root / f"m{number:02}.py").write_text(f"# {number}\n{body}")
    (root / "table.py").write_text(TABLE)
    (root / "test" / "test_one.py").write_text("assert 1 + 1 == 2\n" * 9)
    monkeypatch.setattr(library, "root", lambda: root)
    return root


def test_every_kind_is_scored_beside_gzip(tmp_path, library_of_four_kinds):
    shutil.copytree(RUN, tmp_path / "run")
    values = json.loads((RUN / "config.json").read_text())
    values["data"].update(path="", cache=str(tmp_path / "cache"), held_out=0.5)
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    rows = {row["kind"]: row for row in kinds.measure(None, directory=tmp_path / "run")["kinds"]}
    assert list(rows) == ["ordinary modules", "modules heavy in data", "tests", "tables"]
    assert rows["ordinary modules"]["files"] + rows["modules heavy in data"]["files"] == 20
    assert rows["tables"]["files"] == rows["tests"]["files"] == 1
    assert rows["tables"]["bytes"] == len(TABLE)
    assert rows["tables"]["gzip_bits_per_byte"] == (
        8 * len(gzip.compress(TABLE.encode(), 9)) / len(TABLE)
    )
    for row in rows.values():
        assert row["bits_per_byte"] > 0 and row["nats_per_token"] > 0


def test_a_run_on_another_text_is_refused():
    with pytest.raises(ConfigError, match="is no run on the default text"):
        kinds.measure(None, directory=RUN)
