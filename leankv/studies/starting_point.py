"""A first experiment for a model, and what it will take: measured on one block, on this machine.

`leankv init` writes it. Times are those of one block, forward, backward and through a compressed cache, and of fitting
one layer to as many vectors as it will be; the parts of a search are so many of each. Longer blocks are taken to cost
as much a token.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch
import yaml

from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import PlanSpec
from leankv.calibration.error_metrics import TOKENS, shrunk
from leankv.calibration.fit import weighted_error
from leankv.calibration.fit_in_context import reconstructed
from leankv.calibration.gradients import gradient_passes
from leankv.codecs import FitData, TrainingSettings, parse_recipe
from leankv.codecs.base import fit_together
from leankv.config.experiment import Experiment
from leankv.config.loading import flatten
from leankv.config.plan_table import PARTS
from leankv.config.presets import LADDERS, USUAL_WINDOW
from leankv.models.loading import LoadedModel
from leankv.models.rope import find_rotation
from leankv.models.structure import max_positions, text_config
from leankv.studies.plan_options import reference_recipes
from leankv.studies.select_plan import TESTED

LONGEST, SEARCHED = 4096, 1024
"""Tokens of the blocks that costs are believed on, and of those that a search looks at, where a model reads so many."""

CALIBRATION_TOKENS = 32_768
"""Assumption: enough for transforms of 1,024 directions; see the log of 2026-11-25."""

MEMORY_SHARE = 0.25  # of what is free once the model is loaded; the rest is for the passes themselves

FAMILY = "resid(share,transform)"
"""What is searched: the family that compressed most in every comparison so far."""

EVALUATIONS, BACKWARD = 12, 4
"""Passes over all selection blocks that `waterfill` takes at most, and those that look for contributions."""

ONE_RATE = 0.5  # of the time of a whole ladder, what they have in common included: 250 and 500 s were seen
DOCUMENTS = 30
"""Assumption: that a certificate at +7 % reads; 31 and 20 were seen."""


@dataclass(frozen=True)
class Forecast:
    """What one part of the experiment takes.

    Attributes:
        part: of the experiment.
        how: what its time is made of.
        seconds: of this machine, with nothing beside.
        disk: bytes that it leaves in the run's folder.
        memory: bytes that it needs beside the model.
    """

    part: str
    how: str
    seconds: float
    disk: int
    memory: int


@dataclass(frozen=True)
class Pace:
    """Seconds that one block took.

    Attributes:
        tokens: of the block.
        forward: a plain pass.
        backward: a pass and the gradients of all keys and values.
        cached: a pass through a compressed cache, in chunks.
        fit: fitting all rates of one layer's keys and values to `fitted` vectors each.
        fitted: as many as there are calibration tokens. Few of them would not tell: half of a fit does not grow.
    """

    tokens: int
    forward: float
    backward: float
    cached: float
    fit: float
    fitted: int


COMMENTS = {
    "model.load_in_4bit": "NF4, where the weights do not fit otherwise",
    "data.dataset": "or a .txt, .jsonl or .parquet file of text like yours: codecs and certificate are of its kind",
    "data.block_length": "tokens; costs are believed, and ratios given, at this context",
    "data.calibration_blocks": "codecs are fitted to these",
    "data.selection_blocks": "plans are compared on these",
    "data.selection_block_length": "shorter, so that a search is fast",
    "data.report_blocks": "nothing is chosen by these",
    "codec.key_space": "where keys are coded; pre-rope compresses better",
    "fit.error_metric": "errors count by what they do to the loss",
    "protocol.kind": "as generation reads a long text; `prefix` is for saved prompts (window: 0), `strict` LeanLlama's",
    "protocol.sinks": "first tokens kept exact",
    "protocol.window": "latest tokens kept exact",
    "selection.budget": "rise of perplexity; also in points (2.5), or several: 1%,7%",
    "selection.minimize": "bytes held between steps; `stored` for files, `all-in` with codecs and the peak of a step",
    "selection.strategy": "`waterfill,refine` searches longer; `greedy` is LeanLlama's way, with plan: ae:4",
    "selection.recipes": "what a site may get; `transform` alone has the lightest codecs",
    "memory_budget": "GB for activations and hidden states; more goes to disk",
}
"""Of the settings that an experiment's file explains; what else was asked for stands there without."""


def starting_experiment(
    loaded: LoadedModel, base: Experiment, named: Collection[str], output_dir: str
) -> dict[str, Any]:
    """Settings, dotted key -> value, that suit a model and the memory that is free, and all that was asked for.

    Args:
        loaded: the model.
        base: what was asked for, on the command line and in a file.
        named: the keys of what was: they are kept, whether or not they say what is said anyway.
        output_dir: of the experiment.
    """
    defaults = flatten(asdict(Experiment()))
    asked = {key: value for key, value in flatten(asdict(base)).items() if value != defaults[key] or key in named}
    protocol = asked.get("protocol.kind", "stream")
    longest = max_positions(loaded.model.config) or LONGEST
    block = asked.get("data.block_length") or 2 ** int(math.log2(min(longest, LONGEST)))
    searched = asked.get("data.selection_block_length") or min(block, SEARCHED)
    pre_rope = find_rotation(loaded.model, False, lambda reason: None) is not None
    suggested = {
        "model.name": base.model.name,
        "model.load_in_4bit": base.model.load_in_4bit,
        "data.dataset": base.data.dataset,
        "data.block_length": block,
        "data.calibration_blocks": max(2, CALIBRATION_TOKENS // block),
        "data.selection_blocks": 16,
        "data.selection_block_length": searched,
        "data.report_blocks": 8,
        "codec.key_space": "pre-rope" if pre_rope else "post-rope",
        "fit.error_metric": "gradient",
        "protocol.kind": "stream",
        "protocol.sinks": 4,
        # Half of a short block at most: what a window holds is compressed by no plan.
        "protocol.window": min(USUAL_WINDOW, block // 2, searched // 2) if protocol in ("stream", "decode") else 0,
        "selection.budget": "7%",
        "selection.minimize": "live",
        "selection.strategy": "waterfill",
        "selection.recipes": FAMILY,
        "memory_budget": round(MEMORY_SHARE * psutil.virtual_memory().available / 1e9, 1),
        "output_dir": output_dir,
    }
    return suggested | asked


def measure_pace(loaded: LoadedModel, experiment: Experiment, on_step: Callable[[], None]) -> Pace:
    """Time one block of the search's length, of random tokens; `on_step` is called after each of four trials."""
    length = experiment.data.selection_block_length or experiment.data.block_length
    model = loaded.model
    vocabulary = text_config(model.config).vocab_size
    tokens = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(experiment.seed))
    tokens = tokens.to(model.device)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}  # vectors and error metric of each part
    is_pre_rope = experiment.codec.key_space == "pre-rope"
    rotation = find_rotation(model, False, lambda reason: None) if is_pre_rope else None

    def forward() -> None:
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)

    middle = len(loaded.geometry.layers) // 2

    def backward() -> None:
        (cache,) = gradient_passes(model, tokens)
        for part in PARTS:
            states, gradient = cache.states_and_gradients(middle, part)
            seen[part] = _rows(states), None
            if gradient is not None:
                seen[part] = _rows(states), shrunk(_rows(gradient).T @ _rows(gradient) / length)

    def cached() -> None:
        layers = loaded.geometry.layers
        spec = PlanSpec.uniform("int:4").sites(len(layers))
        plan = {site: own.without_text(layers[site.layer].width_of(site.part)) for site, own in spec.items()}
        protocol = experiment.protocol
        cache = LeanCache(
            model.config,
            plan,
            sinks=protocol.sinks,
            window=protocol.window,
            rotation=rotation,
            decode_once=True,
        )
        with torch.no_grad():
            for chunk in tokens.split(protocol.chunk, dim=1):
                model(input_ids=chunk, past_key_values=cache)

    copies = -(-experiment.data.calibration_blocks * experiment.data.block_length // length)

    def fit() -> None:
        recipes = [parse_recipe(text) for text in LADDERS[FAMILY]]
        training = TrainingSettings(0, experiment.fit.batch_tokens, experiment.fit.learning_rate, experiment.seed)
        # What a layer predicts from: keys and values of the two before it. These stand for them.
        vectors = [states for states, _ in seen.values()]
        context = torch.cat([*vectors, *vectors], dim=1).half().repeat(copies, 1)
        for states, metric in seen.values():
            x = states.repeat(copies, 1)
            held = max(2, len(x) // 10)
            data = FitData(
                x[None, held:],
                x[None, :held],
                context=context[None, held:],
                heldout_context=context[None, :held],
                error_metric=None if metric is None else metric[None],
                training=training,
            )
            codecs = [codec for (codec,) in fit_together(recipes, data)]
            for codec in codecs:  # each one's error, and what later layers see of one of them
                weighted_error(x[:held], reconstructed(codec, x[:held], context[:held]), metric)
            reconstructed(codecs[len(codecs) // 2], x, context)

    seconds = []
    forward()  # what is built once is built now
    for trial in (forward, backward, cached, fit):
        started = time.monotonic()
        trial()
        if loaded.model.device.type == "cuda":
            torch.cuda.synchronize(loaded.model.device)
        seconds.append(time.monotonic() - started)
        on_step()
    of_forward, of_backward, of_cached, of_fit = seconds
    return Pace(length, of_forward, of_backward, of_cached, of_fit, copies * length)


def _rows(states: torch.Tensor) -> torch.Tensor:
    """`[1, heads, T, head_dim]` as `[T, W]`, float32."""
    return states.transpose(1, 2).flatten(2)[0].float()


def forecast(loaded: LoadedModel, experiment: Experiment, pace: Pace) -> list[Forecast]:
    """What `leankv run` of an experiment takes, part by part; one budget."""
    data, layers = experiment.data, loaded.geometry.layers
    long = data.block_length / pace.tokens
    calibration = data.calibration_blocks * data.block_length
    searched = data.selection_blocks
    paired = pace.forward + pace.cached
    rates = [parse_recipe(text) for text in LADDERS[FAMILY]]
    ladder, contexts = len(layers) * pace.fit * calibration / pace.fitted, len(reference_recipes(rates))
    budget = round(1e9 * experiment.memory_budget)
    activations = calibration * loaded.geometry.bytes_per_token * loaded.model.dtype.itemsize // 2
    matrices = sum(2 * layer.width_of(part) ** 2 for layer in layers for part in ("k", "v"))
    return [
        Forecast(
            "capture",
            f"{data.calibration_blocks} blocks",
            data.calibration_blocks * long * pace.forward,
            activations,
            min(budget, activations),
        ),
        Forecast("gradients", f"{TOKENS:,} tokens, backward", TOKENS / pace.tokens * pace.backward, 0, 0),
        Forecast(
            "ladders",
            f"{2 * len(layers)} sites, {len(rates)} rates, {contexts} contexts",
            contexts * ladder,
            contexts * len(rates) * matrices,
            budget,
        ),
        Forecast(
            "search",
            f"{EVALUATIONS} x {searched} blocks of {pace.tokens:,}",
            EVALUATIONS * searched * pace.cached + BACKWARD * searched * pace.backward,
            0,
            budget,
        ),
        Forecast(
            "refits",
            f"{len(TESTED)} plans fitted anew, and measured",
            len(TESTED) * (ONE_RATE * ladder + searched * pace.cached),
            len(TESTED) * matrices,
            budget,
        ),
        Forecast("certification", f"some {DOCUMENTS} documents", DOCUMENTS * long * paired, 0, 0),
        Forecast(
            "report", f"{data.report_blocks} blocks of {data.block_length:,}", data.report_blocks * long * paired, 0, 0
        ),
    ]


def experiment_text(settings: Mapping[str, Any], loaded: LoadedModel) -> str:
    """The experiment as a commented YAML file."""
    geometry = loaded.geometry
    lines = [
        f"# The best certified plan for {settings['model.name']}:",
        f"# {len(geometry.layers)} layers of width {geometry.width}, {geometry.bytes_per_token / 1e3:.0f} kB of 16-bit "
        "cache a token.",
        "#   leankv run THIS_FILE",
    ]
    sections: dict[str, list[str]] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        comment = f"  # {COMMENTS[key]}" if key in COMMENTS else ""
        sections.setdefault(section, []).append(_yaml_line(name, value) + comment)
    outside = sections.pop("")  # what is of no section comes last
    for section, own in sections.items():
        lines += [f"{section}:", *(f"  {line}" for line in own)]
    return "\n".join([*lines, *outside, ""])


def _yaml_line(name: str, value: Any) -> str:
    """One setting on one line, quoted where YAML needs it."""
    if isinstance(value, dict):
        return f"{name}: {yaml.safe_dump(value, default_flow_style=True, width=math.inf).strip()}"
    return yaml.safe_dump({name: value}, allow_unicode=True, width=math.inf).strip()
