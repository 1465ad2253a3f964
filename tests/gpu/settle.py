"""All that the Hopper kernels have to show, in one run of under 10 minutes on one GPU.

python tests/gpu/settle.py [FOLDER]

Runs `bench kernels`, with the check of each kernel first, and then `bench layer`. Both print as
they go. FOLDER, default runs/settle, gets their results as JSON, and rates.json for the planner. A
command that has not ended in its time is ended, and what it has printed stays.

Exit code: 0, every kernel is right, and every row was measured; 1, one is not, with its line; 2,
this machine has no Hopper GPU.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Command -> seconds for which rows begin, and seconds after which it is ended: 9.7 minutes in all.
TIMES = {"kernels": (270, 320), "layer": (150, 260)}
HOPPER = (
    "import jax; device = jax.devices()[0]; "
    "print(device.device_kind, getattr(device, 'compute_capability', ''), sep='\\n')"
)


def main(folder: Path) -> int:
    """Runs both benchmarks; the exit code."""
    device = subprocess.run([sys.executable, "-c", HOPPER], capture_output=True, text=True)
    name, capability, *_ = [*device.stdout.splitlines(), "", ""]
    if not capability.startswith("9."):
        print(f"no Hopper GPU: {name or 'JAX finds no device'}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    faults: list[str] = []
    for name, (budget, limit) in TIMES.items():
        result = run(name, budget, limit, folder)
        faults += [f"bench {name} has not ended"] if result is None else faults_of(name, result)
    print(f"\n{time.monotonic() - begin:.0f} s; results in {folder}")
    for fault in faults:
        print(f"fault: {fault}")
    return 1 if faults else 0


def run(name: str, budget: int, limit: int, folder: Path) -> dict[str, Any] | None:
    """Result of a benchmark, also in a file; None if it failed or was ended."""
    command = [sys.executable, "-m", "deepseek_jax.bench", name, "--json", f"--budget={budget}"]
    print(f"bench {name}", flush=True)
    file = folder / f"{name}.json"
    with file.open("w") as stream:
        process = subprocess.Popen([*command, f"--out={folder / 'rates.json'}"], stdout=stream)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None
    return json.loads(file.read_text()) if code == 0 else None


def faults_of(name: str, result: dict[str, Any]) -> list[str]:
    """Lines for what is wrong in a result, or was not measured."""
    found = [f"{name}: no time was left for {left}" for left in result["left_out"]]
    if name == "layer":
        refused = result.get("kernels_refused", {})
        found += [f"kernel {kernel}: {reason}" for kernel, reason in refused.items()]
        return found + [
            f"{row['piece']}, {row['recipe']}: {row['fault']}"
            for row in result["layer"]
            if "fault" in row
        ]
    found += [
        f"check of {row['kernel']}: {row['result']}"
        for row in result["checks"]
        if row["result"] != "right"
    ]
    return found + [
        f"{row['piece']}, {row['name']}, {form}: {reason}"
        for row in result["rows"]
        for form, reason in row["faults"].items()
    ]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/settle")))
