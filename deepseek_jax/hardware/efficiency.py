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
- [MAMF] Largest matmul speeds that stas00/ml-engineering measured (cuBLAS, hipBLASLt), TFLOP/s in
  BF16: A100 271.2, H100 794.5, B200 1,745, GB200 1,822, MI300X 668.4; in FP8: B200 3,432, GB200
  3,616.
- [OWN] This project's grouped matmul on an H100: `bench grouped` measured 0.97 of a dense product
  forward, `bench tiles` 681 forward and 611 TFLOP/s for the gradient of weights.
- [TORCHAO] Quantisers on an H100: 92 % of memory bandwidth can be had
  (benchmarks/prototype/blockwise_fp8_training, commit 55c56d0).

- [CUDNN] NVIDIA/cudnn-frontend, benchmark/attention_training: V3's attention at 4,096 tokens, cuDNN
  9.27. On an H200 612 TFLOP/s forward and 490 backward, which agrees with [TRACE]; on a GB200 1,369
  and 1,066 (commits 706aac3, 4780afd).
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
      grouped_bf16, grouped_weight_gradient_bf16: Of the speed of a dense product.
      attention_forward, attention_backward: Attention core, of the 16-bit peak.
      quantise_forward, quantise_backward: Of memory bandwidth, making FP8 tiles.
      pointwise_forward, pointwise_backward: Of memory bandwidth, all else than matmuls.
      streaming: Of memory bandwidth, for AdamW, passes over logits, and matmuls that memory bounds.
      all_to_all: Of a network's effective bandwidth, while other messages and matmuls run.
      synchronisation_s: Seconds that each message of 4,096 tokens waits for its peers, never
        hidden; less for fewer tokens, whose work differs by less.
      concurrent_weight_gradient: Part of the experts' weight gradients that runs on a second stream
        in an overlapped pair.
    """

    matmul_fp8: float = 1450 / 1979
    half_contraction_fp8: float = 690.0
    matmul_bf16: float = 794.5 / 989.5
    half_contraction_bf16: float = 345.0
    weight_gradient_fp8: float = 0.382
    grouped_weight_gradient_fp8: float = 0.303
    grouped_bf16: float = 0.97
    grouped_weight_gradient_bf16: float = 0.97 * 611 / 681
    attention_forward: float = 0.66
    attention_backward: float = 0.50
    quantise_forward: float = 0.227
    quantise_backward: float = 0.49
    pointwise_forward: float = 0.32
    pointwise_backward: float = 0.414
    streaming: float = 0.92
    all_to_all: float = 0.707
    synchronisation_s: float = 0.675e-3
    concurrent_weight_gradient: float = 0.45


PUBLISHED = Efficiency()

# Source of each number of Hopper's.
SOURCES = {
    "matmul_fp8": "[DG]",
    "half_contraction_fp8": "[DG]",
    "matmul_bf16": "[MAMF]",
    "half_contraction_bf16": "the same time as in FP8, at half the speed",
    "weight_gradient_fp8": "[TRACE]",
    "grouped_weight_gradient_fp8": "[TRACE]; torchao measured 457 TFLOP/s, 0.23",
    "grouped_bf16": "[OWN]",
    "grouped_weight_gradient_bf16": "[OWN]",
    "attention_forward": "[TRACE]",
    "attention_backward": "[TRACE]",
    "quantise_forward": "[TRACE]",
    "quantise_backward": "[TRACE]",
    "pointwise_forward": "[TRACE]",
    "pointwise_backward": "[TRACE]",
    "streaming": "[TORCHAO]",
    "all_to_all": "[TRACE]",
    "synchronisation_s": "[TRACE]",
    "concurrent_weight_gradient": "[TRACE]",
}

# Chips of other generations: measured shares where there are any, and Hopper's elsewhere.
BY_CHIP = {
    "a100": dataclasses.replace(PUBLISHED, matmul_bf16=271.2 / 312),  # [MAMF]
    "b200": dataclasses.replace(PUBLISHED, matmul_bf16=1745 / 2250, matmul_fp8=3432 / 4500),
    "gb200": dataclasses.replace(
        PUBLISHED,
        matmul_bf16=1822 / 2500,
        matmul_fp8=3616 / 5000,
        attention_forward=1369 / 2500,  # [CUDNN]
        attention_backward=1066 / 2500,
    ),
    "mi300x": dataclasses.replace(PUBLISHED, matmul_bf16=668.4 / 1307.4),
}


def efficiency(chip: str) -> Efficiency:
    """Efficiency of a chip by its name; Hopper's for others."""
    return BY_CHIP.get(chip, PUBLISHED)
