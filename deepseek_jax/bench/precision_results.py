"""Results of `bench precision`: finished runs in a file, and what they say."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.bench.precision_runs import EVERY
from deepseek_jax.config import Config, ConfigError, load_json
from deepseek_jax.data import files

FLOOR = 0.05  # % by which a twin may differ
BOUND, GOAL = 0.25, 0.1  # % by which FP8 may differ, and by which it should at most
LAST = 200  # steps of the training loss
BASE, TWIN, MAIN = "bfloat16", "bfloat16, perturbed", "fp8"
Runs = dict[str, dict[int, dict[str, Any]]]  # form -> seed -> result of `Trainer.train`


class Kept:
    """Finished runs in a file, and their setting.

    Attributes:
      runs: by form and seed.
    """

    def __init__(self, file: Path, configs_of_runs: Mapping[str, Config]):
        """Reads the file, if there is one.

        Args:
          configs_of_runs: configs by phase; seed, precision and the cache of text may differ.

        Raises:
          ConfigError: the file holds runs of another setting, or cannot be read.
        """
        self._file = file
        values = {phase: _setting(config) for phase, config in configs_of_runs.items()}
        self._setting = values
        self.runs: Runs = {}
        if file.exists():
            held = load_json(file.read_text(), str(file))
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


def _setting(config: Config) -> dict[str, Any]:
    """The values on which a run depends, besides its seed and its form."""
    values = json.loads(config.to_json())
    del values["seed"], values["precision"], values["data"]["cache"]
    return values


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


def verdict(runs: Runs) -> str:
    """Sentence on what the runs show."""
    floor = largest(runs, TWIN)
    if floor > FLOOR:
        return f"twins differ by {floor:.3f} %, more than {FLOOR} %: this setting proves nothing"
    found = largest(runs, MAIN)
    for bound, name in ((GOAL, "goal"), (BOUND, "bound")):
        if found <= bound:
            return f"FP8 is within {found:.3f} % of BF16 (the {name} is {bound} %)"
    return f"FP8 differs from BF16 by {found:.3f} %, more than the bound of {BOUND} %"
