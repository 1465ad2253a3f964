"""DeepSeek-V3, 671B parameters: the published model and recipe.

Sections, tables and equations are those of the DeepSeek-V3 technical report (arXiv 2412.19437); a
value that the report does not give has its source beside it. Every other config starts from this
one. `deepseek_jax/config/schema.py` describes each key.
"""

from ml_collections import ConfigDict

TRILLION = 10**12
BILLION = 10**9


def get_config() -> ConfigDict:
    """Config of DeepSeek-V3 as published, locked against unknown keys."""
    config = ConfigDict()
    config.seed = 0
    config.model = _model()
    # Section 3.1: 16-way pipeline, 64-way expert parallelism over 8 nodes, ZeRO-1; 2,048 GPUs.
    config.mesh = ConfigDict(dict(pipe=16, replica=2, node=8, gpu=8, tensor=1))
    config.layout = _layout()
    config.precision = ConfigDict(
        dict(
            recipe="fp8",  # section 3.3
            scales="power_of_two",  # of FP8 tiles and blocks; section 3.3.2, exact to requantise
            dispatch="fp8",  # section 3.3.3: FP8 to the experts, BF16 back; "compute" sends no FP8
            kernels="auto",  # where a GPU has passed their check
        )
    )
    config.optimizer = _optimizer()
    config.schedule = _schedule()
    config.batch = _batch()
    config.data = _data()
    config.checkpoint = ConfigDict(dict(every_steps=500, keep=3, on_failure="stop", restarts=5))
    config.anomaly = ConfigDict(
        dict(rule="stop", window=128, loss_score=20.0, grad_norm_score=100.0, most=8)
    )
    config.deadlines = ConfigDict(
        dict(join=300, start=3600, compile=3600, first_step=1800, step=0, save=1800,
             evaluation=3600, end=600)  # step 0: learnt
    )  # fmt: skip
    config.log = ConfigDict(dict(every_steps=10))
    config.evaluation = ConfigDict(dict(tokens=1 << 20))
    return config.lock()


def _model() -> ConfigDict:
    """Sizes and routing rules (section 4.2)."""
    return ConfigDict(
        dict(
            vocab=129_280,  # released config.json; 128K entries, padded
            layers=61,  # section 4.2
            dense_layers=3,  # section 4.2: all but the first three are MoE
            d_model=7168,  # section 4.2
            d_dense=18_432,  # released config.json: intermediate_size
            heads=128,  # section 4.2
            q_latent=1536,  # section 4.2; 0 for an uncompressed query projection (V2-Lite)
            kv_latent=512,  # section 4.2
            d_nope=128,  # section 4.2: per-head width
            d_rope=64,  # section 4.2: decoupled per-head width
            d_value=128,  # released config.json: v_head_dim
            index_heads=0,  # no indexer; V3.2 has 64
            index_width=128,  # V3.2's, without effect here
            index_top_k=2048,  # V3.2's, without effect here
            rope_theta=10_000.0,  # released config.json
            yarn_factor=1.0,  # off in pre-training at 4K; 40 in the context extension (section 4.3)
            yarn_original=4096,  # section 4.3
            yarn_beta_fast=32.0,  # section 4.3: beta
            yarn_beta_slow=1.0,  # section 4.3: alpha
            yarn_mscale=1.0,  # released config.json
            yarn_mscale_all_dim=1.0,  # released config.json
            experts=256,  # section 4.2
            shared_experts=1,  # section 4.2
            top_k=8,  # section 4.2
            groups=8,  # one group per node of the expert-parallel group (section 3.2)
            top_groups=4,  # section 4.2: at most four nodes per token
            d_expert=2048,  # section 4.2
            score="sigmoid",  # equation 15
            group_score="top2",  # section 2.1.2: sum of a group's best K_r/M, 8/4 = 2
            normalise_weights=True,  # equation 13
            routed_scale=2.5,  # released config.json: routed_scaling_factor
            swiglu_limit=0.0,  # V3 clamps nothing; 10 in V4
            mtp_depth=1,  # section 4.2
            norm_eps=1e-6,  # released config.json
            init_std=0.006,  # section 4.2
        )
    )


def _layout() -> ConfigDict:
    """Parallelism and memory (section 3)."""
    return ConfigDict(
        dict(
            zero=1,  # section 3.1
            dispatch="two_hop",  # section 3.2.2: over InfiniBand to nodes, then over NVLink
            capacity_factor=1.25,  # not published; tokens beyond go in overflow rounds
            micro_batches_in_flight=1,  # the pipeline overlaps chunks instead
            pipeline="dualpipe",  # section 3.2.1
            stage_layers=(),  # equally many, the last stages fewer
            ramps="mask",  # one program for all ticks
            defer_weight_gradients=False,  # True: fewer bubbles (section 3.2.1), far more memory
            cost_profile="",  # `plan step --costs` writes one
            communication_sms=20,  # section 3.2.2: SMs of a GPU that communication has
            recompute="attention",  # section 3.2.3, and attention: 7 GiB that a GPU lacks
            attention_block=512,  # not in the report
            unroll=1,  # not in the report
            loss_chunk=512,  # not in the report
            rules=dict(
                batch=("replica", "node", "gpu"),
                experts=("node", "gpu"),
                heads=("tensor",),
                dense_width=("gpu", "tensor"),
                expert_width=("tensor",),
                vocab=("gpu", "tensor"),
            ),
        )
    )


def _optimizer() -> ConfigDict:
    """AdamW (section 4.2) and the average of the weights."""
    return ConfigDict(
        dict(
            name="adamw",  # section 4.2
            muon_momentum=0.95,  # arXiv 2502.16982; without effect on AdamW
            muon_rms=0.2,  # arXiv 2502.16982; without effect on AdamW
            b1=0.9,  # section 4.2
            b2=0.95,  # section 4.2
            eps=1e-8,  # not published; Adam's default
            weight_decay=0.1,  # section 4.2
            decayed="matrices",  # not published
            clip=1.0,  # section 4.2
            moments="bfloat16",  # section 3.3.3
            ema_decay=0.999,  # section 3.2.3 keeps an EMA in CPU memory; the decay is not published
        )
    )


def _schedule() -> ConfigDict:
    """Schedules of section 4.2; every number of tokens counts from the start of training."""
    return ConfigDict(
        dict(
            tokens=14_800 * BILLION,
            learning_rate=2.2e-4,
            warmup_steps=2000,
            decay_start=10 * TRILLION,
            decay_end=14_300 * BILLION,  # cosine decay over 4.3T tokens
            decayed_learning_rate=2.2e-5,  # constant for 333B tokens
            final_start=14_633 * BILLION,
            final_learning_rate=7.3e-6,  # constant for the last 167B tokens
            bias_speed=0.001,  # gamma
            bias_stop=14_300 * BILLION,  # gamma = 0 for the last 500B tokens
            balance_alpha=0.0001,  # alpha
            mtp_weight=0.3,  # lambda for the first 10T tokens
            late_mtp_weight=0.1,  # lambda for the rest
            mtp_switch=10 * TRILLION,
            index_phase="sparse",  # without effect: no indexer
            index_weight=1.0,  # without effect: no indexer
        )
    )


def _batch() -> ConfigDict:
    """Batch size and sequence length (section 4.2)."""
    return ConfigDict(
        dict(
            length=4096,  # section 4.2
            sequences=15_360,  # section 4.2
            ramp_sequences=3072,  # section 4.2: first batch size
            ramp_tokens=469 * BILLION,  # section 4.2; the shape of the ramp is not published
            micro_sequences=128,  # one sequence per data-parallel rank
        )
    )


def _data() -> ConfigDict:
    """Training data (section 4.1)."""
    return ConfigDict(
        dict(
            path="",  # Python's standard library, so that every config runs without a download
            tokenizer="bpe",  # trained on the data; the report's is "deepseek"
            text_key="text",
            cache="",  # the user's cache folder
            fim_rate=0.1,  # section 4.1: prefix-suffix-middle, at document level
            held_out=0.02,  # not in the report
        )
    )


def scale_schedule(config: ConfigDict, tokens: int) -> None:
    """Scales the boundaries of the schedule to another number of tokens, in place."""
    factor = tokens / config.schedule.tokens
    for key in ("decay_start", "decay_end", "final_start", "bias_stop", "mtp_switch", "tokens"):
        config.schedule[key] = round(config.schedule[key] * factor)
    config.batch.ramp_tokens = round(config.batch.ramp_tokens * factor)
