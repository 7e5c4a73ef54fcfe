"""Which tokens earlier text lets expect, how often that held in this run, and how long a branch of it pays.

`firp::lookup_branch` puts the branch into a tree. On a GPU each step does so by itself, in a tree that keeps its size.
On a CPU, where every row has its price, the host decides: here it follows the same rule token by token, over the latest
ends of a match, whether a branch was drafted or not. So it knows at every step what one would be worth. Like the ladder
it looks at tokens and at measured figures, never at a clock.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch

# Tokens of a match, and nodes of a branch.
LEAST_MATCH, MOST_MATCH = 2, 8
MOST_BRANCH = 8
# Earlier ends that are compared at most, the latest first.
ENDS = 64
# How often the token after a match is the next one, by the tokens matched, and how many trials that counts for: four
# fifths of the shares in the model's answers to training prompts, as a tree has some of these tokens without a branch.
EXPECTED = {2: 0.42, 3: 0.51, 4: 0.54, 5: 0.57, 6: 0.62, 7: 0.62, 8: 0.71}
TRUST = 4.0
# Each trial of a length keeps this share of what is known from those before.
MEMORY = 0.95


def host_adds_branches(device: torch.device) -> bool:
    """Whether trees get their branches between steps, from the host; elsewhere a step puts them in, at its size."""
    return device.type == "cpu"


def making_way(num_nodes: int) -> int:
    """Nodes of a tree that keeps its size which a branch takes the place of, and the most that it has itself.

    In a tree of 4 it lost as much as it gave.
    """
    return min(MOST_BRANCH, num_nodes // 2) if num_nodes >= 8 else 0


class Match(NamedTuple):
    """An earlier end of the last `length` tokens of a text."""

    end: int
    length: int


class Text:
    """The tokens of one sequence, and where each pair of them occurred."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = list(tokens)
        self._ends: dict[tuple[int, int], list[int]] = defaultdict(list)
        for end, pair in enumerate(pairwise(tokens[:-1]), start=1):
            self._ends[pair].append(end)
        self.match = self._longest()

    def append(self, token: int) -> None:
        if len(self.tokens) > 1:
            self._ends[self.tokens[-2], self.tokens[-1]].append(len(self.tokens) - 1)
        self.tokens.append(token)
        self.match = self._longest()

    @property
    def expected(self) -> int | None:
        """The token after the match."""
        return self.tokens[self.match.end + 1] if self.match else None

    def _longest(self) -> Match | None:
        """The longest match of the last tokens, the latest among equals, of the latest `ENDS` ends."""
        tokens, last, best = self.tokens, len(self.tokens) - 1, None
        if last < 1:
            return None
        for end in reversed(self._ends.get((tokens[-2], tokens[-1]), [])[-ENDS:]):
            length = LEAST_MATCH
            while length < MOST_MATCH and length <= end and tokens[end - length] == tokens[last - length]:
                length += 1
            if best is None or length > best.length:
                best = Match(end, length)
                if length == MOST_MATCH:
                    break
        return best


class Lookup:
    """The state of one run.

    Args:
        texts: tokens of each sequence so far.
    """

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts = [Text(tokens) for tokens in texts]
        self._trials = dict.fromkeys(EXPECTED, TRUST)
        self._held = {length: TRUST * share for length, share in EXPECTED.items()}

    def observe(self, sequence: int, tokens: list[int]) -> None:
        """Take note of new tokens of a sequence."""
        text = self.texts[sequence]
        for token in tokens:
            if text.match:
                length = text.match.length
                self._trials[length] = MEMORY * self._trials[length] + 1
                self._held[length] = MEMORY * self._held[length] + (text.expected == token)
            text.append(token)

    def chances(self, sequence: int) -> list[float]:
        """Chance that the model's own tokens follow a branch to each of its depths."""
        match, chances, chance = self.texts[sequence].match, [], 1.0
        if match:
            for length in range(match.length, match.length + MOST_BRANCH):
                length = min(length, MOST_MATCH)
                chance *= self._held[length] / self._trials[length]
                chances.append(chance)
        return chances

    def pays(self, sequences: list[int], prices: list[float]) -> int:
        """Nodes of a branch at which the step gains most, 0 where it gains nothing.

        Args:
            sequences: of the batch that takes the step.
            prices: tokens that a sequence could have in the time that a branch of 1, 2, ... nodes adds.
        """
        # A batch is done when its slowest sequence is: what all of them gain counts.
        gains = [[*accumulate(self.chances(sequence)[: len(prices)])] or [0.0] * len(prices) for sequence in sequences]
        worth = [0.0] + [min(least, default=0.0) - price for *least, price in zip(*gains, prices, strict=True)]
        return max(range(len(worth)), key=lambda nodes: (worth[nodes], -nodes))
