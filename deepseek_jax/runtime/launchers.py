"""The launchers that start many processes, and what they say in the environment."""

import os

from deepseek_jax.config import ConfigError

KNOWN = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # those that JAX reads, too

# Variable with the number of processes -> who sets it, and the variable with this one's number.
OTHERS = {
    "PMI_SIZE": ("mpiexec", "PMI_RANK"),
    "MV2_COMM_WORLD_SIZE": ("mpirun", "MV2_COMM_WORLD_RANK"),
    "MPI_LOCALNRANKS": ("mpiexec", "PMI_RANK"),
    "WORLD_SIZE": ("torchrun", "RANK"),
}


def tasks() -> int:
    """Number of processes that srun or Open MPI started; 1 without either."""
    return max(_number(name) or 1 for name in KNOWN)


def refuse_lone_starts() -> None:
    """Raises ConfigError in a process that is one of many and was not told which.

    Each would be a run of its own, all of them in one workdir.
    """
    for size, (launcher, rank) in OTHERS.items():
        count = os.environ.get(size, "")
        if rank in os.environ and count.isdecimal() and int(count) > 1:
            raise ConfigError(
                f"{launcher} started this process as one of {count} ({size}={count}), and does not "
                f"say where process 0 is: give --coordinator=HOST:PORT --processes={count} "
                f"--process=${rank}, or start with srun, Open MPI's mpirun or launch/local.sh"
            )
    if "PMIX_RANK" in os.environ and not any(name in os.environ for name in KNOWN):
        raise ConfigError(
            "a PMIx launcher started this process (PMIX_RANK), and does not say where process 0 "
            "is: give --coordinator=HOST:PORT --processes=N --process=$PMIX_RANK, or unset "
            "PMIX_RANK if there is one process"
        )


def attempt(given: str) -> str:
    """Name of this start of the run, the same in all its processes; "" where none is known.

    It is `given`, or that of SLURM, which counts the starts of a job.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    return given or (f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else "")


def _number(name: str) -> int | None:
    """The variable as a number of processes; None where it is unset or empty."""
    value = os.environ.get(name, "").strip()
    if not value:
        return None
    if not value.isdecimal() or not value.isascii() or not 0 < int(value[:10]) < 1 << 20:
        raise ConfigError(f"{name}={value!r} in the environment; expected a number of processes")
    return int(value)
