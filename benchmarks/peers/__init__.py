"""Other libraries doing the same jobs, through their public interfaces, where they are installed (extras ``bench``).

One file a library; ``CONTENDERS`` there is ``{label: {job: setup}}``, with ``setup(workload) -> (run, canonical)`` as in
:mod:`benchmarks.ours`. Each is asked for what its documentation calls the quantity of the job; what disagrees with the slow
reference on a workload is named as skipped there.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

FILES = {  # file: the module that it needs, the distribution that brings it
    "torch_func": ("torch.func", "torch"),
    "nngeometry": ("nngeometry", "nngeometry"),
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch"),
    "backpack": ("backpack", "backpack-for-pytorch"),
    "asdl": ("asdl.fisher", "asdfghjkl"),
    "neural_tangents": ("neural_tangents", "neural-tangents"),
}


def _contenders(file: str) -> dict[str, dict[str, Any]] | str:
    """``CONTENDERS`` of a file, or why the library can't be used."""
    module, distribution = FILES[file]
    try:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError
    except ModuleNotFoundError:  # of a parent, or a namesake without that part
        return f"not installed (pip install {distribution})"
    try:
        return importlib.import_module(f"benchmarks.peers.{file}").CONTENDERS
    except Exception as error:  # installed, but not with what it needs
        return f"{type(error).__name__}: {str(error)[:120]}"


def missing() -> dict[str, str]:
    """Libraries that can't be used, and why."""
    return {file: found for file in FILES if isinstance(found := _contenders(file), str)}


def peers(job: str) -> dict[str, Any]:
    """The contenders of other libraries that are installed, ``{label: setup}``."""
    usable = [found for file in FILES if not isinstance(found := _contenders(file), str)]
    return {label: jobs[job] for labels in usable for label, jobs in labels.items() if job in jobs}
