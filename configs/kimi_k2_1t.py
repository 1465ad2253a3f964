"""Kimi K2, 1.026T parameters: V3's architecture with 384 experts in one group and 64 heads.

Sources: [CONFIG], the released config.json of Kimi-K2-Instruct, also as MaxText keeps it
(`kimi-k2-1t.yml`, commit 7c7f628), and [REPORT], the Kimi K2 report (arXiv 2507.20534; sections
2.1, 2.4 and 2.5), and [MUON], arXiv 2502.16982. Kimi K2 was trained with MuonClip; this config has
Muon without the clip of queries and keys. The layout has the report's sizes and its pipeline without the interleaving. `plan`
computes 130 GiB of a device for it: the report stores activations in FP8 and moves the rest to host
memory, which is not here. Weights of Kimi K2 Thinking and of K2.5 and later are published in INT4,
which is not read.
"""

from ml_collections import ConfigDict

from configs import v3_671b
from configs.v3_671b import BILLION, TRILLION


def get_config() -> ConfigDict:
    """Config of Kimi K2."""
    config = v3_671b.get_config()
    config.model.update(
        vocab=163_840,  # [CONFIG]
        layers=61,  # [CONFIG]
        dense_layers=1,  # [CONFIG]: first_k_dense_replace
        d_model=7168,  # [CONFIG]
        d_dense=18_432,  # [CONFIG]
        heads=64,  # [CONFIG]
        q_latent=1536,  # [CONFIG]
        kv_latent=512,  # [CONFIG]
        d_nope=128,  # [CONFIG]
        d_rope=64,  # [CONFIG]
        d_value=128,  # [CONFIG]
        rope_theta=50_000.0,  # [CONFIG]
        yarn_factor=1.0,  # [REPORT]: 4K in pre-training; 32 in the released [CONFIG]
        yarn_original=4096,  # [CONFIG]
        yarn_beta_fast=1.0,  # [CONFIG]
        yarn_beta_slow=1.0,  # [CONFIG]
        yarn_mscale=1.0,  # [CONFIG]
        yarn_mscale_all_dim=1.0,  # [CONFIG]
        experts=384,  # [CONFIG]
        shared_experts=1,  # [CONFIG]
        top_k=8,  # [CONFIG]
        groups=1,  # [CONFIG]: n_group
        top_groups=1,  # [CONFIG]
        d_expert=2048,  # [CONFIG]
        score="sigmoid",  # [CONFIG]
        normalise_weights=True,  # [CONFIG]: norm_topk_prob
        routed_scale=2.827,  # [CONFIG]
        mtp_depth=0,  # [CONFIG]: num_nextn_predict_layers
        norm_eps=1e-6,  # [CONFIG]; 1e-5 in K2.5
        init_std=0.02,  # [CONFIG]: initializer_range
    )
    # [REPORT]: 16-way pipeline, 16-way expert parallelism, ZeRO-1, on nodes of 8 H800s. The number
    # of GPUs is any multiple of 256 there; 2,048 is ours.
    config.mesh.update(pipe=16, replica=8, node=2, gpu=8, tensor=1)
    config.layout.recompute = "full"  # [REPORT]: of chosen parts
    config.layout.dispatch = "flat"  # one group: nothing limits the nodes of a token
    config.layout.pipeline = "1f1b"  # [REPORT]: interleaved there, for less memory than DualPipe
    config.precision.recipe = "bfloat16"  # [REPORT]: FP8 stores activations, no product is FP8
    config.precision.dispatch = "compute"  # as the recipe
    config.optimizer.name = "muon"  # [REPORT], without its QK-Clip; momentum and RMS of [MUON]
    config.optimizer.weight_decay = 0.1  # [REPORT]
    config.optimizer.ema_decay = 0.0  # none in [REPORT]
    config.data.fim_rate = 0.0  # none in [REPORT]
    sequences = 16_384  # [REPORT]: 67M tokens of a batch, at 4,096 of a sequence
    config.batch.update(
        length=4096, sequences=sequences, ramp_sequences=sequences, ramp_tokens=0,
        micro_sequences=128,  # one for each data-parallel rank
    )  # fmt: skip
    config.schedule.update(
        tokens=15_960 * BILLION,  # [REPORT]: 15.5T, then 400B and 60B of annealing
        learning_rate=2e-4,  # [REPORT]
        warmup_steps=500,  # [REPORT]
        decay_start=10 * TRILLION,  # [REPORT]
        decay_end=15_500 * BILLION,  # [REPORT]: cosine over 5.5T
        decayed_learning_rate=2e-5,  # [REPORT]
        final_start=15_500 * BILLION,  # [REPORT]: from there to 7e-6, in a way not stated
        final_learning_rate=7e-6,  # [REPORT]
        bias_speed=0.001,  # not in [REPORT]; V3's
        bias_stop=15_960 * BILLION,  # not in [REPORT]
        mtp_weight=0.0,
        late_mtp_weight=0.0,
        mtp_switch=15_960 * BILLION,
    )
    return config
