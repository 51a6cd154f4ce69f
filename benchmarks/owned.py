"""``python -m benchmarks.owned``: what each of 1, 2, 4 gloo processes keeps of an optimizer's curvature, all of it or
that of its own layers.

Bytes of averages and of inverses or bases, memory at the peak of a step in which these are made anew, kilobytes sent in
it and in one without, of a perceptron with layers of one width.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from benchmarks import report
from benchmarks.communication import sent
from benchmarks.distributed import LIMIT, PLAIN, counted
from benchmarks.timing import peak_memory

MAKERS: dict[str, Callable[..., Any]] = {"KFAC": nng.optim.KFAC, "EKFAC": nng.optim.EKFAC}
EVERY = {"KFAC": "inverse_every", "EKFAC": "basis_every"}


def nbytes(x: Any) -> int:
    """Of all tensors in dicts and lists."""
    if isinstance(x, Tensor):
        return x.numel() * x.element_size()
    inner = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return sum(map(nbytes, inner))


def row(kind: str, placement: str, width: int, depth: int, examples: int) -> dict[str, Any]:
    """Of one optimizer in this process."""
    torch.manual_seed(0)
    group, size = dist.group.WORLD, dist.get_world_size()
    net = nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())))
    wrapped = nn.parallel.DistributedDataParallel(net)
    part = slice(dist.get_rank(), None, size)
    x, y = torch.randn(examples, width)[part], torch.randint(0, width, (examples,))[part]
    due = [True]
    every = lambda step: 1 if due[0] else 10**6
    options = {EVERY[kind]: every, "statistics_every": every, "placement": placement}
    opt = MAKERS[kind](wrapped, lr=1e-6, process_group=group, **options)

    def step() -> None:
        opt.zero_grad()
        with opt.observe():
            F.cross_entropy(wrapped(x), y).backward()
        opt.step()

    def kilobytes() -> float:
        with counted() as (_, n):
            step()
        return sum(sent(name, size, total) for name, total in n.items()) / 1e3

    step()
    with_bases, peak = kilobytes(), peak_memory(step)
    due[0] = False
    return {
        "kept": nbytes(opt.state_dict()["curvature"]["parts"]) / 2**20,
        "peak": None if peak is None else peak / 2**20,
        "with bases": with_bases,
        "without": kilobytes(),
    }


def process(width: int, depth: int, examples: int) -> dict[str, Any]:
    """All of them, of each number the largest over processes."""
    torch.set_num_threads(1)
    own = {(kind, how): row(kind, how, width, depth, examples) for kind in MAKERS for how in ("replicated", "owned")}
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    rows = [
        {"kind": kind, "placement": how}
        | {key: None if value is None else max(other[kind, how][key] for other in every) for key, value in mine.items()}
        for (kind, how), mine in own.items()
    ]
    return {"ranks": len(every), "rows": rows}


def launched(size: int, options: Sequence[str]) -> dict[str, Any]:
    """:func:`process` in so many processes, which torchrun starts."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(size), "--module"]
        command = [sys.executable, "-m", *torchrun, "benchmarks.owned", *options, "--process", str(out)]
        subprocess.run(command, env=PLAIN | os.environ, timeout=LIMIT, check=True)
        return json.loads(out.read_text())


def table(runs: Sequence[dict[str, Any]]) -> str:
    """What is kept over what one process keeps; of each number the process with most."""
    head = ("", "processes", "placement", "kept", "peak MiB", "kB sent, bases anew", "kB sent")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for kind in MAKERS:
        one = next(r for r in runs[0]["rows"] if r["kind"] == kind)["kept"]
        for run in runs:
            for r in run["rows"]:
                if r["kind"] == kind and (run["ranks"] > 1 or r["placement"] == "replicated"):
                    peak = "-" if r["peak"] is None else f"{r['peak']:.1f}"
                    numbers = [f"{r['kept'] / one:.2f}", peak, f"{r['with bases']:.0f}", f"{r['without']:.0f}"]
                    lines.append(f"| {' | '.join([kind, str(run['ranks']), r['placement'], *numbers])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write it where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.owned", description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--examples", type=int, default=64)
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
        report.into(o.docs, "owned", text)


if __name__ == "__main__":
    main()
