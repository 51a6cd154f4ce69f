"""``python -m benchmarks.threads``: wall time on one thread over that on two, in turn, in one process.

Beside the jobs stands what bounds them: one forward and backward pass of every workload, the eigendecompositions of J4
by themselves, and products and copies of the machine. ``--apart`` prints the operations of every job with their times
on one thread and on two. Ratios are those of the fastest calls. Needs a machine on which little else runs: the load
before and after is written down, and warned of. ``--json FILE`` keeps the results, other cells of the file stay;
``--docs PAGE`` writes the table between its marks.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import nngeom as nng
from benchmarks import report
from benchmarks.ours import JOBS
from benchmarks.workloads import MODELS, Workload, for_job
from nngeom.pmat.eigenbases import eigenbases
from nngeom.ranks.team import ALONE

BUSY = 0.5  # processes that wait or run, besides this one's
ROUND = 0.02  # seconds of calls in a round
Run = Callable[[], Any]


def _decompositions(w: Workload) -> Run:
    blocks: Any = nng.FIM(w.model, w.batches, nng.PMatKFAC).blocks
    return lambda: eigenbases(blocks, ALONE)


def _product(side: int) -> Run:
    x, y, out = torch.randn(3, side, side)
    return lambda: torch.mm(x, y, out=out)


def _in_memory(mebibytes: int, write: Callable[..., Any]) -> Run:
    x, y, out = torch.randn(3, mebibytes * 2**18)
    return lambda: write(x, y, out)


BOUNDS: dict[str, tuple[str, Callable[[Workload], Run]]] = {  # on the data of a job
    "J4, its eigendecompositions": ("J4", _decompositions),
    "a forward and a backward pass, J1 to J4": ("J4", lambda w: w.floor),
    "a forward and a backward pass, J6": ("J6", lambda w: w.floor),
}
MACHINE: dict[str, Callable[[], Run]] = {
    "matrix product, side 64": lambda: _product(64),
    "matrix product, side 128": lambda: _product(128),
    "matrix product, side 512": lambda: _product(512),
    "copy of 64 KiB": lambda: _in_memory(1, lambda x, y, out: out[: 2**14].copy_(x[: 2**14])),
    "copy of 1 MiB": lambda: _in_memory(1, lambda x, y, out: out.copy_(x)),
    "copy of 16 MiB": lambda: _in_memory(16, lambda x, y, out: out.copy_(x)),
    "sum of two of 16 MiB": lambda: _in_memory(16, lambda x, y, out: torch.add(x, y, out=out)),
    "16 MiB of fresh memory": lambda: _in_memory(16, lambda x, y, out: torch.empty(2**24).zero_()),
}


def prepared(job: str, name: str) -> Run:
    """One call of a job, or of what bounds it."""
    if job in MACHINE:
        return MACHINE[job]()
    if job in BOUNDS:
        on, run = BOUNDS[job]
        return run(for_job(name, on))
    return JOBS[job]["nngeom"](for_job(name, job))[0]


def measured(job: str, name: str, threads: int, repeats: int, least: float = 0.0) -> dict[str, Any]:
    """Seconds of one call on one and on several threads, the fastest and the median of rounds in turn, which take
    ``least`` seconds together.
    """
    run, seconds = prepared(job, name), dict[int, list[float]]({1: [], threads: []})
    before, calls = os.getloadavg()[0], 1
    for several in seconds:
        torch.set_num_threads(several)
        run()
        calls = max(1, round(ROUND / _seconds(run)))
    start, rounds = time.perf_counter(), 0
    while rounds < repeats or time.perf_counter() - start < least:
        rounds += 1
        for several, found in seconds.items():
            torch.set_num_threads(several)
            run()  # the threads of before may still wait for work
            found += [_seconds(run) for _ in range(calls)]
    fastest = {several: min(found) for several, found in seconds.items()}
    medians = {several: statistics.median(found) for several, found in seconds.items()}
    return {
        "job": job,
        "workload": name,
        "threads": threads,
        "seconds": {str(several): found for several, found in fastest.items()},
        "medians": {str(several): found for several, found in medians.items()},
        "ratio": fastest[1] / fastest[threads],
        "rounds": rounds,
        "load": [before, os.getloadavg()[0]],
    }


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def apart(job: str, name: str, threads: int, repeats: int = 3, most: int = 14) -> str:
    """The operations of a job, and what is none of them: milliseconds of a call on one and on several threads."""
    from torch.profiler import ProfilerActivity, profile

    run, found, wall = prepared(job, name), dict[str, dict[int, float]](), dict[int, float]()
    for several in (1, threads):
        torch.set_num_threads(several)
        run()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            wall[several] = 1e3 * (time.perf_counter() - start) / repeats
        for event in seen.key_averages():
            found.setdefault(event.key, {})[several] = event.self_cpu_time_total / 1e3 / repeats
    known = {several: sum(times.get(several, 0.0) for times in found.values()) for several in wall}
    found = {"between operations": {s: wall[s] - known[s] for s in wall}, "all": wall, **found}
    largest = sorted(found, key=lambda key: -found[key].get(threads, 0.0))[:most]
    shown = [f"{key[:60]:60s} {found[key].get(1, 0):9.2f} {found[key].get(threads, 0):10.2f}" for key in largest]
    return "\n".join([f"{job} {name}", f"{'':60s}  1 thread {threads:2d} threads", *shown])


def markdown(results: dict[str, Any]) -> str:
    """The table of the documentation: ratios, a column a workload, and what the machine has alone."""
    cells = {(r["job"], r["workload"]): f"{r['ratio']:.2f}" for r in results.get("threads", [])}
    order = [*JOBS, *BOUNDS]
    jobs = sorted({job for job, _ in cells} & set(order), key=order.index)
    lines = [f"| job | {' | '.join(MODELS)} |", "|---" * (1 + len(MODELS)) + "|"]
    lines += [f"| {job} | {' | '.join(cells.get((job, name), '-') for name in MODELS)} |" for job in jobs]
    alone = [f"{job} {cells[job, '']}" for job in MACHINE if (job, "") in cells]
    return "\n".join(lines + ["", f"The machine by itself: {', '.join(alone)}."] if alone else lines)


def main(argv: list[str] | None = None) -> None:
    """Run the chosen cells, write JSON and the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.threads", description=__doc__)
    every = [*JOBS, *BOUNDS, *MACHINE]
    parser.add_argument("--job", nargs="*", default=["J1", "J2", "J4", "J6", *BOUNDS, *MACHINE], choices=every)
    parser.add_argument("--workload", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.0, help="go on with rounds of a cell for so long")
    parser.add_argument("--apart", action="store_true", help="print the operations instead")
    parser.add_argument("--json", help="write the results here; other cells of the file stay")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--docs", help="write the table into this Markdown file, between its marks")
    options = parser.parse_args(argv)
    if not options.render and (load := os.getloadavg()[0]) > BUSY:
        print(f"something else runs on this machine (load {load:.1f}): these ratios mean little")
    results = report.load(options.json)
    for job in [] if options.render else options.job:
        for name in [""] if job in MACHINE else options.workload:
            if options.apart:
                print(apart(job, name, options.threads), flush=True)
                continue
            record = measured(job, name, options.threads, options.repeats, options.seconds)
            rows = report.replaced(results.get("threads", []), record, ("job", "workload"))
            results = report.merge(options.json, environment=report.environment("cpu"), threads=rows)
            print(f"{job} {name}: {record['ratio']:.2f}", flush=True)
    if options.docs:
        report.into(options.docs, "threads", markdown(results))


if __name__ == "__main__":
    main()
