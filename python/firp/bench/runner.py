"""Interleaved runs of several methods over prompts, and what they add up to."""

from __future__ import annotations

from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from firp.bench.equality import Difference, compare
from firp.bench.methods import Method, Results, Run
from firp.engine.engine import Engine
from firp.engine.state import DecodeStats
from firp.tools.environment import environment
from firp.tools.prompt_files import Prompt, encode
from firp.tools.ranks import launched_ranks

TAU_FORMULA = "tokens delivered by decode steps / decode steps (prefill excluded, misses and bonus token included)"


def _converse(
    method: Method,
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    max_new_tokens: int,
    all_turns: bool,
    raw: bool,
) -> tuple[list[Run], list[Tensor]]:
    messages: list[dict] = []
    runs, inputs = [], []
    for turn in prompt.turns if all_turns else prompt.turns[:1]:
        messages.append({"role": "user", "content": turn})
        ids = torch.tensor([encode(tokenizer, messages, raw)], device=device)
        runs.append(method(ids, max_new_tokens))
        inputs.append(ids)
        messages.append({"role": "assistant", "content": tokenizer.decode(runs[-1].tokens, skip_special_tokens=True)})
    return runs, inputs


def run_methods(
    methods: dict[str, Method],
    prompts: list[Prompt],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    repeats: int = 1,
    all_turns: bool = False,
    raw: bool = False,
    progress: bool = True,
) -> Results:
    """Run every method on every prompt, `repeats` times, interleaved prompt by prompt in rotating order.

    Each method goes on from its own answers. A Ctrl-C keeps the prompts that all methods have answered in the first
    repeat, and whole repeats after that.

    Raises:
        KeyboardInterrupt: before the first prompt was finished, or in a job of several ranks.
        ValueError: max_new_tokens or repeats below 1, or a prompt past the model's context.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected at least 1")
    results = Results(prompts, {name: [] for name in methods})
    names = list(methods)
    for method in methods.values():
        _converse(method, prompts[0], tokenizer, model.device, min(8, max_new_tokens), False, raw)
    total = repeats * len(prompts) * len(methods)
    try:
        with tqdm(total=total, desc="bench", disable=None if progress else True) as bar:
            for repeat in range(repeats):
                for per_repeat in results.runs.values():
                    per_repeat.append([])
                for i, prompt in enumerate(prompts):
                    shift = (repeat + i) % len(names)
                    for name in names[shift:] + names[:shift]:
                        runs, inputs = _converse(
                            methods[name], prompt, tokenizer, model.device, max_new_tokens, all_turns, raw
                        )
                        results.runs[name][repeat].append(runs)
                        if name == "hf" and repeat == 0:
                            results.inputs.append(inputs)
                        bar.update()
    except KeyboardInterrupt:
        if launched_ranks() > 1 or not _keep_finished(results):
            raise
    return results


def _keep_finished(results: Results) -> bool:
    """Leave out what a Ctrl-C cut short; whether anything is left."""
    repeats = [min(len(runs) for runs in of_repeat) for of_repeat in zip(*results.runs.values(), strict=False)]
    finished = repeats[0] if repeats else 0
    whole = max(1, repeats.count(len(results.prompts)))
    results.prompts = results.prompts[:finished]
    results.inputs = results.inputs[:finished]
    results.runs = {name: [runs[:finished] for runs in of[:whole]] for name, of in results.runs.items()}
    results.interrupted = True
    return finished > 0


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _speed(results: Results, name: str, chosen: list[int]) -> list[float]:
    """Tokens per second of each repeat over the chosen prompts."""
    speeds = []
    for repeat in results.runs[name]:
        runs = [run for i in chosen for run in repeat[i]]
        speeds.append(sum(len(run.tokens) for run in runs) / sum(run.seconds for run in runs))
    return speeds


def _summary(results: Results, chosen: list[int], differences: dict[str, list[Difference]] | None) -> dict[str, dict]:
    """One entry per method over the prompts with the indices `chosen`."""
    speeds = {name: _speed(results, name, chosen) for name in results.runs}
    summary = {}
    for name, repeats in results.runs.items():
        stats = DecodeStats()
        for i in chosen:
            for run in repeats[0][i]:
                stats.merge(run.stats)
        entry = {
            "tokens": sum(len(run.tokens) for i in chosen for run in repeats[0][i]),
            "steps": stats.steps,
            "tau": stats.tau,
            "accepted_per_position": stats.accepted_per_position,
            "tokens_per_second": _spread(speeds[name]),
        }
        for base in ("ar", "hf"):
            if base in speeds:
                entry[f"speedup_vs_{base}"] = _spread([a / b for a, b in zip(speeds[name], speeds[base], strict=True)])
        if differences is not None:
            found = [d for d in differences[name] if d.index in chosen]
            turns = {i: len(results.runs[name][0][i]) for i in chosen}
            entry["identical_to_hf"] = {
                "identical": sum(turns.values()) - sum(turns[d.index] - d.turn for d in found),
                "total": sum(turns.values()),
                "differences": [[d.prompt, d.position, d.gap, d.gap_float64, d.turn] for d in found],
            }
        summary[name] = entry
    return summary


def tree_settings(engine: Engine) -> dict:
    """The tree that an engine drafts for one sequence, and those that it changes to, with their measured figures."""
    drafter, rungs = engine.drafter(1), engine.rungs(1)
    size = {"N": 1, "P": 0, "k": 0, "kind": "plain"}
    if drafter is not None:
        tree = drafter.config
        size = {"N": tree.num_nodes, "P": tree.num_lookahead, "k": drafter.num_offsets, "kind": tree.kind}
    if rungs is None:
        return {"tree": size}
    told = [
        {
            "N": rung.tree.num_nodes, "P": rung.tree.num_lookahead, "kind": rung.tree.kind,
            "step_ms": 1e3 * rung.seconds, "tau": rung.tau,
        }
        for rung in rungs
    ]  # fmt: skip
    return {"tree": size, "rungs": told}


def report(results: Results, model: PreTrainedModel, settings: dict) -> dict:
    """The JSON document of a bench: environment, settings, methods over all prompts and per category."""
    differences = compare(results, model) if "hf" in results.runs else None
    everything = list(range(len(results.prompts)))
    categories = sorted({prompt.category for prompt in results.prompts})
    document: dict = {
        "environment": environment(model),
        "settings": settings,
        "interrupted": results.interrupted,
        "tau": TAU_FORMULA,
        "methods": _summary(results, everything, differences),
        "categories": {},
    }
    for category in categories:
        chosen = [i for i in everything if results.prompts[i].category == category]
        document["categories"][category] = {"methods": _summary(results, chosen, differences)}
    return document
