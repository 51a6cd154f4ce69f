"""Kernels in parts, in folders: whole again, cut anew over any number of processes, and never half of two."""

import json
import os
import shutil
import time

import pytest
import safetensors.torch
import torch
from cases import build
from teams import ranks

import nngeom as nng
from nngeom import kernel_folder as folders
from nngeom import parts_folder
from nngeom.core import files
from nngeom.fmat.places import Places
from nngeom.fmat.sharded import FMatSharded
from nngeom.kernel_index import crc
from nngeom.ranks.team import ALONE


def kernel(n=9, m=None, c=2, dtype=torch.float64, seed=0):
    x = torch.randn(c, n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    y = x if m is None else torch.randn(c, m, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    return torch.einsum("kni,lmi->knlm", x, y).to(dtype)


def part(team, tensor, counts, across=None):
    """The rows of a rank of a kernel."""
    places = Places(team, tuple(counts), len(tensor))
    columns = places if across is None else Places(team, tuple(across), len(tensor))
    return FMatSharded(tensor[:, places.mine].clone(), places, columns, across is not None)


def save(tensor, path, counts, across=None):
    """By as many ranks as there are counts; what each of them raised."""
    return ranks(len(counts), lambda team: nng.save(part(team, tensor, counts, across), path))


def loaded(path, size):
    return ranks(size, lambda team: folders.load_parts(os.fspath(path), team))


def gathered(parts):
    errors = [p for p in parts if isinstance(p, Exception)]
    assert not errors, errors
    return torch.cat([p.strip for p in parts], 1)


@pytest.mark.parametrize("counts", [(9,), (4, 5), (0, 7, 2), (3, 0, 0, 6)])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_over_any_number_of_processes(tmp_path, counts, size):
    k = kernel()
    assert save(k, tmp_path / "k", counts) == [None] * len(counts)
    assert torch.equal(nng.load(tmp_path / "k").tensor, k)
    parts = loaded(tmp_path / "k", size)
    assert torch.equal(gathered(parts), k)
    even = tuple(len(range(9)[9 * r // size : 9 * (r + 1) // size]) for r in range(size))
    assert all(p.places.counts == (counts if len(counts) == size else even) for p in parts)
    assert not any(p.between for p in parts)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_between_two_sets(tmp_path, dtype):
    k = kernel(6, 4, dtype=dtype)
    save(k, tmp_path / "k", (2, 4), (1, 3))
    parts = loaded(tmp_path / "k", 2)
    assert torch.equal(gathered(parts), k) and all(p.between and p.across.counts == (1, 3) for p in parts)
    assert [p.across.counts for p in loaded(tmp_path / "k", 4)] == [(1, 1, 1, 1)] * 4
    whole = nng.load(tmp_path / "k", map_location="cpu")
    assert torch.equal(whole.tensor, k) and whole.dtype is dtype


def test_a_measured_one(tmp_path):
    case = build("mlp", sizes=(3, 2))
    k = nng.GramMatrix(case.model, case.loader, sharded=True)
    nng.save(k, tmp_path / "k")
    assert torch.equal(nng.load(tmp_path / "k").tensor, k.strip)
    k = nng.GramMatrix(case.model, case.loader[:1], other=case.loader, sharded=True)
    nng.save(k, tmp_path / "k")
    assert torch.equal(
        nng.load(tmp_path / "k").tensor, nng.GramMatrix(case.model, case.loader[:1], other=case.loader).tensor
    )
    assert len(os.listdir(tmp_path / "k")) == 2


def test_the_older_result_stays_until_the_index_is_replaced(tmp_path, monkeypatch):
    old, new, path = kernel(seed=1), kernel(seed=2), tmp_path / "k"
    save(old, path, (4, 5))
    before = sorted(os.listdir(path))

    def fails(target, *args, **kwargs):
        if "part-00001-of-00003" in str(target):
            raise OSError(28, "No space left on device")
        return written(target, *args, **kwargs)

    written = folders._write_part
    monkeypatch.setattr(folders, "_write_part", fails)
    raised = save(new, path, (3, 3, 3))
    assert isinstance(raised[1], nng.FileError) and "No space left" in str(raised[1])
    assert all(isinstance(e, nng.PeerError) and "No space left" in str(e) for e in (raised[0], raised[2]))
    assert sorted(os.listdir(path)) == before and torch.equal(nng.load(path).tensor, old)
    monkeypatch.undo()

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(parts_folder, "finish", dies)
    monkeypatch.setattr(files.Lock, "release", lambda self: os.close(self.fd))  # as when a process is killed
    monkeypatch.setattr(parts_folder, "_remove", lambda *paths: None)
    with pytest.raises(KeyboardInterrupt):
        nng.save(part(ALONE, new, (9,)), path)
    assert len(os.listdir(path)) == len(before) + 2 and torch.equal(nng.load(path).tensor, old)
    monkeypatch.undo()
    save(new, path, (5, 4))
    assert torch.equal(nng.load(path).tensor, new)
    assert len(os.listdir(path)) == 3  # what was left over is gone


@pytest.mark.parametrize("last", [0, 1])
def test_nothing_is_left_where_nothing_was(tmp_path, monkeypatch, last):
    """Whoever is the last to remove what it wrote."""
    remove = parts_folder._remove

    def waits(*paths):
        time.sleep(0.3 * any(f"part-{last:05d}" in path for path in paths))
        remove(*paths)

    monkeypatch.setattr(parts_folder, "_remove", waits)
    monkeypatch.setattr(parts_folder, "finish", lambda *args: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert "Input/output" in str(save(kernel(), tmp_path / "k", (4, 5))[0])
    assert os.listdir(tmp_path) == []


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "no folder" / "k"):
        assert all(isinstance(e, (nng.FileError, nng.PeerError)) for e in save(kernel(), path, (4, 5)))
    (tmp_path / "k").mkdir()
    (tmp_path / "k" / "index.json").write_text("{}")
    with pytest.raises(nng.FileError, match="no index of this library"):
        nng.save(part(ALONE, kernel(), (9,)), tmp_path / "k")
    assert (tmp_path / "k" / "index.json").read_text() == "{}"
    lock = files.Lock(os.fspath(tmp_path / "lock"))
    with pytest.raises(nng.FileError, match="another call is saving"):
        nng.save(part(ALONE, kernel(), (9,)), tmp_path)
    lock.release()
    with pytest.raises(nng.ArgumentError, match="real floating-point"):
        nng.save(part(ALONE, kernel().long(), (9,)), tmp_path / "other")


def test_processes_that_see_other_folders(tmp_path):
    raised = ranks(2, lambda team: nng.save(part(team, kernel(), (4, 5)), tmp_path / f"k{team.rank}"))
    assert "rank 1 does not see the folder" in str(raised[1]) and isinstance(raised[1], nng.FileError)
    save(kernel(), tmp_path / "a", (4, 5))
    save(kernel(seed=3), tmp_path / "b", (4, 5))
    raised = ranks(2, lambda team: folders.load_parts(os.fspath(tmp_path / "ab"[team.rank]), team))
    assert all("rank 1 finds another result" in str(e) for e in raised)


# -- what is bad in a folder -------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path):
    save(kernel(), tmp_path / "k", (4, 5))
    return tmp_path / "k"


def part_of(path, rank):
    return next(p for p in path.iterdir() if p.name.startswith(f"part-0000{rank}"))


def written(path, change):
    """The index with a change, its checksum honest."""
    found = json.loads((path / "index.json").read_text())
    change(found["nngeom"])
    found["checksum"] = crc(json.dumps(found["nngeom"], sort_keys=True))
    (path / "index.json").write_text(json.dumps(found))


def refused(path, text):
    """By one process and by several, with what is bad."""
    with pytest.raises(nng.FileError, match=text):
        nng.load(path)
    raised = loaded(path, 3)
    assert all(isinstance(e, (nng.FileError, nng.PeerError)) for e in raised)
    assert any(isinstance(e, nng.FileError) for e in raised)


def test_no_index(path):
    (path / "index.json").unlink()
    refused(path, "no index.json")


def test_a_missing_part(path):
    part_of(path, 1).unlink()
    refused(path, "there is no file .*part-00001")


def test_a_part_that_is_cut_off(path):
    data = part_of(path, 0).read_bytes()
    part_of(path, 0).write_bytes(data[:-1])
    refused(path, "part-00000.*tensors have")


@pytest.mark.parametrize("byte", range(0, 40, 7))
def test_a_changed_number(path, byte):
    data = bytearray(part_of(path, 1).read_bytes())
    data[-1 - 16 * byte] ^= 1
    part_of(path, 1).write_bytes(data)
    refused(path, "part-00001.*has not the checksum")


def test_only_what_is_asked_for_is_read(path):
    """A changed row is found by the process that holds it."""
    data = bytearray(part_of(path, 1).read_bytes())
    data[-1] ^= 1
    part_of(path, 1).write_bytes(data)
    raised = loaded(path, 2)
    assert isinstance(raised[0], nng.PeerError) and isinstance(raised[1], nng.FileError)


def test_a_part_of_another_result(path, tmp_path):
    save(kernel(seed=5), tmp_path / "other", (4, 5))
    shutil.copy(part_of(tmp_path / "other", 0), part_of(path, 0))
    refused(path, "no part of the result")


def test_an_index_that_is_changed(path):
    text = (path / "index.json").read_text()
    (path / "index.json").write_text(text.replace('"outputs": 2', '"outputs": 1'))
    refused(path, "has not the checksum")
    (path / "index.json").write_text(text[:-5])
    refused(path, "is damaged")
    (path / "index.json").write_bytes(b"\xff\xfe")
    refused(path, "is damaged")
    (path / "index.json").write_text("[1]")
    refused(path, "is damaged, or no index")


CHANGES = {
    "format 7": lambda index: index.update(format=7),
    "no index of this library": lambda index: index.update(format="1"),
    "other counts": lambda index: index.update(counts=[5, 4], across=[5, 4]),
    "more columns": lambda index: index.update(counts=[4, 5], across=[2**40, 2**40], between=True),
    "huge": lambda index: index.update(counts=[2**61, 2**61], across=[2**61, 2**61]),
    "negative": lambda index: index.update(counts=[-4, 13], across=[-4, 13]),
    "dtype": lambda index: index.update(dtype="F32"),
    "no dtype": lambda index: index.update(dtype=["F64"]),
    "outputs": lambda index: index.update(outputs=1),
    "between": lambda index: index.update(between=1),
    "not square": lambda index: index.update(across=[5, 4]),
    "one part twice": lambda index: index.update(parts=[index["parts"][0]] * 2),
    "elsewhere": lambda index: index["parts"][0].__setitem__(0, "../k/" + index["parts"][0][0]),
    "no parts": lambda index: index.update(parts=[], counts=[], across=[]),
    "another class": lambda index: index["object"].update({"class": "PVector"}),
    "an unknown class": lambda index: index["object"].update({"class": "Nothing", "qualified": "os.Nothing"}),
    "no tree": lambda index: index.update(object=None),
    "a list": lambda index: index.update(object=[]),
    "no tensor": lambda index: index["object"]["fields"].update(tensor={"tensor": "another"}),
    "a vector": lambda index: index.update(object={"tensor": "tensor"}),
    "too much": lambda index: index.update(more=1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_index_that_says_what_is_not_so(path, name):
    written(path, CHANGES[name])
    refused(path, str(path))


def test_a_part_that_is_no_kernel(path):
    file, index = part_of(path, 0), json.loads((path / "index.json").read_text())
    header = json.dumps({"token": "", "rows": ""})
    safetensors.torch.save_file({"tensor": torch.zeros(3, 3)}, file, {"nngeom": header})
    written(path, lambda index: index["parts"][0].__setitem__(1, crc(header)))
    refused(path, "expected rows of shape")
    safetensors.torch.save_file({"tensor": kernel()[:, :4].contiguous()}, file, {"nngeom": header})
    refused(path, "has not the checksum")
    safetensors.torch.save_file({"tensor": kernel()[:, :4].contiguous()}, file, {"nngeom": "{"})
    written(path, lambda index: index["parts"][0].__setitem__(1, crc("{")))
    refused(path, "part-00000")
    assert index["nngeom"]["counts"] == [4, 5]
