"""``python -m benchmarks.distributed``: measures and an optimizer's step over 1, 2, 4 gloo processes of one machine.

Time, messages, bytes and peak memory of a process, and beside them :mod:`benchmarks.communication`, what more processes
would take; its constants are replaced by ``--constants NAME=NUMBER``, as by those that this run fits and prints.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from benchmarks import report
from benchmarks.communication import fitted, model, sent
from benchmarks.distributed_kernels import kernel_jobs, shared_folder
from benchmarks.timing import peak_memory

LIMIT = 240  # seconds of one launch
SIDE = 512  # of the matrix that is decomposed
MESSAGES = (2**10, 2**24)  # bytes
PLAIN = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back, so that peaks show


def jobs(examples: int, width: int, folder: Path) -> dict[str, Callable[[], Any]]:
    """What is measured of a perceptron with two hidden layers, on this process's part of the examples."""
    torch.manual_seed(0)
    group, part = dist.group.WORLD, slice(dist.get_rank(), None, dist.get_world_size())
    net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))
    x, y = torch.randn(examples, 64)[part], torch.randint(0, 10, (examples,))[part]
    batches = list(zip(x.split(64), y.split(64)))
    fisher = lambda kind: nng.FIM(net, batches, kind, process_group=group)
    implicit = fisher(nng.PMatImplicit)
    v = nng.PVector.randn(implicit.layer_collection, generator=torch.Generator().manual_seed(0))
    wrapped = nn.parallel.DistributedDataParallel(net)
    opt = nng.optim.EKFAC(wrapped, lr=1e-6, statistics_every=1, basis_every=1, process_group=group)

    def step() -> None:
        opt.zero_grad()
        with opt.observe():
            F.cross_entropy(wrapped(x), y).backward()
        opt.step()

    return {
        "FIM, PMatKFAC": lambda: fisher(nng.PMatKFAC),
        "FIM, PMatEKFAC": lambda: fisher(nng.PMatEKFAC),
        "a product with PMatImplicit": lambda: implicit.mv(v),
        "a step of EKFAC, bases anew": step,
        **kernel_jobs(net, batches, folder),
    }


@contextlib.contextmanager
def counted() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """How often each collective is called, and with how many bytes: the library's, not those of torch's wrappers."""
    calls, nbytes = Counter[str](), Counter[str]()
    before = {
        name: getattr(dist, name) for name in ("all_reduce", "reduce", "broadcast", "all_gather", "batch_isend_irecv")
    }

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            sent = [op.tensor for op in args[0] if op.op is dist.isend] if name == "batch_isend_irecv" else None
            calls[name] += 1
            nbytes[name] += sum(t.numel() * t.element_size() for t in sent or [args[name == "all_gather"]])
            return before[name](*args, **kwargs)

        return call

    for name in before:
        setattr(dist, name, wrapped(name))
    try:
        yield calls, nbytes
    finally:
        for name, f in before.items():
            setattr(dist, name, f)


def measured(run: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Of one job in this process, after a first call: medians of seconds and of seconds of the processor, messages,
    kilobytes sent, and MiB at the peak.
    """
    run()
    walls, processors = [], []
    for _ in range(repeats):
        dist.barrier()
        wall, processor = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        processors.append(time.process_time() - processor)
    with counted() as (calls, nbytes):
        run()
    peak = peak_memory(run)
    return {
        "seconds": statistics.median(walls),
        "processor": statistics.median(processors),
        "messages": calls.total(),
        "collectives": dict(calls),
        "kilobytes": sum(sent(kind, dist.get_world_size(), n) for kind, n in nbytes.items()) / 1e3,
        "peak": None if peak is None else peak / 2**20,
    }


def constants(repeats: int) -> dict[str, float]:
    """Of :class:`benchmarks.communication.Constants`, by all-reduces of two sizes and one eigendecomposition."""
    a = torch.randn(SIDE, SIDE, dtype=torch.float64)
    found = {"eigh_start": 0.0, "eigh_side": SIDE, "eigh_seconds": _least(lambda: torch.linalg.eigh(a @ a.T), repeats)}
    size = dist.get_world_size()
    if size == 1:
        return found
    times = {}
    for nbytes in MESSAGES:
        t = torch.zeros(nbytes // 4)
        times[nbytes] = _least(lambda t=t: dist.all_reduce(t), repeats)
    return found | fitted(size, times)


def _least(run: Callable[[], Any], repeats: int) -> float:
    def once() -> float:
        dist.barrier()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


def process(examples: int, width: int, repeats: int) -> dict[str, Any]:
    """All jobs in this process of a group, the largest of every number over its processes, and the constants."""
    torch.set_num_threads(1)
    with shared_folder() as folder:
        own = {name: measured(run, repeats) for name, run in jobs(examples, width, folder).items()}
    own = own, constants(3 * repeats)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    largest = {
        name: {key: _largest([rows[name][key] for rows, _ in every]) for key in row} for name, row in own[0].items()
    }
    return {"ranks": len(every), "jobs": largest, "constants": every[0][1]}


def _largest(values: list[Any]) -> Any:
    return values[0] if isinstance(values[0], dict) else None if None in values else max(values)


def launched(size: int, examples: int, width: int, repeats: int) -> dict[str, Any]:
    """:func:`process` in so many processes, which torchrun starts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--module"]
        of = ["--examples", str(examples), "--width", str(width), "--repeats", str(repeats), "--process", str(out)]
        started = subprocess.Popen(
            [sys.executable, "-m", *torchrun, "benchmarks.distributed", *of], env=PLAIN | os.environ
        )
        try:
            failed = started.wait(LIMIT)
        except subprocess.TimeoutExpired:
            started.terminate()  # torchrun ends its own processes
            failed = started.wait()
        if failed:
            raise RuntimeError(f"{size} processes ended with {failed}; see what they printed above")
        return json.loads(out.read_text())


def table_of_runs(runs: Sequence[dict[str, Any]]) -> str:
    """Times over those of the first run; messages, bytes and memory of the process with most."""
    head = ("", "processes", "time", "processor", "messages", "kB sent", "peak MiB")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, first in runs[0]["jobs"].items():
        for run in runs:
            row = run["jobs"][name]
            ratios = [f"{row[key] / first[key]:.2f}" for key in ("seconds", "processor")]
            peak = "-" if row["peak"] is None else f"{row['peak']:.1f}"
            cells = [name, str(run["ranks"]), *ratios, str(row["messages"]), f"{row['kilobytes']:.0f}", peak]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_model(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds and gigabytes that the model gives."""
    head = ("", "processes", "network", "sums, once", "bases by all", "bases by one each", "longest load / mean")
    head += ("bases, GB", "by owners", "their GB", "sums after each of 1000 batches")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        seconds = [f"{row[key]:.3g}" for key in ("merge", "replicated", "assigned", "imbalance")]
        kept = [f"{row['bases'] / 1e9:.3g}", f"{row['owned']:.3g}", f"{row['owned_bases'] / 1e9:.3g}"]
        cells = [row["net"], str(row["ranks"]), row["network"], *seconds, *kept, f"{row['every_batch']:.3g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def constant(text: str) -> tuple[str, float]:
    """``NAME=NUMBER``."""
    name, _, number = text.partition("=")
    return name, float(number)


def main(argv: list[str] | None = None) -> None:
    """Measure, print both tables, write them where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__)
    parser.add_argument(
        "--processes", type=int, nargs="*", default=[1, 2, 4], help="none: the runs are those of --json"
    )
    parser.add_argument("--examples", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--model", type=int, nargs="*", default=[8, 64, 1024], help="for how many processes")
    parser.add_argument("--constants", type=constant, nargs="*", default=[], metavar="NAME=NUMBER")
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--docs", help="write the tables into this Markdown file, between their marks")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    o = parser.parse_args(argv)
    if o.process:
        dist.init_process_group("gloo")
        found = process(o.examples, o.width, o.repeats)
        if dist.get_rank() == 0:
            Path(o.process).write_text(json.dumps(found))
        gc.collect()  # models in cycles hold the group, which gloo wants closed before the interpreter ends
        dist.barrier()
        dist.destroy_process_group()
        return
    new: dict[str, Any] = {}
    if o.processes:
        new["runs"] = [launched(size, o.examples, o.width, o.repeats) for size in o.processes]
        new["environment"] = report.environment("cpu")
    results = report.merge(o.json, **new, model=model(o.model, dict(o.constants)))
    runs = results["runs"]
    tables = {"processes": table_of_runs(runs), "model": table_of_model(results["model"])}
    for mark, text in tables.items():
        print(text)
        if o.docs:
            report.into(o.docs, mark, text)
    for run in runs:
        print(f"{run['ranks']}:", *(f"{name}={value:.3g}" for name, value in run["constants"].items()))


if __name__ == "__main__":
    main()
