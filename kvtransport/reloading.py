"""Files that are read again when they change, while the process runs."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from .errors import ConfigError, KVError

T = TypeVar("T")

CHECK_S = 1.0
"""How often files are looked at, at most."""
MAX_FILE = 1 << 20
"""Certificates, keys and lists of tokens are small."""


class Reloading(Generic[T]):
    """What ``load`` made of ``paths``; made again once they have changed.

    Files are looked at when the value is asked for, at most every :data:`CHECK_S` seconds. Where they cannot be read, or
    hold nonsense (a half-written certificate, a key that is not the certificate's), the last good value stays and
    ``error`` says why; ``loads`` counts the good ones. The first load raises.
    """

    def __init__(
        self,
        load: Callable[[], T],
        paths: Sequence[Path],
        what: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._paths = tuple(paths)
        self._clock = clock
        self.what = what
        self.error: KVError | None = None
        self.loads = 1
        self.on_change: Callable[[str], None] | None = None
        """Told in one line whenever a load succeeded or failed."""
        self._seen = self._stamp()
        self._checked = clock()
        self._value = load()

    def get(self) -> T:
        """The value, of files as they are now (or were a second ago)."""
        now = self._clock()
        if now - self._checked >= CHECK_S:
            self._checked = now
            self._look()
        return self._value

    def reload(self) -> T:
        """Look at the files now, changed or not."""
        self._seen = ()
        self._look()
        return self._value

    def _look(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._value = self._load()
        except KVError as error:
            self.error = error
            self._tell(f"{self.what} changed and cannot be used, the earlier ones stay: {error.message}")
            return
        self.error = None
        self.loads += 1
        self._tell(f"{self.what} read again")

    def _tell(self, line: str) -> None:
        if self.on_change is not None:
            self.on_change(line)

    def _stamp(self) -> tuple[object, ...]:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> object:
    try:
        info = os.stat(path)
    except OSError as error:
        return error.errno
    return info.st_ino, info.st_mtime_ns, info.st_size


def read_file(path: Path, what: str) -> bytes:
    """A small file. Raises ConfigError saying what it was wanted for."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{what}: cannot read {path}: {error.strerror}") from error
    if len(data) > MAX_FILE:
        raise ConfigError(f"{what}: {path} is larger than {MAX_FILE} bytes: is it the right file?")
    return data


def check_private(path: Path, what: str) -> None:
    """Raises ConfigError where everybody may read a file with a secret in it."""
    mode = stat.S_IMODE(os.stat(path).st_mode)
    # A group that may read is how secrets are mounted in containers; the world is not.
    if mode & stat.S_IROTH:
        raise ConfigError(f"{what}: everybody on this machine may read {path}: chmod 600 {path}")
