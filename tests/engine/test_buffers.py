"""Buffer pool: size classes, the account of each owner, the limit, and reuse."""

import ctypes
from collections import Counter
from collections.abc import Hashable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lpechod.engine.buffers import (
    HEADROOM_BYTES,
    RECEIVE_BYTES,
    BufferPool,
    capacity_for,
    kept_bytes,
)

_KIB = 1024
_MIB = 1024 * 1024
_LARGEST_FRAME = 64 * _MIB

SMALLEST = _KIB + HEADROOM_BYTES


def _acquire(pool: BufferPool, size: int, owner: Hashable = "owner") -> memoryview:
    buffer = pool.acquire(size, owner)
    assert buffer is not None
    return buffer


class TestClasses:
    """How large a buffer is."""

    @given(size=st.integers(0, 200_000) | st.integers(0, _LARGEST_FRAME))
    @example(SMALLEST)
    @example(SMALLEST + 1)
    @example(4 * _KIB + HEADROOM_BYTES + 1)
    @settings(max_examples=200, deadline=None)
    def test_large_enough_and_not_much_larger(self, size: int) -> None:
        """A buffer holds what was asked for, and beyond the smallest class under four times it."""
        pool = BufferPool(limit=1 << 40, keep=0)
        capacity = len(_acquire(pool, size))

        assert capacity >= size
        assert capacity == SMALLEST or capacity < 4 * size
        assert pool.held == capacity

    @pytest.mark.parametrize("power", [*range(10, 21, 2), 21, 22, 23, 24, 30])
    def test_power_of_two_fits_with_its_header(self, power: int) -> None:
        """A frame whose body is a class of its own does not spill into the next class."""
        pool = BufferPool(limit=1 << 40)

        assert len(_acquire(pool, 2**power + 4)) == 2**power + HEADROOM_BYTES

    @pytest.mark.parametrize("size", [3 * _MIB, 5_000_000, 9 * _MIB, 100 * _MIB])
    def test_a_large_one_is_less_than_twice_as_large(self, size: int) -> None:
        """From a megabyte on, classes are closer to each other."""
        assert size <= capacity_for(size) < 2 * size

    def test_growth_is_geometric(self) -> None:
        """Growing a frame byte by byte to a megabyte takes six buffers, not a thousand."""
        pool = BufferPool(limit=1 << 30, keep=0)
        sizes = set()
        capacity = 0
        for have in range(0, _MIB + 1, 64):
            if have > capacity:
                capacity = len(_acquire(pool, have))
                sizes.add(capacity)

        assert len(sizes) == 6

    def test_buffers_are_writable_bytes(self) -> None:
        """A buffer can be received into, like the shared one, which has room for a whole turn."""
        pool = BufferPool(limit=_MIB)

        for buffer in (pool.shared, _acquire(pool, 1)):
            assert (buffer.readonly, buffer.format, buffer.contiguous) == (False, "B", True)
        assert len(pool.shared) >= RECEIVE_BYTES

    def test_large_ones_begin_far_from_the_front_of_a_page(self) -> None:
        """What the kernel copies into a large buffer does not alias the front of its own pages."""
        pool = BufferPool(limit=4 * _MIB)
        for buffer in (pool.shared, _acquire(pool, 20_000), _acquire(pool, _MIB)):
            place = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % 4096
            assert 1024 <= place <= 3072

    def test_buffers_are_disjoint(self) -> None:
        """Two buffers given out at a time never share memory."""
        pool = BufferPool(limit=_MIB)
        first, second = _acquire(pool, 10, "a"), _acquire(pool, 10, "b")
        first[:] = b"a" * len(first)
        second[:] = b"b" * len(second)

        assert bytes(first) == b"a" * len(first)


class TestLimit:
    """What happens when memory runs short."""

    def test_up_to_the_limit(self) -> None:
        """The limit itself can be used up, and not a byte more."""
        pool = BufferPool(limit=3 * SMALLEST)
        for _ in range(3):
            _acquire(pool, 1)

        assert pool.held == pool.limit
        assert pool.acquire(1, "owner") is None
        assert pool.held == pool.limit

    def test_refusal_changes_nothing(self) -> None:
        """A refused owner has no account, and the same request succeeds when there is room."""
        pool = BufferPool(limit=SMALLEST)
        buffer = _acquire(pool, 1, "first")
        assert pool.acquire(1, "second") is None
        assert pool.held_by == {"first": SMALLEST}

        pool.release(buffer, "first")
        _acquire(pool, 1, "second")
        assert pool.held_by == {"second": SMALLEST}

    def test_asks_for_room(self) -> None:
        """Past the limit, `make_room` learns the capacity needed and who asks for it."""
        pool = BufferPool(limit=2 * SMALLEST)
        requests: list[tuple[int, Hashable]] = []
        pool.make_room = lambda size, owner: requests.append((size, owner))
        _acquire(pool, 1, "first")
        _acquire(pool, 1, "first")
        assert requests == []

        assert pool.acquire(1, "second") is None
        assert pool.acquire(2000, "third") is None
        assert requests == [(SMALLEST, "second"), (4 * _KIB + HEADROOM_BYTES, "third")]

    def test_uses_the_room_that_was_made(self) -> None:
        """If `make_room` frees enough, the request that caused it is met."""
        pool = BufferPool(limit=2 * SMALLEST)
        held = [_acquire(pool, 1, "first"), _acquire(pool, 1, "first")]
        pool.make_room = lambda _size, _owner: pool.release(held.pop(), "first")

        _acquire(pool, 1, "second")
        assert pool.held_by == {"first": SMALLEST, "second": SMALLEST}
        assert pool.held == pool.limit

    def test_larger_than_the_limit(self) -> None:
        """A request that can never be met is refused even by an empty pool."""
        pool = BufferPool(limit=SMALLEST)

        assert pool.acquire(SMALLEST + 1, "owner") is None
        assert (pool.held, pool.held_by) == (0, {})


class TestAlarm:
    """The mark below the limit."""

    def test_with_each_request_past_the_mark(self) -> None:
        """The alarm sounds with each request that leaves more held than the mark, and only then."""
        pool = BufferPool(limit=10 * SMALLEST)
        sounded: list[int] = []
        pool.alarm = 2 * SMALLEST
        pool.on_alarm = lambda _owner: sounded.append(pool.held)
        buffers = [_acquire(pool, 1) for _ in range(4)]
        assert sounded == [3 * SMALLEST, 4 * SMALLEST]

        for _ in range(2):
            pool.release(buffers.pop(), "owner")
        assert len(sounded) == 2
        _acquire(pool, 1)
        assert len(sounded) == 3

    def test_not_by_default(self) -> None:
        """A pool that nobody has given an alarm fills up in silence."""
        pool = BufferPool(limit=2 * SMALLEST)
        _acquire(pool, 1)
        _acquire(pool, 1)

        assert pool.acquire(1, "owner") is None

    def test_whose_it_is(self) -> None:
        """The alarm is told who has asked."""
        pool = BufferPool(limit=10 * SMALLEST)
        pool.alarm = 0
        owners: list[Hashable] = []
        pool.on_alarm = owners.append
        _acquire(pool, 1, "one")
        _acquire(pool, 1, "other")

        assert owners == ["one", "other"]

    def test_owner_is_on_the_account_by_then(self) -> None:
        """The alarm sees the accounts with the request that set it off."""
        pool = BufferPool(limit=10 * SMALLEST)
        pool.alarm = 0
        seen: list[dict[Hashable, int]] = []
        pool.on_alarm = lambda _owner: seen.append(dict(pool.held_by))
        _acquire(pool, 1, "owner")

        assert seen == [{"owner": SMALLEST}]


class TestReuse:
    """Buffers that come back."""

    def test_same_memory(self) -> None:
        """A released buffer is what the next request of its class gets."""
        pool = BufferPool(limit=_MIB)
        buffer = _acquire(pool, 100)
        pool.release(buffer, "owner")

        assert _acquire(pool, 200) is buffer

    def test_not_for_another_class(self) -> None:
        """A released buffer is not given out for a request of another size class."""
        pool = BufferPool(limit=_MIB)
        pool.release(_acquire(pool, 5000), "owner")

        assert len(_acquire(pool, 100)) == SMALLEST

    def test_keeps_no_more_than_it_may(self) -> None:
        """Past ``keep`` bytes, released buffers go back to the allocator."""
        pool = BufferPool(limit=_MIB, keep=2 * SMALLEST)
        buffers = [_acquire(pool, 1) for _ in range(5)]
        for buffer in buffers:
            pool.release(buffer, "owner")
        again = [_acquire(pool, 1) for _ in range(5)]

        assert sum(any(fresh is old for old in buffers) for fresh in again) == 2

    def test_keeps_all_while_somebody_waits(self) -> None:
        """Who is told of what comes back has others wait for it; so it is kept for as long."""
        pool = BufferPool(limit=_MIB, keep=2 * SMALLEST)
        told: list[Hashable] = []
        pool.tell(told.append)
        buffers = [_acquire(pool, 1, owner) for owner in "abcde"]
        for owner, buffer in zip("abcde", buffers, strict=True):
            pool.release(buffer, owner)
        assert told == list("abcde")
        again = [_acquire(pool, 1) for _ in range(5)]
        assert all(any(fresh is old for old in buffers) for fresh in again)

        for buffer in again:
            pool.release(buffer, "owner")
        pool.tell(None)
        assert pool._idle == 2 * SMALLEST
        pool.release(_acquire(pool, 1), "owner")
        assert told == list("abcde") + ["owner"] * 5

    @pytest.mark.parametrize(
        ("limit", "largest", "kept"),
        [
            (256 * _MIB, _MIB + 4, 16 * _MIB),
            (1 << 30, 16 * _MIB + 4, 4 * (16 * _MIB + HEADROOM_BYTES)),
            (256 * _MIB, 16 * _MIB + 4, 64 * _MIB),
            (8 * _MIB, _MIB + 4, 16 * _MIB),
            (1 << 33, 1 << 30, 1 << 31),
        ],
    )
    def test_some_of_the_largest_are_kept(self, limit: int, largest: int, kept: int) -> None:
        """Four of them, if that is no more than a quarter of the limit; and 16 MiB in any case."""
        assert kept_bytes(limit, largest) == kept

    def test_keeps_nothing(self) -> None:
        """With nothing to keep, every buffer is fresh."""
        pool = BufferPool(limit=_MIB, keep=0)
        buffer = _acquire(pool, 1)
        pool.release(buffer, "owner")

        assert _acquire(pool, 1) is not buffer

    def test_kept_ones_make_room(self) -> None:
        """What is kept goes before all memory together would pass the limit, large ones first."""
        pool = BufferPool(limit=100 * _KIB, keep=100 * _KIB)
        sizes = [1, 4 * _KIB, 64 * _KIB]
        for buffer in [_acquire(pool, size) for size in sizes]:
            pool.release(buffer, "owner")
        large = _acquire(pool, 16 * _KIB)
        assert pool._idle + len(large) <= pool.limit
        pool.release(large, "owner")
        held = [_acquire(pool, 16 * _KIB) for _ in range(5)]
        assert sum(map(len, held)) + pool._idle <= pool.limit
        assert [len(free) for _, free in sorted(pool._free.items())] == [1, 1, 0, 0]

    def test_kept_bytes_are_counted_down_again(self) -> None:
        """A buffer that is given out again makes room for another to be kept."""
        pool = BufferPool(limit=_MIB, keep=SMALLEST)
        for _ in range(100):
            buffer = _acquire(pool, 1)
            pool.release(buffer, "owner")
            assert _acquire(pool, 1) is buffer
            pool.release(buffer, "owner")


class PoolAgainstModel(RuleBasedStateMachine):
    """The accounts must be those that a plain list of loans gives."""

    LIMIT = 64 * _KIB
    KEEP = 16 * _KIB
    owners = st.sampled_from(["a", "b", "c"])

    def __init__(self) -> None:
        super().__init__()
        self.pool = BufferPool(self.LIMIT, self.KEEP)
        self.pool.make_room = self.make_room
        self.pool.alarm = self.LIMIT // 2
        self.pool.on_alarm = self.on_alarm
        self.loans: list[tuple[memoryview, Hashable]] = []
        self.sheds = 0
        self.room_requests = 0
        self.alarms = 0

    def make_room(self, _size: int, _owner: Hashable) -> None:
        self.room_requests += 1
        for _ in range(min(self.sheds, len(self.loans))):
            self.pool.release(*self.loans.pop(0))

    def on_alarm(self, _owner: Hashable) -> None:
        self.alarms += 1

    @rule(size=st.integers(0, 5000) | st.integers(0, 70_000), owner=owners, sheds=st.integers(0, 3))
    def acquire(self, size: int, owner: str, sheds: int) -> None:
        self.sheds, self.room_requests, self.alarms = sheds, 0, 0
        before = self.pool.held
        buffer = self.pool.acquire(size, owner)
        if buffer is None:
            assert self.room_requests == 1
            assert self.alarms == 0
            return
        assert len(buffer) >= size
        assert all(buffer is not other for other, _ in self.loans)
        assert self.room_requests == (before + len(buffer) > self.LIMIT)
        assert self.alarms == (self.pool.held > self.pool.alarm)
        self.loans.append((buffer, owner))

    @precondition(lambda self: self.loans)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.loans) - 1))
        self.pool.release(*self.loans.pop(index))

    @invariant()
    def accounts_agree(self) -> None:
        held_by: Counter[Hashable] = Counter()
        for buffer, owner in self.loans:
            held_by[owner] += len(buffer)
        assert self.pool.held_by == dict(held_by)
        assert self.pool.held == held_by.total()
        assert self.pool.held <= self.LIMIT

    @invariant()
    def kept_within_bounds(self) -> None:
        assert self.pool.held + self.pool._idle <= self.LIMIT
        free = [buffer for buffers in self.pool._free.values() for buffer in buffers]
        assert sum(map(len, free)) == self.pool._idle <= self.KEEP
        assert all(len(b) == size for size, free in self.pool._free.items() for b in free)
        given_out = {id(buffer) for buffer, _ in self.loans}
        assert given_out.isdisjoint(id(buffer) for buffer in free)

    def teardown(self) -> None:
        """Everybody gives everything back, and nothing is left on any account."""
        while self.loans:
            self.pool.release(*self.loans.pop())
        self.accounts_agree()


TestPoolAgainstModel = PoolAgainstModel.TestCase
TestPoolAgainstModel.settings = settings(max_examples=100, deadline=None)
