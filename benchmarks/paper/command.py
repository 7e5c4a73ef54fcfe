"""The command line of all figures and of each alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer
from firp.cli.options import choose_device
from firp.tools.files import locked, write_atomically
from firp.tools.prompt_files import OWN_PROMPTS

from benchmarks.document import check, make_folder
from benchmarks.paper.setup import Setup

OUT = Path(__file__).parents[1] / "results/paper"


def command(figures: dict[str, ModuleType], description: str) -> Callable[..., None]:
    """A command that measures and draws `figures`: modules with `measure(setup)` and `draw(document, pyplot)`."""

    def main(
        only: Annotated[str | None, typer.Option(help="Comma-separated names of figures; default all.")] = None,
        out: Annotated[Path, typer.Option(help="Folder of JSON and PNG.")] = OUT,
        model: Annotated[str, typer.Option(help="Base model.")] = "smollm2-135m",
        predictor: Annotated[str | None, typer.Option(help="Default: the one shipped for the model.")] = None,
        heads: Annotated[Path | None, typer.Option(help="Output folder of benchmarks.baselines.train.")] = None,
        data: Annotated[Path | None, typer.Option(help="Training text, for figure 5.")] = None,
        ridge_tokens: Annotated[int, typer.Option(help="Tokens of it.")] = 30_000,
        prompts: Annotated[Path, typer.Option(help="JSONL of held-out prompts; default: the project's.")] = OWN_PROMPTS,
        limit: Annotated[int, typer.Option(help="Prompts taken, spread evenly over the file.")] = 24,
        max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 96,
        repeats: Annotated[int, typer.Option(help="Interleaved repeats of a timed figure.")] = 3,
        dtype: Annotated[str, typer.Option(help="dtype of the base model.")] = "float32",
        device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")] = None,
        plot_only: Annotated[bool, typer.Option(help="Draw from the JSON that is there; measure nothing.")] = False,
    ) -> None:
        chosen = list(figures) if only is None else only.split(",")
        for name in chosen:
            if name not in figures:
                raise ValueError(f"only: got {name!r}, expected some of {', '.join(figures)}")
        setup = Setup(
            out, model, dtype, choose_device(device), predictor, heads, prompts, limit, max_new_tokens, data,
            ridge_tokens, repeats,
        )  # fmt: skip
        make_folder("out", out)
        with locked(out):
            for name in chosen:
                if not plot_only:
                    figures[name].measure(setup)
                plot(figures[name], out / f"{name}.json")
                print(f"wrote {out / name}.json and .png", flush=True)

    main.__doc__ = description
    return main


def plot(figure: ModuleType, path: Path) -> None:
    """Draw the PNG beside a figure's JSON.

    Raises:
        FileNotFoundError: there is no JSON.
        ValueError: matplotlib is not installed.
    """
    from firp.tools.files import read_object

    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("plot: matplotlib is not installed, run: pip install matplotlib") from error
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there, expected the figure's JSON: run without --plot-only")
    document = read_object(path)
    try:
        check(document)
        if not document["parts"]:
            raise LookupError("no parts")
        drawn = figure.draw(document, pyplot)
    except (ArithmeticError, AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: got no figures of {figure.NAME} that can be drawn ({error!r}): measure again"
        ) from error
    write_atomically(path.with_suffix(".png"), lambda staged: drawn.savefig(staged, dpi=110, format="png"))
    pyplot.close(drawn)
