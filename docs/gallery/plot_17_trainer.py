"""
Watch a training: the tracker in Hugging Face's Trainer
=======================================================

The same for a small BERT that learns which class a line of digits belongs to, read as sixty-four tokens of seventeen grey values.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
from digits import digits
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from nngeom import track

logging.set_verbosity_error()
x, y, x_test, y_test = digits()
config = BertConfig(vocab_size=17, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                    max_position_embeddings=64, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
torch.manual_seed(0)
model = BertForSequenceClassification(config)
tokens = lambda images: (16 * images).long()
rows = [{"input_ids": t, "labels": label} for t, label in zip(tokens(x), y)]
probe = [{"input_ids": tokens(x_test[:50]), "labels": y_test[:50]}]

tracker = track.Tracker(model, probe, metrics=["accuracy", "effective_rank", "label_alignment"], every=15)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(folder, num_train_epochs=6, per_device_train_batch_size=64, learning_rate=3e-3, report_to="none",
                                  disable_tqdm=True, save_strategy="no", logging_strategy="no", use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[track.huggingface_callback(tracker)])
    trainer.train()

history = tracker.history
figure, axes = plt.subplots(1, 3)
for axis, name in zip(axes, ("accuracy", "effective_rank", "label_alignment")):
    axis.plot(history["step"], history[name])
    axis.set_title(name)
    axis.set_xlabel("step")
plt.show()
