"""The operations that keep examples apart whatever the numbers, with where they leave them: a file a family.

A rule is asked for the axis that holds the examples in an output and answers for one input: an axis, ``None`` where all
examples share that input, or :data:`ASK`. It may only rest on sizes and constants of the operation. A wrong rule would
be a wrong result that nobody sees: each is compared with derivatives of the operation in ``tests/test_placement.py``.
"""

from nngeom.pullback.safe import along, entries, layers, products, views
from nngeom.pullback.safe.entries import entrywise
from nngeom.pullback.safe.rule import ASK, RULES, Place, Rule, Sizes, Unknown

__all__ = ["ASK", "RULES", "Place", "Rule", "Sizes", "Unknown", "entrywise"]
