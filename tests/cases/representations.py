"""The representations that every suite tries: a new one is one line here, and joins them all.

Suites that cannot take a member ask it, as the library does (``passes``, ``centred``, ``entries``), or leave it out by
name with the reason beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import nngeom as nng


@dataclass(frozen=True)
class Alternating:
    """A mixture for any model: every other parameter in ``first``, the others in ``rest``."""

    first: Any
    rest: Any

    @property
    def passes(self) -> int:
        """How many sweeps it takes."""
        return max(self.first.passes, self.rest.passes)

    @property
    def centred(self) -> bool:
        """Whether rows less their mean may enter."""
        return self.first.centred and self.rest.centred

    def of(self, model: nn.Module) -> Any:
        """The mixture for the names of this model."""
        names = nng.LayerCollection.from_model(model).names
        return nng.PMatMixed(dict.fromkeys(names[::2], self.first), default=self.rest)


STORED: dict[str, Any] = {  # over the parameters, holding tensors only
    "dense": nng.PMatDense,
    "diag": nng.PMatDiag,
    "block-diag": nng.PMatBlockDiag,
    "quasi-diag": nng.PMatQuasiDiag,
    "kfac": nng.PMatKFAC,
    "kfac-reduce": nng.PMatKFAC.options(sharing="reduce"),
    "ekfac": nng.PMatEKFAC,
    "low-rank": nng.PMatLowRank,
    "eye": nng.PMatEye,
    "mixed": Alternating(nng.PMatDiag, nng.PMatKFAC),
    "mixed-sweeps": Alternating(nng.PMatEKFAC, nng.PMatDense),
}
PARAMETER_SPACE = STORED | {"implicit": nng.PMatImplicit}
ENTRIES = [k for k, r in PARAMETER_SPACE.items() if k == "implicit" or getattr(r, "entries", None)]  # of any matrix
WHOLE = ("dense", "low-rank", "implicit")  # the exact matrix
DIAGONAL = (*WHOLE, "diag", "block-diag", "quasi-diag")  # its exact diagonal
TRACE = (*DIAGONAL, "ekfac", "eye")  # its exact trace

STORED_KERNELS: dict[str, Any] = {"dense": nng.FMatDense, "block-diag": nng.FMatBlockDiag, "diag": nng.FMatDiag}
FUNCTION_SPACE = STORED_KERNELS | {"implicit": nng.FMatImplicit}
MAPS: dict[str, Any] = {
    "dense": (nng.PushForwardDense, nng.PullBackDense),
    "implicit": (nng.PushForwardImplicit, nng.PullBackImplicit),
}


def representation(name: str, model: nn.Module) -> Any:
    """A member of :data:`PARAMETER_SPACE` as it is passed to a measure of ``model``."""
    member = PARAMETER_SPACE[name]
    return member.of(model) if isinstance(member, Alternating) else member
