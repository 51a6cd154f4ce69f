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
