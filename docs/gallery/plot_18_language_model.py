"""
Fisher information of a language model
======================================

A small causal language model of characters learns the descriptions of scikit-learn's data sets. Its likelihood,
shifted labels included, is taken from the model's class; the Fisher information of its layers is read off a KFAC
matrix.
"""

import matplotlib.pyplot as plt
import torch
from sklearn import datasets
from transformers import GPT2Config, GPT2LMHeadModel

import nngeom as nng

loaders = (
    datasets.load_digits,
    datasets.load_iris,
    datasets.load_wine,
    datasets.load_breast_cancer,
    datasets.load_diabetes,
)
text = "\n".join(load().DESCR for load in loaders)
alphabet = sorted(set(text))
data = torch.tensor([alphabet.index(character) for character in text])
data = data[: len(data) // 32 * 32].view(-1, 32)

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=len(alphabet), n_positions=32, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
)
model = GPT2LMHeadModel(config)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for _ in range(150):
    ids = data[torch.randint(0, len(data), (32,))]
    loss = model(input_ids=ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"{len(data)} lines of 32 characters; loss {loss.item():.2f} nats a character")

model.eval()
batch = {"input_ids": data[:32], "labels": data[:32]}
fisher = nng.FIM_MonteCarlo(model, [batch], nng.PMatKFAC, likelihood=nng.CausalLM(), samples=1)
layers = {name: block.trace().item() for name, block in fisher.by_layer().items()}
print(f"trace {fisher.trace().item():.1f}, log-determinant at damping 0.01 {fisher.logdet(1e-2).item():.0f}")
names = [name.removeprefix("transformer.") for name in layers]
plt.figure(figsize=(6.4, 4.5))
plt.barh(names[::-1], list(layers.values())[::-1])
plt.xscale("log")
plt.xlabel("trace of the Fisher matrix of the layer")
plt.show()
