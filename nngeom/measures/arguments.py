"""Keyword arguments that neither a measure nor its representation has: what was meant, in the words of this library."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from nngeom.core.errors import ArgumentError
from nngeom.pmat.representation import Measured, Representation

# what other libraries (NNGeometry above all) and the other measures call it, and what is said here
ELSEWHERE = {
    "loss": 'likelihood= says what the outputs are ("gaussian" for squared errors); GGN and EmpiricalFIM take a loss=',
    "likelihood": "this measure is of a loss: pass loss=, or take FIM or FIM_MonteCarlo, which have a likelihood=",
    "variant": 'NNGeometry\'s variant= is likelihood=: "classif_logits" is "categorical", "classif_binary_logits" is '
    '"bernoulli", "regression" is "gaussian", "segmentation_logits" is nng.Categorical(dim=1)',
    "trials": "NNGeometry's trials= is samples= of FIM_MonteCarlo",
    "regul": "NNGeometry's regul= is damping=, given where the matrix is used: M.solve(v, damping=1e-3)",
    "damping": "damping is given where the matrix is used: M.solve(v, damping=1e-3)",
    "n_output": "the number of outputs is read off the model: leave it out",
    "device": "batches are moved to the device of the model: leave it out, and move the model",
    "centering": "centred kernels are GramMatrix(..., centered=True)",
    "model_fn": "a function of a batch that returns the outputs is function=",
    "n_samples": "labels are drawn by FIM_MonteCarlo(..., samples=)",
}


def require_known(measure: Callable[..., Any], representation: Any, options: dict[str, Any]) -> None:
    """Raise :class:`ArgumentError` for ``options`` that are arguments of neither; ``measure`` is what was called."""
    if not options:
        return
    taken = representation if isinstance(representation, Representation) else None
    kind = representation if taken is None else taken.kind
    if not isinstance(kind, type):
        return  # which another error tells
    own = list(inspect.signature(kind.recipe).parameters)[1:] if issubclass(kind, Measured) else []
    odd = next((name for name in options if name not in own), None)
    if odd is None:
        return
    keywords = inspect.signature(measure).parameters.values()
    listed = [p.name for p in keywords if p.kind is p.KEYWORD_ONLY]
    meant = ELSEWHERE.get(odd) or _meant(odd, [*listed, *own])
    if taken is not None and not meant:
        return  # an option of something inside, which another error tells
    told = [f"{measure.__name__} has no argument {odd!r}, and {kind.__name__} has no option of that name", meant]
    told += [f"{measure.__name__} takes {', '.join(listed)}; {kind.__name__} takes {', '.join(own) or 'none'}"]
    raise ArgumentError("; ".join(filter(None, told)))


def _meant(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}=?" if close else ""
