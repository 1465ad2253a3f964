"""DeepSeek-V3 at 0.70B parameters, 0.20B activated, and 0.04B of MTP, for one 80 GB GPU.

Per parameter, training holds 4 bytes of masters, 4 of moments in bfloat16, 2 of bfloat16 weights, 2
of their gradient and 4 of its float32 sum: 16 bytes, 12 GB here (estimated). The rest of the GPU is
for activations: 8 sequences of 2048 tokens at a time, with the report's recomputation.
"""

from ml_collections import ConfigDict

from configs import v3_671b


def get_config() -> ConfigDict:
    """Config of a DeepSeek-V3 for one GPU."""
    config = v3_671b.get_config()
    config.model.update(
        vocab=32_768, layers=16, dense_layers=1, d_model=1024, d_dense=4096, heads=8,
        q_latent=512, kv_latent=256, d_nope=64, d_rope=32, d_value=64,
        experts=32, top_k=4, groups=4, top_groups=2, d_expert=384, init_std=0.02,
    )  # fmt: skip
    config.mesh.update(pipe=1, replica=1, node=1, gpu=1, tensor=1)
    config.layout.update(recompute="report", loss_chunk=2048)
    config.precision.recipe = "bfloat16"
    v3_671b.scale_schedule(config, tokens=20 * v3_671b.BILLION)
    config.schedule.update(
        learning_rate=6e-4, decayed_learning_rate=6e-5, final_learning_rate=2e-5, warmup_steps=500
    )
    config.batch.update(length=2048, sequences=256, ramp_sequences=64, micro_sequences=8)
    return config
