"""How the figures of the gallery look, and that no example sees another's settings."""

import logging
import warnings


def plain(conf, fname) -> None:
    """Before every example: one size and one style of figures, one thread, the same draws."""
    import matplotlib.pyplot as plt
    import torch

    plt.rcParams.update(
        {
            "figure.figsize": (6.4, 3.6),
            "figure.dpi": 100,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "image.cmap": "viridis",
        }
    )
    warnings.filterwarnings("ignore")
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # of fonts for formulas that are not there
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
