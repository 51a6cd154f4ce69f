"""Files whole or not at all: written beside their place and moved there, locked while they grow, on reserved space."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator

if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> bool:
        try:
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def _try_lock(fd: int) -> bool:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class Lock:
    """An exclusive lock, held by one file handle; it ends with the process that holds it, however that ends.

    Raises :class:`BlockingIOError` where someone else holds it, :class:`OSError` where it cannot be had at all.
    ``create``: make the file ``path`` if there is none.
    """

    def __init__(self, path: str, *, create: bool = True) -> None:
        self.path = path
        while True:
            fd = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
            try:
                if not _try_lock(fd):
                    raise BlockingIOError(errno.EWOULDBLOCK, "it is locked", path)
                if _is_at(fd, path):  # else its last holder removed it meanwhile, and another may have been made
                    self.fd = fd
                    return
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def release(self) -> None:
        """Remove the file and let go."""
        with contextlib.suppress(OSError):
            os.remove(self.path)
        os.close(self.fd)


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def reserve(fd: int, start: int, stop: int, *, new: bool = True) -> None:
    """Have bytes of a file on the disk: a full one is an :class:`OSError` now, no crash when a memory map is written.

    ``new``: they are zero, or may become so, where the system cannot reserve without writing.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(fd, start, stop - start)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
                raise
    if new:
        os.lseek(fd, start, os.SEEK_SET)
        zeros = bytes(2**20)
        while start < stop:
            start += os.write(fd, zeros[: stop - start])


def move(part: str, target: str) -> None:
    """Put a finished file in its place, for good: it survives a loss of power."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, target)
    if os.name == "posix":  # elsewhere folders cannot be opened
        fd = os.open(os.path.dirname(target), os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # file systems that cannot sync a folder
                os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def replaced(target: str) -> Iterator[str]:
    """A path to write to; what is there at the end becomes ``target``, with the permissions of any new file.

    It lies in a folder of its own beside ``target``, which is gone at the end; what killed writers left is removed.
    """
    _remove_left_over(target)
    folder, lock = _own_folder(target)
    try:
        part = os.path.join(folder, "file")
        yield part
        os.chmod(part, stat.S_IMODE(os.stat(os.path.join(folder, "lock")).st_mode))
        move(part, target)
    finally:
        if lock is not None:
            os.close(lock.fd)
        shutil.rmtree(folder, ignore_errors=True)


def _own_folder(target: str) -> tuple[str, Lock | None]:
    """A new folder, and a lock that says that its maker lives; without locks (some file systems) nobody removes it."""
    while True:
        folder = f"{target}.{secrets.token_hex(6)}.part"
        os.mkdir(folder, 0o700)
        try:
            return folder, Lock(os.path.join(folder, "lock"))
        except (FileNotFoundError, BlockingIOError):  # taken for left over before it was locked
            continue
        except OSError:
            return folder, None


def _remove_left_over(target: str) -> None:
    """The folders of :func:`replaced` whose makers died."""
    place, name = os.path.split(target)
    left = re.compile(re.escape(name) + r"\.[0-9a-f]{12}\.part")
    with contextlib.suppress(OSError):
        for folder in (os.path.join(place, entry) for entry in os.listdir(place) if left.fullmatch(entry)):
            with contextlib.suppress(OSError):  # its maker lives
                try:
                    lock = Lock(os.path.join(folder, "lock"), create=False)
                except FileNotFoundError:
                    os.rmdir(folder)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(lock.fd)
