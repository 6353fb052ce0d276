"""The card of a repository: what people read on the hub, and the figures that its search finds."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from leankv.cache.bundle import Bundle
from leankv.models.loading import LoadedModel
from leankv.report.model_card import limits, measured
from leankv.report.summary import Summary

UNKNOWN_LICENSE = "other"
"""As the hub calls what none of its names fits."""


def hub_card(bundle: Bundle, loaded: LoadedModel, base: str | None, license: str | None) -> str:
    """Text of the repository's README.md.

    Args:
        bundle: what it holds.
        loaded: the base model.
        base: its name, where others can load it by that.
        license: of the weights; unless given, what the base's own card says.
    """
    summary = Summary.from_json(bundle.results) if bundle.results else None
    name, plan = Path(loaded.name).name, bundle.spec.in_short(len(loaded.geometry.layers))
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        license=license or _license_of(base),
        model_name=f"{name} with a compressed KV cache",
        pipeline_tag="text-generation",
        tags=["kv-cache", "compression", "leankv"],
        eval_results=None if summary is None else _results(summary),
    )
    if summary is None:
        found, told = "Nothing was measured of it yet.", limits("the text it was given")
    else:
        found, told = measured(summary, bundle.experiment), limits(summary.dataset)
    return f"""---
{data.to_yaml()}
---

# {name} with a compressed KV cache

`generate` holds codes in place of most keys and values: {plan}. The first {bundle.sinks} and the latest
{bundle.window} tokens are kept exact. The weights of the model are untouched.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS REPOSITORY", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("THIS REPOSITORY", trust_remote_code=True)
inputs = tokenizer("The city of", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

LeanKV need not be installed: the files that decode stand in this repository. With numba installed, decoding on a CPU is
faster. `model.generate(..., past_key_values=transformers.DynamicCache())` uses the stock cache, to compare.

## Measured

{found}

## Limits

{told}
"""


def _results(summary: Summary) -> list[EvalResult]:
    """The figures as the hub's index has them."""
    text: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_type": summary.dataset,
        "dataset_name": summary.dataset,
        "dataset_split": summary.split,
    }
    figures = {
        "perplexity": ("Perplexity, compressed cache", summary.ppl),
        "base_perplexity": ("Perplexity, uncompressed cache", summary.base_ppl),
        "kl_divergence": ("Mean KL divergence, nats a token", summary.divergence["kl"]),
        "top1_agreement": ("Same likeliest token, percent", summary.divergence["top1"]),
        "cache_ratio": (f"Uncompressed over compressed cache at {summary.context} tokens", summary.cache_ratio),
    }
    return [
        EvalResult(**text, metric_type=kind, metric_name=name, metric_value=value)
        for kind, (name, value) in figures.items()
        if value is not None
    ]


def _license_of(base: str | None) -> str:
    """As the base's card names it; `other` where there is no card to be had."""
    if base is None:
        return UNKNOWN_LICENSE
    try:
        found = ModelCard.load(base).data.license
    except (EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError):
        return UNKNOWN_LICENSE
    return found if isinstance(found, str) else UNKNOWN_LICENSE
