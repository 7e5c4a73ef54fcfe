"""A batch of prompts of different lengths: every sequence accepts drafts at its own pace.

Each row equals its prompt decoded alone. The predictor's own tree shrinks with the batch; a tree that is passed is
kept.

    python examples/batch.py
"""

import firp

PROMPTS = (
    "Water boils at",
    "A haiku about rain:",
    "Three primary colours are red,",
    "In the beginning, the explorers of the north had only",
)


def main(model: str = "smollm2-135m", max_new_tokens: int = 32) -> None:
    """Decode four prompts at once."""
    base, tokenizer = firp.load_model(model, dtype="float32")
    predictor = firp.default_predictor(model)
    batch = tokenizer(list(PROMPTS), padding=True, padding_side="left", return_tensors="pt")
    output = firp.generate(
        base, **batch, predictor=predictor, tree=firp.TreeConfig(num_nodes=4, num_lookahead=2),
        max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True,
    )  # fmt: skip
    for text in tokenizer.batch_decode(output.sequences, skip_special_tokens=True):
        print("-", text)
    print(f"{output.stats.tokens} tokens in {output.stats.steps} steps, counted per sequence")


if __name__ == "__main__":
    main()
