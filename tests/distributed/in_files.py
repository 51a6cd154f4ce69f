"""What processes write together, and read again: whole, in parts, by as many of them or by fewer."""

from __future__ import annotations

import functools
import os

import cuts
import numpy as np
import pytest
import torch
import torch.distributed as dist
from faults import OddOnce, coded
from kernels import others
from launch import Check, Here, check

import nngeom as nng
from nngeom.core import files
from nngeom.fmat import team_store
from nngeom.fmat.team_store import TeamStore
from nngeom.sweep import sums_file

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


# -- kernels that all write -------------------------------------------------------------------------------------------


def compare(here: Here, name: str, label: str, **options) -> None:
    """The file of all processes, the tensor mapped from it, and the kernel of one process."""
    case = cuts.data(name)
    own = cuts.mine(case.loader, here.rank, here.size)
    theirs = dict(options)
    if options.pop("between", False):
        whole, mine = others(name, here)
        options, theirs = {**options, "other": whole}, {**options, "other": mine}
    if options.get("metric"):
        options["metric"] = theirs["metric"] = nng.FIM(case.model, case.loader, nng.PMatKFAC).inverse(0.1)
    path = here.folder / f"{name} {label}.npy"
    one = nng.GramMatrix(case.model, case.loader, **options)
    many = nng.GramMatrix(case.model, own, process_group=here.group, out=path, **theirs)
    cuts.close(many.tensor, one.tensor)
    here.same(many.tensor.clone())
    if here.rank == 0:
        assert np.array_equal(np.load(path), many.tensor.numpy())
    if "other" not in options and not options.get("centered"):
        assert torch.equal(many.tensor, many.T.tensor)
    again = nng.GramMatrix(case.model, own, process_group=here.group, out=path, **theirs)
    assert torch.equal(again.tensor, many.tensor)
    dist.barrier()
    assert [x for x in os.listdir(here.folder) if x.startswith(path.name)] == [path.name]


VARIANTS = {
    "plain": {},
    "centred": {"centered": True},
    "between": {"between": True},
    "centred between": {"between": True, "centered": True},
    "in a metric": {"metric": True},
    "of a loss": {"loss": "cross_entropy"},
    "by small tiles": {"memory_budget": 3000},
}
for label, options in VARIANTS.items():
    CHECKS[f"out= {label}"] = lambda here, l=label, o=options: compare(here, "mlp", l, **o)
CHECKS["out= of images"] = lambda here: compare(here, "conv2d", "plain", memory_budget=200_000)


class Stopped(RuntimeError):
    pass


@check(CHECKS)
def a_kernel_is_resumed(here: Here) -> None:
    """Where one process failed all do, and none computes again what it has written."""
    case, path, last = cuts.data("mlp"), here.folder / "resumed.npy", here.size - 1
    own = cuts.mine(case.loader, here.rank, here.size)
    measure = lambda **o: nng.GramMatrix(case.model, own, process_group=here.group, out=path, memory_budget=3000, **o)
    written = []
    write = TeamStore.write

    def counted(self, place, *args):
        if stop and len(written) == (4 if here.rank == last else 7):
            raise Stopped("no more tiles")
        written.append(place)
        write(self, place, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TeamStore, "write", counted)
        stop = True
        with pytest.raises((Stopped, nng.PeerError), match="no more tiles"):
            measure()
        assert path.with_name("resumed.npy.part").exists() and not path.exists()
        first, stop = set(map(str, written)), False
        for options in ({"centered": True}, {"loss": "cross_entropy"}):
            with pytest.raises((nng.ArgumentError, nng.PeerError), match="holds a kernel of other inputs"):
                measure(**options)
        if here.rank == 0:  # alone, of the same file
            with pytest.raises(nng.ArgumentError, match="processes"):
                nng.GramMatrix(case.model, case.loader, out=path)
        dist.barrier()
        written.clear()
        many = measure()
        firsts: list[set[str]] = [set()] * here.size
        dist.all_gather_object(firsts, first)
        assert any(firsts) and not first & set(map(str, written))  # who fails late may stop a slow one before its first
    cuts.close(many.tensor, nng.GramMatrix(case.model, case.loader).tensor)
    if here.rank == 0:
        with pytest.raises(nng.ArgumentError, match="processes"):
            nng.GramMatrix(case.model, case.loader, out=path)


@check(CHECKS)
def a_tile_that_is_damaged_is_made_again(here: Here) -> None:
    case, path = cuts.data("mlp"), here.folder / "damaged.npy"
    own = cuts.mine(case.loader, here.rank, here.size)
    measure = lambda: nng.GramMatrix(case.model, own, process_group=here.group, out=path, memory_budget=3000)
    with pytest.MonkeyPatch.context() as patch:
        put = team_store._put
        if here.rank == here.size - 1:  # a file system that loses something
            patch.setattr(team_store, "_put", lambda fd, x, at: put(fd, x + (len(x) > 2), at))
        with pytest.raises((nng.FileError, nng.PeerError), match="finds other numbers"):
            measure()
    cuts.close(measure().tensor, nng.GramMatrix(case.model, case.loader).tensor)


@check(CHECKS)
def files_that_are_not_there(here: Here) -> None:
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    measure = lambda path: nng.GramMatrix(case.model, own, process_group=here.group, out=path)
    with pytest.raises((nng.FileError, nng.PeerError), match="does not see"):
        measure(here.folder / f"own {here.rank}.npy")
    with pytest.raises((nng.FileError, nng.PeerError), match="cannot write"):
        measure(here.folder / "no folder" / "kernel.npy")
    lock = files.Lock(os.fspath(here.folder / "locked.npy.lock")) if here.rank == 0 else None
    with pytest.raises((nng.FileError, nng.PeerError), match="another process"):
        measure(here.folder / "locked.npy")
    if lock:
        lock.release()
    shown = here.folder / "shown.npy"
    measure(shown)
    with pytest.raises((nng.FileError, nng.PeerError), match="does not see the finished kernel"):
        measure(shown if here.rank == 0 else here.folder / "another.npy")
    dist.barrier()
    if here.rank == 0:
        data = bytearray(shown.read_bytes())
        data[200] ^= 1
        shown.write_bytes(data)
    dist.barrier()
    with pytest.raises((nng.FileError, nng.PeerError), match="damaged"):
        measure(shown)
    cuts.close(measure(here.folder / "locked.npy").tensor, nng.GramMatrix(case.model, case.loader).tensor)


# -- sweeps that are kept ----------------------------------------------------------------------------------------------


class Breaking:
    """A loader that fails after so many batches in all."""

    def __init__(self, batches, after):
        self.batches, self.after, self.read = batches, after, 0

    def __iter__(self):
        for batch in self.batches:
            if self.read == self.after:
                raise Stopped("no more batches")
            self.read += 1
            yield batch


@check(CHECKS)
def sweeps_are_resumed(here: Here) -> None:
    """Where one fails, all go on from where each was; the bits are those of a call that was not interrupted."""
    case, ends = cuts.data("mlp"), (0, *cuts.CUTS[here.size], len(cuts.SIZES))
    own = case.loader[ends[here.rank] : ends[here.rank + 1]]
    last = here.rank == here.size - 1
    for name, kind in (("ekfac", nng.PMatEKFAC), ("dense", nng.PMatDense), ("low-rank", nng.PMatLowRank)):
        measure = functools.partial(nng.FIM, case.model, representation=kind, process_group=here.group)
        one = cuts.tensors(measure(loader=own))
        read = kind.passes * (ends[-1] - ends[-2])  # batches in all, by the last
        for after in (x for x in (0, 1, 3)[: kind.passes + 1] if x < read):
            compare_resumed(here, measure, own, after if last else 99, one, here.folder / f"{name} {after}")
    folder = here.folder / "dense 0"
    with pytest.raises((nng.LoaderError, nng.PeerError), match="are not those"):
        nng.FIM(case.model, [*own, case.loader[0]], nng.PMatDense, process_group=here.group, checkpoint=folder)
    with pytest.raises((nng.ArgumentError, nng.PeerError), match="representation"):
        nng.FIM(case.model, own, nng.PMatDiag, process_group=here.group, checkpoint=folder)
    if here.rank == 0:
        with pytest.raises(nng.ArgumentError, match="processes"):
            nng.FIM(case.model, case.loader, nng.PMatDense, checkpoint=folder)
    dist.barrier()


def compare_resumed(here: Here, measure, own, after, one, folder) -> None:
    """A call that fails after so many batches here, one that goes on, and the tensors of one that did neither."""
    with pytest.raises((Stopped, nng.PeerError), match="no more batches"):
        measure(loader=Breaking(own, after), checkpoint=folder, every=0)
    for a, b in zip(cuts.tensors(measure(loader=own, checkpoint=folder, every=0)), one, strict=True):
        assert torch.equal(a, b)


@check(CHECKS)
def a_layer_that_is_used_otherwise_on_one(here: Here) -> None:
    """The data is gone over once more, which is kept by itself."""
    torch.manual_seed(0)
    model = OddOnce().double()
    own = [coded(10 + here.rank), coded(7 if here.rank == 1 else 0), coded(0)]
    measure = functools.partial(nng.FIM, model, process_group=here.group)
    one, after = cuts.tensors(measure(own)), 4 if here.rank == 0 else 99
    compare_resumed(here, measure, own, after, one, here.folder / "odd")


@check(CHECKS)
def draws_are_those_of_the_folder(here: Here) -> None:
    case = cuts.data("mlp")
    own = cuts.mine(case.loader, here.rank, here.size)
    measure = lambda **o: nng.FIM_MonteCarlo(case.model, own, nng.PMatDense, process_group=here.group, **o)
    torch.manual_seed(5 + here.rank)
    one = measure()
    torch.manual_seed(5 + here.rank)
    with pytest.MonkeyPatch.context() as patch:
        write, calls = sums_file.write, []

        def fails(*args):
            if here.rank == 0 and calls:
                raise Stopped("no more sums")
            calls.append(1)
            write(*args)

        patch.setattr(sums_file, "write", fails)
        with pytest.raises((Stopped, nng.PeerError), match="no more sums"):
            measure(checkpoint=here.folder / "draws", every=0)
    torch.manual_seed(50 + here.rank)
    assert torch.equal(measure(checkpoint=here.folder / "draws").to_dense(), one.to_dense())
