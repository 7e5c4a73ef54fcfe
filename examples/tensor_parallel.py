"""One model over several processes: transformers shards it, and every process makes the same calls.

torchrun --nproc-per-node 3 examples/tensor_parallel.py
"""

import os

import firp
import torch


def main(model: str = "smollm2-135m", max_new_tokens: int = 48) -> None:
    """Decode a prompt over all processes of the job, with drafts and without, and compare the tokens."""
    base, tokenizer = firp.load_model(model, dtype="float32", tp_size=int(os.environ.get("WORLD_SIZE", "1")))
    inputs = tokenizer("The lighthouse keeper opened the bottle and", return_tensors="pt").to(base.device)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}

    output = firp.generate(base, **inputs, predictor=firp.default_predictor(model), **options)
    plain = firp.generate(base, **inputs, **options)
    if os.environ.get("RANK", "0") == "0":
        print(tokenizer.decode(output[0]))
        print("equal to plain decoding:", torch.equal(output, plain))


if __name__ == "__main__":
    main()
