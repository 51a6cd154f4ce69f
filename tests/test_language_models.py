"""Causal language models of ``transformers``, tiny and random, against loops over sequences, positions and classes of
autograd.
"""

import functools
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.cotangents.language_models import is_causal_lm

T = pytest.importorskip("transformers")
f64 = torch.float64
N, TOKENS, VOCABULARY = 3, 5, 7
SMALL = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 4,
    "hidden_size": 4,
    "vocab_size": VOCABULARY,
}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MODELS = {
    "gpt2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=4, n_layer=1, n_head=2, **IDS)
    ),
    "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(max_position_embeddings=8, **SMALL, **IDS)),
    "opt": lambda: T.OPTForCausalLM(
        T.OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=4,
            num_hidden_layers=1,
            ffn_dim=4,
            num_attention_heads=2,
            max_position_embeddings=8,
            word_embed_proj_dim=4,
            dropout=0.0,
            **IDS,
        )
    ),
}
TOLERANCE = {"gpt2": 1e-9, "llama": 1e-6, "opt": 1e-6}  # Llama's norms and OPT's attention compute in float32


def make(name, seed=0):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = MODELS[name]().double().eval()
    model.set_attn_implementation("eager")  # the reference differentiates twice
    for p in model.parameters():
        p.data = 0.4 * torch.randn_like(p)
    return model


def batch(seed=0, masked=True, labels=True):
    """Random tokens; padding on the right, and labels of which some are ignored."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCABULARY, (N, TOKENS), generator=g)
    made = {"input_ids": tokens}
    if masked:
        made["attention_mask"] = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [3], [4]])).long()
    if labels:
        y = torch.randint(0, VOCABULARY, (N, TOKENS), generator=g)
        made["labels"] = y.masked_fill(torch.rand(y.shape, generator=g) < 0.25, -100)
    return made


def logits_of(model, data, i):
    return model(**{k: v[i : i + 1] for k, v in data.items() if k != "labels"}).logits[0]


def positions(data, i):
    """``(s, label)`` of the counted positions of a sequence, by the letter: the label of ``s`` is that of ``s + 1``."""
    found = []
    for s in range(TOKENS - 1):
        label = 0 if "labels" not in data else int(data["labels"][i, s + 1])
        seen = "attention_mask" not in data or bool(data["attention_mask"][i, s + 1])
        if label != -100 and seen:
            found.append((s, label))
    return found


def flat(grads, params):
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(grads, params)])


def reference(model, data, what, reduction="sum"):
    """The matrix of all parameters, an example and a position at a time."""
    params = [p for p in model.parameters() if p.requires_grad]
    total = 0
    for i in range(N):
        counted = positions(data, i)
        share = 1 if reduction == "sum" else 1 / max(1, len(counted))
        f = logits_of(model, data, i)
        if what in ("fim", "ggn"):
            for s, _ in counted:
                p = f[s].detach().softmax(0)
                j = torch.stack(
                    [
                        flat(torch.autograd.grad(f[s, k], params, retain_graph=True, allow_unused=True), params)
                        for k in range(VOCABULARY)
                    ]
                )
                total = total + share * j.T @ (torch.diag(p) - p[:, None] * p) @ j
            continue
        loss = share * sum((-f[s].log_softmax(0)[y] for s, y in counted), f.sum() * 0)
        grads = torch.autograd.grad(loss, params, create_graph=what == "hessian", allow_unused=True)
        g = flat(grads, params)
        if what == "empirical":
            total = total + g[:, None] * g
        else:
            total = total + torch.stack(
                [flat(torch.autograd.grad(v, params, retain_graph=True, allow_unused=True), params) for v in g]
            )
    return (total / N).detach()


def close(x, y, tol):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


MEASURES = {
    "fim": lambda m, data, r, loss: nng.FIM(
        m, [data], r, likelihood="categorical" if loss == "cross_entropy" else loss
    ),
    "ggn": lambda m, data, r, loss: nng.GGN(m, [data], r, loss=loss),
    "empirical": lambda m, data, r, loss: nng.EmpiricalFIM(m, [data], r, loss=loss),
    "hessian": lambda m, data, r, loss: nng.Hessian(m, [data], r, loss=loss),
}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("what", MEASURES)
@pytest.mark.parametrize("name", MODELS)
def test_every_measure(name, what, masked):
    """By itself, where the name of the loss is all that was said, and when it is named."""
    model, data = make(name), batch(masked=masked)
    expected = reference(model, data, what)
    close(MEASURES[what](model, data, nng.PMatDense, nng.CausalLM()).to_dense(), expected, TOLERANCE[name])
    implicit = MEASURES[what](model, data, nng.PMatImplicit, "cross_entropy")
    v = nng.PVector.randn(implicit.layer_collection, 2, dtype=f64)
    close(implicit.mv(v).flat(), v.flat() @ expected, TOLERANCE[name])


@pytest.mark.parametrize("what", ["ggn", "empirical", "hessian"])
def test_the_mean_over_positions(what):
    model, data = make("gpt2"), batch(3)
    data["labels"][2] = -100  # a sequence of which nothing counts
    expected = reference(model, data, what, "mean")
    loss = nng.CausalLM(reduction="mean")
    close(MEASURES[what](model, data, nng.PMatDense, loss).to_dense(), expected, 1e-9)
    implicit = MEASURES[what](model, data, nng.PMatImplicit, loss)
    v = nng.PVector.randn(implicit.layer_collection, dtype=f64)
    close(implicit.mv(v).flat(), expected @ v.flat(), 1e-9)


@pytest.mark.parametrize("name", ["gpt2"])
def test_monte_carlo(name):
    """Draws at counted positions only, unbiased, and the same whatever the batches."""
    model, data = make(name), batch(1)
    draw = lambda loader, samples, r=nng.PMatDense: nng.FIM_MonteCarlo(
        model, loader, r, samples=samples, generator=torch.Generator().manual_seed(0)
    )
    exact = reference(model, data, "fim")
    drawn = draw([data], 600).to_dense()
    assert float((drawn - exact).norm() / exact.norm()) < 0.15
    parts = [{k: v[:1] for k, v in data.items()}, {k: v[1:] for k, v in data.items()}]
    close(draw(parts, 3).to_dense(), draw([data], 3).to_dense(), TOLERANCE[name])


def test_monte_carlo_scores_are_those_of_the_drawn_labels():
    loss, g = nng.CausalLM(), torch.Generator().manual_seed(0)
    f = torch.randn(N, TOKENS, VOCABULARY, dtype=f64, generator=g)
    drawn = loss.sample(f, lambda *size: torch.rand(N, *size, dtype=f64, generator=g))
    assert drawn.shape == (N, TOKENS)
    y = batch()["labels"]
    x = f.clone().requires_grad_()
    total = sum(
        x[i, s].log_softmax(0)[drawn[i, s + 1]] for i in range(N) for s in range(TOKENS - 1) if y[i, s + 1] != -100
    )
    close(loss.score(f, drawn, y), torch.autograd.grad(total, x)[0], 1e-12)
    assert not loss.score(f, drawn, y)[:, -1].any()


def test_an_ignored_class_may_be_drawn():
    """``ignore_index=0`` of padding is a class like any other to the model."""
    f = torch.zeros(1, 3, 4, dtype=f64)
    f[..., 0] = 50
    loss, y = nng.CausalLM(ignore_index=0), torch.tensor([[1, 2, 0]])
    drawn = loss.sample(f, lambda *size: torch.full((1, *size), 0.5, dtype=f64))
    score = loss.score(f, drawn, y)
    p = f[0, 0].softmax(0)
    expected = -p
    expected[0] = p[1:].sum()
    close(score[0, 0], expected, 1e-10)
    assert not score[0, 1:].any()


def test_own_losses_of_transformers():
    """The gradient of HF's loss of a batch is that of the sequences' mean losses, weighted by what they count."""
    model, data = make("gpt2"), batch(masked=False)
    counts = torch.tensor([len(positions(data, i)) for i in range(N)], dtype=f64)
    each = nng.CausalLM(reduction="mean")(model(data["input_ids"]).logits, data["labels"])
    close((each.detach() * counts).sum() / counts.sum(), model(**data).loss.detach().double(), 1e-6)
    close(
        nng.CausalLM()(model(data["input_ids"]).logits, data["labels"]).detach().sum() / counts.sum(),
        model(**data).loss.detach().double(),
        1e-6,
    )


def test_without_labels():
    """A likelihood counts every position that predicts an unmasked token; a loss asks for labels."""
    model, data = make("gpt2"), batch(labels=False)
    close(
        nng.FIM(model, [data], nng.PMatDense, likelihood=nng.CausalLM()).to_dense(), reference(model, data, "fim"), 1e-9
    )
    with pytest.raises(nng.LoaderError, match="needs targets"):
        nng.GGN(model, [data], nng.PMatDense, loss=nng.CausalLM())
    with pytest.raises(nng.OutputError, match=r"causal language model.*CausalLM\(\)"):
        nng.FIM(model, [data], nng.PMatDense)


def test_padding_on_the_left():
    """The first token is predicted by padding: its label is no padding, so it counts, as it does to HF."""
    model, data = make("gpt2"), batch()
    data["attention_mask"] = data["attention_mask"].flip(1)
    close(nng.GGN(model, [data], nng.PMatDense, loss="cross_entropy").to_dense(), reference(model, data, "ggn"), 1e-9)


def test_logits_that_are_shifted():
    model, data = make("gpt2"), batch()
    expected = reference(model, data, "ggn")
    cut = lambda b: model(**{k: v for k, v in b.items() if k != "labels"}).logits[:, :-1]
    shifted = nng.CausalLM(logits_are_shifted=True)
    close(nng.GGN(model, [data], nng.PMatDense, loss=shifted, function=cut).to_dense(), expected, 1e-9)
    close(nng.FIM(model, [data], nng.PMatDense, likelihood=shifted, function=cut).to_dense(), expected, 1e-9)
    with pytest.raises(nng.OutputError, match="logits_are_shifted"):
        nng.GGN(model, [data], nng.PMatDense, loss="cross_entropy", function=cut)
    before = {**data, "labels": torch.cat([data["labels"][:, 1:], torch.full((N, 1), -100)], 1)}
    close(nng.GGN(model, [before], nng.PMatDense, loss=shifted).to_dense(), expected, 1e-9)


def test_tuples_of_tokens_and_labels():
    model, data = make("gpt2"), batch(masked=False)
    pair = (data["input_ids"], data["labels"])
    close(nng.GGN(model, [pair], nng.PMatDense, loss=nng.CausalLM()).to_dense(), reference(model, data, "ggn"), 1e-9)
    for measure, how in ((nng.GGN, {"loss": "cross_entropy"}), (nng.FIM, {}), (nng.Hessian, {"loss": "cross_entropy"})):
        with pytest.raises(nng.OutputError, match="causal language model"):
            measure(model, [pair], nng.PMatDense, **how)


def test_any_model_of_tokens():
    """A model that is none of transformers' is judged by what was said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 3), nn.Linear(3, VOCABULARY)).double()
    data = batch(masked=False)
    pair = (data["input_ids"], data["labels"])

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids):
            return types.SimpleNamespace(logits=self.inner(input_ids))

    expected = reference(Wrapped(), data, "ggn")
    close(nng.GGN(model, [pair], nng.PMatDense, loss=nng.CausalLM()).to_dense(), expected, 1e-10)
    unshifted = nng.GGN(model, [pair], nng.PMatDense, loss="cross_entropy")
    close(unshifted.to_dense(), nng.GGN(model, [pair], nng.PMatDense, loss=nng.CrossEntropy(dim=-1)).to_dense(), 1e-12)
    assert float((unshifted.to_dense() - expected).norm() / expected.norm()) > 0.01


def test_everything_that_takes_a_loss():
    model, data = make("gpt2"), batch()
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(N):
        loss = sum(-logits_of(model, data, i)[s].log_softmax(0)[y] for s, y in positions(data, i))
        rows.append(flat(torch.autograd.grad(loss, params, allow_unused=True), params))
    g = torch.stack(rows)
    centred = g - g.mean(0)
    for loss in ("cross_entropy", nng.CausalLM()):
        covariance = nng.GradientCovariance(model, [data], nng.PMatDense, loss=loss)
        close(covariance.to_dense(), centred.T @ centred / N, 1e-9)
        alpha = nng.analysis.coherence(model, [data], loss=loss).alpha
        close(alpha.to(f64), g.mean(0).square().sum() / g.square().sum(1).mean(), 1e-8)
        stiff = nng.analysis.stiffness(model, [data], loss=loss)
        close(stiff.matrix.to(f64), F.normalize(g) @ F.normalize(g).T, 1e-6)


def test_optimizers_take_it_as_likelihood():
    model, data = make("gpt2"), batch(masked=False)
    opt = nng.optim.KFAC(
        model, lr=0.01, fisher="monte_carlo", likelihood=nng.CausalLM(), outputs=lambda out: out.logits
    )
    with opt.observe():
        model(**data).loss.backward()
    opt.step()


# -- models for which the shift is not known, and those that have none -------------------------------------------------


def test_masked_language_models_are_not_shifted():
    torch.manual_seed(0)
    config = T.BertConfig(max_position_embeddings=8, **SMALL)
    model = T.BertForMaskedLM(config).double().eval()
    data = batch(masked=False)
    got = nng.EmpiricalFIM(model, [data], nng.PMatDiag, loss="cross_entropy").trace()
    other = nng.EmpiricalFIM(model, [data], nng.PMatDiag, loss=nng.CrossEntropy(dim=-1)).trace()
    close(got, other, 1e-12)


def test_encoder_decoders_are_not_shifted():
    torch.manual_seed(0)
    config = T.T5Config(
        vocab_size=VOCABULARY, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2, decoder_start_token_id=0, **{**IDS}
    )
    model = T.T5ForConditionalGeneration(config).double().eval()
    data = {"input_ids": batch()["input_ids"], "decoder_input_ids": batch(1)["input_ids"], "labels": batch(2)["labels"]}
    got = nng.EmpiricalFIM(model, [data], nng.PMatDiag, loss="cross_entropy").trace()
    close(got, nng.EmpiricalFIM(model, [data], nng.PMatDiag, loss=nng.CrossEntropy(dim=-1)).trace(), 1e-12)


def test_decoders_whose_own_loss_does_not_shift_are_asked_about():
    """BART's decoder compares logits with the label of the same position."""
    torch.manual_seed(0)
    config = T.BartConfig(
        vocab_size=VOCABULARY,
        d_model=4,
        decoder_layers=1,
        encoder_layers=1,
        decoder_attention_heads=2,
        encoder_attention_heads=2,
        decoder_ffn_dim=4,
        encoder_ffn_dim=4,
        max_position_embeddings=16,
        is_decoder=True,
        is_encoder_decoder=False,
        **IDS,
    )
    model = T.BartForCausalLM(config).double().eval()
    for measure, how in ((nng.EmpiricalFIM, {"loss": "cross_entropy"}), (nng.FIM, {})):
        with pytest.raises(nng.OutputError, match="BartForCausalLM"):
            measure(model, [batch()], nng.PMatDiag, **how)
    nng.EmpiricalFIM(model, [batch()], nng.PMatDiag, loss=nng.CrossEntropy(dim=-1))
    nng.EmpiricalFIM(model, [batch()], nng.PMatDiag, loss=nng.CausalLM())


def test_classifiers_on_top_of_a_causal_model():
    """Outputs ``(n, c)`` of a function are classes."""
    model, data = make("gpt2"), {**batch(labels=False), "labels": torch.tensor([0, 3, 5])}
    last = lambda b: model(**{k: v for k, v in b.items() if k != "labels"}).logits[:, 0]
    a = nng.GGN(model, [data], nng.PMatDiag, loss="cross_entropy", function=last).trace()
    close(a, nng.GGN(model, [data], nng.PMatDiag, loss=nng.CrossEntropy(), function=last).trace(), 1e-12)
    close(nng.FIM(model, [data], nng.PMatDiag, function=last).trace(), a, 1e-12)


def test_wrapped_models_are_seen_through():
    model = make("gpt2")
    assert (
        is_causal_lm(model)
        and is_causal_lm(nn.DataParallel(model))
        and not is_causal_lm(nn.Linear(2, 2))
        and not is_causal_lm(None)
    )


class Held(nn.Module):
    """A module of one's own around a model, as of a training framework."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **batch):
        return self.inner(**batch)


def test_a_model_that_holds_one_is_asked_about():
    model, data = Held(make("gpt2")), batch()
    for measure, how in ((nng.GGN, {"loss": "cross_entropy"}), (nng.FIM, {}), (nng.Hessian, {"loss": "cross_entropy"})):
        with pytest.raises(nng.OutputError, match="holds a causal language model"):
            measure(model, [data], nng.PMatDense, **how)
    expected = nng.GGN(model.inner, [data], nng.PMatDense, loss="cross_entropy").to_dense()
    close(nng.GGN(model, [data], nng.PMatDense, loss=nng.CausalLM()).to_dense(), expected, 1e-12)


REFUSED = {
    "outputs": (
        lambda: nng.CausalLM()(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)),
        nng.OutputError,
        "n, t, V",
    ),
    "one token": (
        lambda: nng.CausalLM()(torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.long)),
        nng.OutputError,
        "at least two",
    ),
    "labels": (
        lambda: nng.CausalLM()(torch.zeros(2, 4, 3), torch.zeros(2, 3, dtype=torch.long)),
        nng.OutputError,
        "a label a token",
    ),
    "range": (lambda: nng.CausalLM()(torch.zeros(2, 4, 3), torch.full((2, 4), 7)), nng.OutputError, "from 0 to 2"),
    "reduction": (lambda: nng.CausalLM(reduction="none"), nng.ArgumentError, "'sum' or 'mean'"),
    "mean": (
        lambda: nng.FIM(nn.Linear(2, 2), torch.zeros(2, 2), likelihood=nng.CausalLM(reduction="mean")),
        nng.ArgumentError,
        "no likelihood",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    call, kind, text = REFUSED[name]
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_work_do_not_matter(seed, monkeypatch):
    """Rows worked on one at a time give what all at once do."""
    from nngeom.cotangents import softmax

    model, data = make("llama", seed), batch(seed)
    v = nng.PVector.randn(nng.LayerCollection.from_model(model), dtype=f64)
    products = functools.partial(
        lambda: [MEASURES[w](model, data, nng.PMatImplicit, "cross_entropy").mv(v).flat() for w in MEASURES]
    )
    whole = products()
    monkeypatch.setattr(softmax, "NUMBERS", 1)
    for a, b in zip(products(), whole):
        close(a, b, 1e-10)
