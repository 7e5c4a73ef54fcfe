"""Low-rank adapters on pseudo rows in the layers above the insertion layer, beside maps that learn the same text.

python -m benchmarks.ablations.adapters --data text.npz --prompts prompts.jsonl --output runs

Each variant goes on from a trained predictor over the same steps, text and anchors. Its update and its transition stay
as they are. An adapter adds x A B to each of the seven linears of a layer, for pseudo rows alone: node rows never see
it, so it could not change the output. Run the same command again to go on with what is missing.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import firp
import torch
import typer
from firp.bench.runner import TAU_FORMULA
from firp.cli.options import choose_device
from firp.decoder.passes import PseudoAttention
from firp.decoder.view import DecoderView, replace_submodule, shallow
from firp.drafting.predictor import FirpPredictor
from firp.drafting.recording import make_profile
from firp.drafting.transition import token_tables
from firp.drafting.trees import TreeConfig
from firp.tools.environment import environment
from firp.tools.figures import cut, raised
from firp.tools.files import locked
from firp.tools.prompt_files import OWN_PROMPTS, load_prompts
from firp.train.config import TrainConfig
from firp.train.data import load_dataset
from firp.train.start import start_of
from firp.train.trainer import LOG, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.ablations.answers import Answers, answers_to, tau_by_category
from benchmarks.ablations.trained import folder_of
from benchmarks.commands import run
from benchmarks.document import Document, digest, make_folder

OUT = Path(__file__).parents[1] / "results/adapters.json"
TREES = ((2, 2, 1), (3, 2, 2), (4, 2, 2), (8, 8, 3), (64, 64, 3))
PARTS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
# Peak learning rates: of adapters that begin at zero, and of maps that were trained before.
VARIANTS = {"adapters": 1e-3, "maps": 1e-4}


class Adapter(nn.Module):
    """A linear, and x A B beside it while `used` says so."""

    def __init__(self, linear: nn.Linear, inner: Tensor, outer: Tensor, used: list[bool]) -> None:
        super().__init__()
        # Past `nn.Module.__setattr__`: the model's linear is no part of this.
        self.__dict__.update(linear=linear, inner=inner, outer=outer, used=used)

    def forward(self, rows: Tensor) -> Tensor:
        made = self.linear(rows)
        if self.used[0]:
            made = made + rows @ self.inner.to(rows.dtype) @ self.outer.to(rows.dtype)
        return made


class AdaptedView(DecoderView):
    """A model whose layers from `insertion_layer` on treat pseudo rows by adapters of a rank.

    Attributes:
        adapters: A [in, r] and B [r, out] of every linear, in turns, float32. B is zero at first.
    """

    def __init__(self, model: PreTrainedModel, insertion_layer: int, rank: int, seed: int) -> None:
        super().__init__(model)
        generator, used = torch.Generator().manual_seed(seed), [False]
        self.used, self.adapters = used, nn.ParameterList()
        for layer in self.layers[insertion_layer:]:
            for name, linears in PARTS.items():
                part = shallow(getattr(layer, name))
                for linear in linears:
                    own = getattr(part, linear)
                    inner = torch.randn(own.in_features, rank, generator=generator) * own.in_features**-0.5
                    pair = [
                        nn.Parameter(tensor.to(self.device)) for tensor in (inner, torch.zeros(rank, own.out_features))
                    ]
                    self.adapters.extend(pair)
                    replace_submodule(part, linear, Adapter(own, *pair, used))
                replace_submodule(layer, name, part)

    def run_layers(self, hidden: Tensor, position_embeddings: tuple, step: Any, start: int, stop: int) -> Tensor:
        self.used[0] = isinstance(step, PseudoAttention)
        return super().run_layers(hidden, position_embeddings, step, start, stop)


class AdaptedPredictor(FirpPredictor):
    """A predictor whose adapters learn in the place of its maps."""

    adapters: nn.ParameterList

    @property
    def map_tensors(self) -> list[Tensor]:
        return list(self.adapters)


class AdapterTrainer(Trainer):
    """`firp train` from a trained predictor, where maps alone learn, or adapters alone."""

    def __init__(self, rank: int, config: TrainConfig, output: Path, device: str) -> None:
        self.rank = rank
        super().__init__(config, output, device)

    def make_predictor(self) -> FirpPredictor:
        config = self.config
        kind = AdaptedPredictor if self.rank else FirpPredictor
        made = kind.for_model(self.model, config.num_offsets, config.insertion_layer, **config.sizes)
        made.to(self.device)
        if self.rank:
            self.view = AdaptedView(self.model, config.insertion_layer, self.rank, config.seed)
            made.adapters = self.view.adapters
        learning = {id(tensor) for tensor in made.map_tensors}
        for tensor in made.parameters():
            tensor.requires_grad_(id(tensor) in learning)
        return made

    def parameter_groups(self) -> list[dict]:
        return [{"params": self.predictor.map_tensors, "peak": self.config.learning_rate, "weight_decay": 0.0}]

    def set_start(self) -> None:
        self.predictor.load_state_dict(start_of(self.config, self.view).state_dict(), strict=False)

    def write_result(self) -> None:
        """Nothing: what is trained here stays in its checkpoint."""


def taus(view: DecoderView, predictor: FirpPredictor, answers: Answers) -> dict:
    """tau of the trees that its offsets can draft, over all answers and by category."""
    profile = make_profile(view, predictor, answers, token_tables(view, predictor.transition))
    trees = [(nodes, lookahead, k) for nodes, lookahead, k in TREES if k <= predictor.num_offsets]
    return {f"{n}, {p}, {k}": tau_by_category(profile, profile.replay(TreeConfig(n, p), k)) for n, p, k in trees}


def figures(trainer: AdapterTrainer, answers: Answers) -> dict:
    """Train to the end; held-out scores of the start and of the end, and tau."""
    trainer.run(evaluate_every=100)
    lines = [json.loads(line) for line in (trainer.output / LOG).read_text().splitlines()]
    held_out = [line for line in lines if line["event"] != "train"]
    anchors = trainer.config.anchors * trainer.config.batch_size
    curve = [{name: line[name] for name in ("step", "kl", "top1", "followed1", "followed4")} for line in held_out]
    return {
        "curve": curve, "anchors of a step at most": anchors, "tau": taus(trainer.view, trainer.predictor, answers),
        "learned": sum(tensor.numel() for tensor in trainer.predictor.map_tensors),
        "seconds": round(trainer.seconds, 1),
    }  # fmt: skip


def main(
    data: Annotated[Path, typer.Option(help="Training text: a file written by `firp distill`.")],
    output: Annotated[Path, typer.Option(help="Folder of the runs.")],
    prompts: Annotated[Path, typer.Option(help="JSONL of prompts for tau; default: the project's.")] = OWN_PROMPTS,
    json_path: Annotated[Path, typer.Option("--json", help="Where to write the figures.")] = OUT,
    model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
    start_from: Annotated[str | None, typer.Option(help="A trained predictor; default: the shipped one.")] = None,
    rank: Annotated[int, typer.Option(help="Of the adapters.")] = 16,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each variant.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    anchors: Annotated[int, typer.Option(help="Anchors drawn from each sequence.")] = 128,
    held_out: Annotated[int, typer.Option(help="Sequences kept for accuracy.")] = 48,
    limit: Annotated[int, typer.Option(help="Prompts taken, spread evenly over the file.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 96,
    seed: Annotated[int, typer.Option(help="Seed of the data order, the anchors and the adapters.")] = 0,
    dtype: Annotated[str, typer.Option(help="dtype of the base model.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
) -> None:
    """Train and measure maps and adapters."""
    start = firp.default_predictor(model) if start_from is None else firp.load_predictor(start_from)
    if not 1 <= rank <= start.hidden_size:
        raise ValueError(f"rank: got {rank}, expected 1..{start.hidden_size}")
    where, dataset, chosen = choose_device(device), load_dataset(data), load_prompts(prompts, limit)
    base, tokenizer = firp.load_model(model, dtype, where)
    settings = {
        "model": model, "start": start.fingerprint(), "rank": rank, "steps": steps, "batch_size": batch_size,
        "anchors": anchors, "held_out": held_out, "seed": seed, "dtype": dtype,
        "data": digest(dataset.tokens.tobytes()), "prompts": digest(prompts.read_bytes()), "limit": limit,
        "max_new_tokens": max_new_tokens, "tau": TAU_FORMULA, "threads": torch.get_num_threads(),
        "trees": "dynamic: nodes, lookahead nodes, offsets; no branch",
    }  # fmt: skip
    begin = start_from or str(start.folder)
    answers = functools.cache(lambda: answers_to(base, tokenizer, chosen, max_new_tokens))

    configs = {
        name: TrainConfig(
            model, str(data), start.insertion_layer, start.num_offsets, steps, batch_size, anchors, learning_rate=peak,
            transition_rank=start.transition_rank, update_width=start.update_width,
            draft_vocabulary=start.draft_vocabulary, start_from=begin, held_out=held_out, seed=seed, dtype=dtype,
        )
        for name, peak in VARIANTS.items()
    }  # fmt: skip

    def of_variant(name: str) -> dict:
        config = configs[name]
        made_from = settings | {"config": asdict(config)}
        runs = output / folder_of(name, made_from)
        return figures(AdapterTrainer(rank if name == "adapters" else 0, config, runs, where), answers())

    make_folder("json", json_path.parent)
    with locked(json_path.parent):
        document = Document(json_path, settings, environment(base))
        document.part("start", {}, lambda: {"tau": taus(DecoderView(base), start, answers())})
        for name, peak in VARIANTS.items():
            document.part(name, {"learning_rate": peak}, functools.partial(of_variant, name))
    show(document.figures)


def show(found: dict[str, dict]) -> None:
    curve = found["adapters"]["curve"]
    table = Table(
        "learned", "numbers", "KL at each offset", "top-1", *(f"tau {tree}" for tree in found["start"]["tau"])
    )
    for name, figures in found.items():
        line = curve[0] if name == "start" else figures["curve"][-1]
        losses = " ".join(raised(kl, 3) for kl in line["kl"])
        shares = " ".join(cut(100 * share) for share in line["followed1"])
        taus = (cut(tau["all"], 3) for tau in figures["tau"].values())
        table.add_row(name, str(figures.get("learned", "")), losses, shares, *taus)
    Console(highlight=False, width=160).print(table)


if __name__ == "__main__":
    run(main)
