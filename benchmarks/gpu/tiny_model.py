"""A tiny model with a tokenizer, a predictor and prompts in a folder: `python -m benchmarks.gpu.tiny_model FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import firp
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def write(folder: Path) -> None:
    """Write folder/model, folder/predictor and folder/prompts.jsonl."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"] + [f"w{i}" for i in range(28)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", bos_token="[BOS]"
    )
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=3, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    model.save_pretrained(folder / "model")
    fast.save_pretrained(folder / "model")
    firp.FirpPredictor.for_model(model, 3, 2).save_pretrained(folder / "predictor")
    lines = [f'{{"prompt": "w{i} w{i + 1} w{i + 2}", "category": "{"ab"[i % 2]}"}}' for i in range(20)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
