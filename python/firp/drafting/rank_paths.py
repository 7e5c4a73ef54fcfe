"""Which nodes a static tree has where none were named."""

from __future__ import annotations


def smallest_rank_products(count: int, num_offsets: int) -> list[tuple[int, ...]]:
    """The `count` paths with the smallest product of (rank + 1) * 2 over their levels, prefixes first."""
    chosen: list[tuple[int, ...]] = []
    frontier: dict[tuple[int, ...], int] = {(0,): 2}
    while len(chosen) < count and frontier:
        path = min(frontier, key=lambda p: (frontier[p], p))
        cost = frontier.pop(path)
        chosen.append(path)
        frontier[path[:-1] + (path[-1] + 1,)] = cost // (path[-1] + 1) * (path[-1] + 2)
        if len(path) < num_offsets:
            frontier[path + (0,)] = cost * 2
    return sorted(chosen, key=lambda path: (len(path), path))
