"""lm-evaluation-harness with and without FIRP on one generative task: generations, scores, seconds of both.

    python benchmarks/lm_eval_equality.py --model MODEL_FOLDER --predictor PREDICTOR

Additions as text to go on with, made here: the harness fetches nothing. float32; exit code 1 if anything differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import firp.integrations.lm_eval_model  # noqa: F401 (registers the model)
import lm_eval
import yaml
from lm_eval.tasks import TaskManager

TASK = "firp_additions"


def write_task(folder: Path, items: int) -> None:
    """A task file and its items: three solved additions, then one to solve, and an answer of some words."""
    rng = random.Random(0)
    lines = []
    for _ in range(items):
        pairs = [(rng.randint(2, 49), rng.randint(2, 49)) for _ in range(4)]
        *shown, (a, b) = pairs
        told = "".join(f"Question: What is {x} + {y}?\nAnswer: {x} + {y} = {x + y}.\n\n" for x, y in shown)
        lines.append(json.dumps({"text": f"{told}Question: What is {a} + {b}?\nAnswer:", "sum": str(a + b)}))
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{sum}}",
        "generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 32},
        "filter_list": [
            {
                "name": "last-number",
                "filter": [{"function": "regex", "regex_pattern": "= ([0-9]+)"}, {"function": "take_first"}],
            }
        ],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{TASK}.yaml").write_text(yaml.safe_dump(task))


def evaluate(kind: str, arguments: dict, folder: Path, batch_size: int) -> tuple[list[str], dict, float]:
    """Generations, scores and the seconds of the whole evaluation, the model's loading included."""
    started = time.perf_counter()
    found = lm_eval.simple_evaluate(
        kind,
        model_args=arguments,
        tasks=[TASK],
        batch_size=batch_size,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    )
    seconds = time.perf_counter() - started
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples], found["results"][TASK], seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id")
    parser.add_argument("--predictor", required=True)
    parser.add_argument("--items", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=1)
    given = parser.parse_args()
    common = {"pretrained": given.model, "dtype": "float32", "device": "cpu"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_task(folder, given.items)
        plain = evaluate("hf", common, folder, given.batch_size)
        ours = evaluate("firp", common | {"predictor": given.predictor}, folder, given.batch_size)
    same = sum(a == b for a, b in zip(plain[0], ours[0], strict=True))
    scores = [float(run[1]["exact_match,last-number"]) for run in (plain, ours)]
    print(f"generations identical: {same} of {len(plain[0])}")
    for name, run, score in zip(("hf", "firp"), (plain, ours), scores, strict=True):
        print(f"{name}: exact_match {score:.3f}, {run[2]:.1f} s")
    return 0 if same == len(plain[0]) and scores[0] == scores[1] else 1


if __name__ == "__main__":
    sys.exit(main())
