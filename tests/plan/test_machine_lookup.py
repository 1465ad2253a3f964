"""Machines by name and by file, and the command that plans with them."""

import json
import pathlib
import subprocess
import sys

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.hardware.efficiency import PUBLISHED, SOURCES
from deepseek_jax.plan import machine_lookup

ROOT = pathlib.Path(__file__).parents[2]


def plan(*arguments):
    command = [sys.executable, "-m", "deepseek_jax.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_known_machine():
    found = machine_lookup.find("H800", price=1.5)
    assert found.chip.name == "h800" and found.chip.dollars_per_hour == 1.5
    assert found.efficiency == PUBLISHED and set(SOURCES) == set(vars(PUBLISHED))


def test_a_file(tmp_path):
    path = tmp_path / "ours.toml"
    path.write_text('base = "h100"\ndollars_per_hour = 3\n[efficiency]\nall_to_all = 0.9\n')
    found = machine_lookup.find(str(path))
    assert found.chip.dollars_per_hour == 3 and found.efficiency.all_to_all == 0.9
    assert found.efficiency.matmul_fp8 == PUBLISHED.matmul_fp8


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("all_too_all = 0.9", "did you mean"),
        ("all_to_all = 1.5", "at most 1"),
        ("all_to_all = 0", "above 0"),
        ("all_to_all = 1e-300", "at least 0.0001"),
        ("synchronisation_s = 675", "at most 1"),  # seconds, not microseconds
        ('all_to_all = "fast"', "expected a number"),
    ],
)
def test_efficiencies_that_cannot_be(table, message, tmp_path):
    path = tmp_path / "ours.toml"
    path.write_text(f'base = "h100"\n[efficiency]\n{table}\n')
    with pytest.raises(ConfigError, match=message) as error:
        machine_lookup.find(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_command():
    done = plan("--config=configs/v3_671b.py", "--hardware=h800", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["time"]["steps"]) == {"lockstep", "asynchronous"}
    assert len(found["errors"]["steps"]) == 7 and found["errors"]["trace"]
    assert len(found["time"]["steps"]["asynchronous"]["ranks"]) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware=h8000",), "did you mean h800"),
        (("--hardware=no/such.toml",), "no/such.toml cannot be read"),
        (("--price=2",), "--price goes with --hardware"),
        (("--hardware=h100", "--imbalance=0.5"), "imbalance"),
        (("--hardware=h100", "--imbalance=nan"), "--imbalance=nan: give a number that is finite"),
        (("--hardware=h100", "--price=inf"), "--price=inf: give a number that is finite"),
        (("--hardware=h100", "--price=1e308"), "--price=1e+308: give dollars an hour"),
        (("--hardware=h100", "--imbalance=65"), "give 1 to 64"),
        (("--hardware=h800,h100",), "--compare takes several"),
        (("--devices=7",), "use --devices=2048 to plan"),
        (("--picture=no/such/memory.png",), "no/such is no folder; make it"),
    ],
)
def test_bad_input_is_one_line(arguments, message, typed):
    code, out, err = typed("plan.__main__", f"--config={ROOT / 'configs/v3_671b.py'}", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert out == ""
