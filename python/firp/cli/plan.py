"""`firp doctor --plan`: what decoding and training cost at a model's shape, computed and not measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedConfig

from firp.cli import options
from firp.decoder.view import SUPPORTED_MODEL_TYPES
from firp.drafting.predictor import SHIPPED, FirpPredictor
from firp.engine.memory import gib, plan_run
from firp.engine.weights import Weights, weights_of
from firp.engine.work import Draft, StepWork, Work, break_even, step_work
from firp.tools.models import load_config, parse_dtype
from firp.tools.ranks import check_version, planned_heads
from firp.tools.rates import Rates
from firp.tools.shapes import SHAPES, named_config
from firp.train.config import TrainConfig
from firp.train.plan import training_work
from firp.train.rows import row_width

PAPER = "computed, not measured"
MILLION = 1_000_000


@dataclass(frozen=True)
class Asked:
    """The options of a plan; None is the default.

    Attributes:
        model: a key of `SHAPES`, or what `load_config` takes.
        dtype, tp, batch_size, context, nodes, lookahead, num_offsets, insertion_layer, predictor: as the options are.
    """

    model: str
    dtype: str
    tp: int
    batch_size: int
    context: int | None
    nodes: int | None
    lookahead: int | None
    num_offsets: int | None
    insertion_layer: int | None
    predictor: str | None


def print_plan(console: Console, asked: Asked, rates: Rates) -> None:
    """Print a step of plain decoding beside one of FIRP, the memory of a rank, and the cost of training.

    Raises:
        ValueError: a model that FIRP does not decode, heads that cannot be divided, a size out of range.
    """
    config, dtype = _config_of(asked.model), parse_dtype(asked.dtype)
    check_version(asked.tp)
    context = config.max_position_embeddings if asked.context is None else asked.context
    device = torch.device(rates.kind)
    planned_heads(config, asked.tp)  # before any weight is counted
    weights = weights_of(config, dtype, asked.tp)
    draft = _draft_of(asked, config, weights.architecture)
    steps = {
        name: step_work(config, weights, device, asked.batch_size, context, drafts, asked.tp)
        for name, drafts in (("plain", replace(draft, tree=None)), ("FIRP", draft))
    }
    sizes = f"{asked.dtype}, {asked.batch_size} x {context} tokens, {asked.tp} rank{'s' * (asked.tp > 1)}"
    console.print(f"{asked.model}, {sizes}: {PAPER}")
    console.print(f"shape: {SHAPES[asked.model][0] if asked.model in SHAPES else asked.model}, its config.json")
    console.print(f"rates: {_rates_in_words(rates, asked.tp)} ({rates.source})")
    console.print(
        f"FIRP: N = {draft.nodes}, P = {draft.lookahead}, k = {draft.num_offsets}: {draft.rows} rows a sequence; "
        f"t = {draft.insertion_layer} of {config.num_hidden_layers} layers"
    )
    if context > config.max_position_embeddings:
        console.print(
            f"context: {context} is past the {config.max_position_embeddings} of the model, which decoding refuses"
        )
    _print_step(console, steps, rates)
    _print_collectives(console, steps, rates)
    plain, firp = (1e3 * sum(step.seconds(rates).values()) for step in steps.values())
    console.print(
        f"a step: plain {plain:.4g} ms, FIRP {firp:.4g} ms at least; FIRP breaks even at tau = "
        f"{break_even(steps['plain'], steps['FIRP'], rates):.3f} ({PAPER})"
    )
    _print_memory(console, asked, config, dtype, context, draft, weights, rates)
    whole = weights if asked.tp == 1 else weights_of(config, dtype)
    _print_training(console, config, whole, draft, rates)


def _config_of(name: str) -> PreTrainedConfig:
    if name in SHAPES:
        return named_config(name)
    try:
        config = load_config(name)
    except ValueError as error:
        raise ValueError(f"plan: {error}; or a shape: {', '.join(SHAPES)}") from error
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"plan: got model_type {config.model_type!r}, expected one that FIRP decodes: "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError("plan: got a quantised model, expected whole numbers of --dtype: its bytes are not counted")
    return config


def _draft_of(asked: Asked, config: PreTrainedConfig, architecture: str) -> Draft:
    """What a FIRP step drafts with, of a predictor or of sizes."""
    own_sizes = asked.num_offsets is not None or asked.insertion_layer is not None
    shipped = asked.model in {folder.name for folder in SHIPPED.iterdir()} and not own_sizes
    if asked.predictor is not None or shipped:
        if own_sizes:
            raise ValueError(
                "num_offsets, insertion_layer: given with a predictor, which has its own, expected one of them"
            )
        predictor = options.find_predictor(asked.model, asked.predictor)
        predictor.check_config(config, architecture)
    else:
        layers = config.num_hidden_layers
        with torch.device("meta"):
            predictor = FirpPredictor(
                num_offsets=TrainConfig.num_offsets if asked.num_offsets is None else asked.num_offsets,
                hidden_size=config.hidden_size,
                insertion_layer=layers * 2 // 3 if asked.insertion_layer is None else asked.insertion_layer,
                num_layers=layers,
                vocab_size=config.vocab_size,
                transition_rank=min(TrainConfig.transition_rank, config.hidden_size),
            )
    tree = options.make_tree(predictor, asked.nodes, asked.lookahead, None) or predictor.tree
    if tree.num_nodes == 1:
        raise ValueError("nodes: got 1, which is plain decoding, expected at least 2")
    sizes = predictor.transition_rank, predictor.update_width, predictor.draft_vocabulary
    return Draft(tree, predictor.num_offsets, predictor.insertion_layer, *sizes)


def _rates_in_words(rates: Rates, ranks: int) -> str:
    told = f"{rates.device}, {rates.bandwidth / 1e9:,.1f} GB/s, {(rates.operations or 0) / 1e12:,.2f} TFLOP/s"
    if ranks == 1:
        return told
    return f"{told}, link {(rates.link or 0) / 1e9:,.1f} GB/s, {1e6 * (rates.latency or 0):,.1f} us a collective"


def _table(first: str, title: str, *columns: str) -> Table:
    table = Table(title=f"{title}: {PAPER}")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column)
    return table


def _print_step(console: Console, steps: dict[str, StepWork], rates: Rates) -> None:
    columns = [f"{name}\n{what}" for name in steps for what in ("GB read", "GFLOP", "ms")]
    table = _table("part", "one step on each rank", *columns)
    for part in steps["FIRP"].parts:
        cells: list[str] = []
        for step in steps.values():
            work = step.parts.get(part, Work())
            cells += [*_work(work), f"{1e3 * rates.seconds(*work):.4g}"]
        table.add_row(part, *cells)
    cells = []
    for step in steps.values():
        cells += [*_work(step.total), f"{1e3 * sum(rates.seconds(*work) for work in step.parts.values()):.4g}"]
    table.add_row("all", *cells)
    console.print(table)


def _work(work: Work) -> tuple[str, str]:
    return f"{work.read / 1e9:.4g}", f"{work.operations / 1e9:.4g}"


def _print_collectives(console: Console, steps: dict[str, StepWork], rates: Rates) -> None:
    if not steps["plain"].collectives:
        return
    columns = [f"{name}\n{what}" for name in steps for what in ("count", "MB", "ms")]
    table = _table("collectives", "sent in one step", *columns)
    for kind in steps["FIRP"].collectives:
        cells = []
        for step in steps.values():
            sent = step.collectives[kind]
            cells += [str(sent.number), f"{sent.size / 1e6:.4g}", f"{1e3 * step.seconds(rates)[kind]:.4g}"]
        table.add_row(kind, *cells)
    console.print(table)


def _print_memory(
    console: Console, asked: Asked, config: PreTrainedConfig, dtype: torch.dtype, context: int, draft: Draft,
    weights: Weights, rates: Rates,
) -> None:  # fmt: skip
    device = torch.device(rates.kind)
    drafts = {
        "num_nodes": draft.nodes, "num_lookahead": draft.lookahead,
        "num_offsets": draft.num_offsets, "transition_rank": draft.transition_rank,
        "update_width": draft.update_width, "draft_vocabulary": draft.draft_vocabulary,
    }  # fmt: skip
    sizes = asked.batch_size, asked.tp, weights.bytes
    _, plain = plan_run(config, dtype, device, context, *sizes)
    slots, firp = plan_run(config, dtype, device, context, *sizes, drafts)
    table = _table("part", f"memory of each rank, {slots} cache slots a sequence", "plain", "FIRP")
    for name in vars(plain):
        table.add_row(name, gib(getattr(plain, name)), gib(getattr(firp, name)))
    table.add_row("all", gib(plain.total), gib(firp.total))
    console.print(table)
    fits = (
        "it fits" if firp.total <= rates.memory else f"it does not fit: {gib(firp.total - int(rates.memory))} too much"
    )
    console.print(f"{rates.device} has {gib(int(rates.memory))}: {fits}")


def _print_training(console: Console, config: PreTrainedConfig, weights: Weights, draft: Draft, rates: Rates) -> None:
    tokens, anchors = TrainConfig.max_length, TrainConfig.anchors
    sizes = draft.num_offsets, draft.insertion_layer, draft.transition_rank, draft.update_width
    work = training_work(config, weights, tokens, anchors, *sizes)
    assert rates.operations is not None
    title = f"training, a million tokens in sequences of {tokens} with {anchors} anchors"
    table = _table("part", title, "PFLOP", "device hours")
    rows = {name: getattr(work, name) for name in vars(work)} | {"all": work.total}
    for name, operations in rows.items():
        each = operations * MILLION / tokens
        table.add_row(name, f"{each / 1e15:.4g}", f"{each / rates.operations / 3600:.4g}")
    console.print(table)
    kept = row_width(config, draft.insertion_layer) * weights.itemsize
    console.print(
        f"kept rows (--keep-rows): {kept / 1e3:,.1f} KB a token, {kept * MILLION / 1e9:,.1f} GB on disk a million "
        f"tokens; the base model's part is then paid once. Each training rank holds the whole base model: "
        f"{gib(weights.bytes)} ({PAPER})"
    )
