"""Task scores: base model, bundle and baselines side by side in lm-evaluation-harness, and how far apart they are."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import pandas as pd
import torch

from leankv.cache.bundle import Bundle, load_bundle
from leankv.cache.lean_cache import LeanCache
from leankv.cache.plan import Plan
from leankv.config.experiment import Experiment, ProtocolConfig
from leankv.data.blocks import Blocks
from leankv.data.splits import TextSource
from leankv.errors import UserError
from leankv.evaluation.base_pass import BasePass
from leankv.evaluation.baselines import Baseline, find_baselines, try_baseline
from leankv.evaluation.cache_bytes import measure_bytes
from leankv.evaluation.divergence import divergence_columns
from leankv.evaluation.free_run import free_run, prompts_of
from leankv.evaluation.harness import CacheLM, MakeCache
from leankv.evaluation.harness_tasks import HarnessTask, load_tasks
from leankv.evaluation.paired import measure_pair
from leankv.evaluation.perplexity import compare
from leankv.models.loading import LoadedModel, load_model
from leankv.models.structure import max_positions
from leankv.progress import Progress
from leankv.report.task_scores import (
    AGREEMENT_COLUMNS,
    BASE,
    TASK_COLUMNS,
    TaskScores,
    score_rows,
    write_task_scores,
)
from leankv.storage.cells import StoredCells
from leankv.storage.files import check_output_dir, hash_of, write_text
from leankv.storage.lines import Lines

ASKING_REVISION = 1
"""Raised when what a cache answers changes: how prompts are fed, what is kept exact."""


@dataclass(frozen=True)
class TaskSettings:
    """What is asked.

    Attributes:
        tasks: names, as `leankv.evaluation.harness_tasks.load_tasks` takes them.
        lengths: tokens of a sample, of RULER's tasks; those beyond the model's positions are left out.
        samples: of each task, the first so many; None for all.
        num_fewshot: examples before each question; None for what a task says.
        include_path: a folder of task files of one's own.
        batch_size: samples read together.
        blocks: of report text that predictions are compared on; 0 for none.
        new_tokens: that both write from half of each block on.
    """

    tasks: Sequence[str]
    lengths: Sequence[int]
    samples: int | None
    num_fewshot: int | None
    include_path: Path | None
    batch_size: int
    blocks: int
    new_tokens: int


@dataclass(frozen=True)
class Contestant:
    """A cache that answers.

    Attributes:
        name: how tables call it.
        make: a fresh cache that answers.
        key: all that it is.
        make_counted: a fresh cache whose bytes are counted; of ours another than the one that answers.
        plan: what it holds as codes; None for baselines.
    """

    name: str
    make: MakeCache
    key: Mapping[str, Any]
    make_counted: Callable[[], Any]
    plan: Plan | None = None


def evaluate_tasks(
    experiment: Experiment,
    bundle_folder: Path,
    baselines: Sequence[str],
    asked: TaskSettings,
    progress: Progress,
) -> TaskScores:
    """Ask tasks of the base model, the bundle and the baselines; write `tasks.csv`, `agreement.csv` and `tasks.md`.

    Answers are kept as they come, in a file for each cache, and found again.

    Args:
        experiment: model, data, sinks and window, and where to write.
        bundle_folder: of the bundle.
        baselines: as `--baseline` names them.
        asked: the tasks.
        progress: shows what takes long.

    Raises:
        UserError: a task, a baseline, the bundle, the data or the folder is not usable.
    """
    folder = Path(experiment.output_dir)
    check_output_dir(folder)
    found = find_baselines(baselines)
    protocol = replace(experiment.protocol, kind="stream", batch_size=1)
    source = TextSource(experiment.data, experiment.data.block_length) if asked.blocks else None
    progress.say(f"loading {experiment.model.name}")
    loaded = load_model(experiment.model)
    if loaded.tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {loaded.name} has no token that ends a text, and the harness needs one")
    bundle = load_bundle(bundle_folder, loaded.model)
    contestants = [
        _stock(loaded),
        _of_bundle(bundle_folder, bundle, protocol),
        *(_of_baseline(baseline, loaded, experiment.seed) for baseline in found),
    ]
    blocks = source.blocks("report", loaded.tokenizer, asked.blocks, experiment.data.block_length) if source else None
    if blocks is not None:
        prompts_of(loaded.model, blocks, asked.new_tokens)  # refused now, not behind hours of tasks
    for baseline in found:
        probe = loaded.tokenizer("a b c d e f g h " * protocol.chunk, return_tensors="pt").input_ids
        try_baseline(baseline, loaded, probe, protocol.chunk)
    tasks = _tasks(asked, loaded, experiment.seed, progress)
    about = _about(experiment, bundle_folder, found, asked, protocol, loaded)
    base, rows = None, []
    for one in contestants:
        progress.say(f"{one.name}: {len(tasks)} tasks")
        results = _answers(one, tasks, asked, protocol, loaded, folder)
        titles = {task.title: (task.name, task.length) for task in tasks}
        rows += score_rows(one.name, results, titles, base)
        base = results if base is None else base
    scores = pd.DataFrame(rows, columns=list(TASK_COLUMNS))
    measured = [] if blocks is None else _agreement(contestants, blocks, asked, protocol, loaded, folder, progress)
    told = TaskScores(scores, pd.DataFrame(measured, columns=list(AGREEMENT_COLUMNS)), about)
    write_task_scores(folder, told)
    return told


def _stock(loaded: LoadedModel) -> Contestant:
    def make(mask: torch.Tensor | None = None) -> LeanCache:
        return LeanCache(loaded.model.config, {}, sinks=0, window=0)

    return Contestant(BASE, make, {"cache": "stock"}, make)


def _of_bundle(folder: Path, bundle: Bundle, protocol: ProtocolConfig) -> Contestant:
    def make(mask: torch.Tensor | None = None, decode_once: bool = True) -> LeanCache:
        # One that decodes once gives the same numbers as the one that saves memory, sooner.
        return bundle.new_cache(mask, protocol.sinks, protocol.window, decode_once)

    key = {"codecs": bundle.checksum, "sinks": protocol.sinks, "window": protocol.window}
    return Contestant(_name_of(folder), make, key, partial(make, decode_once=False), bundle.plan)


def _name_of(folder: Path) -> str:
    """`demo-plan` for results/demo-plan/bundle."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "bundle" else folder.name


def _of_baseline(baseline: Baseline, loaded: LoadedModel, seed: int) -> Contestant:
    def make(mask: torch.Tensor | None = None) -> Any:
        torch.manual_seed(seed)  # for caches that draw a rotation or a sketch
        return baseline.make(loaded.model.config)

    key = {"baseline": baseline.spec, "maker": baseline.maker, "seed": seed}
    return Contestant(baseline.spec, make, key, make)


def _tasks(asked: TaskSettings, loaded: LoadedModel, seed: int, progress: Progress) -> list[HarnessTask]:
    """The tasks, loaded.

    Raises:
        UserError: as `load_tasks`.
    """
    positions = max_positions(loaded.model.config)
    lengths = [length for length in asked.lengths if positions is None or length <= positions]
    with tempfile.TemporaryDirectory() as saved, progress.stage("loading tasks and drawing their text", 1) as step:
        loaded.tokenizer.save_pretrained(saved)
        tasks = load_tasks(asked.tasks, lengths, Path(saved), asked.include_path, seed)
        step()
    for one in tasks:
        if asked.num_fewshot is not None:
            one.task.set_config(key="num_fewshot", value=asked.num_fewshot)
        elif one.task.get_config("num_fewshot") is None:
            one.task.set_config(key="num_fewshot", value=0)
        one.task.set_fewshot_seed(seed=seed)
    return tasks


def _answers(
    one: Contestant,
    tasks: Sequence[HarnessTask],
    asked: TaskSettings,
    protocol: ProtocolConfig,
    loaded: LoadedModel,
    folder: Path,
) -> dict[str, Any]:
    """What the harness's `evaluate` returns; samples with their answers are written beside it."""
    key = {
        "revision": ASKING_REVISION,
        "harness": version("lm_eval"),
        "model": {"fingerprint": loaded.fingerprint, **loaded.numerics},
        "cache": dict(one.key),
        "chunk": protocol.chunk,
        "batch_size": asked.batch_size,
    }
    name = "".join(c if c.isalnum() or c in "-_." else "-" for c in one.name)
    responses = Lines(folder / "responses" / f"{name}-{hash_of(key)[:16]}.jsonl")
    lm = CacheLM(
        loaded.model,
        loaded.tokenizer,
        one.make,
        chunk=protocol.chunk,
        batch_size=asked.batch_size,
        responses=responses,
    )
    results = lm_eval.evaluate(
        lm=lm, task_dict={"tasks": {task.title: task.task for task in tasks}}, limit=asked.samples
    )
    assert results is not None, "one process asks"
    lines = [
        json.dumps({"task": title, **{name: sample[name] for name in KEPT if name in sample}}, default=str)
        for title, samples in results["samples"].items()
        for sample in samples
    ]
    write_text(folder / "samples" / f"{name}.jsonl", "\n".join(lines) + "\n")
    return dict(results)


KEPT = ("doc_id", "doc_hash", "prompt_hash", "target", "filter", "resps", "filtered_resps")
"""Of a sample; its text can be drawn again."""


def _agreement(
    contestants: Sequence[Contestant],
    blocks: Blocks,
    asked: TaskSettings,
    protocol: ProtocolConfig,
    loaded: LoadedModel,
    folder: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Rows of `agreement.csv`, a cell each."""
    base, *others = contestants
    model, cells = loaded.model, StoredCells(folder / "cells")
    base_pass = BasePass(model, lambda: base.make(None), blocks.tokens.numel() * model.config.hidden_size * 4)
    prompts = prompts_of(model, blocks, asked.new_tokens)

    def fresh(one: Contestant) -> Callable[[], Any]:
        return lambda: one.make(None)

    def measured(one: Contestant) -> dict[str, Any]:
        with progress.stage(f"{one.name}: predictions on report text", len(blocks)) as step:
            pair = measure_pair(model, blocks, protocol, base_pass, fresh(one), step)
        with progress.stage(f"{one.name}: writing {asked.new_tokens} tokens", len(prompts)) as step:
            ran = free_run(model, prompts, asked.new_tokens, 1, fresh(base), fresh(one), step)
        bytes_ = measure_bytes(model, loaded.geometry, blocks.tokens[:1], one.make_counted, one.plan)
        return {
            "dataset": blocks.source,
            "blocks": len(blocks),
            "context": blocks.tokens.shape[1],
            "cache_ratio": bytes_.cache_ratio,
            "delta_percent": compare(pair.base, pair.compressed).delta_percent,
            **divergence_columns(pair.divergence),
            "prompts": ran.prompts,
            "new_tokens": ran.new_tokens,
            "equal_percent": ran.equal_percent,
            "first_difference": ran.first_difference,
        }

    rows = []
    for one in others:
        depends_on = {
            "revision": ASKING_REVISION,
            "model": {"fingerprint": loaded.fingerprint, **loaded.numerics},
            "cache": dict(one.key),
            "blocks": blocks.hash,
            "chunk": protocol.chunk,
            "new_tokens": asked.new_tokens,
        }
        found = cells.get_or_compute("agreement", depends_on, partial(measured, one))
        rows.append({"cache": one.name, **found})
    return rows


def _about(
    experiment: Experiment,
    bundle_folder: Path,
    baselines: Sequence[Baseline],
    asked: TaskSettings,
    protocol: ProtocolConfig,
    loaded: LoadedModel,
) -> dict[str, Any]:
    """All that the scores depend on, for people."""
    return {
        "model": loaded.name,
        "fingerprint": loaded.fingerprint,
        "numerics": loaded.numerics,
        "harness": version("lm_eval"),
        "bundle": _name_of(bundle_folder),
        "baselines": {baseline.spec: baseline.maker for baseline in baselines},
        "tasks": list(asked.tasks),
        "lengths": list(asked.lengths),
        "samples": asked.samples,
        "num_fewshot": asked.num_fewshot,
        "batch_size": asked.batch_size,
        "protocol": "stream",
        "chunk": protocol.chunk,
        "sinks": protocol.sinks,
        "window": protocol.window,
        "seed": experiment.seed,
    }
