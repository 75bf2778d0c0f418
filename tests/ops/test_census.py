"""How workers see each other's clients: in rows of shared memory, whoever comes, goes or dies.

The format is written out here again: whoever has to change it in both places changes its number.
"""

import mmap
import os
import signal
import sys
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lpechod.net.admission import Admission, AdmissionLimits
from lpechod.net.prefixes import ClientPrefixes
from lpechod.ops.census import Census, CensusRow
from tests.ops.test_segment import fork

MAGIC = int.from_bytes(b"lpecens\n", sys.byteorder)
ROW_BYTES = 512 << 10
PREFIXES = ClientPrefixes()
HOSTS = ["192.0.2.1", "192.0.2.2", "2001:db8::1"]
CLIENT, OTHER = PREFIXES.of(HOSTS[0]), PREFIXES.of(HOSTS[1])
LIMIT = 3


def memory(census: Census) -> int:
    """Return how many bytes of memory a census takes."""
    return os.fstat(census.fd).st_blocks * 512


@pytest.fixture(name="census")
def _census() -> Iterator[Census]:
    census = Census.create()
    yield census
    census.close()


@pytest.fixture(name="join")
def _join(census: Census) -> Iterator[Callable[[], CensusRow]]:
    """Give new workers their rows."""
    rows: list[CensusRow] = []

    def join() -> CensusRow:
        rows.append(CensusRow(census, census.claim()))
        return rows[-1]

    yield join
    for row in rows:
        row.close()


Join = Callable[[], CensusRow]

# Against a model.


class Daemon(RuleBasedStateMachine):
    """Workers that admit clients under one limit, against plain counters."""

    def __init__(self) -> None:
        super().__init__()
        self.census = Census.create()
        self.former: list[Census] = []
        self.workers: dict[int, tuple[CensusRow, Admission]] = {}
        self.held: dict[int, Counter[str]] = {}

    def teardown(self) -> None:
        """Give the memory back."""
        for row, _ in self.workers.values():
            row.close()
        for census in (*self.former, self.census):
            census.close()

    def total(self, host: str) -> int:
        """Return how many connections of a client there are."""
        return sum(held[host] for held in self.held.values())

    @precondition(lambda self: len(self.workers) < 5)
    @rule()
    def start(self) -> None:
        """A worker starts, with the free row of the lowest index."""
        index = self.census.claim()
        assert index == min({*range(6)} - {*self.workers})
        row = CensusRow(self.census, index)
        limits = AdmissionLimits(max_connections_per_ip=LIMIT)
        self.workers[index] = row, Admission(limits, clients=row)
        self.held[index] = Counter()

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), host=st.sampled_from(HOSTS))
    def come(self, data: st.DataObject, host: str) -> None:
        """A client is admitted if all workers together hold fewer of it than the limit."""
        index = data.draw(st.sampled_from(sorted(self.workers)))
        refusal = self.workers[index][1].admit(host)
        if self.total(host) >= LIMIT:
            assert refusal == "max_connections_per_ip"
        else:
            assert refusal is None
            self.held[index][host] += 1

    @precondition(lambda self: any(held.total() for held in self.held.values()))
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        """A connection ends."""
        present = [(index, host) for index, held in self.held.items() for host in +held]
        index, host = data.draw(st.sampled_from(present))
        self.workers[index][1].leave(host)
        self.held[index][host] -= 1

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """A worker is killed with all that it holds."""
        index = data.draw(st.sampled_from(sorted(self.workers)))
        self.workers.pop(index)[0].close()
        del self.held[index]
        self.census.release(index)

    @precondition(lambda self: len(self.former) < 3)
    @rule()
    def adopt(self) -> None:
        """A new program goes on with the census; its workers keep their descriptor."""
        self.former.append(self.census)
        self.census = Census.adopt(os.dup(self.census.fd))

    @invariant()
    def each_sees_all_others(self) -> None:
        """Every worker sees what the others hold of each client, and nothing of its own."""
        for index, (row, _) in self.workers.items():
            for host in HOSTS:
                expected = self.total(host) - self.held[index][host]
                assert row.others(PREFIXES.of(host)) == expected


TestDaemon = Daemon.TestCase
TestDaemon.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)

# Rows.


def test_a_row_is_taken_over_empty(census: Census, join: Join) -> None:
    """The next worker of a row starts with nothing, whatever the one before has left there."""
    reader, dead = join(), join()
    dead.show(CLIENT, 7)
    assert reader.others(CLIENT) == 7
    census.release(1)
    assert reader.others(CLIENT) == 0
    dead.show(CLIENT, 7)  # As if its memory had not gone.

    assert census.claim() == 1
    assert reader.others(CLIENT) == 0


def test_a_row_counts_as_soon_as_it_is_claimed(join: Join) -> None:
    """A worker is seen by those who looked before it was there."""
    first = join()
    assert first.others(CLIENT) == 0
    second = join()
    second.show(CLIENT, 2)
    assert first.others(CLIENT) == 2
    assert second.others(CLIENT) == 0


def test_numbers_are_replaced(join: Join) -> None:
    """What is shown stands in place of what was shown before, and clients do not mix."""
    row, reader = join(), join()
    for count in (1, 2, 1, (1 << 24) - 1, 5):
        row.show(CLIENT, count)
        row.show(OTHER, 3)
        assert (reader.others(CLIENT), reader.others(OTHER)) == (count, 3)
    row.show(CLIENT, 1 << 24)
    assert reader.others(CLIENT) == (1 << 24) - 1
    row.show(CLIENT, 0)
    assert (reader.others(CLIENT), reader.others(OTHER)) == (0, 3)


def clients_of_one_bucket(row: CensusRow, count: int) -> list[bytes]:
    """Find clients whose hashes lead to the same bucket."""
    bucket = row._find(CLIENT)[0]
    found: list[bytes] = []
    number = 0
    while len(found) < count:
        prefix = number.to_bytes(16, "big")
        if row._find(prefix)[0] == bucket:
            found.append(prefix)
        number += 1
    return found


def test_a_full_bucket(join: Join) -> None:
    """The seventeenth client of a bucket is not seen, and told so, until there is room."""
    row, reader = join(), join()
    *clients, late = clients_of_one_bucket(row, 17)
    assert all(row.show(client, 2) for client in clients)
    assert not row.show(late, 2)
    assert not row.show(late, 1)
    assert row.show(late, 0)
    assert [reader.others(client) for client in (*clients, late)] == [2] * 16 + [0]

    assert row.show(clients[3], 0)
    assert row.show(late, 4)

    assert [reader.others(client) for client in (late, *clients)] == [4, 2, 2, 2, 0, *[2] * 12]


def test_no_row_is_left(census: Census) -> None:
    """With every row in use the next claim is an error, and one that is released is taken."""
    os.pwrite(census.fd, b"\1" * Census.ROWS, mmap.PAGESIZE)
    with pytest.raises(OSError, match="4096 rows"):
        census.claim()
    census.release(4095)
    assert census.claim() == 4095


def test_only_rows_in_use_take_memory(census: Census, join: Join) -> None:
    """A census takes two pages and its rows; looking takes nothing, and a row is given back."""
    empty = memory(census)
    assert empty == mmap.PAGESIZE + -(-Census.ROWS // mmap.PAGESIZE) * mmap.PAGESIZE
    rows = [join() for _ in range(3)]
    assert memory(census) == empty + 3 * ROW_BYTES
    census.release(1)
    assert memory(census) == empty + 2 * ROW_BYTES
    for number in range(1000):
        assert rows[0].others(number.to_bytes(16, "big")) == 0
    assert memory(census) == empty + 2 * ROW_BYTES


def test_a_claim_takes_none_of_the_supervisors_own_memory(census: Census) -> None:
    """A row is emptied without another one of zeros, which would leave a hole in the heap."""
    tracemalloc.start()
    try:
        census.claim()
        assert tracemalloc.get_traced_memory()[1] < ROW_BYTES // 8
    finally:
        tracemalloc.stop()


def test_secrets_differ(join: Join) -> None:
    """Nobody can know from another daemon, or from the code, which clients share a bucket."""
    other = Census.create()
    row = CensusRow(other, other.claim())
    assert row._find(CLIENT) != join()._find(CLIENT)
    row.close()
    other.close()


# Processes.


def test_a_worker_that_is_killed(census: Census, join: Join) -> None:
    """Another process sees what a worker holds, until that is reaped and its row released."""
    reader = join()
    index = census.claim()
    ready, tell = os.pipe()

    def work() -> None:
        row = CensusRow(census, index)
        admission = Admission(AdmissionLimits(max_connections_per_ip=LIMIT), clients=row)
        reader.show(OTHER, 9)  # A copy of the other's row: one mapping, as after any fork.
        for _ in range(5):
            admission.admit(HOSTS[0])
        os.write(tell, b"!")
        signal.pause()

    child = fork(work)
    os.read(ready, 1)
    assert reader.others(CLIENT) == LIMIT
    own = Admission(AdmissionLimits(max_connections_per_ip=LIMIT), clients=reader)
    assert own.admit(HOSTS[0]) == "max_connections_per_ip"

    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    census.release(index)

    assert own.admit(HOSTS[0]) is None
    os.close(ready)
    os.close(tell)


def file_of(magic: int = MAGIC, version: int = 1, less: int = 0) -> int:
    """Write a census as another version would, and return its descriptor."""
    fd = os.memfd_create("other")
    pages = mmap.PAGESIZE + -(-4096 // mmap.PAGESIZE) * mmap.PAGESIZE
    os.truncate(fd, pages + 4096 * ROW_BYTES - less)
    os.pwrite(fd, array("q", [magic, version]).tobytes(), 0)
    return fd


def test_what_is_a_census() -> None:
    """A file of this format is taken for one, with or without a need for new rows."""
    for wanted in (True, False):
        census = Census.adopt(file_of(), wanted)
        assert census.wanted is wanted
        assert census.claim() == 0
        census.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda: os.memfd_create("none"),
        lambda: file_of(magic=MAGIC + 1),
        lambda: file_of(version=2),
        lambda: file_of(less=1),
        lambda: os.eventfd(0),
    ],
)
def test_what_is_no_census(make: Callable[[], int]) -> None:
    """Anything but a census of this format is refused and stays open."""
    fd = make()
    with pytest.raises(ValueError, match="census"):
        Census.adopt(fd)
    os.close(fd)
