"""Texts that mean the same, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def clusters(texts: Sequence[str], partition: Callable[[str, str], bool]) -> list[int]:
    """Number of the cluster of each text: connected components of the pairs that mean the same.

    Args:
        texts: In any order.
        partition: Whether two texts mean the same, asked for each pair at most once, the earlier text first.

    Returns:
        Per text the number of one text of its cluster.
    """
    root = list(range(len(texts)))

    def find(i: int) -> int:
        while root[i] != i:
            i = root[i]
        return i

    for i, text in enumerate(texts):
        for j in range(i):
            if find(i) != find(j) and partition(texts[j], text):
                root[find(i)] = find(j)
    return [find(i) for i in range(len(texts))]
