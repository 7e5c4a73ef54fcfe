"""The FIRP predictor: one linear map per future offset, applied at the insertion layer."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from firp.drafting.kept import kept
from firp.drafting.predictor_file import OptionalFields, find_files, read_fields, read_tensors
from firp.drafting.trees import MAX_NODES, TreeConfig

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_WIDTH = 1 << 20
MAX_UPDATE_WIDTH = 1 << 14
MAX_VOCABULARY = (1 << 31) - 1
SHIPPED = Path(__file__).parents[1] / "predictors"


class PredictorMismatch(ValueError):
    """The predictor was trained for another base model."""


class FirpPredictor(  # type: ignore[call-arg]
    nn.Module,
    PyTorchModelHubMixin,
    library_name="firp",
    tags=["speculative-decoding", "firp"],
    repo_url="https://arxiv.org/abs/2410.20488",
):
    """Predicts the hidden states of the next k positions at the insertion layer: pseudo[i, j] = weight[j] @ h[i].

    Source: FIRP, arXiv 2410.20488, section 3. The token transition (`firp.drafting.transition`) is this project's own.

    Args:
        num_offsets: k, how many future positions are predicted; a tree of 256 nodes is at most 255 deep.
        hidden_size: d, the width of the base model.
        insertion_layer: t, the number of decoder layers below the prediction; 1 <= t <= num_layers - 1.
        num_layers: L of the base model.
        vocab_size: V of the base model.
        architecture: class name of the base model, such as "LlamaForCausalLM".
        base_model: its name, for people; not compared.
        num_nodes: N, draft tree nodes, root included, that pay on the reference machine.
        num_lookahead: P, nodes that get pseudo rows.
        tree_kind: "dynamic" or "static".
        transition_rank: r of the token transition; 0 has none.
        update_width: w of the update of final states (`firp.drafting.update`); 0 has none.
        draft_vocabulary: how many tokens updated rows are scored for, those of `draft_tokens`; 0 is all.

    Attributes:
        weight: [k, d, d].
        transition: [2, d, r] maps from embeddings to the factors of a token as the one before and as the one that
            follows; zeros change nothing. None without a transition.
        update_inputs, update_bias, update_outputs: [k, 2, w, d], [k, w], [k, d, w], as `firp.drafting.update` has
            them, the maps of the inputs apart. None without an update.
        draft_tokens: [draft_vocabulary] int64 buffer, ascending: no other token is drafted. None where all are.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_offsets: int,
        hidden_size: int,
        insertion_layer: int,
        num_layers: int,
        vocab_size: int,
        architecture: str = "LlamaForCausalLM",
        base_model: str = "",
        num_nodes: int = 8,
        num_lookahead: int = 2,
        tree_kind: str = "dynamic",
        transition_rank: int = 0,
        update_width: int = 0,
        draft_vocabulary: int = 0,
    ) -> None:
        super().__init__()
        sizes = (
            ("num_offsets", num_offsets, 1, MAX_NODES - 1), ("hidden_size", hidden_size, 1, MAX_WIDTH),
            ("num_layers", num_layers, 2, MAX_WIDTH), ("vocab_size", vocab_size, 1, MAX_VOCABULARY),
        )  # fmt: skip
        for name, size, least, most in sizes:
            if not least <= size <= most:
                raise ValueError(f"{name}: got {size}, expected {least}..{most}")
        if not 1 <= insertion_layer <= num_layers - 1:
            raise ValueError(
                f"insertion_layer: got {insertion_layer}, expected 1..{num_layers - 1} ({num_layers} layers)"
            )
        if not 0 <= transition_rank <= hidden_size:
            raise ValueError(f"transition_rank: got {transition_rank}, expected 0..{hidden_size} (hidden_size)")
        if not 0 <= update_width <= MAX_UPDATE_WIDTH:
            raise ValueError(f"update_width: got {update_width}, expected 0..{MAX_UPDATE_WIDTH}")
        most = vocab_size if update_width else 0
        if not 0 <= draft_vocabulary <= most:
            raise ValueError(
                f"draft_vocabulary: got {draft_vocabulary}, expected 0..{most} (vocab_size; 0 without an update)"
            )
        TreeConfig(num_nodes, num_lookahead, tree_kind)
        self.num_offsets = num_offsets
        self.hidden_size = hidden_size
        self.insertion_layer = insertion_layer
        self.num_layers = num_layers
        self.vocab_size = vocab_size
        self.architecture = architecture
        self.base_model = base_model
        self.num_nodes = num_nodes
        self.num_lookahead = num_lookahead
        self.tree_kind = tree_kind
        self.transition_rank = transition_rank
        self.update_width = update_width
        self.draft_vocabulary = draft_vocabulary
        self.folder: Path | None = None  # where it was loaded from, if a folder
        self.weight = nn.Parameter(torch.eye(hidden_size).repeat(num_offsets, 1, 1))
        self.transition = nn.Parameter(torch.zeros(2, hidden_size, transition_rank)) if transition_rank else None
        width = update_width
        self.update_inputs = nn.Parameter(torch.zeros(num_offsets, 2, width, hidden_size)) if width else None
        self.update_bias = nn.Parameter(torch.zeros(num_offsets, width)) if width else None
        self.update_outputs = nn.Parameter(torch.zeros(num_offsets, hidden_size, width)) if width else None
        self.draft_tokens: Tensor | None
        self.register_buffer("draft_tokens", torch.arange(draft_vocabulary) if draft_vocabulary else None)

    @property
    def tree(self) -> TreeConfig:
        """Size and kind of the draft tree stored with the predictor."""
        return TreeConfig(self.num_nodes, self.num_lookahead, self.tree_kind)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
    ) -> FirpPredictor:
        """The predictor that `save_pretrained` wrote, in float32 whichever dtype the file has, in evaluation mode.

        Both files are read strictly (`firp.drafting.predictor_file`): a lossless decoder would hide a predictor that
        was loaded in part. Weights are safetensors alone, never a pickle.

        Args:
            pretrained_model_name_or_path: a folder or a hub id; the other arguments are those of `hf_hub_download`.

        Raises:
            FileNotFoundError: a folder that is not there, or without one of the files.
            ValueError: files that do not hold exactly one predictor; file, field or tensor, what was found and what is
                expected are named.
        """
        config, weights = find_files(
            pretrained_model_name_or_path, force_download=force_download, token=token, cache_dir=cache_dir,
            local_files_only=local_files_only, revision=revision,
        )  # fmt: skip
        fields = read_fields(config, cls)
        try:
            with torch.device("meta"):
                predictor = cls(**fields)
        except ValueError as error:
            raise ValueError(f"predictor: {config}: {error}") from error
        tensors = read_tensors(weights, predictor.state_dict(), predictor.vocab_size)
        predictor.load_state_dict(tensors, assign=True)
        return predictor.eval()

    @classmethod
    def for_model(
        cls, model: PreTrainedModel, num_offsets: int, insertion_layer: int, **others: Unpack[OptionalFields]
    ) -> FirpPredictor:
        """An untrained (identity) predictor for `model`; `others` are a tree and sizes of a transition."""
        config = model.config
        name = config._name_or_path
        return cls(
            num_offsets=num_offsets,
            hidden_size=config.hidden_size,
            insertion_layer=insertion_layer,
            num_layers=config.num_hidden_layers,
            vocab_size=config.vocab_size,
            architecture=type(model).__name__,
            base_model=Path(name).name if Path(name).is_dir() else name,
            **others,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., d] at the insertion layer to pseudo rows [..., k, d]."""
        return torch.einsum("kod,...d->...ko", self.weight, hidden)

    @property
    def update_tensors(self) -> list[Tensor]:
        """The update's weights; none without one."""
        tensors = (self.update_inputs, self.update_bias, self.update_outputs)
        return [tensor for tensor in tensors if tensor is not None]

    @property
    def map_tensors(self) -> list[Tensor]:
        """Weights by which pseudo rows reach their final states."""
        return [self.weight]

    @property
    def final_tensors(self) -> list[Tensor]:
        """Weights by which final states become drafts: the update's and the transition's."""
        return [*self.update_tensors, *([] if self.transition is None else [self.transition])]

    def update_weights(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The update's weights on `device` in `dtype`, still of their graph, as `firp.drafting.update.updated` takes
        them."""
        inputs, bias, outputs = (tensor.to(device, dtype) for tensor in self.update_tensors)
        return inputs.transpose(1, 2).flatten(2), bias, outputs

    def first_offsets(self, num_offsets: int) -> FirpPredictor:
        """This predictor with its first k offsets alone, over the same weights.

        Raises:
            ValueError: more offsets than there are.
        """
        if not 1 <= num_offsets <= self.num_offsets:
            raise ValueError(f"num_offsets: got {num_offsets}, expected 1..{self.num_offsets} (the predictor's)")
        if num_offsets == self.num_offsets:
            return self
        with torch.device("meta"):
            other = FirpPredictor(
                num_offsets, self.hidden_size, self.insertion_layer, self.num_layers, self.vocab_size,
                self.architecture, self.base_model, self.num_nodes, self.num_lookahead, self.tree_kind,
                self.transition_rank, self.update_width, self.draft_vocabulary,
            )  # fmt: skip
        other.weight = nn.Parameter(self.weight[:num_offsets].detach(), self.weight.requires_grad)
        other.transition, other.draft_tokens = self.transition, self.draft_tokens
        for name in ("update_inputs", "update_bias", "update_outputs") if self.update_width else ():
            own = getattr(self, name)
            setattr(other, name, nn.Parameter(own[:num_offsets].detach(), own.requires_grad))
        return other.train(self.training)

    def fingerprint(self) -> str:
        """Names these weights at their layer: a digest of some, in float16, which any file keeps."""
        tensors = [*self.parameters(), *self.buffers()]
        return kept(self, "fingerprint", tensors, (self.insertion_layer,), self._digest)

    def _digest(self) -> str:
        digest = hashlib.blake2b(f"{self.insertion_layer}".encode(), digest_size=16)
        for name, tensor in sorted(self.state_dict().items()):
            flat = tensor.flatten()
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            some = flat[:: max(1, flat.numel() // 4096)].cpu()
            digest.update((some.half() if some.is_floating_point() else some).numpy().tobytes())
        return digest.hexdigest()

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise PredictorMismatch, naming the field that differs, unless trained for a model like `model`."""
        self.check_config(model.config, type(model).__name__)

    def check_config(self, config: PreTrainedConfig, architecture: str) -> None:
        """As `check_model`, of a model that is not loaded: its configuration and the name of its class."""
        found = {
            "architecture": architecture,
            "hidden_size": config.hidden_size,
            "num_layers": config.num_hidden_layers,
            "vocab_size": config.vocab_size,
        }
        for field, value in found.items():
            expected = getattr(self, field)
            if value != expected:
                raise PredictorMismatch(
                    f"predictor: {field} differs: the predictor was trained for {expected!r}"
                    f" ({self.base_model or 'unnamed base model'}), the model has {value!r}"
                )


def load_predictor(source: str | os.PathLike) -> FirpPredictor:
    """Load a predictor from a folder or a hub id; one from a folder also knows the profile beside it.

    Raises:
        FileNotFoundError, ValueError: as in `FirpPredictor.from_pretrained`.
    """
    predictor = FirpPredictor.from_pretrained(source)
    folder = Path(source).expanduser()
    predictor.folder = folder if folder.is_dir() else None
    return predictor


def default_predictor(name: str) -> FirpPredictor:
    """The predictor that ships in the package for the base model `name`, such as "smollm2-135m".

    Raises:
        ValueError: none ships for that model.
    """
    shipped = sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir())
    if name not in shipped:
        raise ValueError(
            f"predictor: got none for the model {name!r}, expected the folder of one (one ships for "
            f"{', '.join(shipped)}); train one with `firp train`"
        )
    return load_predictor(SHIPPED / name)
