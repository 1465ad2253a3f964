"""The Python surface: `model = deepseek_jax.load(DIR)`, `out = model(tokens)`."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint import conversion, new_folder
from deepseek_jax.checkpoint import load as checkpoints
from deepseek_jax.checkpoint.load import Checkpoint
from deepseek_jax.config import MESH_AXES, ConfigError, MeshConfig, ModelConfig
from deepseek_jax.hardware import machine_memory
from deepseek_jax.model import decoding, execution, params
from deepseek_jax.model.execution import Execution
from deepseek_jax.model.loss import head_loss
from deepseek_jax.model.router import Routing
from deepseek_jax.model.transformer import Transformer

DTYPES = ("float32", "bfloat16", "fp8")
FILE_BYTES = 5 * 10**9  # size of the largest file of `Model.save`
LOSS_CHUNK = 512  # tokens whose logits `Model.loss` holds at once


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """Outputs of the model for tokens BT.

    Attributes:
      logits: BTV float32; position i predicts token i + 1.
      mtp_logits: BTV float32 for each MTP module k = 0, 1, ...: position i reads token i + k + 1
        and predicts token i + k + 2. The last k + 1 positions would read past the end: their logits
        mean nothing, and neither does the module's routing there.
      routing: by layer number, of MoE layers only; module k's is under `layers` + k. `.experts` is
        BTK int32, best first, and `.weights` BTK float32, the final gate values.
      hidden: BTD, the head's input: after the final norm, in the dtype of the matmuls.
    """

    logits: jax.Array
    mtp_logits: tuple[jax.Array, ...]
    routing: dict[int, Routing]
    hidden: jax.Array


@dataclasses.dataclass(frozen=True)
class Model:
    """A model on one device; each shape of tokens is compiled once.

    Attributes:
      config: sizes and rules of the model.
      weights: the Flax module that holds the parameters.
      how: precision and other choices of the forward pass.
      source: the opened checkpoint.
    """

    config: ModelConfig
    weights: Transformer
    how: Execution
    source: Checkpoint

    def __call__(self, tokens: Any) -> Output:
        """Outputs for tokens BT, integers from 0 to `config.vocab` - 1.

        Raises:
          ValueError: other tokens, or so many that their logits exceed the device's memory.
        """
        heads = 1 + self.config.mtp_depth
        tokens = self._checked(tokens, least=1, numbers=heads * self.config.vocab)
        return _forward(self.weights, tokens, self.how)

    def loss(self, tokens: Any) -> jax.Array:
        """Mean cross entropy, in nats, of the B(T - 1) next tokens, () float32; no other term."""
        tokens = self._checked(tokens, least=2, numbers=self.config.d_model)
        return _loss(self.weights, tokens, self.how)

    def selected(self, tokens: Any) -> tuple[jax.Array, ...]:
        """Positions that the indexers of V3.2 select for tokens BT, best first, by layer.

        Each is BTK int32, K the smaller of T and `config.index_top_k`; a token that sees fewer
        positions has -1 in place of the rest. Without an indexer there is nothing: ().

        Raises:
          ValueError: other tokens, or so many that their index scores exceed the device's memory.
        """
        if not self.config.index_heads:
            return ()
        length = np.shape(tokens)[-1] if np.ndim(tokens) else 0
        tokens = self._checked(tokens, least=1, numbers=self.config.index_heads * length)
        return _selected(self.weights, tokens, self.how)

    def save(self, directory: str | Path) -> None:
        """Writes a Hugging Face directory with these weights, in the format of their dtype.

        Settings and tokenizer are those of the source. FP8 weights are written as they are: from a
        checkpoint in FP8 blocks, byte for byte what was read.

        Args:
          directory: a folder that does not exist, or is empty.

        Raises:
          ConfigError: a folder that cannot be written, or a model without a published form.
        """
        target, form = Path(directory), self.how.recipe.name
        new_folder.check_target(target)
        conversion.to_published(self.source, target, form, FILE_BYTES, self.weights)

    def _checked(self, tokens: Any, *, least: int, numbers: int) -> jax.Array:
        """Tokens as an array, of which each has that many float32 numbers at the same time."""
        try:
            values = np.asarray(tokens)
        except ValueError as error:  # NumPy's, for rows of unequal lengths
            raise ValueError("tokens have rows of unequal lengths; pad them at the end") from error
        integers = np.issubdtype(values.dtype, np.integer)
        if values.ndim != 2 or not integers or not values.shape[0] or values.shape[1] < least:
            raise ValueError(
                f"tokens are {values.dtype}{list(values.shape)}; expected integers [sequences, "
                f"length], at least 1 and {least}"
            )
        needed = 4 * values.size * numbers
        had = machine_memory.device_bytes() or machine_memory.host_bytes()
        if had is not None and needed > had:
            raise ValueError(
                f"tokens are {values.dtype}{list(values.shape)}, whose outputs take "
                f"{machine_memory.text(needed)} of {machine_memory.text(had)}; pass fewer at once"
            )
        if values.min() < 0 or values.max() >= self.config.vocab:
            raise ValueError(
                f"tokens go from {values.min()} to {values.max()}; expected 0 to "
                f"{self.config.vocab - 1}"
            )
        return jnp.asarray(values, jnp.int32)


def load(directory: str | Path, dtype: Any = "float32") -> Model:
    """Loads a model for use from Python onto the default device.

    Args:
      directory: a Hugging Face checkpoint (config.json and safetensors files), or the workdir of a
        training run, whose newest readable checkpoint is taken.
      dtype: dtype of weights and matmuls, float32 or bfloat16, as a name or a dtype; or "fp8". The
        default is float32 whatever the checkpoint is stored in: it holds every stored value. None
        is the dtype that the commands take: the one that config.json states, or that the run
        trained in. Norms, router and softmax are float32 always. With "fp8" linear layers multiply
        in E4M3 and the rest is bfloat16. Weights that a published checkpoint holds in FP8 blocks
        then keep their values and scales, and take a byte each; other weights of linear layers are
        loaded in float32 and quantised. Scales are powers of two where config.json has scale_fmt
        "ue8m0" or the run's precision.scales says so, else free.

    Raises:
      ConfigError: a directory that cannot be loaded; the message says what was found and expected.
    """
    name = _name(dtype)  # refused before a file is opened
    checkpoint = checkpoints.open_checkpoint(Path(directory))
    mesh = MeshConfig(**dict.fromkeys(MESH_AXES, 1))
    config = dataclasses.replace(checkpoint.config(name), mesh=mesh)
    recipe = execution.recipe_of(config, serving=name is None)
    model = params.prepare(checkpoint.load(recipe), recipe)
    return Model(model.config, model, Execution(recipe=recipe), checkpoint)


def _name(dtype: Any) -> str | None:
    """The recipe that `load` is asked for, by name; None for the checkpoint's own."""
    if dtype is None or (isinstance(dtype, str) and dtype in DTYPES):
        return dtype
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype is {name!r}; expected {', '.join(DTYPES)}")
    return name


@functools.partial(jax.jit, static_argnames="how")
def _forward(model: Transformer, tokens: jax.Array, how: Execution) -> Output:
    config = model.config
    logits, hidden = model(tokens, how)
    routing: dict[int, Routing] = {}
    stacks = ((config.dense_layers, hidden.routing), (config.layers, hidden.mtp_routing))
    for first, stacked in stacks:
        for layer in range(0 if stacked is None else stacked.experts.shape[0]):
            routing[first + layer] = jax.tree.map(lambda x, i=layer: x[i], stacked)
    mtp_logits = tuple(logits[1 + k] for k in range(config.mtp_depth))
    return Output(logits[0], mtp_logits, routing, hidden.heads[0])


@functools.partial(jax.jit, static_argnames="how")
def _selected(model: Transformer, tokens: jax.Array, how: Execution) -> tuple[jax.Array, ...]:
    return decoding.selected(model, tokens, how)


@functools.partial(jax.jit, static_argnames="how")
def _loss(model: Transformer, tokens: jax.Array, how: Execution) -> jax.Array:
    rows = model.trunk(tokens[:, :-1], how).hidden.reshape(-1, model.config.d_model)  # BSD -> (BS)D
    weights = jnp.full(rows.shape[:1], 1 / rows.shape[0], jnp.float32)
    targets = tokens[:, 1:].reshape(-1)
    chunk = min(LOSS_CHUNK, rows.shape[0])
    return head_loss(rows, model.head.table[...], targets, weights, chunk)[0]
