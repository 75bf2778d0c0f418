"""How often a client may connect: a token bucket for each, in bounded memory and without pauses.

The algorithm is GCRA (ITU-T I.371), which needs one number for each client: when its bucket will be
full again. Times are kept in units of 1/rate seconds, so that a connection adds exactly 1: of all
numbers only the present is rounded, to one part in 2^53, and no error builds up.

A bucket that is full again is the same as one never seen, and needs no entry. Entries lie in many
small tables, as in a set-associative cache: the hash of a key says in which one, and only when that
is full is it looked through for those that are not needed any more. So no call looks at more than
one table, 63 entries. One big dictionary was rejected: with 65,536 clients that come and go it is
rebuilt now and then, which takes 4 to 7 ms in one call. Two that take turns are no way out: to
throw one away takes 1.5 ms.

If all entries of a table are needed still, the one goes whose bucket will be full first, for that
loses least. What can an attacker make of it?

- Nothing against others: to be forgotten is to have a full bucket. No client that keeps to its rate
  is ever refused, whatever others do. (To refuse new clients instead, while memory is full, would
  let somebody with many addresses lock out everybody else.)
- Little for one client: the bucket that a burst has emptied is the last to go. Before it is
  forgotten, all others of its table must have been emptied as far, by connections that counted.
- No table can be aimed at, provided that the hash of keys has a secret seed, as that of bytes has.
- Who has more prefixes than there are entries escapes: each is forgotten before it comes back.
  But with so many, ``capacity`` times ``rate_per_s`` connections a second are no excess.

`RateLimit.evictions` tells whether any of this happens.
"""

import math
from collections.abc import Hashable

_TABLE_ENTRIES = 32
"""At least, where capacity allows. A flood of new clients makes each admission look through a full
table, for 1 to 10 microseconds as caches go; with half the entries it takes half the time, but
tables fill less evenly, and nearly four times as many keys are evicted at three quarters of the
capacity."""


class RateLimit:
    """Admits each key ``burst`` times at once, and ``rate_per_s`` times a second over time.

    In any ``t`` seconds a key is admitted at most ``burst + rate_per_s * t`` times, unless it has
    been evicted; and it is refused only if admitting it would break that.

    The limit is of this process: workers do not see each other's.

    Args:
        rate_per_s: admissions a second, more than 0. Who wants no limit does not ask.
        burst: admissions at once, 1 or more.
        capacity: how many keys are remembered at most, 1 or more; about 150 bytes each. Hashes
            spread keys unevenly, so evictions begin before: once as many keys are live as three
            quarters of it, one in 200 has been evicted, and at all of it one in 15.

    Attributes:
        evictions: how many keys were forgotten that would have mattered.

    Raises:
        ValueError: an argument is out of range.
    """

    __slots__ = ("_credit", "_rate", "_room", "_tables", "evictions")

    def __init__(self, rate_per_s: float, burst: int, capacity: int = 65_536) -> None:
        if not 0 < rate_per_s < math.inf:
            raise ValueError(f"a rate is more than 0 a second, found {rate_per_s}")
        if burst < 1:
            raise ValueError(f"a burst is 1 or more, found {burst}")
        if capacity < 1:
            raise ValueError(f"a capacity is 1 or more, found {capacity}")
        self._rate = rate_per_s
        self._credit = burst - 1
        self._tables: list[dict[Hashable, float]] = [
            {} for _ in range(max(1, capacity // _TABLE_ENTRIES))
        ]
        self._room = capacity // len(self._tables)
        self.evictions = 0

    @property
    def entries(self) -> int:
        """How many keys are remembered; counted when asked, so for metrics and not for each accept.

        Not the length of the limit: Python would take one that remembers nobody for none at all.
        """
        return sum(map(len, self._tables))

    def admits(self, key: Hashable, now: float) -> bool:
        """Admit a key and count it, unless it has come too often; who is refused is not counted.

        Args:
            key: who it is; see above on hashes.
            now: the loop's time, in seconds, which does not go back.
        """
        table = self._tables[hash(key) % len(self._tables)]
        present = now * self._rate
        full_again = table.get(key)
        if full_again is None:
            if len(table) >= self._room:
                self._make_room(table, present)
            table[key] = present + 1.0
            return True
        if full_again > present + self._credit:
            return False
        table[key] = max(full_again, present) + 1.0
        return True

    def _make_room(self, table: dict[Hashable, float], present: float) -> None:
        """Drop the entries of a table that are not needed; if all are, the one that tells least."""
        first = min(table, key=table.__getitem__)
        if table[first] > present:
            del table[first]
            self.evictions += 1
            return
        for key in [key for key, full_again in table.items() if full_again <= present]:
            del table[key]
