"""``python -m benchmarks.threads``: wall time on one thread over that on two, call by call in turn, in one process.

Needs a machine on which nothing else runs: the load before and after is written down, and warned of. ``--json FILE``
keeps the results, other cells of the file stay; ``--docs PAGE`` writes the table between its marks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

import torch

from benchmarks import report
from benchmarks.ours import JOBS
from benchmarks.workloads import MODELS, for_job

BUSY = 0.5  # processes that wait or run, besides this one's


def measured(job: str, name: str, threads: int, repeats: int) -> dict[str, Any]:
    """Seconds of one call on one and on several threads, medians of rounds in turn."""
    run, _ = JOBS[job]["nngeom"](for_job(name, job))
    seconds: dict[int, list[float]] = {1: [], threads: []}
    before = os.getloadavg()[0]
    for several in seconds:
        torch.set_num_threads(several)
        run()
    for _ in range(repeats):
        for several, found in seconds.items():
            torch.set_num_threads(several)
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
    medians = {several: statistics.median(found) for several, found in seconds.items()}
    return {
        "job": job,
        "workload": name,
        "threads": threads,
        "seconds": {str(several): found for several, found in medians.items()},
        "ratio": medians[1] / medians[threads],
        "load": [before, os.getloadavg()[0]],
    }


def markdown(results: dict[str, Any]) -> str:
    """The table of the documentation: ratios, a column a workload."""
    cells = {(r["job"], r["workload"]): f"{r['ratio']:.2f}" for r in results.get("threads", [])}
    jobs = sorted({job for job, _ in cells}, key=list(JOBS).index)
    lines = [f"| job | {' | '.join(MODELS)} |", "|---" * (1 + len(MODELS)) + "|"]
    lines += [f"| {job} | {' | '.join(cells.get((job, name), '-') for name in MODELS)} |" for job in jobs]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the chosen cells, write JSON and the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__)
    parser.add_argument("--job", nargs="*", default=["J1", "J2", "J4", "J6"], choices=list(JOBS))
    parser.add_argument("--workload", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="write the results here; other cells of the file stay")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--docs", help="write the table into this Markdown file, between its marks")
    options = parser.parse_args(argv)
    if not options.render and (load := os.getloadavg()[0]) > BUSY:
        print(f"something else runs on this machine (load {load:.1f}): these ratios mean little")
    results = report.load(options.json)
    for job in [] if options.render else options.job:
        for name in options.workload:
            record = measured(job, name, options.threads, options.repeats)
            rows = report.replaced(results.get("threads", []), record, ("job", "workload"))
            results = report.merge(options.json, environment=report.environment("cpu"), threads=rows)
            print(f"{job} {name}: {record['ratio']:.2f}", flush=True)
    if options.docs:
        report.into(options.docs, "threads", markdown(results))


if __name__ == "__main__":
    main()
