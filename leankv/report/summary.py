"""The summary of a selection: the figures that a person or a program wants first. Written to `summary.json`."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from leankv.errors import UserError
from leankv.report import run_files
from leankv.report.columns import NAMES_BEFORE
from leankv.report.divergence import DIVERGENCE_COLUMNS
from leankv.storage.files import read_json


@dataclass(frozen=True)
class Summary:
    """A chosen plan, and its joint cost and ratios on text that nothing was chosen by.

    Attributes:
        model: its name or folder.
        n_layers: how many the model has.
        width: numbers in one token's K or V vector of one layer; one a layer where they differ, and K's and V's where
            those do.
        codec: `ae:4`, or `k=none v=ae:4` where keys and values differ.
        key_space: `post-rope` or `pre-rope`.
        error_metric: what errors counted by when codecs were fitted: `none`, `gradient` or `attention`.
        protocol: `strict`, `stream`, `prefix` or `decode`.
        sinks: first tokens kept exact.
        window: latest tokens kept exact.
        dataset: the text.
        split: the part of it that the figures are of.
        tokens: predicted tokens.
        budget: as asked for: points (`2.5`) or percent (`7%`).
        budget_points: the same in perplexity points, of this text's base perplexity.
        base_ppl: perplexity of the uncompressed model.
        selected_layers: the layers that are compressed, in order.
        ppl: perplexity with the compressed cache.
        delta_ppl: the joint cost, in points.
        delta_ppl_interval: its 95 % interval; None where there is only one block.
        delta_percent: the joint cost in percent of `base_ppl`.
        within_budget: whether the cost on this text is within the budget.
        divergence: the figures named in `DIVERGENCE_COLUMNS`; an interval's ends are None where there is none.
        context: tokens that the caches held when bytes were counted.
        code_ratio: of compressed vectors over their codes, live; None where there are no codes.
        code_ratio_stored: the same, serialized.
        cache_ratio: 16-bit cache over what is held between steps.
        all_in_ratio: 16-bit cache over what is held, the codecs in memory, and the peak of a decoding step.
        base_bytes: of the 16-bit cache of one sequence.
        held_bytes: of the compressed cache in memory, between steps.
        stored_bytes: of the compressed cache serialized.
        peak_step_bytes: the most that one decoding step takes over `held_bytes`.
        claimed_cache_ratio: tokens -> cache ratio, as the codecs' bits say.
        claimed_base_bytes: tokens -> bytes of the 16-bit cache; None in files of earlier versions.
        codec_parameters: in all codecs.
        codec_bytes: the same on disk.
        codec_bytes_memory: the same in memory, with the tables that decoding builds.
        seconds: what `capture`, `fit`, `sweep`, `select` and `report` took.
        peak_rss_bytes: most memory that the process held.
        device: that the model ran on.
        dtype: that the model, and exact vectors, are in.
        budget_percent: the budget in percent of the base perplexity of the text that the plan was chosen on; None in
            files of earlier versions.
        strategy: `greedy`, or what searched, one after another.
        minimize: which bytes were to be few: `live`, `stored` or `all-in`; None under `greedy`.
        refit: `none`; `sequential`: fitted anew to what the plan itself leaves; `distill`: trained together.
        evaluations: passes over all selection blocks that the search took; None where they were not counted.
        certificate: a `leankv.search.certificate.Certificate` as JSON; None where none was asked for.
    """

    model: str
    n_layers: int
    width: int | list[int | tuple[int, int]]
    codec: str
    key_space: str
    error_metric: str
    protocol: str
    sinks: int
    window: int
    dataset: str
    split: str
    tokens: int
    budget: str
    budget_points: float
    base_ppl: float
    selected_layers: tuple[int, ...]
    ppl: float
    delta_ppl: float
    delta_ppl_interval: tuple[float, float] | None
    delta_percent: float
    within_budget: bool
    divergence: Mapping[str, float | None]
    context: int
    code_ratio: float | None
    code_ratio_stored: float | None
    cache_ratio: float | None
    all_in_ratio: float | None
    base_bytes: int
    held_bytes: int
    stored_bytes: int
    peak_step_bytes: int
    claimed_cache_ratio: Mapping[int, float]
    codec_parameters: int
    codec_bytes: int
    codec_bytes_memory: int
    seconds: Mapping[str, float]
    peak_rss_bytes: int
    device: str
    dtype: str
    budget_percent: float | None = None
    strategy: str = "greedy"
    minimize: str | None = None
    refit: str = "none"
    evaluations: float | None = None
    certificate: Mapping[str, Any] | None = None
    claimed_base_bytes: Mapping[int, int] | None = None

    @property
    def stored_ratio(self) -> float:
        """16-bit cache over all that is serialized, sinks and window included."""
        return self.base_bytes / self.stored_bytes

    def to_json(self) -> dict[str, Any]:
        """As it stands in `summary.json`: one key a field, and one a figure of divergence."""
        values: dict[str, Any] = {}
        for field in fields(self):
            if field.name == "divergence":
                values.update(self.divergence)
            else:
                values[field.name] = getattr(self, field.name)
        return {
            **values,
            "selected_layers": list(self.selected_layers),
            "delta_ppl_interval": None if self.delta_ppl_interval is None else list(self.delta_ppl_interval),
            "claimed_cache_ratio": {str(tokens): ratio for tokens, ratio in self.claimed_cache_ratio.items()},
            "seconds": dict(self.seconds),
            "claimed_base_bytes": None
            if self.claimed_base_bytes is None
            else {str(tokens): bytes_ for tokens, bytes_ in self.claimed_base_bytes.items()},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Summary":
        """What `to_json` gave, or an earlier version wrote; further keys are left aside.

        Raises:
            KeyError: a key is missing.
        """
        named = {NAMES_BEFORE.get(name, name): each for name, each in value.items()}
        named["divergence"] = {name: named[name] for name in DIVERGENCE_COLUMNS}
        since = {field.name: field.default for field in fields(cls) if field.default is not MISSING}
        known = {field.name: (since | named)[field.name] for field in fields(cls)}
        interval, base_bytes = known["delta_ppl_interval"], known["claimed_base_bytes"]
        changed = {
            "selected_layers": tuple(known["selected_layers"]),
            "delta_ppl_interval": None if interval is None else tuple(interval),
            "claimed_cache_ratio": {int(tokens): ratio for tokens, ratio in known["claimed_cache_ratio"].items()},
            "claimed_base_bytes": base_bytes and {int(tokens): bytes_ for tokens, bytes_ in base_bytes.items()},
        }
        return cls(**{**known, **changed})


def read_summary(folder: Path) -> Summary:
    """The summary in a run's folder.

    Raises:
        UserError: there is none, it is not JSON, or another version wrote it without what is needed now.
    """
    path = folder / run_files.SUMMARY
    again = f"run: leankv select --output-dir {folder}"
    if not path.is_file():
        raise UserError(f"{folder} holds no finished selection; {again}")
    value = read_json(path)
    try:
        return Summary.from_json(value)
    except KeyError as error:
        raise UserError(f"{path} has no {error.args[0]}, as another version of LeanKV made it; {again}") from error
