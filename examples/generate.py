"""Drop-in generation: one argument more than Hugging Face's `generate`, and the same tokens.

python examples/generate.py
"""

import firp
import torch


def main(model: str = "smollm2-135m", max_new_tokens: int = 64) -> None:
    """Decode one prompt three ways, in float32, and compare the tokens."""
    base, tokenizer = firp.load_model(model, dtype="float32")
    predictor = firp.default_predictor(model)
    inputs = tokenizer("The lighthouse keeper opened the bottle and", return_tensors="pt")
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}

    output = firp.generate(base, **inputs, predictor=predictor, return_dict_in_generate=True, **options)
    print(tokenizer.decode(output.sequences[0]))
    print(f"{output.stats.tokens} tokens in {output.stats.steps} steps, tau {output.stats.tau:.2f}")

    # The same through Hugging Face's own hook, for code that already calls `model.generate`.
    hooked = base.generate(**inputs, custom_generate=firp.decode, predictor=predictor, **options)
    plain = base.generate(**inputs, **options)
    print("equal to Hugging Face:", torch.equal(output.sequences, plain) and torch.equal(hooked, plain))


if __name__ == "__main__":
    main()
