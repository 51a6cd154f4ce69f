"""The processes over which examples are split, and everything they do together.

The only place that knows ``torch.distributed``. A collective is entered only by processes that know that all enter it:
work of each alone runs :meth:`Team.together`, at whose end all go on or all raise.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nngeom.core.errors import DeviceError, PeerError, RankMismatchError
from nngeom.ranks import buckets, messages
from nngeom.ranks.answers import Answer, Answers
from nngeom.ranks.fingerprint import difference, digest_of
from nngeom.ranks.groups import checked
from nngeom.ranks.let_go import let_go
from nngeom.ranks.note import Failure, Note, require_none
from nngeom.ranks.presence import Presence, Stopped


class Team:
    """The processes of a group: ``rank`` of this one, and ``size``, how many."""

    def __init__(self, group: Any) -> None:
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.ranks = dist.get_process_group_ranks(group)
        self._backends = dict(x.split(":", 1) for x in str(dist.get_backend_config(group)).split(",") if ":" in x)
        control = group
        if "cpu" not in self._backends:  # a side group for control messages, made once and kept by torch
            control = dist.new_group(self.ranks, backend="gloo", use_local_synchronization=True)
        self._group, self._control = weakref.ref(group), weakref.ref(control)  # torch's own until they are destroyed
        store = getattr(dist.distributed_c10d, "_get_default_store", lambda: None)()
        store = None if store is None else dist.PrefixStore(f"nngeom/{getattr(group, 'group_name', 0)}", store)
        self._presence, self._calls, self._working = Presence(store, self.rank, self.size), 0, False
        self._answers = Answers(self.exchange)

    @staticmethod
    def of(process_group: Any) -> Team:
        """The team of a ``ProcessGroup`` or a 1-D ``DeviceMesh``; of this process alone for ``None``.

        Raises :class:`ArgumentTypeError` for anything else, :class:`ArgumentError` where torch.distributed does not
        run, or without this process.
        """
        if process_group is None:
            return ALONE
        group = checked(process_group, dist)
        if group not in TEAMS:
            TEAMS[group] = ALONE if dist.get_world_size(group) == 1 else Team(group)
        return TEAMS[group]

    # -- all or none ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[Note]:
        """Work of each process by itself, without collectives. At its end what one of them raised, all raise: those
        that did not as :class:`PeerError`.
        """
        self._calls += 1
        note, error, self._working = Note(), None, True
        try:
            yield note
        except BaseException as e:
            error = e
            self._presence.fail(self._calls)
        self._working = False
        try:
            self._answers.give()
            said = self.exchange(what, (Failure.of(error), note.mine))
        except PeerError:
            if error is None or isinstance(error, Stopped):
                raise
            raise error from None
        if error is not None and not isinstance(error, Stopped):
            raise error
        require_none(what, [failure for failure, _ in said])
        note.all = [x for _, x in said]

    def poll(self) -> None:
        """Leave the work that is done :meth:`together` where another process has failed in it; at most twice a
        second.
        """
        if self._working:
            self._presence.poll(self._calls)

    def answering(self, what: str, answer: Answer) -> AbstractContextManager[None]:
        """Within: what processes :meth:`ask` for as ``what`` gets this ``answer`` on all; they enter together."""
        return self._answers.given(what, answer)

    def ask(self, what: str, content: Any) -> None:
        """Ask all processes for ``what``, in the middle of work that is done :meth:`together`."""
        if not self._working:
            raise RuntimeError(f"{what} is asked for outside of work that the processes do together")
        self._answers.ask(what, content)

    # -- small objects -------------------------------------------------------------------------------------------------

    def exchange(self, what: str, x: Any) -> list[Any]:
        """The objects ``x`` of all processes, in rank order; raises :class:`RankMismatchError` where these are not in
        the same call, ``what``.
        """
        mine = messages.message((what, x))
        parts = self._gathered(messages.padded(mine, messages.SIZE))
        longest = max(map(messages.length, parts))
        if longest > messages.SIZE:
            parts = self._gathered(messages.padded(mine, longest))
        calls = [messages.content(part) for part in parts]
        self.require_same([{"call": call} for call, _ in calls], "the processes are not in the same call")
        return [x for _, x in calls]

    def first(self, what: str, x: Any) -> Any:
        """The object ``x`` of rank 0."""
        return self.exchange(what, x if self.rank == 0 else None)[0]

    def same(self, what: str, values: dict[str, str]) -> None:
        """Raise :class:`RankMismatchError`, with the first difference and the ranks, unless ``values`` are equal
        everywhere.
        """
        digest = digest_of(sorted(values.items()))
        if len(set(self.exchange(what, digest))) > 1:
            self.require_same(self.exchange(what, values), f"{what} needs the same on all processes")

    def require_same(self, values: list[dict[str, str]], what: str) -> None:
        """Raise :class:`RankMismatchError`, ``what`` and the first difference, unless those of all ranks are equal."""
        found = difference(values)
        if found is not None:
            raise RankMismatchError(f"{what}: {found}")

    def _gathered(self, m: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(m) for _ in range(self.size)]
        with self._reached():
            dist.all_gather(parts, m, group=self._control())
        arrived = [part.clone() for part in parts]
        let_go([m, *parts])
        return arrived

    # -- tensors -------------------------------------------------------------------------------------------------------

    def sum_(self, tensors: Sequence[Tensor], to: int | None = None) -> None:
        """The sums over all processes, in place, everywhere or on rank ``to`` alone: of tensors alike on all."""
        with self._reached(), self._sent(tensors) as sent:
            send = lambda flat: dist.all_reduce(flat, group=self._group_of(flat), async_op=True)
            if to is not None:
                send = lambda flat: dist.reduce(flat, self.ranks[to], group=self._group_of(flat), async_op=True)
            buckets.through(sent, send)

    def spread(self, tensors: Sequence[Tensor], rank: int) -> None:
        """What ``rank`` has of them, to all, in place."""
        with self._reached(), self._sent(tensors) as sent:
            source = self.ranks[rank]
            send = lambda flat: dist.broadcast(flat, source, group=self._group_of(flat), async_op=True)
            buckets.through(sent, send)

    def rows(self, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """The rows ``x [sizes[rank], p]`` of all processes, in rank order."""
        parts = [x if r == self.rank else x.new_empty(size, *x.shape[1:]) for r, size in enumerate(sizes)]
        for rank, part in enumerate(parts):
            self.spread([part], rank)
        return torch.cat(parts)

    def pass_on(self, tensors: Sequence[Tensor], into: Sequence[Tensor], step: int = 1) -> None:
        """``tensors`` to the process ``step`` ranks on, ``into`` from the one as many ranks before."""
        to, source = (self.ranks[(self.rank + s) % self.size] for s in (step, -step))
        with self._reached(), self._sent(tensors) as sent, self._sent(into) as arrived:
            ops = [dist.P2POp(dist.isend, t.contiguous(), to, self._group_of(t)) for t in sent if t.numel()]
            ops += [dist.P2POp(dist.irecv, t, source, self._group_of(t)) for t in arrived if t.numel()]
            for work in dist.batch_isend_irecv(ops) if ops else []:
                work.wait()

    def require_device(self, device: torch.device) -> None:
        """Raise :class:`DeviceError` where this group does not serve a model on ``device``."""
        if device.type == "cpu" and "cpu" not in self._backends:
            raise DeviceError(
                f"the model is on the cpu and the process group is {','.join(self._backends.values())}, for "
                f"{','.join(self._backends)}; move the model, or use a gloo group"
            )

    def _group_of(self, t: Tensor) -> Any:
        return (self._group if t.device.type in self._backends else self._control)()

    def _sent(self, tensors: Sequence[Tensor]) -> AbstractContextManager[Sequence[Tensor]]:
        """The tensors, or copies on the host where the group sends no others."""
        return buckets.copied(tensors, away=self._backends.get("cuda") != "nccl")

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """A collective: :class:`PeerError` where another process or the network is gone."""
        self._presence.arrive()
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise PeerError(f"{self._presence.missing()}; torchrun's log names what ended first ({error})") from error


class Alone(Team):
    """This process by itself: what is done together is what it does."""

    def __init__(self) -> None:
        self.rank, self.size, self.ranks, self._answers = 0, 1, [], Answers(self.exchange)

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[Note]:
        yield (note := Note())
        note.all = [note.mine]

    def poll(self) -> None:
        pass

    def ask(self, what: str, content: Any) -> None:
        self._answers.ask(what, content)

    def exchange(self, what: str, x: Any) -> list[Any]:
        return [x]

    def same(self, what: str, values: dict[str, str]) -> None:
        pass

    def sum_(self, tensors: Sequence[Tensor], to: int | None = None) -> None:
        pass

    def spread(self, tensors: Sequence[Tensor], rank: int) -> None:
        pass

    def pass_on(self, tensors: Sequence[Tensor], into: Sequence[Tensor], step: int = 1) -> None:
        for t, other in zip(tensors, into):
            other.copy_(t)

    def require_device(self, device: torch.device) -> None:
        pass


ALONE = Alone()
TEAMS: weakref.WeakKeyDictionary[Any, Team] = weakref.WeakKeyDictionary()  # one a group


def world() -> Team:
    """The team of all processes; of this one alone where torch.distributed does not run."""
    return Team.of(dist.group.WORLD) if dist.is_available() and dist.is_initialized() else ALONE
