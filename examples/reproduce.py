"""Run every example, one after the other: the figures and tables of the docs. ``make reproduce``; hours on two cores.

``--quick``, ``make reproduce-quick``, takes few seeds and steps, to see that everything runs. Each script takes the
same arguments by itself. Scripts that keep results (``papers_common.Cells``) go on where they stopped. How long each
took goes to ``--out``; with ``--quick --out docs`` into a page too.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

from optimizer_tables import table
from papers_common import place

HERE = Path(__file__).parent
QUICK = ["--quick"]
SCRIPTS: dict[str, tuple[list[str], list[str]]] = {  # name: (arguments, arguments of --quick)
    "fisher_of_digits": ([], QUICK),
    "thesis_representations": (["--model", "resnet"], QUICK),
    "thesis_kernels": (["--model", "resnet"], QUICK),
    "disk_eigenfunctions": ([], QUICK),
    "fourier_bias": ([], QUICK),
    "which_norm": ([], QUICK),
    "ntk_of_digits": ([], QUICK),
    "alignment_of_images": (["--model", "vgg", "resnet"], QUICK),
    "alignment_directions": (["--model", "vgg"], QUICK),
    "alignment_difficult": ([], QUICK),
    "complexity": ([], QUICK),
    "supernat": ([], QUICK),
    "coherence": ([], QUICK),
    "winsorized_sgd": ([], QUICK),
    "complexity_of_depth": ([], QUICK),
    "sgd_plane": ([], QUICK),
    "mgs_bench": ([], QUICK),
    "mgs_regression": ([], QUICK),
    "mgs_robustness": ([], QUICK),
    "mgs_circles": ([], QUICK),
    "mgs_residual": ([], QUICK),
    "mgs_dropout": ([], QUICK),
    "mgs_attacks": ([], QUICK),
    "lazy_yin_yang": ([], QUICK),
    "lazy_digits": ([], QUICK),
    "lazy_quadratic": ([], QUICK),
    "lazy_images": ([], QUICK),
    "lazy_background": ([], QUICK),
    "empirical_fisher": ([], QUICK),
    "spectra_of_classes": ([], QUICK),
    "influence_of_digits": (["--docs"], QUICK),
    "influence_of_digits:mnist": (["--docs", "--data", "mnist"], ["--quick", "--data", "mnist"]),
    "mislabelled_images": (["--model", "resnet-gn"], QUICK),
    "fourier_of_transformers": (["--seeds", "5"], QUICK),
    "trained_minilm": ([], QUICK),
    "permuted_mnist": ([], QUICK),
    "autoencoder_of_digits": ([], QUICK),
    "residual_digits": ([], ["--epochs", "1", "--out", "out"]),
    "optimizer_amortisation": ([], ["--epochs", "1", "--out", "out"]),
    "curvature_along_training": ([], ["--quick", "--out", "out"]),
    "optimizer_defaults": ([], ["--quick", "--out", "out"]),
    "optimizer_cost": ([], ["--quick", "--out", "out"]),
    "autoencoder_full_size": ([], ["--steps", "3", "--out", "out"]),
    "optimizer_held_out": ([], ["--only", "residual", "--methods", "EKFAC", "--seconds", "0.2", "--out", "out"]),
    "optimizer_damping": ([], ["--steps", "10", "--out", "out"]),
    "optimizer_at_size": ([], ["--only", "vgg", "--seconds", "0.2", "--seeds", "1", "--out", "out"]),
    "optimizer_batches": ([], ["--seconds", "0.5", "--seeds", "1", "--out", "out"]),
    "optimizer_decorrelation": ([], ["--out", "out"]),
    "architectures": ([], QUICK),
}


def processor_seconds() -> float:
    """Of all scripts so far: wall time says what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(name: str, arguments: list[str]) -> float | None:
    """Run an example; its seconds of processor time, or nothing where it failed."""
    print(f"== {name}", flush=True)
    start, file = processor_seconds(), HERE / f"{name.partition(':')[0]}.py"
    code = subprocess.run([sys.executable, str(file), *arguments], check=False).returncode
    took = processor_seconds() - start
    print(f"== {name}: {f'failed with {code}' if code else 'done'} in {took:.0f} s of processor time", flush=True)
    return None if code else took


def times(seconds: dict[str, float]) -> str:
    """Three scripts a row, and their sum."""
    shown = [(f"`{name.replace(':', ' ')}`", f"{took:.0f}") for name, took in seconds.items()]
    shown.append(("**together**", f"**{sum(seconds.values()):.0f}**"))
    shown += [("", "")] * (-len(shown) % 3)
    return table(["example", "seconds"] * 3, [[*a, *b, *c] for a, b, c in zip(*[iter(shown)] * 3)])


def main(argv: list[str] | None = None) -> int:
    """Run the scripts, keep how long each took; the exit status is the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few seeds and steps")
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, default=list(SCRIPTS), help="some of them")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where data/reproduce*.json goes (default: out)")
    args = parser.parse_args(argv)
    path = args.out / "data" / f"reproduce{'_quick' if args.quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    failed = []
    for name in args.only:
        seconds = run(name, SCRIPTS[name][args.quick])
        if seconds is None:
            failed.append(name)
            continue
        kept = {each: round(seconds, 1) if each == name else kept[each] for each in SCRIPTS if each in {*kept, name}}
        path.write_text(json.dumps(kept, indent=1) + "\n")
    if args.quick:
        place(args, "analysis.md", {"reproduce_quick": times(kept)})
    print("all done" if not failed else f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
