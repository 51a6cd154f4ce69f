"""What people hand over as data: each form gives the numbers of plain tensors, or an error that says what to do."""

import collections
import dataclasses

import numpy as np
import pytest
import reference
import torch
from exactness import close, require_exact
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import nngeom as nng
from nngeom import mgs, optim
from nngeom.capture.batch import each, leading_size, move, take
from nngeom.capture.loaders import as_batches

f64 = torch.float64


@pytest.fixture
def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture
def x():
    return torch.randn(6, 4, dtype=f64)


@pytest.fixture
def y():
    return torch.arange(6) % 3


def fisher(model, loader, **options):
    return nng.FIM(model, loader, nng.PMatDense, **options).to_dense()


# -- lists: several batches, or one ------------------------------------------------------------------------------------


def one_batch(x, y):
    return {
        "regression": [x, torch.randn(6, 3, dtype=f64)],
        "auto-encoder": [x, x.clone()],
        "labels": [x, y],
        "labels in a column": [x, y[:, None]],
        "a label a pixel": [x, torch.zeros(6, 2, 2, dtype=torch.long)],
        "labels that are numbers": [x, y.double()],
        "vectors": [x[:, 0], x[:, 1]],
        "one example": [x[:1], x[1:2]],
        "masks": [x, x > 0, y],
        "triplets": [x, x.flip(0), x.flip(1)],
        "many": [x, x, x, y, x],
        "arrays": [x.numpy(), y.numpy()],
        "an array and a tensor": [x, y.numpy()],
        "a dictionary of inputs": [{"x": x}, y],
        "inputs in a list": [[x, x], y],
        "without targets": [x, None],
        "a DataLoader's": next(iter(DataLoader(TensorDataset(x, y), 6))),
        "a DataLoader's of three": next(iter(DataLoader(TensorDataset(x, x, y), 6))),
    }


@pytest.mark.parametrize("kind", one_batch(torch.zeros(6, 4), torch.zeros(6)))
def test_a_list_that_is_one_batch_is_refused(net, x, y, kind):
    for measure in (nng.FIM, nng.GramMatrix, nng.Jacobian):
        with pytest.raises(nng.ArgumentError, match=r"tuple\(batch\) or \[batch\].*\[\(x1,\), \(x2,\)\].*iterator"):
            measure(net, one_batch(x, y)[kind])


def many_batches(x):
    return {
        "unlike sizes": [x[:4], x[4:]],
        "three of unlike sizes": [x[:2], x[2:5], x[5:]],
        "one": [x],
        "tuples": [(x[:3],), (x[3:],)],
        "lists": [[x[:3]], [x[3:]]],
        "more than three alike": [x[:1], x[1:2], x[2:3], x[3:4], x[4:5], x[5:]],
        "an iterator of tensors": iter([x[:3], x[3:]]),
        "a generator of tensors": (part for part in x.split(3)),
        "a DataLoader of tensors": DataLoader(x, 3),
        "pairs": [(x[:3], None), (x[3:], None)],
        "dictionaries": [{"input": x[:3]}, {"input": x[3:]}],
        "one array": [x.numpy()],
    }


@pytest.mark.parametrize("kind", many_batches(torch.zeros(6, 4)))
def test_batches_are_batches(net, x, kind):
    f, j = reference.fisher(net, x), reference.jacobian(net, x)
    close(fisher(net, many_batches(x)[kind]), f)
    close(nng.GramMatrix(net, many_batches(x)[kind]).tensor, torch.einsum("cnd,emd->cnem", j, j))
    v = nng.PVector.randn(nng.LayerCollection.from_model(net), dtype=f64)
    close(nng.FIM(net, many_batches(x)[kind], nng.PMatImplicit).mv(v).flat(), f @ v.flat())
    close(nng.FIM(net, many_batches(x)[kind], nng.PMatEKFAC).trace(), f.trace())  # two sweeps


def test_a_loader_is_read_again_and_has_its_length(x):
    loader = as_batches(DataLoader(x, 2))
    assert len(loader) == 3 and [len(b) for (b,) in loader] == [2, 2, 2] == [len(b) for (b,) in loader]
    once = list(as_batches(iter([x[:3], x[3:]])))
    assert [len(b) for (b,) in as_batches(once)] == [3, 3]  # told apart once and for all


@pytest.mark.parametrize("loader", ["data", 3, None, b"data", object()])
def test_what_is_no_loader(net, loader):
    with pytest.raises(nng.ArgumentTypeError, match="expected a DataLoader"):
        nng.FIM(net, loader)


def test_a_data_frame_is_no_loader(net):
    class Frame:
        def __array__(self):
            return np.zeros((6, 4))

        def __iter__(self):
            return iter(["a", "b"])

    with pytest.raises(nng.ArgumentTypeError, match="tensor, array"):
        nng.FIM(net, Frame())


# -- what tensors are made of ------------------------------------------------------------------------------------------


def test_tensors_of_inference_mode(net, x, y):
    with torch.inference_mode():
        inputs, labels = x * 1, y * 1
    assert inputs.is_inference()
    close(fisher(net, (inputs, labels)), reference.fisher(net, x))
    v = nng.PVector.randn(nng.LayerCollection.from_model(net), dtype=f64)
    close(nng.FIM(net, [(inputs,)], nng.PMatImplicit).mv(v).flat(), reference.fisher(net, x) @ v.flat())
    close(nng.Jacobian(net, inputs).tensor, reference.jacobian(net, x))
    with torch.inference_mode():  # and all of it inside
        inside = fisher(net, [(x * 1, labels)])
    close(inside.clone(), reference.fisher(net, x))
    hessian = lambda batch: nng.Hessian(net, batch, nng.PMatDense, loss="cross_entropy").to_dense()
    close(hessian((inputs, labels)), hessian((x, y)))
    mgs.trace_penalty(net, inputs).backward()
    optim.winsorized_gradient(net, (inputs, labels), "cross_entropy", 5.0)


def test_a_model_made_in_inference_mode_says_so(x):
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with pytest.raises(nng.NNGeomError, match="inference_mode"):
        nng.FIM(model, x)


def test_arrays(net, x, y):
    f = reference.fisher(net, x)
    for batch in ((x.numpy(), y.numpy()), x.numpy(), [(x.numpy(),)], (x, y.numpy())):
        close(fisher(net, batch), f)
    loss = nng.EmpiricalFIM(net, (x.numpy(), y.numpy()), nng.PMatDense, loss="cross_entropy")
    close(loss.to_dense(), nng.EmpiricalFIM(net, (x, y), nng.PMatDense, loss="cross_entropy").to_dense())
    frozen = x.numpy().copy()
    frozen.setflags(write=False)
    close(fisher(net, (frozen, np.array(["a"] * 6)), function=lambda x, names: net(x)), f)


@pytest.mark.parametrize("given", [torch.float64, torch.float16, torch.int64, torch.bfloat16])
def test_inputs_of_another_dtype_say_what_to_do(net, x, y, given):
    net = net.float()
    for batch in ((x.to(given), y), {"input": x.to(given)}, [(x.to(given), y)]):
        with pytest.raises(nng.ArgumentTypeError, match=rf"{given}.*torch.float32.*x.to\(dtype\).*model.double\(\)"):
            nng.FIM(net, batch)
    with pytest.raises(nng.ArgumentTypeError, match="float64"):
        nng.FIM(nn.Sequential(nn.Conv1d(1, 3, 2), nn.Flatten()), x[:, None])


@pytest.mark.parametrize("given", [f64, torch.float32, torch.int64])
def test_layers_of_several_dtypes_say_what_to_do(net, x, y, given):
    mixed = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3).double())
    assert nng.FIM(mixed, (x.float(), y), function=lambda x, y: mixed[1](mixed[0](x).double())).dtype == f64
    for batch in ((x.to(given), y), [(x.to(given), y)]):
        with pytest.raises(nng.ArgumentTypeError, match=rf"{given}.*torch.float32, torch.float64.*model.double\(\)"):
            nng.FIM(mixed, batch)


def test_errors_of_the_model_itself_stay_what_they_are(net, x, y):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as error:
        nng.FIM(net, (x[:, :3], y))
    assert not isinstance(error.value, nng.NNGeomError)

    def broken(x, y):
        raise TypeError("a mistake in the function")

    with pytest.raises(TypeError, match="a mistake in the function") as error:
        nng.FIM(net, (x, y), function=broken)
    assert not isinstance(error.value, nng.NNGeomError)


class Bag(nn.Module):
    """The mean over a set of vectors of any number."""

    def __init__(self, inside):
        super().__init__()
        self.map, self.inside = nn.Linear(4, 3).double(), inside

    def forward(self, x):
        if self.inside:
            return torch.stack([t.sum(0) for t in self.map(x).tanh().unbind()])
        return torch.stack([self.map(t).tanh().sum(0) for t in x.unbind()])


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("budget", [None, 1000])
@pytest.mark.filterwarnings("ignore")
def test_nested_tensors(inside, layout, budget):
    model, parts = Bag(inside), [torch.randn(n, 4, dtype=f64) for n in (2, 3, 1)]
    x = torch.nested.nested_tensor(parts, layout=layout)
    if inside and layout is torch.strided:  # torch has no derivative of it
        with pytest.raises(nng.UnsupportedError, match="pad the sequences"):
            fisher(model, (x,))
        return
    plain = Bag(False)
    plain.load_state_dict(model.state_dict())
    rows = torch.cat([reference.jacobian(plain, t[None]) for t in parts], 1)
    out = torch.cat([plain(t[None]) for t in parts])
    close(fisher(model, (x,), memory_budget=budget), reference.sandwich(rows, reference.softmax_metric(out)))
    close(nng.GramMatrix(model, (x,)).tensor, torch.einsum("cnd,emd->cnem", rows, rows))
    assert leading_size((x,)) == 3 and take((x,), [2, 0], 3)[0].unbind()[0].shape == (1, 4)


class Sparse(nn.Module):
    """A linear map of sparse inputs, written in three ways."""

    WAYS = {
        "mm": lambda x, m: torch.sparse.mm(x, m.weight.T) + m.bias,
        "linear": lambda x, m: F.linear(x, m.weight, m.bias),
        "matmul": lambda x, m: x @ m.weight.T,
        "dense": lambda x, m: m(x.to_dense()),
    }

    def __init__(self, way):
        super().__init__()
        self.map, self.way = nn.Linear(4, 3).double(), way

    def forward(self, x):
        return self.WAYS[self.way](x, self.map).tanh()


@pytest.mark.parametrize("way", Sparse.WAYS)
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
@pytest.mark.filterwarnings("ignore")
def test_sparse_inputs(x, way, layout):
    model, x = Sparse(way), x * (x > 0)
    sparse = x.to_sparse(layout=layout)
    try:
        model(sparse).sum().backward()
    except RuntimeError:
        pytest.skip("torch itself does not run or differentiate it")
    dense = Sparse("dense" if way != "matmul" else "matmul")
    dense.load_state_dict(model.state_dict())
    dense.WAYS = {**Sparse.WAYS, "dense": lambda x, m: m(x)}
    rows = reference.jacobian(dense, x)
    f = reference.sandwich(rows, reference.softmax_metric(dense(x)))
    for budget in (None, 2000):
        close(fisher(model, (sparse,), memory_budget=budget), f)
    close(nng.GramMatrix(model, (sparse,)).tensor, torch.einsum("cnd,emd->cnem", rows, rows))
    assert torch.equal(take(sparse, [1, 3], 6).to_dense(), x[[1, 3]]) and torch.equal(
        take(sparse, slice(1, 3), 6).to_dense(), x[1:3]
    )


def test_outputs_that_are_no_plain_tensors(net, x):
    with pytest.raises(nng.OutputError, match="sparse"):
        nng.FIM(net, x, function=lambda x: net(x).to_sparse())
    with pytest.raises(nng.OutputError, match="nested"):
        nng.FIM(net, x, function=lambda x: torch.nested.as_nested_tensor(list(net(x)), layout=torch.jagged))


# -- containers --------------------------------------------------------------------------------------------------------

Pair = collections.namedtuple("Pair", "inputs targets")


@dataclasses.dataclass
class Record:
    inputs: torch.Tensor
    names: list
    extra: torch.Tensor | None = None


class Encoding(collections.UserDict):
    """A mapping whose entries are attributes too, as tokenizers return it."""

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


def test_named_tuples_records_and_mappings(net, x, y):
    f = reference.fisher(net, x)
    names = list("abcdef")
    close(fisher(net, Pair(x, y)), f)
    close(fisher(net, [Pair(x[:4], y[:4]), Pair(x[4:], y[4:])]), f)
    of_record = {"function": lambda batch: net(batch.inputs)}
    close(fisher(net, [Record(x, names)], **of_record), f)
    close(fisher(net, Record(x.numpy(), names), memory_budget=2000, **of_record), f)
    close(fisher(net, Encoding(input=x, labels=y)), f)
    close(fisher(net, [Encoding(ids=x, labels=y)], memory_budget=2000, function=lambda batch: net(batch.ids)), f)
    close(fisher(net, [collections.OrderedDict(input=x)]), f)
    with pytest.raises(nng.LoaderError, match=r"a Record.*function="):
        nng.FIM(net, [Record(x, names)])
    with pytest.raises(nng.LoaderError, match=r"without tensors.*convert"):
        nng.FIM(net, (x.tolist(), y.tolist()))


def test_containers_keep_their_kind(x, y):
    device = torch.device("cpu")
    batches = {
        "named tuple": Pair(x, y),
        "record": Record(x, list("abcdef")),
        "mapping": Encoding(ids=x, labels=y),
        "ordered": collections.OrderedDict(a=x, b={"c": (y, [x])}),
        "nested": ([x, (y, None)], {"text": "abc"}),
        "default": collections.defaultdict(list, a=x),
    }
    for batch in batches.values():
        moved, part = move(batch, device), take(batch, [4, 0], 6)
        assert type(moved) is type(part) is type(batch) and leading_size(part) == 2 and leading_size(moved) == 6
        assert moved is not batch and leading_size(batch) == 6
    assert take(Pair(x, y), slice(1, 3), 6).targets.tolist() == [1, 2]
    assert torch.equal(take(batches["ordered"], [4], 6)["b"]["c"][1][0], x[4:5])
    assert each((x, "text", 3), lambda t: t + 1)[1:] == ("text", 3)


def test_tokenizers_of_transformers(net, x, y):
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding({"input": x, "labels": y})
    for loader in (batch, [batch]):
        close(fisher(net, loader), reference.fisher(net, x))
    close(fisher(net, [batch], function=lambda b: net(b.input), memory_budget=2000), reference.fisher(net, x))


class Packed(nn.Module):
    """A recurrent net on packed sequences."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRU(4, 3, batch_first=True).double(), nn.Linear(3, 3).double()

    def forward(self, packed):
        return self.head(self.cell(packed)[1][-1])


@pytest.mark.parametrize("budget", [None, 2000])
@pytest.mark.filterwarnings("ignore")
def test_packed_sequences(budget):
    model, parts = Packed(), [torch.randn(n, 4, dtype=f64) for n in (2, 4, 1, 3)]
    packed = pack_sequence(parts, enforce_sorted=False)
    assert leading_size(packed) == 4
    two = pad_packed_sequence(take((packed,), [3, 0], 4)[0], batch_first=True)
    assert two[1].tolist() == [3, 2] and torch.equal(two[0][0], parts[3])
    rows = torch.cat(
        [reference.jacobian(model, torch.zeros(1), lambda _, t=t: model(pack_sequence([t]))) for t in parts], 1
    )
    out = torch.cat([model(pack_sequence([t])) for t in parts])
    for options in ({}, {"function": lambda packed: model(packed)}):
        close(
            fisher(model, [(packed,)], memory_budget=budget, **options),
            reference.sandwich(rows, reference.softmax_metric(out)),
        )


# -- calls inside the model --------------------------------------------------------------------------------------------


class Inside(nn.Module):
    """One linear map, called as ``forward(self.map, x)`` says."""

    def __init__(self, forward, **parameters):
        super().__init__()
        self.map = nn.Linear(4, 3, dtype=f64)
        for name, p in parameters.items():
            setattr(self, name, p)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def several():
    return nn.Parameter(torch.randn(5, 4, 3, dtype=f64))


WRAPPED = {
    "vmap of a module": lambda m, x: torch.func.vmap(m.map)(x).tanh(),
    "vmap of a function": lambda m, x: torch.func.vmap(lambda r: F.linear(r, m.map.weight, m.map.bias).tanh() * 2)(x),
    "vmap over a parameter": lambda m, x: torch.func.vmap(lambda w: x @ w)(m.w).tanh().sum(0) + m.map(x),
    "vmap over examples, with a parameter": lambda m, x: (
        torch.func.vmap(lambda r, w: (r @ w).tanh().sum(0), (0, None))(x, m.w) + m.map(x)
    ),
    "vmap in vmap": lambda m, x: (
        torch.func.vmap(lambda r: torch.func.vmap(lambda w: (r @ w).sin())(m.w).sum(0))(x) + m.map(x)
    ),
    "gradient of each example": lambda m, x: torch.func.vmap(torch.func.grad(lambda r: m.map(r).tanh().square().sum()))(
        x
    )[:, :3],
    "Jacobian of each example": lambda m, x: torch.func.vmap(torch.func.jacrev(lambda r: m.map(r).tanh()))(x).sum(1)[
        :, :3
    ],
    "forward mode": lambda m, x: torch.func.jvp(lambda z: m.map(z).tanh(), (x,), (torch.ones_like(x),))[1],
    "functional call": lambda m, x: torch.func.functional_call(m.map, dict(m.map.named_parameters()), (x,)).tanh(),
    "checkpoint": lambda m, x: checkpoint(lambda z: m.map(z).tanh(), x, use_reentrant=False) + x[:, :3],
}


@pytest.mark.parametrize("way", WRAPPED)
def test_calls_wrapped_by_torch(way, x):
    more = (
        {"w": several()}
        if "m.w" in WRAPPED[way].__code__.co_names or "parameter" in way or way == "vmap in vmap"
        else {}
    )
    require_exact(Inside(WRAPPED[way], **more), x)


class Checkpointed(nn.Module):
    """A block in the middle that is computed again on the way back."""

    def __init__(self, reentrant):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh()), nn.Linear(5, 3)
        self.reentrant = reentrant

    def forward(self, x):
        return self.c(checkpoint(self.b, self.a(x), use_reentrant=self.reentrant))


REENTRANT = {
    "fisher": lambda m, x, y: nng.FIM(m, x, nng.PMatKFAC),
    "implicit": lambda m, x, y: nng.FIM(m, x, nng.PMatImplicit).mv(nng.PVector.from_model(m)),
    "kernel": lambda m, x, y: nng.GramMatrix(m, x),
    "implicit kernel": lambda m, x, y: nng.GramMatrix(m, x, nng.FMatImplicit).mv(
        nng.FVector(torch.ones(3, 6, dtype=f64))
    ),
    "implicit map": lambda m, x, y: nng.Jacobian(m, x, nng.PushForwardImplicit).mv(nng.PVector.from_model(m)),
    "hessian": lambda m, x, y: nng.Hessian(m, (x, y), nng.PMatDense, loss="cross_entropy"),
    "penalty": lambda m, x, y: mgs.trace_penalty(m, x),
    "gradient penalty": lambda m, x, y: mgs.loss_gradient_penalty(m, x, y),
    "linearized": lambda m, x, y: nng.linearized.Linearized(m)(x),
    "explain": lambda m, x, y: nng.explain(m, x),
}


@pytest.mark.parametrize("result", REENTRANT)
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpoints_say_what_to_do(result, x, y):
    with pytest.raises(nng.UnsupportedError, match="use_reentrant=False"):
        REENTRANT[result](Checkpointed(True).double(), x, y)


def test_other_checkpoints_are_exact(x):
    require_exact(Checkpointed(False).double(), x)


@pytest.mark.parametrize("look", [nng.explain, nng.diagnose, nng.mgs.trace_penalty, nng.mgs.logdet_penalty])
def test_what_takes_one_batch_says_so_of_a_loader(look):
    model, pairs = nn.Linear(3, 2), (torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    data = torch.utils.data.TensorDataset(*pairs)
    for loader in (torch.utils.data.DataLoader(data, 2), data, [pairs, pairs], iter([pairs])):
        with pytest.raises(nng.ArgumentTypeError, match="expected one batch"):
            look(model, loader)
    look(model, pairs)
    look(model, [*pairs])


@pytest.mark.parametrize("made", [lambda m, x: m(x), lambda m, x: x * m[0].weight.sum(), lambda m, x: m[0].weight])
def test_inputs_computed_from_the_parameters_are_refused(made):
    """What they would lack are derivatives."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(4, 4)
    measures = [nng.FIM, nng.Jacobian, nng.GramMatrix, lambda m, batches: nng.mgs.trace_penalty(m, batches[0][0])]
    for measure in measures:
        with pytest.raises(nng.ArgumentError, match="computed from the parameter '"):
            measure(model, [(made(model, x),)])
        measure(model, [(made(model, x).detach(),)])
        measure(model, [(x.clone().requires_grad_() * 2,)])
