"""`firp push`: a predictor, or a folder that `firp export` wrote, on the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from firp.drafting.predictor import load_predictor
from firp.drafting.predictor_file import CONFIG, WEIGHTS
from firp.integrations.custom_generate import SUBFOLDER
from firp.integrations.export import CARD, GENERATE, PREDICTOR_FILES, REQUIREMENTS
from firp.integrations.vllm_checkpoint import PREDICTOR


@dataclass(frozen=True)
class Upload:
    """What goes to the Hub, and where.

    Attributes:
        folder: that holds the files.
        files: names in it, and in the repository.
        repo: owner/name.
    """

    folder: Path
    files: tuple[str, ...]
    repo: str

    @property
    def num_bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)


def plan_upload(folder: Path, repo: str) -> Upload:
    """What of a folder belongs on the Hub: never a checkpoint, a log, or the model beside a `custom_generate` folder.

    Args:
        folder: of a predictor, or one that holds `custom_generate/`.
        repo: owner/name.

    Raises:
        FileNotFoundError, ValueError: no such folder, or none that holds a predictor; a name that is no repository's.
    """
    if repo.count("/") != 1:
        raise ValueError(f"repo: got {repo!r}, expected owner/name")
    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"repo: got {repo!r}, expected owner/name: {error}") from error
    if not folder.is_dir():
        raise FileNotFoundError(f"source: got {str(folder)!r}, expected an existing folder")
    names: tuple[str, ...] = PREDICTOR_FILES
    if (folder / GENERATE).is_file():
        load_predictor(folder / SUBFOLDER)
        names = (CARD, GENERATE, REQUIREMENTS, *(f"{SUBFOLDER}/{name}" for name in PREDICTOR_FILES))
    elif (folder / CONFIG).is_file() and (folder / PREDICTOR / CONFIG).is_file():
        load_predictor(folder / PREDICTOR)
        names = (CARD, CONFIG, f"{PREDICTOR}/{CONFIG}", f"{PREDICTOR}/{WEIGHTS}")
    else:
        load_predictor(folder)
    return Upload(folder, tuple(name for name in names if (folder / name).is_file()), repo)


def push(upload: Upload, private: bool = False, api: HfApi | None = None) -> str:
    """Upload in one commit; a model card that the repository has already stays. Returns the commit's address.

    Raises:
        OSError: what the Hub refuses, or that it cannot be reached.
    """
    api = HfApi() if api is None else api
    try:
        api.create_repo(upload.repo, private=private, exist_ok=True)
        there = api.file_exists(upload.repo, CARD)
        return str(
            api.upload_folder(
                repo_id=upload.repo,
                folder_path=upload.folder,
                allow_patterns=[name for name in upload.files if not (there and name == CARD)],
                commit_message="FIRP predictor",
            ).commit_url
        )
    except Exception as error:
        raise OSError(f"repo: cannot write to {upload.repo!r} on the Hub: {' '.join(str(error).split())}") from error
