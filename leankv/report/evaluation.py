"""What `leankv eval-ppl` found, and its table for a terminal."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from leankv.report.divergence import DIVERGENCE_COLUMNS, divergence_rows
from leankv.report.tables import format_interval, format_protocol, name_value_table


@dataclass(frozen=True)
class FreeRun:
    """How far two models' continuations of the same prompts agree.

    Attributes:
        prompts: how many.
        prompt_tokens: length of each: the first half of a block.
        new_tokens: length of each continuation.
        equal_percent: continuation tokens that are the same in both at the same place, percent of all.
        equal_interval: its 95 % interval (t), prompts being the sampling unit; None where there is only one.
        first_difference: median over the prompts of how many tokens are the same before the first that differs;
            `new_tokens` of a prompt without any difference.
        without_difference: prompts whose continuations are the same throughout.
    """

    prompts: int
    prompt_tokens: int
    new_tokens: int
    equal_percent: float
    equal_interval: tuple[float, float] | None
    first_difference: float
    without_difference: int


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model's perplexity, and that with a compressed cache, on the same blocks.

    Without a bundle or a plan, all from `ppl` on is None.

    Attributes:
        model: its name or folder.
        bundle: the bundle's folder; None where there was none.
        plan: the plan, as YAML and JSON write it; None where there was none.
        dataset: the text.
        split: the part of it.
        protocol: `strict`, `stream`, `prefix` or `decode`.
        block_length: tokens in a block.
        blocks: how many were measured.
        tokens: predicted tokens in all blocks.
        base_ppl: perplexity of the uncompressed model.
        ppl: perplexity with the compressed cache.
        delta_ppl: the difference, in points.
        delta_percent: the same in percent of `base_ppl`.
        interval: 95 % interval of `delta_ppl`; None too where there is only one block.
        divergence: the figures named in `DIVERGENCE_COLUMNS`; an interval's ends are None where there is one block.
        free_run: how far free continuations agree; None too where that was not asked for.
        sinks: first tokens kept exact.
        window: latest tokens kept exact.
    """

    model: str
    bundle: str | None
    plan: str | Mapping[str, Any] | None = None
    dataset: str
    split: str
    protocol: str
    block_length: int
    blocks: int
    tokens: int
    base_ppl: float
    ppl: float | None = None
    delta_ppl: float | None = None
    delta_percent: float | None = None
    interval: tuple[float, float] | None = None
    divergence: Mapping[str, float | None] | None = None
    free_run: FreeRun | None = None
    sinks: int | None = None
    window: int | None = None

    @property
    def kl(self) -> float | None:
        """Mean KL divergence of the next token from the base model's, nats a token."""
        return None if self.divergence is None else self.divergence["kl"]

    @property
    def top1(self) -> float | None:
        """Tokens whose likeliest continuation is the base model's, percent."""
        return None if self.divergence is None else self.divergence["top1"]

    def to_json(self) -> dict[str, Any]:
        """As `--json` prints it: one key a field, and one a figure of divergence."""
        values: dict[str, Any] = {}
        for name, value in asdict(self).items():
            if name == "divergence":
                values.update(dict.fromkeys(DIVERGENCE_COLUMNS) if value is None else value)
            else:
                values[name] = value
        return values


def evaluation_table(result: Evaluation) -> Table:
    """Base and compressed model side by side, for a terminal."""
    rows = [
        ("model", result.model),
        ("text", f"{result.dataset}, {result.split} split, {result.tokens} tokens"),
        ("blocks", f"{result.blocks} of {result.block_length} tokens"),
        ("base perplexity", f"{result.base_ppl:.3f}"),
    ]
    if result.ppl is not None:
        plan = result.plan if isinstance(result.plan, str) else json.dumps(result.plan)
        rows += [
            ("plan", plan) if result.bundle is None else ("bundle", result.bundle),
            ("protocol", format_protocol(result.protocol, result.sinks, result.window)),
            ("perplexity", f"{result.ppl:.3f}"),
            ("difference", f"{result.delta_ppl:+.3f} points ({result.delta_percent:+.1f} %)"),
            ("95 % interval", format_interval(result.interval)),
            *divergence_rows(result.divergence or {}),
        ]
    if result.free_run is not None:
        rows += free_run_rows(result.free_run)
    return name_value_table("Perplexity", rows)


def free_run_rows(run: FreeRun) -> list[tuple[str, str]]:
    """Name and value of each figure, for people."""
    interval = "not known" if run.equal_interval is None else "{:.1f} to {:.1f} %".format(*run.equal_interval)
    equal = f"after {run.first_difference:g} equal tokens"
    return [
        (
            "free running",
            f"{run.prompts} prompts of {run.prompt_tokens} tokens (half a block), {run.new_tokens} greedy tokens each",
        ),
        ("equal tokens", f"{run.equal_percent:.1f} % (95 % interval over prompts {interval})"),
        ("first difference, median", "none" if run.first_difference == run.new_tokens else equal),
        ("prompts without a difference", f"{run.without_difference} of {run.prompts}"),
    ]
