"""The small part of vLLM that the plug-in touches: modules by name, and a target whose layers attend over pages."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from firp.integrations.vllm_checkpoint import write_vllm_checkpoint
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

BLOCK, PAGES = 4, 128


@dataclass
class CommonAttentionMetadata:
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: torch.Tensor
    slot_mapping: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor | None = None


class Attention(nn.Module):
    """Causal attention over a paged cache, by the forward context that is set; keys and values are written first."""

    def __init__(self, name: str, own: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.name, self.own, self.rotary = name, own, rotary
        config = own.config
        self.cache = torch.full((2, PAGES * BLOCK, config.num_key_value_heads, own.head_dim), 0.0, dtype=torch.float64)

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        context, rows = FORWARD.metadata[self.name], len(hidden)
        query, key, value = (
            linear(hidden).view(1, rows, -1, self.own.head_dim).transpose(1, 2)
            for linear in (self.own.q_proj, self.own.k_proj, self.own.v_proj)
        )
        cos, sin = self.rotary(value, positions[None])
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        self.cache[0, FORWARD.slots[self.name]] = key[0].transpose(0, 1)
        self.cache[1, FORWARD.slots[self.name]] = value[0].transpose(0, 1)
        out = torch.empty(rows, query.shape[1], self.own.head_dim, dtype=hidden.dtype)
        starts = context.query_start_loc.tolist()
        for sequence, (first, end) in enumerate(pairwise(starts)):
            length = int(context.seq_lens[sequence])
            at = torch.arange(-(-length // BLOCK) * BLOCK)  # whole pages, as kernels read them
            slots = context.block_table_tensor[sequence, at // BLOCK].long() * BLOCK + at % BLOCK
            keys, values = (
                repeat_kv(part[slots].transpose(0, 1)[None], self.own.num_key_value_groups)[0] for part in self.cache
            )
            scores = query[0, :, first:end] @ keys.mT * self.own.scaling
            seen = at <= torch.arange(length - (end - first), length)[:, None]
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            out[first:end] = (weights @ values).transpose(0, 1)
        return self.own.o_proj(out.flatten(1))


class Layer(nn.Module):
    """One decoder layer as vLLM calls it."""

    def __init__(self, name: str, own: nn.Module, rotary: nn.Module) -> None:
        super().__init__()
        self.own, self.attention = own, Attention(name, own.self_attn, rotary)

    def forward(self, positions, hidden, residual):
        residual = hidden if residual is None else hidden + residual
        residual += self.attention(positions, self.own.input_layernorm(residual))  # in place, as fused norms do
        return self.own.mlp(self.own.post_attention_layernorm(residual)), residual


class Target:
    """A tiny Hugging Face model as vLLM's runner holds it."""

    def __init__(self, model) -> None:
        self.own = model
        layers = [
            Layer(f"layers.{index}", layer, model.model.rotary_emb) for index, layer in enumerate(model.model.layers)
        ]
        self.model = SimpleNamespace(
            layers=nn.ModuleList(layers), norm=model.model.norm, embed_input_ids=model.model.embed_tokens
        )
        self.attention = {layer.attention.name: layer.attention for layer in layers}

    def compute_logits(self, states: torch.Tensor) -> torch.Tensor:
        return self.own.lm_head(states)

    def forward(self, tokens, positions, metadata, aux_layer: int):
        """Scores [rows, V] of all rows, and their states after `aux_layer` layers."""
        hidden, residual = self.model.embed_input_ids(tokens), None
        names = self.attention
        with set_forward_context(
            dict.fromkeys(names, metadata), None, len(tokens), dict.fromkeys(names, metadata.slot_mapping)
        ):
            for index, layer in enumerate(self.model.layers):
                if index == aux_layer:
                    aux = hidden + residual
                hidden, residual = layer(positions, hidden, residual)
        return self.compute_logits(self.model.norm(hidden + residual)), aux


FORWARD = SimpleNamespace(metadata=None, slots=None)


@contextmanager
def set_forward_context(metadata, vllm_config, num_tokens=None, slot_mapping=None):
    FORWARD.metadata, FORWARD.slots = metadata, slot_mapping
    yield
    FORWARD.metadata = FORWARD.slots = None


class EagleProposer:
    """What `FirpProposer` inherits: the options, and metadata of the layers that it names."""

    def __init__(self, vllm_config, device, runner=None) -> None:
        self.vllm_config, self.device = vllm_config, device
        self.dtype = vllm_config.model_config.dtype
        self.num_speculative_tokens = vllm_config.speculative_config.num_speculative_tokens
        self.max_batch_size, self.hidden_size = 8, vllm_config.model_config.hf_config.hidden_size

    def initialize_attn_backend(self, kv_cache_config, kernel_block_sizes=None) -> None:
        self.block_size = 2 * BLOCK  # of the cache; the runner's tables are in kernel blocks

    def build_per_group_and_layer_attn_metadata(self, metadata):
        return [metadata], dict.fromkeys(self._draft_attn_layer_names, metadata)


class SpeculativeConfig:
    """All fields of vLLM 0.32.0's; `__post_init__` reads the checkpoint, as vLLM does."""

    method = model = revision = code_revision = enforce_eager = max_model_len = tensor_parallel_size = None
    quantization = moe_backend = attention_backend = kv_cache_dtype = draft_load_config = None
    draft_tensor_parallel_size = num_speculative_tokens_per_batch_size = draft_model_config = None
    draft_parallel_config = index_share_for_mtp_iteration = prompt_lookup_max = prompt_lookup_min = None
    synthetic_acceptance_rates = synthetic_acceptance_length = dspark_draft_topk = target_model_config = None
    parallel_drafting = use_local_argmax_reduction = use_heterogeneous_vocab = enable_adaptive_verification = False
    disable_padded_drafter_batch = disable_eagle_block_drop = False
    suffix_decoding_max_tree_depth, suffix_decoding_max_cached_requests = 24, 10000
    suffix_decoding_max_spec_factor, suffix_decoding_min_token_prob = 1.0, 0.1
    draft_sample_method, rejection_sample_method = "greedy", "standard"
    num_speculative_tokens = 3
    target_parallel_config = SimpleNamespace(tensor_parallel_size=1)

    def __init__(self, **fields) -> None:
        vars(self).update(fields)
        self.__post_init__()

    def __post_init__(self):
        self.method = self.method or "draft_model"
        fields = get_hf_file_to_dict("config.json", self.model, self.revision) or {}
        self.draft_model_config = SimpleNamespace(
            model=self.model, revision=None, hf_config=SimpleNamespace(architectures=fields.get("architectures"))
        )
        return self


class VllmConfig:
    def __init__(self, model, speculative_config) -> None:
        model.config.architectures = [type(model).__name__]
        self.model_config = SimpleNamespace(
            hf_config=model.config,
            dtype=model.dtype,
            architecture=type(model).__name__,
            runner_type="generate",
        )
        self.speculative_config, self.target = speculative_config, Target(model)
        self.lora_config = self.kv_transfer_config = None
        self.parallel_config = SimpleNamespace(
            pipeline_parallel_size=1, data_parallel_size=1, decode_context_parallel_size=1,
            prefill_context_parallel_size=1, use_ubatching=False,
        )  # fmt: skip

    def _get_v2_model_runner_unsupported_features(self):
        return []


class WorkerBase:
    def __init__(self, vllm_config, rank) -> None:
        self.made = (vllm_config, rank)


class GPUModelRunner:
    def __init__(self, vllm_config, device) -> None:
        self.vllm_config, self.device = vllm_config, device
        self.speculative_config = vllm_config.speculative_config
        self.drafter = "vLLM's own"


def get_hf_file_to_dict(name, model, revision):
    import json

    if model is None:
        raise ValueError("no model")
    path = Path(model) / name
    return json.loads(path.read_text()) if path.is_file() else None


class Registry:
    def __init__(self) -> None:
        self.models = {}

    def register_model(self, name, cls) -> None:
        self.models[name] = cls


def modules(version: str = "0.32.0+cpu") -> dict[str, ModuleType]:
    """vLLM's modules by name, for `sys.modules`; the classes that the plug-in wraps are new ones."""

    def new(cls: type) -> type:
        return type(cls.__name__, (cls,), {name: value for name, value in vars(cls).items() if callable(value)})

    contents = {
        "vllm": {"__version__": version, "ModelRegistry": Registry()},
        "vllm.config": {
            "VllmConfig": new(VllmConfig), "get_layers_from_vllm_config": lambda config, _: config.target.attention,
        },
        "vllm.config.speculative": {"SpeculativeConfig": new(SpeculativeConfig)},
        "vllm.forward_context": {"set_forward_context": set_forward_context},
        "vllm.model_executor.layers.attention_layer_base": {"AttentionLayerBase": object},
        "vllm.transformers_utils.repo_utils": {"get_hf_file_to_dict": get_hf_file_to_dict},
        "vllm.v1.attention.backend": {"CommonAttentionMetadata": CommonAttentionMetadata},
        "vllm.v1.sample.rejection_sampler": {"apply_sampling_constraints": lambda logits, *_: logits / len(logits)},
        "vllm.v1.spec_decode.eagle": {"EagleProposer": EagleProposer},
        "vllm.v1.worker.gpu_model_runner": {"GPUModelRunner": new(GPUModelRunner)},
        "vllm.v1.worker.worker_base": {"WorkerBase": new(WorkerBase)},
    }  # fmt: skip
    made = {}
    for name, values in contents.items():
        for end in range(1, len(parts := name.split(".")) + 1):
            made.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(made[name]).update(values)
    return made


def installed(monkeypatch, version: str = "0.32.0+cpu") -> dict[str, ModuleType]:
    """The fake modules in place, and the plug-in's own modules imported again over them."""
    made = modules(version)
    for name in [name for name in sys.modules if name.split(".")[0] in ("vllm", "firp_vllm")]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def written(tmp_path, model, predictor) -> Path:
    model.config.architectures = [type(model).__name__]
    write_vllm_checkpoint(tmp_path / "out", predictor, model.config)
    return tmp_path / "out"


def make_runner(vllm, model, folder, **options):
    """The fake runner of a worker, as vLLM makes them, with the plug-in registered."""
    import firp_vllm

    firp_vllm.register()
    speculative = vllm["vllm.config.speculative"].SpeculativeConfig(model=str(folder), **options)
    config = vllm["vllm.config"].VllmConfig(model, speculative)
    vllm["vllm.v1.worker.worker_base"].WorkerBase(config, rank=0)
    runner = vllm["vllm.v1.worker.gpu_model_runner"].GPUModelRunner(config, torch.device("cpu"))
    if not isinstance(runner.drafter, str):
        runner.drafter.load_model(config.target)
        groups = SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=list(config.target.attention))])
        runner.drafter.initialize_attn_backend(groups, [BLOCK])
    return runner
