"""Loss of given weights on given sequences, and of a checkpoint on a text, without gradients."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.checkpoint.load import Checkpoint
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data import scoring, source
from deepseek_jax.model import execution, params, remat
from deepseek_jax.model.loss import head_loss
from deepseek_jax.model.params import split
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.axes import DATA_AXES, Layout
from deepseek_jax.parallel.mesh import forward_config, spread


@dataclasses.dataclass(frozen=True)
class Score:
    """Summed loss of some targets.

    Attributes:
      nats: cross entropy of the main head, summed over targets.
      targets: number of predicted tokens.
    """

    nats: float
    targets: int

    def bits_per_byte(self, text_bytes: int) -> float:
        """Cross entropy in bits, per byte of the text behind the targets."""
        return self.nats / math.log(2) / text_bytes


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where that is beyond every float64."""
    with np.errstate(over="ignore"):
        return float(np.exp(np.float64(loss)))


def make_score(
    config: Config, layout: Layout, mesh: Mesh
) -> Callable[[nnx.State, nnx.State, np.ndarray, np.ndarray], Score]:
    """Makes score(weights, biases, sequences N(S+1), valid NS); the caller sets the mesh.

    Weights are masters or stored ones, placed as `Layout.storage`. The N sequences are scored in
    micro-batches of the training size, the last one padded.
    """
    graph, abstract, abstract_bias = split(abstract_model(config.model))
    stored = params.place(abstract, layout.storage)
    how = dataclasses.replace(execution.of(config), remat=remat.NONE, in_flight=1)
    per_layer = config.layout.zero == 3
    batch_spec = P(layout.mesh_axes("batch") or None, None)
    data_axes = tuple(name for name in DATA_AXES if layout.sizes[name] > 1)

    def local(
        weights: nnx.State, bias: nnx.State, tokens: jax.Array, valid: jax.Array
    ) -> jax.Array:
        with axes.active(layout):
            compute = params.prepare(weights, how.recipe)
            compute = compute if per_layer else params.gather(compute, layout)
            model: Any = nnx.merge(graph, compute, bias)
            rows = model.trunk(tokens[:, :-1], how).hidden.reshape(-1, config.model.d_model)
            counted = valid.reshape(-1).astype(jnp.float32)
            chunk = min(config.layout.loss_chunk, rows.shape[0])
            head = params.whole(model.head).table[...]
            nats, _ = head_loss(rows, head, tokens[:, 1:].reshape(-1), counted, chunk)
            return lax.psum(nats, data_axes) if data_axes else nats

    total = jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(stored, jax.tree.map(lambda _: P(), abstract_bias), batch_spec, batch_spec),
            out_specs=P(),
            check_vma=False,
        )
    )

    def score(
        weights: nnx.State, bias: nnx.State, sequences: np.ndarray, valid: np.ndarray
    ) -> Score:
        size, nats = config.batch.micro_sequences, 0.0
        place = NamedSharding(mesh, batch_spec)
        for start in range(0, len(sequences), size):
            parts = sequences[start : start + size], valid[start : start + size]
            short = size - len(parts[0])
            padded = [np.pad(part, ((0, short), (0, 0))) for part in parts]
            nats += float(total(weights, bias, *(spread(part, place) for part in padded)))
        return Score(nats, int(valid.sum()))

    return score


def score_checkpoint(
    checkpoint: Checkpoint,
    data: str,
    base: Config,
    *,
    mesh: Mapping[str, int],
    length: int,
    tokens: int,
    text_key: str = "text",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Loss of a checkpoint on a text, each token of which is predicted once.

    Args:
      checkpoint: an opened Hugging Face directory or workdir.
      data: text as in `data.path`, or token files. Text is read with the directory's
        `tokenizer.json`, each file or row between its begin and end tokens; their spellings inside
        a text are encoded as plain text.
      base: layout, precision and batch; its model is replaced by the checkpoint's.
      mesh: devices along mesh axes, one along the others. Empty for one device.
      length: of the sequences that the text is cut into.
      tokens: largest number of tokens to score.
      text_key: the field of rows that holds their text.
      say: receives progress messages.

    Returns:
      loss in nats per token, perplexity, bits_per_byte, gzip_bits_per_byte, tokens, bytes; those
      in bytes are None for token files, whose text is unknown.

    Raises:
      ConfigError: a checkpoint or data that cannot be read, or a layout that does not fit.
    """
    model = checkpoint.model
    sequences, valid, text = _laid_out(checkpoint, data, model.vocab, length, tokens, text_key, say)
    config = forward_config(dataclasses.replace(base, model=model), mesh, sequences.shape[1] - 1)
    devices = jax.devices() if mesh else jax.devices()[:1]
    grid, layout = meshes.build(config.mesh, devices), meshes.layout(config)
    with jax.set_mesh(grid):
        recipe = execution.of(config).recipe
        _, stored, bias = split(checkpoint.load(recipe, layout, grid))
        score = make_score(config, layout, grid)(stored, bias, sequences, valid)
    loss = score.nats / score.targets
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": score.bits_per_byte(text.bytes) if text else None,
        "gzip_bits_per_byte": 8 * text.gzip_bytes / text.bytes if text else None,
        "tokens": score.targets,
        "bytes": text.bytes if text else None,
    }


def _laid_out(
    checkpoint: Checkpoint,
    data: str,
    vocab: int,
    length: int,
    tokens: int,
    text_key: str,
    say: Callable[[str], None],
) -> tuple[np.ndarray, np.ndarray, scoring.HeldOut | None]:
    """Packs held-out data into sequences N(S+1), with a mask NS of the targets that count.

    The third value holds the byte counts of raw text, for bits per byte; None for token files.
    """
    if files := source.token_files(data):
        return *scoring.of_tokens(files, vocab=vocab, length=length, tokens=tokens), None
    tokens_of, directory = checkpoint.tokenizer, checkpoint.directory
    if tokens_of is None:
        raise ConfigError(
            f"{directory} has no tokenizer.json to read the text of --data={data} with; expected "
            "one there, or a token file (.npy or .bin) for --data"
        )
    documents = source.open_source(data, text_key, say, whole=True)
    if tokens_of.size > vocab:
        raise ConfigError(
            f"{directory / 'tokenizer.json'} has ids up to {tokens_of.size - 1}, and the model "
            f"beside it knows 0 to {vocab - 1}; expected the tokenizer that it was trained with"
        )
    text = scoring.of_text(documents, tokens_of, length=length, tokens=tokens)
    return text.sequences, text.valid, text
