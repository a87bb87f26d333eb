"""Host memory for the pure-Python twin: an :class:`Arena` is an ``mmap``, a :class:`View` a numpy array.

Huge pages, locking and CUDA registration need the C extension. Two differences remain besides, because a Python class
of 3.11 cannot export a buffer of its own: ``live_views`` counts views, not ``memoryview(arena)``; and where
such a memoryview outlives ``close()``, the memory goes when the arena object does.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import operator
import os
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

import numpy as np

Choice = Literal["auto", "require", "off"]

_MADV_POPULATE_WRITE = 23  # Linux 5.14
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1


class Info(TypedDict):
    requested: int
    nbytes: int
    page_bytes: int
    huge: str
    locked: bool
    cuda: bool
    fd: int
    notes: list[str]


def _size(value: int) -> int:
    value = operator.index(value)
    if value < 0:
        raise ValueError(f"a size or position cannot be negative, got {value}")
    if value > sys.maxsize:
        raise OverflowError(f"{value} is no possible size")
    return value


def _descriptor(fd: Any) -> int:
    fd = operator.index(fd.fileno() if hasattr(fd, "fileno") else fd)
    if fd < 0:
        raise ValueError(f"file descriptor cannot be a negative integer ({fd})")
    return int(fd)


def _cgroup_rooms() -> Iterator[tuple[int, str]]:
    """Bytes left under the memory limit of this process's cgroups (v1 and v2) and their parents."""
    v1 = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
    v2 = ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file ")
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers not in {"", "memory"}:
            continue
        root, limit_name, usage_name, cache_name = v1 if controllers else v2
        at = Path(root + group)
        while at.is_relative_to(root):
            try:
                limit = int((at / limit_name).read_text())
                usage = int((at / usage_name).read_text())
                stat = (at / "memory.stat").read_text().splitlines()
            except (OSError, ValueError):  # no such group here, or its limit is "max"
                pass
            else:
                cache = next((int(text.split()[1]) for text in stat if text.startswith(cache_name)), 0)
                yield max(limit - max(usage - cache, 0), 0), f"memory limit {limit} of a cgroup"
            at = at.parent


def memory_available() -> tuple[int, str]:
    """Bytes that can be allocated now without swapping or meeting a cgroup limit, and what bounds them."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        return min([(free, "MemAvailable in /proc/meminfo"), *_cgroup_rooms()])
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "physical memory"


class View(np.ndarray[Any, np.dtype[np.uint8]]):
    """A piece of an arena: buffer protocol and DLPack. Keeps the memory mapped."""

    offset: int

    @property
    def readonly(self) -> bool:
        return not self.flags.writeable


class Arena(mmap.mmap):
    """Page-aligned host memory that can be shared with another process.

    ``nbytes`` is rounded up to whole pages. ``memfd``: back it by a file descriptor that another process may attach
    read-only. ``populate``: make every page present now. ``huge``, ``lock``, ``cuda``: "auto" tries and notes
    in ``info`` what did not work, "require" raises OSError, "off" does not try. Asking for more memory than
    there is raises MemoryError before anything is touched.

    ``close()`` ends the giving of views; the memory is unmapped when the last view, buffer or tensor is gone.
    """

    _info: Info
    _fd: int
    _closed: bool
    _readonly: bool
    _views: list[int]  # one number, shared with the finalizers of the views
    _close_fd: weakref.finalize[..., Self] | None

    def __new__(
        cls,
        nbytes: int,
        *,
        huge: Choice = "auto",
        lock: Choice = "auto",
        memfd: bool = True,
        cuda: Choice = "auto",
        populate: bool = True,
        name: str = "kvtransport",
    ) -> Self:
        nbytes = _size(nbytes)
        notes = [_refuse(what, choice) for what, choice in (("huge", huge), ("lock", lock), ("cuda", cuda))]
        size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if not nbytes or size > sys.maxsize:
            raise ValueError(f"asked for an arena of {nbytes} bytes: at least 1 and at most {sys.maxsize} are possible")
        available, source = memory_available()
        if size > available:
            raise MemoryError(
                f"asked for an arena of {nbytes} bytes, but only {available} bytes are available ({source}): ask for "
                "less, free memory, or raise the limit (the container's memory limit, systemd's MemoryMax)"
            )
        if memfd and not hasattr(os, "memfd_create"):
            memfd = False
            notes.append("no memfd on this system: the memory cannot be attached to by another process")
        fd = os.memfd_create(name[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) if memfd else -1
        try:
            if memfd:
                os.ftruncate(fd, size)
            flags = mmap.MAP_SHARED if memfd else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self = super().__new__(cls, fd, size, flags, mmap.PROT_READ | mmap.PROT_WRITE)
            if populate:
                _populate(self, size)
            if memfd:
                _seal(fd, notes)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        return self._describe(nbytes, size, fd, [note for note in notes if note])

    def _describe(self, requested: int, size: int, fd: int, notes: list[str], *, readonly: bool = False) -> Self:
        self._fd, self._closed, self._readonly, self._views = fd, False, readonly, [0]
        self._info = Info(
            requested=requested,
            nbytes=size,
            page_bytes=mmap.PAGESIZE,
            huge="none",
            locked=False,
            cuda=False,
            fd=fd,
            notes=notes,
        )
        self._close_fd = weakref.finalize(self, os.close, fd) if fd >= 0 else None
        return self

    @classmethod
    def attach(cls, fd: int, nbytes: int) -> Self:
        """Map another arena's memfd, read-only. Its owner may be another process; the descriptor stays the caller's.

        Raises ValueError where the descriptor holds fewer bytes or is not sealed against shrinking.
        """
        fd, nbytes = _descriptor(fd), _size(nbytes)
        have = os.fstat(fd).st_size
        if not 0 < nbytes <= have:
            raise ValueError(f"attach: asked for {nbytes} bytes, descriptor {fd} has {have}")
        try:
            sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        except (OSError, AttributeError):
            sealed = 0
        if not sealed:
            raise ValueError(
                f"attach: descriptor {fd} is not the memfd of an arena: it is not sealed against shrinking, so reading "
                "it could kill this process (SIGBUS)"
            )
        self = super().__new__(cls, fd, nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
        return self._describe(nbytes, nbytes, fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0), [], readonly=True)

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the arena is closed")

    @property
    def fd(self) -> int:
        """The memfd, or -1."""
        self._check_open()
        return self._fd

    @property
    def closed(self) -> bool:  # type: ignore[override]  # typeshed calls mmap's a plain attribute
        """True after close()."""
        return self._closed

    @property
    def readonly(self) -> bool:
        """True when attached."""
        return self._readonly

    @property
    def nbytes(self) -> int:
        """Usable bytes: the request rounded up to whole pages."""
        return self._info["nbytes"]

    @property
    def live_views(self) -> int:
        """Views alive, with everything made of them."""
        return self._views[0]

    @property
    def info(self) -> Info:
        """What was asked for, what it became, and why."""
        return Info(**{**self._info, "notes": list(self._info["notes"]), "fd": self._fd})

    def __len__(self) -> int:
        return self.nbytes

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def view(self, offset: int, length: int) -> View:
        """A View of these bytes. Raises ValueError when they are not inside the arena, or it is closed."""
        offset, length = _size(offset), _size(length)
        self._check_open()
        if offset > self.nbytes or length > self.nbytes - offset:
            raise ValueError(f"offset {offset}, length {length} does not fit an arena of {self.nbytes} bytes")
        array = np.frombuffer(memoryview(self)[offset : offset + length], np.uint8)
        view = array.view(View)
        view.offset = offset
        self._views[0] += 1
        # The memoryview that numpy made: whatever is derived from the array holds it, so its end is the view's end.
        weakref.finalize(array.base, _view_gone, weakref.ref(self), self._views).atexit = False
        return view

    def close(self) -> None:
        """Give no more views; the memory is unmapped when the last one is gone."""
        self._closed = True
        self._unmap()

    def _unmap(self) -> None:
        try:
            super().close()
        except BufferError:  # somebody still looks at it
            return
        self._fd = -1
        if self._close_fd is not None:
            self._close_fd()  # acts once


def _view_gone(arena: weakref.ref[Arena], views: list[int]) -> None:
    views[0] -= 1
    owner = arena()
    if owner is not None and owner._closed and not views[0]:
        owner._unmap()


def _refuse(what: str, choice: str) -> str:
    """The note for something the twin cannot do."""
    if choice not in {"auto", "require", "off"}:
        raise ValueError(f'expected "auto", "require" or "off", got {choice!r}')
    text = f'{what}="{choice}": not possible without the native extension kvtransport._native'
    if choice == "require":
        raise OSError(errno.ENOTSUP, text)
    return text if choice == "auto" else ""


def _populate(arena: mmap.mmap, size: int) -> None:
    """Make every page present now, so that running out is an error here and no SIGBUS later."""
    try:
        arena.madvise(_MADV_POPULATE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise MemoryError(
                f"asked for an arena of {size} bytes: the memory ran out while it was populated: {error}"
            ) from error
        np.frombuffer(arena, np.uint8)[:: mmap.PAGESIZE] = 0


def _seal(fd: int, notes: list[str]) -> None:
    """From here on nobody can shrink the file under a reader (SIGBUS) or map it writable a second time."""
    sizes = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, sizes | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    except OSError:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, sizes | fcntl.F_SEAL_SEAL)
        notes.append("other processes could map the arena writable: F_SEAL_FUTURE_WRITE needs Linux 5.1")
