"""A chain of drafts from pseudo rows, in plain torch: where the rows go, and which tokens they become."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from firp.drafting.predictor import FirpPredictor
from firp.drafting.transition import make_tables
from firp.drafting.trees import MAX_RANKS
from torch import Tensor

from firp_kernels.ops.update_states import updated

LARGEST_GROWTH = 64.0  # of a pseudo row's size over its state's; trained maps keep it near 1


@dataclass(frozen=True)
class Placed:
    """Where the pseudo rows of a batch stand: row j of a sequence at position p + j, after its last accepted one, p.

    Their keys and values go to the slots of these positions, which vLLM has reserved for drafts. No other row reads
    them: the next step writes its own tokens there first.

    Attributes:
        positions, slots: [B * n] int64.
        seq_lens: [B] int32, keys that the last row of a sequence sees.
        starts: [B + 1] int32, the first row of each sequence.
    """

    positions: Tensor
    slots: Tensor
    seq_lens: Tensor
    starts: Tensor


def place(last: Tensor, count: int, block_table: Tensor, block_size: int) -> Placed:
    """Place `count` rows after the positions `last` [B].

    Args:
        block_table: [B, blocks] int32, the blocks of each sequence's cache.
        block_size: slots of a block.
    """
    positions = last.long()[:, None] + torch.arange(1, count + 1, device=last.device)
    blocks = block_table.gather(1, positions // block_size).long()
    return Placed(
        positions.flatten(),
        (blocks * block_size + positions % block_size).flatten(),
        (last + 1 + count).to(torch.int32),
        torch.arange(len(last) + 1, dtype=torch.int32, device=last.device) * count,
    )


def finite_or(states: Tensor, instead: Tensor) -> Tensor:
    """States [..., d], and `instead` [..., d] for each row of them with a NaN or an infinity.

    Keys and values of a pseudo row stay in the cache until other rows take their slots, and the block may be another
    sequence's by then. Kernels read whole blocks and multiply what they mask by zero, so it must be finite. It is,
    where the row that enters a layer is: the layer's norm makes it as long as any real row.
    """
    return torch.where(states.isfinite().all(-1, keepdim=True), states, instead)


class Chain:
    """A predictor beside its target's embeddings and head.

    Args:
        predictor: with or without a transition.
        embed: tokens [...] to the target's embeddings [..., d].
        head: states [n, d] after the last layer to scores [n, V], the last norm included.
        vocab_size: V.
        dtype, device: of the target.
    """

    def __init__(
        self,
        predictor: FirpPredictor,
        embed: Callable[[Tensor], Tensor],
        head: Callable[[Tensor], Tensor],
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.embed, self.head, self.vocab_size = embed, head, vocab_size
        self.weight = predictor.weight.detach().to(device, dtype)
        self.tables = None
        if predictor.transition is not None:
            self.tables = make_tables(embed, vocab_size, predictor.transition, dtype, device)
        self.update = None
        if predictor.update_width:
            with torch.no_grad():
                self.update = predictor.update_weights(device, dtype)

    def pseudo_rows(self, hidden: Tensor, count: int) -> Tensor:
        """States [B, d] of the last accepted tokens at the insertion layer to finite pseudo rows [B * count, d].

        A row that grows beyond all measure is the state itself instead.
        """
        own = hidden.nan_to_num(0, 0, 0)[:, None].expand(-1, count, -1)
        pseudo = torch.einsum("kod,bd->bko", self.weight[:count], hidden)
        size, usual = (rows.float().norm(dim=-1, keepdim=True) for rows in (pseudo, own))
        sane = size <= LARGEST_GROWTH * usual
        return finite_or(torch.where(sane, pseudo, own), own).flatten(0, 1)

    def choose(self, states: Tensor, bonus: Tensor) -> Tensor:
        """Tokens from left to right, each the best of its row's candidates after the one before.

        Args:
            states: [B, n, d] of the pseudo rows, after the last layer.
            bonus: [B] the token that follows the last accepted one.

        Returns:
            [B, n] int64.
        """
        batch, count, _ = states.shape
        previous = bonus.long().clamp(0, self.vocab_size - 1)
        if self.update is not None:
            states = updated(states, self.embed(previous), *(tensor[:count] for tensor in self.update))
        scores = self.head(states.flatten(0, 1))[:, : self.vocab_size].view(batch, count, -1)
        values, candidates = scores.topk(min(MAX_RANKS, scores.shape[2]))
        tokens = []
        for depth in range(count):
            among = candidates[:, depth]
            score = values[:, depth].float()
            if self.tables is not None and (depth or self.update is None):
                source, target = self.tables
                score = score + torch.einsum("br,bkr->bk", source[previous].float(), target[among].float())
            previous = among.gather(1, score.argmax(1, keepdim=True))[:, 0]
            tokens.append(previous)
        return torch.stack(tokens, 1)
