"""Counting the containers of a msgpack document before any of them is built.

A list or map costs one byte on the wire and a hundred in memory, and seconds of garbage collection by the million.
The decoder has no limit for that, so a large body is scanned first. The scan builds nothing and does not
validate: what is malformed the decoder refuses.
"""

from __future__ import annotations

from typing import Final

_CONTAINERS: Final = bytes([*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF])


def _steps() -> tuple[int, ...]:
    """Per first byte: bytes of the whole element when that is fixed; for a container, of its header; 0 otherwise."""
    steps = [1] * 256
    for size in range(32):
        steps[0xA0 + size] = 1 + size  # fixstr
    fixed = {0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9, 0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9}
    fixed |= {0xD4: 3, 0xD5: 4, 0xD6: 6, 0xD7: 10, 0xD8: 18}  # fixext
    fixed |= {0xDC: 3, 0xDD: 5, 0xDE: 3, 0xDF: 5}  # array and map headers
    fixed |= dict.fromkeys((0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xD9, 0xDA, 0xDB), 0)
    for first, step in fixed.items():
        steps[first] = step
    return tuple(steps)


_STEPS: Final = _steps()
# Elements that carry their size: bytes of the size field, bytes between it and the content.
_SIZED: Final[dict[int, tuple[int, int]]] = {
    0xC4: (1, 0),
    0xC5: (2, 0),
    0xC6: (4, 0),  # bin
    0xC7: (1, 1),
    0xC8: (2, 1),
    0xC9: (4, 1),  # ext
    0xD9: (1, 0),
    0xDA: (2, 0),
    0xDB: (4, 0),  # str
}
_IS_CONTAINER: Final = tuple(first in _CONTAINERS for first in range(256))


def more_containers_than(bound: int, payload: bytes | bytearray | memoryview) -> bool:
    """Whether the document holds more than ``bound`` lists and maps. Stops at the first beyond it."""
    data = bytes(payload)
    # One pass at C speed settles nearly all documents: bytes that cannot start a container.
    if len(data) <= bound or len(data) - len(data.translate(None, _CONTAINERS)) <= bound:
        return False
    at, found, end = 0, 0, len(data)
    while at < end:
        first = data[at]
        step = _STEPS[first]
        if step:
            at += step
            if _IS_CONTAINER[first]:
                found += 1
                if found > bound:
                    return True
        else:
            width, extra = _SIZED[first]
            at += 1 + width + extra + int.from_bytes(data[at + 1 : at + 1 + width], "big")
    return False
