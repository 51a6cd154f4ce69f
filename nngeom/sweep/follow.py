"""Calls of a model in training, followed where they happen: by hooks on the model, for a while or for good."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn

from nngeom.capture.measuring import is_measuring
from nngeom.capture.recorder import Recorder
from nngeom.core.errors import OutputError
from nngeom.pullback.captured_pass import Pass
from nngeom.sweep.around import Around, Handle, is_compiled, is_plain, remove
from nngeom.sweep.call import Call
from nngeom.sweep.observe import Observation, Observer
from nngeom.sweep.passage import Passage, measured
from nngeom.sweep.underway import Underway
from nngeom.sweep.weakly import weakly


class Follower:
    """Follows the calls of a model, and what backward passes bring to them.

    ``record`` says at every call whether its rows are wanted or examples are counted only, ``positions`` whether those
    of the outputs are counted; ``before`` is run first, ``begins`` when a backward pass comes. ``block``: for a block
    of the user's, in which the rows of a metric need no backward pass; else such a block goes before. With ``training``
    only calls in training mode count.
    """

    def __init__(
        self,
        observer: Observer,
        record: Callable[[], bool],
        positions: Callable[[], bool],
        before: Callable[[], None],
        begins: Callable[[], None],
        *,
        block: bool = False,
        training: bool = False,
    ):
        self.observer, self.record, self.positions = observer, record, positions
        self.before, self.begins = before, begins
        self.block, self.training, self.called = block, training, False
        self.underway: Underway | None = None
        self._called, self.arrived = list[ref[Call]](), list[Call]()
        self.rest: dict[int, dict[str, Tensor]] = {}  # of parameters with one row a batch, by backward pass
        self._made, self._task = 0, -1

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within: calls are followed."""
        handles = self.install(self.enter, self.leave)
        try:
            yield
        finally:
            self.uninstall(handles)

    def uninstall(self, handles: list[Handle]) -> None:
        """Follow no more calls, and take all hooks off: those that :meth:`install` gave, ``handles``, and the
        calls'.
        """
        self._end()
        for call in self.calls:
            call.close()
        remove(handles)

    def install(self, enter: Callable[..., None], leave: Callable[..., None]) -> list[Handle]:
        """``enter`` and ``leave`` around the calls of the model: others' hooks run inside of them."""
        handles: list[Handle] = []
        around = self.block and self.observer.bare  # else, and where they stay on a model, hooks
        for door in self.observer.doors:
            if (around and is_plain(door)) or is_compiled(door):
                handles.append(Around(door, enter, leave))
                continue
            handles.append(door.register_forward_pre_hook(enter, prepend=True))
            handles.append(door.register_forward_hook(leave, always_call=True))
        return handles

    # -- one call ------------------------------------------------------------------------------------------------------

    def enter(self, module: nn.Module, args: Any) -> None:
        """A call begins; those made inside of it are parts of it."""
        if torch.compiler.is_dynamo_compiling():  # what is compiled is followed at the door before it
            return
        if self.underway is not None and self.underway.is_running():
            self.underway.depth += 1
            return
        self._end()  # of a call that was interrupted
        if self._is_training(module):
            self.observer.require_current()
            self.before()
            recorder = Recorder(self.observer.network, refuse=False) if self.record() else None
            self.underway = Underway.enter(recorder)

    def _end(self) -> None:
        if self.underway is not None:
            self.underway.leave()
        self.underway = None

    def _is_training(self, module: nn.Module) -> bool:
        if not any([module is door for door in self.observer.doors]):  # a copy of the model, hooks included
            return False
        if self.observer.watching is not None and not self.block:
            return False
        if self.training and not self.observer.network.model.training:
            return False
        backward = torch._C._current_graph_task_id() != -1  # checkpoints run a second time
        return torch.is_grad_enabled() and not (backward or is_measuring() or torch.jit.is_tracing())

    def leave(self, module: nn.Module, args: Any, returned: Any) -> None:
        """It ends, with what it ``returned``, ``None`` where it raised."""
        if torch.compiler.is_dynamo_compiling() or self.underway is None:
            return
        self.underway.depth -= 1
        if self.underway.depth:
            return
        recorder = self.underway.recorder
        self._end()
        if returned is not None and torch.is_grad_enabled():
            self._follow(returned, recorder)

    def _follow(self, returned: Any, recorder: Recorder | None) -> None:
        observer = self.observer
        outputs = observer.pick(returned)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0:
            given = "a single number" if isinstance(outputs, Tensor) else type(outputs).__name__
            raise OutputError(
                f"the model returned {given}; expected outputs (n, ...), examples along the first axis: pass "
                "outputs=lambda returned: ..."
            )
        if not outputs.requires_grad:
            return
        self.called = True
        own_loss, run = observer.cotangents is None, None
        parameters: Iterable[Tensor] = observer.leaves()
        if recorder is not None:
            capture = recorder.captured(outputs if outputs.ndim > 1 else outputs.unsqueeze(1))
            run, parameters = observer.resolve(capture, mixing=recorder.mixing), capture.leaves.tensors.values()
        call = Call(
            self._made,
            outputs,
            parameters,
            weakly(self.arrive),
            own_loss=own_loss,
            positions=self.positions(),
        )
        self._made += 1
        self._called = [*map(ref, self.calls), ref(call)]
        if run is not None:
            self._read(call, run)
        if self.block and not own_loss:
            self.arrived.append(call)

    @property
    def calls(self) -> list[Call]:
        """Those whose outputs are not gone."""
        return [call for held in self._called if (call := held()) is not None]

    def _read(self, call: Call, run: Pass) -> None:
        observer = self.observer
        if observer.cotangents is None:
            call.passage = Passage(observer.network, run, weakly(call.arrives))
            leaves = run.capture.leaves.tensors
            handles = [leaves[x].register_hook(partial(weakly(self.keep), x)) for x in run.rest]
            if handles:
                finalize(call.passage, remove, handles).atexit = False
        else:
            numbers = observer.team.exchange("draws", call.n)
            start = observer.drawn + sum(numbers[: observer.team.rank])
            call.chunks = list(measured(observer.network, run, observer.cotangents, start))
            observer.drawn += sum(numbers)

    # -- what has arrived ----------------------------------------------------------------------------------------------

    def arrive(self, call: Call) -> None:
        """A backward pass comes to a ``call``."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task = task
            self.begins()
        if call not in self.arrived:
            self.arrived.append(call)

    def keep(self, name: str, gradient: Tensor) -> None:
        """The ``gradient`` that the running backward pass brings to a parameter that has one row a batch."""
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        self.rest.setdefault(torch._C._current_graph_task_id(), {}).setdefault(name, gradient.detach().clone())

    def forget(self) -> None:
        """What has arrived does not count; in a block, rows of a metric whose backward pass is still to come do."""
        if not self.arrived and not self.rest:
            return
        to_come = [call for call in self.arrived if not call.tasks]
        for call in self.arrived:
            call.forget()
        self.arrived[:] = to_come
        self.rest.clear()

    def take(self, observation: Observation) -> Observation:
        """All that has arrived, in the order of the calls, added to an ``observation``."""
        for call in sorted(self.arrived, key=lambda call: call.place):
            if call.passage is not None:
                observation.chunks.append(call.passage.chunk(observation.examples, self._rest_of(call)))
            observation.chunks += call.chunks
            observation.examples += call.n
            observation.several |= call.several
            if call.positions:
                observation.positions += call.counted
            call.take()
        self.arrived.clear()
        self.rest.clear()
        return observation

    def _rest_of(self, call: Call) -> Mapping[str, Tensor]:
        """Gradients of backward passes that no earlier call has taken: there is one row for all calls of one."""
        rows: dict[str, Tensor] = {}
        for task in call.tasks:
            for name, g in self.rest.pop(task, {}).items():
                rows[name] = rows[name] + g if name in rows else g
        return rows
