"""``python -m benchmarks``: one cell or the whole table of workloads and jobs, as multiples of one forward and backward
pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks import report, truth
from benchmarks.ours import JOBS as OURS
from benchmarks.peers import missing, peers
from benchmarks.timing import interleaved, peak_memory
from benchmarks.workloads import MODELS, for_job, workload

ALL_JOBS = [f"J{j}" for j in range(1, 12)]
TOLERANCE = 1e-3


def cell(
    name: str, job: str, device: str, repeats: int, only: str = "", check: bool = True, memory: bool = True
) -> dict[str, Any]:
    """One workload and job: who agrees, then how fast, then how much memory."""
    contenders = {k: f for k, f in {**OURS.get(job, {}), **peers(job)}.items() if only in k}
    skipped, setups = {}, {}
    examples = (6, 3 if job not in ("J6", "J9", "J11") else 6)
    expected = truth.TRUTHS[job](workload(name, *examples, dtype=torch.float64)) if check else None
    for label, setup in contenders.items():
        try:
            if expected is not None and label not in truth.RANDOM:  # a model of its own: some leave hooks behind
                small = workload(name, *examples, dtype=torch.float64 if label in OURS.get(job, {}) else torch.float32)
                run, canonical = setup(small)
                error = truth.disagreement(job, small, canonical(run()), expected)
                if not error <= TOLERANCE:
                    skipped[label] = f"disagrees with the slow reference by {error:.1e}"
                    continue
            setups[label] = setup(for_job(name, job, device=device))[0]
        except Exception as error:
            skipped[label] = f"{type(error).__name__}: {str(error)[:160]}"
    floor = for_job(name, job, device=device).floor
    series = interleaved(floor, setups, repeats, device)
    timed = {k: s.summary() for k, s in series.items()}
    result: dict[str, Any] = {
        "workload": name,
        "job": job,
        "floor": timed.pop("floor"),
        "contenders": timed,
        "skipped": skipped,
    }
    if memory:
        for label in setups:
            result["contenders"][label]["peak_bytes"] = _peak_in_fresh_process(name, job, label, device)
    return result


def _peak_in_fresh_process(name: str, job: str, label: str, device: str) -> int | None:
    cell_of = ["--workload", name, "--job", job, "--device", device, "--threads", str(torch.get_num_threads())]
    # every block of 64 KiB is given back when it is freed, so that the mark shows what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--peak-of", label, *cell_of],
        capture_output=True,
        text=True,
        env=environment,
    )
    last = done.stdout.split()[-1:]
    return int(last[0]) if done.returncode == 0 and last and last != ["None"] else None


def _print_peak(name: str, job: str, label: str, device: str) -> None:
    setup = {**OURS.get(job, {}), **peers(job, label)}[label]
    w = for_job(name, job, device=device)
    run, _ = setup(w)
    w.floor()
    for module in ("scipy.linalg", "opt_einsum"):  # imports are not the job's memory
        __import__(module)
    setup(workload(name, 2, 2, device=device))[0]()  # nor is what the first call of any size loads
    print(peak_memory(run, device))


def main(argv: list[str] | None = None) -> None:
    """Parse the options, run, print the table, write JSON and PNG where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--workload", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--job", nargs="*", default=ALL_JOBS, choices=ALL_JOBS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with the slow reference")
    parser.add_argument("--no-memory", action="store_true", help="skip the measurement of peak memory")
    parser.add_argument(
        "--scaling", action="store_true", help="time and memory against n, c, d, t and the batch size instead"
    )
    parser.add_argument("--quick", action="store_true", help="one round, without memory")
    parser.add_argument(
        "--json",
        help="write the results here; cells of the file that are not run again stay, with --only their contenders too",
    )
    parser.add_argument("--plot", help="write a figure here")
    parser.add_argument(
        "--render", action="store_true", help="run nothing: print the table of the file given by --json, draw --plot"
    )
    parser.add_argument("--docs", help="write the table into this Markdown file, between its marks")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.peak_of:
        _print_peak(options.workload[0], options.job[0], options.peak_of, options.device)
        return
    if options.quick:
        options.repeats, options.no_memory = 1, True
    if options.scaling:
        from benchmarks.scaling import studies

        results = report.merge(
            options.json, environment=report.environment(options.device), scaling=studies(options.repeats)
        )
    elif options.render:
        results = report.load(options.json)
        print(report.markdown(results))
    else:
        results = _table(options)
    if options.docs:
        report.into(options.docs, "table", report.markdown(results))
    if options.plot:
        report.plot(results, options.plot)


def _table(options: argparse.Namespace) -> dict[str, Any]:
    """Every chosen cell, written as soon as it is there."""
    environment, absent = report.environment(options.device), missing()
    results = report.load(options.json)
    if results and results["environment"] != environment:
        raise SystemExit(
            f"{options.json} was measured in {results['environment']}, this is {environment}; give another file"
        )
    for library, why in absent.items():
        print(f"{library} skipped: {why}")
    for job in options.job:
        for name in options.workload:
            if job not in OURS:
                print(f"{job} {name}: not offered by the installed version")
                continue
            found = cell(
                name, job, options.device, options.repeats, options.only, not options.no_check, not options.no_memory
            )
            print(report.line(found), flush=True)
            results = report.with_cell(results, found, keep=bool(options.only))
            results = report.merge(options.json, environment=environment, missing=absent, cells=results["cells"])
    return results


if __name__ == "__main__":
    main()
