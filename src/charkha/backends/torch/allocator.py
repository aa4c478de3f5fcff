"""torch's CUDA caching allocator replayed without a GPU: what it reserves for a stream of allocations and frees.

Follows c10/cuda/CUDACachingAllocator.cpp and the constants of c10/core/AllocatorConfig.h in torch 2.13, for one stream:
sizes in units of 512 B; up to 1 MiB from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, larger ones from a
segment of their own in units of 2 MiB; best fit, split, merge with free neighbours, and when a limit is hit free whole
segments given back. With `expandable_segments` each pool is one range of addresses that is mapped page by page
(expandable.py).

Where cudaMalloc puts a segment is not known: later segments are taken to have higher addresses, which decides between
free blocks of the same size only. Not covered: several streams, max_split_size_mb, roundup_power2_divisions.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

MIB = 2**20
SMALLEST_BLOCK = 512  # kMinBlockSize
SMALL_SIZE = MIB  # kSmallSize: the largest request of the small pool
SMALL_SEGMENT = 2 * MIB  # kSmallBuffer
LARGE_SEGMENT = 20 * MIB  # kLargeBuffer, large_segment_size_mb
OWN_SEGMENT_FROM = 10 * MIB  # kMinLargeAlloc
SEGMENT_UNIT = 2 * MIB  # kRoundLarge

EMPTY_CACHE = 0  # the event of torch.cuda.empty_cache()


class OutOfDeviceMemory(Exception):
    """The device limit would be passed even with every free segment given back."""

    def __init__(self, requested_bytes: int, reserved_bytes: int) -> None:
        super().__init__(f"{requested_bytes} bytes asked for with {reserved_bytes} bytes reserved")
        self.requested_bytes = requested_bytes


@dataclass(frozen=True)
class AllocatorSettings:
    """PYTORCH_ALLOC_CONF, and how much the process may reserve.

    `garbage_collection_threshold` (0: off) is a share of the limit above which old free segments are given back before
    a new one is taken.
    """

    expandable_segments: bool = False
    limit_bytes: int | None = None
    garbage_collection_threshold: float = 0.0


class Block:
    """A piece of a segment, in use, free, or (expandable segments) not mapped yet."""

    __slots__ = ("address", "after", "before", "in_use", "is_mapped", "last_used", "pool", "segment", "size")

    def __init__(self, pool: Pool, address: int, size: int, segment: int) -> None:
        self.pool = pool
        self.address = address
        self.size = size
        self.segment = segment  # bytes of the whole segment
        self.before: Block | None = None
        self.after: Block | None = None
        self.in_use = False
        self.is_mapped = True
        self.last_used = 0  # the pool's request count when it became free

    @property
    def is_split(self) -> bool:
        """Whether it is only a part of its segment."""
        return self.before is not None or self.after is not None

    def insert_after(self, rest: Block) -> None:
        """Puts `rest` behind this block in the segment."""
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after = rest


class Pool:
    """The free blocks of one kind, ordered by size and address."""

    def __init__(self, *, small: bool) -> None:
        self.small = small
        self.requests = 0
        self._keys: list[tuple[int, int]] = []
        self._blocks: dict[tuple[int, int], Block] = {}

    def add(self, block: Block) -> None:
        key = (block.size, block.address)
        bisect.insort(self._keys, key)
        self._blocks[key] = block

    def remove(self, block: Block) -> None:
        key = (block.size, block.address)
        self._keys.pop(bisect.bisect_left(self._keys, key))
        del self._blocks[key]

    def from_size(self, size: int) -> Iterator[Block]:
        """Free blocks of at least `size`, the best fit first."""
        for place in range(bisect.bisect_left(self._keys, (size, -1)), len(self._keys)):
            yield self._blocks[self._keys[place]]

    def all(self) -> list[Block]:
        return [self._blocks[key] for key in self._keys]

    def best_fit(self, size: int) -> Block | None:
        return next(self.from_size(size), None)


class CachingAllocator:
    """Bytes allocated and reserved now, and the most of each so far."""

    def __init__(self, settings: AllocatorSettings | None = None) -> None:
        self.settings = settings or AllocatorSettings()
        self.allocated_bytes = self.peak_allocated_bytes = 0
        self.reserved_bytes = self.peak_reserved_bytes = 0
        self.retries = 0
        self.small, self.large = Pool(small=True), Pool(small=False)
        self._in_use: dict[int, Block] = {}
        self._next_address = 0

    def allocate(self, number: int, size: int) -> None:
        """Gives `size` bytes to allocation `number`. Raises OutOfDeviceMemory."""
        rounded = round_size(size)
        pool = self.small if rounded <= SMALL_SIZE else self.large
        pool.requests += 1
        block = self._take_free(pool, rounded)
        if block is None:
            self._collect_garbage()
            block = self._new_block(pool, rounded)
        self._split(block, rounded)
        block.in_use = True
        self._in_use[number] = block
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)

    def free(self, number: int) -> None:
        """Takes allocation `number` back and merges it with its free neighbours."""
        block = self._in_use.pop(number)
        self.allocated_bytes -= block.size
        block.in_use = False
        self.add_free(block)

    def empty_cache(self) -> None:
        """Gives back every segment of which nothing is in use."""
        for pool in (self.small, self.large):
            for block in pool.all():
                self._release(block)

    def add_free(self, block: Block) -> None:
        """Merges a block that is not in use with mapped or unmapped neighbours of its kind; lists it when mapped."""
        for neighbour in (block.before, block.after):
            if neighbour is not None and not neighbour.in_use and neighbour.is_mapped == block.is_mapped:
                self._swallow(block, neighbour)
        block.last_used = block.pool.requests
        if block.is_mapped:
            block.pool.add(block)

    def grow(self, size: int) -> None:
        """Counts `size` bytes more as reserved. Raises OutOfDeviceMemory past the limit."""
        limit = self.settings.limit_bytes
        if limit is not None and self.reserved_bytes + size > limit:
            raise OutOfDeviceMemory(size, self.reserved_bytes)
        self.reserved_bytes += size
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)

    def _take_free(self, pool: Pool, size: int) -> Block | None:
        block = pool.best_fit(size)
        if block is not None:
            pool.remove(block)
        return block

    def _new_block(self, pool: Pool, size: int) -> Block:
        """A block from the device; on the second try with the cache emptied."""
        try:
            return self._from_device(pool, size)
        except OutOfDeviceMemory:
            self.retries += 1
            self.empty_cache()
            return self._from_device(pool, size)

    def _from_device(self, pool: Pool, size: int) -> Block:
        segment = segment_size(size)
        self.grow(segment)
        block = Block(pool, self._next_address, segment, segment)
        self._next_address += segment
        return block

    def _split(self, block: Block, size: int) -> None:
        """Cuts what is not needed off; a rest of up to 1 MiB of the large pool stays with the block."""
        rest = block.size - size
        if not self._worth_splitting(block.pool, rest):
            return
        tail = Block(block.pool, block.address + size, rest, block.segment)
        block.size = size
        block.insert_after(tail)
        tail.last_used = block.pool.requests
        block.pool.add(tail)

    def _worth_splitting(self, pool: Pool, rest: int) -> bool:
        return rest >= SMALLEST_BLOCK if pool.small else rest > SMALL_SIZE

    def _swallow(self, block: Block, neighbour: Block) -> None:
        if neighbour.is_mapped:
            block.pool.remove(neighbour)
        block.size += neighbour.size
        if neighbour is block.before:
            block.address = neighbour.address
            block.before = neighbour.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = neighbour.after
            if block.after is not None:
                block.after.before = block

    def _release(self, block: Block) -> None:
        """Gives a free segment back to the device; a part of one stays."""
        if block.is_split:
            return
        block.pool.remove(block)
        self.reserved_bytes -= block.segment

    def _collect_garbage(self) -> None:
        """Above the threshold, gives back free segments of the large pool that are older than the mean, in rounds."""
        limit, share = self.settings.limit_bytes, self.settings.garbage_collection_threshold
        if limit is None or share <= 0 or self.reserved_bytes <= share * limit:
            return
        target = self.reserved_bytes - int(share * limit)
        candidates = [block for block in self.large.all() if not block.is_split]
        while target > 0 and candidates:
            mean_age = sum(self._age(block) for block in candidates) / len(candidates)
            old = [block for block in candidates if self._age(block) >= mean_age]
            for block in old:
                self._release(block)
                target -= block.segment
            candidates = [block for block in candidates if block not in old]

    def _age(self, block: Block) -> int:
        return self.large.requests - block.last_used


def round_size(size: int) -> int:
    """Bytes that a request of `size` takes."""
    return max(SMALLEST_BLOCK, -(-size // SMALLEST_BLOCK) * SMALLEST_BLOCK)


def segment_size(size: int) -> int:
    """Bytes asked of the device for a rounded request that no free block can hold."""
    if size <= SMALL_SIZE:
        return SMALL_SEGMENT
    if size < OWN_SEGMENT_FROM:
        return LARGE_SEGMENT
    return -(-size // SEGMENT_UNIT) * SEGMENT_UNIT


def replay(allocator: CachingAllocator, events: Iterable[int], sizes: Sequence[int]) -> None:
    """Feeds a recorded stream: +n allocates `sizes[n]` bytes as number n, -n frees it, EMPTY_CACHE empties the cache.

    Numbers begin at 1; an allocation of no bytes is none. Raises OutOfDeviceMemory.
    """
    for event in events:
        if event and not sizes[abs(event)]:
            continue
        if event > 0:
            allocator.allocate(event, sizes[event])
        elif event < 0:
            allocator.free(-event)
        else:
            allocator.empty_cache()
