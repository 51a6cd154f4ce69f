"""Files and merging: what is saved comes back, what is damaged is refused, two halves make the whole."""

import json
import os
import struct

import pytest
import safetensors.torch
import torch
from cases import STORED, STORED_KERNELS, build, representation
from torch import nn

import nngeom as nng
from nngeom.pmat.sums import PMatSum

CASES = ("mlp", "conv2d", "language-model", "gru", "bare")


def measured(name, kind):
    case = build(name)
    return nng.FIM(case.model, case.loader, representation(kind, case.model))


def same(m, copy):
    assert type(copy) is type(m) and copy.examples == m.examples and copy.dtype == m.dtype
    assert copy.layer_collection == m.layer_collection and copy.layer_collection.layers == m.layer_collection.layers
    assert copy.blocks.keys() == m.blocks.keys()
    for layout, block in m.blocks.items():
        for x, y in zip(block.fields().values(), copy.blocks[layout].fields().values()):
            assert torch.equal(x, y) if isinstance(x, torch.Tensor) else type(x) is type(y)
    torch.testing.assert_close(copy.to_dense(), m.to_dense())


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("name", CASES)
def test_round_trip(name, kind, tmp_path):
    m, path = measured(name, kind), tmp_path / "m.safetensors"
    nng.save(m, path)
    same(m, nng.load(path))
    assert os.listdir(tmp_path) == ["m.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    v = nng.PVector.randn(m.layer_collection, dtype=torch.float64)
    torch.testing.assert_close(nng.load(str(path)).solve(v, 10.0).flat(), m.solve(v, 10.0).flat())


def test_inverses_sums_and_vectors(tmp_path):
    path = tmp_path / "x"
    for kind in STORED:
        inverse = measured("mlp", kind).inverse(10.0)
        nng.save(inverse, path)
        same(inverse, nng.load(path))
    total = measured("mlp", "kfac") - 0.5 * measured("mlp", "diag")
    assert isinstance(total, PMatSum)
    nng.save(total, path)
    assert torch.equal(nng.load(path).to_dense(), total.to_dense())
    v = nng.PVector.randn(total.layer_collection, 2, 3)
    nng.save(v, path)
    copy = nng.load(path)
    assert torch.equal(copy.flat(), v.flat()) and copy.layer_collection == v.layer_collection
    nng.save(nng.FVector(v.flat()), path)
    assert torch.equal(nng.load(path, map_location=torch.device("cpu")).tensor, v.flat())


def test_function_space_and_maps(tmp_path):
    c, path = build("mlp"), tmp_path / "x"
    for kind in STORED_KERNELS.values():
        k = nng.GramMatrix(c.model, c.loader, kind)
        nng.save(k, path)
        copy = nng.load(path)
        assert type(copy) is kind and torch.equal(copy.tensor, k.tensor)
    rectangular = nng.GramMatrix(c.model, c.loader, other=c.loader[:1])
    nng.save(rectangular, path)
    assert torch.equal(nng.load(path).tensor, rectangular.tensor)
    for kind in (nng.PushForwardDense, nng.PullBackDense):
        j = nng.Jacobian(c.model, c.loader, nng.PushForwardDense)
        j = j if kind is nng.PushForwardDense else j.T
        nng.save(j, path)
        copy = nng.load(path)
        assert type(copy) is kind and torch.equal(copy.tensor, j.tensor) and copy.layer_collection == j.layer_collection
    for implicit in (
        nng.GramMatrix(c.model, c.loader, nng.FMatImplicit),
        nng.Jacobian(c.model, c.loader, nng.PushForwardImplicit),
    ):
        with pytest.raises(nng.UnsupportedError, match="holds a model"):
            nng.save(implicit, path)


def test_half_precision_and_views(tmp_path):
    v = nng.PVector.randn(nng.LayerCollection.from_model(nn.Linear(2, 2)), 4)
    nng.save(nng.PVector(v.layer_collection, v.flat().to(torch.bfloat16)[::2]), tmp_path / "v")
    assert torch.equal(nng.load(tmp_path / "v").flat(), v.flat().to(torch.bfloat16)[::2])
    assert os.path.getsize(tmp_path / "v") < 2000


def test_the_header_can_be_read_by_others(tmp_path):
    m = measured("mlp", "kfac")
    nng.save(m, tmp_path / "m")
    with safetensors.safe_open(tmp_path / "m", framework="pt") as file:
        header = json.loads(file.metadata()["nngeom"])
        assert "blocks.0.a" in file.keys()
    assert header["format"] == 1 and header["object"]["class"] == "PMatKFAC"
    assert header["object"]["fields"]["examples"] == 7
    assert header["object"]["fields"]["layer_collection"]["fields"]["names"] == list(m.layer_collection.names)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_implicit_and_foreign_objects_are_not_saved(tmp_path):
    case = build("mlp")
    implicit = nng.FIM(case.model, case.loader, nng.PMatImplicit)
    for m in (implicit, implicit + nng.FIM(case.model, case.loader, nng.PMatDiag)):
        with pytest.raises(nng.UnsupportedError, match="holds a model"):
            nng.save(m, tmp_path / "m")
    with pytest.raises(nng.ArgumentTypeError, match="cannot save Linear"):
        nng.save(nn.Linear(2, 2), tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_unwritable_paths_leave_nothing_and_keep_the_old_file(tmp_path, monkeypatch):
    m = measured("mlp", "diag")
    for path in (tmp_path / "nowhere" / "m", tmp_path):
        with pytest.raises(nng.FileError, match="cannot write"):
            nng.save(m, path)
    assert os.listdir(tmp_path) == []
    nng.save(m, tmp_path / "m")

    def full(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(nng.FileError, match="No space left"):
        nng.save(2 * m, tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"]
    same(m, nng.load(tmp_path / "m"))


@pytest.fixture
def kfac(tmp_path):
    nng.save(measured("mlp", "kfac"), tmp_path / "m")
    return tmp_path / "m"


def header_of(path):
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}


def rewritten(path, change, honest=True):
    """The file with a changed header; ``honest``: with a checksum that fits."""
    from nngeom.core.container import checksum

    metadata, tensors = header_of(path)
    tree = json.loads(metadata["nngeom"])
    tree = change(tree) or tree
    metadata["nngeom"] = json.dumps(tree)
    if honest:
        metadata["checksum"] = checksum(metadata["nngeom"], tensors)
    safetensors.torch.save_file(tensors, path, metadata)


def test_missing_truncated_and_foreign_files(kfac, tmp_path):
    with pytest.raises(nng.FileError, match="there is no file"):
        nng.load(tmp_path / "none")
    with pytest.raises(nng.FileError, match=r"cannot read|damaged|no index"):
        nng.load(tmp_path)
    data = kfac.read_bytes()
    for size in (0, 4, 8, 100, len(data) - 1):
        kfac.write_bytes(data[:size])
        with pytest.raises(nng.FileError, match="damaged, truncated, or no safetensors"):
            nng.load(kfac)
    safetensors.torch.save_file({"weight": torch.zeros(3)}, kfac, {"format": "pt"})
    with pytest.raises(nng.FileError, match="without nngeom's header"):
        nng.load(kfac)
    torch.save({"a": torch.zeros(3)}, kfac)
    with pytest.raises(nng.FileError, match="no safetensors"):
        nng.load(kfac)


def test_changed_numbers_are_noticed(kfac):
    data = bytearray(kfac.read_bytes())
    data[-3] ^= 1
    kfac.write_bytes(data)
    with pytest.raises(nng.FileError, match="checksum"):
        nng.load(kfac)


FIELDS = lambda tree: tree["object"]["fields"]
BLOCK = lambda tree: FIELDS(tree)["blocks"]["items"][1][1]["fields"]
LIES = {
    "format 2.*upgrade": lambda t: t.update(format=2),
    "header of .* is damaged": lambda t: [1],
    "'Evil'.*does not know": lambda t: t["object"].update({"class": "Evil"}),
    "'Popen'": lambda t: t["object"].update({"class": "Popen", "fields": {"args": "ls"}}),
    "holds a Layout": lambda t: t.update(object=FIELDS(t)["blocks"]["items"][0][0]),
    "holds a str": lambda t: t.update(object="text"),
    "unexpected keyword": lambda t: FIELDS(t).update(extra=1),
    "fields of a PMatKFAC have the wrong types": lambda t: FIELDS(t).update(examples="many"),
    "have the wrong types": lambda t: FIELDS(t).update(blocks=None),
    "sizes of its parameters": lambda t: BLOCK(t).update(a=BLOCK(t)["g"]),
    "KeyError": lambda t: BLOCK(t).update(a={"tensor": "none"}),
    "does not describe": lambda t: BLOCK(t).update(a="x"),
    "outside": lambda t: FIELDS(t)["layer_collection"]["fields"].update(shapes=[[5, 1], [5], [3, 5], [3]]),
}


@pytest.mark.parametrize("text", LIES)
def test_headers_that_lie(kfac, text):
    rewritten(kfac, LIES[text])
    with pytest.raises(nng.FileError, match=text):
        nng.load(kfac)


def test_a_changed_header_is_noticed(kfac):
    rewritten(kfac, lambda t: FIELDS(t).update(examples=8), honest=False)
    with pytest.raises(nng.FileError, match="checksum"):
        nng.load(kfac)


def test_a_bad_device(kfac):
    with pytest.raises(nng.ArgumentError, match="map_location"):
        nng.load(kfac, map_location="nowhere")


def test_a_thousand_damaged_files(kfac, tmp_path):
    data = kfac.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    g = torch.Generator().manual_seed(0)
    rand = lambda top: int(torch.randint(top, (), generator=g))
    path = tmp_path / "damaged"
    for j in range(1000):
        broken = bytearray(data)
        if j % 4 == 0:  # cut
            del broken[rand(len(data)) :]
        elif j % 4 == 1:  # single bits, mostly of the header
            for _ in range(1 + rand(3)):
                broken[rand(8 + length if rand(4) else len(data))] ^= 1 << rand(8)
        elif j % 4 == 2:  # a run of noise
            at, size = rand(len(data)), 1 + rand(40)
            broken[at : at + size] = bytes(rand(256) for _ in range(size))
        else:  # a piece removed or doubled
            at, size = rand(8 + length), 1 + rand(60)
            broken[at : at + size] = b"" if rand(2) else bytes(broken[at : at + size]) * 2
        if broken == data:
            continue
        path.write_bytes(broken)
        with pytest.raises(nng.FileError):
            nng.load(path)


# -- merging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [k for k, r in STORED.items() if r.passes == 1])  # others: in one basis only
@pytest.mark.parametrize("name", CASES)
def test_two_halves_make_the_whole(name, kind):
    case = build(name, sizes=(3, 4, 2))
    r = representation(kind, case.model)
    a, b, whole = (nng.FIM(case.model, part, r) for part in (case.loader[:1], case.loader[1:], case.loader))
    merged = nng.merge(a, b)
    assert type(merged) is type(whole) and merged.examples == 9
    torch.testing.assert_close(merged.to_dense(), whole.to_dense(), rtol=1e-10, atol=1e-12)


def test_ekfac_merges_in_one_basis_only():
    case = build("mlp", sizes=(3, 4))
    a, b = (nng.FIM(case.model, [batch], nng.PMatEKFAC) for batch in case.loader)
    with pytest.raises(nng.StructureError, match="different bases"):
        nng.merge(a, b)
    same(nng.merge(a, a).to(torch.float32), nng.merge(a, 1.0 * a).to(torch.float32))
    torch.testing.assert_close(nng.merge(a, 3 * a).to_dense(), 2 * a.to_dense())


def test_what_does_not_merge():
    case, other = build("mlp"), build("reused")
    diag, dense = (nng.FIM(case.model, case.loader, kind) for kind in (nng.PMatDiag, nng.PMatDense))
    with pytest.raises(nng.StructureError, match="PMatDiag and PMatDense"):
        nng.merge(diag, dense)
    with pytest.raises(nng.CollectionError):
        nng.merge(diag, nng.FIM(other.model, other.loader, nng.PMatDiag))
    with pytest.raises(nng.ArgumentTypeError, match="cannot merge PMatSum"):
        nng.merge(diag + dense, diag)
    eye = nng.PMatEye.build(diag.layer_collection)
    with pytest.raises(nng.ArgumentError, match="0 and 0 examples"):
        nng.merge(eye, eye)
