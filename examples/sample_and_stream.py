"""Sampling with a streamer: text appears as it is accepted, and a seed gives the same text with any tree.

python examples/sample_and_stream.py
"""

import firp
import torch
from transformers import TextStreamer


def main(model: str = "smollm2-135m", max_new_tokens: int = 64) -> None:
    """Stream one sampled answer, then show that plain decoding draws the same tokens."""
    base, tokenizer = firp.load_model(model, dtype="float32")
    predictor = firp.default_predictor(model)
    messages = [{"role": "user", "content": "Name a colour and say why you like it."}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    options = {"max_new_tokens": max_new_tokens, "do_sample": True, "temperature": 0.8, "top_p": 0.95, "seed": 7}

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    drafted = firp.generate(base, **inputs, predictor=predictor, streamer=streamer, **options)
    plain = firp.generate(base, **inputs, **options)
    print("equal to sampled plain decoding:", torch.equal(drafted, plain))


if __name__ == "__main__":
    main()
