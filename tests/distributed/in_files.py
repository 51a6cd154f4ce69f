"""What processes write together, and read again: whole, in parts, by as many of them or by fewer."""

from __future__ import annotations

import os

import cuts
import pytest
import torch
import torch.distributed as dist
from launch import Check, Here, check

import nngeom as nng

CHECKS: dict[str, Check] = {}


def sharded(here: Here, **options):
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    return nng.GramMatrix(case.model, own, process_group=here.group, sharded=True, **options)


@check(CHECKS)
def a_kernel_in_parts(here: Here) -> None:
    k, path = sharded(here), here.folder / "kernel"
    nng.save(k, path)
    assert torch.equal(nng.load(path).tensor, k.gather().tensor)
    again = nng.load(path, process_group=here.group)
    assert torch.equal(again.strip, k.strip) and again.places.counts == k.places.counts
    f = nng.FVector(torch.ones(k.outputs, k.columns, dtype=torch.float64))
    assert torch.equal((k + again).mv(f).tensor, 2 * k.mv(f).tensor)
    alone = dist.new_group([here.rank], use_local_synchronization=True)
    assert torch.equal(nng.load(path, process_group=alone).strip, k.gather().tensor)
    nng.save(0.5 * k, path, process_group=here.group)
    assert torch.equal(nng.load(path).tensor, 0.5 * k.gather().tensor)
    dist.barrier()
    assert len(os.listdir(path)) == here.size + 1


@check(CHECKS)
def folders_that_are_bad(here: Here) -> None:
    k, path = sharded(here), here.folder / "bad"
    nng.save(k, path)
    alone = dist.new_group([here.rank], use_local_synchronization=True)
    with pytest.raises(nng.ArgumentError, match="over other processes"):
        nng.save(k, path, process_group=alone)
    dist.barrier()
    if here.rank == 0:
        name = next(name for name in os.listdir(path) if name.startswith(f"part-{here.size - 1:05d}"))
        with open(path / name, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
    dist.barrier()
    own = here.rank == here.size - 1
    with pytest.raises(nng.FileError if own else nng.PeerError, match="has not the checksum"):
        nng.load(path, process_group=here.group)
    with pytest.raises(nng.FileError, match="has not the checksum"):
        nng.load(path)
    for missing in ("none", "."):
        with pytest.raises((nng.FileError, nng.PeerError), match="there is no"):
            nng.load(here.folder / missing, process_group=here.group)
    odd = here.folder / f"seen by {here.rank}"
    with pytest.raises((nng.FileError, nng.PeerError), match="does not see the folder"):
        nng.save(k, odd)
    nng.save(k, path)
    assert torch.equal(nng.load(path, process_group=here.group).strip, k.strip)


@check(CHECKS)
def a_whole_matrix_read_by_all(here: Here) -> None:
    case = cuts.data("mlp")
    fisher = nng.FIM(case.model, cuts.mine(case.loader, here.rank, here.size), process_group=here.group)
    nng.save(fisher, here.folder / "whole", process_group=here.group)
    assert torch.equal(nng.load(here.folder / "whole", process_group=here.group).to_dense(), fisher.to_dense())
