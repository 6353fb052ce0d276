"""Sweeping a model that exists in memory only: what does each layer's cache cost after an edit of the weights?

    python examples/edited_model.py MODEL TEXT_FILE

The edit here scales the values of the middle layer; merging a LoRA or quantizing the model would do as well. Nothing
is written.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import leankv


def main(name: str, text_file: str, block_length: int = 512) -> None:
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    text = Path(text_file).read_text(encoding="utf-8")

    before = leankv.sweep(model, tokenizer, text, recipe="ae:4", block_length=block_length)
    middle = model.model.layers[model.config.num_hidden_layers // 2]
    with torch.no_grad():
        middle.self_attn.v_proj.weight *= 1.5
    after = leankv.sweep(model, tokenizer, text, recipe="ae:4", block_length=block_length)

    table = before[["layer", "delta_ppl"]].merge(after[["layer", "delta_ppl"]], on="layer", suffixes=("", "_edited"))
    print(table.to_string(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
