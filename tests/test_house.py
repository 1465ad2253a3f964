"""Sizes and names that keep the package easy to find one's way in."""

import ast
import collections
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONG_FUNCTION, LONG_FILE = 70, 450


def parsed(folder):
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
        for path in sorted((ROOT / folder).rglob("*.py"))
    }


PACKAGE = parsed("deepseek_jax")
ALL = PACKAGE | parsed("tests") | parsed("configs")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def public(tree):
    """Functions and classes of a module whose names do not begin with an underscore."""
    kinds = (*FUNCTIONS, ast.ClassDef)
    return [node for node in tree.body if isinstance(node, kinds) and node.name[0] != "_"]


def test_no_file_is_too_long():
    lines = {path: len((ROOT / path).read_text().splitlines()) for path in ALL}
    assert {path: count for path, count in lines.items() if count > LONG_FILE} == {}


def test_no_function_is_too_long():
    long = [
        f"{path}:{node.lineno} {node.name}"
        for path, tree in ALL.items()
        for node in ast.walk(tree)
        if isinstance(node, FUNCTIONS) and node.end_lineno - node.lineno + 1 > LONG_FUNCTION
    ]
    assert long == []


def test_everything_public_is_described():
    silent = [
        f"{path}:{node.lineno} {node.name}"
        for path, tree in PACKAGE.items()
        for node in public(tree)
        if ast.get_docstring(node) is None
    ]
    assert silent == []


def test_no_public_class_has_two_homes():
    homes = collections.defaultdict(list)
    for path, tree in PACKAGE.items():
        for node in public(tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(path)
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_no_file_name_is_used_twice():
    """Benches are called what they measure, and are left out."""
    homes = collections.defaultdict(list)
    for path in PACKAGE:
        if not path.startswith("deepseek_jax/bench/"):
            homes[path.rpartition("/")[2]].append(path)
    twice = {name: paths for name, paths in homes.items() if len(paths) > 1}
    twice.pop("__init__.py")
    assert twice == {}


def test_docstrings_begin_with_a_noun_or_a_verb():
    """Not with a pronoun that waits for its noun: "What each got", "Of one stage"."""
    bad = {"What", "Of", "One", "Where", "Which", "That", "Those", "It", "Its", "They", "These"}
    found = []
    for path, tree in PACKAGE.items():
        for node in ast.walk(tree):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef, ast.Module)):
                words = (ast.get_docstring(node) or "x").split()
                if words and words[0].strip("`,.:;") in bad:
                    found.append(f"{path}:{getattr(node, 'lineno', 1)} {' '.join(words[:5])}")
    assert found == []


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no clone of git"
)
def test_no_link_is_committed():
    """A link names a path of one machine, and a checkout deletes the folder that it replaces."""
    command = ["git", "ls-files", "--stage"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert listed
    assert [line for line in listed.splitlines() if line.startswith("120000")] == []
