"""Bundles that are not what they should be: one sentence, before memory is taken for them."""

import copy
import errno
import json
import random
import re
import resource
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from leankv import UserError
from leankv.cache.bundle import CODECS_FILE, CONFIG_FILE, Bundle, load_bundle, read_bundle_config
from leankv.cache.plan import Plan, Site
from leankv.cli import app
from leankv.codecs import Codec, FitData, TrainingSettings, parse_recipe
from leankv.codecs.mean import MeanRecipe
from leankv.config.loading import flatten, load_experiment
from leankv.models.fingerprint import fingerprint
from leankv.storage.files import hash_of, hash_of_file
from tests import tiny

Tensors = dict[str, torch.Tensor]


def fitted(text: str) -> Codec:
    x = torch.randn(1, 100, 32, generator=torch.Generator().manual_seed(0))
    (codec,) = parse_recipe(text).fit(FitData(x, x, training=TrainingSettings(1, 64, 1e-3, 0)))
    return codec


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build("llama")


@pytest.fixture(scope="module")
def whole(model: Any, llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good bundle for the tiny Llama."""
    folder = tmp_path_factory.mktemp("whole") / "bundle"
    plan: Plan = {
        Site(1, "k"): fitted("ae:4x8"),
        Site(1, "v"): fitted("resid(mean,int:4)"),
        Site(3, "v"): fitted("transform:1"),
    }
    layers = [{"kv_heads": 2, "head_dim": 16, "window": None}] * 4
    made_for = {"name": str(llama_folder), "fingerprint": fingerprint(model), "layers": layers}
    experiment = asdict(load_experiment(None, {"model.name": str(llama_folder), "model.device": "cpu"}))
    Bundle(plan, 2, 8, None, model.config, made_for, experiment, {}).save(folder, "A card.")
    return folder


def rewritten(whole: Path, folder: Path, config: Any, tensors: Tensors | None = None) -> Path:
    """A bundle with another configuration, or other tensors, whose checksums agree."""
    folder.mkdir(exist_ok=True)
    (folder / CODECS_FILE).write_bytes(
        (whole / CODECS_FILE).read_bytes() if tensors is None else safetensors.torch.save(tensors)
    )
    if tensors is not None:
        config = {**config, "files": {CODECS_FILE: hash_of_file(folder / CODECS_FILE)}}
    if isinstance(config, dict):
        config = {**config, "checksum": hash_of(config)}
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    return folder


def refusal(folder: Path, model: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_bundle(folder, model)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert len(sentence) < 1000
    return sentence


def test_a_good_bundle_is_taken(whole: Path, tmp_path: Path, model: Any) -> None:
    """Also once it went through the hands of these tests."""
    config = read_bundle_config(whole)
    opened = load_bundle(rewritten(whole, tmp_path / "again", config), model)
    assert set(opened.plan) == {Site(1, "k"), Site(1, "v"), Site(3, "v")}
    cache = load_bundle(whole, model).new_cache()
    with torch.no_grad():
        assert torch.isfinite(model(tiny.tokens(1, 30), past_key_values=cache).logits).all()


@pytest.mark.parametrize("name", [CONFIG_FILE, CODECS_FILE, "README.md"])
def test_a_bundle_that_cannot_be_written_leaves_the_one_that_is_there(
    whole: Path, tmp_path: Path, model: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "bundle"))
    bundle, written = load_bundle(folder, model), Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if name in self.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return written(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(UserError, match="No space left"):
            replace(bundle, plan={Site(1, "k"): bundle.plan[Site(1, "k")]}).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
    bundle.save(folder)
    assert load_bundle(folder, model).plan.keys() == bundle.plan.keys()


def test_a_file_is_no_folder_for_a_bundle(whole: Path, tmp_path: Path, model: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; name a folder"):
        load_bundle(whole, model).save(tmp_path / "file")


def put(*path: Any) -> Callable[[dict[str, Any]], None]:
    """An edit: the last of `path` in place of what the others lead to."""

    def edit(config: dict[str, Any]) -> None:
        *way, key, value = path
        for step in way:
            config = config[step]
        config[key] = value

    return edit


def drop(*path: Any) -> Callable[[dict[str, Any]], None]:
    def edit(config: dict[str, Any]) -> None:
        *way, key = path
        for step in way:
            config = config[step]
        del config[key]

    return edit


GOOD = {"spec": "mean", "width": 32, "revisions": {"mean": MeanRecipe.revision}}
EDITS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "layer 99": (put("plan", "99", {"k": GOOD}), r"layer is '99', not a layer from 0 to 3"),
    "layer -3": (put("plan", "-3", {"k": GOOD}), r"layer is '-3'"),
    "layer x": (put("plan", "x", {"k": GOOD}), r"layer is 'x'"),
    "layer 01": (put("plan", "01", {"k": GOOD}), r"layer is '01'"),
    "part x": (put("plan", "1", "x", GOOD), r"layer 1, part is 'x', not k or v"),
    "parts a list": (put("plan", "1", [GOOD]), r"layer 1 is \["),
    "codec a text": (put("plan", "1", "k", "mean"), r"layer 1, part k is 'mean'"),
    "sinks a text": (put("sinks", "4"), r"sinks is '4', not a whole number"),
    "sinks negative": (put("sinks", -1), r"sinks is -1"),
    "sinks true": (put("sinks", True), r"sinks is True"),
    "sinks 10^30": (put("sinks", 10**30), r"sinks is 1000"),
    "window a fraction": (put("window", 1.5), r"window is 1\.5"),
    "window null": (put("window", None), r"window is None"),
    "key space": (put("key_space", "polar"), r"key_space is 'polar', not post-rope or pre-rope"),
    "width 10^12": (put("plan", "1", "k", "width", 10**12), r"width is 1000000000000"),
    "width 33": (put("plan", "1", "k", "width", 33), r"width is 33, not the model's 32"),
    "width true": (put("plan", "1", "k", "width", True), r"width is True"),
    "spec unknown": (put("plan", "1", "k", "spec", "zip:4"), r"for k of layer 1 .*'zip:4' is not understood"),
    "spec a number": (put("plan", "1", "k", "spec", 4), r"part k: spec is 4"),
    "spec deep": (put("plan", "1", "k", "spec", "resid(" * 2000 + "mean" + ",mean)" * 2000), r"more than 8 deep"),
    "spec large": (put("plan", "1", "k", "spec", "ae:4x9999999999"), r"1\.k\.\w+ has shape"),
    "spec larger": (put("plan", "1", "k", "spec", "ae:4x" + "9" * 30), r"no tensors are as large"),
    "spec too wide": (put("plan", "1", "k", "spec", "pca:99"), r"D = 99 is more than the width 32"),
    "spec of others": (put("plan", "1", "k", "spec", "int:4c"), r"k codec of layer 1 .* revision {'ae': \d}.* {'int'"),
    "another revision": (put("plan", "1", "k", "revisions", "ae", 99), r"k codec of layer 1 .* revision {'ae': 99}"),
    "no revisions": (drop("plan", "1", "k", "revisions"), r"lacks plan: layer 1, part k: revisions"),
    "revisions a number": (put("plan", "1", "k", "revisions", 1), r"revisions is 1, not a table"),
    "codec left out": (drop("plan", "3"), r"'3\.v\.analysis\.integers' belongs to no codec"),
    "codec without tensors": (put("plan", "0", {"k": GOOD}), r"0\.k\.mean is missing"),
    "no plan": (drop("plan"), r"lacks plan"),
    "plan a list": (put("plan", []), r"plan is \[\], not a table"),
    "no model": (drop("model"), r"lacks model"),
    "no model name": (drop("model", "name"), r"lacks model\.name"),
    "model name in lines": (put("model", "name", "a\nb"), r"model\.name is 'a\\nb'"),
    "model layers empty": (put("model", "layers", []), r"model\.layers is \[\]"),
    "model layer null": (put("model", "layers", 2, None), r"model\.layers\[2\] is None"),
    "heads 0": (put("model", "layers", 0, "kv_heads", 0), r"model\.layers\[0\]\.kv_heads is 0"),
    "no fingerprint": (drop("model", "fingerprint"), r"lacks model\.fingerprint"),
    "no files": (drop("files"), r"lacks files"),
    "files of others": (put("files", {"../x": "y"}), r"lacks files\.codecs\.safetensors"),
    "no format": (drop("format"), r"has format None"),
    "format a list": (put("format", [[[[2]]]]), r"has format \[\[\[\[2\]\]\]\]"),
    "no experiment": (drop("experiment"), r"lacks experiment"),
    "no sinks": (drop("sinks"), r"lacks sinks"),
    "no key space": (drop("key_space"), r"lacks key_space"),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_cannot_be_is_refused_by_its_name(whole: Path, tmp_path: Path, model: Any, name: str) -> None:
    edit, words = EDITS[name]
    config = copy.deepcopy(read_bundle_config(whole))
    edit(config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sentence = refusal(rewritten(whole, tmp_path / "bundle", config), model)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, "kilobytes"
    assert re.search(words, sentence), sentence


def nan(tensors: Tensors) -> None:
    tensors["1.k.encoder_weight"][0, 0] = torch.nan


def infinite(tensors: Tensors) -> None:
    tensors["3.v.mean"][-1] = -torch.inf


def wide(tensors: Tensors) -> None:
    tensors["1.k.mean"] = torch.zeros(33)


def whole_numbers(tensors: Tensors) -> None:
    tensors["1.k.mean"] = torch.zeros(32, dtype=torch.int64)


def fractions(tensors: Tensors) -> None:
    tensors["3.v.low"] = tensors["3.v.low"].float()


def many(tensors: Tensors) -> None:
    """More coordinates than a vector has numbers, in all tensors alike."""
    for name in ("low", "levels", "scale", "shape"):
        tensors[f"3.v.{name}"] = torch.zeros(10**6, dtype=tensors[f"3.v.{name}"].dtype)


def missing(tensors: Tensors) -> None:
    del tensors["1.v.first.mean"]


def more(tensors: Tensors) -> None:
    tensors["2.k.mean"] = torch.zeros(32)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (nan, r"1\.k\.encoder_weight has numbers that are not finite"),
        (infinite, r"3\.v\.mean has numbers that are not finite"),
        (wide, r"1\.k\.mean has shape \[33\], not \[32\]"),
        (whole_numbers, r"1\.k\.mean is of kind I64, not float32"),
        (fractions, r"3\.v\.low is of kind F32, not int16"),
        (many, r"3\.v\.low has shape \[1000000\], not \[32\]"),
        (missing, r"1\.v\.first\.mean is missing"),
        (more, r"'2\.k\.mean' belongs to no codec"),
    ],
)
def test_tensors_that_cannot_be_are_refused_by_name(
    whole: Path, tmp_path: Path, model: Any, edit: Callable[[Tensors], None], words: str
) -> None:
    tensors = safetensors.torch.load((whole / CODECS_FILE).read_bytes())
    edit(tensors)
    folder = rewritten(whole, tmp_path / "bundle", read_bundle_config(whole), tensors)
    with pytest.raises(UserError, match=words):
        load_bundle(folder, model)


def test_a_codec_file_that_is_none_is_refused(whole: Path, tmp_path: Path, model: Any) -> None:
    """With a sha256 that agrees."""
    folder, config = rewritten(whole, tmp_path / "bundle", {}), read_bundle_config(whole)
    (folder / CODECS_FILE).write_bytes(b"\xff" * 100)
    config["files"] = {CODECS_FILE: hash_of_file(folder / CODECS_FILE)}
    (folder / CONFIG_FILE).write_text(json.dumps({**config, "checksum": hash_of(config)}))
    assert "is damaged" in refusal(folder, model)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' * 40 + "1" + "}" * 40, "nested more than 32 deep"),
        ('{"sinks": NaN}', "NaN is no number"),
        ('{"sinks": -Infinity}', "-Infinity is no number"),
        ('{"sinks": 1e999}', "not finite"),
        ('{"sinks": ' + "9" * 5000 + "}", "not valid JSON"),
        ('"' + "x" * 17 * 1024**2 + '"', "is larger than"),
    ],
    ids=["brackets", "tables", "NaN", "Infinity", "1e999", "long number", "large"],
)
def test_json_that_is_none_of_ours_is_refused(whole: Path, tmp_path: Path, model: Any, text: str, words: str) -> None:
    folder = rewritten(whole, tmp_path / "bundle", {})
    (folder / CONFIG_FILE).write_text(text)
    assert words in refusal(folder, model)


@pytest.mark.parametrize("command", [("generate", "a city"), ("eval-ppl",)], ids=["generate", "eval-ppl"])
@pytest.mark.parametrize("name", ["layer 99", "spec deep", "no plan", "no experiment"])
def test_commands_exit_with_2(
    whole: Path, tmp_path: Path, text_file: Path, command: tuple[str, ...], name: str
) -> None:
    config = copy.deepcopy(read_bundle_config(whole))
    EDITS[name][0](config)
    folder = rewritten(whole, tmp_path / "bundle", config)
    data = ("--dataset", str(text_file), "--block-length", "48", "--blocks", "1") if command[0] == "eval-ppl" else ()
    result = CliRunner().invoke(app, [*command, "--bundle", str(folder), *data])
    assert result.exit_code == 2, result.output
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr


VALUES = (None, True, -1, 0, 3, 2**70, 0.5, "", "x", "k", "v", "mean", "identity", "resid(mean,mean)", "\ud800", [], {})


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy in which something, somewhere, is missing, doubled, renamed or another value."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {name: own for name, own in value.items() if name != key}
        if kind < 0.2:
            return {rng.choice(["x", "0", "-1", "7", key + "0"]) if n == key else n: own for n, own in value.items()}
        return {name: mutated(own, rng) if name == key else own for name, own in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], mutated(value[at], rng), *value[at:]]
    return rng.choice(VALUES)


def test_any_configuration_is_taken_or_refused(whole: Path, tmp_path: Path, model: Any) -> None:
    """Never anything but a `UserError`; and what is taken can be run."""
    rng, config = random.Random(0), read_bundle_config(whole)
    taken = 0
    for _ in range(400):
        folder = rewritten(whole, tmp_path / "bundle", mutated(config, rng))
        try:
            load_experiment(None, flatten(read_bundle_config(folder)["experiment"]))
            cache = load_bundle(folder, model).new_cache()
        except UserError:
            continue
        taken += 1
        with torch.no_grad():
            model(tiny.tokens(1, 12), past_key_values=cache)
    assert 0 < taken < 200
