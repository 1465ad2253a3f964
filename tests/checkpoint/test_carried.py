"""Files beside the weights: all of them are carried along, and no tokenizer is made."""

import dataclasses

import numpy as np
import pytest
import small

from deepseek_jax.checkpoint import carried
from deepseek_jax.config import ConfigError


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_all_but_weights_index_and_config(tmp_path):
    kept = [
        "LICENSE", "README.md", "additional_chat_templates/rag.jinja", "chat_template.jinja",
        "generation_config.json", "modeling_deepseek.py", "special_tokens_map.json",
        "tiktoken.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    left = [
        "config.json", "model-00001-of-000002.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "optimizer.PT", ".env",
        "figures/benchmark.pdf", "inference/model.py",
    ]  # fmt: skip
    put(tmp_path, *kept, *left)
    assert sorted(carried.files(tmp_path, is_run=False)) == kept


def test_links_lead_to_files_of_the_folder_or_of_the_hubs_cache(tmp_path):
    put(tmp_path, "secret", "hub/blobs/1", "hub/blobs/2", "hub/snapshots/main/here")
    folder = tmp_path / "hub" / "snapshots" / "main"
    (folder / "LICENSE").symlink_to("../../blobs/1")
    (folder / "tokenizer.model").symlink_to(tmp_path / "hub" / "blobs" / "2")
    (tmp_path / "settings").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "settings")
    (folder / "again").symlink_to("here")
    assert sorted(carried.files(folder, is_run=False)) == [
        "LICENSE", "again", "here", "tokenizer.json", "tokenizer.model",
    ]  # fmt: skip
    (folder / "notes").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match="notes is a link out of its folder; it is left out"):
        assert "notes" not in carried.files(folder, is_run=False)
    (folder / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match=r"generation_config.json is not readable JSON"):
        carried.files(folder, is_run=False)


def test_large_files_are_left_out_with_a_warning(tmp_path, monkeypatch):
    put(tmp_path, "README.md", "film.mp4")
    monkeypatch.setattr(carried, "LARGEST", 8)
    with pytest.warns(UserWarning, match=r"README.md is larger than 8 bytes; it is left out"):
        assert sorted(carried.files(tmp_path, is_run=False)) == ["film.mp4"]


def test_a_run_gives_back_the_published_tokenizer_and_its_own_settings(tmp_path):
    put(tmp_path, "published/tokenizer.json", "published/README.md", "published/config.json")
    put(tmp_path, "tokenizer.json", "tokenizer_config.json", "generation_config.json", "loss.png")
    found = carried.files(tmp_path, is_run=True)
    assert {name: path.relative_to(tmp_path).as_posix() for name, path in found.items()} == {
        "README.md": "published/README.md",
        "tokenizer.json": "published/tokenizer.json",
        "generation_config.json": "generation_config.json",
    }


def test_auto_map_names_no_code_that_is_left_out():
    settings = {
        "auto_map": {"AutoConfig": "here.Config", "AutoModel": "gone.Model", "AutoX": "a/b--x.X"}
    }
    kept = carried.without_absent_code(settings, {"here.py": None})
    assert kept == {"auto_map": {"AutoConfig": "here.Config", "AutoX": "a/b--x.X"}}
    gone = {"auto_map": {"AutoModel": "gone.Model"}, "vocab_size": 3}
    assert carried.without_absent_code(gone, {}) == {"vocab_size": 3}


@pytest.mark.parametrize("name", ["bpe", "byte"])
def test_no_tokenizer_is_made_for_weights_from_elsewhere(name, tmp_path):
    data = dataclasses.replace(small.config().data, tokenizer=name)
    put(tmp_path, "checkpoints/1/state", "config.json")
    carried.check_tokenizer(tmp_path, data)
    put(tmp_path, "older/checkpoints/0/state")  # as `convert` made workdirs before `published/`
    with pytest.raises(ConfigError, match="began from the weights of another checkpoint"):
        carried.check_tokenizer(tmp_path / "older", data)
    put(tmp_path, "published/config.json", "published/tiktoken.model")
    words = (
        rf"--workdir={tmp_path} began from the weights of another checkpoint, and data.tokenizer="
        rf"'{name}' would make a tokenizer with other ids than these know; its own is in "
        rf"{tmp_path}/published/tiktoken.model, which is not read; set data.tokenizer to a"
    )
    with pytest.raises(ConfigError, match=words):
        carried.check_tokenizer(tmp_path, data)
    put(tmp_path, "tokenizer.json")
    with pytest.raises(ConfigError, match=rf"set data.tokenizer={tmp_path}/tokenizer.json, or"):
        carried.check_tokenizer(tmp_path, data)
    np.save(tmp_path / "tokens.npy", np.zeros(3, np.uint16))
    carried.check_tokenizer(tmp_path, dataclasses.replace(data, path=str(tmp_path / "tokens.npy")))
    carried.check_tokenizer(tmp_path, dataclasses.replace(data, tokenizer="deepseek"))


def test_a_file_that_cannot_be_read_is_named_first(tmp_path, monkeypatch):
    put(tmp_path, "LICENSE")
    monkeypatch.setattr(carried.os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"LICENSE cannot be read: Permission denied"):
        carried.files(tmp_path, is_run=False)
