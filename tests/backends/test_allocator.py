"""The simulated CUDA caching allocator, rule by rule, with numbers worked out by hand from torch's source."""

from __future__ import annotations

import itertools
import random

import pytest

from charkha.backends.torch.allocator import (
    EMPTY_CACHE,
    AllocatorSettings,
    CachingAllocator,
    OutOfDeviceMemory,
    replay,
    round_size,
)
from charkha.backends.torch.expandable import allocator_for

MIB = 2**20
EXPANDABLE = AllocatorSettings(expandable_segments=True)


def allocator_after(*steps: int | str, settings: AllocatorSettings | None = None) -> CachingAllocator:
    """Sizes are allocated and numbered from 1; "-2" frees number 2, "empty" empties the cache."""
    allocator = allocator_for(settings or AllocatorSettings())
    number = 0
    for step in steps:
        if step == "empty":
            allocator.empty_cache()
        elif isinstance(step, str):
            allocator.free(int(step[1:]))
        else:
            number += 1
            allocator.allocate(number, step)
    return allocator


@pytest.mark.parametrize(("asked", "taken"), [(1, 512), (512, 512), (513, 1024), (1_000_000, 1_000_448)])
def test_sizes_are_rounded_to_512_bytes(asked, taken):
    assert round_size(asked) == taken
    assert allocator_after(asked).allocated_bytes == taken


@pytest.mark.parametrize(
    ("asked", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
        (33 * MIB + 1, 34 * MIB),
    ],
)
def test_a_segment_is_2_mib_20_mib_or_its_own_size_in_units_of_2_mib(asked, reserved):
    assert allocator_after(asked).reserved_bytes == reserved


def test_small_requests_share_a_segment_down_to_the_last_block():
    assert allocator_after(*[512] * 4096).reserved_bytes == 2 * MIB
    assert allocator_after(*[512] * 4097).reserved_bytes == 4 * MIB


def test_small_and_large_requests_never_share_one():
    assert allocator_after(5 * MIB, 1024).reserved_bytes == 22 * MIB


def test_a_large_block_is_split_only_when_more_than_1_mib_is_left():
    unsplit = allocator_after(20 * MIB, "-1", 19 * MIB)
    assert unsplit.allocated_bytes == 20 * MIB  # the rest of 1 MiB stays with the block
    split = allocator_after(20 * MIB, "-1", 19 * MIB - 512)
    assert split.allocated_bytes == 19 * MIB - 512
    assert split.reserved_bytes == 20 * MIB


def test_the_smallest_block_that_fits_is_taken():
    # 40 MiB and 24 MiB are free; 22 MiB goes into the 24, so 40 MiB fit without another segment.
    assert allocator_after(40 * MIB, 24 * MIB, "-1", "-2", 22 * MIB, 40 * MIB).reserved_bytes == 64 * MIB


def test_free_neighbours_merge_into_one_block():
    together = allocator_after(8 * MIB, 8 * MIB, "-1", "-2", 18 * MIB)
    assert together.reserved_bytes == 20 * MIB
    apart = allocator_after(8 * MIB, 8 * MIB, "-1", 9 * MIB)  # 8 and 4 MiB are free, but not side by side
    assert apart.reserved_bytes == 40 * MIB


def test_freed_memory_stays_reserved_until_the_cache_is_emptied():
    assert allocator_after(64 * MIB, "-1").reserved_bytes == 64 * MIB
    emptied = allocator_after(64 * MIB, "-1", "empty")
    assert (emptied.reserved_bytes, emptied.peak_reserved_bytes) == (0, 64 * MIB)


def test_emptying_the_cache_keeps_a_segment_of_which_a_part_is_in_use():
    assert allocator_after(8 * MIB, 8 * MIB, "-1", "empty").reserved_bytes == 20 * MIB


def test_at_the_limit_free_segments_are_given_back_and_the_request_is_tried_again():
    full = allocator_after(60 * MIB, "-1", 80 * MIB, settings=AllocatorSettings(limit_bytes=100 * MIB))
    assert (full.reserved_bytes, full.retries) == (80 * MIB, 1)


def test_beyond_the_limit_is_out_of_memory():
    with pytest.raises(OutOfDeviceMemory):
        allocator_after(60 * MIB, 41 * MIB, settings=AllocatorSettings(limit_bytes=100 * MIB))


def test_fragmentation_can_fail_a_request_that_the_sum_of_free_bytes_would_hold():
    steps = [10 * MIB, 10 * MIB, 10 * MIB, 10 * MIB, "-1", "-3", 14 * MIB]
    assert allocator_after(*steps).reserved_bytes == 54 * MIB
    # In one expandable range the first two pages hold 40 MiB, the request goes behind them.
    assert allocator_after(*steps, settings=EXPANDABLE).reserved_bytes == 60 * MIB


def test_garbage_collection_gives_old_segments_back_before_a_new_one_is_taken():
    settings = AllocatorSettings(limit_bytes=100 * MIB, garbage_collection_threshold=0.6)
    collected = allocator_after(40 * MIB, 30 * MIB, "-1", "-2", 50 * MIB, settings=settings)
    assert collected.retries == 0  # without it the limit would have been met: 70 + 50
    assert collected.peak_reserved_bytes == 70 * MIB  # both are of one age, so both went
    assert allocator_after(40 * MIB, 30 * MIB, "-1", "-2", 50 * MIB).peak_reserved_bytes == 120 * MIB


@pytest.mark.parametrize(
    ("steps", "reserved"),
    [
        ((1,), 2 * MIB),
        ((MIB + 1,), 20 * MIB),
        ((33 * MIB,), 40 * MIB),
        ((12 * MIB, 12 * MIB), 40 * MIB),  # the second begins in the first page and grows into the next
        ((33 * MIB, "-1", 39 * MIB), 40 * MIB),
        ((33 * MIB, "-1", 41 * MIB), 60 * MIB),  # a free end grows instead of being left behind
    ],
)
def test_expandable_segments_grow_by_pages_of_2_and_20_mib(steps, reserved):
    assert allocator_after(*steps, settings=EXPANDABLE).reserved_bytes == reserved


def test_expandable_segments_split_off_every_rest():
    assert allocator_after(20 * MIB, "-1", 19 * MIB, settings=EXPANDABLE).allocated_bytes == 19 * MIB


def test_emptying_the_cache_unmaps_the_whole_pages_inside_free_blocks():
    inside = allocator_after(30 * MIB, 30 * MIB, 30 * MIB, "-2", "empty", settings=EXPANDABLE)
    assert inside.reserved_bytes == 80 * MIB  # of 30 to 60 MiB only the page from 40 to 60 is wholly free
    again = allocator_after(30 * MIB, 30 * MIB, 30 * MIB, "-2", "empty", 25 * MIB, settings=EXPANDABLE)
    assert again.reserved_bytes == 100 * MIB  # 10 MiB free before the hole; the page is mapped again


@pytest.mark.parametrize("settings", [AllocatorSettings(), EXPANDABLE], ids=["segments", "expandable"])
def test_blocks_never_overlap_and_nothing_is_lost(settings):
    """A random stream: allocated bytes are the sum of the blocks; all is given back at the end."""
    draw = random.Random(0)
    allocator = allocator_for(settings)
    alive: list[int] = []
    for number in range(1, 3000):
        allocator.allocate(number, int(2 ** draw.uniform(1, 26)))
        alive.append(number)
        while alive and draw.random() < 0.48:
            allocator.free(alive.pop(draw.randrange(len(alive))))
        if draw.random() < 0.01:
            allocator.empty_cache()
    # Addresses of segments are given out once, so blocks can be compared over all of them.
    blocks = sorted((block.address, block.size) for block in allocator._in_use.values())
    for (start, size), (following, _size) in itertools.pairwise(blocks):
        assert start + size <= following
    assert sum(size for _start, size in blocks) == allocator.allocated_bytes <= allocator.reserved_bytes
    for number in alive:
        allocator.free(number)
    allocator.empty_cache()
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 0)


def test_a_recorded_stream_is_replayed_by_number():
    allocator = CachingAllocator()
    replay(allocator, [1, 2, -1, EMPTY_CACHE, 3], [0, 64 * MIB, 1000, 0])
    assert allocator.reserved_bytes == 2 * MIB  # the first is gone; the third lies elsewhere and takes nothing
    assert allocator.peak_allocated_bytes == 64 * MIB + 1024
