"""Which domain and which window a sample number stands for: two pure functions that can be asked for any number at
once.

``Mixture`` spreads sample numbers over domains, ``Permutation`` shuffles the windows of a domain. Neither keeps a
table that grows with the run or the data: their size is that of the list of domains.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from dataclasses import dataclass

MASK64 = (1 << 64) - 1
ROUNDS = 6
WEIGHT_BITS = 60


@dataclass(frozen=True)
class _Node:
    """A domain (``name``), or two nodes that share their samples in the ratio of their weights."""

    weight: int
    name: str
    left: _Node | None = None
    right: _Node | None = None

    def left_count(self, count: int) -> int:
        """How many of the node's first ``count`` samples are its left child's: ``count * left/all`` rounded to the
        nearest."""
        assert self.left is not None
        return (2 * count * self.left.weight + self.weight) // (2 * self.weight)


class Mixture:
    """Deals sample numbers 0, 1, 2, ... to domains so that every prefix has the shares of ``weights`` to within about
    a sample.

    The domains are the leaves of a Huffman tree of their weights. A node hands its c-th sample to its left child when
    the rounded share of that child grows at c (the balanced two-letter sequence of Bresenham's line), so each split
    is off by half a sample at most, and what it is off shrinks by the child's share on the way down. In a Huffman
    tree those shares are small except at the leaf itself, which keeps the sum of all errors near one sample for any
    number of domains; greedy dealing (Megatron-LM's blending) also reaches 1, but must count from 0 to find where
    sample i is. Here that takes one walk down the tree in exact integers.

    ``weights``: domain -> share, any positive scale; domains with 0 get no sample.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        total = sum(weights.values())
        heap = []
        for name, weight in weights.items():
            if weight > 0:
                node = _Node(max(1, round(weight / total * (1 << WEIGHT_BITS))), name)
                heap.append((node.weight, name, node))
        heapq.heapify(heap)
        while len(heap) > 1:
            a, b = heapq.heappop(heap), heapq.heappop(heap)
            name = min(a[1], b[1])  # the name only breaks ties, so that the order of the mapping does not matter
            heapq.heappush(heap, (a[0] + b[0], name, _Node(a[0] + b[0], name, b[2], a[2])))
        self._root = heap[0][2]

    def locate(self, i: int) -> tuple[str, int]:
        """(domain, j): sample ``i`` is the j-th (from 0) that the domain gets."""
        node, count = self._root, i
        while True:
            left, right = node.left, node.right
            if left is None or right is None:
                return node.name, count
            before = node.left_count(count)
            node, count = (left, before) if node.left_count(count + 1) > before else (right, count - before)

    def counts(self, i: int) -> dict[str, int]:
        """Samples of each domain among the first ``i``."""
        found: dict[str, int] = {}
        todo = [(self._root, i)]
        while todo:
            node, count = todo.pop()
            if node.left is None or node.right is None:
                found[node.name] = count
            else:
                before = node.left_count(count)
                todo += [(node.left, before), (node.right, count - before)]
        return found


def _mix(x: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea and Flood, 2014): a 64-bit hash."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def seed_key(*parts: int | str) -> int:
    """A 64-bit key from a seed and names."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


class Permutation:
    """A pseudo-random permutation of range(n), computed entry by entry: a Feistel network on the smallest even number
    of bits that holds n, repeated while the result is n or more (cycle walking; Black and Rogaway, 2002). Under four
    tries are expected."""

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        self._half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._keys = [_mix((key + round_ * 0x9E3779B97F4A7C15) & MASK64) for round_ in range(1, ROUNDS + 1)]

    def __getitem__(self, i: int) -> int:
        """Entry ``i``, 0 <= i < n."""
        half, mask = self._half, (1 << self._half) - 1
        while True:
            left, right = i >> half, i & mask
            for key in self._keys:
                left, right = right, left ^ (_mix(key ^ right) & mask)
            i = left << half | right
            if i < self.n:
                return i
