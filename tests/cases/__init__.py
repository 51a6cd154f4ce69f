"""What every suite tries: models, representations, likelihoods and losses, each list in one place."""

from cases.attention import Attention
from cases.operations import Head, Unseen
from cases.representations import (
    DIAGONAL,
    ENTRIES,
    FUNCTION_SPACE,
    MAPS,
    PARAMETER_SPACE,
    STORED,
    STORED_KERNELS,
    TRACE,
    WHOLE,
    representation,
)
from cases.zoo import CASES, Case, build
