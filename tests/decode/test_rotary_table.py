"""On a CPU a step reads its cosines and sines from a table: the bits of the model's own module for each position."""

import random

import firp
import pytest
import torch
from firp.engine.rows import SMALLEST_TABLE, RotaryTable, row_rotary
from models import FAMILIES, tiny_model


def a_tree(seed):
    """Depths, lookahead nodes (-1: none) and context lengths of a few sequences, and k."""
    draw = random.Random(seed)
    batch, nodes, slots = draw.randint(1, 3), draw.randint(1, 9), draw.randint(0, 3)
    depths = [[0, *(draw.randint(1, 4) for _ in range(nodes - 1))] for _ in range(batch)]
    lookahead = [[draw.randint(-1, nodes - 1) for _ in range(slots)] for _ in range(batch)]
    context_lens = [draw.randint(0, 2 * SMALLEST_TABLE) for _ in range(batch)]
    return *(torch.tensor(rows, dtype=torch.int32) for rows in (depths, lookahead, context_lens)), draw.randint(1, 4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_table_holds_what_the_module_computes(family, dtype):
    view = firp.Engine(tiny_model(1, family, dtype=dtype)).view
    rotary = view.fixed_rotary
    if rotary is None:
        pytest.skip("its frequencies follow the length of a sequence")
    table, hidden = RotaryTable(rotary), torch.zeros(1, 1, 8, dtype=dtype)
    for seed in range(13):
        if seed == 6:
            rotary.inv_freq.data.mul_(0.5)  # which no version counter tells of
        if seed == 7:
            frequencies = rotary.inv_freq.clone()
            del rotary.inv_freq
            rotary.inv_freq = torch.nn.Parameter(frequencies)
        if seed in (8, 10):
            rotary.attention_scaling = torch.tensor(1.5) if seed == 8 else rotary.attention_scaling.mul_(2)
        if seed == 9:
            with torch.no_grad():
                rotary.inv_freq.mul_(0.3)
        if seed == 11:
            rotary.attention_scaling = 0.7
        tree = a_tree(seed)
        for got, expected in zip(table(hidden, *tree), row_rotary(rotary, hidden, *tree), strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_engines_read_a_table_on_a_cpu():
    """Not where layers are compiled."""
    model = tiny_model(1)
    assert isinstance(firp.Engine(model).steps.row_rotary, RotaryTable)
    assert not isinstance(firp.Engine(model, compile=True).steps.row_rotary, RotaryTable)
