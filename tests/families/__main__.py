"""``python tests/families``: a range of seeds from the command line; failures are printed as short recipes."""

from __future__ import annotations

import argparse
import collections
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from families.case import AXES, FAILURES, Recipe, draw, run, shortened


def main(argv: list[str] | None = None) -> int:
    """The number of failures, as exit status 0 or 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0:500", help="first:last of a range of seeds")
    parser.add_argument("--only", action="append", default=[], metavar="AXIS=MEMBER", help="hold an axis at one member")
    parser.add_argument("--recipe", help="run this recipe alone, as it was printed")
    parser.add_argument("--slow", action="store_true", help="draw compiled models too")
    parser.add_argument("--raw", action="store_true", help="print failing recipes as drawn, not shortened")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.recipe is not None:
        outcome = run(Recipe.parse(options.recipe))
        print(outcome.kind, outcome.text)
        return outcome.kind in FAILURES
    fixed = {axis: value for axis, _, value in (entry.partition("=") for entry in options.only)}
    for axis, value in fixed.items():
        if value not in AXES.get(axis, ()):
            parser.error(f"{axis}={value}: expected one of {', '.join(AXES.get(axis, AXES))}")
    first, last = map(int, options.seeds.split(":"))
    counts: dict[str, int] = collections.Counter()
    started = time.time()
    shown = set()
    for seed in range(first, last):
        recipe = draw(seed, options.slow, **fixed)
        outcome = run(recipe)
        counts[outcome.kind] += 1
        if outcome.kind in FAILURES:
            short, outcome = (recipe, outcome) if options.raw else shortened(recipe)
            if str(short) not in shown:
                print(f"{outcome.kind} seed {seed}: --recipe {str(short)!r}  {outcome.text}", flush=True)
            shown.add(str(short))
    total = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    print(f"seeds {first}:{last}: {total}; {len(shown)} different recipes fail; {time.time() - started:.0f} s")
    return any(counts[kind] for kind in FAILURES)


if __name__ == "__main__":
    raise SystemExit(main())
