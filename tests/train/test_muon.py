"""Muon against float64 Newton-Schulz, its split by parameter, and its state in checkpoints."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from trainer import Trainer

from deepseek_jax.config import ConfigError
from deepseek_jax.model import params
from deepseek_jax.model.transformer import abstract_model
from deepseek_jax.train import muon, optimizer, state, workdir

A, B, C = 3.4445, -4.7750, 2.0315  # Jordan's coefficients
BETA, RMS = 0.95, 0.2


def orthogonalised(matrix):
    """Five steps of X <- a X + (b A + c A^2) X, A = X X^T, of a matrix divided by its norm."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x


def by_matrix(value, roles):
    """(..., in, out) of an array whose dimensions have these roles after those of a stack."""
    first = value.ndim - len(roles)
    dims = {kind: [first + i for i, role in enumerate(roles) if role == kind] for kind in "-io"}
    order = [*range(first), *dims["-"], *dims["i"], *dims["o"]]
    shape = [value.shape[i] for i in order]
    batch, inputs = first + len(dims["-"]), len(dims["i"])
    sizes = [int(np.prod(shape[:batch])), int(np.prod(shape[batch : batch + inputs])), -1]
    return value.transpose(order).reshape(sizes)


def described(tree):
    """Path -> (array, roles) of each parameter."""
    variables = jax.tree.leaves(tree, is_leaf=params.is_variable)
    paths = [weight.path for weight in params.describe(tree)]
    return {
        path: (np.asarray(variable[...], np.float64), variable.get_metadata().get("roles"))
        for path, variable in zip(paths, variables, strict=True)
    }


@pytest.fixture(scope="module")
def gradients():
    """Parameters of a model with MTP, and two trees of gradients of their structure."""
    _, like, _ = params.split(abstract_model(small.config(model_mtp_depth=1).model))
    rng = np.random.default_rng(0)

    def drawn(_):
        return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), like)

    return [drawn(i) for i in range(3)]


def settings(**changes):
    return dataclasses.replace(
        small.config().optimizer, name="muon", weight_decay=0.0, clip=1e9, moments="float32",
        muon_momentum=BETA, muon_rms=RMS, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def updates(gradients):
    """Updates of the second of two steps, of Muon and of AdamW, by path."""
    weights, *grads = gradients
    found = []
    for name in ("muon", "adamw"):
        build = optimizer.build(dataclasses.replace(settings(), name=name))
        opt_state = build.init(weights)
        step = jax.jit(build.update)
        for each in grads:
            update, opt_state = step(each, opt_state, weights)
        found.append(described(update))
    return found


def test_matrices_follow_the_equations(gradients, updates):
    first, second = (described(each) for each in gradients[1:])
    seen = 0
    for path, (got, roles) in updates[0].items():
        if roles is None:
            continue
        seen += 1
        g1, g2 = (by_matrix(each[path][0], roles) for each in (first, second))
        momentum = BETA * (1 - BETA) * g1 + (1 - BETA) * g2
        # Both terms without the bias of their start; Nesterov's is a step ahead.
        ahead = BETA * momentum / (1 - BETA**3) + (1 - BETA) * g2 / (1 - BETA**2)
        sizes = ahead.shape[1:]
        want = np.stack([orthogonalised(each) for each in ahead]) * RMS * np.sqrt(max(sizes))
        np.testing.assert_allclose(by_matrix(got, roles), want, atol=2e-4 * RMS, err_msg=path)
        rms = np.sqrt((by_matrix(got, roles) ** 2).mean((1, 2)))
        full = np.sqrt(min(sizes) * max(sizes) / np.prod(sizes))
        assert (np.abs(rms / (RMS * full) - 1) < 0.4).all(), path  # singular values near one
    assert seen > 10


def test_the_split_by_parameter(updates):
    """Muon for every matrix of a linear layer; Adam, unchanged, for all others."""
    with_muon, with_adam = updates
    adam = {path for path, (got, _) in with_muon.items() if (got == with_adam[path][0]).all()}
    named = {path for path in with_muon if path.rpartition(".")[2] in ("table", "scale")}
    assert adam == named | {path for path in with_muon if path.endswith("router.centroids")}
    assert {path.rpartition(".")[2] for path in with_muon.keys() - adam} == {
        "query_down", "query_up", "kv_down", "kv_up", "out", "gate_up", "down", "project",
    }  # fmt: skip


def test_no_second_moment_is_kept_of_matrices(gradients):
    weights = gradients[0]
    opt_state = optimizer.build(settings()).init(weights)
    size = sum(leaf.size for leaf in jax.tree.leaves(opt_state) if leaf.ndim > 1)
    matrices = sum(value.size for value, roles in described(weights).values() if roles)
    others = sum(value.size for value, roles in described(weights).values() if not roles)
    scales = sum(v.size for v, roles in described(weights).values() if not roles and v.ndim < 2)
    assert size == matrices + 2 * (others - scales)


LAYOUTS = {
    "ZeRO-3, tensor": (dict(replica=2, gpu=2, tensor=2), 3),
    "ZeRO-1, pipeline": (dict(pipe=2, node=2, gpu=2), 1),
}


@pytest.mark.parametrize("sizes, zero", LAYOUTS.values(), ids=LAYOUTS)
def test_updates_do_not_depend_on_the_layout(sizes, zero, gradients, updates):
    """Also where a device holds a part of a matrix alone; the parts keep their places."""
    layout, mesh = small.layout_of(sizes, zero), small.mesh_of(sizes)
    places = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), params.place(gradients[0], layout.storage)
    )
    with jax.set_mesh(mesh):
        weights, *grads = (jax.device_put(each, places) for each in gradients)
        build = optimizer.build(settings())
        opt_state, step = build.init(weights), jax.jit(build.update)
        for each in grads:
            update, opt_state = step(each, opt_state, weights)
    jax.tree.map(lambda x, place: x.sharding == place or pytest.fail(str(place)), update, places)
    parts = {place.spec for place in jax.tree.leaves(places)}
    assert any(len([axis for axis in spec if axis]) > 1 for spec in parts)
    for path, (got, roles) in described(update).items():
        tolerance = 1e-4 * RMS if roles else 1e-6  # of Newton-Schulz, which enlarges roundings
        np.testing.assert_allclose(got, updates[0][path][0], atol=tolerance, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("sizes, zero", LAYOUTS.values(), ids=LAYOUTS)
def test_training_does_not_depend_on_the_layout(sizes, zero):
    layout = {f"mesh_{axis}": size for axis, size in sizes.items()} | {"layout_zero": zero}
    (want, one), (got, many) = trained({}), trained(layout)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    small.assert_close(many, one, rtol=1e-4)
    assert want[-1] != want[0]


def trained(layout):
    trainer = Trainer(small.config(optimizer_name="muon", model_mtp_depth=1, **layout))
    return [float(row["loss"]) for row in trainer.run(8)], trainer.params()


def test_a_checkpoint_holds_the_momentum():
    config = small.config(optimizer_name="muon", model_mtp_depth=1)
    build = optimizer.build(config.optimizer)
    _, weights, bias = params.split(abstract_model(config.model))

    def drawn(x):
        return jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), x.dtype)

    like = jax.eval_shape(lambda p, b: state._around(config, build, p, b), weights, bias)
    whole = jax.tree.map(drawn, like)
    kept = state.to_dict(whole)
    assert set(kept["muon"]) == {"count", "ns_coeffs", "mu"}
    assert not set(kept["muon"]["mu"]) & set(kept["adam"]["mu"])
    assert set(kept["muon"]["mu"]) | set(kept["adam"]["mu"]) == set(kept["params"])
    back = state.from_dict(like, kept)
    assert jax.tree.structure(back) == jax.tree.structure(whole)
    jax.tree.map(np.testing.assert_array_equal, back, whole)


def test_a_run_does_not_change_its_optimizer_on_the_way(tmp_path):
    config = small.config(data_tokenizer="deepseek")
    (tmp_path / "config.json").write_text(config.to_json())
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)  # converted weights, without moments
    workdir.check(tmp_path, small.config(optimizer_name="muon", data_tokenizer="deepseek"))
    other = {"data_fim_rate": 0.5, "data_held_out": 0.25, "batch_length": 24}  # no text read
    workdir.check(tmp_path, small.config(data_tokenizer="deepseek", **other))
    (tmp_path / "checkpoints" / "4").mkdir()
    with pytest.raises(ConfigError, match=r"run with optimizer\.name='adamw', and this config"):
        workdir.check(tmp_path, small.config(optimizer_name="muon", data_tokenizer="deepseek"))


def test_every_roles_is_a_matrix():
    """A role string without inputs or outputs would be no matrix for Newton-Schulz."""
    _, weights, _ = params.split(abstract_model(small.config(model_q_latent=0).model))
    for path, (_, roles) in described_shapes(weights).items():
        assert roles is None or {"i", "o"} <= set(roles), path
        if roles is not None:
            assert muon._dimensions(roles, np.zeros((1,) * len(roles)), "i"), path


def described_shapes(tree):
    variables = jax.tree.leaves(tree, is_leaf=params.is_variable)
    paths = [weight.path for weight in params.describe(tree)]
    return {
        path: (None, variable.get_metadata().get("roles"))
        for path, variable in zip(paths, variables, strict=True)
    }
