"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from firp.drafting.predictor import SHIPPED, FirpPredictor, default_predictor, load_predictor
from firp.drafting.trees import TreeConfig
from firp.tools.models import check_source, load_model
from firp.tools.ranks import launched_rank, launched_ranks

Model = Annotated[str, typer.Option(help="Base model: a folder, a hub id, or smollm2-135m.")]
Predictor = Annotated[str | None, typer.Option(help="Folder or hub id; default: the one shipped for the model.")]
Prompts = Annotated[Path, typer.Option(help="JSONL file.", show_default="the project's own")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]
Nodes = Annotated[int | None, typer.Option("--nodes", "-N", help="Draft tree nodes, root included.")]
Lookahead = Annotated[int | None, typer.Option("--lookahead", "-P", help="Nodes that look ahead.")]
TreeKind = Annotated[str | None, typer.Option(help="dynamic or static.")]
Raw = Annotated[bool, typer.Option("--raw", help="Prompt as it is, without the chat template.")]

Temperature = Annotated[float, typer.Option(help="0 is greedy decoding; above 0 samples.")]
TopP = Annotated[float, typer.Option(help="Top-p (nucleus) threshold.")]
TopK = Annotated[int, typer.Option(help="Sample among the k best tokens; 0 for all.")]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Plain = Annotated[bool, typer.Option("--plain", help="No drafting: plain decoding in the same engine.")]


def sampling(temperature: float, top_p: float, top_k: int) -> dict:
    """Options of `generate` for sampling, or for greedy decoding at temperature 0."""
    if temperature < 0:
        raise ValueError(f"temperature: got {temperature}, expected at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: got {top_p}, expected more than 0 and at most 1")
    if top_k < 0:
        raise ValueError(f"top_k: got {top_k}, expected at least 0")
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}


def choose_device(device: str | None) -> str:
    """The device asked for, or the best there is; ValueError for one that is not there."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected cpu or cuda") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device!r}, expected cpu: torch sees no CUDA device here")
    return device


def load(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer; in a job of torchrun this rank's share of the model."""
    return load_model(name, dtype, device, launched_ranks())


def output() -> Console:
    """Where a command prints; in a job of torchrun rank 0 alone does."""
    return Console(highlight=False, quiet=launched_rank() > 0)


def one_process(command: str) -> None:
    """Raise ValueError for a command that runs in one process alone, in a job of several."""
    if launched_ranks() > 1:
        raise ValueError(
            f"{command}: got a job of {launched_ranks()} processes, expected one: start it without torchrun"
        )


def find_predictor(model_name: str, predictor: str | None) -> FirpPredictor:
    """The predictor asked for, or the one shipped for the model."""
    if predictor is None:
        check_source(model_name)
        return default_predictor(model_name)
    shipped = {folder.name for folder in SHIPPED.iterdir()}
    return default_predictor(predictor) if predictor in shipped else load_predictor(predictor)


def make_tree(
    predictor: FirpPredictor, nodes: int | None, lookahead: int | None, kind: str | None
) -> TreeConfig | None:
    """The predictor's own tree with what was asked for changed; None where nothing was."""
    if nodes is None and lookahead is None and kind is None:
        return None
    nodes = predictor.num_nodes if nodes is None else nodes
    lookahead = min(predictor.num_lookahead, nodes) if lookahead is None else lookahead
    return TreeConfig(nodes, lookahead, kind or predictor.tree_kind)


def integers(name: str, text: str) -> tuple[int, ...]:
    """Comma-separated positive numbers; ValueError naming the option for anything else."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise ValueError(f"{name}: got {text!r}, expected positive numbers separated by commas")
    return values
