"""Models of Hugging Face's `transformers` with our weights, to be measured in the same process.

torch and transformers are optional: nothing here but `installed` may be called without them. Models
are on the GPU if JAX has one, in float32.
"""

import importlib.util
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from deepseek_jax.checkpoint.hf import config_json, export
from deepseek_jax.checkpoint.hf.names import V3_LAYOUT
from deepseek_jax.config import Config, OptimizerConfig
from deepseek_jax.model import params
from deepseek_jax.model.transformer import Transformer, build_model


def installed() -> bool:
    """Whether torch and transformers can be imported."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def device() -> str:
    """Name that torch gives to the kind of device that JAX computes on."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def load(model: Transformer, **options: Any) -> Any:
    """Exports a model on one device and has `transformers` load it; MTP modules are left out.

    Args:
      options: further arguments of `from_pretrained`.
    """
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        _export(model, Path(folder))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, **options
        )
    return loaded.to(device())


def _export(model: Transformer, folder: Path) -> None:
    paths = [weight.path for weight in params.describe(model)]
    ours = dict(zip(paths, map(np.asarray, jax.tree.leaves(model)), strict=True))
    source = export.WeightSource(
        model.config, V3_LAYOUT, lambda piece: piece.published(ours[piece.path][piece.index])
    )
    export.write(folder, config_json.published(model.config), source, "float32", 1 << 40)


class TorchTrainer:
    """Training step of `transformers` from our first weights, with our AdamW, clipping and batch.

    Experts are computed by torch's grouped matmul, and torch has as many threads as this process
    has CPUs. `transformers` has no balance loss for this model and moves no router bias.
    """

    def __init__(self, config: Config, tokens: np.ndarray, learning_rate: float):
        """Loads the model.

        Args:
          config: config of the training; `mtp_depth` must be 0.
          tokens: B(S+1) integers, the batch of every step.
          learning_rate: scale of AdamW's direction.

        Raises:
          ValueError: the model has MTP modules.
        """
        import torch

        if config.model.mtp_depth:
            raise ValueError("transformers trains no MTP module; set model.mtp_depth=0")
        if hasattr(os, "sched_getaffinity"):  # as XLA counts them; torch may count cores
            torch.set_num_threads(len(os.sched_getaffinity(0)))
        model = jax.jit(build_model, static_argnums=0)(config.model, jax.random.key(config.seed))
        self._model = load(model, experts_implementation="grouped_mm").train()
        batch = torch.tensor(tokens, dtype=torch.int64, device=device())
        self._inputs, self._targets = batch[:, :-1], batch[:, 1:].contiguous()
        self._clip = config.optimizer.clip
        self._adam = _adam(self._model, config.optimizer, learning_rate)

    def step(self) -> dict[str, float]:
        """Updates the weights; returns `loss` and the norm before clipping, `grad_norm`."""
        import torch

        self._adam.zero_grad()
        loss = self._model(
            self._inputs, labels=self._targets, shift_labels=self._targets, use_cache=False
        ).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._adam.step()
        return {"loss": loss.item(), "grad_norm": norm.item()}


def _adam(model: Any, config: OptimizerConfig, learning_rate: float) -> Any:
    """torch's AdamW with the settings of ours; norm scales are the parameters of one dimension."""
    import torch

    scales = [weight for weight in model.parameters() if weight.ndim == 1]
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    decay_of_scales = config.weight_decay if config.decayed == "all" else 0.0
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": scales, "weight_decay": decay_of_scales}],
        lr=learning_rate,
        betas=(config.b1, config.b2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
