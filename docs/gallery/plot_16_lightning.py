"""
Watch a training: the tracker in Lightning
==========================================

A tracker follows quantities of the tangent kernel on a probe set while Lightning trains; one callback, and nothing
else changes.
"""

import logging

import lightning as L
import matplotlib.pyplot as plt
import torch
from digits import digits, mlp
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nngeom import track

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
x, y, x_test, y_test = digits()


class Digits(L.LightningModule):
    """A perceptron under cross-entropy."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def training_step(self, batch, _):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


module = Digits()
probe, names = [(x_test[:100], y_test[:100])], ["accuracy", "effective_rank", "alignment"]
tracker = track.Tracker(module.net, probe, metrics=names, every=10)
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = L.Trainer(max_epochs=10, accelerator="cpu", callbacks=[track.lightning_callback(tracker)], **options)
trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=100, shuffle=True))

history = tracker.history
figure, axes = plt.subplots(1, 3)
for axis, name in zip(axes, ("probe_accuracy", *names[1:])):
    axis.plot(history["step"], history[name])
    axis.set_title(name)
    axis.set_xlabel("step")
plt.show()
