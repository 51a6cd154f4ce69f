"""
Watch a training: the tracker in Hugging Face's Trainer
=======================================================

The same for a small BERT that learns which class a line of digits belongs to, read as sixty-four tokens of
seventeen grey values.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
from digits import digits
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from transformers.utils import logging

from nngeom import track

logging.set_verbosity_error()
x, y, x_test, y_test = digits()
sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
config = BertConfig(vocab_size=17, max_position_embeddings=64, num_labels=10, initializer_range=0.2, **sizes, **plain)
torch.manual_seed(0)
model = BertForSequenceClassification(config)
tokens = lambda images: (16 * images).long()
rows = [{"input_ids": t, "labels": label} for t, label in zip(tokens(x), y)]
probe = [{"input_ids": tokens(x_test[:50]), "labels": y_test[:50]}]

names = ["accuracy", "effective_rank", "alignment"]
tracker = track.Tracker(model, probe, metrics=names, every=25)
quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "use_cpu": True}
with tempfile.TemporaryDirectory() as folder:
    settings = {"num_train_epochs": 12, "per_device_train_batch_size": 64, "learning_rate": 3e-3}
    arguments = TrainingArguments(folder, **settings, **quiet)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[track.huggingface_callback(tracker)])
    trainer.train()

history = tracker.history
figure, axes = plt.subplots(1, 3)
for axis, name in zip(axes, ("probe_accuracy", *names[1:])):
    axis.plot(history["step"], history[name])
    axis.set_title(name)
    axis.set_xlabel("step")
plt.show()
