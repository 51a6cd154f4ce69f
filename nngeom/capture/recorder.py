"""One forward pass, watched: every call that is given a selected parameter is seen where it happens.

A function-call mode sees ``F.linear(x, w, b)`` and its like together with the parameter objects, whichever module they
belong to. Views of parameters (transposes, slices, chunks) are recognised by their base, composite functions are
opened, and what no adapter understands marks its parameters for the per-example fallback. Nothing is stored on the
model.
"""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import nngeom.layers  # noqa: F401  (registers the adapters)
from nngeom.capture.arguments import tensors
from nngeom.capture.fused import composed, recomputed, unfused
from nngeom.capture.graph import Graph, read, sequence_number
from nngeom.capture.leaves import Leaves
from nngeom.capture.network import Batch, Network, gradients_on
from nngeom.capture.overwritten import may_write
from nngeom.capture.recorded import Recorded
from nngeom.capture.sorted_sequences import SortedSequences
from nngeom.capture.untouched import Drew
from nngeom.capture.unused import require_unused
from nngeom.core.errors import ModeError
from nngeom.layers.adapter import ADAPTERS, Call
from nngeom.layers.elementwise import ADDITIONS
from nngeom.layers.recurrent import unrolled
from nngeom.layers.refuse import REFUSALS


@dataclass(frozen=True, eq=False)
class Capture:
    """A forward pass: its outputs, the uses of the parameters, and the parameters used in ways no adapter knows."""

    outputs: Tensor
    uses: list[Recorded]  # each is exchanged for one without inputs when these were read
    unstructured: set[str]
    leaves: Leaves  # the tensors that stood for the parameters
    hooked: frozenset[Any] = frozenset()  # nodes of tensors that were asked to run functions on their gradients
    training: bool = False  # a training step of the user's: batch normalisation may mix examples
    batch: Batch = None

    @functools.cached_property
    def values(self) -> Tensor:
        """The outputs without their graph."""
        return self.outputs.detach()

    def graph(self) -> Graph:
        """What autograd recorded of it."""
        return read(self.outputs, self.leaves.names, self.leaves.registered, self.hooked)


def record(network: Network, batch: Batch, *, keep_graph: bool = False, exchange: bool = False) -> Capture:
    """Run the model on a batch and record how it uses the selected parameters.

    ``exchange``: whether other tensors may stand for these while the model runs: the caller differentiates in
    :attr:`Capture.leaves`. Raises :class:`ModeError` where the model is random, keeps a state or mixes examples,
    :class:`CoverageError` where it exchanges parameters and must not.
    """
    network.watch.harmless = False
    if keep_graph:
        network.require_whole("derivatives of the rows")
    again = gradients_on()(functools.partial(network.run, batch))
    try:
        capture = _recorded(network, batch, keep_graph=keep_graph)
    except Drew:
        require_unused(again, network.watch)
        capture = _recorded(network, batch, keep_graph=keep_graph)
    network.watch.require_idle(again, capture.values)
    if not exchange:
        capture.leaves.require_own()
    return capture


def _recorded(network: Network, batch: Batch, *, keep_graph: bool) -> Capture:
    recorder = Recorder(network, keep_graph=keep_graph)
    with gradients_on(), unfused() if keep_graph else contextlib.nullcontext(), network.watch.own(recorder.generators):
        outputs = network.run(batch, recorder)
    return recorder.captured(outputs, batch)


class Recorder(TorchFunctionMode):
    """The mode that sees the uses. ``refuse=False`` lets active dropout and batch normalisation pass: a training step
    is no measure.
    """

    def __init__(self, network: Network, *, keep_graph: bool = False, refuse: bool = True) -> None:
        super().__init__()
        self.refuse = refuse
        self.overwritten = network.watch.overwritten if refuse else None
        self.mixing = False  # batch normalisation in training mode was seen
        self.leaves = Leaves(network)
        self.keep_graph = keep_graph
        self.uses: list[Recorded] = []
        self.unstructured: set[str] = set()
        self.hooked: set[Any] = set()
        self.generators: dict[torch.Generator, Tensor] = {}  # given to calls, with their state before the first
        self._opened: dict[Any, Any] = {}
        self._copies: dict[int, Tensor] = {}  # broadcast parameters, by id; held so that ids stay theirs
        self._moved: set[Recorded] = set()  # replaced by copies behind a broadcast addition
        self._sorted = SortedSequences()
        # outputs of uses, by id, that live as long as the model lets them
        self._tables: dict[int, tuple[weakref.ref[Tensor], Recorded]] = {}

    def captured(self, outputs: Tensor, batch: Batch = None) -> Capture:
        """What was seen until ``outputs`` of a ``batch`` were there."""
        left = [recorded for recorded in self.uses if recorded not in self._moved]
        uses = [recorded.at(place) for place, recorded in enumerate(left)]
        hooked, training = frozenset(self.hooked), not self.refuse
        return Capture(outputs, uses, self.unstructured, self.leaves, hooked, training=training, batch=batch)

    def find(self, x: Tensor) -> tuple[str, Tensor] | None:
        """``(name, parameter)`` when ``x`` is a selected parameter or a view of one."""
        name = self.leaves.names.get(id(x)) or self.leaves.name(x)
        if name is not None:
            return name, x
        base = x._base
        if base is None or not x.requires_grad or id(x) in self._copies:
            return None
        name = self.leaves.name(base)
        return None if name is None else (name, base)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.register_hook and args[0].grad_fn is not None:
            self.hooked.add(args[0].grad_fn)
        own = kwargs.get("generator")
        if own is not None and isinstance(own, torch.Generator) and own not in self.generators:
            self.generators[own] = own.get_state()
        if self.overwritten is not None and may_write(func):
            self.overwritten.keep(func, args, kwargs)
        refusal = REFUSALS.get(func)
        if refusal is not None:
            self._consider(refusal, func, args, kwargs)
        given = [f[0] for x in tensors(args, kwargs) if (f := self.find(x)) is not None]
        if not given:
            out = self._call(func)(*args, **kwargs)
            self._sorted.see(func, args, out)
            if func in ADDITIONS:
                self._broadcast(out, *args, **kwargs)
            return out
        if func not in ADAPTERS and _is_composite(func):
            return self._open(func)(*args, **kwargs)
        by_steps = unrolled(func, args, kwargs, self._sorted.of(args[0]) if args else None)
        if by_steps is not None and not recomputed():
            with self:
                return by_steps(*args, **kwargs)
        since = sequence_number()
        out = self._call(func)(*args, **kwargs)
        results = [t for t in tensors((out,)) if t.requires_grad]
        if not results:
            return out  # a shape query or a detached copy
        if all(self.find(t) is not None for t in results):
            if not (func in ADAPTERS and isinstance(out, Tensor) and out.numel() > args[0].numel()):
                return out  # another view of the parameter, seen again where it is used
            self._copies[id(out)] = out  # copies along new axes: a use, and what is done with them is none
        recorded = self._adapt(func, out, args, kwargs, since, len(given))
        if recorded is None or {s.name for s in recorded.use.slots} != set(given):
            self.unstructured |= set(given)
        else:
            self.uses.append(recorded)
            self._tables[id(out)] = (weakref.ref(out), recorded)
        return out

    def _call(self, func: Callable[..., Any]) -> Callable[..., Any]:
        """What is run: for a graph that is kept, something with second derivatives."""
        return composed(func) if self.keep_graph else func

    def _broadcast(self, out: Tensor, input: Any, other: Any, **options: Any) -> None:
        """``x + y`` with ``y`` the output of a use, copied along the first axis: the use moves behind the addition.

        A table of positions is looked up once for the whole batch and then added to every example. The gradient of the
        sum, unlike that of the table, has an axis of examples.
        """
        for y in (input, other):
            recorded = self._use_behind(y)
            if recorded is None or options or out.ndim < y.ndim or out.shape == y.shape or not out.requires_grad:
                continue
            extra = out.ndim - y.ndim
            if (extra == 0 and (y.shape[0] != 1 or y.shape[1:] != out.shape[1:])) or (
                extra and y.shape != out.shape[extra:]
            ):
                continue
            self.uses.append(recorded.broadcast(out, extra))
            self._moved.add(recorded)

    def _use_behind(self, x: Any) -> Recorded | None:
        """The use whose output ``x`` is."""
        entry = self._tables.get(id(x))
        return entry[1] if entry is not None and entry[0]() is x else None

    def _consider(self, refusal: Callable[..., None], func: Any, args: Any, kwargs: Any) -> None:
        try:
            refusal(*args, **kwargs)
        except ModeError:
            if self.refuse:
                raise
            self.mixing |= func is F.batch_norm

    def _adapt(self, func: Any, out: Any, args: Any, kwargs: Any, since: int, given: int) -> Recorded | None:
        adapter = ADAPTERS.get(func)
        if adapter is None or not isinstance(out, Tensor):
            return None
        call = Call(self.find, out, given, keep_graph=self.keep_graph)
        with torch.set_grad_enabled(self.keep_graph):
            try:
                use = adapter(call, *args, **kwargs)
                return None if use is None else Recorded.of(use, out, call, since, len(self.uses))
            except torch.OutOfMemoryError:
                raise
            except ModeError:  # its affine parameters are used together with statistics of the batch
                if self.refuse:
                    raise
                return None
            except Exception:  # NotStructured, or an unexpected call: the fallback knows better
                return None

    def _open(self, func: Any) -> Callable[..., Any]:
        """A Python function of ``torch.nn.functional`` run with this mode switched on inside."""
        if func not in self._opened:
            asks = (name for name in func.__globals__ if name.startswith("has_torch_function"))
            scope = {**func.__globals__, **dict.fromkeys(asks, _never)}
            opened = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
            opened.__kwdefaults__ = func.__kwdefaults__
            self._opened[func] = opened

        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return self._opened[func](*args, **kwargs)

        return run


def _never(*args: Any) -> bool:
    return False


def _is_composite(func: Any) -> bool:
    return isinstance(func, types.FunctionType) and func.__module__ == F.__name__
