"""Processes that are killed while all write: what was there stays, and those that are left go on with it."""

from __future__ import annotations

import contextlib
import os
import signal

import cuts
import torch
import torch.distributed as dist
from launch import Check, Here, check

import nngeom as nng
from nngeom import kernel_folder
from nngeom.fmat.team_store import TeamStore
from nngeom.sweep import sums_file

CHECKS: dict[str, Check] = {}
PATIENCE = 8  # seconds a collective
LEFT = (0, 2, 4)  # of six ranks, who make pairs with those that are killed
groups: list = []


def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def dies(here: Here, owner, name: str, after: int):
    """In pairs of neighbours the second is killed in the call after so many, and the first is told."""
    before, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        return (killed if len(calls) > after and here.rank % 2 else before)(*args, **kwargs)

    setattr(owner, name, call)
    try:
        yield
        raise AssertionError("the other one was killed")
    except nng.PeerError:
        pass
    finally:
        setattr(owner, name, before)


def own(here: Here):
    case = cuts.data("mlp")
    return case, case.loader[2 * (here.rank % 2) :][:2]


@check(CHECKS)
def all_are_there(here: Here) -> None:
    """Something is saved by each pair, and groups are made of who will be left."""
    pairs = [dist.new_group([rank, rank + 1]) for rank in LEFT]
    groups[:] = [pairs[here.rank // 2], dist.new_group(list(LEFT))]
    case, mine = own(here)
    k = nng.GramMatrix(case.model, mine, process_group=groups[0], sharded=True)
    if here.rank < 2:
        nng.save(k, here.folder / "kernel")


@check(CHECKS)
def one_of_each_pair_is_killed(here: Here) -> None:
    """While it writes its part, a tile, and the sums of a sweep."""
    case, mine = own(here)
    if here.rank < 2:
        k = nng.GramMatrix(case.model, mine, process_group=groups[0], sharded=True)
        with dies(here, kernel_folder, "_write_part", 0):
            nng.save(-1.0 * k, here.folder / "kernel")
    elif here.rank < 4:
        with dies(here, TeamStore, "write", 2):
            nng.GramMatrix(case.model, mine, process_group=groups[0], out=here.folder / "k.npy", memory_budget=3000)
    else:
        with dies(here, sums_file, "write", 2):
            nng.FIM(case.model, mine, process_group=groups[0], checkpoint=here.folder / "sums", every=0)


@check(CHECKS)
def what_is_left(here: Here) -> None:
    case = cuts.data("mlp")
    if here.rank == 0:
        whole = nng.GramMatrix(case.model, case.loader)
        cuts.close(nng.load(here.folder / "kernel").tensor, whole.tensor)  # the older one
        nng.save(nng.GramMatrix(case.model, case.loader, sharded=True), here.folder / "kernel")
        assert len(os.listdir(here.folder / "kernel")) == 2
    if here.rank == 2:
        assert (here.folder / "k.npy.part").exists() and not (here.folder / "k.npy").exists()
    if here.rank == 4:
        assert torch.isfinite(nng.FIM(case.model, case.loader, checkpoint=here.folder / "new").trace())
    part = {0: case.loader[:2], 2: case.loader[2:], 4: []}[here.rank]
    cuts.close(
        nng.FIM(case.model, part, nng.PMatDense, process_group=groups[1]).to_dense(),
        nng.FIM(case.model, case.loader, nng.PMatDense).to_dense(),
    )


def of_two(here: Here) -> None:
    """In a launch of its own: two processes go on with what the killed ones had written."""
    case, mine = own(here)
    before = os.environ["NNGEOM_LEFT"]
    many = nng.GramMatrix(case.model, mine, process_group=here.group, out=f"{before}/k.npy", memory_budget=3000)
    cuts.close(many.tensor, nng.GramMatrix(case.model, case.loader).tensor)
    matrix = nng.FIM(case.model, mine, process_group=here.group, checkpoint=f"{before}/sums", every=0)
    one = nng.FIM(case.model, mine, process_group=here.group)
    for a, b in zip(cuts.tensors(matrix), cuts.tensors(one), strict=True):
        assert torch.equal(a, b)
