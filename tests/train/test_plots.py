"""The pictures of a run."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from reports import EXPERTS, LAYERS, SUMMARY, row, run

from deepseek_jax.train import plots


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
    loss, rate = plots._losses(rows, SUMMARY, []).axes
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
