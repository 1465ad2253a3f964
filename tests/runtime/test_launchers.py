"""Launchers in the environment: numbers that are none, and starts that do not know their peers."""

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.runtime import launchers, processes

NAMES = (
    *launchers.KNOWN,
    *launchers.OTHERS,
    "PMI_RANK",
    "MV2_COMM_WORLD_RANK",
    "RANK",
    "PMIX_RANK",
)


@pytest.fixture
def environment(monkeypatch):
    def given(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return given


@pytest.mark.parametrize("name", launchers.KNOWN)
@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5", "9" * 30, "٣"])
def test_numbers_of_processes_that_are_none(environment, name, value):
    environment(**{name: value})
    with pytest.raises(ConfigError, match=f"^{name}='{value}' in the environment; expected a num"):
        launchers.tasks()


def test_numbers_of_processes(environment):
    environment()
    assert launchers.tasks() == 1
    environment(SLURM_STEP_NUM_TASKS="", OMPI_COMM_WORLD_SIZE="4")
    assert launchers.tasks() == 4


@pytest.mark.parametrize(
    "variables, words",
    [
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, r"mpiexec started .* one of 4 .*--process=\$PMI_RANK"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "torchrun started this process as one of 2"),
        ({"PMIX_RANK": "0"}, "a PMIx launcher started this process"),
    ],
    ids=str,
)
def test_lone_starts_are_refused(environment, variables, words):
    environment(**variables)
    with pytest.raises(ConfigError, match=words):
        processes.start()


@pytest.mark.parametrize(
    "variables, more",
    [
        ({}, {"PMIX_RANK": "0"}),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, {"PMI_SIZE": "2"}),
        ({"WORLD_SIZE": "8"}, {"RANK": "0"}),  # without a rank it may mean anything
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, {"WORLD_SIZE": "2", "RANK": "0"}),
    ],
    ids=str,
)
def test_other_starts_are_not_and_one_variable_decides(environment, variables, more):
    environment(**variables)
    launchers.refuse_lone_starts()
    environment(**{**variables, **more})
    with pytest.raises(ConfigError, match="started this process"):
        launchers.refuse_lone_starts()
