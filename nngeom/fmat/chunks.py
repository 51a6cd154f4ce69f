"""Chunks of rows in a kernel: where each starts and what it spans, and neighbours as one."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nngeom.core.parts import join, joins
from nngeom.sweep.sweep import Chunk

Key = tuple[int, int]  # (first example, first output) of a chunk: the order in which chunks are captured


def key(chunk: Chunk) -> Key:
    """Where a chunk starts."""
    return chunk.start, chunk.cotangents[0]


def span(chunk: Chunk) -> tuple[slice, slice]:
    """Its outputs and its examples, as slices of the whole kernel."""
    width = next((j.shape[0] for j in chunk.jacobians.values()), chunk.cotangents[1])
    return slice(chunk.cotangents[0], chunk.cotangents[0] + width), slice(chunk.start, chunk.start + chunk.examples)


@dataclass
class Group:
    """Chunks held in memory together; neighbours of the same structure are joined."""

    chunks: list[Chunk]
    last: Key


def joined(chunks: list[Chunk], most: int | None) -> list[Chunk]:
    """Chunks of neighbouring examples, with the same outputs and structure, as one of at most ``most`` examples: small
    batches cost nothing extra.
    """
    by_outputs: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in chunks:
        k, _ = span(chunk)
        by_outputs.setdefault((k.start, k.stop), []).append(chunk)
    out = []
    for same in by_outputs.values():
        run = [same[0]]
        for chunk in same[1:]:
            fits = most is None or chunk.start + chunk.examples - run[0].start <= most
            if fits and chunk.start == run[-1].start + run[-1].examples and _fits(run[-1], chunk):
                run.append(chunk)
            else:
                out.append(_join(run))
                run = [chunk]
        out.append(_join(run))
    return out


def _fits(x: Chunk, y: Chunk) -> bool:
    return x.jacobians.keys() == y.jacobians.keys() and all(
        joins(j, y.jacobians[lay]) for lay, j in x.jacobians.items()
    )


def _join(run: list[Chunk]) -> Chunk:
    if len(run) == 1:
        return run[0]
    jacobians = {lay: join(j, [c.jacobians[lay] for c in run[1:]]) for lay, j in run[0].jacobians.items()}
    return replace(run[0], jacobians=jacobians, examples=sum(c.examples for c in run))
