"""Results as text, Markdown and a figure."""

from __future__ import annotations

import json
import os
import platform
from typing import Any

import torch

# From one run on one thread of a server CPU: a straightforward hand-written version, and the best other library.
REFERENCE = {
    "J1": {"W1": 3.50, "W2": 4.40, "W3": 7.12, "W4": 9.65},
    "J2": {"W1": 5.51, "W2": 4.22, "W3": 5.98, "W4": 7.64},
    "J3": {"W1": 1.94, "W2": 1.77, "W3": 2.49, "W4": 1.57},
    "J4": {"W1": 13.0, "W2": 8.27, "W3": 23.0, "W4": 17.0},
    "J5": {"W1": 145.0, "W2": 12.0, "W3": 24.0, "W4": 16.0},
    "J6": {"W1": 7.24, "W2": 8.11, "W3": 9.04, "W4": 12.0},
    "J7": {"W1": 3.01, "W2": 5.00, "W3": 4.93, "W4": 6.22},
    "J8": {"W1": 1.95, "W2": 1.50, "W3": 1.54, "W4": 2.05},
    "J9": {"W1": 22.0, "W2": 1.89, "W3": 2.70, "W4": 1.49},
    "J10": {"W1": 1.09, "W2": 0.10, "W3": 0.92, "W4": 0.29},
    "J11": {"W1": 9.12, "W2": 10.0, "W3": 16.0, "W4": 24.0},
}
PEER = {
    "J1": {"W1": 5.61, "W2": 6.12, "W3": 13.0, "W4": 12.0},
    "J2": {"W1": 6.54, "W2": 6.12, "W3": 6.44, "W4": 7.45},
    "J3": {"W1": 1.85, "W2": 2.25, "W3": 3.06, "W4": 1.73},
    "J4": {"W1": 27.0, "W2": 27.0, "W3": 42.0, "W4": 32.0},
    "J5": {"W1": 154.0, "W2": 11.0, "W3": 23.0, "W4": 13.0},
    "J6": {"W1": 21.0, "W2": 18.0, "W3": 29.0, "W4": 21.0},
    "J7": {"W1": 7.88, "W2": 16.0, "W3": 20.0, "W4": 14.0},
    "J8": {"W1": 2.46, "W2": 2.17, "W3": 2.05, "W4": 2.37},
    "J9": {"W1": 24.0, "W2": 1.87, "W3": 3.13, "W4": 1.37},
    "J10": {"W1": 1.49, "W2": 0.18, "W3": 1.69, "W4": 0.45},
    "J11": {"W1": 2214.0, "W2": 67.0, "W3": 143.0, "W4": 81.0},
}


def environment(device: str) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "blas": "mkl" if torch.backends.mkl.is_available() else "other",
        "system": platform.system(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def load(path: str | None) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none yet."""
    if path is None or not os.path.exists(path):
        return {}
    with open(path) as f:
        return json.load(f)


def merge(path: str | None, **entries: Any) -> dict[str, Any]:
    """Replace entries of a JSON file, where one is given; all else in it stays."""
    results = load(path) | entries
    if path is not None:
        with open(path, "w") as f:
            json.dump(results, f, indent=1)
            f.write("\n")
    return results


def replaced(records: list[dict[str, Any]], new: dict[str, Any], identity: tuple[str, ...]) -> list[dict[str, Any]]:
    """``new`` in the place of the record with the same identity, or at the end."""
    of = lambda record: tuple(record[name] for name in identity)
    return list(({of(r): r for r in records} | {of(new): new}).values())


def with_cell(results: dict[str, Any], found: dict[str, Any], keep: bool) -> dict[str, Any]:
    """A cell in the place of the one before, sorted by job and workload; ``keep``: contenders not run again stay (their
    ratios are to their own floor).
    """
    cells = results.get("cells", [])
    old = next((c for c in cells if (c["workload"], c["job"]) == (found["workload"], found["job"])), None)
    if old is not None and keep:
        again = {*found["contenders"], *found["skipped"]}
        others = lambda entries: {label: value for label, value in entries.items() if label not in again}
        found = {
            **found,
            "contenders": others(old["contenders"]) | found["contenders"],
            "skipped": others(old["skipped"]) | found["skipped"],
        }
    cells = sorted(replaced(cells, found, ("workload", "job")), key=lambda c: (int(c["job"][1:]), c["workload"]))
    return {**results, "cells": cells}


def into(path: str, mark: str, text: str) -> None:
    """Put text into a Markdown file between ``<!-- mark -->`` and the next ``<!-- end -->``."""
    with open(path) as f:
        page = f.read()
    before, found, rest = page.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not found or not end:
        raise ValueError(f"{path} has no lines <!-- {mark} --> and <!-- end -->")
    with open(path, "w") as f:
        f.write(f"{before}{found}{text}\n{end}{after}")


def line(found: dict[str, Any]) -> str:
    """One cell, for the terminal."""
    job, name = found["job"], found["workload"]
    parts = [
        f"{job:>3} {name} floor {found['floor']['median_ms']:6.1f} ms | written by hand "
        f"{REFERENCE[job][name]:g}, best peer {PEER[job][name]:g} |"
    ]
    for label, s in sorted(found["contenders"].items(), key=lambda item: item[1]["ratio"]):
        memory = f", {s['peak_bytes'] / 2**20:.0f} MiB" if s.get("peak_bytes") is not None else ""
        parts.append(f"{label} {s['ratio']:.2f} [{s['ratio_q1']:.2f} {s['ratio_q3']:.2f}]{memory};")
    parts += [f"({label} skipped: {why})" for label, why in found["skipped"].items()]
    return " ".join(parts)


def _mebibytes(timed: dict[str, Any]) -> str:
    peak = timed.get("peak_bytes")
    return "-" if peak is None else f"{peak / 2**20:.0f}"


def markdown(results: dict[str, Any]) -> str:
    """The table of the documentation."""
    head = [
        "job",
        "workload",
        "floor ms",
        "nngeom (quartiles)",
        "first call, or one probe",
        "peak MiB",
        "by hand*",
        "best peer*",
        "peers [peak MiB]",
    ]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for found in results["cells"]:
        job, name, timed = found["job"], found["workload"], found["contenders"]
        ours = timed.get("nngeom", {})
        beside = timed.get("nngeom (first call)") or timed.get("nngeom (one random probe)")
        peers = sorted(
            ((label, s) for label, s in timed.items() if label.split(" ")[0] != "nngeom"),
            key=lambda item: item[1]["ratio"],
        )
        others = ", ".join(f"{_short(s['ratio'])} {label} [{_mebibytes(s)}]" for label, s in peers)
        spread = f"{ours['ratio']:.2f} ({ours['ratio_q1']:.2f}-{ours['ratio_q3']:.2f})" if ours else "-"
        other = f"{beside['ratio']:.2f}" if beside else "-"
        rows.append(
            f"| {job} | {name} | {found['floor']['median_ms']:.1f} | {spread} | {other} | {_mebibytes(ours)} "
            f"| {REFERENCE[job][name]:g} | {PEER[job][name]:g} | {others or '-'} |"
        )
    return "\n".join(rows)


def _short(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def _best_peer(found: dict[str, Any]) -> float:
    return min(
        (s["ratio"] for label, s in found["contenders"].items() if label.split(" ")[0] != "nngeom"),
        default=float("nan"),
    )


def plot(results: dict[str, Any], path: str) -> None:
    """Bars of our ratios beside the reference and the best peer, or the scaling studies on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if "scaling" in results:
        from benchmarks.scaling import plot as plot_scaling

        plot_scaling(results["scaling"], path)
        return
    cells = results["cells"]
    jobs = sorted({c["job"] for c in cells}, key=lambda j: int(j[1:]))
    width = min(4, len(jobs))
    height = -(-len(jobs) // width)
    figure, axes = plt.subplots(height, width, figsize=(3 * width, 2.6 * height), squeeze=False)
    for axis in list(axes.flat)[len(jobs) :]:
        axis.axis("off")
    for axis, job in zip(axes.flat, jobs):
        mine = [c for c in cells if c["job"] == job and "nngeom" in c["contenders"]]
        names = [c["workload"] for c in mine]
        series = {
            "nngeom": [c["contenders"]["nngeom"]["ratio"] for c in mine],
            "written by hand": [REFERENCE[job][n] for n in names],
            "best peer in this run": [_best_peer(c) for c in mine],
        }
        for j, (label, values) in enumerate(series.items()):
            axis.bar([x + 0.27 * (j - 1) for x in range(len(names))], values, 0.25, label=label)
        axis.set_xticks(range(len(names)), names)
        axis.set_title(job)
        axis.set_yscale("log")
    figure.supylabel("multiples of forward + backward", fontsize=9)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
