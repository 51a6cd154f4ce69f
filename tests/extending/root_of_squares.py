"""A kind of curvature: what an optimizer keeps and how it preconditions, other than by averaging and inverting."""

import nngeom as nng
from nngeom.optim import Curvature, keeps
from nngeom.pmat import DiagBlock


class PMatRootOfSquares(nng.PMatDiag):
    """The diagonal; in an optimizer gradients are divided by its square root, as RMSprop does by that of a batch's."""


@keeps(PMatRootOfSquares)
class RootOfSquares(Curvature):
    """``g / (sqrt(m) + damping)`` with ``m`` the running mean of the squared gradients of single examples."""

    def observe(self, chunk, schedule):
        """Take in the rows of some examples."""
        if schedule.statistics or not self.blocks:
            squares = lambda part: {layout: {"m": rows.square()} for layout, rows in part.jacobians.items()}
            self.pending.add(squares, self.selection.restrict(chunk))

    def precondition(self, gradient, seen, schedule):
        """Precondition these parameters' part of ``gradient [d]`` in place, and begin anew."""
        if self.pending.sums:
            self.averages.take(self.pending, seen.examples, seen.scale, schedule.decay)
            self.blocks = {layout: DiagBlock(t["m"].sqrt()) for layout, t in self.averages.read().items()}
        self.forget()
        if self.blocks:
            packed = self.packed(gradient)
            for x, root in zip(packed.blocks, self.blocks.values()):
                x.div_(root.d + schedule.damping.value)
            packed.write()
