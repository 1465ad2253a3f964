"""Report of a run: each step once in `metrics.jsonl`, the screen, and the plots."""

import io
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from deepseek_jax.train import plots, report, screens
from deepseek_jax.train.report import Report

LAYERS, EXPERTS = 3, 8


def row(step, **changes):
    rng = np.random.default_rng(step)
    load = rng.dirichlet(np.ones(EXPERTS) * 20, LAYERS)
    return {
        "step": step, "tokens": 1000 * step, "loss": 8 / step, "mtp_loss": 9 / step,
        "grad_norm": 0.5, "learning_rate": 1e-3, "tokens_per_second": 100.0,
        "max_violation": float(load.max() * EXPERTS - 1), "expert_load": load.tolist(), **changes,
    }  # fmt: skip


def run(workdir, steps, *, first=0, total=10_000, **options):
    done = Report(workdir, total_tokens=total, **options)
    done.begin(first, 1000 * first)
    for step in steps:
        done.step(row(step))
    return done


def rows_of(workdir):
    """Strict JSON: bare NaN is an error here."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def steps_of(workdir):
    return [row["step"] for row in rows_of(workdir)]


def test_a_row_is_in_the_file_once_step_returns(tmp_path):
    going = run(tmp_path, [1, 2], screen=False)
    assert steps_of(tmp_path) == [1, 2]
    going.close()
    going.close()


def test_rows_keep_full_numbers_and_round_only_the_load(tmp_path):
    going = run(tmp_path, [], screen=False)
    loss = np.float32(1) / np.float32(3)
    going.step(row(1, loss=loss, grad_norm=jnp.float32(0.1), expert_load=jnp.full((2, 3), 1 / 3)))
    going.close()
    (kept,) = rows_of(tmp_path)
    assert kept["loss"] == float(loss)
    assert kept["grad_norm"] == float(np.float32(0.1))
    assert kept["expert_load"] == [[0.333333] * 3] * 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("nan"), jnp.inf])
def test_what_is_not_finite_becomes_null(tmp_path, bad):
    going = run(tmp_path, [], screen=True)
    going.step(row(1, loss=bad, expert_load=[[bad, 0.5]]))
    going.close()
    (kept,) = rows_of(tmp_path)
    assert kept["loss"] is None and kept["expert_load"] == [[None, 0.5]]


def test_resuming_drops_what_was_written_past_the_checkpoint(tmp_path):
    run(tmp_path, range(1, 8), screen=False).close()
    run(tmp_path, range(5, 10), first=4, screen=False).close()
    assert steps_of(tmp_path) == list(range(1, 10))


def test_a_new_run_starts_an_empty_file(tmp_path):
    run(tmp_path, [1, 2, 3], screen=False).close()
    run(tmp_path, [1], screen=False).close()
    assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    run(tmp_path, [1, 2, 3], screen=False).close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    run(tmp_path, [4], first=3, screen=False).close()
    # Without its newline alone (cut 1) the third row is still whole.
    assert steps_of(tmp_path) == ([1, 2, 3, 4] if cut == 1 else [1, 2, 4])


def test_torn_bytes_and_repeated_steps_are_dropped(tmp_path):
    lines = [b'{"step": 1}', b"\xff\xfe", b"[]", b'{"step": 1}', b'{"tokens": 2}', b'{"step": 2}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    run(tmp_path, [3], first=2, screen=False).close()
    assert steps_of(tmp_path) == [1, 2, 3]


def test_the_old_file_survives_a_crash_while_it_is_rewritten(tmp_path, monkeypatch):
    run(tmp_path, [1, 2, 3], screen=False).close()
    before = (tmp_path / "metrics.jsonl").read_text()

    def crash(*_):
        raise OSError("killed")

    monkeypatch.setattr(report.Path, "replace", crash)
    with pytest.raises(OSError, match="killed"):
        run(tmp_path, [], first=1, screen=False)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_nothing_is_written_before_the_run_begins(tmp_path, capsys):
    waiting = Report(tmp_path / "not yet there", total_tokens=10)
    waiting.say("reading")
    waiting.close()
    assert capsys.readouterr().out == "reading\n"
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_prints_and_writes(tmp_path, capsys):
    other = run(tmp_path, [1, 2], primary=False)
    other.say("hello")
    other.finish(SUMMARY)
    other.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_tensorboard_reads_the_scalars_and_forgets_the_interrupted_ones(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, range(1, 6), screen=False).close()
    run(tmp_path, range(4, 8), first=3, screen=False).close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == list(range(1, 8))
    assert events.Scalars("loss")[1].value == pytest.approx(4.0)
    assert "expert_load" not in events.Tags()["scalars"]


# The screen.


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
    assert lines[-1].endswith("tokens/s 100, learning rate 1.00e-03, grad norm 0.50, 0:20 left")
    assert "expert_load" not in lines[-1] and lines[-1].isascii()


def test_the_last_step_is_shown_at_once(capsys):
    screen = screens.PlainScreen(screens.Progress(10_000), clock=lambda: 0.0)
    screen.step(row(9))
    screen.step(row(10))
    assert "(100 %)" in capsys.readouterr().out.splitlines()[-1]


def test_news_comes_in_order(capsys, tmp_path):
    going = run(tmp_path, [])
    going.say("before")
    going.step(row(1))
    going.step(row(2))
    going.say("after")
    going.close()
    starts = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert starts == ["before", "step 1", "step 2", "after"]


def test_a_terminal_gets_one_region_below_the_news():
    console_module = pytest.importorskip("rich.console")
    out = io.StringIO()
    console = console_module.Console(file=out, force_terminal=True, width=80)
    screen = screens.LiveScreen(screens.Progress(10_000), console)
    screen.say("reading [data]")
    screen.begin(0, 0)
    screen.say("saved")
    for step in range(1, 6):
        screen.step(row(step))
    screen.close()
    text = console_module.Text.from_ansi(out.getvalue()).plain
    assert text.count("reading [data]") == text.count("saved") == 1
    assert out.getvalue().endswith("\x1b[?25h")  # the cursor is back
    console = console_module.Console(file=io.StringIO(), width=80, record=True)
    console.print(screen.region())
    lines = [line.rstrip() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0].startswith("step 5") and lines[0].endswith("0:50 left")
    assert lines[1] == "5,000 of 10,000 tokens (50 %)"
    assert re.split(r"\s{2,}", lines[2].strip()) == [name for _, name, _ in screens.SHOWN]
    assert lines[3].split()[:2] == ["1.600", "1.800"]
    assert len(lines) == 4 and max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    "tokens, speed, left",
    [(0, None, "?"), (1000, 100.0, "1:30"), (1000, 1.0, "2:30:00"), (10_500, 100.0, "0:00")],
)
def test_the_time_left_is_tokens_over_speed(tokens, speed, left):
    progress = screens.Progress(10_000)
    progress.step({"step": 1, "tokens": tokens, "tokens_per_second": speed})
    assert progress.left() == left


def test_the_compiler_s_time_is_forgotten_at_the_second_row():
    progress = screens.Progress(10_000)
    for step, speed in enumerate([1.0, 100.0, 110.0], 1):
        progress.step({"step": step, "tokens": 1000 * step, "tokens_per_second": speed})
    assert progress.left() == "1:09"  # 7,000 tokens at 0.8 x 100 + 0.2 x 110


SUMMARY = {
    "held_out_bits_per_byte": 2.3051, "gzip_bits_per_byte": 2.3649, "held_out_bytes": 412_345,
    "held_out_loss": 3.5,
}  # fmt: skip
LAST_WORD = "held-out 2.31 bits per byte (gzip -9: 2.36) on 412,345 bytes"


def test_the_last_word(tmp_path, capsys):
    done = run(tmp_path, [1, 2, 3])
    done.finish(SUMMARY)
    done.close()
    *_, result, files = capsys.readouterr().out.splitlines()
    assert result == LAST_WORD
    for name in ("metrics.jsonl", "loss.png", "expert_load.png", "summary.json", "tensorboard/"):
        assert name in files and (tmp_path / name).exists()
    assert json.loads((tmp_path / "summary.json").read_text()) == SUMMARY
    assert steps_of(tmp_path) == [1, 2, 3]


def test_the_last_word_has_the_average_s_score_too():
    assert report.last_word(SUMMARY | {"ema_bits_per_byte": 2.2}).endswith("averaged weights: 2.20")


def test_a_run_without_held_out_text_or_steps_ends_too(tmp_path, capsys):
    done = run(tmp_path, [])
    done.finish({})
    done.close()
    assert "no score on held-out text" in capsys.readouterr().out


# The pictures.


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_two_pictures_of_any_run(tmp_path, steps):
    run(tmp_path, range(1, steps + 1), screen=False).close()
    drawn = plots.draw(tmp_path)
    assert [path.name for path in drawn] == ["loss.png", "expert_load.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_nothing_is_drawn_of_nothing(tmp_path):
    assert plots.draw(tmp_path) == []
    run(tmp_path, [], screen=False).step(row(1, expert_load=[]))
    assert [path.name for path in plots.draw(tmp_path)] == ["loss.png"]


def test_a_run_that_ended_in_nan_is_drawn(tmp_path):
    going = run(tmp_path, [1, 2], screen=False)
    nan = float("nan")
    going.step(row(3, loss=nan, mtp_loss=nan, expert_load=[[nan] * EXPERTS] * LAYERS))
    going.close()
    assert len(plots.draw(tmp_path)) == 2


def test_a_run_that_is_all_nan_is_drawn(tmp_path):
    going = run(tmp_path, [], screen=False)
    nan = float("nan")
    going.step(row(1, loss=nan, mtp_loss=None, expert_load=[[nan] * EXPERTS] * LAYERS))
    going.close()
    assert [path.name for path in plots.draw(tmp_path)] == ["loss.png"]


def test_the_loss_picture_shows_the_losses():
    rows = [row(step) for step in range(1, 6)]
    loss, rate = plots._losses(rows, SUMMARY).axes
    curves = {line.get_label().split()[0]: line.get_ydata() for line in loss.lines}
    np.testing.assert_array_equal(curves["next"], [row["loss"] for row in rows])
    np.testing.assert_array_equal(curves["MTP"], [row["mtp_loss"] for row in rows])
    assert set(curves["held-out"]) == {SUMMARY["held_out_loss"]}
    np.testing.assert_array_equal(rate.lines[0].get_xdata(), [row["tokens"] for row in rows])


def test_the_load_picture_has_a_panel_per_layer_and_marks_balance():
    rows = [row(step) for step in range(1, 6)]
    figure = plots._expert_load(rows, [f"layer {n}" for n in range(2, 2 + LAYERS)])
    heat = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left").split(":")[0] for axes in heat] == [
        "layer 2", "layer 3", "layer 4",
    ]  # fmt: skip
    shown = heat[1].collections[0].get_array()  # expert x row
    want = np.array([row["expert_load"][1] for row in rows]).T * EXPERTS
    np.testing.assert_allclose(shown, np.maximum(want, 0.5), rtol=1e-6)
    labels = [tick.get_text() for tick in figure.axes[-1].get_yticklabels()]
    assert "1 = balanced\n(1/8 of all)" in labels


def spread(layers, nodes, gpus):
    """Tokens per GPU and per node, some GPUs busier than others; 4096 tokens in each layer."""
    per_gpu = np.random.default_rng(0).integers(500, 1500, (layers, nodes * gpus))
    return {
        "tokens_per_gpu": per_gpu.astype(float).tolist(),
        "tokens_per_node": np.full((layers, nodes), 3072.0).tolist(),
        "sequences": 64,
    }


def spread_run(workdir, *rows):
    workdir.joinpath("config.json").write_text(json.dumps({"batch": {"length": 64}}))
    going = run(workdir, [], screen=False)
    for step, changes in enumerate(rows, 1):
        going.step(row(step, **changes))
    going.close()
    return [path.name for path in plots.draw(workdir)]


@pytest.mark.parametrize(
    "layers, nodes, gpus", [(1, 1, 2), (3, 2, 4), (4, 8, 1), (58, 8, 8), (61, 16, 8)]
)
def test_a_picture_of_any_number_of_gpus(tmp_path, layers, nodes, gpus):
    assert spread_run(tmp_path, spread(layers, nodes, gpus))[-1] == "device_load.png"
    drawn = tmp_path / "device_load.png"
    assert drawn.read_bytes().startswith(b"\x89PNG") and drawn.stat().st_size > 10_000


def test_one_device_has_no_picture_of_its_load(tmp_path):
    assert spread_run(tmp_path, spread(3, 1, 1)) == ["loss.png", "expert_load.png"]


def test_the_device_picture_is_of_the_last_step_that_has_numbers(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "_device_load", lambda *a: seen.append(a) or Figure())
    last, lost = spread(LAYERS, 2, 2), [[float("nan")] * 4] * LAYERS
    first = {**last, "tokens_per_gpu": [[1.0] * 4] * LAYERS, "sequences": 1}
    spread_run(tmp_path, first, last, {**last, "tokens_per_gpu": lost})
    ((per_gpu, per_node, tokens, names),) = seen
    np.testing.assert_array_equal(per_gpu, last["tokens_per_gpu"])
    np.testing.assert_array_equal(per_node, last["tokens_per_node"])
    assert tokens == 4096 and len(names) == LAYERS


def test_the_device_picture_shows_shares_of_the_mean_nodes_and_copies():
    per_gpu = np.array([[100, 100, 100, 100], [50, 100, 130, 120]])
    per_node = np.array([[150, 150], [140, 160]])
    figure = plots._device_load(per_gpu, per_node, 200, ["layer 2", "MTP module 1"])
    heat = figure.axes[0]
    shown, lines = heat.collections
    np.testing.assert_allclose(shown.get_array(), per_gpu / 100)
    assert shown.norm.vmin == 0.5 and shown.norm.vmax == 1.5
    assert [text.get_text() for text in heat.texts][4:] == ["0.50", "1.00", "1.30", "1.20"]
    assert [text.get_text() for text in heat.get_yticklabels()] == ["layer 2", "MTP module 1"]
    np.testing.assert_array_equal(lines.get_segments(), [[[2, 0], [2, 2]]])  # between the nodes
    (nodes,) = heat.child_axes
    assert [text.get_text() for text in nodes.get_xticklabels()] == ["node 0", "node 1"]
    assert figure.get_suptitle() == (
        "Tokens per GPU in the last step: MaxVio 0.30 at worst (MTP module 1, GPU 2)\n"
        "a token goes to 1.50 of 2 nodes and 2.00 of 4 GPUs"
    )


def test_layers_are_named_as_the_config_counts_them(tmp_path):
    model = {"dense_layers": 1, "layers": 3}
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    assert plots._layer_names(tmp_path, 3) == ["layer 2", "layer 3", "MTP module 1"]
