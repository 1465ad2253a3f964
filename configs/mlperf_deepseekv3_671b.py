"""MLPerf Training v6.0, benchmark `deepseekv3_671b`: V3 trained further on C4 to a target loss.

Differences from `v3_671b.py`. Their sources are files of the reference implementation,
`llm_moe_pretraining/nemo` of github.com/mlcommons/training: [README] (commit f7adbc8), [SCRIPT]
`pretrain_deepseek_v3_671b.py` (21dceda) and [RUN] `config_GB300_64x4x240xtp1pp4cp1.sh` (6c2ba88),
and the recipe for DeepSeek-V3 of [BRIDGE], Megatron-Bridge, on which they are built.

A benchmark run is more than a config can say:

- It starts from the released weights after 50 steps with its balance loss, 1.4 TB for members of
  MLCommons only. `deepseek_jax.convert` reads the released weights themselves, for a run from them.
- It ends when the loss on the first 1,024 sequences of C4's validation set, taken after every step,
  is at most 3.60: after 47 steps, 3.0B tokens, in a reference log of this batch. `tokens` is the
  whole schedule here, which no run reaches; `evaluation` scores held-out documents at the end.
- Its data is C4 in a given order. Set `data.path`, and `data.tokenizer` to the `tokenizer.json` of
  Llama 3.1 8B, of 128,256 entries; the table keeps the released 129,280 rows [BRIDGE].
- The reference's first step has learning rate 0 and the fifth the full one; here the first has a
  quarter, and the fourth is full.
- Weight decay is 0.1 in rules and logs, and here. Read from the code, the reference's scheduler
  writes its own 0.033 over it before every step [BRIDGE]; `optimizer.weight_decay=0.033` follows.
- The closed division lets submissions choose the layout and lower precision. This layout is V3's.
"""

import math

from ml_collections import ConfigDict

from configs import v3_671b

SEQUENCES = 15_360  # [RUN]: 64 ranks x 240; the smallest batch that the rules allow [README]
LENGTH = 4096  # [README]
STEPS = 12_000  # [README]: length of the learning rate's schedule


def get_config() -> ConfigDict:
    """Config of the benchmark, at its smallest batch."""
    config = v3_671b.get_config()
    config.model.yarn_factor = 40.0  # [BRIDGE]: as in the released config.json, at 4,096 tokens too
    config.precision.recipe = "bfloat16"  # [BRIDGE]; the reference trains without FP8
    config.precision.dispatch = "compute"  # [BRIDGE]
    config.layout.recompute = "full"  # BF16 fits into 80 GB with it
    config.optimizer.ema_decay = 0.0  # [SCRIPT] has no average of weights
    config.data.fim_rate = 0.0  # [SCRIPT]: plain text
    config.evaluation.tokens = 1024 * LENGTH  # [README]: the number, see above
    config.batch.update(length=LENGTH, sequences=SEQUENCES, ramp_sequences=SEQUENCES, ramp_tokens=0)
    rate = round(2.4e-5 * math.sqrt(SEQUENCES / 16_384), 9)  # [README]: 2.3238e-5 here
    step, end = SEQUENCES * LENGTH, STEPS * SEQUENCES * LENGTH
    config.schedule.update(
        tokens=end,
        learning_rate=rate,
        warmup_steps=4,  # [README]
        decay_start=4 * step,  # cosine from the end of the warm-up [README]
        decay_end=end,
        decayed_learning_rate=1e-8,  # [README]
        final_start=end,
        final_learning_rate=1e-8,
        bias_stop=end,  # [BRIDGE]: router biases move at 0.001 throughout
        balance_alpha=0.01,  # [SCRIPT]: moe_aux_loss_coeff
        mtp_weight=0.1,  # [BRIDGE]: mtp_loss_scaling_factor
        mtp_switch=0,
    )
    return config
