"""One case: every contender is checked against the oracle, then all that passed are timed side by side."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from benchmarks.case import Call, Case, num_bytes, tensors_of, with_tensors
from benchmarks.timing import Rates, Timed, interleave, num_sets, start
from firp_kernels import registry

# References that read the device from the host or copy to it: on CUDA they are timed as they run, not in a graph.
NOT_CAPTURABLE = ("tree_attention", "write_and_attend", "commit_cache", "draft_tree")
UNAVAILABLE, WRONG, FAILED, WITHHELD, OK = "unavailable", "wrong", "failed", "withheld", "ok"


@dataclass(frozen=True)
class Contender:
    """An implementation of ours, an alternative, or a floor, ready to be checked and timed."""

    name: str
    kind: str
    prepare: Callable[[tuple], Call]
    outcome: Callable[[tuple, object], tuple[Tensor, ...]] | None
    scope: Callable[[], AbstractContextManager] = nullcontext
    capturable: bool = True
    unavailable: str | None = None


def implementation(op: str, impl: str, device: str) -> Callable:
    """The callable of op's implementation; the owner goes through torch's dispatcher, as users call it.

    Raises:
        ValueError, RuntimeError: the op has no such implementation on the device.
    """
    return registry.bound(op, None if registry.owner(op, device) == impl else impl)


def contenders(case: Case, impls: tuple[str, ...] | None, device: str) -> list[Contender]:
    """Implementations of ours (default: the device's owner, and the reference), then the alternatives."""
    made = []
    for impl in impls or dict.fromkeys((registry.owner(case.op, device), "reference")):
        capturable = not (impl == "reference" and case.op in NOT_CAPTURABLE)
        try:
            function, missing = implementation(case.op, impl, device), None
        except (ValueError, RuntimeError) as error:
            function, missing = None, str(error)
        prepare = functools.partial(_bind, function)
        made.append(Contender(impl, "implementation", prepare, case.outcome, nullcontext, capturable, missing))
    for name, other in case.alternatives.items():
        kind = "floor" if other.floor else "alternative"
        made.append(
            Contender(name, kind, other.prepare, other.outcome, other.scope, other.capturable, other.unavailable)
        )
    return made


def _bind(function: Callable, args: tuple) -> Call:
    return functools.partial(function, *args)


def oracle(case: Case, device: str) -> tuple[Tensor, ...]:
    """What the reference makes of the case's first arguments on `device`, in float64 where floats are computed."""
    args = with_tensors(case.make(0), lambda tensor: tensor.to(device))
    if case.bound is not None:
        args = with_tensors(args, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    return case.outcome(args, registry.bound(case.op, "reference")(*args))


def check(case: Case, contender: Contender, expected: tuple[Tensor, ...]) -> dict:
    """Run a contender on the case's first arguments: its status, and the largest error of a computed float."""
    if contender.unavailable is not None:
        return {"status": UNAVAILABLE, "reason": contender.unavailable}
    try:
        args = case.make(0)
        with contender.scope():
            returned = contender.prepare(args)()
        found = (
            None
            if contender.outcome is None
            else [part.to(expected[0].device) for part in contender.outcome(args, returned)]
        )
    except Exception as error:
        return _raised(contender, error)
    if found is None:
        return {"status": OK}
    if contender.kind == "implementation" and len(found) != len(expected):
        return {"status": WRONG, "reason": f"{len(found)} results, expected {len(expected)}"}
    error = 0.0
    for position, (part, exact) in enumerate(zip(found, expected, strict=False)):
        if part.shape != exact.shape:
            return {
                "status": WRONG,
                "reason": f"result {position} has shape {tuple(part.shape)}, expected {tuple(exact.shape)}",
            }
        if case.bound is None:
            if not torch.equal(part, exact):
                return {"status": WRONG, "reason": f"result {position} differs from the reference"}
            continue
        distance = (part.double() - exact).abs().max() / exact.abs().max()
        error = max(error, distance.item()) if not distance.isnan() else float("nan")
        if not error <= case.bound:
            return {
                "status": WRONG,
                "error": error,
                "reason": f"error {error:.1e} of the largest value, bound {case.bound:.1e}",
            }
    return {"status": OK, "error": error}


def _raised(contender: Contender, error: Exception) -> dict:
    """What a kernel or a library raised: a failure of ours, or an alternative that does not take this case."""
    status = FAILED if contender.kind == "implementation" else UNAVAILABLE
    return {"status": status, "reason": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def run_case(case: Case, impls: tuple[str, ...] | None, device: str, repeats: int, rates: Rates | None) -> list[dict]:
    """One entry per contender: checked, and timed with `rates`. An alternative that fails its check is not timed.

    Without `rates` only our own kernels run on the device, against an oracle on the CPU: what a sanitizer should see.
    """
    field = contenders(case, impls, device)
    if rates is None:
        field = [c for c in field if c.kind == "implementation" and (impls or c.name != "reference")]
    expected = oracle(case, device if rates is not None else "cpu")
    entries = {contender.name: _entry(case, contender) | check(case, contender, expected) for contender in field}
    del expected
    ready = [contender for contender in field if entries[contender.name]["status"] == OK]
    if rates is not None and ready and not broken(list(entries.values())):
        _time(case, ready, entries, device, repeats, rates)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return list(entries.values())


def _entry(case: Case, contender: Contender) -> dict:
    return {
        "op": case.op, "case": case.label, "variant": case.variant, "shape": case.shape, "nodes": case.tree.num_nodes,
        "lookahead": case.tree.num_lookahead, "offsets": case.tree.num_offsets, "rows": case.tree.rows,
        "context": case.context, "dtype": str(case.dtype).removeprefix("torch."), "implementation": contender.name,
        "kind": contender.kind, "bytes": case.num_bytes, "operations": case.operations, "bound": case.bound,
    }  # fmt: skip


def _time(
    case: Case, ready: list[Contender], entries: dict[str, dict], device: str, repeats: int, rates: Rates
) -> None:
    first = case.make(0)
    held = num_bytes(*tensors_of(first))
    sets = [first] + [case.make(seed) for seed in range(1, num_sets(device, case.num_bytes, held))]

    def reset_all() -> None:
        for args in sets:
            case.reset(args)

    reset = None if case.reset is None else reset_all
    passes = {}
    for contender in ready:
        try:
            timed = Timed([contender.prepare(args) for args in sets], contender.scope, contender.capturable)
            passes[contender.name] = start(device, timed, reset)
        except Exception as error:
            entries[contender.name] |= _raised(contender, error)
    ready = [contender for contender in ready if contender.name in passes]
    samples = interleave(passes, repeats, reset)
    floor = rates.floor(case.num_bytes, case.operations, case.dtype)
    for contender in ready:
        taken = samples[contender.name]
        entries[contender.name] |= {
            "clock": "graph" if device == "cuda" and contender.capturable else "wall",
            "sets": len(sets),
            "microseconds": spread(taken),
            "floor_microseconds": floor,
            "share_of_floor": floor / median(taken),
        }
        if contender.kind == "implementation":
            entries[contender.name]["speedup"] = {
                other.name: spread([theirs / ours for theirs, ours in zip(samples[other.name], taken, strict=True)])
                for other in ready
                if other is not contender and (other.kind != "implementation" or other.name == "reference")
            }


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def broken(entries: list[dict]) -> bool:
    """Whether an implementation of ours failed a check."""
    return any(entry["status"] in (WRONG, FAILED) for entry in entries if entry["kind"] == "implementation")


def withhold(entries: list[dict]) -> None:
    """Take every time and speedup from the entries of an op whose check failed."""
    for entry in entries:
        if entry["status"] == OK:
            entry["status"] = WITHHELD
        for figure in ("microseconds", "floor_microseconds", "share_of_floor", "speedup"):
            entry.pop(figure, None)
