"""The processes over which a model under ``fully_shard`` is split, against those over which its examples are."""

from __future__ import annotations

import contextlib
import os
import warnings

import torch
from torch import nn

from nngeom.capture.gathered import ranks_of
from nngeom.capture.stand_in import bytes_of
from nngeom.core import memory
from nngeom.core.errors import ArgumentError, MemoryWarning
from nngeom.ranks.team import Team


def require_ranks(model: nn.Module, team: Team) -> None:
    """Raise :class:`ArgumentError` unless all processes that hold parts of the model are in the team: they gather its
    parameters together.
    """
    ranks = ranks_of(model)
    missing = sorted(ranks - set(team.ranks))
    if len(ranks) > 1 and missing:
        given = f"{sorted(team.ranks)}" if team.size > 1 else "this process alone"
        raise ArgumentError(
            f"the model is sharded over {len(ranks)} ranks (fully_shard), of which {missing[:8]} are not in "
            f"process_group, {given}; expected a group of all of them: process_group=mesh.get_group(), for a mesh of "
            "several axes that of the flattened mesh, or torch.distributed.group.WORLD, in every process"
        )


def fits(model: nn.Module, *, asked: bool) -> bool:
    """Whether the whole parameters have room here: in the memory budget, or in half of what the device has free unless
    the budget was ``asked`` for.
    """
    room = memory.budget()
    if not asked:
        room = max(room, _free(next(model.parameters()).device) // 2)
    return len(ranks_of(model)) < 2 or bytes_of(model) <= room


def warn_of_room(model: nn.Module, memory_budget: int | None) -> None:
    """Warn that the parameters are whole where they do not fit."""
    room = "half of the free memory" if memory_budget is None else f"memory_budget, {memory_budget} bytes"
    warnings.warn(
        f"the model under fully_shard is gathered for this measure and takes {bytes_of(model)} bytes in every process, "
        f"more than {room}; FIM, GGN, EmpiricalFIM, FIM_MonteCarlo and GradientCovariance in representations other "
        "than PMatImplicit gather parameters where they are used, of a model that is under fully_shard alone",
        MemoryWarning,
        stacklevel=4,
    )


def _free(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, StopIteration), open("/proc/meminfo") as file:
        return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
