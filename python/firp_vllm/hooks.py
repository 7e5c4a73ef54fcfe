"""Where the plug-in enters vLLM: four methods are wrapped, and each does what it did unless FIRP is drafting.

A FIRP checkpoint runs as the method "eagle3", which is vLLM's word for a drafter that reads auxiliary hidden states of
the target. So the scheduler reserves the slots past the last token, and the runner hands over the state after layer t.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from firp_vllm import ARCHITECTURE, TESTED
from firp_vllm.options import check_options


def install() -> None:
    """Wrap vLLM's methods, once in a process."""
    from vllm.config import VllmConfig
    from vllm.config.speculative import SpeculativeConfig
    from vllm.v1.worker.worker_base import WorkerBase

    hooks: list[tuple[type, str, Callable[..., Any]]] = [
        (VllmConfig, "_get_v2_model_runner_unsupported_features", refuse_runner_v2),
        (WorkerBase, "__init__", before_worker),
        (SpeculativeConfig, "__post_init__", recognise),
    ]
    for owner, name, _ in hooks:
        getattr(owner, name)  # all are there, or none is wrapped
    for owner, name, wrapper in hooks:
        wrap(owner, name, wrapper)


def wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a method by `wrapper(original, self, ...)`, once."""
    original = getattr(owner, name)
    if getattr(original, "firp", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    method.firp = True  # type: ignore[attr-defined]
    setattr(owner, name, method)


def is_firp(speculative_config: Any) -> bool:
    """Whether a speculative config that vLLM has completed drafts by FIRP."""
    draft = getattr(speculative_config, "draft_model_config", None)
    return ARCHITECTURE in (getattr(getattr(draft, "hf_config", None), "architectures", None) or ())


def recognise(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """`SpeculativeConfig.__post_init__`: a folder that `firp export --to vllm` wrote needs no method by name."""
    model, other = getattr(self, "model", None), getattr(self, "method", None) not in (None, "eagle3")
    if other and not os.path.isdir(str(model)):  # another drafter's: its repository is vLLM's to look at
        return original(self, *args, **kwargs)
    if not _names_a_checkpoint(model, getattr(self, "revision", None)):
        return original(self, *args, **kwargs)
    check_version()
    check_options(self)
    _register_architecture()
    self.method = "eagle3"
    # The cache holds nothing of the drafter, so a block that is found there is whole.
    self.disable_eagle_block_drop = True
    return original(self, *args, **kwargs)


def refuse_runner_v2(original: Callable[..., Any], self: Any) -> list[str]:
    """`VllmConfig._get_v2_model_runner_unsupported_features`: FIRP drafts within runner V1."""
    return original(self) + ["FIRP speculative decoding"] * is_firp(self.speculative_config)


def before_worker(original: Callable[..., Any], self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """`WorkerBase.__init__`: the runner, which is slow to import, is wrapped only where FIRP drafts."""
    if is_firp(vllm_config.speculative_config):
        check_version()
        _register_architecture()
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        wrap(GPUModelRunner, "__init__", replace_drafter)
    original(self, vllm_config, *args, **kwargs)


def replace_drafter(original: Callable[..., Any], self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    """`GPUModelRunner.__init__`, of the CPU runner too: the drafter it made for "eagle3" gives way to FIRP's."""
    original(self, vllm_config, *args, **kwargs)
    if is_firp(self.speculative_config):
        from firp_vllm.proposer import FirpProposer

        self.drafter = FirpProposer(self.vllm_config, self.device, self)


def check_version() -> None:
    """Raise ValueError, naming the version, unless this vLLM is one that the plug-in was tested with."""
    import vllm

    if vllm.__version__.split("+")[0] not in TESTED:
        raise ValueError(
            f"vllm: got version {vllm.__version__}, expected {' or '.join(TESTED)}: FIRP drafts inside vLLM's runner, "
            f"and was tested with no other"
        )


def _names_a_checkpoint(model: object, revision: str | None) -> bool:
    if not isinstance(model, str) or not (os.path.isdir(model) or model.count("/") == 1):
        return False  # such as "ngram": nothing that could be looked up
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    try:
        fields = get_hf_file_to_dict("config.json", model, revision)
    except Exception:  # vLLM says better what is wrong with it
        return False
    return isinstance(fields, dict) and ARCHITECTURE in (fields.get("architectures") or ())


def _register_architecture() -> None:
    from vllm import ModelRegistry

    from firp_vllm.draft import FirpDraft

    if ARCHITECTURE not in ModelRegistry.models:
        ModelRegistry.register_model(ARCHITECTURE, FirpDraft)
