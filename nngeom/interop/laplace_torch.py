"""What is taken of ``laplace-torch``, without the warnings of what it imports in turn."""

import warnings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*torch.jit")  # of asdl
    from laplace.curvature import CurvatureInterface, EFInterface, GGNInterface
    from laplace.curvature.curvlinops import CurvlinopsGGN
    from laplace.utils import Kron

__all__ = ["CurvatureInterface", "CurvlinopsGGN", "EFInterface", "GGNInterface", "Kron"]
