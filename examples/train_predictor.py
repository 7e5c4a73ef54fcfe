"""Train a predictor of your own: the base model answers prompts, the maps learn from the answers.

This is the smallest run that goes through every stage. A useful predictor needs thousands of prompts and hundreds of
steps (docs/training.md).

    python examples/train_predictor.py
"""

import json
import tempfile
from pathlib import Path

import firp
import torch
from firp.cli.main import app


def run(*arguments: object) -> None:
    """The command `firp`, in this process."""
    app([str(argument) for argument in arguments], standalone_mode=False)


def main(model: str = "smollm2-135m", max_new_tokens: int = 16, steps: int = 4) -> None:
    """Distill four answers, train on them, decode with the result."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, text, trained = (Path(folder) / name for name in ("prompts.jsonl", "text.npz", "predictor"))
        questions = [f"What is {a} plus {b}?" for a in (2, 5) for b in (1, 3)]
        prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))

        run("distill", "--prompts", prompts, "--output", text, "--model", model, "--dtype", "float32",
            "--max-new-tokens", max_new_tokens)  # fmt: skip
        run("train", "--data", text, "--output", trained, "--model", model, "--steps", steps, "--batch-size", 2,
            "--anchors", 8, "--held-out", 2, "--transition-rank", 8)  # fmt: skip

        base, tokenizer = firp.load_model(model, dtype="float32")
        inputs = tokenizer("What is 2 plus 3?", return_tensors="pt")
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        output = firp.generate(
            base, **inputs, predictor=firp.load_predictor(trained), return_dict_in_generate=True, **options
        )
        print(f"tau {output.stats.tau:.2f}")
        print("equal to Hugging Face:", torch.equal(output.sequences, base.generate(**inputs, **options)))


if __name__ == "__main__":
    main()
