"""A model on data, and how both are gone through: what every measure is given, held together."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.capture.batch import tensors
from nngeom.capture.current import require_current
from nngeom.capture.gathered import gathered, sharded_modules
from nngeom.capture.in_turn import can_be_in_turn, in_turn
from nngeom.capture.looked import does_other_things, looked_again
from nngeom.capture.network import RUNNING, Batch, Network, as_batches, leading_size, targets
from nngeom.capture.recorder import record
from nngeom.core import memory
from nngeom.core.bars import tqdm
from nngeom.core.errors import UnsupportedError
from nngeom.pullback.captured_pass import Pass
from nngeom.ranks.data import warn_of_repeats
from nngeom.ranks.fingerprint import bits, digest_of
from nngeom.ranks.team import ALONE, Team
from nngeom.space.collection import LayerCollection
from nngeom.sweep.shards import fits, require_ranks, warn_of_room

Function = Callable[..., Tensor] | None


@dataclass(frozen=True)
class Run:
    """A model on data: what every measure takes, by the same names.

    Objects that outlive the call which made them (implicit matrices, kernels and maps) keep their run, with its budget
    and its checks. :meth:`of` makes one from the arguments of a measure.

    Its ``network`` is the model with what names its parameters and runs it, ``loader`` the data, ``memory_budget`` in
    bytes; ``check`` and ``progress`` as for :meth:`of`. ``left_to_fallback``: parameters whose rows come from the
    per-example fallback, as sweeps find out. ``team``: the processes over which the examples are split; ``met``: what
    this one's first batch was, a digest. ``before``: how many batches came before those of the loader.
    ``in_turn``: of a model under ``fully_shard`` a process has those parameters whole that it uses, else all of them.
    """

    network: Network
    loader: Any
    memory_budget: int
    check: bool = True
    progress: bool = False
    left_to_fallback: set[str] = field(default_factory=set, repr=False)
    team: Team = ALONE
    met: dict[int, str] = field(default_factory=dict, repr=False)
    before: int = 0
    in_turn: bool = False

    @staticmethod
    def of(
        model: nn.Module,
        loader: Any,
        *,
        function: Function = None,
        layer_collection: LayerCollection | None = None,
        progress: bool = False,
        memory_budget: int | None = None,
        check: bool = True,
        process_group: Any = None,
        parts: bool = False,
        sums: bool = False,
    ) -> Run:
        """The run of the arguments that all measures take.

        Args:
            model: a module. Where it mixes examples or draws at random (batch normalisation or dropout in training
                mode) a measure raises :class:`ModeError`.
            loader: a ``DataLoader``, an iterable of batches, or a list of them; a tuple, tensor or dict is one batch.
            function: from a batch to its outputs ``(n, c)``: a tuple is unpacked, targets included, others are passed
                whole. By default ``model(inputs)``, for a dict ``model(**batch)`` without its labels.
            layer_collection: the parameters, all trainable ones by default.
            progress: whether a bar is shown.
            memory_budget: bytes of temporaries (1 GiB by default): work is cut to fit, the result stays the same.
            check: whether every batch is known to be complete, placed and right before it enters the result.
            process_group: the processes over which examples are split, a ``torch.distributed`` group or a 1-D
                ``DeviceMesh``; each passes its own part of them (:func:`shard`), none included, and all have the whole
                result, that of one process on all parts in rank order. By default this process alone.
            parts: whether the measure looks after parameters of which every process holds a part; else it raises
                :class:`UnsupportedError` for them.
            sums: whether it is of sums over examples, made by first derivatives in work that processes do together:
                then those parameters of a model under ``fully_shard`` are whole that are in use, where all do not fit.

        Raises :class:`ArgumentTypeError`, :class:`DeviceError`, :class:`CollectionError` for what is no model or not
        its collection, :class:`ArgumentError` for a budget that is not positive. With a process group it raises
        :class:`PeerError` for what another process raises, :class:`RankMismatchError` where models or settings differ.
        """
        team = Team.of(process_group)
        in_turns = False
        if parts and sharded_modules(model):
            with team.together("arguments") as note, memory.limit(memory_budget):
                require_ranks(model, team)
                note.mine = fits(model, asked=memory_budget is not None), sums and can_be_in_turn(model)
            room, can = map(all, zip(*note.all))
            in_turns = can and not room
            if not room and not can:
                warn_of_room(model, memory_budget)
        whole = in_turn(model, team) if in_turns else gathered(model)
        with (
            whole if parts else contextlib.nullcontext(),
            team.together("arguments"),
            memory.limit(memory_budget) as budget,
        ):
            network = Network.build(model, function, layer_collection, parts=parts)
            team.require_device(network.device)
            if team.size > 1:
                warn_of_repeats(loader)
            return Run(network, loader, budget, check, progress, team=team, in_turn=in_turns)

    @staticmethod
    def gathering(model: nn.Module, loader: Any, **options: Any) -> Run:
        """:meth:`of` a ``model`` and its ``loader``, with ``options``, for a measure that looks after parameters in
        parts.
        """
        return Run.of(model, loader, parts=True, **options)

    def require_alone(self, what: str, instead: str = "") -> None:
        """Raise :class:`UnsupportedError` where the examples are split over processes and ``what`` is not offered;
        ``instead``: what is.
        """
        if self.team.size > 1:
            raise UnsupportedError(
                f"{what} is not offered with process_group= over {self.team.size} processes; {instead}pass "
                "process_group=None for this process's own examples"
            )

    @contextlib.contextmanager
    def within(self) -> Iterator[int]:
        """Work under this run's memory budget, on whole parameters; raises :class:`CollectionError` where the model has
        other ones by now, and looks again at a model that does other things than when it was looked at.
        """
        with memory.limit(self.memory_budget) as budget, self.whole():
            if not (self.in_turn or sharded_modules(self.network.model)):
                with RUNNING:
                    require_current(self.network)
                    self._look_again()
            yield budget

    def _look_again(self) -> None:
        """Raise :class:`CoverageError` or :class:`ModeError` where the model mixes examples by now, or is random."""
        network = self.network
        if not self.check or self.team.size > 1 or not does_other_things(network):
            return
        anew = Network.build(network.model, network.function, network.collection)
        for batch in self.loader:
            Pass(anew, record(anew, batch), set(self.left_to_fallback)).require_separate()
        looked_again(network, anew)

    def whole(self) -> AbstractContextManager[None]:
        """Within: parameters are whole, where they are used at least."""
        model = self.network.model
        return in_turn(model, self.team) if self.in_turn else gathered(model)

    def batches(self) -> Iterator[Batch]:
        """The batches on the model's device; raises :class:`LoaderError` when no process has one."""
        return self._visited(self.loader)

    def _visited(self, loader: Any) -> Iterator[Batch]:
        if self.team.size == 1:
            return self.network.batches(loader)
        return self._in_step(self.network.batches(loader, may_be_empty=True))

    def _in_step(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for index, batch in enumerate(self.watched(batches)):
            if index == 0 and not self.met:
                self.met[0] = digest_of(bits(tensors(batch)))
            yield batch

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The ``batches``, until another process fails."""
        for batch in batches:
            self.team.poll()
            yield batch

    def followed(self, label: str) -> Iterable[Batch]:
        """The batches, beside a bar named ``label`` where progress is to be shown."""
        source = as_batches(self.loader)
        if not self.progress or self.team.rank:
            return self._visited(source)
        return tqdm(self._visited(source), total=_length(source), desc=label)

    def on(self, loader: Any) -> Run:
        """The same on another ``loader``."""
        return replace(self, loader=loader)

    def held(self) -> Run:
        """The same with its batches read now, once, and kept, so that every visit sees the same."""
        return self.on(list(self.batches()))

    def silent(self) -> Run:
        """The same without a progress bar."""
        return replace(self, progress=False) if self.progress else self

    # -- of a run that is held -----------------------------------------------------------------------------------------

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Examples in every batch; a model is run on batches that do not tell."""
        return [self._size(batch) for batch in self.loader]

    def count(self) -> int:
        """How many examples there are, of batches that can be read again."""
        return sum(self._size(batch) for batch in self.batches())

    @torch.no_grad()
    def _size(self, batch: Batch) -> int:
        n = leading_size(batch)
        return self.network.run(batch).shape[0] if n is None else n  # elsewhere running makes sure of as many outputs

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """The outputs ``(n, *shape)`` of all examples."""
        return torch.cat([self.network.run(batch) for batch in self.loader])

    def targets(self) -> Tensor | None:
        """The targets of all batches, concatenated; ``None`` where batches have none."""
        parts = [targets(batch) for batch in self.loader]
        if not all(isinstance(y, Tensor) for y in parts):
            return None
        return torch.cat([y.detach() for y in parts])


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except TypeError:  # a generator, or an iterable data set
        return None
