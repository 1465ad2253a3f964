"""DeepSeek-V3 at laptop size: minutes on two CPU cores.

MLA, DeepSeekMoE with bias balancing, MTP, fill-in-the-middle, EMA and the learning-rate phases are
on. The batch ramp, BF16 and FP8 payloads, recomputation, the pipeline and YaRN are off; one device
exchanges no tokens. The initial standard deviation is that of V3 times sqrt(7168 / width).
"""

from ml_collections import ConfigDict

from configs import v3_671b


def get_config() -> ConfigDict:
    """Config of a DeepSeek-V3 for a laptop."""
    config = v3_671b.get_config()
    config.model.update(
        vocab=4096, layers=2, dense_layers=1, d_model=96, d_dense=384, heads=4,
        q_latent=32, kv_latent=32, d_nope=16, d_rope=8, d_value=16,
        experts=16, top_k=4, groups=4, top_groups=2, d_expert=32, init_std=0.052,
    )  # fmt: skip
    config.mesh.update(pipe=1, replica=1, node=1, gpu=-1, tensor=1)
    config.layout.update(
        recompute="none", attention_block=128, unroll=4, loss_chunk=256, capacity_factor=2.0
    )
    config.precision.update(recipe="float32", dispatch="compute")
    v3_671b.scale_schedule(config, tokens=600_000)
    config.schedule.update(
        warmup_steps=40, learning_rate=5e-3, decayed_learning_rate=5e-4,
        final_learning_rate=1.75e-4, bias_speed=0.01,
    )  # fmt: skip
    config.batch.update(length=128, sequences=8, ramp_sequences=8, micro_sequences=8)
    config.data.held_out = 0.05
    config.optimizer.ema_decay = 0.99
    config.checkpoint.every_steps = 100
    config.evaluation.tokens = 1 << 16
    return config
