"""A model, and a bundle or a plan beside it, on any split: what `leankv eval-ppl` prints."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from leankv.cache.bundle import load_bundle, read_bundle_config
from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import PlanSpec
from leankv.config.experiment import Experiment
from leankv.config.loading import flatten, load_experiment
from leankv.data.splits import TextSource
from leankv.errors import UserError
from leankv.evaluation.base_pass import BasePass
from leankv.evaluation.divergence import divergence_columns
from leankv.evaluation.free_run import free_run, prompts_of
from leankv.evaluation.paired import measure_pair
from leankv.evaluation.perplexity import compare, exact_window, measure_nats
from leankv.models.loading import load_model
from leankv.progress import Progress
from leankv.report.evaluation import Evaluation
from leankv.storage.memory_budget import MemoryBudget
from leankv.studies.activation_store import remove_captures
from leankv.studies.plan_evaluator import PlanEvaluator
from leankv.studies.workspace import Workspace


def evaluate(
    experiment: Experiment,
    bundle: Path | None,
    split: str,
    n_blocks: int,
    progress: Progress,
    new_tokens: int | None = None,
    plan: PlanSpec | None = None,
) -> Evaluation:
    """Measure the base model and, where a bundle or a plan is given, the model with its cache, on the same blocks.

    Args:
        experiment: model, data and protocol, sinks and window included.
        bundle: folder of a bundle.
        split: a split, or `all` for the text from its beginning.
        n_blocks: how many blocks.
        progress: shows the passes.
        new_tokens: given, both models continue half of every block by so many tokens of their own (see
            `leankv.evaluation.free_run`).
        plan: in place of a bundle; its codecs are fitted in the experiment's output folder where they are not yet.

    Raises:
        UserError: a bundle and a plan are given, or free running is asked for without either, under `prefix`, or beyond
            the model's positions; or see the modules that own model, data and bundle.
    """
    if bundle is not None and plan is not None:
        raise UserError("--bundle and --plan are both given; eval-ppl measures one of them")
    if new_tokens is not None and bundle is None and plan is None:
        raise UserError("--free-run compares a cache with the base model's; give --bundle or --plan, or leave it out")
    if new_tokens is not None and experiment.protocol.kind == "prefix":
        raise UserError(
            "--free-run goes on from a cache that codes tokens as they come, and a prefix is coded whole; leave one of "
            "--free-run and --protocol prefix out"
        )
    if split == "all" and plan is not None:
        raise UserError("--split all has the text that the plan's codecs are fitted to; name a split")
    cut = experiment if bundle is None else _cut_for(experiment, read_bundle_config(bundle)["experiment"])
    source = TextSource(cut.data, cut.length_of("selection"))
    if plan is None:
        progress.say(f"loading {experiment.model.name}")
        loaded = load_model(experiment.model)
    else:
        workspace = Workspace.load(experiment, progress)  # its codecs may lie beside those of other plans
        loaded, plan = workspace.loaded, workspace.checked(plan)
    try:
        blocks = source.blocks(split, loaded.tokenizer, n_blocks, experiment.measured_length)
    except UserError as error:
        if cut is experiment:
            raise
        raise UserError(
            f"the {split} split of {source.name}, cut as for the bundle, is too short for {n_blocks} blocks of "
            f"{experiment.measured_length} tokens; ask for fewer or shorter ones (--blocks, --block-length)"
        ) from error
    protocol, model = experiment.protocol, loaded.model
    # Before the first long pass, so that a bad bundle is refused at once.
    first_cache = None
    if bundle is not None:
        first_cache = load_bundle(bundle, model).new_cache(
            sinks=protocol.sinks, window=exact_window(protocol), encode_every=1
        )
    elif plan is not None:
        first_cache = PlanEvaluator(workspace).new_cache(plan)
        remove_captures(workspace.folder)
    prompts = None if new_tokens is None else prompts_of(model, blocks, new_tokens)

    def make_base() -> LeanCache:
        return LeanCache(model.config, {}, sinks=0, window=0)

    pair = None
    if first_cache is None:
        with progress.stage("base perplexity", len(blocks)) as step:
            base = measure_nats(model, blocks, protocol, make_base, step)
    else:
        with progress.stage("perplexity, base and compressed side by side", len(blocks)) as step:
            pair = measure_pair(
                model, blocks, protocol, BasePass(model, make_base, MemoryBudget(0)), first_cache.fresh, step
            )
        base = pair.base
    result = Evaluation(
        model=loaded.name,
        bundle=None if bundle is None else str(bundle),
        plan=None if plan is None else PlanSpec.parse(experiment.plan).table(),
        dataset=blocks.source,
        split=split,
        protocol=protocol.kind,
        block_length=blocks.tokens.shape[1],
        blocks=len(blocks),
        tokens=base.tokens_per_block * len(base.nats),
        base_ppl=base.perplexity,
    )
    if pair is not None:
        result = replace(
            result,
            sinks=protocol.sinks,
            window=protocol.window,
            divergence=divergence_columns(pair.divergence),
            **asdict(compare(base, pair.compressed)),
        )
    if first_cache is not None and prompts is not None and new_tokens is not None:
        with progress.stage(f"free running, {new_tokens} tokens", len(prompts)) as step:
            ran = free_run(model, prompts, new_tokens, protocol.batch_size, make_base, first_cache.fresh, step)
        result = replace(result, free_run=ran)
    return result


def _cut_for(experiment: Experiment, made_with: dict[str, Any]) -> Experiment:
    """Whose settings cut the text into splits: a bundle's, where it is of the same text.

    Other blocks would move the borders, and others' splits onto what the codecs were fitted to.

    Args:
        experiment: what is asked for.
        made_with: the experiment that a bundle came from, as its configuration has it.
    """
    settings = flatten(made_with)
    if settings.get("data.dataset") != experiment.data.dataset:
        return experiment
    return load_experiment(None, {**settings, "data.data_dir": experiment.data.data_dir})
