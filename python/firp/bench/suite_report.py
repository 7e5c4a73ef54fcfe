"""What a run over a suite adds up to, by the suite's own formulas, and its tables."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from transformers import PreTrainedTokenizerBase

from firp.bench.methods import Results, Run
from firp.bench.suites import Suite, SuiteFile
from firp.tools.figures import cut

OVERALL = "overall"
BASES = ("ar", "hf")
# What each suite calls its measure of acceptance, and how it is computed.
MEASURES = {
    "spec-bench": ("#Mean accepted tokens", "mean over all forwards that deliver tokens"),
    "mt-bench": ("#Mean accepted tokens", "mean over all forwards that deliver tokens"),
    "speed-bench": (
        "Average AL",
        "mean over questions of the mean over a question's forwards, without a first one that delivers one token and "
        "without the last of each turn",
    ),
}
SPEED_FORMULAS = {
    "tokens_per_second": "mean over questions of a question's new tokens / its seconds, all turns together",
    "speedup": "tokens_per_second / tokens_per_second of the base",
}
TURNS = {"First turn": 0, "Second turn": 1}

Question = Sequence[Run]


def mean_accepted_tokens(questions: Sequence[Question]) -> float:
    """Spec-Bench's: tokens per forward, every forward counted once."""
    return fmean(count for question in questions for run in question for count in run.deliveries)


def average_al(questions: Sequence[Question]) -> float:
    """SPEED-Bench's acceptance length: every question counts once, long or short."""
    return fmean(fmean(count for run in question for count in _trimmed(run.deliveries)) for question in questions)


def _trimmed(deliveries: list[int]) -> list[int]:
    """Without the forward over the prompt, and without the last one, which the end of the text may have cut."""
    return deliveries[1 if deliveries[:1] == [1] else 0 : -1] or [1]


def tokens_per_second(questions: Sequence[Question]) -> float:
    """Spec-Bench's: every question counts once, long or short."""
    return fmean(
        sum(len(run.tokens) for run in question) / sum(run.seconds for run in question) for question in questions
    )


def _over_repeats(values: list[float]) -> dict:
    return {"mean": fmean(values), "std": stdev(values) if len(values) > 1 else None, "repeats": values}


def summarize(suite: Suite, results: Results) -> dict[str, dict[str, dict]]:
    """Per task of the suite's table that the file has, then over all questions: one entry per method."""
    measure: Callable = average_al if suite.name == "speed-bench" else mean_accepted_tokens
    tasks = [suite.categories[prompt.category] for prompt in results.prompts]
    everything = range(len(tasks))
    chosen: dict[str, tuple[Sequence[int], slice]] = {
        task: (found, slice(None)) for task in suite.tasks if (found := [i for i in everything if tasks[i] == task])
    }
    if suite.num_turns is not None:
        chosen |= {name: (everything, slice(turn, turn + 1)) for name, turn in TURNS.items()}
    chosen[OVERALL] = (everything, slice(None))
    summary: dict[str, dict[str, dict]] = {}
    for task, (indices, turns) in chosen.items():
        questions = {
            name: [[repeat[i][turns] for i in indices] for repeat in repeats] for name, repeats in results.runs.items()
        }
        speeds = {name: [tokens_per_second(repeat) for repeat in repeats] for name, repeats in questions.items()}
        summary[task] = {}
        for name, repeats in questions.items():
            entry = {
                "questions": len(indices),
                "acceptance": measure([question for repeat in repeats for question in repeat]),
                "tokens_per_second": _over_repeats(speeds[name]),
            }
            for base in BASES:
                if base in speeds:
                    ratios = [a / b for a, b in zip(speeds[name], speeds[base], strict=True)]
                    entry[f"speedup_vs_{base}"] = _over_repeats(ratios)
            summary[task][name] = entry
    return summary


def suite_document(file: SuiteFile, results: Results, tokenizer: PreTrainedTokenizerBase) -> dict:
    """The part of a bench's JSON that belongs to its suite: the file, every answer, and the tables' figures."""
    measure, formula = MEASURES[file.suite.name]
    rows = [
        {
            "question_id": prompt.id,
            "category": prompt.category,
            "place": place,
            "method": name,
            "repeat": number,
            "turns": [_turn(run, tokenizer) for run in repeat[i]],
        }
        for i, (prompt, place) in enumerate(zip(results.prompts, file.places, strict=False))
        for name, repeats in results.runs.items()
        for number, repeat in enumerate(repeats)
    ]
    return {
        "name": file.suite.name,
        "file": file.path.name,
        "sha256": file.sha256,
        "questions_in_file": file.num_questions,
        "questions": len(results.prompts),
        "formulas": {"acceptance": f"{measure}: {formula}"} | SPEED_FORMULAS,
        "summary": summarize(file.suite, results),
        "rows": rows,
    }


def _turn(run: Run, tokenizer: PreTrainedTokenizerBase) -> dict:
    """One answer; its tokens as a digest, by which two runs are compared exactly."""
    return {
        "answer": tokenizer.decode(run.tokens, skip_special_tokens=True),
        "tokens_sha256": hashlib.sha256(" ".join(map(str, run.tokens)).encode()).hexdigest(),
        "new_tokens": len(run.tokens),
        "seconds": run.seconds,
        "steps": len(run.counts),
        "tau": run.stats.tau,
        "acceptance_lengths": " ".join(map(str, run.deliveries)),
    }


def _spread(entry: dict, digits: int, unit: str = "") -> str:
    spread = "" if entry["std"] is None else f" ± {entry['std']:.{digits}f}"
    return f"{cut(entry['mean'], digits)}{unit}{spread}"


def _table(title: str, *columns: str) -> Table:
    """One whose words are folded, never cut, where the terminal is narrow."""
    return Table(*(Column(name, overflow="fold") for name in columns), title=title)


def print_suite(document: dict, suite: Suite, console: Console | None = None) -> None:
    """The suite's tables: every task and method, then the summary in the form in which the suite publishes it."""
    console = console or Console(highlight=False)
    summary, (measure, _) = document["summary"], MEASURES[suite.name]
    methods = list(summary[OVERALL])
    bases = [base for base in BASES if base in methods]
    first = "Task" if suite.name == "spec-bench" else "Category"
    speedups = [f"Speedup vs {base}" for base in bases]
    title = f"{suite.name}: {escape(document['file'])}"
    table = _table(title, first, "method", measure, "Tokens per second", *speedups)
    for task, entries in summary.items():
        if task in (OVERALL, *TURNS):
            table.add_section()
        label = "Overall Average" if suite.name == "speed-bench" and task == OVERALL else task
        for name, entry in entries.items():
            table.add_row(
                label,
                name,
                cut(entry["acceptance"], 4),
                _spread(entry["tokens_per_second"], 2),
                *(_spread(entry[f"speedup_vs_{base}"], 3, "x") for base in bases),
            )
    console.print(table)
    tasks = [task for task in suite.tasks if task in summary]
    if suite.name == "spec-bench":
        for base in bases:
            columns = *(suite.tasks[task] for task in tasks), "#Mean Accepted Tokens", "Overall"
            table = _table(f"Speedup over {base}", "Models", *columns)
            for name in methods:
                ratios = [f"{cut(summary[task][name][f'speedup_vs_{base}']['mean'])}x" for task in (*tasks, OVERALL)]
                accepted = cut(summary[OVERALL][name]["acceptance"])
                table.add_row(name, *ratios[:-1], accepted, ratios[-1])
            console.print(table)
    elif suite.name == "speed-bench":
        table = _table("Acceptance Length Report", "Model", *tasks, "Overall")
        for name in methods:
            table.add_row(name, *(cut(summary[task][name]["acceptance"]) for task in (*tasks, OVERALL)))
        console.print(table)
    missing = [task for task in suite.tasks if task not in summary]
    if missing and suite.name != "speed-bench":
        console.print(f"not among the {document['questions']} questions of this run: {', '.join(missing)}")
