"""Kimi K2, and its text model beside a vision tower (K2.5): read, computed, written back."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import small
from equations import checkpoints
from safetensors.numpy import save_file
from same_bytes import assert_same_bytes, tensors_of

import deepseek_jax
from deepseek_jax.checkpoint import carried, conversion, load
from deepseek_jax.checkpoint.hf import config_json, language_part, safetensors
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.config import ConfigError
from deepseek_jax.serve import generation
from deepseek_jax.serve.generation import TextCodec
from deepseek_jax.serve.requests import Request
from deepseek_jax.train import evaluation

SHARD = 100_000  # bytes
TOWER = {
    "vision_tower.encoder.blocks.0.wqkv.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "vision_tower.patch_embed.proj.bias": np.ones(5, ml_dtypes.bfloat16),
    "mm_projector.proj.0.weight": np.full((2, 2), 1.0078125, np.float16),
}


def around(text):
    """Settings as Kimi K2.5 has them, around those of a text model."""
    own = {key: value for key, value in text.items() if key not in ("architectures", "torch_dtype")}
    return {
        "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25",
        "text_config": own, "vision_config": {"vt_hidden_size": 4}, "torch_dtype": "float32",
        "tie_word_embeddings": False, "media_placeholder_token_id": 7,
    }  # fmt: skip


def inside(weights):
    return {language_part.PREFIX + name: value for name, value in weights.items()} | TOWER


@pytest.fixture(scope="module")
def kimi():
    return checkpoints.make("kimi_k2")


@pytest.fixture(scope="module")
def folder(kimi, tmp_path_factory):
    """`text`, the same model in `k25` beside a vision tower, and `run`, a workdir of that."""
    folder = tmp_path_factory.mktemp("kimi")
    settings, weights = kimi
    checkpoints.write(folder / "text", settings, weights)
    checkpoints.write(folder / "k25", around(settings), inside(weights), shards=3)
    (folder / "k25" / "preprocessor_config.json").write_text("{}")
    conversion.to_run(open_checkpoint(folder / "k25"), folder / "run", small.config())
    return folder


def test_the_text_model_is_the_same_with_other_parts_beside_it(folder, kimi):
    tokens = checkpoints.tokens(kimi[0])
    alone, within, run = (deepseek_jax.load(folder / name) for name in ("text", "k25", "run"))
    assert alone.config == within.config == run.config
    want = np.asarray(alone(tokens).logits)
    for model in (within, run):
        np.testing.assert_array_equal(np.asarray(model(tokens).logits), want)


def test_no_tensor_is_lost_on_the_way_back(folder, kimi, tmp_path):
    settings, weights = around(kimi[0]), inside(kimi[1])
    for name in ("run", "k25"):
        conversion.to_published(open_checkpoint(folder / name), tmp_path / name, "float32", SHARD)
        assert_same_bytes(tensors_of(tmp_path / name), weights)
        written = json.loads((tmp_path / name / "config.json").read_text())
        inner = settings["text_config"] | {"torch_dtype": "float32"}
        assert written == settings | {"text_config": inner}
        index = json.loads((tmp_path / name / safetensors.INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
        assert (tmp_path / name / "preprocessor_config.json").is_file()
    deepseek_jax.load(folder / "k25").save(tmp_path / "saved")
    assert_same_bytes(tensors_of(tmp_path / "saved"), weights)


def test_other_parts_stay_as_they_are_in_other_formats(folder, tmp_path):
    conversion.to_published(open_checkpoint(folder / "run"), tmp_path / "fp8", "fp8", SHARD)
    got = tensors_of(tmp_path / "fp8")
    assert_same_bytes({name: got[name] for name in TOWER}, TOWER)
    assert any(value.dtype == safetensors.E4M3 for value in got.values())
    quantised = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert quantised["modules_to_not_convert"] == ["mm_projector", "vision_tower"]
    checkpoint = open_checkpoint(tmp_path / "fp8")
    assert checkpoint.config().precision.recipe == "bfloat16"
    # Quantised inside, as Kimi K2.5 states it, stays inside.
    inner = json.loads((tmp_path / "fp8" / "config.json").read_text())
    inner["text_config"]["quantization_config"] = inner.pop("quantization_config")
    again = config_json.in_format(inner, "fp8")
    assert "quantization_config" not in again
    assert again["text_config"]["quantization_config"]["quant_method"] == "fp8"


def test_a_model_that_was_changed_says_what_it_leaves_out(folder, tmp_path):
    run = shutil.copytree(folder / "run", tmp_path / "run")
    source = open_checkpoint(run)
    described = config_json.published(source.model)
    with pytest.warns(UserWarning, match=rf"{len(TOWER)} tensors beside it, mm_projector\.proj"):
        assert not conversion._others(source, described)
    (run / carried.KEPT / carried.OTHERS).unlink()
    assert not conversion._others(source, described)


def greedy(checkpoint, config):
    """Tokens of a text that the engine decodes."""
    engine = generation.open_engine(
        checkpoint, config, mesh={}, slots=1, length=32, cache=None, stop=(), drafts=0
    )
    found = generation.generate(
        engine, [Request((3, 5, 7), 8)], TextCodec.of(checkpoint), lambda text: None
    )
    return found["requests"][0]["tokens"]


def test_it_generates_and_scores(folder, tmp_path):
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 256, 65, np.uint16))
    losses, texts = [], []
    for name in ("text", "k25"):
        checkpoint = open_checkpoint(folder / name)
        config = checkpoint.config()
        report = evaluation.score_checkpoint(
            checkpoint, str(tmp_path / "tokens.npy"), config, mesh={}, length=16, tokens=64
        )
        losses.append(report["loss"])
        texts.append(greedy(checkpoint, config))
    assert losses[0] == losses[1] and np.isfinite(losses[0])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"text_config": None}, "text_config is None; expected the settings of the text model"),
        ({"architectures": ["Other"]}, r"architectures is \['Other'\]; expected \['KimiK25For"),
        ({"tie_word_embeddings": "no"}, "json: tie_word_embeddings is 'no'; expected true or fal"),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name(changes, words, kimi, tmp_path):
    settings = around(kimi[0]) | changes
    with pytest.raises(ConfigError, match=words):
        config_json.model_config(settings, source=tmp_path / "config.json")


def test_int4_is_refused_by_name(kimi, tmp_path):
    settings = around(kimi[0])
    settings["text_config"]["quantization_config"] = {"quant_method": "compressed-tensors"}
    with pytest.raises(ConfigError, match=r"quant_method is 'compressed-tensors'; expected 'fp8'"):
        config_json.model_config(settings, source=tmp_path)


def test_a_damaged_name_is_not_taken_for_another_part(folder, kimi, tmp_path):
    """A tensor of the text model without its prefix is missing, and not carried silently."""
    weights = inside(kimi[1])
    weights["lm_head.weight"] = weights.pop("language_model.lm_head.weight")
    (tmp_path / "config.json").write_text(json.dumps(around(kimi[0])))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"lm_head\.weight \(found nothing, expected a float"):
        load.load(tmp_path)


def test_names_that_transformers_has_in_memory_are_read(folder, kimi, tmp_path):
    """Those of `state_dict`, which it opens, too, for whom writes them as they are."""
    prefix = language_part.PREFIX
    names = {
        name: name.replace(f"{prefix}model.", "model.language_model.") for name in inside(kimi[1])
    }
    weights = {names[n].removeprefix(prefix): value for n, value in inside(kimi[1]).items()}
    assert "lm_head.weight" in weights and "model.language_model.norm.weight" in weights
    (tmp_path / "config.json").write_text(json.dumps(around(kimi[0])))
    save_file(weights, tmp_path / "model.safetensors")
    want, got = (open_checkpoint(path).published for path in (folder / "k25", tmp_path))
    assert got.tensors.keys() == want.tensors.keys() and got.others.keys() == TOWER.keys()
    np.testing.assert_array_equal(got.read("lm_head.weight"), want.read("lm_head.weight"))


def test_layers_that_transformers_names_blocks_are_read(folder, kimi, tmp_path):
    """transformers 5.24 renames them as it saves a whole Kimi K2.5, and reads them back."""
    weights = {n.replace("language_model.model.layers.", "language_model.model.blocks."): v
               for n, v in inside(kimi[1]).items()}  # fmt: skip
    assert len(weights) == len(inside(kimi[1])) and any(".model.blocks." in n for n in weights)
    (tmp_path / "config.json").write_text(json.dumps(around(kimi[0])))
    save_file(weights, tmp_path / "model.safetensors")
    want, got = (open_checkpoint(path).published for path in (folder / "k25", tmp_path))
    assert got.tensors.keys() == want.tensors.keys() and got.others.keys() == TOWER.keys()
    name = "model.layers.1.self_attn.o_proj.weight"
    assert np.array_equal(got.read(name), want.read(name))
