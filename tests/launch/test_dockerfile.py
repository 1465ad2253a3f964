"""The image: linted, pinned, not root, with all that the package needs and nothing else."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch" / "Dockerfile"
FORMS = ("cuda13", "cpu")


def lines() -> list[str]:
    """Instructions, each in one line."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return [line for line in re.sub(r"\\\n\s*", " ", text).splitlines() if line]


def pins() -> dict[str, str]:
    found = (ROOT / "launch" / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in found if not line.startswith("#"))


def extras(form: str) -> list[str]:
    [run] = [line for line in lines() if "pip install" in line]
    [names] = re.findall(rf" {form}\) extras=([\w,]+)", run)
    return names.split(",")


def test_the_image_passes_hadolint():
    beside = Path(sys.executable).with_name("hadolint")
    found = str(beside) if beside.exists() else shutil.which("hadolint")
    if not found:
        pytest.skip("hadolint is not installed; the dev extra brings it")
    check = subprocess.run(
        [found, "-"], input=DOCKERFILE.read_text(), capture_output=True, text=True
    )
    assert (check.returncode, check.stdout) == (0, "")
    bad = DOCKERFILE.read_text().replace(":3.11.14-slim-bookworm", "")
    assert subprocess.run([found, "-"], input=bad, capture_output=True, text=True).returncode


@pytest.mark.parametrize("form", FORMS)
def test_every_requirement_has_a_pin_that_fits(form):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        each for extra in extras(form) for each in project["optional-dependencies"][extra]
    ]
    assert len(wanted) > 15
    for requirement in map(Requirement, wanted):
        name = requirement.name.lower().replace("_", "-")
        assert pins()[name] in requirement.specifier, requirement
    if form == "cuda13":
        assert pins()["jax-cuda13-plugin"] == pins()["jax"] == pins()["jaxlib"]
        # Older ones leak proxy slots on aarch64, until collectives hang.
        assert tuple(map(int, pins()["nvidia-nccl-cu13"].split("."))) >= (2, 29, 3)


def test_the_base_is_pinned_and_the_user_is_not_root():
    base, *rest = lines()
    assert re.fullmatch(r"FROM python:\d+\.\d+\.\d+-slim-\w+", base)
    [user] = [line for line in rest if line.startswith("USER ")]
    [number] = [line.partition("=")[2] for line in rest if line.startswith("ARG USER_ID=")]
    assert user == "USER ${USER_ID}" and int(number) >= 10_000


def test_what_is_copied_exists_and_reaches_the_image():
    kept = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [
        source for line in lines() if line.startswith("COPY ") for source in line.split()[1:-1]
    ]
    assert {"deepseek_jax", "configs", "setup.py", "launch/constraints.txt"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists() and f"!{source}" in kept


def test_kubernetes_names_this_image_and_finds_its_configs():
    manifest = (ROOT / "launch" / "kubernetes.yaml").read_text()
    [image] = re.findall(r"^\s*image: (\S+)", manifest, re.MULTILINE)
    assert f"-t {image} ." in DOCKERFILE.read_text()
    assert "--config=configs/" in manifest and "WORKDIR /opt/deepseek_jax" in lines()
