"""What a lookup of a client's address costs: `NetworkTable` against a search of all networks.

Run it with ``python tests/bench/bench_networks.py``. It prints nanoseconds for each lookup:

- of addresses half of which lie in one of the networks, and half anywhere;
- in networks with random prefixes of all usual lengths: 8 to 32 bits of IPv4, 16 to 64 of IPv6, so
  that each level that a table can be expected to have is there: 25 and 49. A list in which fewer
  lengths occur is faster;
- "search" walks the networks from the longest prefix on and compares numbers, which were made of
  the networks beforehand: as fast as a search gets in Python, and five times as fast as asking
  ``address in network`` of `ipaddress`;
- "number_of" is the part of both that turns the text into a number;
- what counts is the processor time of this process, with the collector of cyclic garbage off.
"""

import gc
import ipaddress
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lpechod.net.networks import Network, NetworkTable, is_ipv4, number_of

SIZES = (10, 10_000)
HOSTS = 20_000
SEARCHED_HOSTS = 100
"""A search of 10,000 networks takes so long that a few addresses have to do."""
REPEATS = 5

Lookup = Callable[[str], object]


def networks(family: int, size: int, chance: random.Random) -> list[Network]:
    """Make different networks of a family."""
    made: dict[Network, None] = {}
    while len(made) < size:
        if family == 4:
            bits = chance.randint(8, 32)
            made[ipaddress.IPv4Network((chance.getrandbits(32), bits), strict=False)] = None
        else:
            bits = chance.randint(16, 64)
            made[ipaddress.IPv6Network((chance.getrandbits(128), bits), strict=False)] = None
    return list(made)


def hosts(family: int, among: Sequence[Network], chance: random.Random) -> list[str]:
    """Make addresses of a family, every other in one of some networks."""
    made: list[str] = []
    for turn in range(HOSTS):
        network = chance.choice(among)
        bits = network.max_prefixlen
        number = chance.getrandbits(bits)
        if turn % 2:
            number = int(network.network_address) | number & int(network.hostmask)
        made.append(
            str(ipaddress.IPv4Address(number) if family == 4 else ipaddress.IPv6Address(number))
        )
    return made


def searching(entries: Sequence[tuple[Network, int]]) -> Lookup:
    """Return a lookup that compares with one network after the other."""
    rows: dict[bool, list[tuple[int, int, int]]] = {True: [], False: []}
    for network, value in sorted(entries, key=lambda entry: -entry[0].prefixlen):
        shift = network.max_prefixlen - network.prefixlen
        number = number_of(str(network.network_address))
        rows[is_ipv4(number)].append((shift, number >> shift, value))

    def lookup(host: str) -> int | None:
        number = number_of(host)
        for shift, prefix, value in rows[is_ipv4(number)]:
            if number >> shift == prefix:
                return value
        return None

    return lookup


def cost(lookup: Lookup, among: Sequence[str]) -> float:
    """Return nanoseconds for each lookup, the median of some runs."""
    runs = []
    for _ in range(REPEATS):
        gc.collect()
        gc.disable()
        start = time.process_time_ns()
        for host in among:
            lookup(host)
        runs.append((time.process_time_ns() - start) / len(among))
        gc.enable()
    return statistics.median(runs)


def main() -> None:
    """Print the table."""
    chance = random.Random(1)  # noqa: S311 - the same networks each time.
    print(f"ns per lookup, median of {REPEATS}; in brackets: times the table's")
    print(f"{'networks':>8}  {'clients':<8}{'number_of':>10}{'table':>10}{'search':>12}")
    for family in (4, 6):
        for size in SIZES:
            entries = [(each, n) for n, each in enumerate(networks(family, size, chance))]
            among = hosts(family, [network for network, _ in entries], chance)
            table, search = NetworkTable(entries).lookup, searching(entries)
            if any(table(host) != search(host) for host in among[:SEARCHED_HOSTS]):
                raise AssertionError("the table and the search do not agree")
            of_table, of_search = cost(table, among), cost(search, among[:SEARCHED_HOSTS])
            print(
                f"{size:>8}  {f'IPv{family}':<8}{cost(number_of, among):>10.0f}{of_table:>10.0f}"
                f"{of_search:>12.0f} ({of_search / of_table:.1f}x)"
            )


if __name__ == "__main__":
    main()
