"""Weights in and out: python -m deepseek_jax.convert --source=DIR --target=DIR.

A Hugging Face directory becomes a workdir on which `main` trains on, with the training recipe of
--config (by default that of configs/v3_tiny.py); where that has V3.2's indexers and the directory
none, they are made with random weights, for `schedule.index_phase=warm_up`. A workdir becomes a
Hugging Face directory. With --format, a Hugging Face directory becomes another one.
"""

from pathlib import Path

from absl import flags

from deepseek_jax import command
from deepseek_jax.config import ConfigError

SOURCE = flags.DEFINE_string("source", None, "A Hugging Face directory, or a run's workdir.")
TARGET = flags.DEFINE_string("target", None, "The folder to make; absent or empty.")
CONFIG = command.define_config_flag()
FORMAT = flags.DEFINE_enum(
    "format", None, ("bfloat16", "float32", "fp8"), "Format of the Hugging Face directory to make."
)
SCALES = flags.DEFINE_enum(
    "scales",
    "kept",
    ("kept", "power_of_two", "e8m0"),
    "Scales of FP8 blocks: as they are; powers of two, as in V3.1; or these in F8_E8M0.",
)
SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "Size of its largest file, in 10^9 bytes.")


def main() -> None:
    """Converts a checkpoint as the flags say."""
    if not SOURCE.value or not TARGET.value:
        raise ConfigError("convert needs --source=DIR and --target=DIR")
    if not 0 < SHARD_GB.value < 2**63:
        raise ConfigError(f"--shard_gb={SHARD_GB.value}; expected a number above 0")
    if SCALES.value != "kept" and FORMAT.value != "fp8":
        raise ConfigError(f"--scales={SCALES.value} is of FP8 blocks; add --format=fp8")
    from deepseek_jax.checkpoint import new_folder

    source, target = command.folder(SOURCE), command.path("target", TARGET.value)
    with command.naming({"target": "--target", "data.tokenizer": "--source"}):
        new_folder.check_target(target)
        _convert(source, target)


def _convert(source: Path, target: Path) -> None:
    from deepseek_jax.checkpoint import conversion
    from deepseek_jax.checkpoint.load import open_checkpoint

    checkpoint = open_checkpoint(source)
    if checkpoint.run is None and FORMAT.value is None:
        base = command.read_config(CONFIG) if CONFIG.value is not None else command.default_config()
        config = conversion.to_run(checkpoint, target, base)
        if config.schedule.bias_speed != base.schedule.bias_speed:
            print("schedule.bias_speed is 0 there: the published form has no router biases")
        if config.model.index_heads and not checkpoint.model.index_heads:
            print("model.index_heads: indexers with random weights were added; train them first")
        print(
            f"{target} is a workdir; python -m deepseek_jax.main --config={target}/config.py "
            f"--workdir={target} trains on"
        )
        return
    if CONFIG.value is not None:
        raise ConfigError("--config is the recipe of a workdir to make; leave it out here")
    shard_bytes = int(SHARD_GB.value * 1e9)
    form = FORMAT.value or "bfloat16"
    conversion.to_published(checkpoint, target, form, shard_bytes, scales=SCALES.value)
    print(f"{target} is a Hugging Face directory")


if __name__ == "__main__":
    command.run(main)
