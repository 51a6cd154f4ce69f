"""Tensors that one process sends to another in the middle of work that is done together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nngeom.ranks.team import Team

WHAT = "a parcel"
Label = tuple[int, Any, list[tuple[tuple[int, ...], torch.dtype]]]  # to whom, what is said of it, and what is in it


class Parcels:
    """Sent by :meth:`send`; what arrives goes to ``receive(told, tensors)``, with its tensors on ``device``."""

    def __init__(self, team: Team, device: torch.device, receive: Callable[[Any, list[Tensor]], None]) -> None:
        self.team, self.device, self.receive = team, device, receive
        self._mine: Sequence[Tensor] = ()
        self.error: Exception | None = None

    @contextlib.contextmanager
    def carried(self) -> Iterator[None]:
        """Within: parcels are sent in work that is done together. Its end is no place to raise what could not be used
        of them: that is the :attr:`error`.
        """
        with self.team.answering(WHAT, self._carry):
            yield

    def send(self, to: int, told: Any, tensors: Sequence[Tensor]) -> None:
        """Send ``tensors``, and what is ``told`` of them, to the process of that rank."""
        self._mine = [t.detach().contiguous() for t in tensors]
        self.team.ask(WHAT, (to, told, [(tuple(t.shape), t.dtype) for t in self._mine]))
        self._mine = ()

    @torch.no_grad()
    def _carry(self, asked: Sequence[Label | None]) -> None:
        team = self.team
        for source, label in enumerate(asked):
            if label is None or team.rank not in (source, label[0]):
                continue
            to, told, contents = label
            step = (to - source) % team.size
            if team.rank == source:
                team.pass_on(self._mine, [], step)
                continue
            arrived = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in contents]
            team.pass_on([], arrived, step)
            if self.error is None:
                try:
                    self.receive(told, arrived)
                except Exception as error:
                    self.error = error
