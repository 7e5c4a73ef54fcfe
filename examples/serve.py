"""One engine for many requests: buffers are kept between calls, and `on_step` watches every decode step.

python examples/serve.py
"""

import firp

REQUESTS = ("The capital of France is", "Two plus two is", "A week has")


def main(model: str = "smollm2-135m", max_new_tokens: int = 24, dtype: str = "bfloat16") -> None:
    """Answer requests one after another with one engine."""
    base, tokenizer = firp.load_model(model, dtype=dtype)
    engine = firp.Engine(base, firp.default_predictor(model))

    for request in REQUESTS:
        sizes: list[int] = []

        def watch(event: firp.StepEvent, sizes: list[int] = sizes) -> None:
            sizes.append(sum(map(len, event.tokens.values())))

        inputs = tokenizer(request, return_tensors="pt")
        output = firp.generate(
            base, **inputs, engine=engine, on_step=watch, max_new_tokens=max_new_tokens, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        print(repr(tokenizer.decode(output.sequences[0], skip_special_tokens=True)))
        print(f"  tokens of each step: {sizes}; prefill {output.time.prefill:.3f} s, steps {output.time.steps:.3f} s")


if __name__ == "__main__":
    main()
