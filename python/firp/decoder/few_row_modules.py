"""What replaces the blocks of a layer, and for whole layers, on a CPU: the package's ops over the model's parameters.

Each computes what the Hugging Face module computes, in its roundings, in as few calls as there are: a layer's own small
calls are a good part of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.models.mistral.modeling_mistral import MistralAttention

from firp.decoder.attention import AttentionStep, check_heads, check_window

Parameters = dict[str, Any]


def parameters_of(block: nn.Module, *names: str) -> list[Parameters]:
    """Those of some children, past `nn.Module.__getattr__`: an engine asks for some hundred."""
    children = vars(block)["_modules"]
    return [vars(children[name])["_parameters"] for name in names]


class FewRowLinear(nn.Module):
    """Replaces an `nn.Linear` of the model in a view, sharing its parameters."""

    OPS = ("linear",)

    def __init__(self, linear: nn.Linear, ops: SimpleNamespace) -> None:
        super().__init__()
        self.ops = ops
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        return self.ops.linear(input, self.weight, self.bias)


class FewRowNorm(nn.Module):
    """Replaces an RMS norm of the model."""

    OPS = ("rms_norm",)

    def __init__(self, norm: nn.Module, ops: SimpleNamespace) -> None:
        super().__init__()
        self.ops = ops
        self.weight = norm.weight
        self.eps = norm.variance_epsilon

    def forward(self, input: Tensor) -> Tensor:
        return self.ops.rms_norm(input, self.weight, self.eps)


class FewRowMLP(nn.Module):
    """Replaces a gated MLP of the model."""

    OPS = ("linear", "gated_linear")

    def __init__(self, mlp: nn.Module, ops: SimpleNamespace) -> None:
        super().__init__()
        self.ops = ops
        # In a tuple parameters are attributes like any other; a module looks its own up in a slow call of its own.
        self.weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)

    def forward(self, input: Tensor) -> Tensor:
        gate, up, down = self.weights
        return self.ops.linear(self.ops.gated_linear(input, gate, up), down, None)


class FewRowAttention(nn.Module):
    """Replaces an attention block of the model; an `AttentionStep` attends."""

    OPS = ("linear", "joint_linear", "rotary")

    def __init__(self, attention: nn.Module, ops: SimpleNamespace) -> None:
        super().__init__()
        *projections, last = parameters_of(attention, "q_proj", "k_proj", "v_proj", "o_proj")
        holder = attention.config if isinstance(attention, MistralAttention) else attention
        window, width = getattr(holder, "sliding_window", None), attention.head_dim
        heads, kv_heads, _ = (own["weight"].shape[0] // width for own in projections)
        check_window(attention, window)
        check_heads(attention, heads, kv_heads, width)
        # All at once: a module takes 5 us for each attribute, and an engine has some hundred of these.
        self.__dict__.update(
            ops=ops,
            layer_idx=attention.layer_idx,
            head_dim=width,
            scaling=attention.scaling,
            sliding_window=window,
            projections=projections,
            last=last,
            rotated=[heads + kv_heads, kv_heads],
            heads=[heads, kv_heads],
            parts=[heads, kv_heads, kv_heads],
        )

    # Read at use, from the modules' own dictionaries: what is kept between engines holds no parameter by itself.

    @property
    def weights(self) -> list[Tensor]:
        return [own["weight"] for own in self.projections]

    @property
    def biases(self) -> list[Tensor]:
        return [own["bias"] for own in self.projections if own["bias"] is not None]

    @property
    def output(self) -> tuple[Tensor, Tensor | None]:
        return self.last["weight"], self.last["bias"]

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], firp_step: AttentionStep, **_: object
    ) -> tuple[Tensor, None]:
        batch, rows, _ = hidden_states.shape
        joint = self.ops.joint_linear(hidden_states, self.weights, self.biases).view(batch, rows, -1, self.head_dim)
        rotated, value = joint.split_with_sizes(self.rotated, 2)
        self.ops.rotary(rotated, *position_embeddings)
        query, key = rotated.split_with_sizes(self.heads, 2)
        attended = firp_step.attend(self, query, key, value, self.scaling, self.sliding_window)
        return self.ops.linear(attended.flatten(2), *self.output), None


class FewRowLayer(nn.Module):
    """Replaces a decoder layer of the model: attention and gated MLP, each after an RMS norm and added to
    its input."""

    OPS = ("norm_qkv_rotary", "output_norm_mlp")

    def __init__(self, layer: nn.Module, ops: SimpleNamespace) -> None:
        super().__init__()
        children = vars(layer)["_modules"]
        before, after, mlp = (children[name] for name in ("input_layernorm", "post_attention_layernorm", "mlp"))
        attention = FewRowAttention(children["self_attn"], ops)
        self.__dict__.update(
            ops=ops,
            attention=attention,  # no submodule: nothing is attached to it, and a call of a module is a slow one
            norms=parameters_of(layer, "input_layernorm", "post_attention_layernorm"),
            linears=parameters_of(mlp, "gate_proj", "up_proj", "down_proj"),
            eps=(before.variance_epsilon, after.variance_epsilon),
            settings=(
                before.variance_epsilon,
                after.variance_epsilon,
                attention.scaling,
                attention.sliding_window,
                len(attention.biases),
                attention.output[1] is None,
            ),
        )

    @property
    def before(self) -> tuple[Tensor, float]:
        """Norm and its epsilon, as `norm_qkv_rotary` takes them."""
        return self.norms[0]["weight"], self.eps[0]

    @property
    def after(self) -> tuple[Any, ...]:
        """What `output_norm_mlp` takes after its rows."""
        weights = (own["weight"] for own in self.linears)
        return *self.attention.output, self.norms[1]["weight"], self.eps[1], *weights

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], firp_step: AttentionStep, **_: object
    ) -> Tensor:
        attention = self.attention
        heads = self.ops.norm_qkv_rotary(
            hidden_states, *self.before, attention.weights, attention.biases, *position_embeddings
        )
        query, key, value = heads.split_with_sizes(attention.parts, 2)
        attended = firp_step.attend(attention, query, key, value, attention.scaling, attention.sliding_window)
        return self.ops.output_norm_mlp(attended, hidden_states, *self.after)


class JoinedLayers(NamedTuple):
    """Layers as `firp_kernels.decoder_layers` takes them: `weights` are its arguments from `norms` to `mlps`."""

    eps: float
    weights: tuple[list[Tensor], ...]
    scale: float
    sliding_window: int | None


def joined(layers: Sequence[nn.Module]) -> JoinedLayers | None:
    """Layers for one call; None where they are of another kind, or differ in what one call has once."""
    if not layers or not all(isinstance(layer, FewRowLayer) for layer in layers):
        return None
    settings = {layer.settings for layer in layers}
    (eps, eps_after, scale, window, *_), *others = settings
    if others or eps != eps_after:
        return None
    weights: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
    norms, projections, biases, outputs, output_biases, mlps = weights
    for layer in layers:
        output, bias, norm, _, *mlp = layer.after
        norms += layer.before[0], norm
        projections += layer.attention.weights
        biases += layer.attention.biases
        outputs.append(output)
        output_biases += [] if bias is None else [bias]
        mlps += mlp
    return JoinedLayers(eps, weights, scale, window)


def ops_of(parts: Iterable[object]) -> set[str]:
    """Names of the package's ops that these views of a model run."""
    modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
    return {name for module in modules for name in getattr(module, "OPS", ())}
