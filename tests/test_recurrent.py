"""Recurrent layers and cells: structure at every step, against autograd, one example at a time, of torch's own ones."""

import contextlib

import pytest
import reference
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nngeom as nng

f64 = torch.float64


class Sequences(nn.Module):
    """The mean output of a recurrent layer, and a head."""

    def __init__(self, kind, **options):
        super().__init__()
        self.cell = kind(3, 4, batch_first=True, **options)
        width = options.get("proj_size", 4) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        out, ends = self.cell(x)
        last = ends[0] if isinstance(ends, tuple) else ends
        return self.head(out.mean(1)) + last.sum(0).sum(-1, keepdim=True)


class Cells(nn.Module):
    """A loop of one's own over a cell."""

    def __init__(self, kind, **options):
        super().__init__()
        self.cell, self.head = kind(3, 4, **options), nn.Linear(4, 2)

    def forward(self, x):
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


KINDS = {
    "lstm": lambda: Sequences(nn.LSTM),
    "gru": lambda: Sequences(nn.GRU),
    "rnn": lambda: Sequences(nn.RNN),
    "rnn-relu": lambda: Sequences(nn.RNN, nonlinearity="relu"),
    "lstm-stacked": lambda: Sequences(nn.LSTM, num_layers=2, bidirectional=True),
    "lstm-projected": lambda: Sequences(nn.LSTM, proj_size=2),
    "gru-stacked": lambda: Sequences(nn.GRU, num_layers=2, bias=False, bidirectional=True),
    "lstm-cell": lambda: Cells(nn.LSTMCell),
    "gru-cell": lambda: Cells(nn.GRUCell, bias=False),
    "rnn-cell": lambda: Cells(nn.RNNCell),
}


def case(kind, n=(3, 2), steps=4):
    torch.manual_seed(sum(map(ord, kind)))
    model = KINDS[kind]().to(f64)
    return model, [(torch.randn(m, steps, 3, dtype=f64), torch.randint(0, 2, (m,))) for m in n]


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_structure_and_rows_are_autograds(kind):
    model, loader = case(kind)
    seen = nng.explain(model, loader[0])
    assert {seen[name].structure for name, _ in model.named_parameters()} <= {"kronecker", "exact"}
    inputs = torch.cat([x for x, _ in loader])
    j = reference.jacobian(model, inputs)
    close(nng.Jacobian(model, loader).tensor, j)
    close(nng.GramMatrix(model, loader).tensor, torch.einsum("knd,lmd->knlm", j, j))
    exact = nng.FIM(model, [(x,) for x, _ in loader], nng.PMatDense, likelihood="gaussian").to_dense()
    flat = j.flatten(0, 1)
    close(exact, flat.T @ flat / len(inputs))
    for representation in (nng.PMatDiag, nng.PMatBlockDiag):
        m = nng.FIM(model, [(x,) for x, _ in loader], representation, likelihood="gaussian")
        close(m.diag().flat(), exact.diagonal())
    layer = nng.FIM(model, [(x,) for x, _ in loader], nng.PMatBlockDiag, likelihood="gaussian")["cell"]
    size = layer.shape[0]
    close(layer.to_dense(), exact[:size, :size])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_of_an_lstm_from_their_definition(sharing):
    model, loader = case("lstm", n=(5,))
    ((x, _),) = loader
    cell, (n, steps, _) = model.cell, x.shape
    h, c, states, gates, outputs = torch.zeros(n, 4, dtype=f64), torch.zeros(n, 4, dtype=f64), [], [], []
    for t in range(steps):
        states.append(h)
        gates.append(x[:, t] @ cell.weight_ih_l0.T + cell.bias_ih_l0 + h @ cell.weight_hh_l0.T + cell.bias_hh_l0)
        i, f, g, o = gates[-1].chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    out = model.head(torch.stack(outputs, 1).mean(1)) + h.sum(-1, keepdim=True)
    gradients = torch.stack(
        [torch.stack(torch.autograd.grad(out[:, k].sum(), gates, retain_graph=True)) for k in (0, 1)]
    )
    ones = torch.ones(steps, n, 1, dtype=f64)
    m = nng.FIM(model, [(x,)], nng.PMatKFAC, likelihood="gaussian", sharing=sharing)
    for name, a in (("ih", x.transpose(0, 1)), ("hh", torch.stack(states))):
        a, g = torch.cat([a.detach(), ones], -1), gradients  # [t n i], [k t n o]
        if sharing == "reduce":
            a, g = a.mean(0, keepdim=True), g.sum(1, keepdim=True)
        block = next(b for lay, b in m.blocks.items() if f"cell.weight_{name}_l0" in lay.names)
        close(block.a[0], torch.einsum("tni,tnj->ij", a, a) / n)
        close(block.g[0], torch.einsum("ktno,ktnp->op", g, g) / n / g.shape[1])


@pytest.mark.parametrize("kind", ["lstm-stacked", "gru", "lstm-cell"])
def test_kfac_and_ekfac_solve_and_train(kind):
    model, loader = case(kind)
    exact = nng.FIM(model, loader, nng.PMatDense).to_dense()
    kfac, ekfac = (nng.FIM(model, loader, r) for r in (nng.PMatKFAC, nng.PMatEKFAC))
    close(ekfac.trace(), exact.trace())
    assert (ekfac.to_dense() - exact).norm() <= (kfac.to_dense() - exact).norm() * (1 + 1e-9)
    v = nng.PVector.randn(kfac.layer_collection, dtype=f64)
    damped = kfac.to_dense() + 0.1 * torch.eye(len(exact), dtype=f64)
    close(kfac.solve(v, 0.1).flat(), torch.linalg.solve(damped, v.flat()))


def test_what_is_not_written_out_is_exact_all_the_same():
    """Some of the weights, a length of its own in every batch, packed sequences of one length."""
    model, loader = case("gru")
    few = nng.LayerCollection.from_model(model, include="cell.weight_hh_l0")
    j = reference.jacobian(model, torch.cat([x for x, _ in loader]))
    place = nng.LayerCollection.from_model(model).offsets()["cell.weight_hh_l0"][0]
    close(nng.Jacobian(model, loader, layer_collection=few).tensor, j[..., place : place + 48])
    ragged = [(torch.randn(2, steps, 3, dtype=f64),) for steps in (2, 5)]
    rows = torch.cat([reference.jacobian(model, x) for (x,) in ragged], 1)
    close(nng.Jacobian(model, ragged).tensor, rows)

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, [x.shape[1]] * len(x), batch_first=True)
            return model.head(self.inner.cell(packed)[1][0])

    packed = Packed()
    x = loader[0][0]
    plain = reference.jacobian(packed, x)
    close(nng.Jacobian(packed, [(x,)]).tensor, plain)


class PackedSequences(nn.Module):
    """Sequences as long as their entries are not zero, packed; read by all outputs or the last state."""

    def __init__(self, cell, *, by_outputs, enforce_sorted=True, **options):
        super().__init__()
        self.cell, self.by_outputs, self.enforce_sorted = (
            cell(3, 4, batch_first=True, **options),
            by_outputs,
            enforce_sorted,
        )
        width = options.get("proj_size") or 4
        self.head = nn.Linear(width * (1 + options.get("bidirectional", False)) if by_outputs else width, 2)

    def forward(self, x):
        lengths = (x[:, :, 0] != 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.enforce_sorted)
        out, state = self.cell(packed)
        if self.by_outputs:
            padded, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
            return self.head(torch.tanh(padded)).sum(1)
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


PACKED = {
    "lstm": (nn.LSTM, {}),
    "lstm-projected": (nn.LSTM, {"proj_size": 2, "num_layers": 2}),
    "gru-stacked": (nn.GRU, {"num_layers": 2, "bidirectional": True, "bias": False}),
    "rnn": (nn.RNN, {"nonlinearity": "relu", "bidirectional": True}),
}


@pytest.mark.parametrize("by_outputs", [True, False])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_sequences(kind, by_outputs):
    torch.manual_seed(0)
    cell, options = PACKED[kind]
    model = PackedSequences(cell, by_outputs=by_outputs, **options).double()
    batches = []
    for lengths in ([5, 3, 3, 1], [4, 2]):
        x = torch.randn(len(lengths), 5, 3, dtype=f64)
        batches.append((x * (torch.arange(5) < torch.tensor(lengths)[:, None])[..., None],))
    exact = torch.cat([reference.jacobian(model, x) for (x,) in batches], 1)
    close(nng.Jacobian(model, batches).tensor, exact)
    report = nng.explain(model, batches[0])
    assert {row.structure for row in report.rows if row.name.startswith("cell.weight")} == {"kronecker"}
    options = {"likelihood": "gaussian"}
    close(nng.FIM(model, batches, nng.PMatEKFAC, **options).trace(), exact.square().sum() / exact.shape[1])
    close(nng.FIM(model, batches, nng.PMatBlockDiag, **options).trace(), exact.square().sum() / exact.shape[1])


@pytest.mark.parametrize("by_outputs", [True, False])
@pytest.mark.parametrize("kind", PACKED)
def test_sequences_that_the_model_sorts(kind, by_outputs):
    """In another order in every batch; a row is the example's all the same.

    The longest of every batch have one length: where the graph tells whose steps are whose, a batch counts by its own.
    """
    torch.manual_seed(0)
    cell, options = PACKED[kind]
    model = PackedSequences(cell, by_outputs=by_outputs, enforce_sorted=False, **options).double()
    batches = []
    for lengths in ([3, 5, 1, 3], [2, 5], [4, 1, 2, 5]):
        x = torch.randn(len(lengths), 5, 3, dtype=f64)
        batches.append((x * (torch.arange(5) < torch.tensor(lengths)[:, None])[..., None],))
    alone = [torch.cat([reference.jacobian(model, x[i : i + 1]) for i in range(len(x))], 1) for (x,) in batches]
    exact = torch.cat(alone, 1)
    close(nng.Jacobian(model, batches).tensor, exact)
    report = nng.explain(model, batches[0])
    assert {row.structure for row in report.rows if row.name.startswith("cell.weight")} == {"kronecker"}
    rows = exact.flatten(0, 1)
    whole = rows.T @ rows / exact.shape[1]
    options = {"likelihood": "gaussian"}
    close(nng.FIM(model, batches, nng.PMatDense, **options).to_dense(), whole)
    close(nng.FIM(model, batches, nng.PMatEKFAC, **options).trace(), whole.trace())
    sorted_model = PackedSequences(cell, by_outputs=by_outputs, **PACKED[kind][1]).double()
    sorted_model.load_state_dict(model.state_dict())
    by_length = [(x[(x[:, :, 0] != 0).sum(1).argsort(descending=True)],) for (x,) in batches]
    close(
        *(nng.FIM(m, b, nng.PMatKFAC, **options).to_dense() for m, b in ((model, batches), (sorted_model, by_length)))
    )


class Begun(nn.Module):
    """Sorted sequences from states of their own, behind an embedding, with a dropout of nothing between."""

    def __init__(self):
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(6, 3), nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)
        self.start = nn.Linear(2, 4)

    def forward(self, tokens, lengths, context):
        packed = nn.utils.rnn.pack_padded_sequence(self.table(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, state = self.cell(packed, torch.tanh(self.start(context)).unsqueeze(0))
        return self.head(state[0])


def test_sorted_sequences_with_states_of_their_own():
    torch.manual_seed(0)
    model = Begun().double()
    batch = (torch.randint(0, 6, (4, 5)), torch.tensor([2, 5, 1, 4]), torch.randn(4, 2, dtype=f64))
    exact = torch.cat(
        [
            torch.stack(
                [
                    torch.cat(
                        [g.flatten() for g in torch.autograd.grad(y, list(model.parameters()), retain_graph=True)]
                    )
                    for y in model(*(t[i : i + 1] for t in batch))[0]
                ]
            ).unsqueeze(1)
            for i in range(4)
        ],
        1,
    )
    close(nng.Jacobian(model, [batch], function=model).tensor, exact)
    report = nng.explain(model, batch, function=model)
    assert {row.structure for row in report.rows if row.name.startswith("cell.weight")} == {"kronecker"}


def test_what_is_no_order_is_not_taken_for_one():
    from nngeom.capture.sorted_sequences import SortedSequences

    x, seen = torch.randn(3, 2, 1), SortedSequences()
    for index, expected in (torch.tensor([2, 0, 1]), True), (torch.tensor([0, 0, 1]), False):
        chosen = x.index_select(0, index)
        seen.see(torch.Tensor.index_select, (x, 0, index), chosen)
        arguments = (chosen, torch.tensor([2, 2, 1]), True)
        packed = torch._VF._pack_padded_sequence(*arguments)
        seen.see(torch._VF._pack_padded_sequence, arguments, packed)
        assert (seen.of(packed[0]) is not None) == expected
    assert seen.of(x) is None and seen.of(None) is None


def test_graphs_of_any_order():
    model, loader = case("lstm")
    k = nng.GramMatrix(model, loader, differentiable=True)
    (slope,) = torch.autograd.grad(k.trace(), [model.cell.weight_hh_l0])
    w, step = model.cell.weight_hh_l0, torch.randn(16, 4, dtype=f64)
    traces = []
    for sign in (1, -1):
        with torch.no_grad():
            w.add_(sign * 1e-5 * step)
        traces.append(nng.GramMatrix(model, loader).trace())
        with torch.no_grad():
            w.sub_(sign * 1e-5 * step)
    torch.testing.assert_close((slope * step).sum(), (traces[0] - traces[1]) / 2e-5, rtol=1e-5, atol=1e-5)
    hessian = nng.Hessian(model, loader, nng.PMatDense, loss="cross_entropy")
    implicit = nng.Hessian(model, loader, nng.PMatImplicit, loss="cross_entropy")
    v = nng.PVector.randn(hessian.layer_collection, 2, dtype=f64)
    close(implicit.mv(v).flat(), hessian.mv(v).flat(), 1e-8)


class Checkpointed(nn.Module):
    """A model whose activations are computed again on the way back."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 3])
def test_inside_of_a_checkpoint(kind, n):
    """It runs the layer again without being watched, and takes what is saved then by order."""
    model, loader = case(kind, (n,))
    again, (x, y) = Checkpointed(model), loader[0]
    close(nng.Jacobian(again, loader).tensor, reference.jacobian(model, x))
    exact = nng.FIM(model, loader, nng.PMatDense)
    close(nng.FIM(again, loader, nng.PMatDense).to_dense(), exact.to_dense())
    v = nng.PVector.randn(exact.layer_collection, dtype=f64)
    implicit = nng.FIM(again, loader, nng.PMatImplicit)
    close(implicit.mv(nng.PVector.from_flat(implicit.layer_collection, v.flat())).flat(), exact.mv(v).flat())
    nn.functional.cross_entropy(model(x), y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    opt = nng.optim.EKFAC(again)
    with opt.observe():
        nn.functional.cross_entropy(again(x), y).backward()
    for p, expected in zip(model.parameters(), plain):
        close(p.grad, expected)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", KINDS)
def test_observed_under_autocast(kind):
    """A training step has the outputs, their dtype and the gradients that it has without us."""
    model, ((x, _),) = case(kind, (3,))
    model, x, found = model.float(), x.float(), []
    opt = nng.optim.EKFAC(model)
    for look in (contextlib.nullcontext, opt.observe):
        opt.zero_grad()
        with look():
            with torch.autocast("cpu", torch.bfloat16):
                returned = model.cell(x)[0] if isinstance(model, Sequences) else model.cell(x[:, 0])
                out = model(x)
            out.float().square().mean().backward()
        first = returned[0] if isinstance(returned, tuple) else returned
        found.append((first.dtype, out, *(p.grad.clone() for p in model.parameters())))
    assert found[0][0] == found[1][0]
    for plain, observed in zip(found[0][1:], found[1][1:]):
        assert plain.dtype == observed.dtype and torch.equal(plain, observed)


@pytest.mark.parametrize("keep", [torch.autograd.graph.save_on_cpu, contextlib.nullcontext])
def test_what_is_saved_elsewhere(keep):
    model, loader = case("gru")
    with keep():
        close(nng.Jacobian(model, loader).tensor, reference.jacobian(model, torch.cat([x for x, _ in loader])))
