"""Loss of given weights on given sequences, and of a checkpoint on a text, without gradients."""

import dataclasses
import gzip
import math
from collections.abc import Callable, Iterable, Mapping
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
from deepseek_jax.data import rolling, scoring, source
from deepseek_jax.data.tokenizer import Marks, Tokenizer
from deepseek_jax.errors import RunError
from deepseek_jax.hardware import xla_options
from deepseek_jax.model import execution, params, remat
from deepseek_jax.model.loss import head_loss
from deepseek_jax.model.params import split
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.parallel import axes
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.axes import DATA_AXES, Layout
from deepseek_jax.parallel.mesh import forward_config, spread
from deepseek_jax.precision.recipes import Recipe

_PUBLISHED_LENGTH = 1024  # of sequences, for a model that says nothing of its training
_SHORTEST = 2  # tokens of a sequence that `evaluate` takes


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


ScoreFn = Callable[[nnx.State, nnx.State, np.ndarray, np.ndarray], Score]


def make_score(
    config: Config,
    layout: Layout,
    mesh: Mesh,
    recipe: Recipe | None = None,
    like: nnx.State | None = None,
    compiled_for: tuple[nnx.State, nnx.State] | None = None,
) -> ScoreFn:
    """Makes score(weights, biases, sequences N(S+1), valid NS); the caller sets the mesh.

    Weights are masters or stored ones, placed as `Layout.storage`. The N sequences are scored in
    micro-batches of the training size, the last one padded.

    Args:
      recipe: in place of the config's; None for the config's.
      like: weights in the form of those that are scored; None for arrays.
      compiled_for: abstract weights and biases, for which the program is compiled now, for
        sequences of `batch.length`; None compiles it at the first call.
    """
    total: Any = _total(config, layout, mesh, recipe, like)
    place = NamedSharding(mesh, _batch_spec(layout))
    size = config.batch.micro_sequences
    if compiled_for is not None:
        length = config.batch.length
        tokens = jax.ShapeDtypeStruct((size, length + 1), jnp.int32, sharding=place)
        valid = jax.ShapeDtypeStruct((size, length), jnp.bool_, sharding=place)
        total = total.lower(*compiled_for, tokens, valid).compile()

    def score(
        weights: nnx.State, bias: nnx.State, sequences: np.ndarray, valid: np.ndarray
    ) -> Score:
        nats = 0.0
        for start in range(0, len(sequences), size):
            parts = sequences[start : start + size], valid[start : start + size]
            short = size - len(parts[0])
            padded = [np.pad(part, ((0, short), (0, 0))) for part in parts]
            nats += float(total(weights, bias, *(spread(part, place) for part in padded)))
        return Score(nats, int(valid.sum()))

    return score


def _batch_spec(layout: Layout) -> P:
    return P(layout.mesh_axes("batch") or None, None)


def _total(
    config: Config, layout: Layout, mesh: Mesh, recipe: Recipe | None, like: nnx.State | None
) -> Any:
    """Jitted (weights, biases, tokens, valid) -> nats of one micro-batch, over all devices."""
    graph, abstract, abstract_bias = split(abstract_model(config.model))
    stored = params.storage(abstract if like is None else like, layout)
    how = dataclasses.replace(execution.of(config, recipe), remat=remat.NONE, in_flight=1)
    how = dataclasses.replace(how, unroll=1)  # compiles sooner, and runs as fast
    per_layer = config.layout.zero == 3
    batch_spec = _batch_spec(layout)
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

    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(stored, jax.tree.map(lambda _: P(), abstract_bias), batch_spec, batch_spec),
            out_specs=P(),
            check_vma=False,
        ),
        compiler_options=xla_options.forward_options(jax.default_backend()),
    )


@dataclasses.dataclass(frozen=True)
class LaidOut:
    """Data to score, as sequences.

    Attributes:
      blocks: sequences N(W+1) with a mask NW of the targets that count, one after another.
      width: W.
      documents: number of documents; None for packed token files.
      bytes, gzip_bytes: UTF-8 bytes of the text behind the targets, and those of `gzip -9`; None
        for token files.
    """

    blocks: Iterable[tuple[np.ndarray, np.ndarray]]
    width: int
    documents: int | None = None
    bytes: int | None = None
    gzip_bytes: int | None = None


def length_of(checkpoint: Checkpoint) -> int:
    """Length of the sequences to score a checkpoint at, unless a command is told another.

    It is `batch.length` of a run; for a published model its max_position_embeddings, at most 1,024.
    """
    if checkpoint.run is not None:
        return checkpoint.run.batch.length
    stated = checkpoint.text_settings.get("max_position_embeddings")
    if not isinstance(stated, int) or stated < _SHORTEST:
        return _PUBLISHED_LENGTH
    return min(stated, _PUBLISHED_LENGTH)


def score_checkpoint(
    checkpoint: Checkpoint,
    data: str,
    base: Config,
    *,
    mesh: Mapping[str, int],
    length: int,
    tokens: int,
    text_key: str = "text",
    stride: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Loss of a checkpoint on a text, each token of which is predicted once.

    Args:
      checkpoint: an opened Hugging Face directory or workdir.
      data: text as in `data.path`, or token files. Text is read with the directory's
        `tokenizer.json`; the spellings of special tokens inside a text are encoded as plain text.
      base: layout, precision and batch; its model is replaced by the checkpoint's.
      mesh: devices along mesh axes, one along the others. Empty for one device.
      length: of the sequences that the text is cut into.
      tokens: largest number of tokens to score.
      text_key: the field of rows that holds their text.
      stride: None packs documents as training does: each file or row between BOS and EOS in one
        stream, cut into sequences, in which EOS and all but the first BOS are scored, too. A number
        scores documents apart, as `data/rolling.py` says, with that stride.
      say: receives progress messages.

    Returns:
      loss in nats per token, perplexity, bits_per_byte, gzip_bits_per_byte, tokens, bytes,
      documents, and the length of the sequences; those in bytes are None for token files, whose
      text is unknown, and so is documents where these are packed. A perplexity that is too large
      for a float is infinite.

    Raises:
      ConfigError: a checkpoint or data that cannot be read, or a layout that does not fit.
      RunError: a loss that is not a number.
    """
    if stride is not None and not 1 <= stride <= length:
        raise ConfigError(f"stride={stride}; expected 1 to batch.length={length}")
    laid = _laid_out(checkpoint, data, length, tokens, text_key, stride, say)
    config = dataclasses.replace(base, model=checkpoint.model)
    config = forward_config(config, mesh, laid.width)
    devices = jax.devices() if mesh else jax.devices()[:1]
    grid, layout = meshes.build(config.mesh, devices), meshes.layout(config)
    with jax.set_mesh(grid):
        recipe = execution.of(config).recipe
        _, stored, bias = split(checkpoint.load(recipe, layout, grid))
        score = make_score(config, layout, grid, like=stored)
        scores = [score(stored, bias, sequences, valid) for sequences, valid in laid.blocks]
    total = Score(math.fsum(part.nats for part in scores), sum(part.targets for part in scores))
    loss = total.nats / total.targets
    if math.isnan(loss):
        raise RunError(
            "the loss is not a number: activations overflow; compute in float32 "
            "(--dtype=float32), or look for damage in the weights"
        )
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": total.bits_per_byte(laid.bytes) if laid.bytes else None,
        "gzip_bits_per_byte": 8 * (laid.gzip_bytes or 0) / laid.bytes if laid.bytes else None,
        "tokens": total.targets,
        "bytes": laid.bytes,
        "documents": laid.documents,
        "length": laid.width,
    }


def _laid_out(
    checkpoint: Checkpoint,
    data: str,
    length: int,
    tokens: int,
    text_key: str,
    stride: int | None,
    say: Callable[[str], None],
) -> LaidOut:
    """Reads the data and lays it out, packed or apart, see `score_checkpoint`."""
    vocab = checkpoint.model.vocab
    if files := source.token_files(data):
        if stride is None:
            packed = scoring.of_tokens(files, vocab=vocab, length=length, tokens=tokens)
            return LaidOut([packed], packed[1].shape[1])
        marks = _marks(checkpoint, data)
        bodies = rolling.of_tokens(files, marks, vocab=vocab, tokens=tokens)
        return LaidOut(*rolling.lay_out(bodies, marks, length, stride), len(bodies))
    words = _tokenizer(checkpoint, data)
    documents = source.open_source(data, text_key, say, whole=True)
    if stride is None:
        text = scoring.of_text(documents, words, length=length, tokens=tokens)
        rows = [(text.sequences, text.valid)], text.valid.shape[1]
        return LaidOut(*rows, text.documents, text.bytes, text.gzip_bytes)
    bodies, raw = scoring.read(documents, words, tokens=tokens)
    laid = rolling.lay_out(bodies, words.marks, length, stride)
    return LaidOut(*laid, len(bodies), len(raw), len(gzip.compress(raw, 9)))


def _tokenizer(checkpoint: Checkpoint, data: str) -> Tokenizer:
    """The tokenizer of a checkpoint; ConfigError if there is none, or one of another model."""
    file, vocab = checkpoint.directory / "tokenizer.json", checkpoint.model.vocab
    words = checkpoint.tokenizer
    if words is None:
        raise ConfigError(
            f"{checkpoint.directory} has no tokenizer.json to read the text of --data={data} with; "
            "expected one there, or a token file (.npy or .bin) for --data"
        )
    if words.size > vocab:
        raise ConfigError(
            f"{file} has ids up to {words.size - 1}, and the model beside it knows 0 to "
            f"{vocab - 1}; expected the tokenizer that it was trained with"
        )
    return words


def _marks(checkpoint: Checkpoint, data: str) -> Marks:
    """Ids of BOS and EOS: of the tokenizer, or else those that config.json states."""
    if checkpoint.tokenizer is not None:
        return checkpoint.tokenizer.marks
    bos, eos = (checkpoint.text_settings.get(f"{name}_token_id") for name in ("bos", "eos"))
    eos = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(eos, int) or not isinstance(bos, int | None):
        raise ConfigError(
            f"{checkpoint.directory} has neither tokenizer.json nor eos_token_id in config.json, "
            f"one of which says where documents of --data={data} end; score them packed"
        )
    return Marks(eos, bos, None)
