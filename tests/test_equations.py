"""The reference equations, against values of an independent implementation and by property."""

import json
from pathlib import Path

import numpy as np
import optax
import pytest
from equations import attention, checkpoints, cost, loss, model, moe, recipe, rotary, router
from equations.block import block
from equations.norm import float64, part
from safetensors.numpy import load_file

FIXTURE = Path(__file__).parent / "fixtures" / "hf_tiny"
FLOAT32 = 2e-4  # absolute: what independent float32 implementations agree to (hidden, logits)

V3 = {
    "num_hidden_layers": 61, "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "topk_method": "noaux_tc", "num_attention_heads": 128, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "vocab_size": 129280, "num_nextn_predict_layers": 1, "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
        "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    """Settings, weights, and what an implementation that is not ours computes for them."""
    settings = json.loads((FIXTURE / "config.json").read_text())
    return (
        settings,
        load_file(FIXTURE / "model.safetensors"),
        dict(np.load(FIXTURE / "expected.npz")),
    )


@pytest.fixture(scope="module")
def run(tiny):
    settings, weights, expected = tiny
    return model.forward(settings, weights, expected["input_ids"])


def test_hidden_states_logits_and_loss_of_the_fixture(tiny, run):
    _, _, expected = tiny
    for layer, hidden in enumerate(run.hidden):
        np.testing.assert_allclose(hidden, expected[f"hidden_{layer}"], atol=FLOAT32, rtol=0)
    for layer, out in enumerate(run.attention):
        np.testing.assert_allclose(out, expected[f"attn_out_{layer}"], atol=FLOAT32, rtol=0)
    np.testing.assert_allclose(run.final_norm, expected["final_norm"], atol=FLOAT32, rtol=0)
    np.testing.assert_allclose(run.logits, expected["logits"], atol=FLOAT32, rtol=0)
    assert abs(run.loss - expected["loss"]) < 1e-5


def test_routing_of_the_fixture(tiny, run):
    _, _, expected = tiny
    assert sorted(run.routing) == [1, 2, 3]
    for layer, routing in run.routing.items():
        np.testing.assert_allclose(
            routing.logits, expected[f"router_logits_{layer}"], atol=FLOAT32, rtol=0
        )
        np.testing.assert_array_equal(routing.experts, expected[f"topk_indices_{layer}"])
        np.testing.assert_allclose(
            routing.weights, expected[f"topk_weights_{layer}"], atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("file", ["config.json", "config.hf5.json"])
def test_both_spellings_of_the_rotary_settings(tiny, file):
    settings, expected = json.loads((FIXTURE / file).read_text()), tiny[2]
    np.testing.assert_allclose(rotary.frequencies(settings), expected["rope_inv_freq"], rtol=1e-6)
    assert rotary.cos_sin_factor(settings) == expected["rope_attention_scaling"]
    assert rotary.softmax_scale(settings) == pytest.approx(float(expected["softmax_scale"]))


def test_generated_tokens_of_the_fixture(tiny):
    settings, weights, expected = tiny
    steps = expected["gen_tokens"].shape[1]
    got, logits = model.greedy(settings, weights, expected["gen_prompt"], steps)
    np.testing.assert_array_equal(got, expected["gen_tokens"])
    np.testing.assert_allclose(logits, expected["gen_step_logits"], atol=FLOAT32, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.self_attn.q_b_proj.weight",
        "model.layers.1.self_attn.kv_a_layernorm.weight",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.mlp.experts.9.gate_proj.weight",
    ],
)
def test_gradients_of_the_fixture_along_random_directions(tiny, name):
    """Central differences of the loss; a step this small crosses no change of expert choice."""
    settings, weights, expected = tiny
    gradient = np.float64(expected[f"grad:{name}"])
    for seed in range(2):
        direction = np.random.default_rng(seed).standard_normal(gradient.shape)
        direction += gradient * np.sqrt(gradient.size) / np.linalg.norm(gradient)
        losses = [
            model.forward(
                settings,
                {**weights, name: np.float64(weights[name]) + step * direction},
                expected["input_ids"],
            ).loss
            for step in (1e-6, -1e-6)
        ]
        got = (losses[0] - losses[1]) / 2e-6
        np.testing.assert_allclose(got, np.sum(gradient * direction), rtol=2e-4)


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_nothing_sees_a_later_token(variant):
    settings, weights = checkpoints.make(variant)
    before = checkpoints.tokens(settings)
    after = before.copy()
    cut = before.shape[1] - 5
    after[:, cut:] = (after[:, cut:] + 1) % settings["vocab_size"]
    one, other = (model.forward(settings, weights, text) for text in (before, after))
    np.testing.assert_allclose(one.logits[:, :cut], other.logits[:, :cut], atol=1e-12)
    assert np.abs(one.logits[:, cut:] - other.logits[:, cut:]).max() > 1e-3
    for k, (left, right) in enumerate(zip(one.mtp_logits, other.mtp_logits, strict=True), 1):
        np.testing.assert_allclose(left[:, : cut - k], right[:, : cut - k], atol=1e-12)
        # Position i of depth k reads token i + k, so the change shows from cut - k on.
        assert np.abs(left[:, cut - k] - right[:, cut - k]).max() > 1e-3


@pytest.mark.parametrize("variant", ["v3", "no_q_latent", "yarn", "yarn_ratio"])
def test_absorbed_attention_is_attention(variant):
    settings, weights = checkpoints.make(variant)
    own = part(float64(weights), "model.layers.1.self_attn")
    h = np.random.default_rng(0).standard_normal((2, 70, settings["hidden_size"]))
    naive, fast = (f(h, own, settings) for f in (attention.attention, attention.absorbed))
    np.testing.assert_allclose(fast, naive, atol=1e-12)


def test_latent_norms_keep_their_own_eps():
    settings, weights = checkpoints.make("v3")
    own = part(float64(weights), "model.layers.1.self_attn")
    h = 1e-3 * np.random.default_rng(0).standard_normal((1, 9, settings["hidden_size"]))
    one, other = (
        attention.attention(h, own, {**settings, "rms_norm_eps": eps}) for eps in (1e-6, 1e-3)
    )
    np.testing.assert_array_equal(one, other)


def test_rotary_scores_depend_on_distance_alone():
    settings = checkpoints.make("yarn")[0]
    q, k = np.random.default_rng(0).standard_normal((2, 1, settings["qk_rope_head_dim"]))
    near, far = (
        rotary.rotate(q, np.array([at + 7]), settings)
        @ rotary.rotate(k, np.array([at]), settings).T
        for at in (3, 130)
    )
    np.testing.assert_allclose(near, far, rtol=1e-10)


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_choice_of_experts(variant):
    """Choice of experts, token by token, with plain lists."""
    settings, weights = checkpoints.make(variant)
    run = model.forward(settings, weights, checkpoints.tokens(settings)[:, :40])
    size = settings["n_routed_experts"] // settings["n_group"]
    for layer, routing in run.routing.items():
        bias = weights.get(f"model.layers.{layer}.mlp.gate.e_score_correction_bias", np.zeros(16))
        for s, experts, g in zip(
            routing.scores.reshape(-1, 16),
            routing.experts.reshape(-1, 4),
            routing.weights.reshape(-1, 4),
            strict=True,
        ):
            r = (s + np.float64(bias)).tolist()
            groups = [sorted(r[i : i + size]) for i in range(0, 16, size)]
            best = 2 if settings["topk_method"] == "noaux_tc" else 1
            ranked = sorted(range(len(groups)), key=lambda i: -sum(groups[i][-best:]))
            kept = ranked[: settings["topk_group"]]
            allowed = [e for e in range(16) if e // size in kept]
            want = sorted(sorted(allowed, key=lambda e: -r[e])[:4])
            assert experts.tolist() == want
            below = sum(s[want]) if settings["norm_topk_prob"] else 1.0
            np.testing.assert_allclose(g, settings["routed_scaling_factor"] * s[want] / below)
        assert routing.load.sum() == routing.experts.size


def test_negative_biases_do_what_they_are_for():
    """A mask of 0 in place of -inf would take a dropped expert (0) before a chosen one below 0."""
    settings, weights = checkpoints.make("no_q_latent")
    run = model.forward(settings, weights, checkpoints.tokens(settings))
    for layer, routing in run.routing.items():
        r = routing.scores + weights[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
        assert np.mean(r < 0) > 0.5
        assert np.mean((np.take_along_axis(r, routing.experts, -1) < 0).any(-1)) > 0.2


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_float32_cannot_change_the_choice(variant):
    """Scores differ by about 1e-6 between float32 implementations of models this small."""
    settings, weights = checkpoints.make(variant)
    run = model.forward(settings, weights, checkpoints.tokens(settings))
    routings = [*run.routing.values(), *(depth.routing for depth in run.mtp)]
    assert min(routing.margin.min() for routing in routings) > 2e-5


def test_mixture_without_limits_is_a_sum_over_all_experts():
    settings, weights = checkpoints.make("v2_lite")
    own = part(float64(weights), "model.layers.1.mlp")
    u = np.random.default_rng(0).standard_normal((1, 5, settings["hidden_size"]))
    out, routing = moe.mixture(u, own, {**settings, "num_experts_per_tok": 16})
    limit = settings.get("swiglu_limit", 0.0)
    want = moe.swiglu(u, part(own, "shared_experts"), limit)
    for e in range(16):
        want = want + routing.scores[..., e : e + 1] * moe.swiglu(
            u, part(own, f"experts.{e}"), limit
        )
    np.testing.assert_allclose(out, want, rtol=1e-12)


def test_balance():
    even = np.full((3, 8, 4), 0.25) + 0.1 * np.eye(4)[np.arange(8) % 4]
    np.testing.assert_allclose(router.sequence_balance(even, 1), 1.0)
    one_sided = np.tile([0.7, 0.1, 0.1, 0.1], (3, 8, 1))
    np.testing.assert_allclose(router.sequence_balance(one_sided, 1), 4 * 0.7)
    load = np.array([8, 0, 4, 4])
    assert router.max_violation(load) == 1.0
    np.testing.assert_allclose(
        router.move_bias(np.full(4, 0.5), load, 0.001), [0.499, 0.501, 0.5, 0.5]
    )


def test_mtp_projection_reads_the_embedding_first():
    """With the first D columns at zero, token i + 1 cannot reach position i of depth 1."""
    settings, weights = checkpoints.make("mtp")
    blind = weights["model.layers.3.eh_proj.weight"].copy()
    blind[:, : settings["hidden_size"]] = 0
    text = checkpoints.tokens(settings)
    changed = text.copy()
    changed[:, -1] = (changed[:, -1] + 1) % settings["vocab_size"]
    for projection, moves in ((weights["model.layers.3.eh_proj.weight"], True), (blind, False)):
        with_it = {**weights, "model.layers.3.eh_proj.weight": projection}
        one, other = (model.forward(settings, with_it, t).mtp_logits[0] for t in (text, changed))
        assert (np.abs(one - other).max() > 1e-3) == moves


def test_mtp_reads_the_main_output_after_its_final_norm():
    settings, weights = checkpoints.make("mtp")
    text = checkpoints.tokens(settings)
    one_sided = weights["model.norm.weight"] * np.linspace(0.5, 2.0, settings["hidden_size"])
    one = model.forward(settings, weights, text)
    other = model.forward(settings, {**weights, "model.norm.weight": one_sided}, text)
    np.testing.assert_array_equal(one.hidden[-1], other.hidden[-1])
    assert np.abs(one.mtp_logits[0] - other.mtp_logits[0]).max() > 1e-2


def test_mtp_depths_predict_further_and_further():
    settings, weights = checkpoints.make("mtp2")
    text = checkpoints.tokens(settings)
    run = model.forward(settings, weights, text)
    assert [logits.shape[1] for logits in run.mtp_logits] == [47, 46]
    for k, (logits, got) in enumerate(zip(run.mtp_logits, run.mtp_losses, strict=True), 1):
        p = attention.softmax(logits)
        terms = [-np.log(p[b, i, text[b, i + k + 1]]) for b in range(2) for i in range(48 - k - 1)]
        assert got == pytest.approx(np.mean(terms))
    # The first module does not depend on whether there is a second one.
    alone = model.forward({**settings, "num_nextn_predict_layers": 1}, weights, text)
    np.testing.assert_array_equal(alone.mtp_logits[0], run.mtp_logits[0])


def test_mtp_modules_start_from_the_state_before_the_head_norm():
    """Depth 2 reads depth 1's block output as it is; only what the head reads is normalised."""
    settings, weights = checkpoints.make("mtp2")
    text, d = checkpoints.tokens(settings), settings["hidden_size"]
    run, weights = model.forward(settings, weights, text), float64(weights)

    def norm(x, gain):
        return gain * x / np.sqrt((x * x).sum(-1, keepdims=True) / d + 1e-6)

    previous = [run.final_norm, run.mtp[0].hidden]
    for k, (h, depth) in enumerate(zip(previous, run.mtp, strict=True), 1):
        own = part(weights, f"model.layers.{2 + k}")
        e = weights["model.embed_tokens.weight"][text][:, k:]
        x = norm(e, own["enorm.weight"]) @ own["eh_proj.weight"][:, :d].T
        x = x + norm(h[:, : 48 - k], own["hnorm.weight"]) @ own["eh_proj.weight"][:, d:].T
        state = block(x, own, settings, dense=False)[0]
        np.testing.assert_allclose(depth.hidden, state, atol=1e-10)
        logits = norm(state, own["shared_head.norm.weight"]) @ weights["lm_head.weight"].T
        np.testing.assert_allclose(depth.logits, logits, atol=1e-10)


def test_total_loss():
    assert loss.total(2.0) == 2.0
    assert loss.total(2.0, [3.0, 5.0], 0.3) == pytest.approx(2.0 + 0.3 / 2 * 8.0)
    balance = [np.array([1.0, 2.0]), np.array([1.0, 1.0])]
    assert loss.total(2.0, balance=balance, balance_alpha=0.1) == pytest.approx(2.25)


def test_yarn_numbers_of_the_released_model():
    assert rotary.correction_range(V3) == (10, 23)
    assert rotary.magnitude(40, 1.0) == pytest.approx(1.3688879, abs=1e-7)
    assert rotary.magnitude(40, 0.707) == pytest.approx(1.2608038, abs=1e-7)
    assert rotary.softmax_scale(V3) == pytest.approx(0.1352338, abs=1e-7)
    assert rotary.cos_sin_factor(V3) == 1.0
    plain = rotary.frequencies({**V3, "rope_scaling": None})
    slow = rotary.frequencies(V3)
    np.testing.assert_array_equal(slow[:11], plain[:11])
    np.testing.assert_allclose(slow[23:], plain[23:] / 40, rtol=1e-15)
    assert np.all((slow[11:23] < plain[11:23]) & (slow[11:23] > plain[11:23] / 40))


def test_yarn_of_a_small_model():
    """The correction range is cut at 0, where -1 would come out; cosines and sines are scaled."""
    settings = checkpoints.make("yarn_ratio")[0]
    assert rotary.correction_range(settings) == (0, 2)
    f = 10000.0 ** -np.array([0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(
        rotary.frequencies(settings), f * [1, (1 + 0.25) / 2, 0.25, 0.25], rtol=1e-12
    )
    ratio = (0.1 * np.log(4) + 1) / (0.0707 * np.log(4) + 1)
    x = np.random.default_rng(0).standard_normal((5, settings["qk_rope_head_dim"]))
    turned = rotary.rotate(x, np.arange(5), settings)
    np.testing.assert_allclose(turned[0], ratio * x[0])
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), ratio * np.linalg.norm(x, axis=-1))
    scale = 24**-0.5 * (0.0707 * np.log(4) + 1) ** 2
    assert rotary.softmax_scale(settings) == pytest.approx(scale)


def test_parameters_flops_and_cache_of_the_released_model():
    counts = cost.parameters(V3)
    assert cost.attention_parameters(V3) == 187_107_328
    assert cost.moe_layer_parameters(V3, 256) == 11_507_286_272
    assert cost.moe_layer_parameters(V3, 8) == 585_318_656
    assert counts.main == 671_026_419_200
    assert counts.activated == 37_552_297_472
    assert counts.activated_without_table == 36_625_618_432
    assert counts.mtp == 11_610_068_224
    assert cost.training_flops_per_token(V3, 4096) == pytest.approx(250.5e9, rel=3e-4)
    assert cost.training_flops_per_token(V3, 4096, causal=False) == pytest.approx(281.2e9, rel=3e-4)
    assert cost.cache_bytes_per_token(V3) == 70_272
    assert cost.grouped_cache_bytes_per_token(61, 128, 128) == 3_997_696
    assert cost.grouped_cache_bytes_per_token(126, 8, 128) == 516_096


@pytest.mark.parametrize("variant", checkpoints.VARIANTS)
def test_counts_are_those_of_the_arrays(variant):
    settings, weights = checkpoints.make(variant)
    counts, table = cost.parameters(settings), weights["lm_head.weight"].size
    copies = 2 * table * settings["num_nextn_predict_layers"]
    assert counts.main + counts.mtp + copies == sum(array.size for array in weights.values())


def test_learning_rate_at_its_boundaries():
    rate = recipe.learning_rate
    assert rate(1, 0) == pytest.approx(2.2e-4 / 2000)
    assert rate(1000, 1e9) == pytest.approx(1.1e-4)
    assert rate(2000, 1e10) == rate(2001, 1e10) == rate(1e6, 10e12 - 1) == 2.2e-4
    assert rate(1e6, 10e12) == pytest.approx(2.2e-4)
    assert rate(1e6, 12.15e12) == pytest.approx((2.2e-4 + 2.2e-5) / 2)
    assert rate(1e6, 14.3e12 - 1) == pytest.approx(2.2e-5)
    assert rate(1e6, 14.3e12) == rate(1e6, 14.633e12 - 1) == 2.2e-5
    assert rate(1e6, 14.633e12) == rate(1e6, 14.8e12) == 7.3e-6


def test_what_else_follows_the_tokens():
    assert recipe.batch_sequences(0) == 3072
    assert recipe.batch_sequences(234.5e9) == (3072 + 15360) / 2
    assert recipe.batch_sequences(469e9) == recipe.batch_sequences(14e12) == 15360
    assert recipe.mtp_weight(10e12 - 1) == 0.3 and recipe.mtp_weight(10e12) == 0.1
    assert recipe.bias_speed(14.3e12 - 1) == 0.001 and recipe.bias_speed(14.3e12) == 0


def test_adamw_is_optax_with_clipping():
    random = np.random.default_rng(0)
    ours = {name: random.standard_normal((3, 4)) for name in "ab"}
    theirs = {name: np.float32(array) for name, array in ours.items()}
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-2, b1=0.9, b2=0.95, weight_decay=0.1)
    )
    state = optimizer.init(theirs)
    m = v = {name: np.zeros((3, 4)) for name in "ab"}
    for step in range(1, 6):
        # The third gradient is small enough to pass unclipped.
        size = 0.01 if step == 3 else 1.0
        gradients = {name: size * random.standard_normal((3, 4)) for name in "ab"}
        ours, m, v = recipe.adamw(ours, recipe.clip(gradients), m, v, step, 1e-2)
        single = {name: np.float32(array) for name, array in gradients.items()}
        updates, state = optimizer.update(single, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        for name in "ab":
            np.testing.assert_allclose(theirs[name], ours[name], rtol=2e-5, atol=2e-6)


def test_clip_and_ema():
    gradients = {"a": np.array([3.0, 0.0]), "b": np.array([[4.0]])}
    assert recipe.global_norm(gradients) == 5.0
    assert recipe.global_norm(recipe.clip(gradients, 1.0)) == pytest.approx(1.0)
    assert recipe.global_norm(recipe.clip(gradients, 9.0)) == 5.0
    average = recipe.ema({"a": np.array([1.0])}, {"a": np.array([2.0])}, 0.9)
    np.testing.assert_allclose(average["a"], 1.1)


@pytest.mark.parametrize("shards", [1, 3])
def test_checkpoints_are_written_as_published(tmp_path, shards):
    settings, weights = checkpoints.make("mtp")
    checkpoints.write(tmp_path, settings, weights, shards)
    assert json.loads((tmp_path / "config.json").read_text()) == settings
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == shards
    back = {}
    for file in files:
        back |= load_file(file)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weights[name]) for name in weights)
    if shards > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == {file.name for file in files}
        assert set(index["weight_map"]) == set(weights)


def test_the_same_seed_gives_the_same_checkpoint():
    one, same, other = (checkpoints.make("v3", seed)[1]["lm_head.weight"] for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_the_fixture_has_exactly_the_names_and_shapes_of_its_settings(tiny):
    settings, weights, _ = tiny
    assert dict(checkpoints.shapes(settings)) == {n: w.shape for n, w in weights.items()}
