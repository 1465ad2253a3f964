"""The screen of a run: one live region, or lines at a readable rate."""

import io
import re

import pytest
from reports import row

from deepseek_jax.train import screens


def test_without_a_terminal_lines_come_at_a_readable_rate(capsys):
    now = 0.0
    screen = screens.PlainScreen(screens.Progress(10_000), clock=lambda: now)
    for step in range(1, 9):
        now = float(step)
        screen.step(row(step))
    screen.close()
    screen.close()
    lines = capsys.readouterr().out.splitlines()
    assert [re.match(r"step (\d+)", line)[1] for line in lines] == ["1", "6", "8"]
    assert "8,000 of 10,000 tokens (80 %)" in lines[-1]
    assert "loss 1.000, MTP loss 1.125, MaxVio" in lines[-1]
    assert lines[-1].endswith("learning rate 1.00e-03, grad norm 0.50, tokens/s 100, 0:20 left")
    assert "expert_load" not in lines[-1] and lines[-1].isascii()


def test_the_last_step_is_shown_at_once(capsys):
    screen = screens.PlainScreen(screens.Progress(10_000), clock=lambda: 0.0)
    screen.step(row(9))
    screen.step(row(10))
    assert "(100 %)" in capsys.readouterr().out.splitlines()[-1]


def test_a_terminal_gets_one_region_below_the_news():
    console_module = pytest.importorskip("rich.console")
    out = io.StringIO()
    console = console_module.Console(file=out, force_terminal=True, width=80)
    screen = screens.LiveScreen(screens.Progress(10_000), console)
    screen.say("reading [data]")
    screen.begin(0, 0)
    screen.say("saved")
    system = {"step_seconds": 0.25, "mfu": 0.3821, "device_bytes_peak": 61_234_567_890}
    for step in range(1, 6):
        screen.step(row(step, **system))
    screen.close()
    text = console_module.Text.from_ansi(out.getvalue()).plain
    assert text.count("reading [data]") == text.count("saved") == 1
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is back
    console = console_module.Console(file=io.StringIO(), width=80, record=True)
    console.print(screen.region())
    lines = [line.rstrip() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0].startswith("step 5") and lines[0].endswith("0:50 left")
    assert lines[1] == "5,000 of 10,000 tokens (50 %)"
    assert re.split(r"\s{2,}", lines[2].strip()) == [name for _, name, _ in screens.MODEL]
    assert lines[3].split()[:2] == ["1.600", "1.800"]
    assert re.split(r"\s{2,}", lines[4].strip()) == [name for _, name, _ in screens.SYSTEM]
    assert lines[5].split() == ["100", "0.25", "s", "38.2%", "61.2", "GB"]
    assert len(lines) == 6 and max(map(len, lines)) <= 80


def test_a_metric_that_a_row_lacks_is_not_shown():
    progress = screens.Progress(10_000)
    progress.step({"step": 1, "tokens": 1, "step_seconds": 1.0})
    assert dict(progress.values(screens.SYSTEM)) == {"step time": "1 s"}


@pytest.mark.parametrize(
    "tokens, speed, left",
    [(0, None, "?"), (1000, 100.0, "1:30"), (1000, 1.0, "2:30:00"), (10_500, 100.0, "0:00")],
)
def test_the_time_left_is_tokens_over_speed(tokens, speed, left):
    progress = screens.Progress(10_000)
    progress.step({"step": 1, "tokens": tokens, "tokens_per_second": speed})
    assert progress.left() == left


def test_the_first_row_s_speed_is_forgotten_at_the_second():
    progress = screens.Progress(10_000)
    for step, speed in enumerate([1.0, 100.0, 110.0], 1):
        progress.step({"step": step, "tokens": 1000 * step, "tokens_per_second": speed})
    assert progress.left() == "1:09"  # 7,000 tokens at 0.8 x 100 + 0.2 x 110
