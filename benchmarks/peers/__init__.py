"""Other libraries doing the same jobs, through their public interfaces, where they are installed (extras ``bench``).

One file a library; ``CONTENDERS`` there is ``{label: {job: setup}}``, with ``setup(workload) -> (run, canonical)`` as
in
:mod:`benchmarks.ours`. Each is asked for what its documentation calls the quantity of the job; what disagrees with the
slow reference on a workload is named as skipped there.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

LIBRARIES = {  # as labels begin with: the module that it needs, the distribution that brings it
    "torch.func": ("torch.func", "torch"),
    "nngeometry": ("nngeometry", "nngeometry"),
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch"),
    "backpack": ("backpack", "backpack-for-pytorch"),
    "asdl": ("asdl.fisher", "asdfghjkl"),
    "neural-tangents": ("neural_tangents", "neural-tangents"),
}


def _contenders(library: str) -> dict[str, dict[str, Any]] | str:
    """``CONTENDERS`` of a library's file, or why it can't be used."""
    module, distribution = LIBRARIES[library]
    try:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError
    except ModuleNotFoundError:  # of a parent, or a namesake without that part
        return f"not installed (pip install {distribution})"
    try:
        return importlib.import_module(f"benchmarks.peers.{library.replace('.', '_').replace('-', '_')}").CONTENDERS
    except Exception as error:  # installed, but not with what it needs
        return f"{type(error).__name__}: {str(error)[:120]}"


def missing() -> dict[str, str]:
    """Libraries that can't be used, and why."""
    return {library: found for library in LIBRARIES if isinstance(found := _contenders(library), str)}


def peers(job: str, label: str = "") -> dict[str, Any]:
    """The contenders of other libraries that are installed, ``{label: setup}``; of the library of one label alone where
    it is given.
    """
    chosen = [_contenders(library) for library in LIBRARIES if not label or label.split(" ")[0] == library]
    return {
        label: jobs[job]
        for labels in chosen
        if not isinstance(labels, str)
        for label, jobs in labels.items()
        if job in jobs
    }
