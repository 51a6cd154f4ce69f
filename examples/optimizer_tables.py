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
        losses = ", ".join(f"{r['loss'][-1]:.2g}" for r in whole) or "diverged"
        quarter = sum(r["loss"][results["epochs"] // 4 - 1] for r in whole) / len(whole) if whole else math.nan
        settings = sum(c["final"] is not None for c in results["grid"][method])
        rows.append(
            [
                method, f"{runs[0]['lr']:g}", "" if runs[0]["damping"] is None else f"{runs[0]['damping']:g}", f"{quarter:.2g}" if whole else "", losses,
                f"{sum(r['seconds'][-1] for r in whole) / len(whole):.1f}" if whole else "", f"{settings} of {len(results['grid'][method])}",
            ]
        )  # fmt: skip
    epochs = results["epochs"]
    head = ["method", "lr", "damping", f"loss after {epochs // 4} epochs", f"after {epochs}, each seed", "seconds", "settings that ended finite"]
    return table(head, rows)


def defaults() -> str:
    """Loss after 20 epochs."""
    rows = [[task, f"{r['EKFAC']:.2g}", f"{r['Adam']:.2g}", f"{r['SGD']:.2g} ({r['SGD lr']:g})"] for task, r in load("defaults").items()]
    return table(["task", "EKFAC, defaults", "Adam, defaults", "SGD with momentum, best lr"], rows)


def cost() -> str:
    """Ratios to SGD and memory."""
    results = load("cost")
    rows = [
        [method, *(f"{cell:.2g}" for rows in results.values() for cell in (rows[method]["ratio"], rows[method]["state, in parameters"]))]
        for method in next(iter(results.values()))
    ]
    return table(["method", *(f"{task}: {what}" for task in results for what in ("time / SGD", "state / parameters"))], rows)


def curvature() -> str:
    """Errors just before a refresh."""
    results = load("curvature")
    at = [results["step"].index(step) for step in (0, 80, 280, 480)]
    rows = [[name, *(f"{values[j][0]:.2g}" for j in at), f"{values[at[-1]][1]:.2g}"] for name, values in results.items() if name != "step"]
    return table(["", "error at step 0", "80", "280", "480", "distance of spectra at 480"], rows)


def main() -> None:
    page = DOCS / "optimizers.md"
    text = page.read_text()
    for name, made in {
        "autoencoder": race("autoencoder"), "residual": race("residual"), "defaults": defaults(), "cost": cost(), "curvature": curvature(),
    }.items():  # fmt: skip
        text = re.sub(rf"(<!-- {name} -->\n)(.*?)(<!-- end -->)", lambda m, made=made: m.group(1) + made + "\n" + m.group(3), text, flags=re.S)
    page.write_text(text)


if __name__ == "__main__":
    main()
