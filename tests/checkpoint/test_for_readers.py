"""Files of an export for servers: marks, BOS, and a chat template where none exists."""

import json
import shutil

import pytest
import small
from equations import checkpoints
from tokenizers import Tokenizer, processors

from deepseek_jax.checkpoint import conversion
from deepseek_jax.checkpoint.hf import chat_template
from deepseek_jax.checkpoint.load import open_checkpoint
from deepseek_jax.data import tokenizer


@pytest.fixture
def run(tmp_path):
    """A workdir with a byte tokenizer of its own, whose post-processor adds no BOS."""
    checkpoints.write(tmp_path / "in", *checkpoints.make("v3"))
    conversion.to_run(open_checkpoint(tmp_path / "in"), tmp_path / "run", small.config())
    shutil.rmtree(tmp_path / "run" / "published")
    put_tokenizer(tmp_path / "run")
    return tmp_path / "run"


def put_tokenizer(folder):
    tokenizer.make("byte", vocab=262, texts=()).save(folder / "tokenizer.json")
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    core.save(str(folder / "tokenizer.json"))


def exported(folder):
    out = folder.with_name("out")
    conversion.to_published(open_checkpoint(folder), out, "float32", 10**9)
    return out


def test_a_run_of_our_own_is_told_to_servers(run):
    out = exported(run)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 1
    told = json.loads((out / "tokenizer_config.json").read_text())
    assert (told["bos_token"], told["eos_token"]) == (tokenizer.BOS, tokenizer.EOS)
    theirs = Tokenizer.from_file(str(out / "tokenizer.json"))
    ours = tokenizer.read(run / "tokenizer.json")
    for text in ("", "a b\n  ñ", tokenizer.EOS):
        ids = ours.encode_special(text)
        assert theirs.encode(text).ids == [ours.marks.bos, *ids]
        assert theirs.encode(text, add_special_tokens=False).ids == ids
    assert (run / "tokenizer.json").read_text() != (out / "tokenizer.json").read_text()


def test_the_chat_template_spells_the_marks_out(run):
    """Rendered in tests/transformers/serve.py, as Jinja is no requirement of this project."""
    assert (exported(run) / "chat_template.jinja").read_text() == chat_template.text(
        tokenizer.BOS, tokenizer.EOS
    )
    assert chat_template.text("<s>", "</s>").startswith('{{ "<s>" }}{% for message in messages %}')
    assert '+ "</s\'\\"" }}' in chat_template.text(None, "</s'\"")
    assert chat_template.text(None, "</s>").startswith("{% for message in messages %}")


@pytest.mark.parametrize("kind", ["jinja", "settings", "object"])
def test_a_template_that_exists_stays(kind, run):
    file, text = {
        "jinja": ("chat_template.jinja", "{{ 1 }}"),
        "settings": ("tokenizer_config.json", '{"chat_template": "{{ 1 }}"}'),
        "object": ("chat_template.json", '{"chat_template": "{{ 1 }}"}'),
    }[kind]
    folder = run.with_name("in")
    put_tokenizer(folder)
    (folder / file).write_text(text)
    before = {path.name for path in folder.iterdir()}
    out = exported(folder)
    assert (out / file).read_text() == text
    assert {path.name for path in out.iterdir()} == before | {"generation_config.json"}


def test_a_published_tokenizer_is_not_changed(run):
    folder = run.with_name("in")
    put_tokenizer(folder)
    out = exported(folder)
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert "User: " in (out / "chat_template.jinja").read_text()


def test_a_tokenizer_that_is_not_read_here_is_carried_without_a_template(run):
    folder = run.with_name("in")
    (folder / "tokenizer.json").write_text("{}")
    out = exported(folder)
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not (out / "chat_template.jinja").exists()
