"""A run of 20 steps that takes seconds, in which every part of the recipe changes.

The batch ramp, the learning rate's phases, the MTP weight and the bias speed all change on the
way, so that a run which resumes at a wrong position differs. No FP8 payload: FP8 turns
a difference of 1e-7 into one of 6 % when a value rounds the other way.
"""

from configs import v3_671b


def get_config():
    config = v3_671b.get_config()
    # A wide init keeps the router's scores apart: rounding never changes a choice of experts.
    config.model.update(
        vocab=264, layers=2, dense_layers=1, d_model=32, d_dense=64, heads=2,
        q_latent=16, kv_latent=16, d_nope=8, d_rope=8, d_value=8,
        experts=8, top_k=2, groups=4, top_groups=2, d_expert=16, init_std=0.1,
    )  # fmt: skip
    config.mesh.update(pipe=1, replica=1, node=1, gpu=-1, tensor=1)
    config.layout.update(recompute="none", attention_block=32, loss_chunk=64, zero=1)
    config.precision.update(recipe="float32", dispatch="compute")
    v3_671b.scale_schedule(config, tokens=20 * 512)
    config.schedule.update(
        warmup_steps=4, learning_rate=1e-2, decayed_learning_rate=1e-3, final_learning_rate=5e-4,
        bias_speed=0.01,
    )  # fmt: skip
    config.batch.update(
        length=32, sequences=24, ramp_sequences=8, ramp_tokens=4000, micro_sequences=8
    )
    config.optimizer.update(ema_decay=0.9, moments="float32")
    config.data.update(tokenizer="byte", held_out=0.1)
    config.checkpoint.update(every_steps=4, keep=4)
    config.log.every_steps = 1
    config.evaluation.tokens = 512
    return config
