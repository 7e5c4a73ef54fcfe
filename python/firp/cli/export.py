"""`firp export` and `firp push`: a predictor where other tools find it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub import get_token, snapshot_download

from firp.cli import options
from firp.integrations.export import CARD, FORMATS, PREDICTOR_FILES, check_format, check_output
from firp.integrations.export import export as run_export
from firp.integrations.push import plan_upload
from firp.integrations.push import push as run_push
from firp.tools.models import load_config


def export(
    output: Annotated[Path, typer.Argument(help="Folder to write; it must not be there yet, or be empty.")],
    to: Annotated[str, typer.Option(help=f"What loads it: {', '.join(FORMATS)}.")],
    model: Annotated[
        str | None, typer.Option(help="Base model that the predictor has to fit; its shipped one is the default.")
    ] = None,
    predictor: options.Predictor = None,
) -> None:
    """Write a predictor as another tool loads it."""
    options.one_process("export")
    check_format(to)
    check_output(output)
    if model is None and predictor is None:
        raise ValueError("predictor: got none, expected a folder or hub id, or --model with a shipped one")
    drafter = options.find_predictor(model or "", predictor)
    config = None if model is None else load_config(model)
    if config is not None:
        drafter.check_config(config, (config.architectures or [type(config).__name__])[0])
    source = drafter.folder or Path(snapshot_download(str(predictor), allow_patterns=list(PREDICTOR_FILES)))
    run_export(to, output, drafter, source, config)
    print(f"wrote {output}")


def push(
    source: Annotated[Path, typer.Argument(help="Folder of a predictor, or one that `firp export` wrote.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, owner/name; made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="A repository that is made is private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be uploaded, and where.")] = False,
) -> None:
    """Put a predictor or an exported folder on the Hub. Without a token this is a dry run."""
    options.one_process("push")
    upload = plan_upload(source, repo)
    told = "has no token (hf auth login, or HF_TOKEN)" if get_token() is None else None
    print(f"{upload.folder} -> https://huggingface.co/{repo}, {upload.num_bytes / 1e6:.1f} MB")
    for name in upload.files:
        print(f"  {name}" + (" (unless the repository has one)" if name == CARD else ""))
    if dry_run or told:
        print("nothing was uploaded: " + ("this is a dry run" if dry_run else f"this machine {told}"))
        return
    print(f"uploaded: {run_push(upload, private)}")
