"""A part of all themes, for sizes at which the whole would take long."""

from __future__ import annotations

import faults
import moments
import products
import training
from launch import Check

ALL = faults.CHECKS | moments.CHECKS | products.CHECKS | training.CHECKS
NAMED = [f"FIM mlp {kind}" for kind in ("dense", "kfac", "ekfac", "low-rank", "mixed")]
NAMED += ["FIM_MonteCarlo mlp dense", "estimate mlp kfac", "Hessian dense", "GradientCovariance ekfac"]
NAMED += ["FIM_MonteCarlo mlp implicit", "other vectors", "kfac", "ekfac batch", "low rank", "kfac, uneven"]
NAMED += ["a_loader_that_raises", "numbers_that_are_not_finite", "other_models", "other_calls", "no_examples"]
NAMED += ["shards", "numbers_of_examples", "structure_that_differs", "a_singular_matrix"]
CHECKS: dict[str, Check] = {name: ALL[name] for name in NAMED}
