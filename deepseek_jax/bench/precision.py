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
from deepseek_jax.bench import precision_plot
from deepseek_jax.bench.precision_runs import EVERY, Trainer
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data import files
from deepseek_jax.data.corpus import prepare

FLOOR = 0.05  # % by which a twin may differ
BOUND, GOAL = 0.25, 0.1  # % by which FP8 may, and should at most, differ
LAST = 200  # steps of the training loss
STEPS, SEEDS = 1000, 3
PERTURBATION = 1e-4
KEPT, PICTURE = "precision.json", "precision.png"


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to train.

    Attributes:
      name: in the table and in the kept file.
      precision: fields of `PrecisionConfig` that it changes.
      perturbation: relative size of the noise on the initial weights.
      seeds: of its runs, from 0; None for as many as the bench has.
    """

    name: str
    precision: Mapping[str, Any]
    perturbation: float = 0.0
    seeds: int | None = None


BASE = Form("bfloat16", {"recipe": "bfloat16"})
TWIN = Form("bfloat16, perturbed", {"recipe": "bfloat16"}, PERTURBATION)
FP8 = Form("fp8", {"recipe": "fp8"})
