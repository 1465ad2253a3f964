"""Loss of a text: python -m deepseek_jax.evaluate --checkpoint=DIR --data=PATH [--json].

Layout and precision are those of --config, else the run's own, else configs/v3_tiny.py's.
"""

import json
from pathlib import Path

from absl import flags

from deepseek_jax import command
from deepseek_jax.bench.report import text
from deepseek_jax.config import ConfigError

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A Hugging Face directory or a run's workdir.")
DATA = flags.DEFINE_string("data", None, "Text, JSONL, Parquet, token files, or a folder of them.")
CONFIG = command.define_config_flag()
MESH = flags.DEFINE_list("mesh", [], "Devices by mesh axis, as node:2,gpu:4; else one device.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens that a sequence predicts.")
TOKENS = flags.DEFINE_integer("tokens", 2**62, "Score at most this many.")
DTYPE = flags.DEFINE_enum("dtype", None, ("float32", "bfloat16"), "Of weights and matmuls.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
command.define_process_flags()


def main() -> None:
    if not CHECKPOINT.value or not DATA.value:
        raise ConfigError("evaluate needs --checkpoint=DIR and --data=PATH")
    for flag in (LENGTH, TOKENS):
        if flag.value < 2:
            raise ConfigError(f"--{flag.name}={flag.value}; expected at least 2")
    mesh = command.parse_mesh(MESH.value)
    given = command.read_config(CONFIG) if CONFIG.value is not None else None
    command.start_processes()
    from deepseek_jax.parallel import processes
    from deepseek_jax.train import evaluate

    directory = Path(CHECKPOINT.value)
    base = command.config_of(directory, given, DTYPE.value)
    primary = processes.is_primary()
    found = evaluate.score_checkpoint(
        directory,
        DATA.value,
        base,
        mesh=mesh,
        length=LENGTH.value,
        tokens=TOKENS.value,
        say=print if primary and not JSON.value else lambda line: None,
    )
    if primary:
        print(json.dumps(found, indent=2) if JSON.value else text(found))


if __name__ == "__main__":
    command.run(main)
