"""Files that say what is not so: a clear error before memory is taken for it, whatever the header claims."""

import copy
import json
import os
import random
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from cases import STORED, build, representation
from torch import nn

import nngeom as nng
from nngeom.core.container import checksum

MIB = 2**20


def measured(kind):
    case = build("mlp", sizes=(3, 2))
    if kind == "sum":
        return nng.FIM(case.model, case.loader, nng.PMatDiag) + nng.FIM(case.model, case.loader, nng.PMatKFAC)
    if kind == "product":
        return nng.FIM(case.model, case.loader, nng.PMatDiag) @ nng.FIM(case.model, case.loader, nng.PMatKFAC)
    if kind == "vector":
        return nng.PVector.from_model(case.model)
    if kind == "inverse":
        return measured("quasi-diag").inverse(10.0)
    if kind == "kernel":
        return nng.GramMatrix(case.model, case.loader)
    if kind == "rows":
        return nng.Jacobian(case.model, case.loader)
    return nng.FIM(case.model, case.loader, representation(kind, case.model))


KINDS = [*STORED, "inverse", "sum", "product", "vector", "kernel", "rows"]


def contents(path):
    with safetensors.safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}
    return json.loads(metadata["nngeom"]), tensors


def write(path, tree, tensors):
    """A file with this header, its checksum honest."""
    header = json.dumps(tree)
    safetensors.torch.save_file(tensors, path, {"nngeom": header, "checksum": checksum(header, tensors)})


# -- the container -----------------------------------------------------------------------------------------------------

ENTRY = lambda offsets=(0, 8), shape=(2,), dtype="F32": {
    "dtype": dtype,
    "shape": list(shape),
    "data_offsets": list(offsets),
}
CONTAINERS = {
    "metadata are not strings": {"a": ENTRY(), "__metadata__": {"nngeom": 1}},
    "metadata are not": {"a": ENTRY(), "__metadata__": ["nngeom"]},
    "offsets \\[-8, 0\\]": {"a": ENTRY((-8, 0))},
    "starts at byte 0 of the data; expected 8": {"a": ENTRY(), "b": ENTRY()},
    "starts at byte 4": {"a": ENTRY((4, 8), (1,))},
    "offsets \\[8, 0\\]|has -8 bytes": {"a": ENTRY((8, 0))},
    "the shape \\[4611686018427387904": {"a": ENTRY(shape=(2**62, 2**62))},
    "has 8 bytes": {"a": ENTRY(shape=(2**40,))},
    "the shape \\[-1\\]": {"a": ENTRY(shape=(-1,))},
    "the shape \\[1.5\\]": {"a": ENTRY(shape=(1.5,))},
    "the shape \\[True": {"a": ENTRY(shape=(True, 2))},
    "the shape \\[1, 1": {"a": ENTRY(shape=(1,) * 70 + (2,))},
    "tensors have 4 bytes, the file holds 8": {"a": ENTRY((0, 4), (1,))},
    "dtype I64": {"a": ENTRY(shape=(1,), dtype="I64")},
    "dtype U8": {"a": ENTRY(shape=(8,), dtype="U8")},
    "dtype BOOL": {"a": ENTRY(shape=(8,), dtype="BOOL")},
    "dtype C64": {"a": ENTRY(shape=(1,), dtype="C64")},
    "dtype F4": {"a": ENTRY(shape=(16,), dtype="F4")},
    "dtype \\[": {"a": ENTRY(dtype=[])},
    "entry of tensor 'a'": {"a": {"dtype": "F32"}},
    "entry of tensor": {"a": 3},
    "its header is a list": [],
    "without nngeom's header": {"a": ENTRY()},
}


@pytest.mark.parametrize("text", CONTAINERS)
def test_containers_that_lie(tmp_path, text):
    header = json.dumps(CONTAINERS[text]).encode()
    (tmp_path / "f").write_bytes(struct.pack("<Q", len(header)) + header + b"x" * 8)
    with pytest.raises(nng.FileError, match=text):
        nng.load(tmp_path / "f")


def test_headers_of_odd_forms(tmp_path):
    entry = json.dumps(ENTRY())
    forms = {
        f'{{"a": {entry}, "a": {entry}}}': "key twice",
        "[" * 100_000: "nested too deeply|damaged",
        '{"a": ': "damaged",
        '{"a": %s}' % ("9" * 10_000): "damaged",
    }
    for text, message in forms.items():
        (tmp_path / "f").write_bytes(struct.pack("<Q", len(text)) + text.encode() + b"x" * 8)
        with pytest.raises(nng.FileError, match=message):
            nng.load(tmp_path / "f")
    for length in (9, 10**8 + 1, 2**62, 2**64 - 1):
        (tmp_path / "f").write_bytes(struct.pack("<Q", length) + b"{}")
        with pytest.raises(nng.FileError, match="too few for a header"):
            nng.load(tmp_path / "f")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(nng.FileError, match="no regular file"):
        nng.load(tmp_path / "pipe")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_only_real_numbers(tmp_path, dtype):
    """In files made by others, and in what is saved."""
    v = measured("vector")
    nng.save(v, tmp_path / "v")
    tree, tensors = contents(tmp_path / "v")
    write(tmp_path / "v", tree, {key: t.to(dtype) for key, t in tensors.items()})
    with pytest.raises(nng.FileError, match="expected real floating-point numbers"):
        nng.load(tmp_path / "v")
    os.remove(tmp_path / "v")
    with pytest.raises(nng.ArgumentError, match=r"cannot save 'tensor'.*expected real"):
        nng.save(nng.PVector(v.layer_collection, v.tensor.to(dtype)), tmp_path / "v")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_all_real_numbers(tmp_path, dtype):
    v = measured("vector")
    v = nng.PVector(v.layer_collection, v.tensor.to(dtype))
    nng.save(v, tmp_path / "v")
    assert (
        torch.equal(nng.load(tmp_path / "v").tensor.double(), v.tensor.double())
        and nng.load(tmp_path / "v").dtype == dtype
    )


def test_what_was_loaded_does_not_follow_the_file(tmp_path):
    m, path = measured("kfac"), tmp_path / "m"
    nng.save(m, path)
    copy = nng.load(path)
    with open(path, "rb+") as file:  # in place, as cp does it
        size = os.path.getsize(path)
        file.seek(size // 2)
        file.write(b"\xff" * (size - size // 2))
    assert torch.equal(copy.to_dense(), m.to_dense())
    os.truncate(path, 10)
    assert torch.equal(copy.to_dense(), m.to_dense())


# -- the tree ----------------------------------------------------------------------------------------------------------

FIELDS = lambda tree: tree["object"]["fields"]
COLLECTION = lambda tree: FIELDS(tree)["layer_collection"]["fields"]
ITEMS = lambda tree: FIELDS(tree)["blocks"]["items"]
PIECE = lambda tree: ITEMS(tree)[0][0]["fields"]["pieces"][0]["fields"]
ARRANGEMENT = lambda tree: PIECE(tree)["arrangement"]["fields"]
BLOCK = lambda tree: ITEMS(tree)[0][1]["fields"]
LIES = {
    "a parameter has a negative size": lambda t: COLLECTION(t)["shapes"].__setitem__(0, [-3, -5]),
    "do not cover the parameter vector": lambda t: COLLECTION(t)["shapes"].__setitem__(-1, [10**15]),
    "names of a collection differ": lambda t: COLLECTION(t)["names"].__setitem__(0, COLLECTION(t)["names"][1]),
    "as many names as shapes": lambda t: COLLECTION(t)["layers"].pop(),
    "'names' is a tuple": lambda t: COLLECTION(t)["names"].__setitem__(0, 3),
    "'shapes' is a tuple": lambda t: COLLECTION(t)["shapes"].__setitem__(0, [True]),
    "'examples' is a bool": lambda t: FIELDS(t).update(examples=True),
    "measured on -1": lambda t: FIELDS(t).update(examples=-1),
    "have names and places": lambda t: PIECE(t).update(offset=-4),
    "lies outside of its parameters": lambda t: PIECE(t).update(offset=10**12),
    "which are no parameters": lambda t: PIECE(t).update(names=["nothing"]),
    "a dictionary has a key twice": lambda t: ITEMS(t).append(ITEMS(t)[0]),
    "cover the parameter vector, each": lambda t: ITEMS(t).pop(),
    "order of an arrangement": lambda t: ARRANGEMENT(t).update(order=[0, 0, 1]),
    "sizes of an arrangement": lambda t: ARRANGEMENT(t).update(view=[1, 10**9, 10**9]),
    "a window divides": lambda t: ARRANGEMENT(t).update(window=0),
    "wrong types: 'pieces'": lambda t: ITEMS(t)[0][0]["fields"].update(pieces=[3]),
    "wrong types: 'blocks'": lambda t: ITEMS(t)[0].__setitem__(0, 3),
    "which this version does not know": lambda t: ITEMS(t)[0][1].update({"class": "Other", "qualified": "x.Other"}),
    "a class is called": lambda t: t["object"].update(qualified=3),
    "does not describe": lambda t: FIELDS(t).pop("examples"),
}


@pytest.mark.parametrize("text", LIES)
def test_trees_that_lie(tmp_path, text):
    nng.save(measured("kfac"), tmp_path / "m")
    tree, tensors = contents(tmp_path / "m")
    LIES[text](tree)
    write(tmp_path / "m", tree, tensors)
    with pytest.raises(nng.FileError, match=text):
        nng.load(tmp_path / "m")


def test_sums_that_lie(tmp_path):
    nng.save(measured("sum"), tmp_path / "m")
    tree, tensors = contents(tmp_path / "m")
    for change in (
        lambda t: FIELDS(t).update(parts=[]),
        lambda t: FIELDS(t).update(weights=[1.0]),
        lambda t: FIELDS(t)["parts"].__setitem__(0, 3),
        lambda t: FIELDS(t)["parts"].__setitem__(0, FIELDS(t)["parts"][0]["fields"]["layer_collection"]),
        lambda t: FIELDS(t)["parts"][0]["fields"]["layer_collection"]["fields"]["names"].__setitem__(0, "other"),
    ):
        lie = copy.deepcopy(tree)
        change(lie)
        write(tmp_path / "m", lie, tensors)
        with pytest.raises(nng.FileError):
            nng.load(tmp_path / "m")


def test_blocks_of_different_dtypes(tmp_path):
    nng.save(measured("kfac"), tmp_path / "m")
    tree, tensors = contents(tmp_path / "m")
    write(tmp_path / "m", tree, {key: t.float() if ".0." in key else t for key, t in tensors.items()})
    with pytest.raises(nng.FileError, match="blocks of the matrix have the dtypes"):
        nng.load(tmp_path / "m")


ODD = [
    -1,
    0,
    1,
    2,
    10**6,
    10**12,
    10**18,
    10**40,
    1.5,
    float("nan"),
    "x",
    "",
    None,
    True,
    [],
    {},
    [[]],
    {"tensor": "x"},
]


def spots(tree, path=()):
    """Where the values of a tree are."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from spots(value, (*path, key))


def changed(tree, spot, value):
    tree = copy.deepcopy(tree)
    at = tree
    for key in spot[:-1]:
        at = at[key]
    at[spot[-1]] = value
    return tree


def try_out(m):
    """The usual operations of something that was loaded."""
    if isinstance(m, nng.PVector):
        assert m.flat().shape[-1] == m.layer_collection.numel
    elif hasattr(m, "layer_collection") and hasattr(m, "to_dense"):
        m.mv(nng.PVector.randn(m.layer_collection, dtype=m.dtype))
        assert m.to_dense().shape == m.shape
    elif hasattr(m, "to_dense"):
        m.mv(nng.FVector(torch.ones(m.outputs, m.columns, dtype=m.dtype)))


@pytest.mark.parametrize("kind", KINDS)
def test_any_value_of_a_header_changed(tmp_path, kind):
    """It is refused, or what is loaded works."""
    rand = random.Random(kind)
    nng.save(measured(kind), tmp_path / "m")
    tree, tensors = contents(tmp_path / "m")
    places = [spot for spot in spots(tree) if spot != ("format",)]
    for spot in rand.sample(places, min(len(places), 60)):
        for value in rand.sample(ODD, 4):
            write(tmp_path / "m", changed(tree, spot, value), tensors)
            try:
                m = nng.load(tmp_path / "m")
            except nng.FileError:
                continue
            try_out(m)


def in_folder(folder, program):
    """A process of its own, with this copy of the library, whose working folder is ``folder``."""
    start = f"import os, nngeom\nos.chdir({str(folder)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(program)], capture_output=True, text=True, timeout=300
    )


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="high-water marks are read from /proc")
def test_huge_claims_take_no_memory(tmp_path):
    """Files of some kilobytes that claim terabytes, in all ways: loading them all stays below 64 MiB."""
    program = """
    import os, sys, torch, nngeom as nng
    status = lambda key: next(int(x.split()[1]) / 1024 for x in open("/proc/self/status") if x.startswith(key + ":"))
    for name in ("good", "good"):
        nng.load(name).mv(nng.PVector.randn(nng.load(name).layer_collection, dtype=torch.float64))
    open("/proc/self/clear_refs", "w").write("5")
    before, refused = status("VmRSS"), 0
    for name in sorted(os.listdir()):
        try:
            nng.load(name)
        except nng.FileError:
            refused += 1
    print(status("VmHWM") - before, refused, len(os.listdir()))
    """
    nng.save(measured("kfac"), tmp_path / "good")
    for kind in KINDS:
        nng.save(measured(kind), tmp_path / "m")
        tree, tensors = contents(tmp_path / "m")
        for j, spot in enumerate(spots(tree)):
            at = tree
            for key in spot:
                at = at[key]
            if type(at) is int and at > 0 and spot[0] != "format":
                name = f"{kind} {j}"
                write(tmp_path / name, changed(tree, spot, 10**11), tensors)
    os.remove(tmp_path / "m")
    for name, tree, tensors in crafted():
        write(tmp_path / name, tree, tensors)
    done = in_folder(tmp_path, program)
    assert done.returncode == 0, done.stderr
    taken, refused, total = map(float, done.stdout.split())
    assert taken < 64 and refused > 0.8 * total > 100, done.stdout


def crafted():
    """Consistent claims: one block of 10**12 parameters, whose few tensors do have that many places."""
    size, p = 10**6, 10**12
    piece = {"names": ["w"], "offset": 0}
    for name, fields, tensors in (
        ("EyeBlock", {"c": {"tensor": "c"}, "s": 1, "o": size, "i": size}, {"c": torch.ones(())}),
        (
            "KroneckerBlock",
            {"a": {"tensor": "a"}, "g": {"tensor": "g"}, "uses": []},
            {"a": torch.ones(1, size), "g": torch.ones(1, size)},
        ),
    ):
        arrangement = {"view": [1, size, size], "order": [0, 1, 2], "sizes": [1, size, size], "window": 1}
        named = lambda cls, fields: {"class": cls, "fields": fields}
        layout = named(
            "Layout", {"pieces": [named("Piece", {**piece, "arrangement": named("Arrangement", arrangement)})]}
        )
        for cover in (p, p + 5):
            collection = named(
                "LayerCollection", {"names": ["w", "b"], "shapes": [[p], [cover - p]], "layers": ["w", "b"]}
            )
            fields_ = {
                "layer_collection": collection,
                "blocks": {"items": [[layout, named(name, fields)]]},
                "examples": 1,
            }
            yield f"{name} {cover}", {"format": 1, "object": named("PMatKFAC", fields_)}, tensors


# -- crashes while saving ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_killed_while_saving(tmp_path):
    """Before each of the lines of what writes: the old file or the new one, whole; no rubbish after the next save."""
    program = """
    import os, signal, sys, torch, nngeom as nng
    from torch import nn
    torch.set_num_threads(1)
    lc = nng.LayerCollection.from_model(nn.Linear(30, 20))
    old, new = nng.PVector.randn(lc), nng.PVector.randn(lc)
    path = "v.safetensors"

    def killed(number):
        "A child that saves and is killed at one of the lines; how many it saw."
        def trace(frame, event, arg):
            names = ("core/files.py", "nngeom/io.py", "safetensors/torch.py", "shutil.py")
            if not frame.f_code.co_filename.endswith(names):
                return None
            if event == "line":
                trace.count += 1
                if trace.count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        trace.count = 0
        child = os.fork()
        if not child:
            sys.settrace(trace)
            nng.save(new, path)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    number, seen = 1, set()
    while True:
        nng.save(old, path)
        assert os.listdir() == [path], os.listdir()
        if killed(number) == 0:
            break
        found = nng.load(path).flat()
        seen.add(torch.equal(found, new.flat()))
        assert torch.equal(found, old.flat()) or torch.equal(found, new.flat())
        number += 2
    assert seen == {True, False} and number > 20
    """
    done = in_folder(tmp_path, program)
    assert done.returncode == 0, done.stderr


def test_many_save_to_one_path(tmp_path):
    """Ranks or threads that save to one path at the same time: the last one's file, whole; no error, no rubbish."""
    from concurrent.futures import ThreadPoolExecutor

    lc = nng.LayerCollection.from_model(nn.Linear(30, 20))
    vectors = [nng.PVector.randn(lc) for _ in range(24)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda v: nng.save(v, tmp_path / "v"), vectors))
    assert any(torch.equal(nng.load(tmp_path / "v").flat(), v.flat()) for v in vectors)
    assert os.listdir(tmp_path) == ["v"]
