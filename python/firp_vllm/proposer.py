"""FIRP as a drafter of vLLM's runner V1: pseudo rows pass the target's own upper layers, over its own cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from firp.drafting.predictor import FirpPredictor, load_predictor
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer

from firp_vllm.chain import Chain, finite_or, place
from firp_vllm.cpu_sampling import mend

PREDICTOR = "predictor"
# Their layers are called as layer(positions, hidden_states, residual), and nothing stands between layers and norm.
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ALONE = (
    "pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size", "prefill_context_parallel_size",
)  # fmt: skip


class FirpProposer(EagleProposer):
    """Drafts a chain of n tokens with one pass of n pseudo rows a sequence over layers t+1..L.

    vLLM takes it for an EAGLE-3 drafter. That method's slots past the last token and its preparation of rejected rows
    are used as they are. The rest of that class is a model, which FIRP does not have.

    Raises:
        ValueError: what FIRP cannot draft beside, by name.
        PredictorMismatch: the predictor was trained for another model.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, runner: Any = None) -> None:
        check_supported(vllm_config)
        super().__init__(vllm_config, device, runner)
        if device.type == "cpu":
            mend()
        self.predictor = read_predictor(vllm_config)
        if self.num_speculative_tokens > self.predictor.num_offsets:
            raise ValueError(
                f"speculative_config: num_speculative_tokens: got {self.num_speculative_tokens}, expected "
                f"1..{self.predictor.num_offsets} (the predictor's offsets)"
            )

    def load_model(self, target_model: nn.Module) -> None:
        """Take the target's layers by reference, and make the predictor's tables from its embeddings."""
        self.target = target_model
        self.decoder = target_model.model
        self.upper = self.decoder.layers[self.predictor.insertion_layer :]
        inside = {id(module) for layer in self.upper for module in layer.modules()}
        attention = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)  # type: ignore[type-abstract]
        self._draft_attn_layer_names = {name for name, module in attention.items() if id(module) in inside}
        self.chain = Chain(
            self.predictor,
            self.decoder.embed_input_ids,
            lambda states: target_model.compute_logits(self.decoder.norm(states)),
            self.predictor.vocab_size,
            self.dtype,
            self.device,
        )

    def initialize_attn_backend(self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None) -> None:
        """Metadata for the upper layers' own group of the cache."""
        groups = [
            index
            for index, group in enumerate(kv_cache_config.kv_cache_groups)
            if self._draft_attn_layer_names & set(group.layer_names)
        ]
        if len(groups) != 1:
            raise ValueError(
                f"model: layers above the predictor's ({self.predictor.insertion_layer}) are in {len(groups)} groups "
                f"of the KV cache, expected 1: FIRP drafts over layers that attend alike"
            )
        super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
        if kernel_block_sizes is not None:  # the runner's block tables are in these
            self.block_size = kernel_block_sizes[groups[0]]

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        **others: Any,
    ) -> Tensor:
        """Draft after the last accepted row of each sequence.

        Args:
            num_speculative_tokens: n, how many.
            target_positions: [rows]. target_hidden_states: [rows, d] after layer t.
            next_token_ids: [B] the bonus tokens.
            token_indices_to_sample: [B] the last accepted rows; None takes the last row of each sequence.
            common_attn_metadata: of the target's forward.
            others: what other drafters read.

        Returns:
            [B, n] int64.
        """
        context = common_attn_metadata
        rows = context.query_start_loc[1:] - 1 if token_indices_to_sample is None else token_indices_to_sample
        if num_speculative_tokens == 0:
            return next_token_ids.new_empty(len(rows), 0, dtype=torch.int64)
        placed = place(target_positions[rows], num_speculative_tokens, context.block_table_tensor, self.block_size)
        upper_bound = context.seq_lens_cpu_upper_bound
        _, metadata = self.build_per_group_and_layer_attn_metadata(
            CommonAttentionMetadata(
                query_start_loc=placed.starts,
                query_start_loc_cpu=torch.arange(len(rows) + 1, dtype=torch.int32) * num_speculative_tokens,
                seq_lens=placed.seq_lens,
                num_reqs=len(rows),
                num_actual_tokens=len(placed.slots),
                max_query_len=num_speculative_tokens,
                max_seq_len=context.max_seq_len + num_speculative_tokens,
                block_table_tensor=context.block_table_tensor,
                slot_mapping=placed.slots,
                seq_lens_cpu_upper_bound=None if upper_bound is None else upper_bound + num_speculative_tokens,
            )
        )
        pseudo = self.chain.pseudo_rows(target_hidden_states[rows], num_speculative_tokens)
        states = self._pass_upper_layers(pseudo, placed.positions, metadata, placed.slots)
        return self.chain.choose(states.view(len(rows), num_speculative_tokens, -1), next_token_ids)

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """As many rows as `num_tokens` of a batch can draft from, for the runner's measure of memory."""
        count = min(num_tokens, self.max_batch_size) * self.num_speculative_tokens
        pseudo = torch.zeros(count, self.hidden_size, dtype=self.dtype, device=self.device)
        positions = torch.zeros(count, dtype=torch.int64, device=self.device)
        states = self._pass_upper_layers(pseudo, positions, None, None).view(
            -1, self.num_speculative_tokens, pseudo.shape[1]
        )
        self.chain.choose(states, torch.zeros(len(states), dtype=torch.int64, device=self.device))

    def _pass_upper_layers(self, rows: Tensor, positions: Tensor, metadata: Any, slots: Tensor | None) -> Tensor:
        states = rows.clone()  # a layer adds to its input in place
        mapping = {} if slots is None else dict.fromkeys(self._draft_attn_layer_names, slots)
        with set_forward_context(metadata, self.vllm_config, num_tokens=len(rows), slot_mapping=mapping):
            for layer in self.upper:
                states = finite_or(torch.add(*layer(positions, states, None)), rows)
        return states


def check_supported(vllm_config: VllmConfig) -> None:
    """Raise ValueError, naming the option, unless FIRP can draft beside what was configured."""
    used = vllm_config.model_config.architecture  # of vLLM's own code, or of its transformers backend
    if used not in ARCHITECTURES:
        raise ValueError(f"model: got {used}, expected one of {', '.join(ARCHITECTURES)} to draft by FIRP")
    if (runner := vllm_config.model_config.runner_type) != "generate":
        raise ValueError(f"runner: got {runner!r}, expected 'generate' with FIRP: no token is decoded there")
    for name in ALONE:
        if (size := getattr(vllm_config.parallel_config, name)) != 1:
            raise ValueError(f"{name}: got {size}, expected 1 with FIRP")
    if vllm_config.parallel_config.use_ubatching:
        raise ValueError("enable_dbo: got True, expected False with FIRP")
    if vllm_config.kv_transfer_config is not None:
        raise ValueError("kv_transfer_config: got one, expected none with FIRP: it would send the slots of drafts")
    if vllm_config.lora_config is not None:
        raise ValueError("enable_lora: got True, expected False with FIRP: a predictor fits one set of weights")


def read_predictor(vllm_config: VllmConfig) -> FirpPredictor:
    """The predictor in the checkpoint, a folder or a hub id, which must fit the target model."""
    draft = vllm_config.speculative_config.draft_model_config
    folder = Path(draft.model)
    if not folder.is_dir():
        folder = Path(snapshot_download(draft.model, revision=draft.revision, allow_patterns=[f"{PREDICTOR}/*"]))
    predictor = load_predictor(folder / PREDICTOR)
    config = vllm_config.model_config.hf_config
    predictor.check_config(config, config.architectures[0])
    return predictor
