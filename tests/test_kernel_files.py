"""Kernels in files: never wrong numbers, whatever was there before, whoever else writes, wherever a run was killed."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from cases import build
from torch import nn

import nngeom as nng
import nngeom.measures.kernel_files
from nngeom.core import files
from nngeom.cotangents.loss import EveryOutput
from nngeom.fmat.fingerprint import Fingerprint
from nngeom.fmat.side import Side
from nngeom.fmat.store import FileStore
from nngeom.sweep.run import Run

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX")
OPTIONS = {"memory_budget": 2000}


class Scaled(nn.Module):
    """With a plain attribute, a buffer, and one that no state_dict has."""

    def __init__(self, temperature=1.0):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.temperature = temperature
        self.register_buffer("shift", torch.zeros(4))
        self.register_buffer("hidden", torch.ones(4), persistent=False)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x) + self.shift) * self.hidden) / self.temperature


def scaled():
    torch.manual_seed(0)
    return Scaled().double(), [torch.randn(n, 3, dtype=torch.float64) for n in (4, 2, 3)]


class Stopped(RuntimeError):
    pass


def stop_after(monkeypatch, tiles):
    """Runs of kernels in files stop when so many tiles are written."""
    write, calls = FileStore.write, []

    def stops(self, *args):
        calls.append(1)
        if len(calls) > tiles:
            raise Stopped
        write(self, *args)

    monkeypatch.setattr(FileStore, "write", stops)
    return calls


def interrupted(model, data, path, tiles=3, **options):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, tiles)
        with pytest.raises(Stopped):
            nng.GramMatrix(model, data, out=path, **{**OPTIONS, **options})


def uncomputed(monkeypatch):
    def never(*args):
        raise AssertionError("computed")

    monkeypatch.setattr(nngeom.measures.kernel_files, "build", never)


def equal(k, truth):
    torch.testing.assert_close(torch.as_tensor(k.tensor), truth.tensor, rtol=1e-10, atol=1e-10)


# -- known again -------------------------------------------------------------------------------------------------------

WAYS = {
    "plain": {},
    "centered": {"centered": True},
    "other": {"other": [torch.ones(2, 3, dtype=torch.float64)]},
    "centered other": {"centered": True, "other": [torch.ones(2, 3, dtype=torch.float64)]},
    "function": {"function": lambda x: torch.stack([x.sum(1), x.prod(1)], 1)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_inputs_open_a_finished_file(tmp_path, monkeypatch, way, dtype):
    model, data = scaled()
    cast = lambda batches: [x.to(dtype) for x in batches]
    model, data, options = model.to(dtype), cast(data), {**WAYS[way], **OPTIONS}
    if "other" in options:
        options["other"] = cast(options["other"])
    if "function" in options:
        options["function"] = lambda x: 2 * model(x)
    path = tmp_path / "k.npy"
    first = nng.GramMatrix(model, data, out=path, **options)
    torch.testing.assert_close(first.tensor, nng.GramMatrix(model, data, **options).tensor)
    assert os.listdir(tmp_path) == ["k.npy"]
    uncomputed(monkeypatch)
    passes = []
    model.register_forward_hook(lambda *args: passes.append(1))
    again = nng.GramMatrix(model, data, out=str(path), **{**options, "memory_budget": 10**6})
    assert len(passes) == len(data) + len(options.get("other", []))  # whose outputs are compared
    assert torch.equal(again.tensor, first.tensor) and again.tensor.dtype == dtype
    np.testing.assert_array_equal(np.load(path), first.tensor.numpy())
    np.testing.assert_array_equal(np.load(path, mmap_mode="r"), first.tensor.numpy())


CHANGES = {
    "parameter 'last.bias'": lambda m, d: m.last.bias.data.add_(1e-9),
    "buffer 'shift'": lambda m, d: m.shift.add_(1e-9),
    "buffer 'hidden'": lambda m, d: m.hidden.mul_(1.5),
    "batch 1": lambda m, d: d[1].mul_(1.0 + 1e-12),
    "batch 0, batch 2": lambda m, d: d.reverse(),
    "batch 2": lambda m, d: d.pop(),
    "batch 3": lambda m, d: d.append(d[0]),
    "outputs of the first batch .*attribute": lambda m, d: setattr(m, "temperature", 1.001),
    "centered": {"centered": True},
    "batch of other= 0": {"other": [torch.ones(2, 3, dtype=torch.float64)]},
    "layer_collection": {"include": "last"},
    "outputs of the first": {"function": lambda m: lambda x: 2 * m(x)},
    "outputs of later batches": {"function": lambda m: lambda x: m(x) * (2.0 if len(x) == 2 else 1.0)},
    "gradients of the first batch": {"function": lambda m: lambda x: 0.5 * m(x) + 0.5 * m(x).detach()},
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("what", CHANGES)
def test_other_inputs_are_refused_and_named(tmp_path, what, finished):
    (model, data), path = scaled(), tmp_path / "k.npy"
    truth = nng.GramMatrix(model, data, out=path, **OPTIONS) if finished else interrupted(model, data, path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    change, options = CHANGES[what], {}
    if callable(change):
        change(model, data)
    elif "include" in change:
        options["layer_collection"] = nng.LayerCollection.from_model(model, **change)
    else:
        options = {name: value(model) if callable(value) else value for name, value in change.items()}
    with pytest.raises(nng.ArgumentError, match=f"other inputs.*differ in: {what}.*delete the file"):
        nng.GramMatrix(model, data, out=path, **options)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    if finished:
        assert bool(torch.isfinite(truth.tensor).all())


def test_many_outputs_are_compared_in_sums(tmp_path):
    """More outputs than are kept: one of them is enough, and rounding is not."""
    x, model = torch.randn(300, 3, dtype=torch.float64), nn.Linear(3, 20).double()

    def of(function):
        side = Side.of(Run.of(model, [x], function=function), EveryOutput())
        return Fingerprint.of(side, None, centered=False)

    one, last = torch.zeros(300, 20, dtype=torch.float64), torch.zeros(300, 20, dtype=torch.float64)
    one[150, 10], last[-1, -1] = 1e-6, 1e-6
    base = of(lambda x: model(x))
    assert len(base.outputs) <= 4097
    assert not base.differs(of(lambda x: model(x) * (1 + 1e-14)).plain())
    for change in (one, last):
        assert base.differs(of(lambda x, change=change: model(x) + change).plain())


def test_contents_of_batches_of_any_kind(tmp_path):
    model = nn.Linear(3, 2).double()
    x = np.arange(3000.0).reshape(1000, 3) / 3000
    function = lambda batch: model(torch.as_tensor(batch["x"]))
    path = tmp_path / "k.npy"
    call = lambda x, **more: nng.GramMatrix(
        model, [{"x": x, "n": torch.zeros(1000), **more}], out=path, function=function
    )
    sparse = torch.eye(3).to_sparse()
    first = call(x, text="a", graph=sparse, kinds={1})
    assert torch.equal(call(x, text="a", graph=sparse, kinds={1}).tensor, first.tensor)
    other = x.copy()
    other[500, 1] += 1e-9  # where numpy prints an ellipsis
    for odd in ((other, {}), (x, {"text": "b"}), (x, {"graph": (2 * torch.eye(3)).to_sparse()}), (x, {"kinds": {2}})):
        with pytest.raises(nng.ArgumentError, match="batch 0"):
            call(odd[0], **{"text": "a", "graph": sparse, "kinds": {1}, **odd[1]})
    with pytest.raises(nng.ArgumentError, match="batch holds a function"):
        call(x, text=lambda: 0)


def test_heads_that_numpy_cannot_read(tmp_path):
    """Whatever a byte of the head becomes: the kernel, or a :class:`FileError`; no file grows."""
    (model, data), path = scaled(), tmp_path / "k.npy"
    truth = nng.GramMatrix(model, data, out=path, **OPTIONS).tensor.clone()
    whole = path.read_bytes()
    for j in range(0, 128, 3):
        for flip in (0x41, 0x08):
            path.write_bytes(whole[:j] + bytes([whole[j] ^ flip]) + whole[j + 1 :])
            with contextlib.suppress(nng.FileError):
                torch.testing.assert_close(nng.GramMatrix(model, data, out=path, **OPTIONS).tensor, truth)
            assert path.stat().st_size == len(whole)


def test_a_begun_file_that_claims_more_is_begun_anew(tmp_path):
    (model, data), path = scaled(), tmp_path / "k.npy"
    interrupted(model, data, path)
    head = {"descr": "<f8", "fortran_order": False, "shape": (2, 9, 2, 2**40)}
    with open(tmp_path / "k.npy.part", "rb+") as file:
        np.lib.format.write_array_header_1_0(file, head)
    equal(nng.GramMatrix(model, data, out=path, **OPTIONS), nng.GramMatrix(model, data))


# -- live kernels ------------------------------------------------------------------------------------------------------


def test_a_live_kernel_is_not_touched(tmp_path):
    (model, data), path = scaled(), tmp_path / "k.npy"
    live = nng.GramMatrix(model, data, out=path, **OPTIONS)
    held = live.tensor.clone()
    changed = [x + 1 for x in data]
    with pytest.raises(nng.ArgumentError, match="other inputs"):
        nng.GramMatrix(model, changed, out=path, **OPTIONS)
    assert torch.equal(live.tensor, held)
    os.remove(path)
    other = nng.GramMatrix(model, changed, out=path, **OPTIONS)
    equal(other, nng.GramMatrix(model, changed))
    assert torch.equal(live.tensor, held)
    other.tensor.zero_()
    equal(nng.GramMatrix(model, changed, out=path), nng.GramMatrix(model, changed))
    path.write_bytes(b"")  # an empty file is nothing
    equal(nng.GramMatrix(model, data, out=path), live)


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centered", [False, True])
def test_what_was_begun_is_damaged(tmp_path, centered):
    """Missing, cut off, or changed in any place: the right kernel or an error."""
    (model, data), path = scaled(), tmp_path / "k.npy"
    options = {**OPTIONS, "centered": centered}
    truth = nng.GramMatrix(model, data, centered=centered)
    interrupted(model, data, path, centered=centered)
    begun = {name: (tmp_path / name).read_bytes() for name in ("k.npy.part", "k.npy.tiles")}
    assert sorted(os.listdir(tmp_path)) == sorted(begun)

    def resumed(damage):
        for name, data_ in begun.items():
            (tmp_path / name).write_bytes(data_)
        damage()
        try:
            equal(nng.GramMatrix(model, data, out=path, **options), truth)
            assert os.listdir(tmp_path) == ["k.npy"]
            os.remove(path)
        except nng.NNGeomError:
            for f in tmp_path.iterdir():
                os.remove(f)

    def changed(name, at):
        broken = bytearray(begun[name])
        broken[at] ^= 8
        (tmp_path / name).write_bytes(broken)

    resumed(lambda: None)
    for name in begun:
        resumed((tmp_path / name).unlink)
        size = len(begun[name])
        for at in range(0, size, size // 12):
            resumed(lambda: os.truncate(tmp_path / name, at))  # noqa: B023
            resumed(lambda: changed(name, at))  # noqa: B023
    resumed(lambda: (tmp_path / "k.npy.part").write_bytes(bytes(len(begun["k.npy.part"]))))


def test_resuming_computes_only_what_is_missing(tmp_path, monkeypatch):
    (model, data), path = scaled(), tmp_path / "k.npy"
    calls = stop_after(monkeypatch, 10**6)
    truth = nng.GramMatrix(model, data, out=tmp_path / "whole.npy", **OPTIONS)
    total = len(calls)
    for tiles in (1, total - 1):
        interrupted(model, data, path, tiles)
        calls.clear()
        equal(nng.GramMatrix(model, data, out=path, **OPTIONS), truth)
        assert len(calls) == total - tiles
        os.remove(path)
    interrupted(model, data, path, 3)
    equal(nng.GramMatrix(model, data, out=path, memory_budget=10**6), truth)  # other tiles


def test_a_finished_file_is_damaged(tmp_path):
    (model, data), path = scaled(), tmp_path / "k.npy"
    nng.GramMatrix(model, data, out=path, **OPTIONS)
    whole = path.read_bytes()
    for at in range(0, len(whole), len(whole) // 50):
        for damaged in (
            whole[:at],
            whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :],
            whole[:at] + whole[at + 1 :],
        ):
            path.write_bytes(damaged)
            if not damaged:
                continue
            with pytest.raises(nng.NNGeomError, match="delete"):
                nng.GramMatrix(model, data, out=path, **OPTIONS)
            assert path.read_bytes() == damaged
    for foreign in (b"hello", b"\x93NUMPY\x01\x00"):
        path.write_bytes(foreign)
        with pytest.raises(nng.FileError, match="no finished kernel"):
            nng.GramMatrix(model, data, out=path)
    np.save(path, np.zeros((2, 9, 2, 9)))
    with pytest.raises(nng.FileError, match="does not say what it is a kernel of"):
        nng.GramMatrix(model, data, out=path)


# -- paths and disks ---------------------------------------------------------------------------------------------------


class Untouched:
    def __iter__(self):
        raise AssertionError("a batch was asked for")


def test_unwritable_paths_raise_before_anything(tmp_path):
    model, _ = scaled()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"x")
    for path in (tmp_path / "folder", tmp_path / "none" / "k.npy", tmp_path / "file" / "k.npy", tmp_path / ("k" * 300)):
        with pytest.raises(nng.FileError, match="cannot write the kernel"):
            nng.GramMatrix(model, Untouched(), out=path)
    with pytest.raises(nng.ArgumentTypeError, match="path of a file"):
        nng.GramMatrix(model, Untouched(), out=3)
    with pytest.raises(nng.ArgumentError, match="path of a file"):
        nng.GramMatrix(model, Untouched(), out="a\0b")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"] and not os.listdir(tmp_path / "folder")


def test_a_refused_model_leaves_nothing(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    with pytest.raises(nng.ModeError):
        nng.GramMatrix(model, [torch.randn(4, 3)], out=tmp_path / "k.npy")
    x = torch.randn(4, 3)
    x[2, 1] = torch.nan
    with pytest.raises(nng.NonFiniteError):
        nng.GramMatrix(model.eval(), [x], out=tmp_path / "k.npy")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("way", ["reserved", "written"])
def test_a_full_disk_is_an_error(tmp_path, monkeypatch, way):
    model, data = scaled()

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if way == "reserved":
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    else:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr(os, "write", full)
    with pytest.raises(nng.FileError, match="No space left"):
        nng.GramMatrix(model, data, out=tmp_path / "k.npy")
    assert os.listdir(tmp_path) == []


def test_disks_that_cannot_reserve(tmp_path, monkeypatch):
    (model, data), path = scaled(), tmp_path / "k.npy"

    def unknown(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown, raising=False)
    interrupted(model, data, path)
    equal(nng.GramMatrix(model, data, out=path, **OPTIONS), nng.GramMatrix(model, data))
    with open(tmp_path / "f", "wb+") as file:
        files.reserve(file.fileno(), 3, 3 * 2**20 + 5)
    assert os.path.getsize(tmp_path / "f") == 3 * 2**20 + 5


# -- processes ---------------------------------------------------------------------------------------------------------

PRELUDE = """
import os, resource, signal, sys, torch, nngeom as nng
from torch import nn
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
data = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 2, 3)]
truth = nng.GramMatrix(model, data).tensor
call = lambda path, data=data: nng.GramMatrix(model, data, out=path, memory_budget=2000).tensor

def forked(run):
    "The status of a child that runs something, silently; -9 where it was killed."
    child = os.fork()
    if not child:
        try:
            run()
            os._exit(0)
        except nng.NNGeomError as error:
            print(type(error).__name__, error, flush=True)
            os._exit(3)
        finally:
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def at_line(number, run, *names):
    "Run something, and count the lines of some files of the library; kill the process at one of them."
    count = 0
    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.endswith(names):
            return None
        if event == "line":
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return count
"""


def process(code, path, **options):
    program = PRELUDE + f"path = {str(path)!r}\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=500, **options)


@POSIX
def test_killed_anywhere(tmp_path):
    """Before each of many lines of what writes: there is no kernel or the whole one, and the next call gives it."""
    done = process(
        """
        names = ("store.py", "npy.py", "core/files.py")
        total = at_line(-1, lambda: call(path), *names)
        os.remove(path)
        for number in sorted({*range(1, total, max(1, total // 25)), *range(total - 40, total + 1, 3)}):
            status = forked(lambda: at_line(number, lambda: call(path), *names))
            assert status == -9, status
            left = os.listdir(os.path.dirname(path))
            if os.path.exists(path):
                assert torch.equal(call(path), truth) or torch.allclose(call(path), truth, rtol=1e-12), number
            torch.testing.assert_close(call(path), truth)
            assert set(os.listdir(os.path.dirname(path))) <= {"k.npy"}, (number, left)
            os.remove(path)
        print("lines", total)
        """,
        tmp_path / "k.npy",
    )
    assert done.returncode == 0, done.stdout + done.stderr


@POSIX
def test_a_disk_with_little_room(tmp_path):
    done = process(
        """
        def run():
            resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))
            call(path)
        assert forked(run) == 3 and not os.listdir(os.path.dirname(path))
        """,
        tmp_path / "k.npy",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FileError cannot write the kernel" in done.stdout


@POSIX
def test_two_processes(tmp_path):
    """While one writes the other is refused; when it is killed, its lock is gone and its tiles are used."""
    path = tmp_path / "k.npy"
    program = PRELUDE + textwrap.dedent(
        f"""
        from nngeom.fmat.store import FileStore
        write, calls = FileStore.write, []
        def slow(self, *args):
            write(self, *args)
            calls.append(1)
            if len(calls) == 2:
                print("two tiles", flush=True)
                sys.stdin.readline()
        FileStore.write = slow
        call({str(path)!r})
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        try:
            assert first.stdout.readline() == "two tiles\n"
            done = process("assert forked(lambda: call(path)) == 3", path)
            assert done.returncode == 0 and "another process (or thread) is writing" in done.stdout, (
                done.stdout + done.stderr
            )
        finally:
            first.send_signal(signal.SIGKILL)
    done = process(
        """
        from nngeom.fmat.store import FileStore
        write, calls = FileStore.write, []
        def counted(self, *args):
            calls.append(1)
            write(self, *args)
        FileStore.write = counted
        torch.testing.assert_close(call(path), truth)
        tiles = len(calls)
        os.remove(path)
        call(path)
        assert len(calls) - tiles == tiles + 2
        """,
        path,
    )
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["k.npy"]


def test_two_in_one_process(tmp_path):
    model, data = scaled()
    with FileStore(tmp_path / "k.npy"):
        with pytest.raises(nng.FileError, match="another process"):
            nng.GramMatrix(model, data, out=tmp_path / "k.npy")
    equal(nng.GramMatrix(model, data, out=tmp_path / "k.npy"), nng.GramMatrix(model, data))


def test_convolutions_of_several_batches(tmp_path):
    case = build("conv1d", sizes=(2, 2, 3))
    k = nng.GramMatrix(case.model, case.loader, out=tmp_path / "k.npy", memory_budget=2**14)
    equal(k, nng.GramMatrix(case.model, case.loader))
