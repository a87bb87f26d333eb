"""When an address that a peer advertises is tried. Pure: the caller brings the clock, and does the trying."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass

AGAIN_S = 5.0
"""One address is tried at most so often; who asks meanwhile gets the answer of then."""
AT_ONCE = 4
A_MINUTE = 60
"""Of all addresses together."""
REMEMBERED = 1_024


@dataclass(frozen=True, slots=True)
class Answer:
    """``problem``: why nobody can use the address, "" where somebody answers there; ``incarnation``: who, None: it did not say."""

    problem: str = ""
    incarnation: bytes | None = None

    def verdict(self, expected: bytes) -> str:
        """Why the process of incarnation ``expected`` is not reached there; "" when it is, as far as can be told."""
        if self.problem or self.incarnation in (None, expected):
            return self.problem
        return "another process answers there"


class ProbePolicy:
    """What is known of addresses, and whether one may be tried now."""

    def __init__(self, *, at_once: int = AT_ONCE, a_minute: int = A_MINUTE) -> None:
        self._at_once = at_once
        self._a_minute = a_minute
        self._begun: deque[float] = deque()
        self._answers: OrderedDict[str, tuple[float, Answer]] = OrderedDict()
        self.active = 0

    def known(self, now: float, address: str) -> Answer | None:
        """What was found there a moment ago."""
        found = self._answers.get(address)
        return None if found is None or now - found[0] >= AGAIN_S else found[1]

    def begin(self, now: float) -> bool:
        """Whether one may be tried; if so :meth:`end` follows."""
        while self._begun and now - self._begun[0] >= 60.0:
            self._begun.popleft()
        if self.active >= self._at_once or len(self._begun) >= self._a_minute:
            return False
        self._begun.append(now)
        self.active += 1
        return True

    def end(self, now: float, address: str, answer: Answer | None) -> None:
        """``answer``: None where it was given up."""
        self.active -= 1
        if answer is not None:
            self._answers.pop(address, None)
            self._answers[address] = now, answer
            while len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)
