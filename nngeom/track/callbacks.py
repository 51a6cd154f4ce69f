"""A tracker inside Lightning's and Hugging Face's training loops, where these are installed."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from nngeom.core.errors import MissingExtraError
from nngeom.track.tracker import Tracker


def lightning_callback(tracker: Tracker) -> Any:
    """A ``lightning.pytorch`` callback that steps ``tracker`` after every optimiser step, with the logged scalars.

    Steps are counted as Lightning counts them, or as the optimisers are stepped where that is more: under manual
    optimisation they need not go through Lightning's wrappers.

    Raises :class:`MissingExtraError` without the extra ``lightning``.
    """
    base = _first(("lightning.pytorch", "pytorch_lightning"), "lightning").Callback

    class TrackerCallback(base):  # type: ignore[misc, valid-type]
        """Steps the tracker."""

        def __init__(self) -> None:
            super().__init__()
            self._seen = self._start = self._count = self._depth = 0
            self._handles: list[Any] = []

        def on_train_start(self, trainer, module):
            """Count the steps of the optimisers themselves too: Lightning counts those made through its wrappers."""
            self._start, self._count, self._depth = trainer.global_step, 0, 0
            for optimizer in {id(o): o for o in map(_inner, trainer.optimizers)}.values():
                self._handles.append(optimizer.register_step_pre_hook(self._enter))
                self._handles.append(optimizer.register_step_post_hook(self._leave))

        def on_train_end(self, trainer, module):
            """Leave nothing on the optimisers."""
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

        def on_exception(self, trainer, module, exception):
            """As at the end."""
            self.on_train_end(trainer, module)

        def _enter(self, *_):
            self._depth += 1

        def _leave(self, *_):
            self._depth -= 1
            self._count += self._depth == 0  # one step, also where it runs that of a parent class inside

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx, *args):
            """After a batch: only where an optimiser stepped (gradients may be accumulated)."""
            step = max(trainer.global_step, self._start + self._count)
            if step != self._seen:
                self._seen = step
                tracker.step(step, **_scalars(trainer.callback_metrics))

    return TrackerCallback()


def huggingface_callback(tracker: Tracker) -> Any:
    """A ``transformers.TrainerCallback`` that steps ``tracker`` after every optimiser step, with the last logged
    scalars.

    Raises :class:`MissingExtraError` without the extra ``transformers``.
    """
    base = _first(("transformers",), "transformers").TrainerCallback

    class TrackerCallback(base):  # type: ignore[misc, valid-type]
        """Steps the tracker."""

        def on_step_end(self, args, state, control, **kwargs):
            """After an optimiser step."""
            tracker.step(state.global_step, **_scalars(state.log_history[-1] if state.log_history else {}))

    return TrackerCallback()


def _inner(optimizer: Any) -> Any:
    """The optimiser inside of wrappers."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


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
    raise MissingExtraError(f"{modules[0]} is not installed; install it: pip install {extra}")
