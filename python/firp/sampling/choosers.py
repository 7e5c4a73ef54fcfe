"""Choosers beyond greedy decoding: processed scores, sampling, and processors that see one token at a time.

Sampling draws by
inverse CDF with a uniform that depends only on (seed, sequence, absolute position): a sampled run of FIRP equals a
sampled run of plain decoding token for token, for any tree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from firp.engine.state import DecodeState
from firp.sampling.processors import ON_DEVICE, process_tree
from firp.tools.ranks import Ranks
from firp_kernels import Verified

_GOLDEN = -7046029254386353131
_MIX = (-4658895280553007687, -7723592293110705685)


def _shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(value: Tensor) -> Tensor:
    value = (value ^ _shifted(value, 30)) * _MIX[0]
    value = (value ^ _shifted(value, 27)) * _MIX[1]
    return value ^ _shifted(value, 31)


def uniforms(seed: int | Tensor, sequence: Tensor, position: Tensor) -> Tensor:
    """Uniforms in [0, 1) with 24 bits, a pure function of (seed, sequence, position).

    Args:
        seed: any int64, or one per sequence, [B] int64.
        sequence: [B] int64 index of each sequence in the caller's batch.
        position: [B, n] int64 absolute positions of the tokens to be drawn.

    Returns:
        [B, n] float32.

    Source: the finalizer of splitmix64 (Steele, Lea, Flood 2014), applied once per key.
    """
    seeds = seed if isinstance(seed, Tensor) else torch.full_like(sequence, seed)
    key = _mixed(_mixed(seeds + _GOLDEN) ^ (sequence + 1) * _GOLDEN)
    bits = _mixed(_mixed(key[:, None] + position * _GOLDEN) ^ position)
    return _shifted(bits, 40).to(torch.float32) / (1 << 24)


def _settings(thing: object) -> tuple:
    """Type and plain attributes, which tell two processors or choosers apart that need nothing else."""
    plain = {
        name: value
        for name, value in vars(thing).items()
        if isinstance(value, (bool, int, float, str)) and name != "seed"
    }
    return type(thing).__qualname__, *sorted(plain.items())


class Vectorised:
    """Processed scores of every node at once, then argmax or draw on the device.

    Args:
        ops: from `firp_kernels.bind`.
        processors: all vectorised, prepared by `firp.sampling.processors.without_padding`.
        seed: None takes the argmax, a number draws with the state's seed.
        history: gives the tokens so far of sequence i of the caller's batch, root included, without padding.
        padding: padding tokens of each prompt of the caller's batch.
    """

    one_by_one = False

    def __init__(
        self,
        ops: SimpleNamespace,
        processors: LogitsProcessorList,
        seed: int | None,
        history: Callable[[int], Tensor],
        padding: list[int],
    ) -> None:
        self.ops = ops
        self.processors = processors
        self.seed = seed
        self.history = history
        self.padding = padding
        self.on_device = all(type(processor) in ON_DEVICE for processor in processors)

    @functools.cached_property
    def key(self) -> tuple:
        return self.seed is None, _settings(self), *map(_settings, self.processors)

    def __call__(self, logits: Tensor, state: DecodeState, max_depth: int) -> tuple[Verified, Tensor]:
        tree = state.tree
        sequences = [] if self.on_device else state.sequence.tolist()
        histories = [self.history(i) for i in sequences]
        scores = process_tree(self.ops, self.processors, logits, tree, histories, sequences, self.padding)
        if self.seed is None:
            chosen = self.ops.verify_tree(scores, None, tree.tokens, tree.parents, tree.lookahead, max_depth)
        else:
            levels = torch.arange(1, max_depth + 2, device=logits.device)
            drawn = uniforms(state.seed, state.sequence, state.context_lens.long()[:, None] + levels)
            chosen = self.ops.verify_tree(
                self.probabilities(scores, state), drawn, tree.tokens, tree.parents, tree.lookahead, max_depth
            )
        return chosen, scores

    def probabilities(self, scores: Tensor, state: DecodeState) -> Tensor:
        """Processed scores [B, N, V] to the distributions that are drawn from."""
        return torch.softmax(scores, dim=-1)


class Sequential:
    """Processors of any kind, called once per emitted token, in order, with the tokens so far.

    One sequence walks its tree: a node's scores are processed when the walk reaches it. A batch decodes plainly (root
    only), so that a processor sees the whole padded batch at every token, as in Hugging Face.

    Args:
        ops: from `firp_kernels.bind`.
        ranks: over which the model is sharded.
        processors: any.
        seed: None takes the argmax, a number draws with the state's seed.
        deliver: called with (sequence, token, processed scores [V], logits [V]) as soon as a token of the walk is
            chosen; returns whether that sequence ends there.
        padded_history: the tokens so far of the whole caller's batch, padded, [B, T].
    """

    on_device = False
    one_by_one = True
    key = ("sequential",)

    def __init__(
        self,
        ops: SimpleNamespace,
        ranks: Ranks,
        processors: LogitsProcessorList,
        seed: int | None,
        deliver: Callable[[int, int, Tensor, Tensor], bool],
        padded_history: Callable[[], Tensor],
    ) -> None:
        self.ops = ops
        self.ranks = ranks
        self.processors = processors
        self.seed = seed
        self.deliver = deliver
        self.padded_history = padded_history

    def __call__(self, logits: Tensor, state: DecodeState, max_depth: int) -> tuple[Verified, None]:
        tree = state.tree
        batch, num_nodes, vocab = logits.shape
        parents, tokens = tree.parents[0].tolist(), tree.tokens[0].tolist()
        one_hot = torch.zeros_like(logits, dtype=torch.float32)
        node, level = 0, 0
        while True:
            row = logits[:, node].float()
            scores = self.processors(self.padded_history(), row.clone())
            own = scores.isnan().any(-1), self._choose(scores, state, level)
            broken, choices = self.ranks.agree(own)  # the walk goes on along them
            one_hot[:, node] = torch.nn.functional.one_hot(choices, vocab).float()
            one_hot[broken, node] = float("nan")
            ended = [
                bool(state.finished[b]) or bool(broken[b]) or self.deliver(b, int(choices[b]), scores[b], row[b])
                for b in range(batch)
            ]
            state.finished |= torch.tensor(ended, device=logits.device)
            children = [c for c in range(1, num_nodes) if parents[c] == node and tokens[c] == int(choices[0])]
            if batch > 1 or ended[0] or not children or level == max_depth:
                break
            node, level = children[0], level + 1
        return self.ops.verify_tree(one_hot, None, tree.tokens, tree.parents, tree.lookahead, level), None

    def _choose(self, scores: Tensor, state: DecodeState, level: int) -> Tensor:
        if self.seed is None:
            return scores.argmax(-1)
        position = state.context_lens.long()[:, None] + level + 1
        drawn = uniforms(state.seed, state.sequence, position)
        batch, device = scores.shape[0], scores.device
        root = torch.zeros(batch, 1, dtype=torch.long, device=device)
        alone = torch.full((batch, 1), -1, dtype=torch.int32, device=device)
        none = torch.empty(batch, 0, dtype=torch.int32, device=device)
        probabilities = torch.softmax(scores, dim=-1)[:, None]
        return self.ops.verify_tree(probabilities, drawn, root, alone, none, 0).bonus.clamp(min=0)
