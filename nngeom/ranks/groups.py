"""What is given as ``process_group``, checked."""

from __future__ import annotations

from typing import Any

from nngeom.core.errors import ArgumentError, ArgumentTypeError

EXPECTED = "expected a torch.distributed ProcessGroup, a 1-D DeviceMesh such as mesh['dp'], or None"


def checked(process_group: Any, dist: Any) -> Any:
    """The group that is meant, by what ``torch.distributed`` (``dist``) says; errors as of :meth:`Team.of`."""
    mesh = hasattr(process_group, "get_group") and hasattr(process_group, "mesh_dim_names")
    outside = process_group == dist.GroupMember.NON_GROUP_MEMBER if isinstance(process_group, int) else False
    if isinstance(process_group, bool) or not (mesh or outside or isinstance(process_group, dist.ProcessGroup)):
        raise ArgumentTypeError(f"process_group is {process_group!r}; {EXPECTED}")
    if not dist.is_initialized():
        raise ArgumentError(
            "process_group is given and torch.distributed does not run; call torch.distributed.init_process_group "
            "first, in every process (torchrun --nproc-per-node N script.py)"
        )
    if outside:
        raise ArgumentError(f"rank {dist.get_rank()} is not in the process group; call it on its ranks only")
    if not mesh:
        return process_group
    if process_group.ndim != 1:
        raise ArgumentTypeError(f"process_group is a mesh of {process_group.ndim} axes; {EXPECTED}")
    return process_group.get_group()
