"""`bench precision`: its arithmetic, its ablations, and what a second call makes again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small

from deepseek_jax.bench import precision, precision_results, precision_runs
from deepseek_jax.bench.precision_ablations import SHORT_SUMS, TENSOR_SCALES, cut
from deepseek_jax.config import ConfigError
from deepseek_jax.data.corpus import prepare

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)


def run(loss, held_out):
    return {"steps": 400, "loss": [loss] * 40, "mtp_loss": [loss] * 40, "held_out_loss": held_out}


def e4m3(x, scale):
    return (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def of_tensor(x):
    return e4m3(x, np.abs(x).max() / np.float32(448))


def pulled(product, x, weight, d_out):
    """Result, gradient of x and gradient of the weight of a product, float64."""

    @jax.jit
    def all_three(x, weight, d_out):
        out, pull = jax.vjp(product, x, weight)
        return out, *pull(d_out)

    low = jnp.bfloat16
    found = all_three(jnp.asarray(x, low), jnp.asarray(weight), jnp.asarray(d_out, low))
    return [np.asarray(a, np.float64) for a in found]


def linear(recipe, subscripts):
    return functools.partial(recipe.einsum, subscripts)


def test_one_scale_for_each_tensor():
    """All three products against float64, each operand rounded under one scale."""
    x, w, d_out = normal(40, 160), normal(160, 2, 24), normal(40, 2, 24)
    out, d_x, d_w = pulled(linear(TENSOR_SCALES, "MD,DHK->MHK"), x, w, d_out)
    x, w, d_out = of_tensor(x), of_tensor(w), of_tensor(d_out)
    for got, want, rtol in (
        (out, np.einsum("MD,DHK->MHK", x, w), 2**-8),  # bfloat16
        (d_x, np.einsum("MHK,DHK->MD", d_out, w), 2**-8),
        (d_w, np.einsum("MD,MHK->DHK", x, d_out), 1e-6),
    ):
        assert np.abs(got - want).max() <= rtol * np.abs(want).max()


def test_a_cut_sum_keeps_fourteen_bits():
    values = np.float32([1 + 2**-13, 1 + 2**-14, -1 - 2**-13 - 2**-14, 3e-7, 0.0])
    want = np.float32([1 + 2**-13, 1, -1 - 2**-13, 0, 0])
    got = np.asarray(cut(jnp.asarray(values)))
    np.testing.assert_array_equal(got[[0, 1, 2, 4]], want[[0, 1, 2, 4]])
    assert 0 < 1 - got[3] / values[3] < 2**-13
    assert np.isnan(np.asarray(cut(jnp.float32(np.nan))))


def test_short_sums_drop_what_is_small_beside_the_sum():
    """One number of half the last kept bit in each group of 32, after a first sum of one.

    In float32 the four of them would add two of these bits.
    """
    x = np.zeros((1, 160), np.float32)
    x[0, 0], x[0, 32::32] = 1, 2.0**-7
    w = np.concatenate([np.ones((32, 1)), np.full((128, 1), 2.0**-7)]).astype(np.float32)
    out, _, _ = pulled(linear(SHORT_SUMS, "MD,DF->MF"), x, w, np.ones((1, 1)))
    assert x.astype(np.float64) @ w == 1 + 2 * 2.0**-13 and out == 1


@pytest.mark.parametrize("recipe", [TENSOR_SCALES, SHORT_SUMS], ids=["tensor", "short"])
def test_experts_as_linear_layers_of_their_own(recipe):
    """The grouped product and its gradients against one linear layer for each expert.

    Rows of an expert are quantised apart from those of others but for one scale per tensor, where
    the largest row of each expert is made the same. Experts without rows get no gradient.
    """
    sizes = [37, 0, 130]
    rows, w, d_out = normal(180, 64), normal(3, 64, 48), normal(180, 48)
    for first in (0, 37):
        rows[first], d_out[first] = 8 * np.sign(rows[first]), 8 * np.sign(d_out[first])
    rows, d_out = np.clip(rows, -8, 8), np.clip(d_out, -8, 8)
    numbers = jnp.asarray(sizes, jnp.int32)
    got = pulled(lambda x, w: recipe.grouped(x, w, numbers, 167), rows, w, d_out)
    start = 0
    for expert, size in enumerate(sizes):
        own = slice(start, start + size)
        start += size
        if not size:
            assert not got[2][expert].any()
            continue
        want = pulled(linear(recipe, "MD,DF->MF"), rows[own], w[expert], d_out[own])
        for a, b in zip((got[0][own], got[1][own], got[2][expert]), want, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2**-9 * abs(b).max())
    assert not got[0][167:].any()


def test_table_and_verdict():
    runs = {
        "bfloat16": {0: run(2.0, 4.0), 1: run(1.0, 5.0)},
        "bfloat16, perturbed": {0: run(2.0, 4.001), 1: run(1.0003, 5.0)},
        "fp8": {0: run(2.001, 4.0), 1: run(1.0, 4.99)},
    }
    found = precision_results.tables(runs)
    by_form = {row["form"]: row for row in found["means"]}
    assert len(found["precision"]) == 6 and by_form["fp8"]["seeds"] == 2
    assert by_form["fp8"]["training_loss_percent"] == pytest.approx(0.025)
    assert by_form["fp8"]["held_out_loss_percent"] == pytest.approx(-0.1)
    assert by_form["bfloat16"]["held_out_loss"] == pytest.approx(4.5)
    assert "FP8 is within 0.200 % of BF16 (the bound" in precision_results.verdict(runs)
    runs["fp8"][1] = run(1.0, 5.02)
    assert "more than the bound" in precision_results.verdict(runs)
    runs["bfloat16, perturbed"][1] = run(1.0006, 5.0)
    assert "0.060 %" in (said := precision_results.verdict(runs)) and "proves nothing" in said


def test_training_loss_is_that_of_the_last_steps():
    found = run(1.0, 1.0)
    found["loss"] = [9.0] * 20 + [2.0] * 20
    assert precision_results.losses(found)["training_loss"] == 2.0


def test_time_left_counts_runs_by_their_steps(monkeypatch):
    clock = iter([0.0, 30.0, 90.0])
    monkeypatch.setattr(precision.time, "monotonic", lambda: next(clock))
    said = []
    progress = precision.TimeLeft([100, 300], said.append)
    progress.of("a")(50)
    tick = progress.of("b")
    tick(49)
    tick(60)
    assert said == [
        "a: step 50 of 100; about 4 min left",  # 30 s for 50 of 400 steps
        "b: step 60 of 300; about 2 min left",  # 90 s for 160
    ]


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(20):
        words = RNG.choice(["one", "two", "three", "four", "five"], 200)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return dict(data_path=str(folder), data_cache=str(tmp_path), data_held_out=0.2)


def test_a_bench_makes_each_run_once(tmp_path, text, monkeypatch):
    """Runs that were kept are read, a stopped bench goes on, and another setting is refused."""
    made, stop = [], [4]

    class Trainer:
        def __init__(self, config, corpus, recipe=None):
            self.form = config.precision.recipe, config.precision.scales, recipe

        def train(self, seed, *, start=None, perturbation=0.0, save=None, tick):
            if len(made) == stop[0]:
                raise KeyboardInterrupt
            made.append((seed, perturbation, self.form))
            assert start is None or start.exists()
            if save:
                save.write_text("weights")
            return run(2.0 + perturbation, 2.0)

    monkeypatch.setattr(precision, "Trainer", Trainer)
    config = small.config(data_tokenizer="byte", **text)
    call = dict(folder=tmp_path / "runs", steps=400, seeds=2)
    with pytest.raises(KeyboardInterrupt):
        precision.measure(config, **call)
    stop[0] = None
    found = precision.measure(config, **call)
    names = ["bfloat16"] * 2 + ["bfloat16, perturbed"] * 2 + ["fp8"] * 2
    assert [row["form"] for row in found["precision"][:6]] == names
    pairs = [(1000, 0), (1001, 0), (1000, 1e-4), (1001, 1e-4), (1000, 0), (1001, 0)]
    assert [m[:2] for m in made] == [(0, 0), (1, 0), *pairs, (1000, 0), (1000, 0), (1000, 0)]
    assert [m[2][0] for m in made] == ["bfloat16"] * 6 + ["fp8"] * 5
    assert [m[2][1] for m in made[6:]] == ["power_of_two"] * 2 + ["free"] + ["power_of_two"] * 2
    assert [m[2][2] for m in made[8:]] == [None, TENSOR_SCALES, SHORT_SUMS]
    assert (tmp_path / "runs" / "precision.png").stat().st_size > 10_000
    assert precision.measure(config, **call) == found and len(made) == 11
    with pytest.raises(ConfigError, match="holds runs of another setting"):
        precision.measure(config, **{**call, "steps": 500})


def test_no_fp8_above_the_noise_floor(tmp_path, text, monkeypatch):
    class Trainer:
        def __init__(self, config, corpus, recipe=None):
            assert config.precision.recipe == "bfloat16"

        def train(self, seed, *, start=None, perturbation=0.0, save=None, tick):
            return run(2.0 + 20 * perturbation, 2.0)

    monkeypatch.setattr(precision, "Trainer", Trainer)
    config = small.config(data_tokenizer="byte", **text)
    found = precision.measure(config, folder=tmp_path / "runs", steps=400, seeds=1)
    assert "proves nothing" in found["verdict"] and len(found["precision"]) == 2


def test_runs_that_begin_at_kept_weights(tmp_path, text):
    """A run repeats itself, a perturbed one stays close, and a run goes on with kept weights."""
    config = small.config(
        data_tokenizer="byte", model_vocab=264, model_layers=1, model_mtp_depth=0,
        batch_sequences=8, evaluation_tokens=256, **text,
    )  # fmt: skip
    tokens = 20 * config.batch.length * config.batch.micro_sequences
    schedule = dict(tokens=tokens, warmup_steps=0, learning_rate=1e-2)
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, **schedule))
    trainer = precision_runs.Trainer(config, prepare(config.data, vocab=264))
    file = tmp_path / "weights.npz"
    first = trainer.train(3, save=file)
    assert first["steps"] == 20 and len(first["loss"]) == 2
    assert (
        first["loss"][1] < first["loss"][0] and abs(first["held_out_loss"] - first["loss"][1]) < 1
    )
    again, moved = trainer.train(3), trainer.train(3, perturbation=1e-4)
    assert again["loss"] == first["loss"] and again["held_out_loss"] == first["held_out_loss"]
    assert 0 < abs(moved["held_out_loss"] / first["held_out_loss"] - 1) < 1e-2
    after = trainer.train(4, start=file)
    assert after["loss"][0] < first["loss"][1]


def test_perturbation_is_relative():
    weights = {"a": jnp.full((100, 100), 2.0), "b": jnp.zeros((3,))}
    moved = precision_runs.perturbed(weights, jax.random.key(0), 1e-2)
    change = np.asarray(moved["a"]) / 2 - 1
    assert abs(change.std() - 1e-2) < 5e-4 and not np.asarray(moved["b"]).any()
