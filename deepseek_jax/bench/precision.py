"""FP8 against BF16: training pairs on real text, with a noise floor and ablations.

The model is a small DeepSeek-V3: width 256, so that each row of each contraction has two or more
tiles of 128, MLA, one dense and one MoE layer with bias balancing, one MTP module with a MoE layer.
The output of the projection to the key-value latent, 288 wide, has a ragged last tile.

For each seed a run in BF16 trains fresh weights. All runs to be compared begin at its weights, with
fresh moments, the text in another order, the same for all, and a calm learning rate. From fresh
weights the comparison proves little at this cost. At the rate that learns, 1e-3, losses fall so
fast that a perturbation by 1e-4 moves them by a percent after 1,000 steps in BF16; at the calm rate
the model does not leave the frequencies of single tokens (both measured).

A twin is such a run in BF16 with perturbed weights. Its difference from the plain one is the noise
floor, by which any two runs of the setting differ. Where it is above `FLOOR`, the setting proves
nothing, and no FP8 run is made. Losses are cross entropies of the main head: training loss is the
mean over the last `LAST` steps, held-out loss that of the final weights under the run's own recipe.
Each ablation changes one thing of FP8; `precision_ablations.py` describes them.

A finished run is kept in `precision.json` in the folder of the runs, and is not made again: a
bench that was stopped goes on with the run at which it was stopped. With the file alone it draws.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deepseek_jax import config as configs
from deepseek_jax.bench import precision_ablations, precision_plot
from deepseek_jax.bench.precision_results import (
    BASE,
    BOUND,
    FLOOR,
    LAST,
    MAIN,
    TWIN,
    Kept,
    largest,
    tables,
    verdict,
)
from deepseek_jax.bench.precision_runs import Trainer
from deepseek_jax.config import Config
from deepseek_jax.data.corpus import Corpus, prepare
from deepseek_jax.precision.recipes import Recipe

LENGTH = 128  # tokens of a sequence
PERTURBATION = 1e-4
START = "start"  # name of the runs that make the weights to begin with, in the kept file
START_STEPS, START_SEQUENCES, START_RATE = 1000, 4, 1e-3
SEQUENCES, RATE = 2, 2e-4  # of the runs to be compared; the rate is the peak
PAIRS = 1000  # added to a seed for the data of the runs to be compared
KEPT, PICTURE = "precision.json", "precision.png"


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to train.

    Attributes:
      precision: fields of `PrecisionConfig` that it sets.
      recipe: recipe in place of the config's; None for the config's.
      perturbation: relative size of the noise on the initial weights.
      ablation: whether one seed is enough.
    """

    precision: Mapping[str, str]
    recipe: Recipe | None = None
    perturbation: float = 0.0
    ablation: bool = False


_FP8 = {"recipe": "fp8", "scales": "power_of_two"}
FORMS = {
    BASE: Form({"recipe": "bfloat16"}),
    TWIN: Form({"recipe": "bfloat16"}, perturbation=PERTURBATION),
    MAIN: Form(_FP8),
    "fp8, free scales": Form({**_FP8, "scales": "free"}, ablation=True),
    "fp8, a scale per tensor": Form(_FP8, precision_ablations.TENSOR_SCALES, ablation=True),
    "fp8, 14-bit sums": Form(_FP8, precision_ablations.SHORT_SUMS, ablation=True),
}


def sized(config: Config, steps: int, sequences: int, rate: float) -> Config:
    """Config of the benchmark: the recipe of `config` with the sizes above.

    Args:
      steps: of a run; the learning rate's phases are those of `config`, scaled.
      sequences: of a step.
      rate: peak learning rate.
    """
    sizes: dict[str, Any] = dict(
        vocab=1024, layers=2, dense_layers=1, d_model=256, d_dense=512, heads=4,
        q_latent=256, kv_latent=256, d_nope=64, d_rope=32, d_value=64,
        experts=8, shared_experts=1, top_k=2, groups=4, top_groups=2, d_expert=256,
        mtp_depth=1, init_std=0.032,
    )  # fmt: skip
    tokens = steps * sequences * LENGTH
    marks = ("decay_start", "decay_end", "final_start", "bias_stop", "mtp_switch", "tokens")
    factor = tokens / config.schedule.tokens
    schedule = {name: round(getattr(config.schedule, name) * factor) for name in marks}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **sizes),
        mesh=dataclasses.replace(config.mesh, pipe=1, replica=1, node=1, gpu=1, tensor=1),
        layout=dataclasses.replace(
            config.layout, recompute="none", attention_block=128, unroll=4, loss_chunk=512
        ),
        batch=dataclasses.replace(
            config.batch, length=LENGTH, sequences=sequences, ramp_sequences=sequences,
            ramp_tokens=0, micro_sequences=sequences,
        ),
        schedule=dataclasses.replace(
            config.schedule, **schedule, warmup_steps=min(100, steps // 4), bias_speed=0.001,
            learning_rate=rate, decayed_learning_rate=rate / 10, final_learning_rate=rate / 30,
        ),
        precision=dataclasses.replace(config.precision, recipe="bfloat16", dispatch="compute"),
        optimizer=dataclasses.replace(config.optimizer, ema_decay=0.0, moments="bfloat16"),
        evaluation=dataclasses.replace(config.evaluation, tokens=1 << 16),
    )  # fmt: skip


def measure(
    config: Config,
    *,
    folder: Path = Path("runs/precision"),
    steps: int = 1000,
    seeds: int = 3,
    start_steps: int = START_STEPS,
) -> dict[str, Any]:
    """Measures the tables `precision`, a row for each form and seed, and `means` over the seeds.

    Draws `precision.png` in the folder, beside the kept runs.

    Args:
      config: gives the recipe; sizes and learning rates are those of this module.
      folder: of the kept runs and of the weights that they begin with.
      steps: of each run to be compared.
      seeds: of each form but the ablations, which have one.
      start_steps: of each run that makes the weights to begin with.

    Raises:
      ConfigError: kept runs of another setting.
      RunError: a loss that is no number.
    """
    start = sized(config, start_steps, START_SEQUENCES, START_RATE)
    pairs = sized(config, steps, SEQUENCES, RATE)
    for checked in (start, pairs):
        configs.check(checked)
    kept = Kept(folder / KEPT, {START: start, "pairs": pairs})
    bench = Bench(start, pairs, kept, folder)
    bench.make([BASE, TWIN], seeds)
    floor = largest(kept.runs, TWIN)
    if floor <= FLOOR:
        bench.make([name for name in FORMS if name not in (BASE, TWIN)], seeds)
    runs = {name: kept.runs[name] for name in FORMS if name in kept.runs}
    precision_plot.draw(runs, folder / PICTURE, (FLOOR, BOUND))
    return {
        "steps": steps,
        "tokens_per_step": SEQUENCES * LENGTH,
        "steps_of_training_loss": LAST,
        "noise_floor_percent": floor,
        "verdict": verdict(runs),
        **tables(runs),
    }


class Bench:
    """Runs that are still to be made."""

    def __init__(self, start: Config, pairs: Config, kept: Kept, folder: Path):
        """Compiles and reads nothing yet.

        Args:
          start: config of the runs that make the weights to begin with.
          pairs: config of the runs to be compared, but for their precision.
          kept: the finished runs.
          folder: of the weights to begin with.
        """
        self._start, self._pairs, self._kept, self._folder = start, pairs, kept, folder

    def make(self, names: list[str], seeds: int) -> None:
        """Makes the runs of these forms that are not kept, and keeps each when it has ended."""
        missing = [
            (name, seed) for name in names for seed in range(seeds) if self._lacks(name, seed)
        ]
        if not missing:
            return
        corpus = prepare(self._pairs.data, vocab=self._pairs.model.vocab, say=_say)
        fresh = [
            seed
            for seed in sorted({seed for _, seed in missing})
            if not self._weights(seed).exists()
        ]
        steps = [_steps(self._start)] * len(fresh) + [_steps(self._pairs)] * len(missing)
        progress = TimeLeft(steps)
        self._make_weights(fresh, corpus, progress)
        made: Any = None
        for name, seed in missing:
            form = FORMS[name]
            if made != (form.precision, form.recipe):  # a twin shares the program of its base
                made = form.precision, form.recipe
                precision = dataclasses.replace(self._pairs.precision, **form.precision)
                own = dataclasses.replace(self._pairs, precision=precision)
                trainer = Trainer(own, corpus, form.recipe)
            found = trainer.train(
                PAIRS + seed,
                start=self._weights(seed),
                perturbation=form.perturbation,
                tick=progress.of(f"{name}, seed {seed}"),
            )
            self._kept.add(name, seed, found)

    def _make_weights(self, seeds: list[int], corpus: Corpus, progress: "TimeLeft") -> None:
        """Trains the weights that the runs of these seeds begin with."""
        if not seeds:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(self._start, corpus)
        for seed in seeds:
            tick = progress.of(f"{START}, seed {seed}")
            found = trainer.train(seed, save=self._weights(seed), tick=tick)
            self._kept.add(START, seed, found)

    def _lacks(self, name: str, seed: int) -> bool:
        is_wanted = seed == 0 or not FORMS[name].ablation
        return is_wanted and seed not in self._kept.runs.get(name, {})

    def _weights(self, seed: int) -> Path:
        return self._folder / f"start_{seed}.npz"


def _steps(config: Config) -> int:
    return config.schedule.tokens // (config.batch.sequences * config.batch.length)


class TimeLeft:
    """Lines on the screen with the time left, ten for each run."""

    def __init__(self, steps: list[int], say: Callable[[str], None] | None = None):
        """Begins to measure time; `steps` are those of each run to be made, in order."""
        self._steps, self._say = steps, say or _say
        self._begun, self._run = time.monotonic(), 0

    def of(self, name: str) -> Callable[[int], None]:
        """Callback of the next run, which is given the number of its steps so far."""
        own, before, whole = self._steps[self._run], sum(self._steps[: self._run]), sum(self._steps)
        self._run += 1

        def tick(step: int) -> None:
            if step % max(own // 10, 1):
                return
            done = before + step
            left = (time.monotonic() - self._begun) / done * (whole - done)
            self._say(f"{name}: step {step:,} of {own:,}; about {left / 60:.0f} min left")

        return tick


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
