"""The whole model: tokens to hidden states, logits and losses."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from .block import block
from .loss import next_token
from .mtp import Depth, modules
from .norm import float64, part, rms_norm
from .router import Routing


@dataclasses.dataclass(frozen=True)
class Forward:
    """Everything that can be compared.

    Attributes:
      hidden: L + 1 arrays BTD: the embeddings, then each layer's output, before the final norm.
      attention: L arrays BTD, after the output projection and before the residual.
      routing: by layer number, of the MoE layers of the main model.
      final_norm: BTD, what the head and the first MTP module read.
      logits: BTV.
      loss: mean cross entropy, in nats, of position t against token t + 1.
      mtp: one per depth.
      mtp_losses: one per depth, each a mean over the positions that have a target.
    """

    hidden: list[np.ndarray]
    attention: list[np.ndarray]
    routing: dict[int, Routing]
    final_norm: np.ndarray
    logits: np.ndarray
    loss: float
    mtp: list[Depth]
    mtp_losses: list[float]

    @property
    def mtp_logits(self) -> list[np.ndarray]:
        """Of depth k (counted from 1), B(T-k)V."""
        return [depth.logits for depth in self.mtp]


def forward(
    settings: Mapping[str, Any], weights: Mapping[str, np.ndarray], tokens: np.ndarray
) -> Forward:
    """tokens BT int, positions 0 to T - 1; T must be at least the MTP depth plus 2."""
    weights, tokens = float64(weights), np.asarray(tokens)
    x = weights["model.embed_tokens.weight"][tokens]
    hidden, attended, routing = [x], [], {}
    for layer in range(settings["num_hidden_layers"]):
        dense = layer < settings["first_k_dense_replace"]
        x, u, routed = block(x, part(weights, f"model.layers.{layer}"), settings, dense=dense)
        hidden.append(x)
        attended.append(u)
        if routed is not None:
            routing[layer] = routed
    final = rms_norm(x, weights["model.norm.weight"], settings["rms_norm_eps"])
    logits = final @ weights["lm_head.weight"].T
    mtp = modules(final, tokens, weights, settings)
    mtp_losses = [next_token(depth.logits, tokens, k) for k, depth in enumerate(mtp, 1)]
    loss = next_token(logits, tokens)
    return Forward(hidden, attended, routing, final, logits, loss, mtp, mtp_losses)


def greedy(
    settings: Mapping[str, Any], weights: Mapping[str, np.ndarray], prompt: np.ndarray, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest token, `steps` times, each from the whole text so far.

    prompt BT int -> tokens (B, steps) and the logits (B, steps, V) that chose them.
    """
    settings = {**settings, "num_nextn_predict_layers": 0}
    text, chosen_by = np.asarray(prompt), []
    for _ in range(steps):
        chosen_by.append(forward(settings, weights, text).logits[:, -1])
        text = np.concatenate([text, chosen_by[-1].argmax(-1)[:, None]], 1)
    return text[:, prompt.shape[1] :], np.stack(chosen_by, 1)
