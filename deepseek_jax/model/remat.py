"""Recompute policies: residuals of a layer that are saved for backward, and in which form.

    layout.recompute       none               report             full
    layer                  everything [1]     names              input
    step of a layer pass   names, scores [4]  names              input
    attention scores       saved              recomputed         recomputed
    pipeline stage         as its steps       as its steps [2]   input, received tokens [2]
    MTP at the last stage  as its steps       as its steps [3]   as `report` [3]

[1] With ZeRO-3 as a step of a layer pass: everything would include each layer's gathered weights.
[2] Tokens are saved as received over the slow hop; backward resends them over the fast hop alone.
    With `full` the `LayerPass` recomputes attention, too.
[3] Residuals of MTP live within one tick, so recomputation would send messages twice for nothing:
    tokens are saved at their experts.
[4] Linear layers have gradients of their own, into which policies of `jax.checkpoint` do not look:
    their results are saved where they have a name, and the scores of attention everywhere.

With `attention`, backward computes attention's output again, and the latents of keys and values
from their projection W^DKV, the smallest one; the rest is as with `report`. A pipeline's stage
would keep these for every micro-batch on its way, and a kernel computes attention again in a small
part of a layer's time. Query latents stay saved: their projection costs 2.7 times as much.

The recipe decides in which form the input of a linear layer is saved: `Recipe.from_kept`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from deepseek_jax.parallel import axes
from deepseek_jax.precision.saved import Saved


@dataclasses.dataclass(frozen=True)
class Remat:
    """A recompute policy.

    Attributes:
      names: residuals that are saved.
      matmuls: whether results of matmuls outside of linear layers, such as the scores of attention,
        are saved too; without layer passes and ZeRO-3, all results.
      resend: whether a pipeline stage saves tokens as received over the slow hop, before the fast
        hop copies each to its experts' devices, and resends them in backward.
    """

    names: tuple[Saved, ...]
    matmuls: bool = False
    resend: bool = False

    def layer(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The function of a layer, which saves for backward what this policy says."""
        layout = axes.current()
        if self.matmuls and (layout is None or layout.zero < 3):
            return fn
        return self.step(fn)

    def step(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """The function of one step of a layer pass, which saves what this policy says."""
        policies = jax.checkpoint_policies
        policy = policies.save_only_these_names(*(name.value for name in self.names))
        if self.matmuls:
            policy = policies.save_from_both_policies(policies.dots_saveable, policy)
        return jax.checkpoint(fn, prevent_cse=False, policy=policy)

    @property
    def keep_scores(self) -> bool:
        """Whether attention saves its softmax instead of recomputing it block by block."""
        return self.matmuls

    @property
    def recompute_all(self) -> bool:
        """Whether backward of a layer begins with its forward."""
        return not self.names

    def within_tick(self) -> "Remat":
        """The policy of MTP at a pipeline's last stage, whose residuals live within one tick."""
        return WITHIN_TICK if self.resend else self


NONE = Remat(tuple(Saved), matmuls=True)
REPORT = Remat(tuple(Saved), resend=True)
WITHIN_TICK = Remat(tuple(Saved))
_AGAIN = (Saved.ATTENTION, Saved.ATTENTION_SUM, Saved.KV_LATENT, Saved.KEY_ROPE)
ATTENTION = Remat(tuple(name for name in Saved if name not in _AGAIN), resend=True)
FULL = Remat((), resend=True)
BY_NAME: Mapping[str, Remat] = {  # layout.recompute
    "none": NONE,
    "report": REPORT,
    "attention": ATTENTION,
    "full": FULL,
}
