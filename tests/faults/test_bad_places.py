"""Files that cannot be reached, and entries of folders that are no files."""

import dataclasses
import os

import pytest
from faults.bad_files import (
    GOOD,
    GOOD_IDS,
    PROSE,
    TEXTS,
    array,
    lines,
    npy,
    refusal,
    small,
    texts_of,
)
from small_texts import VOCAB

from deepseek_jax.data import files, tokenizer
from deepseek_jax.data.corpus import prepare


@pytest.fixture
def config(tmp_path):
    return small(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet", "a.npy", "a.bin"])
@pytest.mark.parametrize("alone", [True, False])
def test_an_unreadable_file_is_named(config, tmp_path, monkeypatch, name, alone):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_bytes((GOOD | GOOD_IDS | {"a.txt": PROSE}).get(name, PROSE))
    if not alone:
        (folder / f"b{name[1:]}").write_bytes((folder / name).read_bytes())
    real = os.open

    def denied(path, *rest, **more):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied")
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "open", denied)
    path = folder / name if alone else folder
    assert name in refusal(config, "cannot be read: Permission denied", path=str(path))


@pytest.mark.parametrize("file_system_error", [5, 116, 24], ids=["EIO", "ESTALE", "EMFILE"])
def test_a_failing_disk_is_named(config, tmp_path, monkeypatch, file_system_error):
    (tmp_path / "a.jsonl").write_bytes(lines())
    real = os.pread

    def fails(descriptor, *rest):
        raise OSError(file_system_error, os.strerror(file_system_error))

    monkeypatch.setattr(files.os, "pread", fails)
    assert refusal(config, os.strerror(file_system_error), path=str(tmp_path / "a.jsonl"))
    monkeypatch.setattr(files.os, "pread", real)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("x" * 5000, "no path that can be opened|does not exist"),
        ("/".join(["x" * 200] * 30), "no path that can be opened"),
        ("~nobody_of_this_name/x", "home folder that is unknown"),
        ("a\0b", "no path that can be opened"),
        ("nothing\udcff", "does not exist|neither|no path"),
        ("new\nline", "does not exist|neither|no path"),
    ],
)
@pytest.mark.parametrize("key", ["path", "tokenizer"])
def test_paths_that_cannot_be(config, tmp_path, key, value, words):
    (tmp_path / "data").write_bytes(PROSE)
    message = refusal(config, f"data.{key}=.*({words}|nor a tokenizer.json)", **{key: value})
    assert message.startswith(f"data.{key}=")


@pytest.mark.parametrize("value", ["x" * 5000, "~nobody_of_this_name/x", "a\0b", "/dev/null/x"])
def test_caches_that_cannot_be(config, tmp_path, value):
    (tmp_path / "data").write_bytes(PROSE)
    assert refusal(config, r"data\.cache", cache=value)


def test_a_user_without_a_home(config, tmp_path, monkeypatch):
    (tmp_path / "data").write_bytes(PROSE)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    assert refusal(config, r"no home folder; set data\.cache", cache="")
    for key in ("path", "tokenizer"):
        assert refusal(config, rf"data\.{key}='~/x' names a home folder", **{key: "~/x"})


@pytest.mark.parametrize("name", [b"\xff.txt", b"\xff.jsonl", b"\xff.npy", b"a\nb.txt"])
def test_names_that_are_no_text(config, tmp_path, name):
    """They are read; a message shows them escaped."""
    good = GOOD["rows.jsonl"] if name.endswith(b"jsonl") else npy()
    content = PROSE if name.endswith(b"txt") else good
    folder = os.fsencode(tmp_path / "folder")
    os.mkdir(folder)
    with open(os.path.join(folder, name), "wb") as stream:
        stream.write(content)
    assert texts_of(config, path=os.fsdecode(folder), tokenizer="byte")
    with open(os.path.join(folder, name), "wb") as stream:
        stream.write(b"\0\1\2")
    assert refusal(config, r"\\udcff|\\nb", path=os.fsdecode(os.path.join(folder, name)))


def test_pipes_sockets_and_links_in_a_folder(config, tmp_path):
    """They are left out with a line, and opening them never waits."""
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_bytes(PROSE)
    os.mkfifo(folder / "pipe.txt")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "round").symlink_to("round")
    (folder / "deeper" / "up").symlink_to("..")
    said: list[str] = []
    corpus = prepare(dataclasses.replace(config, path=str(folder)), vocab=VOCAB, say=said.append)
    assert len(corpus.spans) == 1
    assert any("skipped 4 files" in line for line in said)
    for name in ("pipe.txt", "gone.txt", "round"):
        assert refusal(
            config,
            r"data\.path=.*(neither a file|does not exist|cannot be)",
            path=str(folder / name),
        )


@pytest.mark.parametrize("name", ["gone.npy", "pipe.npy"])
def test_a_missing_shard_is_not_left_out(config, tmp_path, name):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.npy").write_bytes(npy())
    if name.startswith("gone"):
        (folder / name).symlink_to("nowhere")
    else:
        os.mkfifo(folder / name)
    assert name in refusal(config, "holds token files, and", path=str(folder))


def test_a_folder_that_cannot_be_listed(config, tmp_path, monkeypatch):
    (tmp_path / "folder" / "locked").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_bytes(PROSE)
    real = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", denied)
    assert refusal(
        config, "folder .*locked cannot be read: Permission denied", path=str(tmp_path / "folder")
    )


def test_tokens_beside_text(config, tmp_path):
    """A few words beside token files are not the corpus."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "README.md").write_text("Tokens of a model.")
    (folder / "a.npy").write_bytes(npy())
    assert refusal(config, "bytes of token files beside 18 bytes of text", path=str(folder))


@pytest.mark.parametrize("content", [array("content"), lines("content"), array()[:-5]])
def test_json_in_folders(config, tmp_path, content):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.json").write_bytes(content)
    (folder / "b.json").write_bytes(content)
    assert refusal(config, "data.text_key='text'", path=str(folder))


def test_json_beside_source_code_is_text(config, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.py").write_text("import b\n")
    (folder / "package.json").write_text('{\n "name": "b"\n}\n')
    said: list[str] = []
    corpus = prepare(dataclasses.replace(config, path=str(folder)), vocab=VOCAB, say=said.append)
    assert len(corpus.spans) == 2
    assert any("1 JSON files have no rows with the field 'text'" in line for line in said)


@pytest.mark.parametrize("when", ["emptied", "removed", "other"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_text_that_changes_while_it_is_read(config, tmp_path, monkeypatch, name, when):
    file = tmp_path / name
    file.write_bytes(GOOD["groups.parquet"] if name.endswith("parquet") else lines())
    real = tokenizer.make

    def make(*arguments, **more):
        if when == "removed":
            file.unlink()
        else:
            file.write_bytes(b"" if when == "emptied" else lines(texts=TEXTS[::-1]))
        return real(*arguments, **more)

    monkeypatch.setattr(tokenizer, "make", make)
    assert refusal(config, "changed while it was in use|No such file", path=str(file))
    assert not list((tmp_path / "cache").iterdir())
