"""Config dataclasses: the keys of a run with meaning, unit and allowed values.

`parse` builds a `Config` from a ConfigDict and checks it as a whole, before anything is compiled or
written. No key has a default here: the published values and their sources are in
`configs/v3_671b.py`. Integers are at least 1 and other numbers above 0 unless a line differs.
"""

import dataclasses
import json
from collections.abc import Mapping


class ConfigError(ValueError):
    """A config that cannot work; the message names the key and, where known, a value that fits."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and routing rules of the model (section 2). Widths count elements.

    Attributes:
      vocab: Rows of the embedding and of the output head.
      layers: Transformer layers, without MTP modules.
      dense_layers: First layers whose feed-forward network is dense; from 0 to `layers`.
      d_model: Width of the residual stream.
      d_dense: Hidden width of a dense feed-forward network.
      heads: Attention heads.
      q_latent: Width of the query latent (MLA, W^DQ); 0 for one uncompressed query projection.
      kv_latent: Width of the key-value latent (MLA, W^DKV), which decoding caches.
      d_nope: Query and key width per head without rotary embedding.
      d_rope: Query and key width per head with rotary embedding; even.
      d_value: Value width per head.
      index_heads: Heads of the lightning indexer (V3.2), which needs `q_latent`; 0 for none.
      index_width: Width of an index query or key per head; at least `d_rope`.
      index_top_k: Positions that a query attends to where the indexer chooses them.
      rope_theta: Base of the rotary frequencies; above 1.
      yarn_factor: Context extension by YaRN, a multiple of `yarn_original`; at least 1, 1 is off.
      yarn_original: Context length of pre-training, in tokens.
      yarn_beta_fast: Rotations in `yarn_original` above which a pair is kept; > `yarn_beta_slow`.
      yarn_beta_slow: Rotations in `yarn_original` below which a pair is slowed by the factor.
      yarn_mscale: Numerator of YaRN's scale m(yarn_mscale)/m(yarn_mscale_all_dim); 0 to 1000.
      yarn_mscale_all_dim: Denominator of that scale; its square scales all logits; 0 to 1000.
      experts: Routed experts of an MoE layer.
      shared_experts: Experts that every token uses, computed as one network; at least 0.
      top_k: Routed experts of a token.
      groups: Equal groups of experts for node-limited routing; divides `experts`.
      top_groups: Groups that the experts of one token may lie in; at most `groups`.
      d_expert: Hidden width of one expert, routed or shared.
      score: Affinity function: "sigmoid" (equation 15), "softmax" (V2) or "sqrtsoftplus" (V4).
      group_score: Affinity of a group: "top2", the sum of its best two experts, or "max", its best.
      normalise_weights: True divides the chosen affinities by their sum (equation 13).
      routed_scale: Factor of the routed experts' weighted sum; at most 1000.
      swiglu_limit: Largest gate, and largest magnitude of up, in SwiGLU (V4); 0 is off; to 1e6.
      mtp_depth: MTP modules, each predicting one token further (section 2.2); from 0 to 4.
      norm_eps: Epsilon of RMSNorm; from 1e-20 to 1.
      init_std: Standard deviation of the initial weights; from 1e-12 to 100.
    """

    vocab: int
    layers: int
    dense_layers: int
    d_model: int
    d_dense: int
    heads: int
    q_latent: int
    kv_latent: int
    d_nope: int
    d_rope: int
    d_value: int
    index_heads: int
    index_width: int
    index_top_k: int
    rope_theta: float
    yarn_factor: float
    yarn_original: int
    yarn_beta_fast: float
    yarn_beta_slow: float
    yarn_mscale: float
    yarn_mscale_all_dim: float
    experts: int
    shared_experts: int
    top_k: int
    groups: int
    top_groups: int
    d_expert: int
    score: str
    group_score: str
    normalise_weights: bool
    routed_scale: float
    swiglu_limit: float
    mtp_depth: int
    norm_eps: float
    init_std: float

    @property
    def moe_layers(self) -> int:
        """Layers whose feed-forward network is a mixture of experts, without MTP modules."""
        return self.layers - self.dense_layers

    @property
    def d_shared(self) -> int:
        """Hidden width of the shared experts, which are computed as one network."""
        return self.shared_experts * self.d_expert


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, outermost first.

    Each is at least 1. At most one may be -1, which takes all devices that the others leave.

    Attributes:
      pipe: Pipeline-parallel ranks; even with `layout.pipeline="dualpipe"`.
      replica: Data-parallel replicas of the expert-parallel group.
      node: Data-parallel nodes of the expert-parallel group, joined by InfiniBand.
      gpu: Data-parallel GPUs of a node, joined by NVLink.
      tensor: Tensor-parallel ranks, which see the same tokens.
    """

    pipe: int
    replica: int
    node: int
    gpu: int
    tensor: int


MESH_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))  # outermost first

DATA_AXES = ("replica", "node", "gpu")  # data parallelism: devices along them see different tokens

# Logical axes of parameters and activations -> mesh axes that a rule may split them over. The model
# has the collectives that keep the result the same for these splits only.
SPLITS: dict[str, tuple[str, ...]] = {
    "batch": DATA_AXES,
    "layer": (),
    "model": (),
    "vocab": ("gpu", "tensor"),
    "heads": ("tensor",),
    "q_latent": (),
    "kv_latent": (),
    "head_width": (),
    "dense_width": ("gpu", "tensor"),
    "expert_width": ("tensor",),
    "experts": DATA_AXES,
}

LOGICAL_AXES = tuple(SPLITS)


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """Parallelism and memory. No key of this section changes what is computed.

    Attributes:
      zero: ZeRO stage: 0 off; 1 shards masters and moments; 3 also the weights, gathered by layer.
      dispatch: Path to experts: "two_hop" (node, then GPU), "flat", or "reference" (no all-to-all).
      capacity_factor: Slots of one dispatch round, as a multiple of a balanced load (dropless).
      micro_batches_in_flight: Micro-batches run together by a layer, 1 or 2; 1 with a pipeline.
      pipeline: Schedule with `mesh.pipe` > 1: "dualpipe", "dualpipev" (half the weights) or "1f1b".
      stage_layers: Layers of each stage, with sum `model.layers`; () for equally many, last fewer.
      ramps: Ticks that fill and drain the pipeline: "mask" computes and discards, "skip" branches.
      defer_weight_gradients: True delays weight gradients into DualPipe's bubbles, for more memory.
      cost_profile: Path of a .pbtxt of instruction costs for XLA's GPU scheduler; "" for none.
      communication_sms: SMs that kernels leave free where experts are on several GPUs; 0 to 64.
      recompute: Policy: "none", "report" (norms, up-projections, scores...), "attention" or "full".
      attention_block: Query rows of attention that are scored at once.
      unroll: Layers compiled one after another; 1 is one loop body, the fastest to compile.
      loss_chunk: Rows (tokens of any head) of a chunk, whose logits a device computes together.
      rules: Table: logical axis -> mesh axes it is split over; an absent axis is not split.
    """

    zero: int
    dispatch: str
    capacity_factor: float
    micro_batches_in_flight: int
    pipeline: str
    stage_layers: tuple[int, ...]
    ramps: str
    defer_weight_gradients: bool
    cost_profile: str
    communication_sms: int
    recompute: str
    attention_block: int
    unroll: int
    loss_chunk: int
    rules: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class PrecisionConfig:
    """Number formats of computation and communication.

    Attributes:
      recipe: Format of weights and matmuls: "float32", "bfloat16", "fp8"; masters are float32.
      scales: Scales of FP8 tiles and blocks: "power_of_two" or "free"; other recipes ignore it.
      dispatch: Format of tokens sent to experts: "compute", as they are, or "fp8" (section 3.3.3).
      kernels: GPU kernels: "auto", each that passes its check at the start of a run; or "portable".
    """

    recipe: str
    scales: str
    dispatch: str
    kernels: str


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the average of the weights (section 4.2).

    Attributes:
      name: Optimizer: "adamw", or "muon", which has Muon for the matrices of linear layers.
      muon_momentum: Decay of Muon's momentum; from 0, below 1.
      muon_rms: Root mean square of Muon's update, times the learning rate; from 1e-3 to 10.
      b1: Decay of the first moment; from 0, below 1.
      b2: Decay of the second moment; from 0, below 1, at most 0.99 with bfloat16 moments.
      eps: Epsilon added to the root of the second moment; from 1e-20 to 1.
      weight_decay: Decoupled weight decay, times the learning rate; at least 0.
      decayed: Weights that decay: "matrices", all but the scales of norms, or "all".
      clip: Largest global norm of the gradient; at least 1e-12.
      moments: Format in which both moments are kept: "float32" or "bfloat16" (section 3.3.3).
      ema_decay: Decay per step of the exponential moving average of weights; from 0 (off), below 1.
    """

    name: str
    muon_momentum: float
    muon_rms: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    decayed: str
    clip: float
    moments: str
    ema_decay: float


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate, balancing and MTP weight over the run (section 4.2).

    Every boundary counts consumed tokens from the start of the run, except `warmup_steps`.

    Attributes:
      tokens: Tokens at which the run ends.
      learning_rate: Peak learning rate, after the warm-up; at least 1e-12.
      warmup_steps: Optimiser steps of the linear warm-up; at least 0, over by `decay_start`.
      decay_start: Tokens at which the cosine decay starts; from 0 to `decay_end`.
      decay_end: Tokens at which the cosine decay ends; from `decay_start` to `final_start`.
      decayed_learning_rate: Learning rate at the end of the decay, held until `final_start`.
      final_start: Tokens from which the final learning rate holds; at least `decay_end`.
      final_learning_rate: Learning rate from `final_start` to the end.
      bias_speed: Change of the router bias per step (gamma); from 0 (off) to 1000.
      bias_stop: Tokens from which the router bias stays as it is; at least 0.
      balance_alpha: Weight of the sequence-wise balance loss (equation 17); 0 (off) to 1000.
      mtp_weight: Weight of the mean MTP loss (lambda, equation 25) before `mtp_switch`; to 1000.
      late_mtp_weight: Weight of the mean MTP loss from `mtp_switch` on; from 0 to 1000.
      mtp_switch: Tokens at which the MTP weight changes; at least 0.
      index_phase: Training of V3.2's indexer: "warm_up", it alone; or "sparse", with all weights.
      index_weight: Weight of the indexer's loss, which moves the indexer alone; 0 (off) to 1000.
    """

    tokens: int
    learning_rate: float
    warmup_steps: int
    decay_start: int
    decay_end: int
    decayed_learning_rate: float
    final_start: int
    final_learning_rate: float
    bias_speed: float
    bias_stop: int
    balance_alpha: float
    mtp_weight: float
    late_mtp_weight: float
    mtp_switch: int
    index_phase: str
    index_weight: float


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Batch of one optimiser step, counted over all devices.

    Attributes:
      length: Tokens of a sequence; at least 2.
      sequences: Sequences of a step after the ramp; a multiple of `micro_sequences`.
      ramp_sequences: Sequences of the first step; a multiple of `micro_sequences`, <= `sequences`.
      ramp_tokens: Tokens over which the batch grows linearly to `sequences`; 0 for no ramp.
      micro_sequences: Sequences of a micro-batch; a multiple of the devices that split the batch.
    """

    length: int
    sequences: int
    ramp_sequences: int
    ramp_tokens: int
    micro_sequences: int


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training text and its tokens (section 4.1).

    Attributes:
      path: Text, JSONL, Parquet or token file, or a folder; "" for the Python library's source.
      tokenizer: Name "bpe" (trained here), "byte" or "deepseek", or the path of a tokenizer.json.
      text_key: Field of JSONL and Parquet rows that holds the text.
      cache: Folder of tokenizers and tokens; "" for the user's cache folder.
      fim_rate: Share of documents in fill-in-the-middle form (prefix-suffix-middle); from 0 to 1.
      held_out: Share of documents that are never trained on; above 0, below 1.
    """

    path: str
    tokenizer: str
    text_key: str
    cache: str
    fim_rate: float
    held_out: float


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of the training state.

    Attributes:
      every_steps: Optimiser steps between checkpoints.
      keep: Newest checkpoints that are kept.
      on_failure: Whether a run "stop"s that cannot write one, or goes on to the next ("continue").
      restarts: Starts in a row that may fail without a new checkpoint; 0 for any number.
    """

    every_steps: int
    keep: int
    on_failure: str
    restarts: int


@dataclasses.dataclass(frozen=True)
class AnomalyConfig:
    """Steps whose loss or gradient norm is NaN, infinite, or far above those before it.

    A limit is median + score x scale of the last `window` steps, where scale is the larger of
    1.4826 x MAD and a share of the median (`train/anomalies.py`).

    Attributes:
      rule: Whether to "stop" there, "skip" the update, or "rewind" to a checkpoint.
      window: Steps whose median and MAD make the limits; there are none before so many; from 8.
      loss_score: Score of the limit of the loss; 0 for none, and NaN and infinity alone count.
      grad_norm_score: Score of the limit of the gradient norm; 0 for none.
      most: Anomalies with fewer than `window` good steps between them after which the run stops.
    """

    rule: str
    window: int
    loss_score: float
    grad_norm_score: float
    most: int


@dataclasses.dataclass(frozen=True)
class DeadlineConfig:
    """Seconds that a section of a run may take, until the process that is behind is named.

    Attributes:
      join: From the start of a process until all processes of the run have come.
      start: Opening data and restoring a checkpoint.
      compile: Compiling the training step.
      first_step: The first step after a start.
      step: A step, from one to the next; 0 learns it from the run's own median.
      save: The part of a save for which the steps wait.
      evaluation: Scoring held-out text at the end.
      end: Waiting for the other processes at the end.
    """

    join: int
    start: int
    compile: int
    first_step: int
    step: int
    save: int
    evaluation: int
    end: int


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Metrics of the run.

    Attributes:
      every_steps: Optimiser steps between rows of metrics.
    """

    every_steps: int


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation at the end of the run.

    Attributes:
      tokens: Held-out tokens that are scored; 0 for no evaluation.
    """

    tokens: int


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run.

    Attributes:
      seed: Seed of initial weights, document order and fill-in-the-middle; from 0 to 2**32 - 1.
      model: Sizes and routing rules of the model.
      mesh: Devices along each mesh axis.
      layout: Parallelism and memory.
      precision: Number formats of computation and communication.
      optimizer: AdamW and the average of the weights.
      schedule: Learning rate, balancing and MTP weight over the run.
      batch: Batch of one optimiser step.
      data: Training text and its tokens.
      checkpoint: Checkpoints of the training state.
      anomaly: Steps that are not finite, or spikes.
      deadlines: Seconds that a section of a run may take.
      log: Metrics of the run.
      evaluation: Evaluation at the end of the run.
    """

    seed: int
    model: ModelConfig
    mesh: MeshConfig
    layout: LayoutConfig
    precision: PrecisionConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    batch: BatchConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    anomaly: AnomalyConfig
    deadlines: DeadlineConfig
    log: LogConfig
    evaluation: EvaluationConfig

    def to_json(self) -> str:
        """Resolved config in the form of `config.json`, which `from_json` reads back."""
        return json.dumps(dataclasses.asdict(self), indent=2)
