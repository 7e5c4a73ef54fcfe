"""A logits processor of your own: FIRP calls it once per emitted token, in order, as Hugging Face does.

python examples/custom_processor.py
"""

import firp
import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase


class WithoutLetter(LogitsProcessor):
    """Forbids every token whose text holds a letter."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, letter: str) -> None:
        texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.forbidden = torch.tensor([letter in text.lower() for text in texts])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V] after tokens [B, T]."""
        return scores.masked_fill(self.forbidden.to(scores.device), -torch.inf)


def main(model: str = "smollm2-135m", max_new_tokens: int = 32) -> None:
    """Answer without the letter e."""
    base, tokenizer = firp.load_model(model, dtype="float32")
    inputs = tokenizer("My favourite animal is", return_tensors="pt")
    output = firp.generate(
        base, **inputs, predictor=firp.default_predictor(model), logits_processor=[WithoutLetter(tokenizer, "e")],
        max_new_tokens=max_new_tokens, do_sample=False,
    )  # fmt: skip
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main()
