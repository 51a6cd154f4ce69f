"""Matrices of which every process keeps a part: what they say is what the whole says."""

from __future__ import annotations

import os
import warnings

import cuts
import pytest
import torch
import torch.distributed as dist
from cases import build
from faults import OddOnce, coded
from launch import Check, Here, check

import nngeom as nng

CHECKS: dict[str, Check] = {}
KINDS = {
    "kfac": nng.PMatKFAC,
    "ekfac": nng.PMatEKFAC,
    "reduced": nng.PMatKFAC.options(sharing="reduce"),
    "layers": nng.PMatBlockDiag,
    "quasi-diagonal": nng.PMatQuasiDiag,
}
MODELS = ("mlp", "transformer", "tied", "gru")
ROOM = 2**10  # bytes, in which few layers have room at once, and few outputs


def pair(kind, name: str, group=None, measure=nng.FIM, *, streamed=False, room=ROOM, **options):
    """The matrix of a case as a whole in one process, and in parts over all."""
    case = build(name, sizes=cuts.SIZES)
    mine = case.loader if group is None else cuts.mine(case.loader, dist.get_rank(group), dist.get_world_size(group))
    whole = measure(case.model, case.loader, kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", nng.MemoryWarning)
        chosen = nng.PMatSharded.of(kind, streamed=streamed)
        parted = measure(case.model, mine, chosen, process_group=group, memory_budget=room, **options)
    return whole, parted


def close(x, y) -> None:
    cuts.close(x.reshape(-1), y.reshape(-1), 1e-9)


def as_the_whole(kind: str, name: str, group=None, **options) -> None:
    whole, parted = pair(KINDS[kind], name, group, **options)
    lc = whole.layer_collection
    v = nng.PVector.randn(lc, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert parted.shape == whole.shape and parted.examples == whole.examples and parted.dtype == whole.dtype
    close(parted.mv(v).flat(), whole.mv(v).flat())
    close(parted.vTMv(v), whole.vTMv(v))
    close(parted.diag().flat(), whole.diag().flat())
    for damping in (10.0, nng.Relative(10.0), nng.PVector(lc, torch.linspace(10, 20, lc.numel, dtype=torch.float64))):
        if isinstance(damping, nng.PVector) and kind != "layers":
            continue  # whose blocks are not closed under it
        close(parted.solve(v, damping).flat(), whole.solve(v, damping).flat())
        close(parted.logdet(damping), whole.logdet(damping))
        close(parted.inverse(damping).mv(v).flat(), whole.solve(v, damping).flat())
    close(parted.trace(), whole.trace())
    close(parted.norm(), whole.norm())
    close(parted.norm(2), whole.norm(2))
    cuts.close(parted.lanczos(2)[0], torch.linalg.eigvalsh(whole.to_dense()).flip(0)[:2], 1e-6)
    close((2 * parted + parted).trace(), 3 * whole.trace())
    cuts.close(parted.to(torch.float32).trace(), whole.to(torch.float32).trace(), 1e-6)
    gathered = parted.gather()
    assert type(gathered) is type(whole)
    close(gathered.to_dense(), whole.to_dense())


for kind in KINDS:
    CHECKS[f"parts, {kind}"] = lambda here, k=kind: as_the_whole(k, "mlp", here.group)
for name in MODELS[1:]:
    CHECKS[f"parts, {name}"] = lambda here, n=name: as_the_whole("ekfac", n, here.group)
STREAMED = [("ekfac", name, ROOM) for name in MODELS[:3]] + [(kind, "mlp", ROOM) for kind in KINDS if kind != "ekfac"]
STREAMED += [("ekfac", "transformer", 2**14), ("kfac", "mlp", 2**14)]  # sums stay until the end of the sweep
for kind, name, room in STREAMED:
    options = {"streamed": True, "room": room}
    CHECKS[f"streamed, {kind} {name} {room}"] = lambda here, k=kind, n=name, o=options: as_the_whole(
        k, n, here.group, **o
    )


@check(CHECKS)
def streamed_draws(here: Here) -> None:
    case = build("mlp", sizes=cuts.SIZES)
    options = {"generator": torch.Generator().manual_seed(3)}
    whole = nng.FIM_MonteCarlo(case.model, case.loader, nng.PMatKFAC, **options)
    options = {"generator": torch.Generator().manual_seed(3), "process_group": here.group}
    chosen = nng.PMatSharded.of(nng.PMatKFAC, streamed=True)
    parted = nng.FIM_MonteCarlo(case.model, cuts.mine(case.loader, here.rank, here.size), chosen, **options)
    close(parted.gather().to_dense(), whole.to_dense())
    centred = lambda kind, data, **o: nng.FIM(case.model, data, kind, centered=True, **o)
    with pytest.raises(nng.UnsupportedError, match="not centred"):
        centred(nng.PMatSharded.of(nng.PMatEKFAC, streamed=True), case.loader)


@check(CHECKS)
def streamed_layers_that_are_used_in_unlike_ways(here: Here) -> None:
    """What is used oddly on the last rank is kept whole on all; a layer that is not used there counts as zero."""
    torch.manual_seed(0)
    model, options = OddOnce().double(), {"process_group": here.group}
    for code in (7, 8, 9):
        data = [coded(code if rank == here.size - 1 else 0) for rank in range(here.size)]
        mine = data[here.rank : here.rank + 1]
        for kind in (nng.PMatKFAC, nng.PMatEKFAC):
            many = nng.FIM(model, mine, nng.PMatSharded.of(kind, streamed=True), **options).gather().to_dense()
            close(many, nng.FIM(model, mine, kind, **options).to_dense())


@check(CHECKS)
def one_raises_while_layers_are_streamed(here: Here) -> None:
    case = build("transformer", sizes=cuts.SIZES)
    last, mine = here.rank == here.size - 1, list(case.loader)
    chosen = nng.PMatSharded.of(nng.PMatEKFAC, streamed=True)
    options = {"process_group": here.group, "memory_budget": ROOM}

    def loader():
        yield mine[0]
        if last:
            raise ValueError("broken loader")
        yield from mine[1:]

    with pytest.raises(ValueError if last else nng.PeerError, match="broken loader"):
        nng.FIM(case.model, loader(), chosen, **options)
    case = build("mlp", sizes=cuts.SIZES)
    x, y = case.loader[-1]
    x = x.clone()
    x[1] = torch.nan
    data = [*case.loader[:-1], (x, y)] if last else case.loader
    with pytest.raises(nng.NonFiniteError if last else nng.PeerError, match=r"for examples \[1\]"):
        nng.FIM(case.model, data, chosen, **options)
    as_the_whole("kfac", "mlp", here.group, streamed=True)


@check(CHECKS)
def what_cannot_be_used_of_a_parcel_all_raise(here: Here) -> None:
    """A recipe that breaks where rows of others arrive, on the process that keeps them."""

    class Broken(nng.PMatEKFAC):
        blocks_in_layers = True

        @classmethod
        def recipe(cls, selection, **options):
            recipe = super().recipe(selection, **options)
            second = recipe.send((yield next(recipe)))

            def statistic(chunk):
                if here.rank == 0 and chunk.examples == 3:
                    raise ValueError("broken statistic")
                return second(chunk)

            means = yield statistic
            try:
                recipe.send(means)
            except StopIteration as end:
                return end.value

    case = build("transformer", sizes=cuts.SIZES)
    mine = [batch for batch in case.loader if (len(batch[0]) == 3) == (here.rank == here.size - 1)]
    options = {"process_group": here.group, "memory_budget": ROOM}
    with pytest.raises(ValueError if here.rank == 0 else nng.PeerError, match="broken statistic"):
        nng.FIM(case.model, mine, nng.PMatSharded.of(Broken, streamed=True), **options)
    as_the_whole("kfac", "mlp", here.group, streamed=True)


@check(CHECKS)
def draws(here: Here) -> None:
    """Labels and vectors are those of one process."""
    generator = lambda: torch.Generator().manual_seed(3)
    options = {"samples": 2, "generator": None}
    case = build("mlp", sizes=cuts.SIZES)
    whole = nng.FIM_MonteCarlo(case.model, case.loader, nng.PMatKFAC, **options | {"generator": generator()})
    mine = cuts.mine(case.loader, here.rank, here.size)
    options |= {"process_group": here.group, "memory_budget": ROOM, "generator": generator()}
    parted = nng.FIM_MonteCarlo(case.model, mine, nng.PMatSharded.of(nng.PMatKFAC), **options)
    close(parted.gather().to_dense(), whole.to_dense())
    torch.manual_seed(here.rank)
    drawn = parted.sample(2, 1.0, generator() if here.rank == 0 else None).flat()
    here.same(drawn)
    if here.rank == 0:
        close(drawn, whole.sample(2, 1.0, generator()).flat())


@check(CHECKS)
def each_keeps_its_own(here: Here) -> None:
    """All blocks once, on the processes that own them; gathered to one."""
    whole, parted = pair(nng.PMatKFAC, "transformer", here.group)
    kept = torch.tensor([parted.nbytes()])
    dist.all_reduce(kept)
    assert int(kept) == whole.nbytes() > parted.nbytes()
    names = [name for part in parted.parts for name in part.layer_collection.names]
    assert sorted(names) == sorted(parted.owners[here.rank]) and f"rank {here.rank} of {here.size}" in repr(parted)
    found = parted.gather(rank=here.size - 1)
    assert (found is None) == (here.rank != here.size - 1)
    if found is not None:
        close(found.to_dense(), whole.to_dense())


def folder_of(here: Here, kind: str, name: str) -> None:
    """Saved by all; read by one, by all, by each alone: the whole matrix to the bit."""
    _, parted = pair(KINDS[kind], name, here.group)
    path, whole = here.folder / f"{kind} {name}", parted.gather()
    nng.save(parted, path)
    v = nng.PVector.randn(whole.layer_collection, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    read = nng.load(path)
    assert torch.equal(read.in_memory().to_dense(), whole.to_dense()) and read.examples == whole.examples
    close(read.solve(v, 10.0).flat(), whole.solve(v, 10.0).flat())
    again = nng.load(path, process_group=here.group)
    assert again.owners == parted.owners and torch.equal(again.gather().to_dense(), whole.to_dense())
    close(again.solve(v, 10.0).flat(), whole.solve(v, 10.0).flat())
    alone = dist.new_group([here.rank], use_local_synchronization=True)
    one = nng.load(path, process_group=alone)
    assert isinstance(one, nng.PMatSharded) and torch.equal(one.gather().to_dense(), whole.to_dense())
    nng.save(again.inverse(10.0), path, process_group=here.group)  # in the place of the older one
    close(nng.load(path).mv(v).flat(), whole.solve(v, 10.0).flat())
    dist.barrier()
    assert len(os.listdir(path)) == len(whole.layer_collection.by_layer()) + 1


for kind, name in (("kfac", "mlp"), ("ekfac", "transformer"), ("layers", "tied"), ("quasi-diagonal", "gru")):
    CHECKS[f"folder, {kind}, {name}"] = lambda here, k=kind, n=name: folder_of(here, k, n)


@check(CHECKS)
def folders_at_another_size(here: Here) -> None:
    """Saved by one of the processes, read by all."""
    if here.rank == 0:
        _, alone = pair(nng.PMatKFAC, "transformer")
        nng.save(alone, here.folder / "few")
    case = build("transformer", sizes=cuts.SIZES)
    whole = nng.FIM(case.model, case.loader, nng.PMatKFAC)
    dist.barrier()
    many = nng.load(here.folder / "few", process_group=here.group)
    close(many.gather().to_dense(), whole.to_dense())
    kept = torch.tensor([many.nbytes()])
    dist.all_reduce(kept)
    assert int(kept) == whole.nbytes() > many.nbytes()
    assert sorted(name for names in many.owners for name in names) == sorted(whole.layer_collection.names)


@check(CHECKS)
def folders_that_are_bad(here: Here) -> None:
    _, parted = pair(nng.PMatKFAC, "mlp", here.group)
    path, read = here.folder / "bad", lambda: nng.load(path, process_group=here.group)
    errors = (nng.FileError, nng.PeerError)
    nng.save(parted, path)
    alone = dist.new_group([here.rank], use_local_synchronization=True)
    with pytest.raises(nng.ArgumentError, match="the matrix is sharded over other processes"):
        nng.save(parted, path, process_group=alone)
    text = (path / "index.json").read_text()
    for odd, said in (
        (text.replace('"examples": ', '"examples": 1'), "has not the checksum"),
        (text[:-3], "is damaged, or no index"),
    ):
        dist.barrier()
        if here.rank == 0:
            (path / "index.json").write_text(odd)
        dist.barrier()
        with pytest.raises(errors, match=said):
            read()
    dist.barrier()
    if here.rank == 0:
        (path / "index.json").write_text(text)
        name = next(name for name in os.listdir(path) if name.startswith("part-00000"))
        os.rename(path / name, path / "away")
    dist.barrier()
    with pytest.raises(errors, match=r"lacks 1 of \d parts; save it again"):
        read()
    with pytest.raises(errors, match="does not see the folder"):
        nng.save(parted, here.folder / f"seen by {here.rank}")
    kernel = here.folder / "kernel of another"
    case = build("mlp", sizes=cuts.SIZES)
    own = cuts.mine(case.loader, here.rank, here.size)
    nng.save(nng.GramMatrix(case.model, own, process_group=here.group, sharded=True), kernel)
    with pytest.raises(errors, match="expected a folder that"):
        nng.save(parted, kernel)
    if here.rank == 0:
        nng.to_folder(here.folder / "measured", nng.FIM, case.model, case.loader)
    dist.barrier()
    with pytest.raises(errors, match="to_folder measured"):
        nng.save(parted, here.folder / "measured")
    nng.save(parted, path)
    close(read().trace(), parted.trace())


@check(CHECKS)
def what_parts_refuse(here: Here) -> None:
    _, parted = pair(nng.PMatKFAC, "mlp", here.group)
    v = nng.PVector.randn(parted.layer_collection, generator=torch.Generator().manual_seed(here.rank)).double()
    if here.size > 1:
        with pytest.raises(nng.RankMismatchError, match="other vectors"):
            parted.mv(v)
    same = nng.PVector.randn(parted.layer_collection, generator=torch.Generator().manual_seed(0)).double()
    zero = 0.0 * parted
    with pytest.raises((nng.SingularError, nng.PeerError), match=r"singular|not positive definite"):
        zero.solve(same)
    for damping in ({"0": 1.0}, nng.Cutoff(1e-3, top=2)):
        with pytest.raises(nng.UnsupportedError, match="layers that several processes keep"):
            parted.solve(same, damping)
    with pytest.raises(nng.UnsupportedError, match=r"gather\(rank=0\)"):
        parted.eigh()
    with pytest.raises(nng.ArgumentError, match="rank is 7; expected one of 0"):
        parted.gather(rank=7)
    close(parted.mv(same).flat(), parted.gather().mv(same).flat())  # the processes are in step
