"""The pool of blocks and the names of their contents."""

import pytest

from service.core import AdapterChoice
from service.engine.blocks import BlockPool, OutOfBlocks
from service.engine.prefix_hash import PrefixHash

CHOICES = (None, AdapterChoice("a", 1, 1.0), AdapterChoice("a", 2, 1.0), AdapterChoice("b", 1, 1.0))


def filled(pool: BlockPool, *names: bytes, owner: str | None = None) -> list[int]:
    """One sequence's blocks, with these contents."""
    blocks = pool.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        pool.name(block, name, owner)
    return blocks


def test_a_pool_hands_out_all_or_nothing() -> None:
    pool = BlockPool(3, 2)
    with pytest.raises(OutOfBlocks):
        pool.allocate(4)
    assert pool.available == 3
    taken = pool.allocate(3)
    with pytest.raises(AssertionError):
        pool.check_integrity([taken[:2]])
    with pytest.raises(AssertionError):
        pool.check_integrity([taken, taken[:1]])
    pool.release(taken)
    pool.check_integrity([])


def test_a_block_is_shared_while_it_is_held_and_found_again_after() -> None:
    pool = BlockPool(4, 2)
    held = filled(pool, b"1", b"2")
    shared = pool.share([b"1", b"2", b"3"])
    assert shared == held
    pool.check_integrity([held, shared])
    pool.release(held)
    assert (pool.used, pool.cached) == (2, 0)
    pool.release(shared)
    assert (pool.used, pool.cached, pool.available) == (0, 2, 4)
    assert pool.share([b"1"]) == held[:1]
    assert (pool.used, pool.cached) == (1, 1)


def test_a_chain_is_shared_up_to_its_first_gap() -> None:
    pool = BlockPool(4, 2)
    held = filled(pool, b"1", b"2", b"3")
    assert pool.share([b"1", b"unknown", b"3"]) == held[:1]


def test_free_blocks_are_taken_before_cached_ones_and_those_least_recently_used_first_ends_before_beginnings() -> None:
    pool = BlockPool(5, 2)
    old, new = filled(pool, b"old 1", b"old 2"), filled(pool, b"new 1", b"new 2")
    pool.release(old)
    pool.release(new)
    pool.allocate(1)
    assert pool.evictions == 0
    pool.allocate(1)
    assert pool.share([b"old 1", b"old 2"]) == old[:1]
    pool.allocate(1)
    assert pool.share([b"new 1", b"new 2"]) == new[:1]
    assert pool.evictions == 2


def test_of_two_blocks_with_the_same_content_the_first_is_found() -> None:
    pool = BlockPool(4, 2)
    first, second = filled(pool, b"same"), filled(pool, b"same")
    assert pool.share([b"same"]) == first
    pool.release(second)
    assert pool.cached == 0
    pool.check_integrity([first, first])


def test_what_is_forgotten_is_not_found_even_where_it_is_still_held() -> None:
    pool = BlockPool(4, 2)
    idle, held, other = filled(pool, b"1", owner="a"), filled(pool, b"2", owner="a"), filled(pool, b"3", owner="b")
    pool.release(idle)
    pool.forget("a")
    assert pool.share([b"1"]) == pool.share([b"2"]) == []
    assert pool.share([b"3"]) == other
    pool.release(held)
    assert pool.cached == 0
    pool.check_integrity([other, other])


def digests(prefix_hash: PrefixHash, tokens: tuple[int, ...], choice: AdapterChoice | None) -> tuple[bytes, ...]:
    found: list[bytes] = []
    prefix_hash.extend(found, tokens, choice, blocks=len(tokens) // 2)
    return tuple(found)


def test_a_digest_stands_for_all_tokens_so_far_and_the_adapter_and_rank() -> None:
    prefix_hash = PrefixHash(2)
    tokens = (1, 2, 3, 4, 5, 6)
    chains = [digests(prefix_hash, tokens, choice) for choice in CHOICES]
    assert len({each for chain in chains for each in chain}) == 4 * 3
    changed = digests(prefix_hash, (1, 2, 3, 9, 5, 6), None)
    assert changed[0] == chains[0][0]
    assert not {*changed[1:]} & {*chains[0]}


def test_digests_grow_with_the_tokens_and_differ_from_process_to_process() -> None:
    prefix_hash = PrefixHash(2)
    grown: list[bytes] = []
    for end in (2, 3, 6):
        prefix_hash.extend(grown, (1, 2, 3, 4, 5, 6)[:end], None, blocks=end // 2)
    assert tuple(grown) == digests(prefix_hash, (1, 2, 3, 4, 5, 6), None)
    assert not {*grown} & {*digests(PrefixHash(2), (1, 2, 3, 4, 5, 6), None)}
    with pytest.raises(ValueError, match="do not fill 4 blocks"):
        prefix_hash.extend(grown, (1, 2, 3, 4, 5, 6, 7), None, blocks=4)
