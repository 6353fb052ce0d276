"""Task scores: base model, bundle and baselines side by side in lm-evaluation-harness, and how far apart they are."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import pandas as pd

from leankv.cache.bundle import load_bundle
from leankv.config.experiment import Experiment, ProtocolConfig
from leankv.data.splits import TextSource
from leankv.errors import UserError, first_line
from leankv.evaluation.baselines import Baseline, find_baselines, try_baseline
from leankv.evaluation.free_run import prompts_of
from leankv.evaluation.harness import CacheLM
from leankv.evaluation.harness_tasks import HarnessTask, load_tasks
from leankv.models.loading import LoadedModel, load_model
from leankv.models.structure import max_positions
from leankv.progress import Progress
from leankv.report.task_scores import AGREEMENT_COLUMNS, TASK_COLUMNS, TaskScores, score_rows, write_task_scores
from leankv.storage.files import check_output_dir, hash_of, hash_of_file, write_text
from leankv.storage.lines import Lines
from leankv.studies.agreement import agreement_of
from leankv.studies.contestants import Contestant, name_of, of_baseline, of_bundle, stock

# The harness resamples scores in copies of this process unless it is told not to. A copy of a process with threads can
# wait for ever for a lock that one of them held. The numbers are the same.
os.environ.setdefault("DISABLE_MULTIPROC", "1")

ASKING_REVISION = 1
"""Raised when what a cache answers changes: how prompts are fed, what is kept exact."""

SLACK = 128
"""Tokens by which the harness may overstep a length that it was given: some of RULER's tasks do (assumption)."""


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
        stock(loaded),
        of_bundle(bundle_folder, bundle, protocol),
        *(of_baseline(baseline, loaded, experiment.seed) for baseline in found),
    ]
    blocks = source.blocks("report", loaded.tokenizer, asked.blocks, experiment.data.block_length) if source else None
    if blocks is not None:
        prompts_of(loaded.model, blocks, asked.new_tokens)  # refused now, not behind hours of tasks
    for baseline in found:
        probe = loaded.tokenizer("a b c d e f g h " * protocol.chunk, return_tensors="pt").input_ids
        try_baseline(baseline, loaded, probe, protocol.chunk)
    tasks = _tasks(asked, loaded, experiment.seed, progress)
    about = _about(experiment, bundle_folder, found, asked, tasks, protocol, loaded)
    titles = {task.title: (task.name, task.length) for task in tasks}
    common = _asked_of_all(asked, protocol, loaded)
    base, rows = None, []
    for one in contestants:
        progress.say(f"{one.name}: {len(tasks)} tasks")
        answers = folder / "responses" / f"{_file_name(one)}-{hash_of({**common, 'cache': dict(one.key)})[:16]}.jsonl"
        results = _answers(one, tasks, asked, protocol, loaded, answers, experiment.seed)
        _write_samples(folder / "samples" / f"{_file_name(one)}.jsonl", results)
        rows += score_rows(one.name, results, titles, base)
        base = results if base is None else base
    scores = pd.DataFrame(rows, columns=list(TASK_COLUMNS))
    measured = []
    if blocks is not None:
        measured = agreement_of(contestants, blocks, asked.new_tokens, protocol, loaded, folder, progress)
    told = TaskScores(scores, pd.DataFrame(measured, columns=list(AGREEMENT_COLUMNS)), about)
    write_task_scores(folder, told)
    return told


def _tasks(asked: TaskSettings, loaded: LoadedModel, seed: int, progress: Progress) -> list[HarnessTask]:
    """The tasks, loaded and looked at: what cannot be asked is refused before anything is answered.

    Raises:
        UserError: a task cannot be asked here; or as `load_tasks`.
    """
    positions = max_positions(loaded.model.config)
    lengths = [length for length in asked.lengths if positions is None or length <= positions]
    if left_out := sorted(set(asked.lengths) - set(lengths)):
        progress.say(f"longer than the model's {positions} positions, and left out: {', '.join(map(str, left_out))}")
    with tempfile.TemporaryDirectory() as saved, progress.stage("loading tasks and drawing their text", 1) as step:
        loaded.tokenizer.save_pretrained(saved)
        tasks = load_tasks(asked.tasks, lengths, Path(saved), asked.include_path, seed)
        step()
    for one in tasks:
        own = one.task.get_config("num_fewshot")
        if asked.num_fewshot is not None and own != 0 and one.length is None:
            one.task.set_config(key="num_fewshot", value=asked.num_fewshot)
        elif own is None:
            one.task.set_config(key="num_fewshot", value=0)
        _check(one, asked, positions, seed)
    return tasks


def _check(one: HarnessTask, asked: TaskSettings, positions: int | None, seed: int) -> None:
    task, given = one.task, one.task.get_config("generation_kwargs") or {}
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise UserError(f"the task {one.title} runs code or shows pictures, which eval-tasks does not; leave it out")
    if given.get("do_sample") or given.get("temperature", 0):
        raise UserError(
            f"the task {one.title} draws its answers at random, so that two caches could not be compared; leave it out"
        )
    if positions is not None and given.get("max_gen_toks", 0) >= positions:
        raise UserError(
            f"the task {one.title} wants answers as long as the model's {positions} positions; leave it out"
        )
    try:
        task.set_fewshot_seed(seed=seed)
        task.build_all_requests(limit=asked.samples)
    except Exception as error:  # whatever task files raise
        reason = first_line(error)[:300]
        raise UserError(
            f"the task {one.title} cannot be asked ({type(error).__name__}: {reason}); leave it out, or see to "
            "--num-fewshot"
        ) from error


def _answers(
    one: Contestant,
    tasks: Sequence[HarnessTask],
    asked: TaskSettings,
    protocol: ProtocolConfig,
    loaded: LoadedModel,
    answers: Path,
    seed: int,
) -> dict[str, Any]:
    """What the harness's `evaluate` returns; answers are kept in a file, and found again there."""
    for own in tasks:
        own.task.set_fewshot_seed(seed=seed)  # all are given the same examples
    lm = CacheLM(
        loaded.model,
        loaded.tokenizer,
        one.make,
        chunk=protocol.chunk,
        batch_size=asked.batch_size,
        max_length=_max_length(asked, loaded),
        responses=Lines(answers),
    )
    with contextlib.redirect_stdout(sys.stderr):  # where it tells how far it is
        results = lm_eval.evaluate(
            lm=lm, task_dict={"tasks": {task.title: task.task for task in tasks}}, limit=asked.samples
        )
    assert results is not None, "one process asks"
    return dict(results)


def _write_samples(path: Path, results: dict[str, Any]) -> None:
    lines = [
        json.dumps({"task": title, **{name: sample[name] for name in (*KEPT, *sample["metrics"])}}, default=str)
        for title, samples in results["samples"].items()
        for sample in samples
    ]
    write_text(path, "\n".join(lines) + "\n")


KEPT = ("doc_id", "doc_hash", "prompt_hash", "target", "filter", "resps", "filtered_resps")
"""Of a sample, with its values; its text can be drawn again."""


def _max_length(asked: TaskSettings, loaded: LoadedModel) -> int:
    """Tokens of prompt and answer that are read; what is longer is cut at its beginning."""
    return max_positions(loaded.model.config) or max((0, *asked.lengths)) + SLACK


def _asked_of_all(asked: TaskSettings, protocol: ProtocolConfig, loaded: LoadedModel) -> dict[str, Any]:
    """All that an answer depends on but the cache."""
    return {
        "revision": ASKING_REVISION,
        "harness": version("lm_eval"),
        "model": {"fingerprint": loaded.fingerprint, **loaded.numerics},
        "tokenizer": _tokenizer_hash(loaded),
        "generation": loaded.model.generation_config.to_diff_dict(),
        "chunk": protocol.chunk,
        "batch_size": asked.batch_size,
        "max_length": _max_length(asked, loaded),
    }


def _file_name(one: Contestant) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in one.name)


def _tokenizer_hash(loaded: LoadedModel) -> str:
    """Of all that the tokenizer does; weights do not tell of it."""
    with tempfile.TemporaryDirectory() as saved:
        loaded.tokenizer.save_pretrained(saved)
        return hash_of({path.name: hash_of_file(path) for path in Path(saved).iterdir()})


def _about(
    experiment: Experiment,
    bundle_folder: Path,
    baselines: Sequence[Baseline],
    asked: TaskSettings,
    tasks: Sequence[HarnessTask],
    protocol: ProtocolConfig,
    loaded: LoadedModel,
) -> dict[str, Any]:
    """All that the scores depend on, for people."""
    return {
        "model": loaded.name,
        "fingerprint": loaded.fingerprint,
        "numerics": loaded.numerics,
        "harness": version("lm_eval"),
        "bundle": name_of(bundle_folder),
        "baselines": {baseline.spec: baseline.maker for baseline in baselines},
        "tasks": [task.title for task in tasks],
        "samples": asked.samples,
        "num_fewshot": asked.num_fewshot,
        "batch_size": asked.batch_size,
        "protocol": "stream",
        "chunk": protocol.chunk,
        "sinks": protocol.sinks,
        "window": protocol.window,
        "seed": experiment.seed,
    }
