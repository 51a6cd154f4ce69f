"""A tracker inside Lightning's and Hugging Face's training loops, where these are installed."""

from __future__ import annotations

import importlib
from typing import Any

from nngeom.core.errors import MissingExtraError
from nngeom.track.tracker import Tracker


def lightning_callback(tracker: Tracker) -> Any:
    """A ``lightning.pytorch`` callback that steps the tracker after every optimiser step, with the logged scalars.

    Raises :class:`MissingExtraError` without the extra ``lightning``.
    """
    base = _first(("lightning.pytorch", "pytorch_lightning"), "lightning").Callback

    class TrackerCallback(base):  # type: ignore[misc, valid-type]
        """Steps the tracker."""

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx, *args):
            """After a batch: only where the optimiser stepped (gradients may be accumulated)."""
            if trainer.global_step != getattr(self, "_seen", 0):
                self._seen = trainer.global_step
                tracker.step(trainer.global_step, **_scalars(trainer.callback_metrics))

    return TrackerCallback()


def huggingface_callback(tracker: Tracker) -> Any:
    """A ``transformers.TrainerCallback`` that steps the tracker after every optimiser step, with the last logged scalars.

    Raises :class:`MissingExtraError` without the extra ``transformers``.
    """
    base = _first(("transformers",), "transformers").TrainerCallback

    class TrackerCallback(base):  # type: ignore[misc, valid-type]
        """Steps the tracker."""

        def on_step_end(self, args, state, control, **kwargs):
            """After an optimiser step."""
            tracker.step(state.global_step, **_scalars(state.log_history[-1] if state.log_history else {}))

    return TrackerCallback()


def _scalars(found: Any) -> dict[str, float]:
    out = {}
    for name, value in dict(found).items():
        try:
            out[str(name)] = float(value)
        except (TypeError, ValueError):
            continue
    out.pop("step", None)
    return out


def _first(modules: tuple[str, ...], extra: str) -> Any:
    for name in modules:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise MissingExtraError(f"{modules[0]} is not installed; pip install 'nngeom[{extra}]'")
