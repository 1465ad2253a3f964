"""DeepSeek-V2-Lite, 15.706B parameters: V2's router (softmax, no groups) and a plain query projection.

Sizes, schedule and balance factors are those of the DeepSeek-V2 report (arXiv 2405.04434) and its
released config.json. YaRN is off, as in pre-training at 4K; set model.yarn_factor=40 for the
released model, whose context is 32K and more. Two things differ: V2 lowers the learning rate in
steps, and here it stays at its peak; V2's expert-level balance loss is the sequence-wise one here,
with the same factor.
"""

from ml_collections import ConfigDict

from configs import v3_671b

TOKENS = 5_700 * v3_671b.BILLION


def get_config() -> ConfigDict:
    """Config of DeepSeek-V2-Lite."""
    config = v3_671b.get_config()
    config.model.update(
        vocab=102_400, layers=27, dense_layers=1, d_model=2048, d_dense=10_944, heads=16,
        q_latent=0, experts=64, shared_experts=2, top_k=6, groups=1, top_groups=1, d_expert=1408,
        score="softmax", group_score="max", normalise_weights=False, routed_scale=1.0,
        yarn_mscale=0.707, yarn_mscale_all_dim=0.707, mtp_depth=0,
    )  # fmt: skip
    config.mesh.update(pipe=1, replica=1, node=1, gpu=8, tensor=1)
    config.layout.recompute = "report"
    config.precision.recipe = "bfloat16"
    v3_671b.scale_schedule(config, tokens=TOKENS)
    config.schedule.update(
        learning_rate=4.2e-4, decay_start=TOKENS, decay_end=TOKENS, final_start=TOKENS,
        bias_speed=0.0, balance_alpha=0.001,
    )  # fmt: skip
    config.batch.update(sequences=4608, ramp_sequences=4608, ramp_tokens=0, micro_sequences=8)
    return config
