"""Run every example, one after the other: the figures and tables of the docs. ``make reproduce``; hours on two cores.

``--quick``, ``make reproduce-quick``, takes few seeds and steps, to see that everything runs. Each script takes the
same arguments by itself. Scripts that keep results (``papers_common.Cells``) go on where they stopped.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
QUICK = ["--quick"]
SCRIPTS: dict[str, tuple[list[str], list[str]]] = {  # name: (arguments, arguments of --quick)
    "fisher_of_digits": ([], []),
    "thesis_representations": (["--model", "resnet"], QUICK),
    "thesis_kernels": (["--model", "resnet"], QUICK),
    "disk_eigenfunctions": ([], QUICK),
    "fourier_bias": ([], QUICK),
    "which_norm": ([], QUICK),
    "ntk_of_digits": (["--seeds", "5", "--steps", "3000"], QUICK),
    "alignment_of_images": (["--model", "vgg", "resnet"], QUICK),
    "alignment_directions": (["--model", "vgg"], QUICK),
    "alignment_difficult": ([], QUICK),
    "complexity": ([], QUICK),
    "supernat": ([], QUICK),
    "coherence": ([], QUICK),
    "winsorized_sgd": ([], QUICK),
    "complexity_of_depth": ([], QUICK),
    "sgd_plane": ([], QUICK),
    "mgs_bench": (["--model", "FCN", "LeNet"], QUICK),
    "mgs_regression": (["--model", "FCN"], QUICK),
    "mgs_robustness": ([], QUICK),
    "mgs_circles": ([], QUICK),
    "mgs_residual": ([], QUICK),
    "mgs_dropout": ([], QUICK),
    "mgs_attacks": ([], QUICK),
    "lazy_yin_yang": (["--seeds", "100", "--workers", "2"], ["--seeds", "2"]),
    "lazy_digits": (["--seeds", "3", "--workers", "2"], ["--seeds", "1", "--only", "spurious"]),
    "lazy_quadratic": ([], ["--seeds", "1"]),
    "lazy_images": ([], QUICK),
    "lazy_background": ([], QUICK),
    "empirical_fisher": ([], QUICK),
    "spectra_of_classes": ([], QUICK),
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
    "optimizer_damping": ([], ["--steps", "10", "--out", "out"]),
    "optimizer_at_size": ([], ["--only", "vgg", "--seconds", "0.2", "--seeds", "1", "--out", "out"]),
    "optimizer_batches": ([], ["--seconds", "0.5", "--seeds", "1", "--out", "out"]),
    "optimizer_decorrelation": ([], ["--out", "out"]),
}


def processor_seconds() -> float:
    """Of all scripts so far: wall time says what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    """Run the scripts; the exit status is the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few seeds and steps")
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, default=list(SCRIPTS), help="some of them")
    arguments = parser.parse_args()
    failed = []
    for name in arguments.only:
        print(f"== {name}", flush=True)
        start = processor_seconds()
        code = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py"), *SCRIPTS[name][arguments.quick]], check=False
        ).returncode
        ended = "done" if code == 0 else f"failed with {code}"
        print(f"== {name}: {ended} in {processor_seconds() - start:.0f} s of processor time", flush=True)
        if code:
            failed.append(name)
    print(f"{processor_seconds():.0f} s of processor time in all")
    print("all done" if not failed else f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
