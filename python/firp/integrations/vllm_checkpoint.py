"""A predictor as vLLM loads it: a folder that the plug-in `firp_vllm` knows by its architecture."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedConfig

from firp.drafting.predictor import FirpPredictor

ARCHITECTURE = "Eagle3FirpDraft"  # the name that `firp_vllm` registers; vLLM wants "Eagle3" in front
PREDICTOR = "predictor"
# Of the base model's weights, which the folder does not hold.
LEFT_OUT = ("quantization_config", "compression_config", "dtype", "torch_dtype", "transformers_version", "auto_map")


def write_vllm_checkpoint(folder: Path, predictor: FirpPredictor, config: PreTrainedConfig) -> None:
    """Write a folder for `vllm serve MODEL --speculative-config '{"model": FOLDER, "num_speculative_tokens": 3}'`.

    It holds vLLM's `config.json` and the predictor in a folder of its own. The configuration is the base model's, with
    the insertion layer as the one auxiliary hidden state.

    Args:
        folder: made here.
        config: of the base model.

    Raises:
        PredictorMismatch: the predictor was trained for another model.
        FileExistsError: the folder is there.
    """
    predictor.check_config(config, (config.architectures or ["none"])[0])
    fields = {name: value for name, value in config.to_dict().items() if name not in LEFT_OUT and name[0] != "_"}
    fields |= {"architectures": [ARCHITECTURE], "eagle_aux_hidden_state_layer_ids": [predictor.insertion_layer]}
    folder.mkdir(parents=True)
    predictor.save_pretrained(folder / PREDICTOR)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
