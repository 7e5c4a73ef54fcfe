"""An accelerator without hardware: shapes, dtypes and devices are followed, values are not there to be read.

Tensors are fake ones on torch's spare device type, called "gpu" here. Under `Watch` an engine's step then shows every
kernel that it would launch, and what no capture allows: reading a value, copying between host and device.
"""

from __future__ import annotations

import functools
import traceback
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import firp
import torch
from firp.decoder.seen import Seen
from firp.drafting.trees import root_only
from firp.engine.buffers import Buffers
from firp.engine.chooser import Chooser
from firp.engine.engine import Engine
from firp.engine.state import DecodeState
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import firp_kernels

DEVICE = "gpu"
# Ops that make a view or bare memory, for which nothing is launched.
FREE = ("aten.empty", "aten.new_empty", "aten._unsafe_view", "aten.lift_fresh", "aten._reshape_alias")

# Functions that an engine compiles beside the layers, and the kernels that Inductor makes of one call at most.
FUSED = {"row_rotary": 3, "final_norm": 1}


class _Guard(torch._C._acc.DeviceGuard):
    def type_(self):
        return torch._C._autograd.DeviceType.PrivateUse1


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    present = False

    def is_available(self):
        return self.present

    def has_primary_context(self, index):
        return True

    def is_built(self):
        return True


_kept = _Hooks(), _Guard()


def register() -> None:
    """Make torch know the device, once in a process. It is there for the rest of torch only under `present`."""
    if hasattr(torch, DEVICE):
        return
    torch._C._acc.register_python_privateuseone_hook(_kept[0])
    torch._C._acc.register_python_privateuseone_device_guard(_kept[1])
    torch.utils.rename_privateuse1_backend(DEVICE)
    module = types.ModuleType(f"torch.{DEVICE}")
    hooks = _kept[0]
    module.is_available = module.is_initialized = lambda: hooks.present
    module._is_in_bad_fork = lambda: False
    module.current_device, module.device_count = lambda: 0, lambda: int(hooks.present)
    module.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    module.manual_seed_all = lambda seed: None
    torch._register_device_module(DEVICE, module)


@contextmanager
def present() -> Iterator[None]:
    """Tests that run later in this process see a machine without an accelerator again."""
    register()
    _kept[0].present = True
    try:
        yield
    finally:
        _kept[0].present = False


class Watch(TorchDispatchMode):
    """Notes what a step launches, and what a capture would refuse.

    Attributes:
        faults: (op, where) of each op that touches host and device, or the host alone.
        launched: (where, op) -> launches; where is "layers", or file and function of `firp`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[tuple[str, str]] = []
        self.launched: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        name = str(func)
        if name.startswith("prim."):
            return out
        if any(tensor.device.type != DEVICE for tensor in tensors if tensor.dim()):
            self.faults.append((name, _where()))
        if not func.is_view and not name.startswith(FREE):
            self.launched[_where(), name] += 1
        return out

    @property
    def ops(self) -> set[str]:
        """Names of the package's ops among them."""
        return {name.split(".")[1] for _, name in self.launched if name.startswith("firp.")}

    def beside_layers(self) -> int:
        """Kernels that a step launches outside of the model's layers, where an engine compiles."""
        beside = {key: count for key, count in self.launched.items() if key[0] != "layers"}
        alone = sum(count for (where, _), count in beside.items() if where not in FUSED)
        # Each call of a fused function launches each of its ops at least once.
        calls = {name: min((n for (where, _), n in beside.items() if where == name), default=0) for name in FUSED}
        return alone + sum(calls[name] * kernels for name, kernels in FUSED.items())


def _where() -> str:
    own = [frame for frame in traceback.extract_stack() if "/firp/" in frame.filename]
    for name in FUSED:
        if any(frame.name == name for frame in own):
            return name
    if any(frame.name == "run_layers" for frame in own):
        return "layers"
    return f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "?"


def _move(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Put every tensor that a module holds on the accelerator."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        with mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = torch.nn.Parameter(moved(parameter), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = moved(buffer)
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                vars(part)[name] = moved(value)


def watch_step(
    monkeypatch, model, predictor=None, tree=None, choose=None, batch_size=2, drafted=True, again=False, slots=256,
    looks_up: bool | str = False, **options,
) -> Watch:  # fmt: skip
    """One step of an engine over `model` on the accelerator.

    Args:
        choose: makes a chooser of an engine; None is greedy.
        drafted: the step verifies a full tree; else the root alone, as after prefill.
        again: watch the second step: the first one makes what an engine keeps.
        slots: of the cache.
        looks_up: whether the step puts a branch into its tree, or an implementation of `firp::lookup_branch` for it.
        options: of the engine.
    """
    with present():
        mode = FakeTensorMode()
        _move(model, mode)
        if predictor is not None:
            _move(predictor, mode)

        def tables(view, transition):
            vocab = view.decoder.embed_tokens.weight.shape[0]
            return tuple(torch.empty(vocab, transition.shape[2], dtype=view.dtype, device=DEVICE) for _ in range(2))

        monkeypatch.setattr("firp.drafting.drafters.token_tables", tables if predictor is not None else None)
        # What a model is checked by compares values.
        monkeypatch.setattr("firp.decoder.view.check_model", lambda model: Seen())
        monkeypatch.setattr("firp.decoder.rotary.LengthRotary.check", lambda self: None)
        with mode:
            engine = Engine(model, predictor, tree, graphs=False, compile=False, **options)
            state = _state(engine, batch_size, drafted, slots)
            if looks_up:
                state.history = state.buffers.history
            if isinstance(looks_up, str):
                engine.ops.lookup_branch = functools.partial(firp_kernels.lookup_branch, impl=looks_up)
            chooser: Chooser = firp.engine.chooser.Greedy(engine.ops) if choose is None else choose(engine)
            with torch.no_grad():
                if again:
                    engine._step.run(state, chooser)
                with Watch() as watch:
                    engine._step.run(state, chooser)
    return watch


def _state(engine: Engine, batch_size: int, drafted: bool, slots: int) -> DecodeState:
    config = engine.model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device = torch.device(DEVICE)
    buffers = Buffers.allocate(
        engine.view.num_layers, batch_size, slots, config.num_key_value_heads, width, engine.view.dtype, device
    )
    drafter = engine.drafter(batch_size)
    tree = root_only(torch.zeros(batch_size, dtype=torch.int64, device=device), int(drafter is not None))
    if drafter is not None and drafted:
        tree = tree.padded(drafter.config.num_nodes, drafter.config.num_lookahead)
    return DecodeState(
        buffers=buffers,
        cache=buffers.cache,
        context_lens=buffers.context_lens,
        tree=tree,
        sequence=buffers.sequence,
        finished=buffers.finished,
        remaining=buffers.remaining,
        seed=buffers.seed,
        stop_tokens=torch.empty(8, dtype=torch.int64, device=device),
        lengths=[10] * batch_size,
        drafter=drafter,
    )
