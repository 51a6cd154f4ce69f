"""The tables of docs/optimizers.md, written between their markers from docs/data/*.json.

python examples/optimizer_tables.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def load(name: str) -> dict:
    """One file of results."""
    return json.loads((DOCS / "data" / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def race(name: str) -> str:
    """Best setting, final loss of every seed, processor time of a run."""
    results, rows = load(name), []
    for method, runs in results["best"].items():
        whole = [r for r in runs if len(r["loss"]) == results["epochs"] and r["loss"][-1] is not None]
        losses = ", ".join(f"{r['loss'][-1]:.2g}" if r in whole else "diverged" for r in runs)
        quarter = sum(r["loss"][results["epochs"] // 4 - 1] for r in whole) / len(whole) if whole else math.nan
        settings = sum(c["final"] is not None for c in results["grid"][method])
        rows.append(
            [
                method,
                f"{runs[0]['lr']:.2g}",
                "" if runs[0]["damping"] is None else f"{runs[0]['damping']:g}",
                f"{runs[0]['momentum']:g}",
                f"{quarter:.2g}" if whole else "",
                losses,
                f"{sum(r['seconds'][-1] for r in whole) / len(whole):.1f}" if whole else "",
                f"{settings} of {len(results['grid'][method])}",
            ]
        )
    epochs = results["epochs"]
    head = [
        "method",
        "lr",
        "damping",
        "momentum",
        f"loss after {epochs // 4} epochs",
        f"after {epochs}, each seed",
        "seconds",
        "settings that ended finite",
    ]
    return table(head, rows)


def amortisation() -> str:
    """Final losses of the seeds by period."""
    results = load("amortisation")
    periods = sorted({int(name.partition(", every ")[2]) for name in results["best"]})
    methods = list(dict.fromkeys(name.partition(",")[0] for name in results["best"]))

    def cell(method: str, period: int) -> str:
        runs = results["best"][f"{method}, every {period}"]
        return ", ".join(
            f"{r['loss'][-1]:.2g}" if len(r["loss"]) == results["epochs"] and r["loss"][-1] is not None else "diverged"
            for r in runs
        )

    return table(
        ["", *(f"every {period}" if period > 1 else "every step" for period in periods)],
        [[m, *(cell(m, p) for p in periods)] for m in methods],
    )


def number(x: float | None) -> str:
    """Two digits; what is above 100 counts as diverged."""
    return "diverged" if x is None or x > 100 else f"{x:.2g}"


def defaults() -> str:
    """Loss after 20 epochs, as the optimizers come."""
    kinds = ("EKFAC", "KFAC", "KFAC, balanced", "Adam")
    rows = [
        [task, *(number(r[kind]) for kind in kinds), f"{r['SGD']:.2g} ({r['SGD lr']:g})"]
        for task, r in load("defaults").items()
    ]
    return table(
        [
            "task",
            "EKFAC, defaults",
            "KFAC, defaults",
            "KFAC, balanced damping",
            "Adam, defaults",
            "SGD with momentum, best lr",
        ],
        rows,
    )


def numbers() -> str:
    """Loss after 20 epochs of EKFAC with other numbers."""
    results = load("defaults")
    kinds = [kind for kind in next(iter(results.values())) if kind.startswith("EKFAC, ")]
    head = ["task", *(kind.removeprefix("EKFAC, ") for kind in kinds)]
    return table(head, [[task, *(number(r[kind]) for kind in kinds)] for task, r in results.items()])


def cost() -> str:
    """Ratios to SGD, and memory."""
    results = load("cost")
    last = {task.partition(",")[0]: task for task in results}  # the state does not depend on the batch
    rows = [
        [
            method,
            *(f"{rows[method]['ratio']:.2f}" for rows in results.values()),
            *(f"{results[t][method]['state, in parameters']:.2g}" for t in last.values()),
        ]
        for method in next(iter(results.values()))
    ]
    return table(["time / SGD", *results, *(f"state / parameters, {name}" for name in last)], rows)


def curvature() -> str:
    """Errors and distances just before a refresh, means over seeds, layer by layer."""
    results = load("curvature")
    at, layers = results["step"].index(480), list(results["layers"].values())
    mean = lambda runs, j: sum(run[at][j] for run in runs) / len(runs)
    rows = [[name, *(f"{mean(curves[name], j):.2g}" for j in (0, 1) for curves in layers)] for name in layers[0]]
    return table(
        ["", *(f"{what}, layer {j + 1}" for what in ("error", "distance of spectra") for j in range(len(layers)))], rows
    )


def held_out() -> str:
    """Final losses of the seeds by task and method, and how many steps there were time for."""
    rows = []
    for task, methods in load("held_out").items():
        for method, r in methods.items():
            last = [run["loss"][-1] if len(run["loss"]) == 10 else None for run in r["runs"]]
            losses = ", ".join("diverged" if x is None else f"{x:.3g}" for x in last)
            steps = r["runs"][0]["steps"][-1]
            rows.append([task, method, r["best"], losses, f"{r['seconds']:g}", str(steps)])
    return table(["task", "method", "best setting", "loss, each seed", "seconds", "steps"], rows)


def steps() -> str:
    """Processor time of a step over that of SGD."""
    results = load("steps")
    methods = list(next(iter(results.values())))
    rows = [[method, *(f"{times[method]['ratio']:.2f}" for times in results.values())] for method in methods]
    return table(["time / SGD", *results], rows)


def damping() -> str:
    """Final losses of the seeds by task and rule."""
    results, rows = load("damping"), []
    for task, rules in results.items():
        if task == "steps":
            continue
        for rule, r in rules.items():
            cells = [", ".join(number(run[part]) for run in r["runs"]) for part in ("training", "rest")]
            seconds = sum(run["seconds"] for run in r["runs"]) / len(r["runs"])
            rows.append([task, rule, f"{r['lr']:g}", f"{r['damping']:g}", *cells, f"{seconds:.2g}"])
    head = ["task", "rule", "lr", "damping", "training loss, each seed", "loss of the rest, each seed", "seconds"]
    return table(head, rows)


def full() -> str:
    """Losses of the auto-encoder of full size along steps, means over seeds, and the time of all steps."""
    rows = []
    for name, runs in load("autoencoder_full")["runs"].items():
        start, _, method = name.partition(": ")
        at = lambda j, runs=runs: (
            f"{sum(r['loss'][j] for r in runs) / len(runs):.3g}" if len(runs[0]["loss"]) > j else ""
        )
        seconds = sum(r["seconds"][-1] for r in runs) / len(runs)
        rows.append([start, method, str(len(runs)), *(at(j) for j in (0, 1, 2, 3, 4, 6, 9)), f"{seconds:.1f}"])
    steps = [f"{n} steps" for n in (10, 20, 30, 40, 50, 70, 100)]
    return table(["weights", "method", "seeds", *steps, "seconds"], rows)


def last(run: dict) -> float:
    """The last loss; infinite where the run diverged."""
    return math.inf if run["loss"][-1] is None else run["loss"][-1]


def at(run: dict, step: int) -> float:
    """The loss at the last evaluation up to a ``step``; NaN before the first."""
    losses = [math.inf if loss is None else loss for loss, k in zip(run["loss"], run["steps"]) if k <= step]
    return losses[-1] if losses else math.nan


def at_size(results: dict | None = None) -> str:
    """Best settings: the losses of every seed after as many steps as all methods took, and at the end."""
    rows = []
    for net, kept in (load("at_size") if results is None else results).items():
        methods = {name: tried for name, tried in kept["methods"].items() if tried}
        best = {name: min(tried.items(), key=lambda item: last(item[1]["0"])) for name, tried in methods.items()}
        common = min(run["steps"][-1] for _, runs in best.values() for run in runs.values())
        for name, (setting, runs) in best.items():
            equal = ", ".join(f"{at(run, common):.3g}" for run in runs.values())
            ends = ", ".join(f"{last(run):.3g}" for run in runs.values())
            steps = ", ".join(str(run["steps"][-1]) for run in runs.values())
            rows.append([f"{net}, {kept['limit']:g} s", name, setting, f"{equal} (step {common})", ends, steps])
    head = ["net, time of a run", "method", "best setting", "loss after equal steps", "at the end", "steps"]
    return table(head, rows)


def batches() -> str:
    """Losses of the auto-encoder after the same time, and steps taken, means over seeds."""
    methods = load("batches")["methods"]
    mean = lambda values: sum(values) / len(values)

    def cell(runs: dict) -> str:
        found = list(runs.values())
        return f"{mean([last(r) for r in found]):.3g} ({mean([r['steps'][-1] for r in found]):.0f})"

    columns = max(methods.values(), key=len)
    rows = [[name, *(cell(cells[c]) if c in cells else "" for c in columns)] for name, cells in methods.items()]
    return table(["loss (steps)", *columns], rows)


def main() -> None:
    page = DOCS / "optimizers.md"
    text = page.read_text()
    for name, made in {
        "autoencoder": race("autoencoder"),
        "residual": race("residual"),
        "amortisation": amortisation(),
        "defaults": defaults(),
        "numbers": numbers(),
        "cost": cost(),
        "held_out": held_out(),
        "curvature": curvature(),
        "steps": steps(),
        "damping": damping(),
        "full": full(),
        "at_size": at_size(),
        "batches": batches(),
    }.items():
        if f"<!-- {name} -->" not in text:
            raise SystemExit(f"{page} has no place <!-- {name} -->")
        text = re.sub(
            rf"(<!-- {name} -->\n)(.*?)(<!-- end -->)",
            lambda m, made=made: m.group(1) + made + "\n" + m.group(3),
            text,
            flags=re.S,
        )
    page.write_text(text)


if __name__ == "__main__":
    main()
