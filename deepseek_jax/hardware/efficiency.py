"""Sustained shares of a chip's and a network's rated speed, from published measurements.

A matmul M x K x N on a chip with P peak FLOP/s and U multiprocessors, of which u may compute:

    FLOP/s = P share K / (K + K0) tiles / (u ceil(tiles / u)) u / U

`share` is that of an endless contraction, K0 the contraction as long as a tile's prologue and
epilogue, and `tiles` the number of 128 x 128 tiles of the result, which run in waves.

Sources of the numbers:

- [DG] DeepGEMM's README, first release (Feb. 2025), H800: nine shapes of M = 4096 and of four or
  eight groups, 590 to 1,358 TFLOP/s. `matmul_fp8` and `half_contraction_fp8` are fitted to them:
  each is met within 4 % (`tests/plan/test_published.py`).
- [TRACE] deepseek-ai/profile-data, train.json (commit 4496024): one overlapped pair of V3's
  training on H800, of which `plan/published_trace.py` holds the sums. Numbers marked so are fitted
  to that trace, and are therefore no prediction of it.
- [EP] DeepEP's published bandwidths, see `network.py`.
- [FA3] FlashAttention-3 (arXiv 2407.08608): forward with causal mask at head dim 128, 4k to 16k
  tokens on H100: about 600 TFLOP/s; it agrees with [TRACE] at 555.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """Shares of rated speeds, 0 to 1 unless a line says otherwise.

    Attributes:
      matmul_fp8, matmul_bf16: Of the peak, endless contraction; forward and input gradient.
      half_contraction_fp8, half_contraction_bf16: K0, elements.
      weight_gradient_fp8, grouped_weight_gradient_fp8: Of the peak, for the gradient of one weight
        and of those of experts.
      weight_gradient_bf16, grouped_bf16: Of `matmul_bf16`'s speed.
      attention_forward, attention_backward: Attention core, of the 16-bit peak.
      quantise_forward, quantise_backward: Of memory bandwidth, making FP8 tiles.
      pointwise_forward, pointwise_backward: Of memory bandwidth, all else than matmuls.
      optimizer: Of memory bandwidth, for AdamW.
      all_to_all: Of a network's effective bandwidth, while other messages and matmuls run.
      synchronisation_s: Seconds that each message waits for its peers, never hidden.
      concurrent_weight_gradient: Part of the experts' weight gradients that runs on a second stream
        in an overlapped pair.
    """

    matmul_fp8: float = 1450 / 1979  # [DG]
    half_contraction_fp8: float = 690.0  # [DG]
    matmul_bf16: float = 0.80
    half_contraction_bf16: float = 345.0  # the same time as in FP8, at half the speed
    weight_gradient_fp8: float = 0.382  # [TRACE]
    grouped_weight_gradient_fp8: float = 0.303  # [TRACE]; torchao measured 457 TFLOP/s, 0.23
    weight_gradient_bf16: float = 0.90
    grouped_bf16: float = 0.90
    attention_forward: float = 0.66  # [TRACE]
    attention_backward: float = 0.50  # [TRACE]
    quantise_forward: float = 0.227  # [TRACE]
    quantise_backward: float = 0.49  # [TRACE]
    pointwise_forward: float = 0.32  # [TRACE]
    pointwise_backward: float = 0.414  # [TRACE]
    optimizer: float = 0.75
    all_to_all: float = 0.69  # [TRACE]
    synchronisation_s: float = 0.675e-3  # [TRACE]
    concurrent_weight_gradient: float = 0.45  # [TRACE]


PUBLISHED = Efficiency()
