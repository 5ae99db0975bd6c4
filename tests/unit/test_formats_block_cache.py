"""The LRU cache of decoded blocks."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mixtera_hpc.formats.codecs.block_cache import BlockCache


def test_the_least_recently_used_block_is_evicted_first() -> None:
    cache = BlockCache(max_bytes=30)
    loads = []

    def get(key: str, size: int = 10) -> str:
        return cache.get(key, lambda: (loads.append(key) or key.upper(), size))

    assert [get(k) for k in "abca"] == ["A", "B", "C", "A"] and loads == ["a", "b", "c"]
    get("d")
    assert cache.size_bytes == 30
    get("a")
    assert loads == ["a", "b", "c", "d"], "a was used after b, so b is evicted"
    get("b")
    assert loads == ["a", "b", "c", "d", "b"]


def test_a_block_larger_than_the_bound_stays_alone() -> None:
    cache = BlockCache(max_bytes=5)
    cache.get("small", lambda: (1, 2))
    cache.get("large", lambda: (2, 100))
    assert cache.size_bytes == 100
    cache.get("next", lambda: (3, 3))
    assert cache.size_bytes == 3


def test_a_block_requested_by_many_threads_is_decoded_once() -> None:
    cache = BlockCache()
    loads = []
    barrier = threading.Barrier(8)

    def load() -> tuple[str, int]:
        loads.append(1)
        return "block", 1

    def request(_: int) -> str:
        barrier.wait()
        return cache.get("key", load)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(request, range(8))) == ["block"] * 8
    assert len(loads) == 1


def test_a_block_that_failed_is_decoded_again() -> None:
    cache = BlockCache()

    def fail() -> tuple[str, int]:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cache.get("key", fail)
    assert cache.get("key", lambda: ("fine", 1)) == "fine"
