"""A loss averaged over all positions of all examples: the curvature is that of its positions, against dense solves."""

import warnings

import pytest
import torch
from optimizing import PRESETS, close, gradient
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, NaturalGradient, ReductionWarning


class Language(nn.Module):
    """Logits ``(n, t, V)``."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 5), nn.Linear(5, 7)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.table(x)).cumsum(1)))


def language():
    torch.manual_seed(0)
    x = torch.randint(0, 7, (6, 5))
    y = x.roll(-1, 1)
    y[torch.rand(6, 5) < 0.3] = -100
    y[4] = -100  # a sequence of padding
    return Language().double(), x, y, -1


def segmentation():
    """Logits ``(n, c, h, w)``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1)).double()
    y = torch.randint(0, 3, (5, 3, 4))
    y[0, :2] = -100
    return model, torch.randn(5, 2, 3, 4, dtype=torch.float64), y, 1


def flat():
    """Logits ``(n, c)`` with examples that are left out: positions are examples."""
    torch.manual_seed(0)
    y = torch.tensor([0, 2, -100, 1, 1, -100, 2, 0])
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(8, 4).double(), y, 1


PROBLEMS = {f.__name__: f for f in (language, segmentation, flat)}


def token_mean(outputs, y, dim):
    return F.cross_entropy(outputs.movedim(dim, -1).flatten(0, -2), y.flatten())


@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diag", "dense", "block-diag", "kfac-reduce"])
def test_the_step_is_the_solve_with_the_curvature_of_positions(kind, problem, automatic):
    model, x, y, dim = PROBLEMS[problem]()
    representation, damping, make = PRESETS[kind]
    kinds = {"diag": nng.PMatDiag, "dense": nng.PMatDense, "block-diag": nng.PMatBlockDiag}
    opt = make(model, reduction="token_mean", automatic=automatic)
    with torch.enable_grad() if automatic else opt.observe():
        token_mean(model(x), y, dim).backward()
    loss = nng.CrossEntropy(ignore_index=-100, dim=dim)
    fisher = nng.EmpiricalFIM(model, (x, y), kinds.get(kind, representation), loss=loss)
    n, tokens = len(x), int((y != -100).sum())
    g, before = gradient(opt), nng.PVector.from_model(model)
    opt.step()
    assert opt.pending.positions == 0 and close(
        before - nng.PVector.from_model(model), (n / tokens * fisher).solve(g, damping), 1e-8
    )


def test_of_a_likelihood():
    """Independent positions: the mean over all of them of their own Fisher matrices."""
    model, x, y, dim = language()
    y = y.clamp(min=0)  # the likelihood of an observed step counts every position
    options = dict(fisher="exact", likelihood=nng.Categorical(-1), reduction="token_mean", statistics_decay=0.0)
    opt = NaturalGradient(model, nng.PMatDense, lr=1.0, momentum=0.0, kl_clip=None, damping=1e-2, **options)
    with opt.observe():
        token_mean(model(x), y, dim).backward()
    rows = nng.Jacobian(model, (x, y), function=lambda x, y: model(x).flatten(1)).tensor  # (t V, n, d)
    p = model(x).detach().softmax(-1)
    hessians = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    j = rows.view(5, 7, 6, -1).permute(2, 0, 1, 3)
    dense = torch.einsum("ntad,ntab,ntbe->de", j, hessians, j) / 30
    g, before = gradient(opt), nng.PVector.from_model(model)
    opt.step()
    expected = torch.linalg.solve(dense + 1e-2 * torch.eye(len(dense), dtype=dense.dtype), g.flat())
    assert torch.allclose((before - nng.PVector.from_model(model)).flat(), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("preset", [KFAC, EKFAC])
def test_accumulation_scalers_and_positions(preset):
    """In parts, each the sum over its tokens divided by those of all; under a loss scale."""
    steps = []
    for how in ("whole", "parts", "scaled"):
        model, x, y, dim = language()
        options = {"fisher": "empirical", "reduction": "token_mean", "lr": 0.1}
        opt = preset(model, **options)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7, enabled=how == "scaled")
        total = int((y != -100).sum())
        for _ in range(2):
            opt.zero_grad()
            for part in (slice(0, 6),) if how != "parts" else (slice(0, 2), slice(2, 6)):
                with opt.observe():
                    outputs = model(x[part]).flatten(0, 1)
                    scaler.scale(F.cross_entropy(outputs, y[part].flatten(), reduction="sum") / total).backward()
            scaler.step(opt)
            scaler.update()
        steps.append(nng.PVector.from_model(model))
    assert close(steps[1], steps[0], 1e-10) and close(steps[2], steps[0], 1e-10)


def test_running_scalings_are_those_of_positions():
    model, x, y, dim = language()
    opt = EKFAC(model, reduction="token_mean", scalings_decay=0.0, statistics_decay=0.0, damping=1e-3)
    for _ in range(2):
        opt.zero_grad()
        with opt.observe():
            token_mean(model(x), y, dim).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        opt.step()
    layout, block = next((lay, b) for lay, b in opt.partition.parts[0].blocks.items() if "head.weight" in lay.names)
    v = torch.cat([grads["head.weight"], grads["head.bias"][:, None]], 1)[None]
    assert torch.allclose(block.d, int((y != -100).sum()) * block.basis.tmv(v) ** 2, rtol=1e-8)


def test_a_loss_over_positions_is_warned_about_once():
    model, x, y, dim = language()
    opt = KFAC(model)
    for turn in range(3):
        opt.zero_grad()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with opt.observe():
                token_mean(model(x), y, dim).backward()
        assert [w.category for w in said] == ([ReductionWarning] if turn == 0 else [])
        opt.step()
    for quiet in (KFAC(model, reduction="mean"), KFAC(model, fisher="exact", likelihood=nng.Categorical(-1))):
        with quiet.observe():
            token_mean(model(x), y, dim).backward()
    said = KFAC(model)
    with said.observe(reduction="token_mean"):
        token_mean(model(x), y, dim).backward()


def test_what_is_refused():
    model, x, y, _ = segmentation()
    opt = KFAC(model, reduction="token_mean")
    with pytest.raises(nng.OutputError, match="sums to zero"), opt.observe():
        model(x).square().mean().backward()
    opt.zero_grad()
    exact = KFAC(model, reduction="token_mean", fisher="exact", likelihood=nng.Categorical(1))
    with pytest.raises(nng.ArgumentError, match="inside observe"), exact.observe():
        model(x)
    with pytest.raises(nng.ArgumentError, match="token_mean"):
        KFAC(model, reduction="tokens")


def test_a_model_of_transformers_with_its_own_loss():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=6, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    model = transformers.GPT2LMHeadModel(config).double().train()
    ids = torch.randint(0, 11, (4, 8))
    labels = ids.masked_fill(torch.rand(4, 8) < 0.2, -100)
    opt = NaturalGradient(
        model, nng.PMatDiag, lr=1.0, momentum=0.0, kl_clip=None, damping=1e-2, automatic=True, reduction="token_mean"
    )
    model(input_ids=ids, labels=labels).loss.backward()
    g, before = gradient(opt), nng.PVector.from_model(model)
    opt.step()
    model.eval()
    tokens = int((labels[:, 1:] != -100).sum())
    now = nng.PVector.from_model(model)
    before.copy_to(model)
    fisher = nng.EmpiricalFIM(model, [{"input_ids": ids, "labels": labels}], nng.PMatDiag, loss=nng.CausalLM())
    assert close(before - now, (4 / tokens * fisher).solve(g, 1e-2), 1e-5)  # that loss is computed in float32
