"""Documentation against the code: names exist, keys and metrics are described, commands run."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import runs

from configs import v3_671b
from deepseek_jax import config as configs
from deepseek_jax.config import values
from deepseek_jax.train import loop

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "deepseek_jax"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
README_LINES = 176

# Files of a workdir or a checkpoint, of other tools, and of placeholders in commands.
ELSEWHERE = {
    "config.json", "tokenizer.json", "metrics.jsonl", "summary.json", "loss.png",
    "expert_load.png", "device_load.png", "config.py", "checkpoints/", "tensorboard/",
    "profile/", "published/",
}  # fmt: skip
OTHER_FLAGS = {"noconftest", "kill-on-bad-exit", "nodes", "pid", "logdir"}
OTHER_WORDS = {"ragged_all_to_all", "ragged_dot", "shard_map", "fold_in", "py_spy", "_scale_inv"}

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"[\w.-]+(?:/[\w.-]+)*\.(?:py|md|sh|yaml|sbatch|toml|cff|txt)")
FOLDER = re.compile(r"[\w.-]+(?:/[\w.-]+)*/")
OURS = re.compile(r"(?<![\w./-])(?:tests|configs|launch|docs)/[\w./-]*\w")
MODULE = re.compile(r"-m deepseek_jax\.(\w+)((?: [^\n|`]*)?)")
KEY = re.compile(
    r"(?:model|mesh|layout|precision|optimizer|schedule|batch|data|checkpoint|log|evaluation)"
    r"\.[a-z][\w.]*\w"
)
WORD = re.compile(r"[a-z]+(?:_[a-z0-9]+)+")
RUN = re.compile(r"^<!-- run -->\n```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def constant(path: Path, name: str):
    """The literal that a module assigns to `name`, without importing the module."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"{path} assigns no {name}")


def keys() -> dict[str, object]:
    """Dotted key -> value of configs/v3_671b.py; `layout.rules` by logical axis."""
    out = dict(values.leaves(configs.parse(v3_671b.get_config())))
    rules = out.pop("layout.rules")
    return out | {f"layout.rules.{axis}": over for axis, over in rules.items()}


KEYS = keys()
BENCHES = constant(PACKAGE / "bench/__init__.py", "NAMES")
PLANS = tuple(constant(PACKAGE / "plan/__main__.py", "FLAGS_OF"))
MODULES = {
    "plan": PACKAGE / "plan/__main__.py",
    "bench": PACKAGE / "bench/__main__.py",
    **{path.stem: path for path in PACKAGE.glob("*.py")},
}
SOURCE = "\n".join(
    path.read_text()
    for folder in ("deepseek_jax", "configs", "tests")
    for path in ROOT.glob(f"{folder}/**/*.py")
    if path != Path(__file__)
)
SHARED_FLAGS = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (PACKAGE / "command.py").read_text()))


def flags_of(module: str) -> set[str]:
    own = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', MODULES[module].read_text())
    return SHARED_FLAGS | set(own)


ALL_FLAGS = {flag for module in MODULES for flag in flags_of(module)} | OTHER_FLAGS


def exists(name: str) -> bool:
    return any((base / name).exists() for base in (PACKAGE, ROOT, ROOT / "docs"))


def has_key(key: str) -> bool:
    return key in KEYS or any(known.startswith(f"{key}.") for known in KEYS)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    plain = FENCE.sub("", text)
    return {slug(found) for found in re.findall(r"^#+ (.*)$", plain, re.MULTILINE)}


def broken_links(page: str, text: str) -> list[str]:
    """Relative links and anchors that lead nowhere."""
    found = []
    for target in LINK.findall(FENCE.sub("", text)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        if not path.exists():
            found.append(f"{page}: no file behind link {target}")
        elif anchor and path.suffix == ".md":
            there = text if path == ROOT / page else path.read_text()
            if anchor not in anchors(there):
                found.append(f"{page}: no heading behind link {target}")
    return found


def missing_commands(page: str, text: str) -> list[str]:
    """Command modules, their subcommands and their flags that are not there."""
    found = []
    for module, rest in MODULE.findall(text.replace("\\\n", " ")):
        if module not in MODULES:
            found.append(f"{page}: no command deepseek_jax.{module}")
            continue
        name = next(iter(rest.split()), "")
        names = {"bench": (*BENCHES, "NAME"), "plan": PLANS}.get(module)
        if names and re.fullmatch(r"\w+", name) and name not in names:
            found.append(f"{page}: {module} knows no {name}")
        for flag in re.findall(r" --([\w-]+)(?=[=\s]|$)", rest.partition("#")[0]):
            if flag not in flags_of(module):
                found.append(f"{page}: {module} has no --{flag}")
    for name in re.findall(r"`bench (\w+)`", text):
        if name not in (*BENCHES, "NAME"):
            found.append(f"{page}: bench knows no {name}")
    return found


def missing_names(page: str, text: str) -> list[str]:
    """Files, folders, config keys, flags and identifiers in backticks that are not there."""
    renamed = configs.RENAMED if page == "docs/config.md" else {}
    found = [f"{page}: no {name}" for name in OURS.findall(text) if not exists(name.rstrip("."))]
    for key in re.findall(r"--config\.([a-z_.]*\w)", text):
        if not (key == "any.key" or has_key(key)):
            found.append(f"{page}: no config key {key}")
    for code in CODE.findall(FENCE.sub("", text)):
        if FILE.fullmatch(code) or FOLDER.fullmatch(code):
            if code not in ELSEWHERE and not exists(code):
                found.append(f"{page}: no file {code}")
            continue
        name = code.partition("=")[0]
        if KEY.fullmatch(name) and not has_key(name) and name not in renamed:
            found.append(f"{page}: no config key {name}")
        elif WORD.fullmatch(code) and code not in OTHER_WORDS:
            if not re.search(rf"\b{code}\b", SOURCE):
                found.append(f"{page}: no {code} in the code")
        elif re.fullmatch(r"--[\w-]+", name) and name[2:] not in ALL_FLAGS:
            found.append(f"{page}: no flag {name}")
    return found


def rows_of(text: str) -> dict[str, list[str]]:
    """First cell, a name in backticks -> the other cells, of every table row that has one."""
    out = {}
    for line in text.splitlines():
        found = re.fullmatch(r"\| `([\w.]+)` \|(.*)\|", line)
        if found:
            out[found[1]] = [cell.strip() for cell in re.split(r"(?<!\\)\|", found[2])]
    return out


def undescribed_keys(text: str) -> list[str]:
    """Keys of the config without a row, and rows whose default or choices are not the code's."""
    rows = {key: row for key, row in rows_of(text).items() if has_key(key) or key == "seed"}
    found = [f"no row for {key}" for key in KEYS if key not in rows]
    for key, (default, allowed, *_) in rows.items():
        if ast.literal_eval(default.strip("`")) != KEYS[key]:
            found.append(f"{key} is {KEYS[key]!r}, not {default}")
        for choice in values._CHOICES.get(key, ()):
            if f"`{choice}`" not in allowed:
                found.append(f"{key} may be {choice}")
    return found


def section(text: str, heading: str) -> str:
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def undescribed_fields(text: str, row: dict) -> list[str]:
    """Fields of a row without a description, and described ones that a row must have and has not.

    The last cell of a description says when a field is absent.
    """
    rows = rows_of(text)
    found = [f"no row for {name}" for name in row if name not in rows]
    for name, cells in rows.items():
        if name not in row and cells[-1] == "never":
            found.append(f"{name} is never written")
        elif f'"{name}"' not in SOURCE and not re.search(rf"\b{name}\b", SOURCE):
            found.append(f"no {name} in the code")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_name_exists(page):
    text = PAGES[page]
    found = broken_links(page, text) + missing_commands(page, text) + missing_names(page, text)
    assert found == []


@pytest.mark.parametrize("page", ["CHANGELOG.md"])
def test_links_of_other_pages_lead_somewhere(page):
    assert broken_links(page, (ROOT / page).read_text()) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("See [this](docs/nothing.md).", "no file behind link"),
        ("See [this](docs/config.md#nothing).", "no heading behind link"),
        ("`model/nothing.py`", "no file model/nothing.py"),
        ("`nothing/`", "no file nothing/"),
        ("`model.nothing=3`", "no config key model.nothing"),
        ("`layout.buffer`", "no config key layout.buffer"),
        ("`no_such_metric`", "no no_such_metric in the code"),
        ("`--nothing=3`", "no flag --nothing"),
        ("python -m deepseek_jax.nothing", "no command deepseek_jax.nothing"),
        ("python -m deepseek_jax.bench nothing", "bench knows no nothing"),
        ("`bench nothing`", "bench knows no nothing"),
        ("python -m deepseek_jax.plan nothing --pipe=8", "plan knows no nothing"),
        ("python -m deepseek_jax.plan --nothing=8", "plan has no --nothing"),
        ("main --config.model.nothing=3", "no config key model.nothing"),
        ("pytest tests/nothing.py", "no tests/nothing.py"),
    ],
)
def test_a_name_that_does_not_exist_is_found(text, message):
    page = "README.md"
    found = broken_links(page, text) + missing_commands(page, text) + missing_names(page, text)
    assert any(message in line for line in found), found


def test_every_key_of_the_config_is_described_with_its_default():
    assert undescribed_keys(PAGES["docs/config.md"]) == []


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("| `model.top_k` | `8`", "| `model.top_k` | `9`", "model.top_k is 8, not `9`"),
        ("| `model.top_k` | `8`", "| `top_k` | `8`", "no row for model.top_k"),
        ("`sigmoid`, `softmax`", "`sigmoid`", "model.score may be softmax"),
    ],
)
def test_a_key_described_wrongly_is_found(old, new, message):
    text = PAGES["docs/config.md"]
    assert old in text
    assert undescribed_keys(text.replace(old, new)) == [message]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(last row of metrics.jsonl, summary.json) of two steps on one device."""
    folder = tmp_path_factory.mktemp("docs")
    text = folder / "text"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(f"the loss of a token, number {number} " * 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        config = runs.tiny(text, schedule={"tokens": 512})
        loop.train(config, folder / "run", screen=False)
    return runs.rows(folder / "run")[-1], json.loads((folder / "run/summary.json").read_text())


def test_every_metric_of_a_run_is_described(written):
    row, summary = written
    text = PAGES["docs/metrics.md"]
    assert undescribed_fields(section(text, "metrics.jsonl"), row) == []
    assert undescribed_fields(section(text, "summary.json"), summary) == []
    assert {"loss", "max_violation"} <= row.keys()


def test_a_metric_described_wrongly_is_found():
    text = "| `loss` | nats | it | never |\n| `mtp_losses` | nats | it | without MTP |\n"
    assert undescribed_fields(text, {"loss": 1.0}) == []
    assert undescribed_fields(text, {"loss": 1.0, "other": 2}) == ["no row for other"]
    assert undescribed_fields(text, {}) == ["loss is never written"]
    text += "| `no_such_field` | s | it | on CPUs |\n"
    assert undescribed_fields(text, {"loss": 1.0}) == ["no no_such_field in the code"]


COMMANDS = [
    (page, line)
    for page, text in PAGES.items()
    for block in RUN.findall(text)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip()
]


@pytest.mark.parametrize(
    "page, line", COMMANDS, ids=[f"{page}-{n}" for n, (page, _) in enumerate(COMMANDS)]
)
def test_a_marked_command_runs(page, line):
    ran = run_line(line)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    if "--json" in line:
        json.loads(ran.stdout)


def run_line(line: str) -> subprocess.CompletedProcess:
    """One command of a page, from the repository, without a GPU."""
    program, *arguments = shlex.split(line)
    assert program == ".venv/bin/python", f"{line} does not begin with .venv/bin/python"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_pages_have_commands_to_run_and_a_broken_one_fails():
    assert len(COMMANDS) >= 3
    assert run_line(".venv/bin/python -m deepseek_jax.plan schedule --pipe=7").returncode == 2


def test_the_maps_of_the_house_show_its_floors():
    """The table of the architecture and the map of the README against `test_floors.py`."""
    floors = constant(ROOT / "tests/test_floors.py", "FLOORS")
    table = re.findall(r"^\| (\d) \| ([^|]*) \|", PAGES["docs/architecture.md"], re.MULTILINE)
    shown = {int(n): {x.strip("`/").removesuffix(".py") for x in re.findall(r"`[^`]*`", names)}
             for n, names in table}  # fmt: skip
    drawn = re.findall(r"^ (\d)  (.*)$", PAGES["README.md"], re.MULTILINE)
    assert len(shown) == len(drawn) == len(floors)
    for number, names in enumerate(floors):
        assert {name for name in shown[number] if "/" not in name} == set(names)
    for number, line in drawn:
        assert all(re.search(rf"\b{name}(/|\.py)", line) for name in floors[int(number)]), line


def test_the_readme_is_short_and_keeps_the_test_command():
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= README_LINES
    block = re.search(r"^<!-- test command -->\n```sh\n(\.venv/.*)\n```$", readme, re.MULTILINE)
    assert block and "pytest" in block[1]
