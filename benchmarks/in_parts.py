"""``python -m benchmarks.in_parts``: models and factors that are cut over 2 and 4 gloo processes, and what one keeps.

Memory at the peak of a measure and of what it leaves, messages, kilobytes sent and time, of a perceptron of layers of
one width under ``fully_shard``: gathered, or its parameters in turn, with a matrix that every process keeps, or of
which each keeps its own layers, some of these a sweep, or all in one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import nngeom as nng
from benchmarks import report
from benchmarks.communication import sent
from benchmarks.distributed import LIMIT, PLAIN, counted
from benchmarks.timing import peak_memory

KINDS: dict[str, Any] = {
    "PMatKFAC": nng.PMatKFAC,
    "in parts, by sweeps": nng.PMatSharded.of(nng.PMatKFAC),
    "in parts, streamed": nng.PMatSharded.of(nng.PMatKFAC, streamed=True),
}
WAYS = ("gathered", "in turn")


def row(kind: str, way: str, width: int, depth: int, examples: int) -> dict[str, Any]:
    """Of one measure in this process."""
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())), nn.Linear(width, 4))
    nbytes = sum(p.numel() * p.element_size() for p in net.parameters())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*net, net):
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    part = torch.randn(examples, width)[dist.get_rank() :: dist.get_world_size()]
    budget = nbytes + 2**10 if way == "gathered" else nbytes - 1
    batches = [(x,) for x in part.split(32)]
    measure: Callable[[], Any] = lambda: nng.FIM(
        net, batches, KINDS[kind], memory_budget=budget, process_group=mesh.get_group()
    )
    start = time.process_time()
    with counted() as (calls, n):
        kept = measure().nbytes()
    processor = time.process_time() - start
    peak = peak_memory(measure)
    return {
        "parameters": nbytes / 2**20,
        "kept": kept / 2**20,
        "peak": None if peak is None else peak / 2**20,
        "messages": calls.total(),
        "kilobytes": sum(sent(name, dist.get_world_size(), total) for name, total in n.items()) / 1e3,
        "processor": processor,
    }


def process(width: int, depth: int, examples: int) -> dict[str, Any]:
    """All of them, of each number the largest over processes."""
    torch.set_num_threads(1)
    own = {(kind, way): row(kind, way, width, depth, examples) for kind in KINDS for way in WAYS}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    rows = [
        {"kind": kind, "way": way}
        | {key: None if value is None else max(other[kind, way][key] for other in every) for key, value in mine.items()}
        for (kind, way), mine in own.items()
    ]
    return {"ranks": len(every), "rows": rows}


def launched(size: int, options: Sequence[str]) -> dict[str, Any]:
    """:func:`process` in so many processes, which torchrun starts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--module"]
        command = [sys.executable, "-m", *torchrun, "benchmarks.in_parts", *options, "--process", str(out)]
        subprocess.run(command, env=PLAIN | os.environ, timeout=LIMIT, check=True)
        return json.loads(out.read_text())


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Memory over that of the whole parameters; time over that of the first row of as many processes."""
    head = ("matrix", "processes", "parameters", "kept", "peak", "messages", "MB sent", "processor")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for run in runs:
        first = run["rows"][0]
        for r in run["rows"]:
            peak = "-" if r["peak"] is None else f"{r['peak'] / r['parameters']:.2f}"
            numbers = [f"{r['kept'] / r['parameters']:.2f}", peak, str(r["messages"]), f"{r['kilobytes'] / 1e3:.1f}"]
            cells = [r["kind"], str(run["ranks"]), r["way"], *numbers, f"{r['processor'] / first['processor']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.in_parts", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--docs", help="write the table into this Markdown file, between its marks")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    o = parser.parse_args(argv)
    if o.process:
        dist.init_process_group("gloo")
        found = process(o.width, o.depth, o.examples)
        if dist.get_rank() == 0:
            Path(o.process).write_text(json.dumps(found))
        gc.collect()  # models in cycles hold the group, which gloo wants closed before the interpreter ends
        dist.barrier()
        dist.destroy_process_group()
        return
    sizes = ["--width", str(o.width), "--depth", str(o.depth), "--examples", str(o.examples)]
    runs = [launched(size, sizes) for size in o.processes]
    results = report.merge(o.json, runs=runs, environment=report.environment("cpu"))
    text = table(results["runs"])
    print(text)
    if o.docs:
        report.into(o.docs, "in parts", text)


if __name__ == "__main__":
    main()
