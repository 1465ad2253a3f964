"""Moonlight 16B, 15.960B parameters: V2-Lite's shape, V3's router with one group.

Sizes are those of the released config.json; tokens, length, batch and peak learning rate those of
the Moonlight report. Moonlight was trained with Muon in three stages of its own; this config has
AdamW and the proportions of V3's schedule instead.
"""

from ml_collections import ConfigDict

from configs import v3_671b


def get_config() -> ConfigDict:
    """Config of Moonlight 16B."""
    config = v3_671b.get_config()
    config.model.update(
        vocab=163_840, layers=27, dense_layers=1, d_model=2048, d_dense=11_264, heads=16,
        q_latent=0, experts=64, shared_experts=2, top_k=6, groups=1, top_groups=1, d_expert=1408,
        routed_scale=2.446, rope_theta=50_000.0, yarn_original=8192, mtp_depth=0, norm_eps=1e-5,
    )  # fmt: skip
    config.mesh.update(pipe=1, replica=1, node=1, gpu=8, tensor=1)
    config.layout.recompute = "report"
    config.precision.recipe = "bfloat16"
    v3_671b.scale_schedule(config, tokens=5_700 * v3_671b.BILLION)
    config.schedule.update(
        learning_rate=4.2e-4, decayed_learning_rate=4.2e-5, final_learning_rate=1.4e-5
    )
    config.batch.update(
        length=8192, sequences=2048, ramp_sequences=2048, ramp_tokens=0, micro_sequences=8
    )
    return config
