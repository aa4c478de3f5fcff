"""The CUDA caching allocator with `expandable_segments:True`: one range of addresses a pool, mapped as it is needed.

Follows ExpandableSegment, find_expandable_block, map_block and get_free_block of c10/cuda/CUDACachingAllocator.cpp in
torch 2.13: pages of 2 MiB for the small pool and 20 MiB for the large one; every rest of 512 B is split off; a free
block at the end of what is mapped counts as large as it can grow.
"""

from __future__ import annotations

from charkha.backends.torch.allocator import (
    LARGE_SEGMENT,
    SMALL_SEGMENT,
    SMALLEST_BLOCK,
    AllocatorSettings,
    Block,
    CachingAllocator,
    Pool,
)

# Whole pages. (torch takes 9/8 of the device's memory; here a limit is kept by counting, not by addresses.)
_ADDRESS_SPACE = LARGE_SEGMENT * 2**24


class ExpandableAllocator(CachingAllocator):
    """As CachingAllocator; reserved bytes grow and shrink by pages."""

    def __init__(self, settings: AllocatorSettings | None = None) -> None:
        super().__init__(settings)
        self._first: dict[bool, Block] = {pool.small: self._address_range(pool) for pool in (self.small, self.large)}

    def _address_range(self, pool: Pool) -> Block:
        """One unmapped block over the pool's whole range."""
        start = 0 if pool.small else _ADDRESS_SPACE
        block = Block(pool, start, _ADDRESS_SPACE, _ADDRESS_SPACE)
        block.is_mapped = False
        return block

    def _take_free(self, pool: Pool, size: int) -> Block | None:
        """The best fit by the size to which a block can grow, so that the open end is used last."""
        chosen: Block | None = None
        for block in pool.from_size(size):
            if chosen is not None and _size_to_grow(block) >= _size_to_grow(chosen):
                break
            chosen = block
        if chosen is not None:
            pool.remove(chosen)
        return chosen

    def _from_device(self, pool: Pool, size: int) -> Block:
        block = self._room_for(pool, size)
        if not block.is_mapped:
            block = self._map(block, min(block.size, size))
        while block.size < size:
            assert block.after is not None
            block = self._map(block.after, min(size - block.size, block.after.size))
        pool.remove(block)
        return block

    def _room_for(self, pool: Pool, size: int) -> Block:
        """The lowest unmapped block with enough free or unmapped room from it on, or the free block before it."""
        block: Block | None = self._first[pool.small]
        while block is not None:
            if not block.is_mapped:
                before = block.before
                start = before if before is not None and not before.in_use else block
                if _room_from(start, size):
                    return start
            block = block.after
        raise AssertionError("the range of addresses is full")

    def _swallow(self, block: Block, neighbour: Block) -> None:
        super()._swallow(block, neighbour)
        if self._first[block.pool.small] is neighbour:
            self._first[block.pool.small] = block

    def _map(self, block: Block, size: int) -> Block:
        """Maps whole pages from the start of an unmapped block; returns the free block they are now part of."""
        page = SMALL_SEGMENT if block.pool.small else LARGE_SEGMENT
        mapped = min(-(-size // page) * page, block.size)
        self.grow(mapped)
        if mapped < block.size:
            rest = Block(block.pool, block.address + mapped, block.size - mapped, block.segment)
            rest.is_mapped = False
            block.size = mapped
            block.insert_after(rest)
        block.is_mapped = True
        self.add_free(block)
        return block

    def _worth_splitting(self, pool: Pool, rest: int) -> bool:
        return rest >= SMALLEST_BLOCK

    def _release(self, block: Block) -> None:
        """Unmaps the whole pages inside a free block; parts of a page at its ends stay."""
        page = SMALL_SEGMENT if block.pool.small else LARGE_SEGMENT
        begin = -(-block.address // page) * page
        end = (block.address + block.size) // page * page
        if end <= begin:
            return
        block.pool.remove(block)
        block = self._cut_front(block, begin - block.address)
        self._cut_back(block, end - begin)
        self.reserved_bytes -= block.size
        block.is_mapped = False
        self.add_free(block)

    def _cut_front(self, block: Block, size: int) -> Block:
        """Leaves the first `size` bytes as a free block; returns the rest, listed nowhere."""
        if size == 0:
            return block
        rest = Block(block.pool, block.address + size, block.size - size, block.segment)
        block.size = size
        block.insert_after(rest)
        block.pool.add(block)
        return rest

    def _cut_back(self, block: Block, size: int) -> None:
        """Leaves what is beyond `size` bytes as a free block."""
        if block.size > size:
            tail = Block(block.pool, block.address + size, block.size - size, block.segment)
            block.size = size
            block.insert_after(tail)
            block.pool.add(tail)

    def _collect_garbage(self) -> None:
        """Nothing: torch collects whole segments, and an expandable one is never whole."""


def _size_to_grow(block: Block) -> int:
    after = block.after
    return block.size + (after.size if after is not None and not after.is_mapped else 0)


def _room_from(block: Block | None, size: int) -> bool:
    room = 0
    while block is not None and not block.in_use and room < size:
        room += block.size
        block = block.after
    return room >= size


def allocator_for(settings: AllocatorSettings) -> CachingAllocator:
    """The simulator that these settings ask for."""
    return ExpandableAllocator(settings) if settings.expandable_segments else CachingAllocator(settings)
