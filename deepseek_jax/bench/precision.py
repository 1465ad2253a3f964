"""FP8 against BF16: training pairs on real text, with a noise floor and ablations.

Runs of a pair share the seed, so the initial weights and the order of the data. The twin of a BF16
run begins at weights that are perturbed by a relative 1e-4; the difference of the two is the noise
floor, by which any two runs of this setting differ. Where the floor is above `FLOOR`, the setting
proves nothing, and no FP8 run is made. Losses are cross entropies of the main head: training loss
is the mean over the last `LAST` steps, held-out loss is that of the final weights, computed with
the recipe of the run.

The model is a small DeepSeek-V3: width 256, so that each row of each contraction has two or more
tiles of 128, MLA, one dense and one MoE layer with bias balancing, one MTP module with a MoE layer.
The output of the projection to the key-value latent, 288 wide, has a ragged last tile.

A finished run is kept in `precision.json` in the folder of the runs, and is not made again: a
bench that was stopped goes on with the run at which it was stopped. Each ablation changes one
thing; `precision_ablations.py` describes them.
"""

import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax import config as configs
from deepseek_jax.bench import precision_ablations, precision_plot
from deepseek_jax.bench.precision_runs import EVERY, Trainer
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data import files
from deepseek_jax.data.corpus import prepare
from deepseek_jax.precision.recipes import Recipe
from deepseek_jax.runtime import compiled_programs

FLOOR = 0.05  # % by which a twin may differ
BOUND, GOAL = 0.25, 0.1  # % by which FP8 may differ, and by which it should at most
LAST = 200  # steps of the training loss
PERTURBATION = 1e-4
LENGTH, SEQUENCES = 128, 2
RATE = 3e-4  # peak learning rate
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
BASE, TWIN, MAIN = "bfloat16", "bfloat16, perturbed", "fp8"
FORMS = {
    BASE: Form({"recipe": "bfloat16"}),
    TWIN: Form({"recipe": "bfloat16"}, perturbation=PERTURBATION),
    MAIN: Form(_FP8),
    "fp8, free scales": Form({**_FP8, "scales": "free"}, ablation=True),
    "fp8, a scale per tensor": Form(_FP8, precision_ablations.TENSOR_SCALES, ablation=True),
    "fp8, 14-bit sums": Form(_FP8, precision_ablations.SHORT_SUMS, ablation=True),
}
Runs = dict[str, dict[int, dict[str, Any]]]  # form -> seed -> result of `Trainer.train`


def sized(config: Config, steps: int) -> Config:
    """Config of the benchmark: the recipe of `config` with the sizes above, for so many steps."""
    sizes = dict(
        vocab=1024, layers=2, dense_layers=1, d_model=256, d_dense=512, heads=4,
        q_latent=256, kv_latent=256, d_nope=64, d_rope=32, d_value=64,
        experts=8, shared_experts=1, top_k=2, groups=4, top_groups=2, d_expert=256,
        mtp_depth=1, init_std=0.032,
    )  # fmt: skip
    tokens = steps * SEQUENCES * LENGTH
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
            config.batch, length=LENGTH, sequences=SEQUENCES, ramp_sequences=SEQUENCES,
            ramp_tokens=0, micro_sequences=SEQUENCES,
        ),
        schedule=dataclasses.replace(
            config.schedule, **schedule, warmup_steps=min(100, steps // 4), bias_speed=0.001,
            learning_rate=RATE, decayed_learning_rate=RATE / 10, final_learning_rate=RATE / 30,
        ),
        precision=dataclasses.replace(config.precision, dispatch="compute"),
        optimizer=dataclasses.replace(config.optimizer, ema_decay=0.0, moments="bfloat16"),
        evaluation=dataclasses.replace(config.evaluation, tokens=1 << 16),
    )  # fmt: skip


def measure(
    config: Config, *, folder: Path = Path("runs/precision"), steps: int = 1000, seeds: int = 3
) -> dict[str, Any]:
    """Measures the tables `precision`, a row for each form and seed, and `means` over the seeds.

    Draws `precision.png` in the folder, beside the kept runs.

    Args:
      config: gives the recipe; sizes and learning rate are those of `sized`.
      folder: of the kept runs.
      steps: of each run, at least `LAST`.
      seeds: of each form but the ablations, which have one.

    Raises:
      ConfigError: kept runs of another setting.
    """
    config = sized(config, steps)
    configs.check(config)
    kept = Kept(folder / KEPT, config)
    compiled_programs.keep(None)
    for names in ((BASE, TWIN), tuple(name for name in FORMS if name not in (BASE, TWIN))):
        _train(config, kept, names, seeds)
        floor = floor_of(kept.runs)
        if floor > FLOOR:
            break
    kept.runs = {name: kept.runs[name] for name in FORMS if name in kept.runs}
    precision_plot.draw(kept.runs, folder / PICTURE, (FLOOR, BOUND))
    return {
        "steps": steps,
        "tokens_per_step": SEQUENCES * LENGTH,
        "steps_of_training_loss": LAST,
        "noise_floor_percent": floor,
        "verdict": verdict(kept.runs),
        **tables(kept.runs),
    }


def tables(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    """Rows of each form and seed, and of each form; differences from BF16 of the same seed in %."""
    rows = [
        {"form": name, "seed": seed, **losses(found), **apart(runs[BASE][seed], found)}
        for name, by_seed in runs.items()
        for seed, found in by_seed.items()
    ]
    means = []
    for name in runs:
        mine = [row for row in rows if row["form"] == name]
        columns = [key for key in mine[0] if key not in ("form", "seed")]
        mean = {key: float(np.mean([row[key] for row in mine])) for key in columns}
        means.append({"form": name, "seeds": len(mine), **mean})
    return {"precision": rows, "means": means}


def losses(found: Mapping[str, Any]) -> dict[str, float]:
    """Training loss over the last `LAST` steps and held-out loss of a run, in nats per token."""
    training = float(np.mean(found["loss"][-LAST // EVERY :]))
    return {"training_loss": training, "held_out_loss": found["held_out_loss"]}


def apart(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Relative differences in % of the losses of a run from those of a base."""
    ours, theirs = losses(other), losses(base)
    return {f"{key}_percent": 100 * (ours[key] / theirs[key] - 1) for key in ours}


def largest(runs: Runs, name: str) -> float:
    """Largest relative difference in %, of either loss and any seed, of a form from BF16."""
    return max(
        abs(value)
        for seed, found in runs[name].items()
        for value in apart(runs[BASE][seed], found).values()
    )


def floor_of(runs: Runs) -> float:
    """Noise floor in %: the largest difference of a twin."""
    return largest(runs, TWIN)


def verdict(runs: Runs) -> str:
    """Sentence on what the runs show."""
    floor = floor_of(runs)
    if floor > FLOOR:
        return f"twins differ by {floor:.3f} %, more than {FLOOR} %: this setting proves nothing"
    found = largest(runs, MAIN)
    for bound, name in ((GOAL, "goal"), (BOUND, "bound")):
        if found <= bound:
            return f"FP8 is within {found:.3f} % of BF16 (the {name} is {bound} %)"
    return f"FP8 differs from BF16 by {found:.3f} %, more than the bound of {BOUND} %"


def _train(config: Config, kept: "Kept", names: tuple[str, ...], seeds: int) -> None:
    """Trains the runs of these forms that are not kept; keeps each when it has ended."""
    todo = {
        name: missing
        for name in names
        if (missing := [s for s in range(1 if FORMS[name].ablation else seeds)
                        if s not in kept.runs.get(name, {})])
    }  # fmt: skip
    if not todo:
        return
    corpus = prepare(config.data, vocab=config.model.vocab, say=_say)
    progress = Progress(sum(map(len, todo.values())), kept.steps)
    made: Any = None
    for name, missing in todo.items():
        form = FORMS[name]
        if made != (form.precision, form.recipe):  # a twin shares the program of its base
            made = form.precision, form.recipe
            precision = dataclasses.replace(config.precision, **form.precision)
            own = dataclasses.replace(config, precision=precision)
            trainer = Trainer(own, corpus, form.recipe)
        for seed in missing:
            tick = progress.of(f"{name}, seed {seed}")
            found = trainer.train(seed, perturbation=form.perturbation, tick=tick)
            kept.add(name, seed, found)


class Kept:
    """Finished runs in a file, and their setting.

    Attributes:
      runs: by form and seed.
      steps: of each run.
    """

    def __init__(self, file: Path, config: Config):
        """Reads the file, if there is one.

        Raises:
          ConfigError: the file holds runs of another setting, or cannot be read.
        """
        self._file = file
        values = json.loads(config.to_json())
        del values["seed"], values["precision"]
        values["data"].pop("cache")
        batch = config.batch
        self.steps = config.schedule.tokens // (batch.sequences * batch.length)
        self._setting = values
        self.runs: Runs = {}
        if file.exists():
            held = configs.load_json(file.read_text(), str(file))
            if held.get("setting") != values:
                raise ConfigError(
                    f"{file} holds runs of another setting; remove it, or move it, to train anew"
                )
            for name, by_seed in held["runs"].items():
                self.runs[name] = {int(seed): found for seed, found in by_seed.items()}

    def add(self, name: str, seed: int, found: dict[str, Any]) -> None:
        """Keeps a run; the file is replaced as a whole."""
        made = {"python": platform.python_version(), "jax": jax.__version__}
        self.runs.setdefault(name, {})[seed] = {**found, **made}
        lines = [
            f'"{form}": {{\n'
            + ",\n".join(f'"{seed}": {json.dumps(run)}' for seed, run in by_seed.items())
            + "\n}"
            for form, by_seed in self.runs.items()
        ]
        setting, runs = json.dumps(self._setting), ",\n".join(lines)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        files.replace(self._file, f'{{"setting": {setting},\n"runs": {{\n{runs}\n}}}}\n')


class Progress:
    """Lines on the screen with the time left, ten for each run."""

    def __init__(self, runs: int, steps: int, say: Callable[[str], None] | None = None):
        """Begins to measure; `runs` of `steps` each are to be made."""
        self._runs, self._steps, self._say = runs, steps, say or _say
        self._begun, self._before = time.monotonic(), 0

    def of(self, name: str) -> Callable[[int], None]:
        """Callback of the next run, which is given the number of its steps so far."""
        before, self._before = self._before, self._before + self._steps

        def tick(step: int) -> None:
            if step % max(self._steps // 10, 1):
                return
            done, whole = before + step, self._runs * self._steps
            left = (time.monotonic() - self._begun) / done * (whole - done)
            self._say(f"{name}: step {step:,} of {self._steps:,}; about {left / 60:.0f} min left")

        return tick


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
