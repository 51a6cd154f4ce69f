"""A tracker inside of the training loops of Lightning, Hugging Face and accelerate, where these are installed."""

from __future__ import annotations

import importlib
from typing import Any

from nngeom.core.errors import ArgumentTypeError, MissingExtraError
from nngeom.track.steps import StepCounter
from nngeom.track.tracker import Tracker
from nngeom.track.writers import prefixed


def lightning_callback(tracker: Tracker) -> Any:
    """A ``lightning.pytorch`` callback that steps ``tracker`` after every optimiser step, with the logged scalars, and
    hands what it measures to the trainer's loggers, as ``nngeom/column``.

    Steps are counted as Lightning counts them, or as the optimisers are stepped where that is more: under manual
    optimisation they need not go through Lightning's wrappers.

    Raises :class:`MissingExtraError` without the extra ``lightning``.
    """
    base = _first(("lightning.pytorch", "pytorch_lightning"), "lightning").Callback

    class TrackerCallback(base):  # type: ignore[misc, valid-type]
        """Steps the tracker."""

        def __init__(self) -> None:
            super().__init__()
            self._seen = self._start = 0
            self._counter: StepCounter | None = None

        def on_train_start(self, trainer, module):
            """Count the steps of the optimisers themselves too: Lightning counts those made through its wrappers."""
            self._start, self._counter = trainer.global_step, StepCounter(trainer.optimizers)

        def on_train_end(self, trainer, module):
            """Leave nothing on the optimisers."""
            if self._counter is not None:
                self._counter.remove()

        def on_exception(self, trainer, module, exception):
            """As at the end."""
            self.on_train_end(trainer, module)

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx, *args):
            """After a batch: only where an optimiser stepped (gradients may be accumulated)."""
            own = self._start + self._counter.count if self._counter is not None else 0
            step = max(trainer.global_step, own)
            if step != self._seen:
                self._seen = step
                for numbers in _measured(tracker, step, _scalars(trainer.callback_metrics)):
                    for logger in getattr(trainer, "loggers", ()):
                        logger.log_metrics(numbers, step=step)

    return TrackerCallback()


def huggingface_callback(tracker: Tracker, trainer: Any = None) -> Any:
    """A ``transformers.TrainerCallback`` that steps ``tracker`` after every optimiser step, with the last logged
    scalars; what it measures goes to the ``trainer``'s own log, as ``nngeom/column``, where that is given:
    ``trainer.add_callback(huggingface_callback(tracker, trainer))``.

    Raises :class:`MissingExtraError` without the extra ``transformers``.
    """
    base = _first(("transformers",), "transformers").TrainerCallback

    class TrackerCallback(base):  # type: ignore[misc, valid-type]
        """Steps the tracker."""

        def on_step_end(self, args, state, control, **kwargs):
            """After an optimiser step."""
            scalars = _scalars(state.log_history[-1] if state.log_history else {})
            scalars = {name: x for name, x in scalars.items() if not name.startswith("nngeom/")}
            for numbers in _measured(tracker, state.global_step, scalars):
                if trainer is not None:
                    trainer.log(numbers)

    return TrackerCallback()


def accelerate_callback(tracker: Tracker, accelerator: Any, optimizer: Any) -> StepCounter:
    """Step ``tracker`` after every step of an ``optimizer``, prepared by ``accelerator`` or not, and hand what it
    measures to ``accelerator.log``, as ``nngeom/column``. ``remove()`` of what is returned ends it.

    Raises :class:`ArgumentTypeError` for an accelerator without ``log``.
    """
    if not callable(getattr(accelerator, "log", None)):
        raise ArgumentTypeError(f"accelerator is {type(accelerator).__name__}; expected an accelerate.Accelerator")

    def each(step: int) -> None:
        for numbers in _measured(tracker, step, {}):
            accelerator.log(numbers, step=step)

    return StepCounter([optimizer], each)


def _measured(tracker: Tracker, step: int, scalars: dict[str, float]) -> list[dict[str, float]]:
    """What the tracker measures itself at a step, for other loggers; nothing where none is due."""
    row = tracker.step(step, **scalars)
    return [] if row is None else [prefixed({name: x for name, x in row.items() if name not in scalars})]


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
