"""LeanKV from Python: for any loaded transformers model and any text; nothing is written unless a folder is given."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float

from leankv.cache.bundle import Bundle, load_bundle
from leankv.cache.code_attention import attention_over_codes
from leankv.cache.default_cache import make_by_default
from leankv.cache.lean_cache import ENCODE_EVERY, LeanCache
from leankv.cache.plan import PlanSpec
from leankv.cache.without_text import plan_without_text
from leankv.codecs import Recipe
from leankv.config.experiment import CodecConfig, DataConfig, Experiment, FitConfig, ProtocolConfig
from leankv.config.presets import USUAL_WINDOW
from leankv.data.blocks import Blocks
from leankv.data.given import GivenBlocks, Text
from leankv.evaluation.base_pass import BasePass
from leankv.evaluation.divergence import Divergence
from leankv.evaluation.paired import PairedRun, measure_pair
from leankv.evaluation.perplexity import compare, exact_window, measure_nats
from leankv.inputs import (
    LEAST_CALIBRATION_BLOCKS,
    blocks_for,
    check_made_for,
    layers_text,
    plan_of,
    settings_of,
)
from leankv.models.loading import describe, look_at, refuse_training
from leankv.progress import Progress, Silent
from leankv.storage.memory_budget import MemoryBudget
from leankv.studies.activation_store import ActivationStore
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.run_folder import check_folder, claim_folder
from leankv.studies.sweep import sweep as sweep_layers
from leankv.studies.workspace import Workspace

SELECTION_SHARE = 0.2  # assumption: of a sweep's text; its last blocks measure what codecs fitted to the others cost


@dataclass(frozen=True)
class PerplexityReport:
    """Perplexity of a model, and of the same model with a compressed cache, on the same blocks.

    Attributes:
        base_ppl: perplexity of the uncompressed model.
        tokens: how many tokens were predicted.
        protocol: how the blocks were fed; see `leankv.evaluation.perplexity`.
        ppl: perplexity with the compressed cache; None where there is no bundle, as all that follows.
        delta_ppl: `ppl` minus `base_ppl`, in points.
        delta_percent: the same in percent of `base_ppl`.
        interval: 95 % interval of `delta_ppl`, blocks being the sampling unit; None also where there is one block.
        kl: mean Kullback-Leibler divergence from the base model's next-token distribution, nats a token.
        top1: share of tokens whose likeliest continuation is the base model's, in percent.
        divergence: these two with their intervals, and further figures.
    """

    base_ppl: float
    tokens: int
    protocol: ProtocolConfig
    ppl: float | None = None
    delta_ppl: float | None = None
    delta_percent: float | None = None
    interval: tuple[float, float] | None = None
    kl: float | None = None
    top1: float | None = None
    divergence: Divergence | None = None


@dataclass(frozen=True)
class LayerVectors:
    """A layer's captured keys and values, block after block, in the model's dtype, on the CPU."""

    k: Float[torch.Tensor, "tokens k_width"]
    v: Float[torch.Tensor, "tokens v_width"]


def fit(
    plan: PlanSpec | str,
    model: Any,
    tokenizer: Any,
    text: Text,
    *,
    sinks: int = ProtocolConfig.sinks,
    window: int = USUAL_WINDOW,
    key_space: str = "auto",
    error_metric: str = "gradient",
    block_length: int = DataConfig.block_length,
    seed: int = Experiment.seed,
    memory_budget: float = Experiment.memory_budget,
    progress: bool = False,
) -> Bundle:
    """Fit a plan's codecs to what a model computes on a text.

    Args:
        plan: which recipe each layer's keys and values get; a recipe's text stands for all layers.
        model: a loaded transformers causal LM in eval mode: merged, edited or quantized as you like.
        tokenizer: its tokenizer; not needed for token blocks.
        text: calibration text: a string, documents, or token ids `[blocks, block_length]`. All of it is used; the last
            tenth of the blocks is held out to tell errors and bits on.
        sinks: first tokens of a sequence kept exact.
        window: latest tokens kept exact.
        key_space: where key codecs take their vectors: `post-rope`, `pre-rope`, or `auto`, pre-rope where the model's
            rotary embedding can be taken off.
        error_metric: what errors count by: `gradient` and `attention` ask the model, `none` counts all alike.
        block_length: tokens in a block, where `text` is no token ids.
        seed: of everything random.
        memory_budget: GB that fitting may take beside the activations, which are held in memory.
        progress: show how far it is, on stderr.

    Raises:
        UserError: the text is too short, the plan does not suit the model, or the model has no cache that LeanKV reads.
    """
    loaded = look_at(model, tokenizer)
    tokens = blocks_for(model, text, tokenizer, block_length, LEAST_CALIBRATION_BLOCKS)
    protocol = ProtocolConfig("stream" if window else "strict", sinks, window)
    experiment = settings_of(loaded, tokens, plan, protocol, key_space, error_metric, seed)
    experiment = replace(experiment, memory_budget=memory_budget)
    workspace = Workspace(experiment, loaded, GivenBlocks({"calibration": tokens}), _progress(progress))
    fitted = PlanEvaluator(workspace).codecs.plan(workspace.plan)
    about = describe(workspace.loaded)
    return Bundle(fitted, sinks, window, workspace.rotation, model.config, about, asdict(experiment), {})


def perplexity(
    model: Any,
    tokenizer: Any,
    text: Text,
    *,
    bundle: Bundle | None = None,
    protocol: str = "stream",
    block_length: int = DataConfig.block_length,
    chunk: int = ProtocolConfig.chunk,
    batch_size: int = ProtocolConfig.batch_size,
    prefix_length: int = ProtocolConfig.prefix_length,
    continuation: int = ProtocolConfig.continuation,
    progress: bool = False,
) -> PerplexityReport:
    """Perplexity of a model on all whole blocks of a text, and what a bundle's cache changes of it.

    Args:
        model: a loaded transformers causal LM in eval mode.
        tokenizer: its tokenizer; not needed for token blocks.
        text: a string, documents, or token ids `[blocks, block_length]`; none that the bundle was fitted to.
        bundle: of `fit` or `load`; its sinks count, and its window where the protocol has one. None: the base alone.
        protocol: `strict`, `stream`, `prefix` or `decode`; see `leankv.evaluation.perplexity`.
        block_length: tokens in a block, where `text` is no token ids; under `prefix` it plays no part.
        chunk: tokens fed at a time under `stream`.
        batch_size: blocks in one forward pass.
        prefix_length: tokens that are computed exactly and then coded whole, under `prefix`.
        continuation: tokens that are read beside them, under `prefix`.
        progress: show how far it is, on stderr.

    Raises:
        UserError: the text makes no block, or the protocol is unknown or cannot be.
    """
    refuse_training(model)
    if bundle is not None:
        check_made_for(bundle, model)
    window = bundle.window if bundle is not None and protocol not in ("strict", "prefix") else 0
    sinks = bundle.sinks if bundle else ProtocolConfig.sinks
    asked = ProtocolConfig(protocol, sinks, window, chunk, batch_size, prefix_length, continuation)
    Experiment(protocol=asked)  # refuses what cannot be
    tokens = blocks_for(model, text, tokenizer, asked.measured_length(block_length))
    blocks = Blocks(tokens, "all", GivenBlocks.name)

    def make_base() -> LeanCache:
        return LeanCache(model.config, {}, sinks=0, window=0)

    with _progress(progress).stage("perplexity", len(blocks)) as step:
        if bundle is None:
            nats = measure_nats(model, blocks, asked, make_base, step)
            return PerplexityReport(nats.perplexity, nats.tokens_per_block * len(nats.nats), asked)
        base_pass = BasePass(model, make_base, MemoryBudget(0))
        caches = partial(bundle.new_cache, window=exact_window(asked), encode_every=1)
        pair = measure_pair(model, blocks, asked, base_pass, caches, step)
    return _report(pair, asked)


def _report(pair: PairedRun, protocol: ProtocolConfig) -> PerplexityReport:
    cost = compare(pair.base, pair.compressed)
    return PerplexityReport(
        base_ppl=cost.base_ppl,
        tokens=cost.tokens,
        protocol=protocol,
        ppl=cost.ppl,
        delta_ppl=cost.delta_ppl,
        delta_percent=cost.delta_percent,
        interval=cost.interval,
        kl=pair.divergence.kl.value,
        top1=pair.divergence.top1.value,
        divergence=pair.divergence,
    )


def sweep(
    model: Any,
    tokenizer: Any,
    text: Text,
    *,
    recipe: str | Recipe | PlanSpec = "ae:4",
    selection_text: Text | None = None,
    layers: str | Sequence[int] = "all",
    protocol: str = ProtocolConfig.kind,
    sinks: int = ProtocolConfig.sinks,
    window: int = ProtocolConfig.window,
    key_space: str = CodecConfig.key_space,
    error_metric: str = FitConfig.error_metric,
    block_length: int = DataConfig.block_length,
    seed: int = Experiment.seed,
    memory_budget: float = Experiment.memory_budget,
    folder: str | Path | None = None,
    progress: bool = False,
) -> pd.DataFrame:
    """What compressing each layer alone costs in perplexity, one row a layer.

    Args:
        model: a loaded transformers causal LM in eval mode.
        tokenizer: its tokenizer; not needed for token blocks.
        text: calibration text; its last fifth measures the costs unless there is `selection_text`.
        recipe: of the keys and values of every layer, or a plan.
        selection_text: what the costs are measured on.
        layers: numbers, or as text `all` or `0,4,40-63`.
        protocol: `strict`, `stream`, `prefix` (in blocks of its 1,280 tokens or more) or `decode`.
        sinks: first tokens kept exact.
        window: latest tokens kept exact, under `stream` and `decode`.
        key_space: `post-rope`, `pre-rope` or `auto`.
        error_metric: `none`, `gradient` or `attention`.
        block_length: tokens in a block, where texts are no token ids.
        seed: of everything random.
        memory_budget: GB that fitting and hidden states may take; more hidden states go to a temporary file.
        folder: keeps codecs and measurements, so that a sweep that was stopped goes on; nothing is written without.
        progress: show how far it is, on stderr.

    Returns:
        The columns of `sweep.csv`; see `leankv.report.columns`.

    Raises:
        UserError: the text is too short, the recipe does not suit the model, or the folder is another sweep's: of
            other settings, another model or other text.
    """
    loaded = look_at(model, tokenizer)
    tokens = blocks_for(model, text, tokenizer, block_length, LEAST_CALIBRATION_BLOCKS + (selection_text is None))
    if selection_text is None:
        n_selection = max(1, round(SELECTION_SHARE * len(tokens)))
        tokens, measured_on = tokens[:-n_selection], tokens[-n_selection:]
    else:
        measured_on = blocks_for(model, selection_text, tokenizer, block_length)
    asked = ProtocolConfig(protocol, sinks, window)
    experiment = settings_of(loaded, tokens, recipe, asked, key_space, error_metric, seed, len(measured_on))
    experiment = replace(experiment, layers=layers_text(layers), memory_budget=memory_budget)
    source = GivenBlocks({"calibration": tokens, "selection": measured_on})
    if folder is None:
        return sweep_layers(PlanEvaluator(Workspace(experiment, loaded, source, _progress(progress))))
    experiment = replace(experiment, output_dir=str(folder))
    given = {"model": loaded.fingerprint, "text": Blocks(tokens, "calibration", source.name).hash}
    given["selection text"] = Blocks(measured_on, "selection", source.name).hash
    workspace = Workspace(experiment, loaded, source, _progress(progress), check_folder(experiment, given))
    claim_folder(experiment, given)  # now only: what is refused must not stand in the way of what is right
    return sweep_layers(PlanEvaluator(workspace))


def capture(
    model: Any,
    tokenizer: Any,
    text: Text,
    *,
    layers: str | Sequence[int] = "all",
    key_space: str = CodecConfig.key_space,
    block_length: int = DataConfig.block_length,
    progress: bool = False,
) -> dict[int, LayerVectors]:
    """The keys and values that a model's cache holds on all whole blocks of a text, in memory.

    Args:
        model: a loaded transformers causal LM in eval mode.
        tokenizer: its tokenizer; not needed for token blocks.
        text: a string, documents, or token ids `[blocks, block_length]`.
        layers: numbers, or as text `all` or `0,4,40-63`.
        key_space: `post-rope`, keys as the cache holds them; `pre-rope`, before rotary embedding; or `auto`.
        block_length: tokens in a block, where `text` is no token ids.
        progress: show how far it is, on stderr.

    Returns:
        layer -> its vectors, `[tokens, W]`.

    Raises:
        UserError: the text makes no block, or a key or value is not finite.
    """
    loaded = look_at(model, tokenizer)
    tokens = blocks_for(model, text, tokenizer, block_length)
    experiment = settings_of(loaded, tokens, "identity", ProtocolConfig(), key_space, "none", 0)
    experiment = replace(experiment, layers=layers_text(layers))
    workspace = Workspace(experiment, loaded, GivenBlocks({"calibration": tokens}), _progress(progress))
    activations = ActivationStore(workspace).of(workspace.layers)
    return {
        layer: LayerVectors(activations.read(layer, "k"), activations.read(layer, "v")) for layer in workspace.layers
    }


def load(directory: str | Path, model: Any) -> Bundle:
    """A bundle from disk, for the model that it was made for. The model's weights are hashed here, once.

    Raises:
        UserError: the bundle is incomplete or changed, or was made for another model.
    """
    return load_bundle(directory, model)


def Cache(  # noqa: N802 - reads as the class that it makes
    model: Any,
    recipe: str | Recipe | PlanSpec,
    *,
    sinks: int = ProtocolConfig.sinks,
    window: int = USUAL_WINDOW,
    key_space: str = CodecConfig.key_space,
    attention_mask: torch.Tensor | None = None,
) -> LeanCache:
    """An empty compressed cache for a recipe that needs no calibration text, such as `int:4`.

    Args:
        model: a loaded transformers causal LM.
        recipe: of the keys and values of every layer, or a plan.
        sinks: first tokens kept exact.
        window: latest tokens kept exact.
        key_space: `post-rope`, `pre-rope` or `auto`.
        attention_mask: `[B, T]` of the prompt where it is padded on the left.

    Raises:
        UserError: the recipe needs calibration text; `leankv.fit` takes it.
    """
    refuse_training(model)
    Experiment(codec=CodecConfig(key_space=key_space), protocol=ProtocolConfig("stream", sinks, window))  # checks them
    plan, rotation = plan_without_text(model, plan_of(recipe), key_space)
    return LeanCache(
        model.config,
        plan,
        sinks=sinks,
        window=window,
        encode_every=ENCODE_EVERY,
        attention_mask=attention_mask,
        rotation=rotation,
    )


@contextmanager
def compressed(model: Any, bundle: Bundle) -> Iterator[Any]:
    """While this lasts, `model.generate` uses a fresh cache of the bundle wherever it is given none.

    Whoever asks for none (`use_cache=False`) or for another kind (`cache_implementation=`) gets that. Attention reads
    the codes (`leankv.cache.code_attention`), where the model's attention can be exchanged. In several threads at once,
    each generates with its own bundle.

    Args:
        model: the model that the bundle was made for.
        bundle: of `fit` or `load`.
    """
    refuse_training(model)
    check_made_for(bundle, model)
    end = make_by_default(model, bundle.new_cache)
    try:
        with attention_over_codes(model):
            yield model
    finally:
        end()


def _progress(wanted: bool) -> Progress:
    return Progress() if wanted else Silent()
