"""A process that has transformers, and of LeanKV and what it brings along nothing: what it makes of a repository.

Run with the repository, how many tokens to generate, and `plain` or `nf4`; the prompt on standard input.
"""

import importlib.util
import json
import sys
from typing import Any

MISSING = {"leankv", "jaxtyping", "constriction", "numba"}


class Missing:
    """Finds none of them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


stock_find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *others: None if name in MISSING else stock_find(name, *others)  # type: ignore
sys.meta_path.insert(0, Missing())  # type: ignore[arg-type]

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DynamicCache  # noqa: E402

repository, new_tokens, kind = sys.argv[1:]
given = (
    {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")} if kind == "nf4" else {}
)
model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True, dtype=torch.float32, **given)
tokenizer = AutoTokenizer.from_pretrained(repository, trust_remote_code=True)
inputs = tokenizer(sys.stdin.read(), return_tensors="pt")
how = {"max_new_tokens": int(new_tokens), "do_sample": False, "return_dict_in_generate": True}
ours = model.generate(**inputs, **how)
stock = model.generate(**inputs, past_key_values=DynamicCache(config=model.config), **how)
codecs = {str(tensor.dtype) for codec in model.leankv_bundle.plan.values() for tensor in codec.state_dict().values()}
found = {
    "ours": ours.sequences.tolist(),
    "stock": stock.sequences.tolist(),
    "cache": type(ours.past_key_values).__name__,
    "model": type(model).__name__,
    "codecs": sorted(codecs),
}
sys.stdout.write(json.dumps(found) + "\n")
