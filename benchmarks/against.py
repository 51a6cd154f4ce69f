"""This checkout against another commit: the jobs of both in one run, call by call in turn.

``python -m benchmarks.against REVISION [--jobs J1 J2] [--workloads W1] [--rounds 9]`` checks the revision out into a
temporary folder, runs one process in each tree on one thread, and prints the ratio of the medians of processor seconds,
of later and of first calls.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def serve() -> None:
    """Run ``workload job contender`` as lines come, and answer with seconds; ``-`` where there is no such job."""
    import torch

    from benchmarks.ours import JOBS
    from benchmarks.timing import clock
    from benchmarks.workloads import for_job

    torch.set_num_threads(1)
    made = {}
    for line in sys.stdin:
        name, job, contender = line.strip().split("|")
        if (name, job, contender) not in made:
            made.clear()
            setup = JOBS.get(job, {}).get(contender)
            if setup is None:
                print("-", flush=True)
                continue
            run, _ = setup(for_job(name, job))
            run()
            made[name, job, contender] = run
        print(clock(made[name, job, contender], "cpu", 0.05), flush=True)


def worker(tree: Path) -> subprocess.Popen[str]:
    """A process that imports everything from ``tree``."""
    env = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    return subprocess.Popen(command, cwd=tree, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(process: subprocess.Popen[str], line: str) -> float | None:
    """Seconds of one call."""
    assert process.stdin is not None and process.stdout is not None
    print(line, file=process.stdin, flush=True)
    answer = process.stdout.readline().strip()
    if not answer:
        raise RuntimeError(f"the process ended at {line}")
    return None if answer == "-" else float(answer)


def turn(
    here: subprocess.Popen[str], before: subprocess.Popen[str], line: str, swapped: bool
) -> tuple[float | None, float | None]:
    """Seconds of both; which of them is first changes, since the first call after a pause is the slower one."""
    if swapped:
        theirs = ask(before, line)
        return ask(here, line), theirs
    return ask(here, line), ask(before, line)


def main() -> None:
    """Print a row a job and workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("revision")
    parser.add_argument("--jobs", nargs="+", default=[f"J{j}" for j in range(1, 12)])
    parser.add_argument("--workloads", nargs="+", default=["W1", "W2", "W3", "W4"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        there = Path(folder) / "there"
        subprocess.run(
            ["git", "worktree", "add", "--quiet", "--detach", str(there), options.revision], cwd=ROOT, check=True
        )
        here, before = worker(ROOT), worker(there)
        try:
            for job in options.jobs:
                for name in options.workloads:
                    for contender in ("nngeom", "nngeom (first call)", "nngeom (one random probe)"):
                        line = f"{name}|{job}|{contender}"
                        pairs = [turn(here, before, line, bool(j % 2)) for j in range(options.rounds)]
                        if None in pairs[0]:
                            continue
                        mine, theirs = (statistics.median(x) for x in zip(*pairs))  # type: ignore[type-var]
                        print(
                            f"{job} {name} {contender:26s} {1e3 * mine:9.2f} ms {1e3 * theirs:9.2f} ms  ratio "
                            f"{mine / theirs:.3f}",
                            flush=True,
                        )
        finally:
            for process in (here, before):
                process.kill()
                process.wait()
            subprocess.run(["git", "worktree", "remove", "--force", str(there)], cwd=ROOT, check=False)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        sys.path[0] = os.environ["PYTHONPATH"]
        serve()
    else:
        main()
