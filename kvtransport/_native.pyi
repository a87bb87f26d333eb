"""Types of the C extension (native/). The contract of each name stands in kvtransport/_pure.py, its twin."""

from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias, TypedDict, final

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer, CapsuleType

Choice: TypeAlias = Literal["auto", "require", "off"]
# numpy declares its arrays to be buffers only from Python 3.12 on.
Memory: TypeAlias = Buffer | npt.NDArray[Any]
Pieces: TypeAlias = Buffer | npt.NDArray[np.int64]

class Info(TypedDict):
    requested: int
    nbytes: int
    page_bytes: int
    huge: str
    locked: bool
    cuda: bool
    fd: int
    notes: list[str]

class Arena:
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
    ) -> Self: ...
    @classmethod
    def attach(cls, fd: int, nbytes: int) -> Self: ...
    @property
    def fd(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def readonly(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def live_views(self) -> int: ...
    @property
    def info(self) -> Info: ...
    def view(self, offset: int, length: int) -> View: ...
    def close(self) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...

@final
class View:
    @property
    def nbytes(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def readonly(self) -> bool: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __dlpack__(
        self,
        *,
        stream: None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> CapsuleType: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...

@final
class Hasher:
    def __new__(cls, seed: int = 0) -> Self: ...
    def update(self, buffer: Memory, /) -> None: ...
    def update_pages(self, base: Memory | None, pieces: Pieces | None, start: int, stop: int) -> None: ...
    def intdigest(self) -> int: ...
    def reset(self, seed: int = 0) -> None: ...

hash_vectors: Final[str]

def send_pages(
    fd: int, head: Memory, base: Memory | None, pieces: Pieces | None, start: int, budget: int = 1 << 20
) -> int: ...
def recv_pages(
    fd: int,
    base: Memory | None,
    pieces: Pieces | None,
    start: int,
    tail: Memory | None = None,
    tail_start: int = 0,
    budget: int = 1 << 20,
) -> int: ...
def hash_pages(base: Memory | None, pieces: Pieces | None, seed: int = 0) -> int: ...
def copy_pages(
    dst_base: Memory | None, dst_pieces: Pieces | None, src_base: Memory | None, src_pieces: Pieces | None
) -> int: ...
