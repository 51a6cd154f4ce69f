"""Long sweeps that were interrupted: the same call goes on, with the same bits, or says why it does not."""

import functools
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from cases import build, representation
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nngeom as nng
from nngeom.core import files
from nngeom.sweep import sums_file

SIZES = (3, 4, 2, 5)
KINDS = ["dense", "diag", "block-diag", "quasi-diag", "kfac", "kfac-reduce", "ekfac", "low-rank", "mixed-sweeps", "eye"]


class Stopped(RuntimeError):
    pass


class Breaking:
    """A loader that fails after so many batches in all, over any number of sweeps."""

    def __init__(self, batches, after):
        self.batches, self.after, self.read = batches, after, 0

    def __iter__(self):
        for batch in self.batches:
            if self.read == self.after:
                raise Stopped
            self.read += 1
            yield batch

    def __len__(self):
        return len(self.batches)


def tensors(matrix):
    return [t for block in matrix.blocks.values() for t in block.tensors()]


def same(a, b):
    x, y = tensors(a), tensors(b)
    assert len(x) == len(y) > 0 or not x
    assert all(torch.equal(s, t) for s, t in zip(x, y)) and a.examples == b.examples


def interrupted(tmp_path, measure, batches, after):
    """The result of a call that goes on where one failed after so many batches."""
    folder = tmp_path / "sums"
    with pytest.raises(Stopped):
        measure(Breaking(batches, after), checkpoint=folder, every=0)
    loader = Breaking(batches, 10**9)
    return measure(loader, checkpoint=folder, every=0)


MEASURES = {
    "FIM": lambda m, kind, data, **o: nng.FIM(m, data, kind, **o),
    "FIM_MonteCarlo": lambda m, kind, data, **o: nng.FIM_MonteCarlo(
        m, data, kind, samples=2, generator=torch.Generator().manual_seed(4), **o
    ),
    "EmpiricalFIM": lambda m, kind, data, **o: nng.EmpiricalFIM(m, data, kind, loss="cross_entropy", **o),
    "GGN": lambda m, kind, data, **o: nng.GGN(m, data, kind, loss="cross_entropy", **o),
}


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_representation(tmp_path, kind, after):
    case = build("mlp", sizes=SIZES)
    chosen = representation(kind, case.model)
    measure = lambda data, **o: nng.FIM(case.model, data, chosen, **o)
    same(interrupted(tmp_path, measure, case.loader, after), measure(case.loader))


@pytest.mark.parametrize("name", ["conv2d", "embedding", "gru", "layer-norm", "tied", "attention"])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "dense"])
def test_models(tmp_path, name, kind):
    case = build(name, sizes=SIZES)
    measure = lambda data, **o: nng.FIM(case.model, data, representation(kind, case.model), **o)
    same(interrupted(tmp_path, measure, case.loader, 2), measure(case.loader))


@pytest.mark.parametrize("after", range(1, 8))
def test_both_sweeps_of_ekfac(tmp_path, after):
    case = build("mlp", sizes=SIZES)
    measure = lambda data, **o: nng.FIM(case.model, data, nng.PMatEKFAC, **o)
    loader = Breaking(case.loader, 10**9)
    with pytest.raises(Stopped):
        measure(Breaking(case.loader, after), checkpoint=tmp_path / "sums", every=0)
    same(measure(loader, checkpoint=tmp_path / "sums", every=0), measure(case.loader))


@pytest.mark.parametrize("name", MEASURES)
def test_measures(tmp_path, name):
    case = build("mlp", sizes=SIZES)
    for kind in (nng.PMatKFAC, nng.PMatLowRank):
        measure = functools.partial(MEASURES[name], case.model, kind)
        folder = tmp_path / kind.__name__
        folder.mkdir()
        if name == "FIM_MonteCarlo":  # all batches are read first, so that later sweeps see the same
            with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
                fail_after(patch, 2)
                measure(case.loader, checkpoint=folder / "sums", every=0)
            found = measure(case.loader, checkpoint=folder / "sums", every=0)
        else:
            found = interrupted(folder, measure, case.loader, 2)
        same(found, measure(case.loader))


def fail_after(patch, writes):
    """Sums are kept so many times, and then a call fails."""
    write, calls = sums_file.write, []

    def fails(*args):
        if len(calls) == writes:
            raise Stopped
        calls.append(1)
        write(*args)

    patch.setattr(sums_file, "write", fails)


@pytest.mark.filterwarnings("ignore::nngeom.FitWarning")
def test_more_steps_of_a_nearest_product(tmp_path):
    case = build("mlp", sizes=SIZES)
    measure = lambda data, **o: nng.FIM(case.model, data, nng.PMatKFAC, fit="nearest", fit_steps=4, **o)
    same(interrupted(tmp_path, measure, case.loader, 10), measure(case.loader))


def test_small_budgets_and_a_loader_of_torch(tmp_path):
    case = build("mlp", sizes=(17,))
    x, y = case.loader[0]
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    measure = lambda data, **o: nng.FIM(case.model, data, nng.PMatEKFAC, memory_budget=20_000, **o)
    same(interrupted(tmp_path, measure, list(loader), 3), measure(list(loader)))
    same(measure(loader, checkpoint=tmp_path / "sums"), measure(loader))


class Odd(nn.Module):
    """A layer that is used in an unusual way in some batches."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h) if len(x) != 4 else h @ (self.b.weight**2).T


def test_parameters_left_to_the_fallback(tmp_path):
    torch.manual_seed(0)
    model = Odd().double()
    batches = [(torch.randn(n, 3, dtype=torch.float64),) for n in (3, 4, 2, 4, 3)]
    for kind in (nng.PMatDense, nng.PMatDiag):
        for after in range(1, 5):
            measure = functools.partial(nng.FIM, model, representation=kind)
            folder = tmp_path / f"{kind.__name__}{after}"
            folder.mkdir()
            same(interrupted(folder, measure, batches, after), measure(batches))


def test_a_seed_that_was_drawn_is_kept(tmp_path):
    case = build("mlp", sizes=SIZES)
    measure = lambda **o: nng.FIM_MonteCarlo(case.model, case.loader, nng.PMatDense, **o)
    torch.manual_seed(1)
    whole = measure()
    torch.manual_seed(1)
    with pytest.raises(Stopped), pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 2)
        measure(checkpoint=tmp_path / "sums", every=0)
    torch.manual_seed(2)
    same(measure(checkpoint=tmp_path / "sums"), whole)
    with pytest.raises(nng.ArgumentError, match="generator"):
        measure(checkpoint=tmp_path / "sums", generator=torch.Generator().manual_seed(1))


def test_a_finished_one_is_not_measured_again(tmp_path, monkeypatch):
    case = build("mlp", sizes=SIZES)
    measure = lambda data=case.loader: nng.FIM(case.model, data, nng.PMatEKFAC, checkpoint=tmp_path / "sums")
    first = measure()
    passes = []
    forward = type(case.model).forward
    monkeypatch.setattr(type(case.model), "forward", lambda *a: passes.append(1) or forward(*a))
    same(measure(), first)
    assert len(passes) <= 4  # of the first batch, in both sweeps
    with pytest.raises(nng.LoaderError, match="more than 4"):
        measure([*case.loader, case.loader[0]])
    with pytest.raises(nng.LoaderError, match="there are 3 now"):
        measure(case.loader[:-1])


def begun(tmp_path, case, after=3, **options):
    with pytest.raises(Stopped):
        nng.FIM(case.model, Breaking(case.loader, after), checkpoint=tmp_path / "sums", every=0, **options)
    return tmp_path / "sums"


def test_other_data(tmp_path):
    case = build("mlp", sizes=SIZES)
    folder = begun(tmp_path, case)
    for j in range(3):
        other = list(case.loader)
        other[j] = (other[j][0] + 1e-9, other[j][1])
        with pytest.raises(nng.LoaderError, match="other contents"):
            nng.FIM(case.model, other, checkpoint=folder)
    with pytest.raises(nng.LoaderError, match="other contents"):
        nng.FIM(case.model, case.loader[::-1], checkpoint=folder)
    with pytest.raises(nng.LoaderError, match="there are 1 now"):
        nng.FIM(case.model, case.loader[:1], checkpoint=folder)
    same(nng.FIM(case.model, case.loader, checkpoint=folder), nng.FIM(case.model, case.loader))


def test_another_measure(tmp_path):
    case = build("mlp", sizes=SIZES)
    folder = begun(tmp_path, case)
    with pytest.raises(nng.ArgumentError, match="measure"):
        nng.GGN(case.model, case.loader, loss="cross_entropy", checkpoint=folder)
    for options in ({"sharing": "reduce"}, {"likelihood": "gaussian"}, {"function": lambda x, y: case.model(x)}):
        with pytest.raises(nng.ArgumentError, match="another measure, which differs in"):
            nng.FIM(case.model, case.loader, checkpoint=folder, **options)
    with pytest.raises(nng.ArgumentError, match="representation"):
        nng.FIM(case.model, case.loader, nng.PMatDiag, checkpoint=folder)
    lc = nng.LayerCollection.from_model(case.model, exclude="*bias")
    with pytest.raises(nng.ArgumentError, match="selected parameters"):
        nng.FIM(case.model, case.loader, layer_collection=lc, checkpoint=folder)
    parameter = next(case.model.parameters())
    with torch.no_grad():
        parameter.view(-1)[0] += 1e-9
    with pytest.raises(nng.ArgumentError, match="digest of parameter"):
        nng.FIM(case.model, case.loader, checkpoint=folder, check=False)


class Warm(nn.Module):
    """A plain attribute, in no state."""

    def __init__(self):
        super().__init__()
        self.layer, self.temperature = nn.Linear(3, 2), 1.0

    def forward(self, x):
        return self.layer(x) / self.temperature


def test_what_is_in_no_parameter(tmp_path):
    torch.manual_seed(0)
    model, batches = Warm(), [(torch.randn(n, 3),) for n in SIZES]
    with pytest.raises(Stopped):
        nng.FIM(model, Breaking(batches, 3), checkpoint=tmp_path / "sums", every=0)
    model.temperature = 1.1
    with pytest.raises(nng.ArgumentError, match="adds something else"):
        nng.FIM(model, batches, checkpoint=tmp_path / "sums")
    model.temperature = 1.0
    same(nng.FIM(model, batches, checkpoint=tmp_path / "sums"), nng.FIM(model, batches))


def test_other_eigenvectors(tmp_path, monkeypatch):
    """Sums of squares in two bases are never added."""
    case = build("mlp", sizes=SIZES)
    with pytest.raises(Stopped):
        nng.FIM(case.model, Breaking(case.loader, 6), nng.PMatEKFAC, checkpoint=tmp_path / "sums", every=0)
    eigh = nng.core.linalg.eigh

    def turned(m):
        values, vectors = eigh(m)
        q = torch.linalg.qr(torch.randn(m.shape[-1], m.shape[-1], dtype=m.dtype))[0]
        return values, vectors @ q

    monkeypatch.setattr(nng.core.linalg, "eigh", turned)
    with pytest.raises(nng.ArgumentError, match="eigenvectors came out otherwise"):
        nng.FIM(case.model, case.loader, nng.PMatEKFAC, checkpoint=tmp_path / "sums")


# -- what is bad in the folder -----------------------------------------------------------------------------------------


def damage(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_the_older_sums_where_the_newer_are_damaged(tmp_path):
    case = build("mlp", sizes=SIZES)
    folder = begun(tmp_path, case)
    newer = folder / "sweep-0.part-00000-of-00001.safetensors"
    older = newer.with_name(newer.name + ".older")
    assert newer.exists() and older.exists()
    whole = nng.FIM(case.model, case.loader)
    damage(newer)
    same(nng.FIM(case.model, case.loader, checkpoint=folder), whole)
    for path in (newer, older):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(nng.FileError, match="damaged, truncated"):
        nng.FIM(case.model, case.loader, checkpoint=folder)
    newer.unlink()
    older.unlink()
    same(nng.FIM(case.model, case.loader, checkpoint=folder), whole)


CHANGES = {
    "format": lambda tree: tree.update(format=9),
    "about": lambda tree: tree["progress"].update(about="x"),
    "batches": lambda tree: tree["progress"].update(batches="3"),
    "no progress": lambda tree: tree.pop("progress"),
    "shape": lambda tree: tree["kept"][0].__setitem__(2, [1, 2]),
    "huge": lambda tree: tree["kept"].clear(),
    "block": lambda tree: tree["kept"][0].__setitem__(0, {"layout": [[1]]}),
    "dtype": lambda tree: tree["kept"][0].__setitem__(3, "I64"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_sums_that_say_what_is_not_so(tmp_path, name):
    case = build("mlp", sizes=SIZES)
    folder = begun(tmp_path, case)
    path = folder / "sweep-0.part-00000-of-00001.safetensors"
    path.with_name(path.name + ".older").unlink()
    metadata, found = nng.core.container.read(str(path))
    tree = json.loads(metadata["nngeom"])
    CHANGES[name](tree)
    header = json.dumps(tree)
    checksum = nng.core.container.checksum(header, found)
    sums_file.safetensors.torch.save_file(found, path, {"nngeom": header, "checksum": checksum})
    with pytest.raises(nng.FileError):
        nng.FIM(case.model, case.loader, checkpoint=folder)


def test_bad_folders(tmp_path):
    case = build("mlp", sizes=SIZES)
    measure = lambda folder, **o: nng.FIM(case.model, case.loader, checkpoint=folder, **o)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "no" / "folder"):
        with pytest.raises(nng.FileError, match="cannot write"):
            measure(folder)
    (tmp_path / "foreign").mkdir()
    for text, said in (("[", "damaged"), ("{}", "of what measure"), ('{"format": 7, "about": {}}', "format 7")):
        (tmp_path / "foreign" / "measure.json").write_text(text)
        with pytest.raises(nng.FileError, match=said):
            measure(tmp_path / "foreign")
    (tmp_path / "locked").mkdir()
    lock = files.Lock(os.fspath(tmp_path / "locked" / "lock"))
    with pytest.raises(nng.FileError, match="another call"):
        measure(tmp_path / "locked")
    lock.release()
    for every in (-1, float("nan"), float("inf"), "1", True):
        with pytest.raises(nng.ArgumentError, match="every is"):
            measure(tmp_path / "every", every=every)
    with pytest.raises(nng.ArgumentTypeError, match=r"checkpoint is 3\.5"):
        measure(3.5)


def test_what_keeps_no_sums(tmp_path):
    case = build("mlp", sizes=SIZES)
    for options in ({"representation": nng.PMatImplicit}, {"estimator": "rademacher"}, {"centered": True}):
        kind = options.pop("representation", nng.PMatDiag)
        with pytest.raises(nng.UnsupportedError, match="checkpoint="):
            nng.FIM(case.model, case.loader, kind, checkpoint=tmp_path / "sums", **options)
    assert not (tmp_path / "sums").exists()


def test_no_room(tmp_path, monkeypatch):
    case = build("mlp", sizes=SIZES)
    folder = begun(tmp_path, case)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sums_file.safetensors.torch, "save_file", full)
    with pytest.raises(nng.FileError, match="No space left"):
        nng.FIM(case.model, case.loader, checkpoint=folder, every=0)
    monkeypatch.undo()
    same(nng.FIM(case.model, case.loader, checkpoint=folder), nng.FIM(case.model, case.loader))


SCRIPT = """
    import sys, time, torch, nngeom as nng
    sys.path.insert(0, {tests!r})
    from cases import build
    case = build("mlp", sizes=(3, 4, 2, 5))
    class Slow(list):
        def __iter__(self):
            for j, batch in enumerate(super().__iter__()):
                if j == 2 and len(sys.argv) > 2:
                    open(sys.argv[2], "w").close()
                    time.sleep(60)
                yield batch
    m = nng.FIM(case.model, Slow(case.loader), nng.PMatEKFAC, checkpoint=sys.argv[1], every=0)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_process_that_is_killed(tmp_path):
    script = textwrap.dedent(SCRIPT.format(tests=os.path.dirname(__file__)))
    folder, reached = tmp_path / "sums", tmp_path / "reached"
    process = subprocess.Popen([sys.executable, "-c", script, str(folder), str(reached)])
    end = time.monotonic() + 60
    while not reached.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert reached.exists() and (folder / "lock").exists()
    case = build("mlp", sizes=SIZES)
    found = nng.FIM(case.model, Breaking(case.loader, 10**9), nng.PMatEKFAC, checkpoint=folder)
    same(found, nng.FIM(case.model, case.loader, nng.PMatEKFAC))
