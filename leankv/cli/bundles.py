"""Commands that use a bundle: `eval-ppl`, `generate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from leankv.cli.app import OUT, Json, command, print_json, print_piece
from leankv.cli.options import PROTOCOL, TEXT, Asked
from leankv.errors import UserError
from leankv.progress import Progress

TITLE = 40  # characters of a prompt that names it in a store

Register = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE:RECIPE",
        help="Codec family of your own that the bundle holds; its module is imported (again for more).",
        show_default=False,
    ),
]

MaxSize = Annotated[
    str | None,
    typer.Option(help="Of the whole store, e.g. 2000MB; the oldest go first.", show_default=False),
]


@command("eval-ppl", *TEXT, *PROTOCOL)
def eval_ppl_command(
    asked: Asked,
    bundle: Annotated[Path | None, typer.Option(help="Bundle to measure beside the base.", show_default=False)] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="JSON file of a plan to fit and measure beside the base.", show_default=False),
    ] = None,
    split: Annotated[
        str, typer.Option(help="report, selection, certification, calibration, or all: unsplit.")
    ] = "report",
    blocks: Annotated[int | None, typer.Option(help="Blocks to measure on.", show_default=False)] = None,
    free_run: Annotated[
        int | None,
        typer.Option(help="Let both go on from half of each block, greedily, by so many tokens.", show_default=False),
    ] = None,
    register: Register = None,
    json_: Json = False,
) -> None:
    """Perplexity of the base model and of a bundle, side by side, and how far their predictions are apart.

    Example: leankv eval-ppl --bundle results/demo-plan/bundle --dataset wikipedia-sample --free-run 128
    """
    from leankv.cache.plan import PlanSpec
    from leankv.config.experiment import SPLITS
    from leankv.config.plan_table import read_plan_table
    from leankv.report.evaluation import evaluation_table
    from leankv.studies.evaluate import evaluate

    if split not in (*SPLITS, "all"):
        raise UserError(f"--split must be one of {', '.join(SPLITS)}, all, not {split!r}")
    if blocks is not None and blocks < 1:
        raise UserError(f"--blocks must be at least 1, not {blocks}")
    if free_run is not None and free_run < 1:
        raise UserError(f"--free-run must be at least 1, not {free_run}")
    register_families(register)
    table = None if plan is None else read_plan_table(plan)
    experiment = with_bundle(asked, bundle, {} if table is None else {"plan": table})
    n_blocks = blocks or (experiment.data.report_blocks if split == "all" else experiment.value(f"data.{split}_blocks"))
    spec = None if table is None else PlanSpec.parse(experiment.plan)
    result = evaluate(experiment, bundle, split, n_blocks, Progress(), free_run, spec)
    if json_:
        print_json(result.to_json())
    else:
        OUT.print(evaluation_table(result))


@command("generate")
def generate_command(
    asked: Asked,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    bundle: Annotated[Path, typer.Option(help="The bundle.", show_default=False)],
    file: Annotated[Path | None, typer.Option(help="Text file to put before the prompt.", show_default=False)] = None,
    store: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps prompts as codes: what is there is not computed.", show_default=False),
    ] = None,
    max_size: MaxSize = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token; else sampled.", min=0.0)] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the chat template.")] = False,
    register: Register = None,
    json_: Json = False,
) -> None:
    """Stream a completion through the compressed cache; report the bytes it held and tokens a second.

    With a store, the longest beginning of the prompt that lies there is read instead of computed. A prompt of which
    nothing lies there is computed exactly once and stored, as protocol `prefix` measures it.

    Example: leankv generate --bundle results/demo-plan/bundle --store prefixes --file manual.txt "In short:"
    """
    from leankv.evaluation.generation import complete, encoded, format_completion
    from leankv.models.structure import max_positions

    if max_size is not None and store is None:
        raise UserError("--max-size is of a store; name one with --store")
    loaded, opened, experiment, progress = open_bundle(asked, bundle, register)
    ids = encoded(loaded, text_of(file) + prompt, chat)
    limit = max_positions(loaded.model.config)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise UserError(
            f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones are more than the model's {limit} "
            "positions; shorten the prompt, or lower --max-new-tokens"
        )
    kept = None if store is None else open_store(store, opened, loaded, progress, max_size)
    if kept is not None and not kept.stored_tokens(ids):
        with progress.stage("computing and storing the prompt", 1) as step:
            kept.add(ids, title_of(file, prompt))
            step()
    cache = opened.new_cache() if kept is None else kept.cache_for(ids)
    show = (lambda text: None) if json_ else print_piece
    completion = complete(loaded, cache, ids, max_new_tokens, temperature, experiment.seed, show)
    if kept is not None:
        try:
            kept.put(cache, completion.ids, title_of(file, prompt))
        except UserError as error:  # no room, perhaps; what was generated is there
            progress.say(str(error))
    if json_:
        print_json(completion.to_json())
    else:
        OUT.print("\n" + format_completion(completion, loaded.numerics["dtype"]), highlight=False, soft_wrap=True)


def open_bundle(asked: Asked, bundle: Path, register: list[str] | None) -> tuple[Any, Any, Any, Progress]:
    """The model that a bundle was made for (or the one that is asked for), the bundle, the experiment; and progress."""
    from leankv.cache.bundle import load_bundle, read_bundle_config
    from leankv.models.loading import load_model

    register_families(register)
    read_bundle_config(bundle)
    experiment = with_bundle(asked, bundle)
    progress = Progress()
    progress.say(f"loading {experiment.model.name}")
    loaded = load_model(experiment.model)
    return loaded, load_bundle(bundle, loaded.model), experiment, progress


def open_store(folder: Path, bundle: Any, loaded: Any, progress: Progress, max_size: str | None) -> Any:
    """The prefix store in a folder."""
    from leankv.config.notation import parse_bytes
    from leankv.evaluation.prefix_store import PrefixStore

    limit = None if max_size is None else parse_bytes(max_size)
    return PrefixStore(folder, bundle, loaded.model, limit, progress.say)


def text_of(file: Path | None) -> str:
    """A text file; nothing for none."""
    if file is None:
        return ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the text file {file} cannot be read ({error}); give a file of UTF-8 text") from error


def title_of(file: Path | None, prompt: str) -> str:
    """What a prompt is called in a store."""
    return file.name if file is not None else " ".join(prompt.split())[:TITLE]


def register_families(names: list[str] | None) -> None:
    """Make families known that the user names; nothing that a bundle's file names is ever imported."""
    from leankv.codecs.registry import register_by_name

    for name in names or ():
        register_by_name(name)


def with_bundle(asked: Asked, bundle: Path | None, extra: dict[str, Any] | None = None) -> Any:
    """The experiment that a bundle came from (or `--config`, or the defaults), with the options on top."""
    from dataclasses import asdict

    from leankv.cache.bundle import read_bundle_config
    from leankv.config.loading import flatten, load_experiment
    from leankv.data.given import GivenBlocks

    overrides = asked.overrides(extra)
    if asked.config is not None:
        overrides = {**flatten(asdict(load_experiment(asked.config, {}))), **overrides}
    elif bundle is not None:
        made_with = flatten(read_bundle_config(bundle)["experiment"])
        if made_with.get("data.dataset") == GivenBlocks.name:  # made from Python, of text that is not here
            made_with = {key: value for key, value in made_with.items() if not key.startswith("data.")}
        # Whoever made a bundle does not decide what code runs here: that takes the flag.
        made_with.pop("model.trust_remote_code", None)
        overrides = {**made_with, **overrides}
    return load_experiment(None, asked.without_window_if_none_can_be(overrides))
