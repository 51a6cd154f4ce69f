"""A call that is running: what is switched on for it, and off at its end."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType

from torch.nn.modules import module
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from nngeom.capture.compiled import as_written
from nngeom.capture.recorder import Recorder


@dataclass
class Underway:
    """One call of the model, ``depth`` counting those made inside of it."""

    recorder: Recorder | None
    frame: FrameType | None
    written: as_written | None = None
    depth: int = 1

    @staticmethod
    def enter(recorder: Recorder | None) -> Underway:
        """Switch a ``recorder`` on, and compilers off for what is recorded."""
        if recorder is None:
            return Underway(None, _frame_of_call())
        written = as_written()
        written.__enter__()
        recorder.__enter__()
        return Underway(recorder, _frame_of_call(), written)

    def is_running(self) -> bool:
        """Whether the call goes on: one that is interrupted from the keyboard runs no hook at its end."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def leave(self) -> None:
        """Switch off what was switched on."""
        self.frame = None
        if self.recorder is not None:
            _switch_off(self.recorder)
        if self.written is not None:
            self.written.__exit__()
        self.recorder = self.written = None


def _frame_of_call() -> FrameType | None:
    """That of the module's call, inside of which hooks and the forward pass run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != module.__name__:
        frame = frame.f_back
    return frame


def _switch_off(mode: TorchFunctionMode) -> None:
    """Take a mode off the stack, also from under those that were entered since."""
    above: list[TorchFunctionMode] = []
    while mode in _get_current_function_mode_stack():
        top = _pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)
