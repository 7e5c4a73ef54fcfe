"""One process of a job of several: runs cases on a sharded model and writes what each of them gave."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import firp
import torch
from firp.decoder.sharding import local
from firp.tools.ranks import LAUNCHED
from models import FAMILIES, update_predictor
from rank_cases import (
    LARGE_TREE,
    ONE,
    OTHER_REQUESTS,
    REQUESTS,
    SMALL_TREE,
    STOPS,
    TREE,
    AfterTokens,
    decoded,
    predictor_for,
)
from torch import distributed
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria
from transformers.distributed import DistributedConfig

RANK, SIZE = 0, 1
CASES: dict[str, Callable] = {}
# A collective that waits longer fails.
COLLECTIVE = timedelta(seconds=300)


def case(function: Callable) -> Callable:
    CASES[function.__name__] = function
    return function


@functools.cache
def sharded(root: Path, family: str) -> PreTrainedModel:
    config = DistributedConfig(tp_size=SIZE)
    return AutoModelForCausalLM.from_pretrained(root / family, distributed_config=config, dtype=torch.float32).eval()


def firp_engine(model: PreTrainedModel, tree: firp.TreeConfig = TREE) -> firp.Engine:
    return firp.Engine(model, predictor_for(model), tree)


@contextlib.contextmanager
def differences():
    """Counts the decisions that this rank would have taken otherwise than rank 0."""
    from firp.tools.ranks import Ranks

    found, agree = [], Ranks.agree

    def counting(self, tensors):
        agreed = agree(self, tensors)
        found.extend(1 for own, other in zip(tensors, agreed, strict=True) if not torch.equal(own, other))
        return agreed

    with mock.patch.object(Ranks, "agree", counting):
        yield found


def plant(engine: firp.Engine) -> None:
    """On rank 1 every second score is the next larger number, the others the next smaller one."""
    logits = engine.view.logits

    def planted(hidden):
        scores = logits(hidden)
        ends = torch.tensor([-torch.inf, torch.inf]).repeat(scores.shape[-1] // 2)
        return torch.nextafter(scores, ends.expand_as(scores)) if RANK == 1 else scores

    engine.view.logits = planted


def refused(call: Callable) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def family(name: str, root: Path) -> dict:
    """FIRP and plain decoding of the same sharded model."""
    model = sharded(root, name)
    engines = {"firp": firp_engine(model), "plain": firp.Engine(model)}
    requests = REQUESTS | OTHER_REQUESTS if name == "llama" else REQUESTS
    return {r: {kind: decoded(engine, request) for kind, engine in engines.items()} for r, request in requests.items()}


@case
def stops(root: Path) -> dict:
    engine = firp_engine(sharded(root, "llama"), LARGE_TREE)
    return {name: decoded(engine, {**ONE, "do_sample": False, **stop}) for name, stop in STOPS.items()}


@case
def drop_in(root: Path) -> list:
    """`model.generate` with firp.decode, and a predictor that updates final states."""
    model = sharded(root, "llama")
    options = {**ONE, "max_new_tokens": 8, "do_sample": False, "custom_generate": firp.decode, "tree": TREE}
    predictors = predictor_for(model), update_predictor(model, 3, layer=1)
    return [model.generate(predictor=predictor, **options).tolist() for predictor in predictors]


@case
def last_bit(root: Path) -> dict:
    """Ties that a planted last bit breaks the other way on rank 1."""
    model = sharded(root, "ties")
    engine = firp_engine(model)
    plant(engine)
    found = {}
    for name in ("greedy", "sampled", "own processor", "own processor, one prompt", "criteria"):
        with differences() as count:
            found[name] = decoded(engine, (REQUESTS | OTHER_REQUESTS)[name]) | {"differences": len(count)}
    return found


class Impatient(AfterTokens):
    """A clock that runs on rank 1 alone."""

    def __call__(self, input_ids, scores, **others):
        return super().__call__(input_ids, scores) | (RANK == 1)


@case
def clocks(root: Path) -> dict:
    """Criteria that answer otherwise on rank 1, and first-use timings where its clock is another."""
    from firp.drafting.predictor import load_predictor
    from firp.engine import automatic, costs

    model = sharded(root, "llama")
    request = {**ONE, "max_new_tokens": 9, "do_sample": False}
    asked = {**request, "stopping_criteria": [Impatient(12)]}
    os.environ["FIRP_CACHE"] = str(root / f"cache-{RANK}")
    clock = time.perf_counter
    with (
        mock.patch.object(automatic, "STEADY", 1e9),
        mock.patch.object(automatic, "PREEMPTIONS", 1e9 if RANK == 0 else -1),
        mock.patch.object(costs.time, "perf_counter", lambda: clock() * (1 + 50 * RANK)),
    ):
        engine = firp.Engine(model, load_predictor(root / "predictor"))
        timed = decoded(engine, request)
    return {
        "impatient": decoded(firp_engine(model), asked), "timed": timed, "rungs": repr(engine.rungs(1)),
        "kept": sorted(path.name for path in (root / f"cache-{RANK}").rglob("*.json")),
    }  # fmt: skip


@case
def refusals(root: Path) -> dict:
    model = sharded(root, "llama")
    engine = firp.Engine(model)
    other = ONE | ({"input_ids": ONE["input_ids"] ^ 1} if RANK == 1 else {})
    criteria: list[StoppingCriteria] = [AfterTokens(12)] if RANK == 1 else []
    own = {"max_new_tokens": 3, "do_sample": False, "engine": engine}
    told = {
        "compile": refused(lambda: firp.Engine(model, compile=True)),
        "graphs": refused(lambda: firp.Engine(model, graphs=True)),
        "prompts": refused(lambda: firp.generate(model, **other, **own)),
        "criteria": refused(lambda: firp.generate(model, **ONE, **own, stopping_criteria=criteria)),
        "seeds": refused(lambda: firp.generate(model, **ONE, **{**own, "do_sample": True}, seed=RANK)),
        "memory": refused(functools.partial(_too_large, engine, own)),
        "heads": refused(lambda: firp.Engine(sharded(root, "one key head"))),
    }
    model.model.layers[0].mlp.forward = lambda hidden: hidden
    told["patch"] = refused(lambda: firp.Engine(model))
    del model.model.layers[0].mlp.forward
    inner = model.lm_head.forward
    model.lm_head.forward = lambda hidden: inner(hidden)
    told["patched shard"] = refused(lambda: firp.Engine(model))
    model.lm_head.forward = inner
    return told | {"after": decoded(engine, {**ONE, "max_new_tokens": 3, "do_sample": False})["tokens"]}


def _too_large(engine: firp.Engine, own: dict) -> None:
    """Rank 1 alone has no memory left."""
    free = (lambda _: 0) if RANK == 1 else (lambda _: 1 << 40)
    with mock.patch("firp.engine.memory.available_memory", free):
        firp.generate(engine.model, **ONE, **{**own, "engine": firp.Engine(engine.model)})


@case
def parts(root: Path) -> dict:
    """Which of the engine's own modules run over a sharded model."""
    view = firp.Engine(sharded(root, "llama")).view
    inside = {type(module).__name__ for layer in view.layers for module in layer.modules()}
    return {"inside": sorted(inside), "heads": view.heads}


KINDS = {"allreduce_": "all-reduce", "all_reduce": "all-reduce", "broadcast_": "broadcast",
         "all_gather_into_tensor": "all-gather", "_allgather_base_": "all-gather"}  # fmt: skip


class Collectives(TorchDispatchMode):
    """Notes each collective and the bytes that a rank holds after it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls collectives of its own, which come here next
        result = func(*args, **(kwargs or {}))
        namespace, _, name = func.name().partition("::")
        if namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "_wrap")):
            kind = KINDS[name.partition(".")[0]]
            held = result if isinstance(result, torch.Tensor) else args[0]
            self.found.append((kind, sum(tensor.nbytes for tensor in pytree.tree_leaves(held))))
        return result


@case
def sent(root: Path) -> dict:
    """Of each family in the folder: bytes of weights on this rank, and what plain and drafting steps send."""
    found = {}
    for folder in sorted(path for path in root.iterdir() if (path / "config.json").is_file() and path.name in FAMILIES):
        model, steps = sharded(root, folder.name), {}
        for name, engine in (("plain", firp.Engine(model)), ("FIRP", firp_engine(model, SMALL_TREE))):
            state = engine.start([torch.tensor([4, 5, 6]), torch.tensor([5, 4])], 20, [])
            engine.step(state)
            with Collectives() as collectives:
                engine.step(state)
            steps[name] = collectives.found
        held = sum(local(parameter).nbytes for parameter in model.parameters())
        found[folder.name] = {"held": held, "steps": steps}
    return found


@case
def command(root: Path) -> dict:
    """`firp generate --compare`, what each rank prints."""
    from firp.cli.main import run

    folder = root / "tiny"
    arguments = ["generate", "hello", "--model", str(folder / "model"), "--predictor", str(folder / "predictor")]
    sys.argv = ["firp", *arguments, "--dtype", "float32", "--raw", "--compare", "--max-new-tokens", "8", "-N", "4"]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            run()
        except SystemExit as end:
            return {"code": end.code or 0, "said": said.getvalue()}
    return {"code": None, "said": said.getvalue()}


def run_cases(root: Path, rank: int, size: int, names: list[str]) -> None:
    """Run cases on rank `rank` of `size`, with the variables that torchrun sets."""
    global RANK, SIZE
    RANK, SIZE = rank, size
    os.environ.update(
        {LAUNCHED: "test"}, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size)
    )
    torch.set_num_threads(1)
    store = distributed.FileStore(str(root / "store"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=COLLECTIVE)
    results = {}
    for name in names:
        try:
            results[name] = CASES[name](root) if name in CASES else family(name, root)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        (root / f"results-{RANK}.json").write_text(json.dumps(results))
        if "error" in results[name]:
            sys.exit(1)  # The ranks may no longer be at the same place.
