"""Modules of classes that are not known are tried: a row's result may not depend on the rows beside it."""

import firp
import pytest
import torch
from models import tiny_model, tiny_predictor
from torch import nn

IDS = torch.tensor([[4, 5, 6]])
GREEDY = {"max_new_tokens": 14, "do_sample": False}


class OneScale(nn.Linear):
    """Rounds its input to 8 bits, with one scale over the whole tensor."""

    def forward(self, input):
        scale = input.abs().amax() / 127
        return super().forward((input / scale).round() * scale)


class OutlierColumns(nn.Linear):
    """Columns with an outlier in any row are computed in full, the others rounded, as int8 with a threshold."""

    def forward(self, input):
        outliers = (input.abs() > 6.0).flatten(0, -2).any(0)
        return super().forward(torch.where(outliers, input, (input * 16).round() / 16))


class LastRowSteered(nn.Linear):
    def forward(self, input):
        out = super().forward(input).clone()
        out[:, -1] += 1
        return out


class ScalePerRow(nn.Linear):
    """Rounds to 8 bits with a scale of each row: rows are independent, but a last bit becomes another level."""

    def forward(self, input):
        scale = input.abs().amax(-1, keepdim=True) / 127
        return super().forward((input / scale).round() * scale)


class WeightPerRow(nn.Linear):
    def forward(self, input):
        return super().forward(input) * (1 + 0.1 * torch.sigmoid(input.sum(-1, keepdim=True)))


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


class MeanOfRows(Wrapped):
    def forward(self, rows):
        return self.inner(rows) + 0.1 * rows.mean(1, keepdim=True)


class RowBefore(Wrapped):
    def forward(self, rows):
        return self.inner(rows) + 0.1 * nn.functional.pad(rows, (0, 0, 1, 0))[:, :-1]


class RowDropout(MeanOfRows):
    """A name says nothing about a class."""


class Louder(Wrapped):
    def forward(self, rows):
        return self.inner(rows) * 1.5


def with_module(kind, where, dtype=torch.float64):
    model = tiny_model(1, vocab=11, dtype=dtype)
    parent, _, name = where.rpartition(".")
    old = model.get_submodule(where)
    if issubclass(kind, nn.Linear):
        new = kind(old.in_features, old.out_features, bias=False).to(dtype)
        new.weight = old.weight
    else:
        new = kind(old)
    setattr(model.get_submodule(parent), name, new)
    return model.eval()


DEPENDENT = [
    (OneScale, "model.layers.2.mlp.down_proj"), (OneScale, "model.layers.0.self_attn.k_proj"), (OneScale, "lm_head"),
    (OutlierColumns, "model.layers.1.mlp.up_proj"), (LastRowSteered, "model.layers.0.self_attn.q_proj"),
    (MeanOfRows, "model.layers.1.mlp"), (MeanOfRows, "model.norm"), (RowDropout, "model.layers.1.mlp"), (RowBefore,
    "model.layers.3.mlp"),
    (RowBefore, "model.layers.0.input_layernorm"),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "where"), DEPENDENT)
def test_rows_that_depend_on_each_other_are_refused(kind, where, dtype):
    model = with_module(kind, where, dtype)
    with pytest.raises(ValueError, match=rf"model: '{where}(\.inner)?' \(\w+\) gives a row a result that"):
        firp.generate(model, IDS, predictor=tiny_predictor(model, 1), **GREEDY)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_activations_on_a_coarse_grid_are_refused(dtype):
    """Independent rows, but rounding elsewhere would turn into other tokens than Hugging Face's."""
    model = with_module(ScalePerRow, "model.layers.2.mlp.down_proj", dtype)
    with pytest.raises(
        ValueError, match=r"model: 'model.layers.2.mlp.down_proj' \(ScalePerRow\) rounds its input to few levels"
    ):
        firp.generate(model, IDS, predictor=tiny_predictor(model, 1), **GREEDY)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kind", "where"),
    [(WeightPerRow, "model.layers.2.mlp.down_proj"), (WeightPerRow, "lm_head"), (Louder, "model.layers.1.mlp"),
     (Louder, "model.norm"), (Louder, "model.layers.0.input_layernorm"), (Louder, "model.embed_tokens")],
)  # fmt: skip
def test_modules_of_ones_own_run_where_rows_are_independent(kind, where, dtype):
    model = with_module(kind, where, dtype)
    if where == "model.embed_tokens":
        model.model.embed_tokens.weight = model.model.embed_tokens.inner.weight
    expected = model.generate(IDS, **GREEDY)
    assert torch.equal(firp.generate(model, IDS, predictor=tiny_predictor(model, 1), **GREEDY), expected)


def test_a_softmax_turned_over_rows_is_noticed():
    model = tiny_model(1, vocab=11)
    model.model.layers[1].mlp.act_fn = nn.Softmax(-1).eval()
    drafts = {"predictor": tiny_predictor(model, 1), "tree": firp.TreeConfig(8, 3)}
    assert torch.equal(firp.generate(model, IDS, **drafts, **GREEDY), model.generate(IDS, **GREEDY))
    engine = firp.Engine(model, *drafts.values())
    model.model.layers[1].mlp.act_fn.dim = 1
    for given in (drafts, {"engine": engine}):
        with pytest.raises(
            ValueError, match=r"model: 'model.layers.1.mlp.act_fn' \(Softmax\) gives a row a result that"
        ):
            firp.generate(model, IDS, **given, **GREEDY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchao(dtype):
    """Weights alone: another tensor class, the model's own linears run. Activations too: refused."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    for name in ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"):
        model = tiny_model(1, vocab=64, hidden_size=64, intermediate_size=128, dtype=dtype)
        drafts = {"predictor": tiny_predictor(model, 1), "tree": firp.TreeConfig(8, 3)}
        quantization.quantize_(model, getattr(quantization, name)())
        if "Dynamic" in name:
            with pytest.raises(ValueError, match="rounds its input to few levels"):
                firp.generate(model, IDS, **drafts, **GREEDY)
        else:
            assert torch.equal(firp.generate(model, IDS, **drafts, **GREEDY), model.generate(IDS, **GREEDY))
