"""`firp distill` and `firp train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firp.cli import options
from firp.train.config import TrainConfig
from firp.train.distill import DistillConfig
from firp.train.distill import distill as run_distill
from firp.train.plan import needs
from firp.train.ranks import TrainingRanks
from firp.train.server_distill import ServerConfig, distill_from_servers
from firp.train.trainer import Trainer


def distill(
    context: typer.Context,
    prompts: Annotated[str, typer.Option(help="JSONL file of prompts.")],
    output: Annotated[Path, typer.Option(help="File to write, .npz.")],
    model: options.Model = "smollm2-135m",
    limit: Annotated[int | None, typer.Option(help="Prompts taken; default all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 192,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at once.")] = 16,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature of every second batch; the others are greedy.")
    ] = 0.7,
    max_prompt_tokens: Annotated[int, typer.Option(help="Longer prompts are left out.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    dtype: options.Dtype = "bfloat16",
    device: options.Device = None,
    server: Annotated[
        list[str] | None,
        typer.Option(help="URL of an OpenAI-compatible API that runs the model; may be given several times."),
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Of --server: requests in flight at most, over all servers.")] = 32,
    served_model: Annotated[
        str | None, typer.Option(help="Of --server: the model's name there; default: the only one listed.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Of --server: seconds for one answer.")] = 600.0,
) -> None:
    """Let the base model answer prompts: the text a predictor is trained on. Run again to go on after a stop."""
    options.one_process("distill")
    config = DistillConfig(
        model, prompts, limit, max_new_tokens, batch_size, temperature, max_prompt_tokens, seed, dtype
    )
    _check_given(context, ("batch_size", "dtype", "device") if server else ("concurrency", "served_model", "timeout"))
    if not server:
        print(f"wrote {run_distill(config, output, options.choose_device(device))}")
        return
    report = distill_from_servers(config, ServerConfig(tuple(server), concurrency, served_model, timeout), output)
    speed = (
        f"{report.tokens} tokens in {report.seconds:.0f} s ({report.tokens / max(report.seconds, 1e-9):.0f} a second)"
    )
    print(f"wrote {output}: {report.answers} answers; this run: {speed}")
    if report.exact < report.answers:
        print(
            f"{report.answers - report.exact} answers are text that was tokenized here, {report.recounted} of them to "
            "another number of tokens than the server counted"
        )
    if report.failures:
        print(f"{report.failures} prompts got no answer, see {report.failures_file}; run the same command to ask again")


def _check_given(context: typer.Context, names: tuple[str, ...]) -> None:
    """Refuse options that this way of distilling does not have."""
    for name in names:
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
            given = (
                "--server, where the server decides it" if name in ("batch_size", "dtype", "device") else "no --server"
            )
            raise ValueError(f"{name}: got it with {given}; leave it off")


def train(
    data: Annotated[
        str, typer.Option(help="File written by `firp distill`, JSONL of conversations, or folder of a data set.")
    ],
    output: Annotated[Path, typer.Option(help="Folder of the predictor, its checkpoint and log.")],
    model: options.Model = "smollm2-135m",
    insertion_layer: Annotated[int, typer.Option(help="t: decoder layers below the prediction.")] = 20,
    num_offsets: Annotated[int, typer.Option(help="k: future positions predicted.")] = 3,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Sequences a step.")] = 8,
    anchors: Annotated[int, typer.Option(help="Anchors drawn from each sequence.")] = 64,
    max_length: Annotated[int, typer.Option(help="Sequences are cut to this many tokens.")] = 512,
    learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of AdamW for the maps; 0 trains everything except the maps.")
    ] = 5e-4,
    transition_rank: Annotated[int, typer.Option(help="r of the token transition; 0: none.")] = 64,
    update_width: Annotated[int, typer.Option(help="w of the update of final states; 0: none.")] = 0,
    draft_vocabulary: Annotated[
        int, typer.Option(help="Tokens that updated rows are scored for, the most frequent ones; 0: all.")
    ] = 0,
    ridge_tokens: Annotated[
        int, typer.Option(help="Tokens for the ridge start; 0 starts from the identity.")
    ] = 100_000,
    start_from: Annotated[str | None, typer.Option(help="Predictor to continue training from.")] = None,
    held_out: Annotated[int, typer.Option(help="Sequences kept for accuracy.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the data order and of the anchors.")] = 0,
    dtype: options.Dtype = "float32",
    device: options.Device = None,
    keep_rows: Annotated[
        bool, typer.Option(help="Run the base model once and keep its rows in the output folder.")
    ] = False,
    pack: Annotated[
        bool,
        typer.Option(help="Run the base model over rows of up to --max-length tokens that hold several sequences."),
    ] = False,
    report_to: Annotated[str, typer.Option(help="tensorboard, wandb or none, beside the log file.")] = "none",
    time_limit: Annotated[float | None, typer.Option(help="Seconds after which to stop with a checkpoint.")] = None,
) -> None:
    """Train a predictor; run the same command again to resume exactly."""
    config = TrainConfig(
        model=model, data=data, insertion_layer=insertion_layer, num_offsets=num_offsets, steps=steps,
        batch_size=batch_size, anchors=anchors, max_length=max_length, learning_rate=learning_rate,
        transition_rank=transition_rank, update_width=update_width, draft_vocabulary=draft_vocabulary,
        ridge_tokens=ridge_tokens,
        start_from=start_from, held_out=held_out, seed=seed,
        dtype=dtype, keep_rows=keep_rows, pack=pack,
    )  # fmt: skip
    ranks, device = TrainingRanks.of_torchrun(options.choose_device(device))
    trainer = Trainer(config, output, device, report_to=report_to, ranks=ranks)
    if ranks.leads:
        print(*needs(config, trainer.view, trainer.predictor, trainer.dataset, ranks), sep="\n")
    done = trainer.run(time_limit)
    ranks.leave()
    if ranks.leads:
        rest = f"stopped at step {trainer.step} of {steps}; run the same command to go on"
        print(f"wrote {output}" if done else rest)
