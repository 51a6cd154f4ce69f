"""Models as they come from ``transformers``, tiny and random: tied heads, masks, dict batches with labels."""

import pytest
import torch
from cases import DIAGONAL, TRACE, representation

import nngeom as nng

transformers = pytest.importorskip("transformers")
T = transformers
f64 = torch.float64


def ids(n=3, t=5):
    return torch.randint(3, 20, (n, t))


def text(**more):
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, 3:] = 0
    return {"input_ids": tokens, "attention_mask": mask, **more}


def tokens_labels():
    y = ids()
    y[1, 3:] = -100
    return y


ATTENTION = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "hidden_size": 8}
MODELS = {
    "gpt2": (
        lambda: T.GPT2LMHeadModel(
            T.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        ),
        lambda: text(labels=tokens_labels()),
    ),
    "bert": (
        lambda: T.BertForSequenceClassification(
            T.BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=3, **ATTENTION)
        ),
        lambda: text(labels=torch.tensor([0, 1, 2])),
    ),
    "llama": (
        lambda: T.LlamaForCausalLM(
            T.LlamaConfig(vocab_size=20, max_position_embeddings=8, bos_token_id=0, eos_token_id=0, **ATTENTION)
        ),
        lambda: text(labels=tokens_labels()),
    ),
    "t5": (
        lambda: T.T5ForConditionalGeneration(
            T.T5Config(
                vocab_size=20,
                d_model=8,
                d_kv=4,
                d_ff=8,
                num_layers=1,
                num_heads=2,
                decoder_start_token_id=0,
                eos_token_id=0,
            )
        ),
        lambda: text(decoder_input_ids=ids(), labels=tokens_labels()),
    ),
    "vit": (
        lambda: T.ViTForImageClassification(T.ViTConfig(image_size=8, patch_size=4, num_labels=3, **ATTENTION)),
        lambda: {"pixel_values": torch.randn(3, 3, 8, 8, dtype=f64), "labels": torch.tensor([0, 1, 2])},
    ),
    "resnet": (
        lambda: T.ResNetForImageClassification(
            T.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
        ),
        lambda: {"pixel_values": torch.randn(3, 3, 16, 16, dtype=f64), "labels": torch.tensor([0, 1, 2])},
    ),
}


@pytest.fixture(params=MODELS, scope="module")
def wild(request):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    make, draw = MODELS[request.param]
    model = make().double().eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    batch = draw()
    language = batch["labels"].ndim == 2
    return (
        request.param,
        model,
        batch,
        "categorical" if not language else nng.Categorical(dim=-1),
        rows(model, batch),
        language,
    )


def rows(model, batch):
    """``[(logits (positions, c), J (positions, c, d))]``, an example at a time."""
    params = [p for p in model.parameters() if p.requires_grad]
    result = []
    for i in range(3):
        inputs = {k: v[i : i + 1] for k, v in batch.items() if k != "labels"}
        out = model(**inputs).logits[0]
        out = out.reshape(-1, out.shape[-1])
        grads = [torch.autograd.grad(f, params, retain_graph=True, allow_unused=True) for f in out.flatten()]
        j = torch.stack(
            [
                torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gs, params)])
                for gs in grads
            ]
        )
        result.append((out.detach(), j.view(*out.shape, -1)))
    return result


def reference_fisher(wild):
    _, _, batch, _, parts, language = wild
    total = 0
    for i, (logits, j) in enumerate(parts):
        for t in range(len(logits)):
            if not language or batch["labels"][i, t] != -100:
                p = logits[t].softmax(0)
                root = (torch.diag(p) - p[:, None] * p) @ j[t]
                total = total + j[t].T @ root
    return total / 3


def test_fisher_in_every_representation(wild):
    name, model, batch, likelihood, _, _ = wild
    f = reference_fisher(wild)
    tol = 1e-6 if name in ("llama", "t5") else 1e-9  # their norms compute in float32 inside
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=tol, atol=tol * float(f.abs().max()))
    measure = lambda name: nng.FIM(model, [batch], representation(name, model), likelihood=likelihood)
    measured = {name: measure(name) for name in (*TRACE, "kfac")}
    kfac, ekfac = measured.pop("kfac"), measured["ekfac"]
    for name, m in measured.items():
        close(m.trace(), f.trace())
        if name in DIAGONAL:
            close(m.diag().flat(), f.diagonal())
    v = nng.PVector.randn(nng.LayerCollection.from_model(model), dtype=f64)
    close(measured["dense"].to_dense(), f)
    close(measured["implicit"].mv(v).flat(), f @ v.flat())
    assert (ekfac.to_dense() - f).norm() <= (kfac.to_dense() - f).norm() * (1 + 1e-6)


def test_jacobian_and_gram(wild):
    name, model, batch, _, parts, _ = wild
    j = torch.stack([j.flatten(0, 1) for _, j in parts], 1)  # (c, n, d)
    tol = 1e-6 if name in ("llama", "t5") else 1e-9
    flat = lambda **b: model(**{k: v for k, v in b.items() if k != "labels"}).logits.flatten(1)
    got = nng.Jacobian(model, [batch], function=lambda b: flat(**b)).tensor
    torch.testing.assert_close(got, j, rtol=tol, atol=tol)
    k = nng.GramMatrix(model, [batch], function=lambda b: flat(**b))
    torch.testing.assert_close(k.to_dense(), j.flatten(0, 1) @ j.flatten(0, 1).T, rtol=tol, atol=10 * tol)


def test_every_large_parameter_has_structure(wild):
    name, model, batch, _, _, _ = wild
    report = nng.explain(model, batch)
    for row in report.rows:
        small = torch.Size(row.shape).numel() <= 64
        assert row.structure in ("kronecker", "lookup", "tied", "exact") or (name == "t5" and small), row
    if name == "gpt2":
        assert (
            report["transformer.wte.weight"].structure == "tied"
            and report["transformer.wpe.weight"].structure == "lookup"
        )
