"""The README.md of a bundle: the model card that is published with it."""

from collections.abc import Mapping
from typing import Any

from leankv.report.selection import summary_rows
from leankv.report.summary import Summary
from leankv.report.tables import format_interval, format_protocol, markdown_table


def model_card(summary: Summary, experiment: dict[str, Any]) -> str:
    """The text of a bundle's README.md.

    Args:
        summary: of the selection that the bundle holds.
        experiment: its experiment, `dataclasses.asdict` of it.
    """
    model = experiment["model"]
    base_model = f"base_model: {summary.model}\n" if summary.model.count("/") == 1 else ""
    return f"""---
library_name: leankv
{base_model}tags:
- kv-cache
- compression
---

# A compressed KV cache for {summary.model}

Codecs for {len(summary.selected_layers)} of {summary.n_layers} layers ({summary.codec}). The weights of the
model are untouched: the codecs sit in its cache, which holds codes in place of keys and values.

{measured(summary, experiment)}

## Use

```python
{_loading_code(model)}
```

Make a new cache for each generation. The bundle refuses other weights than those it was made for.

## Limits

{limits(summary.dataset)} `leankv eval-ppl --bundle PATH --free-run 128` shows how soon its own words part from the
uncompressed model's.
"""


def measured(summary: Summary, experiment: Mapping[str, Any]) -> str:
    """What the selection costs and saves, in words and as a table."""
    table = markdown_table(["", ""], [[name, value] for name, value in summary_rows(summary)])
    interval = format_interval(summary.delta_ppl_interval)
    protocol = format_protocol(summary.protocol, summary.sinks, summary.window)
    blocks = f"in blocks of {experiment['data']['block_length']} tokens"
    if summary.protocol == "prefix":
        lengths = experiment["protocol"]
        blocks = f"behind prefixes of {lengths['prefix_length']} tokens, {lengths['continuation']} read beside each"
    return f"""Perplexity rises from {summary.base_ppl:.3f} to {summary.ppl:.3f} ({summary.delta_percent:+.1f} %, 95 %
interval of the rise {interval} points), measured under the protocol {protocol} on
{summary.tokens} tokens of {summary.dataset}, {summary.split} split,
{blocks}. The mean Kullback-Leibler divergence from the
uncompressed model is {summary.divergence["kl"]:.4g} nats a token, and the likeliest next token is the same for
{summary.divergence["top1"]:.1f} % of the tokens.

{table}"""


def limits(dataset: str) -> str:
    """What nobody should conclude from these figures."""
    return f"""The codecs were fitted on {dataset}; text of another kind will be reconstructed worse. Perplexity on one
text says little about long-range retrieval or reasoning: measure your task before you rely on it. The loss compounds
with whatever quantization the model itself has."""


def _loading_code(model: dict[str, Any]) -> str:
    arguments = [f'"{model["name"]}"']
    if model["load_in_4bit"]:
        arguments.append("load_in_4bit=True")
    if model["revision"]:
        arguments.append(f'revision="{model["revision"]}"')
    return f"""import leankv

loaded = leankv.load_model(leankv.ModelConfig({", ".join(arguments)}))
bundle = leankv.load("PATH/TO/THIS/FOLDER", loaded.model)
inputs = loaded.tokenizer("The city of", return_tensors="pt").to(loaded.model.device)
output = loaded.model.generate(**inputs, past_key_values=bundle.new_cache(), max_new_tokens=40)
print(loaded.tokenizer.decode(output[0]))"""
