"""Whether drafting pays, from the measured times of calls. Host only; it decides speed and never text."""

from __future__ import annotations

import dataclasses

WEIGHT = 0.1
"""Of a new measurement in the averages."""

FEW = 3
"""Calls of a kind before its time is believed, beside the first one, which may be slow for other reasons."""


@dataclasses.dataclass
class _Average:
    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        # The first ones count alike; then what is long ago fades.
        self.value += (value - self.value) * max(WEIGHT, 1 / self.count)


class Pace:
    """Speculate while tokens come faster that way, and try again now and then.

    Both kinds of call are timed: at first `FEW` of each, then one plain call in `again` while drafting pays, and `FEW`
    drafting calls in `again` while it does not. A call's time depends on how many rows are live, which changes slowly.

    Attributes:
      drafting, plain: whether the last calls were drafting ones, and how many of each there were.
    """

    def __init__(self, again: int = 64) -> None:
        self.again = again
        self.drafting = 0
        self.plain = 0
        self._seconds = {True: _Average(), False: _Average()}
        self._tokens = _Average()
        self._first = {True: True, False: True}
        self._since = 0
        self._tries = 0

    @property
    def pays(self) -> bool | None:
        """Whether drafting is faster as far as is known; None while it is not."""
        if min(average.count for average in self._seconds.values()) < FEW:
            return None
        return self._tokens.value / self._seconds[True].value > 1 / self._seconds[False].value

    def drafts_next(self) -> bool:
        """Whether the next call should draft."""
        if self._tries > 0:
            return True
        if (pays := self.pays) is None:
            return self._seconds[True].count < FEW
        if self._since < self.again:
            return pays
        self._since = 0
        if not pays:
            self._tries = FEW - 1
        return not pays

    def took(self, drafted: bool, seconds: float, turns: int, tokens: float) -> None:
        """A call is done.

        Args:
          drafted: whether it was a drafting one.
          turns: calls of the main model that it made.
          tokens: that a row got in one of them, on average.
        """
        if drafted:
            self.drafting += 1
            self._tries = max(self._tries - 1, 0)
        else:
            self.plain += 1
        self._since += 1
        if self._first[drafted]:
            self._first[drafted] = False
            return
        self._seconds[drafted].add(seconds / max(turns, 1))
        if drafted:
            self._tokens.add(tokens)
