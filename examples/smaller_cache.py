"""A smaller cache for a model of your own, in five lines.

    python examples/smaller_cache.py MODEL TEXT_FILE

MODEL is a hub id or a local folder; TEXT_FILE is text of the kind that the model will read.
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import leankv


def main(name: str, text_file: str, block_length: int = 512) -> None:
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    text = Path(text_file).read_text(encoding="utf-8")

    # These five lines are what you would write.
    bundle = leankv.fit("transform:s0.02", model, tokenizer, text, block_length=block_length)
    cache = bundle.new_cache()
    inputs = tokenizer(text[:400], return_tensors="pt")
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(output[0]))

    print(f"{cache.nbytes()} bytes held for {output.shape[1]} tokens, {bundle.spec}, {bundle.key_space} keys")


if __name__ == "__main__":
    main(*sys.argv[1:])
