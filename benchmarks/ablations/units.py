"""A layer of SiLU units beside the linear maps, trained to match later hidden states."""

from __future__ import annotations

import math

import torch
from firp.decoder.passes import RecordingAttention
from firp.decoder.view import DecoderView
from firp.train.data import BatchOrder, TextDataset, make_batch
from firp.train.ridge import SINK_POSITIONS
from torch import Tensor
from tqdm import tqdm

from benchmarks.closed_form import MAX_LENGTH, Source, states_after

RATE, AT_ONCE, EPOCHS = 1e-3, 512, 4


@torch.no_grad()
def gather(
    view: DecoderView, dataset: TextDataset, order: BatchOrder, layer: int, num_offsets: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """The positions of `closed_form.solve`: hidden states [n, d] of their sequences, and which of them have all k after
    them."""
    states: list[Tensor] = []
    usable: list[Tensor] = []
    step = count = total = 0
    while count < tokens:
        batch = make_batch(dataset, order.at(step), MAX_LENGTH)
        attention = RecordingAttention(view.num_layers)
        hidden = states_after(view, batch.tokens.to(view.device), [layer], attention)[layer]
        for rows, length in zip(hidden, batch.lengths.tolist(), strict=True):
            own = max(length - SINK_POSITIONS - num_offsets, 0)
            states.append(rows[SINK_POSITIONS:length].clone())
            usable.append(total + torch.arange(own))
            total += len(states[-1])
            count += own
        step += 1
    return torch.cat(states).float(), torch.cat(usable).to(view.device)


def train_units(states: Tensor, usable: Tensor, maps: Tensor, num_units: int, layer: int) -> tuple[Source, Tensor]:
    """Maps [k, d, d + m] that begin as `maps` [k, d, d] and read m trained units too, and what they read.

    The loss is the squared distance from the later state, as that of the closed form.
    """
    k, size, _ = maps.shape
    generator = torch.Generator().manual_seed(0)
    units = (torch.randn(num_units, size, generator=generator) * size**-0.5).to(states.device).requires_grad_()
    weight = torch.cat([maps, maps.new_zeros(k, size, num_units)], -1).requires_grad_()
    optimizer = torch.optim.AdamW([units, weight], weight_decay=0.0)
    later = torch.arange(1, k + 1, device=states.device)
    scale = states[usable].var(0).sum()
    steps = EPOCHS * math.ceil(len(usable) / AT_ONCE)
    batches = (part for _ in range(EPOCHS) for part in torch.randperm(len(usable), generator=generator).split(AT_ONCE))
    for step, chosen in enumerate(tqdm(batches, total=steps, desc="units", disable=None)):
        index = usable[chosen.to(states.device)]
        found = torch.einsum("kos,ns->nko", weight, Source((layer,), units).of({layer: states[index]}))
        loss = (found - states[index[:, None] + later]).square().sum(-1).mean() / scale
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
    return Source((layer,), units.detach()), weight.detach()
