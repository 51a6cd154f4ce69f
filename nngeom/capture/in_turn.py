"""Models whose parameters ``fully_shard`` keeps in parts, each of them whole only while an operation needs it.

In the place of every parameter stands a tensor of its shape without memory of its own. Who runs an operation on it asks
all processes for the parameter (:meth:`~nngeom.ranks.team.Team.ask`), which gather it together; who did not ask lets
go of it at once. A backward pass holds no parameter either: it asks for what it has saved when it comes to it. So every
process runs its own passes, as many as it has and in the order that suits it, whatever the others run. What is in use
stays until other parameters need its share of the memory budget.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from nngeom.capture.arguments import tensors
from nngeom.capture.gathered import as_whole, sharded_modules
from nngeom.capture.stand_in import StandIn, can_stand_in, stand_ins
from nngeom.core import memory
from nngeom.ranks.team import Team
from nngeom.space.collection import unwrap
from nngeom.space.walk import modules

SHARE = 4  # parameters stay whole within such a part of the memory budget
PARAMETER = "a parameter"
WHILE_TRACED = False  # torch's hooks are not asked for of what is traced
_TOP = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # not in torch 2.6
_NAMES = ("shape", "dtype", "device", "requires_grad", "is_leaf", "grad_fn", "ndim", "layout", "is_cuda", "is_sparse")
_METHODS = ("size", "dim", "numel", "ndimension", "stride", "is_floating_point", "is_complex", "element_size")
OUTSIDE = {getattr(Tensor, name).__get__ for name in _NAMES} | {getattr(Tensor, name) for name in _METHODS}


class Saved(NamedTuple):
    """What a backward pass keeps of the parameter ``j``, or a view of it."""

    j: int
    sizes: torch.Size
    strides: tuple[int, ...]
    offset: int


class InTurn:
    """The parameters of a model, by number, and those that are whole here now, those of late use last."""

    def __init__(self, places: list[StandIn], team: Team) -> None:
        self.places, self.team = places, team
        self.room = memory.budget() // SHARE  # backward passes may run in threads that know no budget
        self.numbers = {id(place.parameter): j for j, place in enumerate(places)}
        self.whole: dict[int, Tensor] = {}
        self.running = threading.local()  # whether a pass of the model is watched, in this thread
        self._storages: dict[int, int] = {}  # the parameter that is whole there
        self._wanted: frozenset[int] = frozenset()

    def need(self, items: Iterable[Any]) -> None:
        """Make those parameters whole that are among some tensors."""
        found = {j: None for x in items if (j := self.numbers.get(id(x))) is not None}
        if found:
            self._need(tuple(found))

    def _need(self, wanted: tuple[int, ...]) -> None:
        with torch.inference_mode(mode=False), torch.no_grad(), torch._C.DisableTorchFunction():
            for j in wanted:
                if j in self.whole:
                    self.whole[j] = self.whole.pop(j)
            missing = tuple(j for j in wanted if j not in self.whole)
            if missing:
                self._wanted = frozenset(wanted)
                self.team.ask(PARAMETER, missing)

    @torch.no_grad()
    def answer(self, asked: Iterable[tuple[int, ...] | None]) -> None:
        """Gather what processes ask for; what this one asked for is whole when all is."""
        listed = list(asked)
        mine = listed[self.team.rank] or ()
        with torch.inference_mode(mode=False), torch._C.DisableTorchFunction():
            for j in sorted({j for each in listed for j in each or ()}):
                if j in mine:
                    self._make_room(self.places[j].nbytes)
                t = self.places[j].gathered()
                if j in mine:
                    self.whole[j] = self.places[j].parameter.data = t
                    if t.numel():
                        self._storages[t.untyped_storage().data_ptr()] = j

    def _make_room(self, nbytes: int) -> None:
        """Part with what was not used of late and is not wanted now."""
        left = [j for j in self.whole if j not in self._wanted]
        nbytes += sum(self.places[j].nbytes for j in self.whole)
        for j in left:
            if nbytes <= self.room:
                break
            nbytes -= self.places[j].nbytes
            self.part(j)

    def part(self, j: int) -> None:
        """Let go of a parameter."""
        t = self.whole.pop(j)
        self._storages.pop(t.untyped_storage().data_ptr(), None)
        self.places[j].clear()

    def number(self, x: Tensor) -> int | None:
        """That of the parameter which is whole in the memory of ``x``."""
        plain = type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided and not x.is_nested
        return self._storages.get(x.untyped_storage().data_ptr()) if plain and x.numel() else None

    # -- passes --------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within: a forward pass, in which parameters are whole when an operation is given them."""
        before = self.watched
        self.running.now = True
        try:
            with saved_tensors_hooks(self.pack, self.unpack), _Used(self):
                yield
        finally:
            self.running.now = before

    @property
    def watched(self) -> bool:
        """Whether this thread is inside of :meth:`used`."""
        return getattr(self.running, "now", False)

    def before(self, module: nn.Module, args: Any) -> None:
        """A ``module`` is run: where nothing watches, as what a checkpoint computes again, its parameters are made
        whole.
        """
        if not self.watched:
            self.need(module.parameters())

    def pack(self, t: Tensor) -> Any:
        """What is kept of a saved tensor: of a parameter nothing but where it is."""
        j = self.number(t)
        if j is None or t.dtype != self.places[j].dtype or t.is_neg():
            kept = t.detach()
            return kept, kept._version
        return Saved(j, t.size(), t.stride(), int(t.storage_offset()))

    def unpack(self, kept: Any) -> Tensor:
        """The saved tensor."""
        if isinstance(kept, Saved):
            self._need((kept.j,))
            return self.whole[kept.j].as_strided(kept.sizes, kept.strides, kept.offset)
        t: Tensor = kept[0]
        if t._version != kept[1]:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{t.dtype} {tuple(t.shape)}, at version {t._version}; expected version {kept[1]}"
            )
        return t


class _Used(TorchFunctionMode):
    """Shows what calls are given."""

    def __init__(self, parameters: InTurn) -> None:
        super().__init__()
        self.parameters = parameters

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in OUTSIDE:
            self.parameters.need(tensors(args, kwargs))
        return func(*args, **kwargs)


_NOW: WeakKeyDictionary[nn.Module, InTurn] = WeakKeyDictionary()  # of models that run so now


def used(model: nn.Module) -> AbstractContextManager[None]:
    """Within: a forward pass of the ``model``."""
    now = _NOW.get(model)
    return contextlib.nullcontext() if now is None else now.used()


def whole_of(x: Tensor) -> Tensor | None:
    """The parameter that ``x`` is, or shares its memory with, made whole; ``None`` for what is none in turn."""
    for now in list(_NOW.values()):
        now.need([x])
        j = now.number(x)
        if j is not None:
            return now.places[j].parameter
    return None


def can_be_in_turn(model: nn.Module) -> bool:
    """Whether its parameters may be whole in turn, with the numbers that they have together: recurrent layers are
    written out, step by step, where it is known that nothing is computed again behind it.
    """
    recurrent = (nn.RNNBase, nn.RNNCellBase)
    known = _TOP is not None or not any(isinstance(m, recurrent) for m in modules(unwrap(model)))
    return known and can_stand_in(model)


def saves_for_us() -> bool:
    """Whether what autograd saves now goes to :meth:`InTurn.pack`, and no other hooks stand before."""
    if not _NOW or _TOP is None:
        return False
    top = _TOP(WHILE_TRACED)
    return top is not None and isinstance(getattr(top[0], "__self__", None), InTurn)


def value(model: nn.Module, parameter: Tensor) -> Tensor:
    """The numbers of a ``parameter`` of the model, to be read."""
    now = _NOW.get(model)
    if now is not None:
        now.need([parameter])
    return parameter.detach()


@contextlib.contextmanager
def in_turn(model: nn.Module, team: Team) -> Iterator[None]:
    """Within: the parameters of ``model`` are whole while they are used, in work that the ``team``, all processes of
    its mesh, does together. Afterwards they are in parts as before, also after an exception.
    """
    model = unwrap(model)
    if model in _NOW:
        yield
        return
    places = stand_ins(model)
    now = InTurn(places, team)
    with contextlib.ExitStack() as stack:
        for place in places:
            stack.enter_context(place.standing())
        for module in sharded_modules(model):
            stack.enter_context(as_whole(module))
        for module in [m for m in modules(model) if not now.numbers.keys().isdisjoint(map(id, m.parameters()))]:
            stack.callback(module.register_forward_pre_hook(now.before).remove)
        stack.enter_context(team.answering(PARAMETER, now.answer))
        _NOW[model] = now
        stack.callback(_NOW.pop, model)
        yield
