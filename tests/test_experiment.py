"""Experiments: to and from YAML, and what is said when one is wrong."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from leankv.config.experiment import (
    CodecConfig,
    DataConfig,
    Experiment,
    FitConfig,
    ModelConfig,
    ProtocolConfig,
    SelectionConfig,
)
from leankv.config.loading import flatten, load_experiment, parse_override
from leankv.errors import UserError

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

# Words that YAML reads as something else when they are not quoted.
words = (
    st.sampled_from(["null", "~", "yes", "1", "1e3", "0x10", "2024-01-05", "a: b", "- x", "#c", " x ", ""]) | st.text()
)
numbers = st.integers(1, 10**9)
dtypes = st.sampled_from(["float32", "bfloat16", "float16"])

experiments = st.builds(
    Experiment,
    model=st.builds(
        ModelConfig,
        name=words,
        revision=st.none() | words,
        device=words,
        device_map=st.none() | words,
        dtype=dtypes,
        load_in_4bit=st.booleans(),
        trust_remote_code=st.booleans(),
    ),
    data=st.builds(
        DataConfig,
        dataset=words,
        data_dir=st.none() | words,
        block_length=st.integers(2, 10**6),
        calibration_blocks=st.integers(2, 10**6),
        selection_blocks=numbers,
        certification_blocks=numbers,
        report_blocks=numbers,
    ),
    plan=st.sampled_from(["ae:4", {"k": "none", "v": "mean"}])
    | st.builds(
        lambda k, layers: {"k": k, "v": "mean", "layers": layers},
        st.sampled_from(["none", "pca:8"]),
        st.dictionaries(
            st.sampled_from(["0", "3-5", "0,9"]), st.sampled_from(["none", "int:4", {"k": "none"}]), min_size=1
        ),
    ),
    codec=st.builds(CodecConfig, dtype=dtypes),
    fit=st.builds(
        FitConfig,
        epochs=numbers,
        batch_tokens=numbers,
        learning_rate=st.floats(1e-12, 10.0),
        heldout_fraction=st.floats(1e-6, 0.999),
    ),
    protocol=st.builds(
        ProtocolConfig, kind=st.just("stream"), sinks=numbers, window=numbers, chunk=numbers, batch_size=numbers
    ),
    selection=st.builds(
        SelectionConfig, budget=st.sampled_from(["2.5", "7%", "1e-1"]), layers=st.sampled_from(["all", "3", "40-63"])
    ),
    layers=st.sampled_from(["all", "3", "0,4,40-63"]),
    seed=st.integers(0, 2**31),
    output_dir=words,
)


MIXED = {"k": "none", "v": "ae:4", "layers": {"0-1": "none", "5": {"k": "int:4"}}}


def write(folder: Path, text: str) -> Path:
    path = folder / "asked.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(path: Path | None, overrides: dict[str, Any] | None = None) -> str:
    """The sentence that a user reads."""
    with pytest.raises(UserError) as refused:
        load_experiment(path, overrides or {})
    assert "\n" not in str(refused.value)
    return str(refused.value)


# -- what is read ----------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(experiment=experiments)
def test_an_experiment_written_as_yaml_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, experiment: Experiment
) -> None:
    path = write(tmp_path_factory.mktemp("yaml"), experiment.to_yaml())
    assert load_experiment(path, {}) == experiment


@settings(max_examples=20)
@given(experiment=experiments)
def test_an_experiment_can_be_given_as_overrides(experiment: Experiment) -> None:
    assert load_experiment(None, flatten(dataclasses.asdict(experiment))) == experiment


def test_every_setting_is_spelled_out() -> None:
    assert yaml.safe_load(Experiment().to_yaml()) == dataclasses.asdict(Experiment())


def test_an_empty_file_asks_for_the_defaults(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path, "# nothing\n"), {}) == load_experiment(None, {}) == Experiment()


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_experiments_that_come_with_leankv_load(path: Path) -> None:
    experiment = load_experiment(path, {})
    assert experiment != Experiment()
    assert load_experiment(path, {"seed": 3}) == dataclasses.replace(experiment, seed=3)


def test_experiments_that_come_with_leankv() -> None:
    assert [path.stem for path in sorted(EXPERIMENTS.glob("*.yaml"))] == [
        "compare-smollm2",
        "demo-plan",
        "demo",
        "llama-3.1-8b-nf4-values",
        "llama-3.3-70b-nf4",
        "plans-smollm2",
        "smollm2-135m",
    ]


def test_leanllamas_recipe_is_the_one_asked_for() -> None:
    seed = load_experiment(EXPERIMENTS / "llama-3.3-70b-nf4.yaml", {})
    assert (seed.plan, seed.codec.dtype) == ("ae:4", "float32")
    assert (seed.fit.epochs, seed.selection.budget, seed.model.load_in_4bit) == (6, "2.5", True)
    second = load_experiment(EXPERIMENTS / "llama-3.1-8b-nf4-values.yaml", {})
    assert (second.plan, second.codec.dtype) == ({"k": "none", "v": "ae:4"}, "float16")
    assert second.selection.budget == "7%"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("selection:\n  budget: 2.5\n", "selection.budget", "2.5"),
        ("selection:\n  budget: 7%\n", "selection.budget", "7%"),
        ("layers: 12\n", "layers", "12"),
        ("fit:\n  learning_rate: 3e-3\n", "fit.learning_rate", 0.003),
        ("fit:\n  learning_rate: 1\n", "fit.learning_rate", 1.0),
        ("plan: {v: int:4}\n", "plan", {"k": "none", "v": "int:4"}),
        ("plan: {k: int:4, v: int:4}\n", "plan", "int:4"),
        ("plan:\n  v: ae:4\n  layers: {0-1: null, 5: {k: int:4}}\n", "plan", MIXED),
        ("model:\n  revision: null\n", "model.revision", None),
        ("model: {load_in_4bit: yes}\n", "model.load_in_4bit", True),
    ],
)
def test_values_may_be_written_as_people_write_them(tmp_path: Path, text: str, key: str, value: Any) -> None:
    read = load_experiment(write(tmp_path, text), {}).value(key)
    assert read == value
    assert type(read) is type(value)


# -- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\nfit:\n  epochs: 3\n  batch_tokens: 32\n")
    experiment = load_experiment(path, {"fit.epochs": 9, "plan.k": "none"})
    assert (experiment.seed, experiment.fit.epochs, experiment.fit.batch_tokens) == (1, 9, 32)
    assert experiment.plan == {"k": "none", "v": Experiment().plan}


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("fit.epochs=3", "fit.epochs", 3),
        ("selection.budget = 7%", "selection.budget", "7%"),
        ("model.load_in_4bit=true", "model.load_in_4bit", True),
        ("model.revision=null", "model.revision", None),
        ("output_dir=results/a=b", "output_dir", "results/a=b"),
    ],
)
def test_set_reads_a_key_and_a_yaml_value(text: str, key: str, value: Any) -> None:
    assert parse_override(text) == (key, value)
    assert load_experiment(None, dict([parse_override(text)])).value(key) == value


@pytest.mark.parametrize("text", ["fit.epochs", "", "fit.epochs: 3", "fit.epochs=[1", "seed=\x00", "seed=2024-99-99"])
def test_a_set_that_is_none_is_shown(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(repr(text))):
        parse_override(text)


@pytest.mark.parametrize("key", ["epochs", "fit", "fit.epoch", "fit.epochs.x", ""])
def test_an_override_of_no_setting_is_answered_with_the_settings(key: str) -> None:
    sentence = refusal(None, {key: 3})
    assert repr(key) in sentence
    assert "fit.epochs" in sentence


# -- experiments of version 0.1 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("codec:\n  k: ae:4\n  v: ae:4\n", "ae:4"),
        ("codec:\n  k: null\n", {"k": "none", "v": "ae:4"}),
        ("codec:\n  v: none\n  k: int:4\n", {"k": "int:4", "v": "none"}),
    ],
)
def test_codecs_that_stand_where_version_0_1_wrote_them(tmp_path: Path, text: str, plan: Any) -> None:
    assert load_experiment(write(tmp_path, text), {}).plan == plan


def test_settings_under_their_former_names(tmp_path: Path) -> None:
    """In a file and as overrides, which bundles hold."""
    text = "fit:\n  weighting: gradient\ncodec:\n  k: none\n  v: pca:8\n  dtype: float16\n"
    experiment = load_experiment(write(tmp_path, text), {})
    assert experiment.fit.error_metric == "gradient"
    assert (experiment.plan, experiment.codec.dtype) == ({"k": "none", "v": "pca:8"}, "float16")
    assert load_experiment(None, flatten(yaml.safe_load(text))) == experiment


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_file_that_is_missing_or_a_folder_or_no_text_is_named(tmp_path: Path) -> None:
    assert "no.yaml" in refusal(tmp_path / "no.yaml")
    assert str(tmp_path) in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("output_dir: é".encode("latin-1"))
    assert "UTF-8" in refusal(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nfit: [1\n", 3),
        ("seed: 1\n\tfit: 2\n", 2),
        ("seed: 1\nfit:\n  epochs: 1\n bad: 2\n", 4),
        ("seed: 1\n---\nseed: 2\n", 2),
        ("seed: *nowhere\n", 1),
        ("- seed\n", 1),
        ("seed\n", 1),
    ],
)
def test_malformed_yaml_names_the_file_and_line(tmp_path: Path, text: str, line: int) -> None:
    sentence = refusal(write(tmp_path, text))
    assert sentence.startswith(f"{tmp_path / 'asked.yaml'}, line {line}: ")


@pytest.mark.parametrize("text", ["seed: \x07\n", "seed: 1\noutput_dir: a\x00b\n"])
def test_a_file_with_control_characters_is_not_yaml(tmp_path: Path, text: str) -> None:
    assert "not valid YAML" in refusal(write(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("sed: 1\n", 1, "sed"),
        ("seed: 1\nfit:\n  epochs: 2\n  epoch: 3\n", 4, "fit.epoch"),
        ("epochs: 2\n", 1, "epochs"),
        ("model:\n  fit:\n    epochs: 2\n", 2, "model.fit"),
    ],
)
def test_an_unknown_key_is_named_with_its_line(tmp_path: Path, text: str, line: int, key: str) -> None:
    sentence = refusal(write(tmp_path, text))
    assert f"line {line}: there is no setting {key!r}" in sentence


def test_the_keys_that_there_are_are_told(tmp_path: Path) -> None:
    sentence = refusal(write(tmp_path, "fit:\n  epoch: 3\n"))
    assert "fit.epochs" in sentence
    assert "data.dataset" not in sentence


@pytest.mark.parametrize(
    ("text", "line", "key", "wanted"),
    [
        ("seed: 1\nfit:\n  epochs: many\n", 3, "fit.epochs", "int"),
        ("fit:\n  epochs: 2.5\n", 2, "fit.epochs", "int"),
        ("seed: yes\n", 1, "seed", "int"),
        ("seed: null\n", 1, "seed", "int"),
        ("seed: [1]\n", 1, "seed", "int"),
        ("seed: {a: 1}\n", 1, "seed", "int"),
        ("fit:\n  learning_rate: fast\n", 2, "fit.learning_rate", "float"),
        ("fit:\n  learning_rate: .nan\n", 2, "fit.learning_rate", "float"),
        ("fit:\n  learning_rate: true\n", 2, "fit.learning_rate", "float"),
        ("model:\n  load_in_4bit: 1\n", 2, "model.load_in_4bit", "bool"),
        ("model:\n  name: [a]\n", 2, "model.name", "str"),
        ("model:\n  revision: true\n", 2, "model.revision", "str or null"),
        (f"fit:\n  learning_rate: 1{'0' * 400}\n", 2, "fit.learning_rate", "float"),
    ],
)
def test_a_wrong_type_is_named_with_its_line(tmp_path: Path, text: str, line: int, key: str, wanted: str) -> None:
    assert f"line {line}: {key} must be {wanted}, not" in refusal(write(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["seed: !!python/object/apply:os.getpid []\n", "seed: !mine 3\n", "output_dir: 2024-99-99\n"]
)
def test_a_value_that_yaml_cannot_make_is_named_with_its_line(tmp_path: Path, text: str) -> None:
    assert "line 1: " in refusal(write(tmp_path, text))


def test_null_is_no_name_for_a_model_or_a_folder(tmp_path: Path) -> None:
    """Only a codec may be left out by writing null."""
    assert "model.name" in refusal(write(tmp_path, "model:\n  name: null\n"))
    assert "output_dir" in refusal(write(tmp_path, "output_dir: null\n"))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("seed: 1\nfit:\n  epochs: 2\nseed: 2\n", 4),
        ("seed: 1\nfit: {epochs: 1}\nfit:\n  epochs: 2\n", 3),
        ("seed: 1\nfit: {epochs: 1}\nfit:\n  batch_tokens: 2\n", 3),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str, line: int) -> None:
    sentence = refusal(write(tmp_path, text))
    assert f"line {line}: " in sentence
    assert "stands twice" in sentence


@pytest.mark.parametrize("text", ["seed: 1\nfit: 3\n", "seed: 1\nfit:\n", "seed: 1\nfit: [1]\n"])
def test_a_group_that_is_given_a_value_is_refused(tmp_path: Path, text: str) -> None:
    assert "line 2: fit is a group of settings" in refusal(write(tmp_path, text))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.block_length", 1),
        ("data.calibration_blocks", 1),
        ("data.selection_blocks", 0),
        ("data.certification_blocks", 0),
        ("data.report_blocks", 0),
        ("fit.epochs", -1),
        ("fit.batch_tokens", 0),
        ("fit.learning_rate", 0),
        ("fit.learning_rate", -1e-3),
        ("fit.heldout_fraction", 0),
        ("fit.heldout_fraction", 1),
        ("protocol.kind", "loose"),
        ("protocol.sinks", -1),
        ("protocol.window", -1),
        ("protocol.chunk", 0),
        ("protocol.batch_size", 0),
        ("codec.dtype", "int8"),
        ("model.dtype", "float64"),
        ("seed", -1),
    ],
)
def test_a_value_out_of_range_is_named_with_its_key(key: str, value: Any) -> None:
    sentence = refusal(None, {key: value})
    assert sentence.startswith(key)
    assert str(value) in sentence


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"protocol.kind": "strict", "protocol.window": 4}, "protocol.window"),
        ({"plan": "none"}, "nothing would be compressed"),
        ({"plan.k": "none", "plan.v": "none"}, "nothing would be compressed"),
        ({"plan": {"k": "none", "layers": {"0-3": {"v": "none"}}}}, "nothing would be compressed"),
        ({"selection.budget": "-1"}, "budget"),
        ({"selection.layers": "5-3"}, "backwards"),
        ({"layers": "first"}, "list of layers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides: dict[str, Any], words: str) -> None:
    assert words in refusal(None, overrides)


def test_experiments_made_in_python_are_checked_too() -> None:
    with pytest.raises(UserError, match=r"fit\.epochs"):
        Experiment(fit=FitConfig(epochs=-1))
