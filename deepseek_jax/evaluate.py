"""Loss of a text: python -m deepseek_jax.evaluate --checkpoint=DIR --data=PATH [--json].

Layout and precision are chosen as in `generate`: those of --config, else those of the run that made
the checkpoint, else the dtype that a Hugging Face directory states; --dtype takes its place. With
--dtype=fp8 linear layers multiply in E4M3, with the values and scales of a directory in FP8 blocks.

By default documents are packed as in training: BOS, text and EOS of each file or row, one after
another, cut into sequences of --length. Every token but the first BOS is predicted once, EOS and
inner BOS too; a sequence begins where the one before ended, without BOS, and a document sees those
before it in its sequence. With --documents each file or row stands apart after BOS, and only its
own tokens are predicted; a longer one is read in windows of --length tokens that move on by
--stride, which is the rolling log-likelihood of lm-evaluation-harness.

The default of --length is batch.length of the run that made the checkpoint; for a Hugging Face
directory it is 1,024, or max_position_embeddings where that is less. The length is printed.
"""

import json

from absl import flags

from deepseek_jax import command
from deepseek_jax.config import ConfigError
from deepseek_jax.table import text

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A Hugging Face directory or a run's workdir.")
DATA = flags.DEFINE_string("data", None, "Text, JSONL, Parquet, token files, or a folder of them.")
TEXT_KEY = flags.DEFINE_string("text_key", "text", "Field or column that holds the text of a row.")
CONFIG = command.define_config_flag()
MESH = flags.DEFINE_list("mesh", [], "Devices by mesh axis, as node:2,gpu:4; else one device.")
LENGTH = flags.DEFINE_integer(
    "length", None, "Tokens that each sequence predicts; default: the run's.", lower_bound=2
)
TOKENS = flags.DEFINE_integer("tokens", 2**62, "Score at most this many.", lower_bound=2)
DOCUMENTS = flags.DEFINE_bool("documents", False, "Score each document apart, without EOS.")
STRIDE = flags.DEFINE_integer(
    "stride", None, "Tokens that each further window predicts; default: --length.", lower_bound=1
)
DTYPE = flags.DEFINE_enum(
    "dtype", None, ("float32", "bfloat16", "fp8"), "Dtype of weights and matmuls."
)
JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")
command.define_process_flags()

FLAG_OF = {
    "data.path": "--data", "data.text_key": "--text_key", "data.tokenizer": "--checkpoint",
    "batch.length": "--length", "stride": "--stride",
}  # fmt: skip


def main() -> None:
    """Scores a checkpoint on a text as the flags say."""
    if not CHECKPOINT.value or not DATA.value:
        raise ConfigError("evaluate needs --checkpoint=DIR and --data=PATH")
    if STRIDE.value is not None and not DOCUMENTS.value:
        raise ConfigError(f"--stride={STRIDE.value} is for documents apart; add --documents")
    directory = command.folder(CHECKPOINT)
    mesh = command.parse_mesh(MESH.value)
    given = command.read_config(CONFIG) if CONFIG.value is not None else None
    command.start_processes()
    from deepseek_jax.checkpoint.load import open_checkpoint
    from deepseek_jax.runtime import processes
    from deepseek_jax.train import evaluation
    from deepseek_jax.train.metrics import plain

    with command.naming(FLAG_OF):
        checkpoint = open_checkpoint(directory)
        length = evaluation.length_of(checkpoint) if LENGTH.value is None else LENGTH.value
        found = evaluation.score_checkpoint(
            checkpoint,
            DATA.value,
            command.config_of(checkpoint, given, DTYPE.value),
            mesh=mesh,
            length=length,
            tokens=TOKENS.value,
            text_key=TEXT_KEY.value,
            stride=(STRIDE.value or length) if DOCUMENTS.value else None,
            say=print if processes.is_primary() and not JSON.value else lambda line: None,
        )
    if processes.is_primary():
        kept = {key: plain(value) for key, value in found.items()}  # JSON has no infinity
        print(json.dumps(kept, indent=2, allow_nan=False) if JSON.value else text(found))


if __name__ == "__main__":
    command.run(main)
