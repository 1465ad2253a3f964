"""`plan schedule`: drawing, table, plot and errors."""

import json
import pathlib

import matplotlib.image
import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.plan import compare_schedules, schedule_plot

ROOT = pathlib.Path(__file__).parents[2]
TINY = f"--config={ROOT / 'configs/v3_tiny.py'}"
FIGURE = (ROOT / "tests/parallel/pipeline/dualpipe_8_20.txt").read_text()


def test_the_command(tmp_path, typed, monkeypatch):
    """Prints JSON, and draws to the default path."""
    monkeypatch.chdir(tmp_path)
    arguments = ("--pipe=2", "--micro_batches=4", "--kind=dualpipev", "--json")
    code, out, err = typed("plan.__main__", "schedule", *arguments)
    assert code == 0, err
    found = json.loads(out)
    assert list(found) == [
        "kind", "ranks", "stages", "micro_batches", "drawing", "schedules", "picture",
    ]  # fmt: skip
    assert found["schedules"][-1] == {
        "kind": "dualpipev", "ranks": 2, "stages": 4, "micro_batches": 4, "makespan": 26,
        "bubble": 2, "bubble_formula": 2, "peak_live": 5, "peak_live_formula": 5,
    }  # fmt: skip
    assert [row["ranks"] for row in found["schedules"]] == [4, 4, 4, 2]
    assert [path.name for path in tmp_path.iterdir()] == [found["picture"]] == ["schedule.png"]


def test_the_drawing_and_the_table():
    shown = compare_schedules.text(
        compare_schedules.compare(compare_schedules.build("dualpipe", 8, 20))
    )
    assert shown.startswith(FIGURE)
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    for row in (
        "1F1B 8 20 81 21 21 8 8",
        "ZB1P 8 20 67 7 7 8 8",
        "DualPipe 8 20 66 6 6 9 9",
        "DualPipeV 4 10 66 6 6 9 9",
    ):
        assert row in rows


def test_a_kind_that_does_not_fit_is_a_row_with_its_reason():
    compared = compare_schedules.compare(compare_schedules.build("1f1b", 3, 5))
    fits = ["problem" not in row for row in compared["schedules"]]
    assert fits == [True, True, False, False]
    shown = compare_schedules.text(compared)
    for row in compared["schedules"][2:]:
        assert row["problem"] in shown


@pytest.mark.parametrize("kind", ["zb1p", "dualpipe"])
def test_pictures(kind, tmp_path):
    schedule = compare_schedules.build(kind, 4, 8)
    path = schedule_plot.draw(schedule, tmp_path / "figure")
    assert path == tmp_path / "figure.png"
    pixels = matplotlib.image.imread(path)[..., :3]
    assert pixels.shape[1] > pixels.shape[0] > 300
    shown = {tuple(pixel) for pixel in (pixels.reshape(-1, 3) * 255).round().astype(int).tolist()}
    works = {task.work for program in schedule.programs for step in program for task in step}
    for work in works:
        for color in schedule_plot.LOOKS[work][1 : 2 + kind.startswith("dual")]:
            assert tuple(bytes.fromhex(color[1:])) in shown, (work, color)


def test_a_kind_that_there_is_not():
    with pytest.raises(
        ConfigError, match="no schedule 'gpipe'; name one of 1f1b, zb1p, dualpipe, d"
    ):
        compare_schedules.build("gpipe", 8, 20)


@pytest.mark.parametrize("name", ["", "no/such/folder.png", "figure.nothing"])
def test_pictures_that_cannot_be(name, tmp_path):
    with pytest.raises(ConfigError, match="--picture=") as error:
        schedule_plot.draw(compare_schedules.build("1f1b", 2, 2), tmp_path / name)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("figure",), "there is no 'figure'; name one of schedule, step"),
        (("schedule", "--pipe=7", "--micro_batches=20"), "mesh.pipe=6 or mesh.pipe=8"),
        (("schedule", "--pipe=1000", "--micro_batches=51"), "draw a smaller schedule"),
        ((TINY, "--pipe=8"), "--pipe does not go with plan"),
        (("step", TINY, "--devices=8"), "--devices does not go with plan"),
    ],
)
def test_bad_input_is_one_line(arguments, message, typed):
    code, out, err = typed("plan.__main__", *arguments)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
