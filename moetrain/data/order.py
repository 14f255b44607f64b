"""Which source and which window a sample number stands for: two pure functions that can be asked for any number at
once.

``Mixture`` spreads sample numbers over sources, ``Permutation`` shuffles the windows of a source. Neither keeps a
table that grows with the run or the data: their size is that of the list of sources.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

MASK64 = (1 << 64) - 1
ROUNDS = 6
FEW = 48  # entries below which numpy takes longer than a loop (measured: they meet between 32 and 64)
WEIGHT_BITS = 60
ONE = 1 << WEIGHT_BITS  # a whole sample, and all weights together


@dataclass(frozen=True)
class _Node:
    """A source (``name``), or two nodes that share their samples in the ratio of their weights.

    ``shift``: twice the node's weight times the samples that the left child is owed beyond its share, so that what one
    phase of the mixture is off is made good in the next.
    """

    weight: int
    name: str
    left: _Node | None = None
    right: _Node | None = None
    owed: int = 0
    shift: int = 0

    def left_count(self, count: int) -> int:
        """How many of the node's first ``count`` samples are its left child's: ``count * left/all`` rounded to the
        nearest, and what it is owed."""
        assert self.left is not None
        found = (2 * count * self.left.weight + self.weight + self.shift) // (2 * self.weight)
        return min(max(found, 0), count) if self.shift else found

    def count_for(self, child: _Node, k: int) -> int:
        """The node's sample (from 0) that is the k-th (from 0) of ``child``: the inverse of ``left_count``."""
        twice, start = 2 * child.weight, self.weight + self.shift
        if child is self.left:
            found = -(-(2 * self.weight * (k + 1) - start) // twice) - 1
        else:
            found = (2 * self.weight * k + start) // twice
        return max(found, k)


class Mixture:
    """Deals sample numbers 0, 1, 2, ... to sources so that every prefix has the shares of ``weights`` to within about
    a sample.

    The sources are the leaves of a Huffman tree of their weights. A node hands its c-th sample to its left child when
    the rounded share of that child grows at c (the balanced two-letter sequence of Bresenham's line), so each split
    is off by half a sample at most, and what it is off shrinks by the child's share on the way down. In a Huffman
    tree those shares are small except at the leaf itself, which keeps the sum of all errors near one sample for any
    number of sources; greedy dealing (Megatron-LM's blending) also reaches 1, but must count from 0 to find where
    sample i is. Here that takes one walk down the tree in exact integers.

    ``weights``: source -> share, any positive scale; sources with 0 get no sample. ``groups``: source -> group (None:
    every source is one): each group is a tree of its own, and the groups are the leaves of another, so that both
    groups and sources have their shares. ``owed``: source -> samples, in units of 2^-60, that it should get beyond its
    share (it gets them as early as the others' shares allow).
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        groups: Mapping[str, str] | None = None,
        owed: Mapping[str, int] | None = None,
    ) -> None:
        self.weights = whole_weights(weights)  # source -> share in units of 2^-60
        owed = owed or {}
        trees: dict[str, list[_Node]] = {}
        for name, weight in self.weights.items():
            group = groups[name] if groups else name
            trees.setdefault(group, []).append(_Node(weight, name, owed=owed.get(name, 0)))
        of_group: dict[str, int] = {}  # also what its sources are owed that have no weight
        for name, samples in owed.items():
            group = groups[name] if groups else name
            of_group[group] = of_group.get(group, 0) + samples
        self._root = _huffman(replace(_huffman(leaves), owed=of_group.get(group, 0)) for group, leaves in trees.items())

    def locate(self, i: int) -> tuple[str, int]:
        """(source, j): sample ``i`` is the j-th (from 0) that the source gets."""
        node, count = self._root, i
        while True:
            left, right = node.left, node.right
            if left is None or right is None:
                return node.name, count
            # left_count(count), and whether left_count(count + 1) is more, by one division
            whole, part = 2 * node.weight, 2 * left.weight
            before, rest = divmod(count * part + node.weight + node.shift, whole)
            goes_left = rest + part >= whole
            if before < 0:
                before, goes_left = 0, False
            elif before > count:
                before, goes_left = count, True
            node, count = (left, before) if goes_left else (right, count - before)

    def counts(self, i: int) -> dict[str, int]:
        """Samples of each source among the first ``i``."""
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

    def positions(self, wanted: Mapping[str, int]) -> dict[str, int]:
        """For each source of ``wanted`` that has a weight: the sample that is its ``wanted[source]``-th (from 0), the
        inverse of ``locate``."""
        found: dict[str, int] = {}
        todo: list[tuple[_Node, tuple[tuple[_Node, _Node], ...]]] = [(self._root, ())]
        while todo:
            node, above = todo.pop()  # above: (parent, child) from the leaf's side up
            if node.left is not None and node.right is not None:
                todo += [(child, ((node, child), *above)) for child in (node.left, node.right)]
            elif node.name in wanted:
                k = wanted[node.name]
                for parent, child in above:
                    k = parent.count_for(child, k)
                found[node.name] = k
        return found


def whole_weights(weights: Mapping[str, float]) -> dict[str, int]:
    """The positive ones of ``weights`` as integers of at least 1 that sum to 2^60."""
    total = sum(weights.values())
    whole = {name: max(1, round(weight / total * ONE)) for name, weight in weights.items() if weight > 0}
    largest = max(whole, key=lambda name: (whole[name], name))
    whole[largest] += ONE - sum(whole.values())
    return whole


def _huffman(nodes: Iterable[_Node]) -> _Node:
    """The Huffman tree of ``nodes``; names only break ties, so that the order of the nodes does not matter."""
    heap = [(node.weight, node.name, node) for node in nodes]
    heapq.heapify(heap)
    while len(heap) > 1:
        (_, name_a, a), (_, name_b, b) = heapq.heappop(heap), heapq.heappop(heap)
        weight, owed, name = a.weight + b.weight, a.owed + b.owed, min(name_a, name_b)
        shift = 2 * (b.owed * weight - owed * b.weight) >> WEIGHT_BITS
        heapq.heappush(heap, (weight, name, _Node(weight, name, b, a, owed, shift)))
    return heap[0][2]


def _mix(x: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea and Flood, 2014): a 64-bit hash."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def _mix_array(x: np.ndarray) -> np.ndarray:
    """``_mix`` of uint64 numbers, which wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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

    def entries(self, numbers: Sequence[int]) -> list[int]:
        """The entries of ``numbers``, as ``[i]`` gives them; many at once take a fraction of the time."""
        if len(numbers) < FEW:
            return [self[i] for i in numbers]
        half, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        found = np.array(numbers, dtype=np.uint64)
        todo = np.arange(len(found))
        while len(todo):
            now = found[todo]
            left, right = now >> half, now & mask
            for key in self._keys:
                left, right = right, left ^ (_mix_array(np.uint64(key) ^ right) & mask)
            found[todo] = now = left << half | right
            todo = todo[now >= np.uint64(self.n)]
        result: list[int] = found.tolist()
        return result
