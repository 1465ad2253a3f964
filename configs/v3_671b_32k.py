"""First phase of the context extension: 1000 steps of 1920 sequences of 32K tokens (section 4.3).

The phase continues from the weights of pre-training with YaRN on, at the last learning rate and MTP
weight of pre-training and with a fixed router bias; the report gives no warm-up.
"""

from ml_collections import ConfigDict

from configs import v3_671b


def get_config() -> ConfigDict:
    """Config of the first phase of the context extension."""
    config = v3_671b.get_config()
    config.model.yarn_factor = 40.0
    config.layout.recompute = "full"  # not published; the other policies keep far more
    phase(config, length=32_768, sequences=1920, steps=1000)
    return config


def phase(config: ConfigDict, length: int, sequences: int, steps: int) -> None:
    """Sets a phase of `steps` steps at a constant learning rate, in place."""
    config.batch.update(
        length=length, sequences=sequences, ramp_sequences=sequences, ramp_tokens=0,
        micro_sequences=config.mesh.replica * config.mesh.node * config.mesh.gpu,
    )  # fmt: skip
    tokens, rate = steps * sequences * length, config.schedule.final_learning_rate
    config.schedule.update(
        tokens=tokens, warmup_steps=0, learning_rate=rate, decayed_learning_rate=rate,
        decay_start=tokens, decay_end=tokens, final_start=tokens, bias_speed=0.0, bias_stop=0,
        mtp_weight=config.schedule.late_mtp_weight, mtp_switch=0,
    )  # fmt: skip
