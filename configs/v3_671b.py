"""DeepSeek-V3, 671B parameters: the published model and recipe.

Sections and tables are those of the DeepSeek-V3 technical report (arXiv 2412.19437). Values that the
report does not give say where they come from. Every other config imports this one and changes sizes.
"""

from ml_collections import ConfigDict

TRILLION = 10**12
BILLION = 10**9


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0

    config.model = ConfigDict(
        dict(
            vocab=129_280,  # released config.json; 128K entries, padded
            layers=61,  # section 4.2
            dense_layers=3,  # section 4.2: all but the first three are MoE
            d_model=7168,  # section 4.2
            d_dense=18_432,  # released config.json: intermediate_size
            heads=128,  # section 4.2
            q_latent=1536,  # section 4.2; 0 for a plain query projection (V2-Lite)
            kv_latent=512,  # section 4.2
            d_nope=128,  # section 4.2: per-head width
            d_rope=64,  # section 4.2: decoupled per-head width
            d_value=128,  # released config.json: v_head_dim
            rope_theta=10_000.0,  # released config.json
            yarn_factor=1.0,  # off while pre-training at 4K; 40 from the extension on (section 4.3)
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
            group_score="top2",  # section 2.1.2: sum of the top K/M affinities of a node, 8/4 = 2
            normalise_weights=True,  # equation 13
            routed_scale=2.5,  # released config.json: routed_scaling_factor
            mtp_depth=1,  # section 4.2
            norm_eps=1e-6,  # released config.json
            init_std=0.006,  # section 4.2
        )
    )

    # Section 3.1: 16-way pipeline, 64-way expert parallelism over 8 nodes, ZeRO-1; 2,048 GPUs.
    config.mesh = ConfigDict(dict(pipe=16, replica=2, node=8, gpu=8, tensor=1))
    config.layout = ConfigDict(
        dict(
            zero=1,  # section 3.1
            dispatch="two_hop",  # section 3.2.2: over nodes, then inside one
            capacity_factor=1.25,  # slots for tokens on their way, as a multiple of a balanced router's load
            micro_batches_in_flight=1,  # 2: attention of one under the all-to-all of the other
            pipeline="dualpipe",  # section 3.2.1; "dualpipev" holds stages once, "1f1b" overlaps none
            stage_layers=(),  # layers of each stage; () is equally many, the last ones fewer
            ramps="mask",  # ticks that fill and drain the pipeline make and drop, or "skip", idle work
            defer_weight_gradients=False,  # until neighbours have been served: less bubble, far more memory
            cost_profile="",  # a file of what each instruction costs, for the GPU's scheduler
            recompute="full",  # "report", section 3.2.3's, needs activations in FP8: in BF16 123 GiB
            attention_block=512,  # query rows that are scored at once
            unroll=1,  # layers compiled one after another; 1 is a plain loop, fast to compile
            loss_chunk=512,  # tokens whose logits are held at once, per device
            rules=dict(  # logical axis -> mesh axes; an axis that is not named here is never split
                batch=("replica", "node", "gpu"),
                experts=("node", "gpu"),
                heads=("tensor",),
                dense_width=("gpu", "tensor"),
                expert_width=("tensor",),
                vocab=("gpu", "tensor"),
            ),
        )
    )
    config.precision = ConfigDict(
        dict(
            recipe="bfloat16",
            dispatch="fp8",  # section 3.3.2: FP8 to the experts, BF16 back; "compute" sends all as is
        )
    )

    config.optimizer = ConfigDict(
        dict(
            b1=0.9,  # section 4.2
            b2=0.95,  # section 4.2
            eps=1e-8,  # not published; the usual value
            weight_decay=0.1,  # section 4.2
            decayed="matrices",  # not published: norms are left alone; "all" decays them too
            clip=1.0,  # section 4.2
            moments="bfloat16",  # section 3.3.3
            ema_decay=0.999,  # section 3.2.3 keeps an EMA in CPU memory; the decay is not published
        )
    )

    # Section 4.2, all counted in consumed tokens except the warm-up.
    config.schedule = ConfigDict(
        dict(
            tokens=14_800 * BILLION,
            learning_rate=2.2e-4,
            warmup_steps=2000,
            decay_start=10 * TRILLION,  # cosine from here ...
            decay_end=14_300 * BILLION,  # ... to here, over 4.3T tokens
            decayed_learning_rate=2.2e-5,  # held for 333B tokens
            final_start=14_633 * BILLION,
            final_learning_rate=7.3e-6,  # held for the last 167B tokens
            bias_speed=0.001,  # gamma
            bias_stop=14_300 * BILLION,  # 0 for the last 500B tokens
            balance_alpha=0.0001,  # weight of the sequence-wise balance loss
            mtp_weight=0.3,  # lambda
            late_mtp_weight=0.1,
            mtp_switch=10 * TRILLION,
        )
    )

    config.batch = ConfigDict(
        dict(
            length=4096,  # section 4.2
            sequences=15_360,  # section 4.2
            ramp_sequences=3072,  # section 4.2: where the ramp starts
            ramp_tokens=469 * BILLION,  # section 4.2; linear in tokens (its shape is not published)
            micro_sequences=128,  # one sequence per data-parallel rank at a time
        )
    )

    config.data = ConfigDict(
        dict(
            path="",  # text, JSONL, Parquet, token files or a folder; "" is Python's own source
            tokenizer="bpe",  # trained on the data; "byte", "deepseek" or a tokenizer.json
            text_key="text",  # the field that JSONL and Parquet rows keep their text in
            cache="",  # where tokenizers and tokens are kept; "" is the user's cache folder
            fim_rate=0.1,  # section 4.1: prefix-suffix-middle, at document level
            held_out=0.02,  # share of the documents that is never trained on
        )
    )

    config.checkpoint = ConfigDict(dict(every_steps=500, keep=3))
    config.log = ConfigDict(dict(every_steps=10))
    config.evaluation = ConfigDict(dict(tokens=1 << 20))  # held-out tokens scored at the end
    return config.lock()


def scale_schedule(config: ConfigDict, tokens: int) -> None:
    """Keeps the proportions of the published schedule over another number of tokens, in place."""
    factor = tokens / config.schedule.tokens
    for key in ("decay_start", "decay_end", "final_start", "bias_stop", "mtp_switch", "tokens"):
        config.schedule[key] = round(config.schedule[key] * factor)
    config.batch.ramp_tokens = round(config.batch.ramp_tokens * factor)
