"""Modes of the model and of torch: what is random or mixes examples is refused, all else is let be."""

import pytest
import reference
import torch
from cases import Attention, build
from small import Function, normal, require_fisher
from torch import nn

import nngeom as nng


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.BatchNorm1d(4), nn.AlphaDropout(0.1), nn.BatchNorm1d(4, track_running_stats=False)]
)
def test_random_and_mixing_modes_raise(layer):
    model = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 3)).train()
    for p in layer.parameters():
        p.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(nng.ModeError, match=r"model\.eval\(\)"):
        nng.FIM(model, [torch.randn(5, 4)], nng.PMatDiag)
    assert all(
        torch.equal(v, state[k]) for k, v in model.state_dict().items() if "num_batches" not in k and "running" not in k
    )


def test_dropout_within_attention_raises():
    with pytest.raises(nng.ModeError, match="dropout"):
        nng.FIM(Attention(dropout=0.1).train(), [torch.randn(3, 4, 4)], nng.PMatDiag)


def test_training_mode_without_anything_random_is_fine():
    require_fisher(Attention().double().train(), normal(4, 3, 4))


def test_mixing_examples_raises():
    model = Function(lambda m, x: m.l(x - x.mean(0)), l=nn.Linear(4, 3).double())
    with pytest.raises(nng.CoverageError, match="mixes"):
        nng.FIM(model, [normal(5, 4)], nng.PMatDense)


def test_mixing_examples_below_a_head_that_hides_it_raises():
    """All outputs are those of the bias, whatever the examples have to do with each other; their rows are not."""
    head = nn.Linear(3, 2).double()
    nn.init.zeros_(head.weight)
    model = Function(lambda m, x: m.head(m.l(x - x.mean(0))), l=nn.Linear(4, 3).double(), head=head)
    with pytest.raises(nng.CoverageError, match="mixes"):
        nng.FIM(model, [normal(5, 4)], nng.PMatDense)


def test_mixing_examples_behind_a_recurrent_cell_raises():
    cell = Function(lambda m, x: m.c(x)[0][:, -1] + x.mean(), c=nn.GRU(3, 3, batch_first=True).double())
    with pytest.raises(nng.CoverageError, match="mixes"):
        nng.FIM(cell, [normal(5, 2, 3)], nng.PMatDense)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_the_model_may_be_compiled_or_wrapped(wrap):
    case = build("mlp")
    m = nng.FIM(wrap(case.model), case.loader, nng.PMatDense)
    torch.testing.assert_close(m.to_dense(), reference.fisher(case.model, case.inputs))
    assert m.layer_collection.names[0] == "0.weight"


def test_the_model_may_be_distributed(tmp_path):
    import torch.distributed as dist

    case = build("mlp")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(case.model)
        m = nng.FIM(wrapped, case.loader, nng.PMatDense)
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(m.to_dense(), reference.fisher(case.model, case.inputs))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off(mode):
    case = build("mlp")
    f = reference.fisher(case.model, case.inputs)
    with mode():
        torch.testing.assert_close(nng.FIM(case.model, case.loader, nng.PMatDense).to_dense(), f)


def test_inputs_may_carry_a_graph():
    case = build("mlp")
    f = reference.fisher(case.model, case.inputs)
    x = case.inputs.clone().requires_grad_() * 1
    torch.testing.assert_close(nng.FIM(case.model, [x], nng.PMatDense).to_dense(), f)


class _Inside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, f):
        return f()


OFF = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "forward mode": lambda: torch.autograd.forward_ad._set_fwd_grad_enabled(False),
}


@pytest.mark.parametrize("off", [*OFF, "a Function"])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_products_where_derivatives_are_switched_off(batch, off):
    """Those of a graph that was proved before, too."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    made = (
        nng.FIM(model, [(x, y)], nng.PMatImplicit),
        nng.FIM(model, [(x, y)], nng.PMatImplicit, centered=True),
        nng.Hessian(model, [(x, y)], loss="cross_entropy"),
        nng.GradientCovariance(model, [(x, y)], nng.PMatImplicit, loss="cross_entropy"),
        nng.Jacobian(model, [(x, y)], nng.PushForwardImplicit),
    )
    v = nng.PVector.randn(nng.LayerCollection.from_model(model), *batch, dtype=torch.float64)
    for m in made:
        expected = m.mv(v).tensor
        act = lambda m=m: m.mv(v).tensor.clone()
        if off == "a Function":
            found = _Inside.apply(torch.zeros(1, requires_grad=True), act)
        else:
            with OFF[off]():
                found = act()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert expected.abs().max() > 0
