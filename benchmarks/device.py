"""``python -m benchmarks.device`` (``make gpu``): everything that a machine with a GPU is asked, in one command.

The device part of the tests, J1 to J11 with times and peak memory, the rows and the larger nets. Each result is written
as soon as it is there, to ``docs/data/gpu-NAME.json`` with the name of the card; what the file has is not run again, so
that a run that was cut off goes on where it was. After ``--minutes`` nothing more is started.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks import report, rows
from benchmarks.large import JOBS as LARGE
from benchmarks.ours import JOBS as OURS
from benchmarks.timing import interleaved, peak_memory
from benchmarks.workloads import MODELS, for_job

Step = tuple[str, Callable[[], Any]]


def tests(device: str) -> dict[str, Any]:
    """The device part of the test suite: how it ended."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_on_a_device.py"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NNGEOM_DEVICE": device})
    last = done.stdout.strip().splitlines()[-1:]
    return {"passed": done.returncode == 0, "summary": last[0] if last else "", "seconds": time.perf_counter() - start}


def timed(name: str, job: str, device: str, repeats: int) -> dict[str, Any]:
    """A workload and job: multiples of the floor in turn with it, and the peak of one call in this process."""
    runs = {label: setup(for_job(name, job, device=device))[0] for label, setup in OURS[job].items()}
    series = interleaved(for_job(name, job, device=device).floor, runs, repeats, device)
    found = {label: s.summary() for label, s in series.items()}
    found["nngeom"]["peak_bytes"] = peak_memory(runs["nngeom"], device)
    return {"floor": found.pop("floor"), "contenders": found}


def large(model: str, job: str, device: str, toy: bool, seconds: float) -> dict[str, Any]:
    """A job on a larger net, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.large", "--inside", "--model", model, "--job", job]
    command += ["--device", device, "--limit-gib", "64"] + (["--toy", "--examples", "4", "--batch", "2"] if toy else [])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {seconds:.0f} s"}
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def steps(options: argparse.Namespace) -> Iterator[Step]:
    """All of them by name, the quick ones first."""
    device, repeats = options.device, options.repeats
    yield "tests", lambda: tests(device)
    for row in rows.ROWS:
        yield f"row {row}", lambda row=row: rows.measured(row, device, repeats)
    for job in OURS:
        for name in MODELS:
            yield f"{job} {name}", lambda name=name, job=job: timed(name, job, device, repeats)
    for model, jobs in LARGE.items():
        for job in jobs:
            yield f"{model} {job}", lambda model=model, job=job: large(model, job, device, options.toy, 120)


def card(device: str) -> str:
    """The name of a device, as part of the name of a file."""
    return re.sub(r"[^a-z0-9]+", "-", str(report.environment(device)["device"]).lower()).strip("-")


def cells(name: str, found: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """``(what, ms, multiples of the floor, peak MiB)`` of a step."""
    peak = lambda s: "-" if s.get("peak_bytes") is None else f"{s['peak_bytes'] / 2**20:.0f}"
    if "failed" in found:
        yield name, found["failed"], "-", "-"
    elif "contenders" in found:
        for label, s in found["contenders"].items():
            what = name if label == "nngeom" else f"{name}, {label}"
            yield what, f"{s['median_ms']:.2f}", f"{s['ratio']:.3g}", peak(s)
    elif "floors" in found:
        yield name, f"{1e3 * found['seconds']:.0f}", f"{found['floors']:.3g}", peak(found)
    else:
        yield name, found.get("summary", ""), "-", "-"


def markdown(results: list[dict[str, Any]]) -> str:
    """The table of the documentation: a card after the other."""
    lines = ["| card | job | ms | floors | peak MiB |", "|---|---|---|---|---|"]
    for result in results:
        device = result["environment"]["device"]
        for name, found in result["steps"].items():
            lines += [f"| {device} | {' | '.join(row)} |" for row in cells(name, found)]
    return "\n".join(lines)


def run(options: argparse.Namespace, path: str) -> dict[str, Any]:
    """Every step that the file does not have, while there is time."""
    environment, end = report.environment(options.device), time.monotonic() + 60 * options.minutes
    results = report.load(path)
    if results and results["environment"] != environment:
        raise SystemExit(f"{path} was measured in {results['environment']}, this is {environment}; move it away")
    for name, step in steps(options):
        if name in results.get("steps", {}) or (options.only and not name.startswith(tuple(options.only))):
            continue
        if time.monotonic() > end:
            print(f"no time for {name} and what follows: run the command again")
            break
        try:
            found = step()
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
        for row in cells(name, found):
            print(" | ".join(row), flush=True)
        results = report.merge(path, environment=environment, steps={**results.get("steps", {}), name: found})
    return results


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, write the file and the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="steps whose name starts so")
    parser.add_argument("--toy", action="store_true", help="the larger nets very small, to try the command")
    parser.add_argument("--folder", default="docs/data")
    parser.add_argument("--docs", help="write the table of all files into this Markdown file, between its marks")
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; to try the command: python -m benchmarks.device --device cpu --toy")
    run(options, os.path.join(options.folder, f"gpu-{card(options.device)}.json"))
    if options.docs:
        names = sorted(n for n in os.listdir(options.folder) if re.fullmatch(r"gpu-.*\.json", n))
        results = [report.load(os.path.join(options.folder, n)) for n in names]
        report.into(options.docs, "gpu", markdown(results))


if __name__ == "__main__":
    main()
