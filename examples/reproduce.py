"""Run every example, one after the other: the figures and tables of the docs. ``make reproduce``; hours on two cores.

``--quick`` takes few seeds and steps, to see that everything runs. Each script takes the same arguments by itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS: dict[str, tuple[list[str], list[str]]] = {  # name: (arguments, arguments of --quick)
    "fisher_of_digits": ([], []),
    "disk_eigenfunctions": ([], ["--quick"]),
    "fourier_bias": ([], ["--quick"]),
    "which_norm": ([], ["--quick"]),
    "ntk_of_digits": ([], ["--quick"]),
    "complexity": ([], ["--quick"]),
    "supernat": ([], ["--quick"]),
    "coherence": ([], ["--quick"]),
    "mgs_digits": ([], ["--quick"]),
    "lazy_yin_yang": (["--seeds", "100", "--workers", "2"], ["--seeds", "2"]),
    "lazy_digits": (["--seeds", "3", "--workers", "2"], ["--seeds", "1"]),
    "lazy_quadratic": ([], ["--seeds", "1"]),
    "autoencoder_of_digits": ([], ["--quick"]),
    "residual_digits": ([], ["--epochs", "2", "--out", "out"]),
    "optimizer_amortisation": ([], ["--epochs", "2", "--out", "out"]),
    "curvature_along_training": ([], ["--out", "out"]),
    "optimizer_defaults": ([], ["--out", "out"]),
    "optimizer_cost": ([], ["--out", "out"]),
    "autoencoder_full_size": ([], ["--steps", "3", "--out", "out"]),
    "optimizer_damping": ([], ["--steps", "10", "--out", "out"]),
}


def main() -> int:
    """Run the scripts; the exit status is the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few seeds and steps")
    parser.add_argument("--only", nargs="*", choices=SCRIPTS, default=list(SCRIPTS), help="some of them")
    arguments = parser.parse_args()
    failed = []
    for name in arguments.only:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        code = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py"), *SCRIPTS[name][arguments.quick]], check=False
        ).returncode
        print(
            f"== {name}: {'done' if code == 0 else f'failed with {code}'} in {time.perf_counter() - start:.0f} s",
            flush=True,
        )
        if code:
            failed.append(name)
    print("all done" if not failed else f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
