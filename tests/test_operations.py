"""Operations as torch means them, with all options: strides, padding, sparse and renormalised tables, attention."""

import pytest
import reference
import torch
from cases import PARAMETER_SPACE, Head, build, representation
from small import Function, model_of, normal, require_fisher
from torch import nn
from torch.nn import functional as F

import nngeom as nng


@pytest.mark.parametrize(
    "name", ["conv1d", "conv2d", "conv2d-same", "conv2d-circular", "conv2d-reflect", "depthwise", "deconv2d"]
)
def test_convolutions_as_they_are(name):
    case = build(name)
    require_fisher(case.model, case.inputs)


def test_epsilon_of_batch_norm():
    model = model_of(nn.Linear(4, 3), nn.BatchNorm1d(3, eps=0.5))
    require_fisher(model, normal(6, 4))


def test_padding_index_of_an_embedding():
    case = build("embedding")
    require_fisher(case.model, case.inputs)


def test_embeddings_that_renormalise_their_table_in_place():
    ids = torch.randint(0, 6, (6, 4))
    limited = Head(nn.Embedding(6, 3, max_norm=0.5)).double()
    limited(ids)
    require_fisher(limited, ids)


def test_embeddings_scaled_by_frequency_are_refused():
    """The gradient of an example depends on the other examples of the batch."""
    by_frequency = Head(nn.Embedding(6, 3, scale_grad_by_freq=True)).double()
    with pytest.raises(nng.NNGeomError):
        nng.FIM(by_frequency, [torch.randint(0, 6, (6, 4))], nng.PMatDense)


def test_linear_on_images():
    case = build("image-of-vectors")
    require_fisher(case.model, case.inputs)
    m = nng.FIM(case.model, [case.inputs], nng.PMatImplicit)
    torch.testing.assert_close(m.to_dense(), reference.fisher(case.model, case.inputs), rtol=1e-8, atol=1e-12)


def test_norms_without_parameters():
    require_fisher(model_of(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Linear(4, 3)), normal(6, 4))


def test_group_norm_of_vectors_and_a_slope_for_all():
    require_fisher(model_of(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.PReLU(), nn.Linear(4, 3)), normal(6, 4))


@pytest.mark.parametrize("shape", [(6,), (6, 2, 2)])
def test_embeddings_of_several_index_shapes(shape):
    model = Function(
        lambda m, x: m.h(m.e(x).reshape(len(x), -1, 3).sin().sum(1)), e=nn.Embedding(5, 3), h=nn.Linear(3, 3)
    ).double()
    require_fisher(model, torch.randint(0, 5, shape))


@pytest.fixture
def tables():
    """A model with a sparse table, the same with a dense one, inputs and labels."""
    model = model_of(nn.Embedding(6, 3, sparse=True), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))
    dense = model_of(nn.Embedding(6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3))
    return model, dense, torch.randint(0, 6, (5, 2)), torch.zeros(5, dtype=torch.long)


@pytest.mark.parametrize("kind", PARAMETER_SPACE)
def test_sparse_embeddings(tables, kind):
    a, b = (nng.FIM(m, tables[2], representation(kind, m)).to_dense() for m in tables[:2])
    torch.testing.assert_close(a, b)


def test_hessians_of_sparse_embeddings(tables):
    model, dense, x, y = tables
    a, b = (nng.Hessian(m, (x, y), nng.PMatDense, loss="cross_entropy").to_dense() for m in (model, dense))
    torch.testing.assert_close(a, b)


@pytest.fixture
def channels_last():
    model = model_of(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 3))
    return model.to(memory_format=torch.channels_last)


def test_channels_last(channels_last):
    require_fisher(channels_last, normal(6, 2, 4, 4).to(memory_format=torch.channels_last))


def test_vectors_of_channels_last_parameters(channels_last):
    assert torch.equal(nng.PVector.from_model(channels_last)["0.weight"], channels_last[0].weight)


def test_strided_inputs_and_outputs():
    transposed = Function(lambda m, x: m.l(x).T.contiguous().T, l=nn.Linear(4, 3).double())
    require_fisher(transposed, normal(4, 6).T)


def test_one_example_without_an_axis_of_examples():
    with pytest.raises(nng.OutputError, match=r"one example without an axis.*unsqueeze\(0\)"):
        nng.FIM(nn.Linear(3, 3).double(), [(normal(3),)], nng.PMatDense, likelihood="gaussian")


def test_products_through_attention_kernels():
    class Flash(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)).mean(1)

    model = Flash().double()
    x = normal(4, 5, 4)
    require_fisher(model, x)
    f = reference.fisher(model, x)
    torch.testing.assert_close(nng.FIM(model, [x], nng.PMatImplicit).to_dense(), f, rtol=1e-8, atol=1e-12)
