"""Layers, codecs, budgets and experiments that are not understood: refused in one sentence that says what to write."""

from pathlib import Path

import pytest

from tests.run_folders import refuse

BAD_YAMLS = {
    "no such key": ("seed: 0\nmodel:\n  nam: x\n", "line 3", "model.nam"),
    "no such group": ("seed: 0\nmodels:\n  name: x\n", "line 2", "models"),
    "wrong type": ("data:\n  dataset: x.txt\n  block_length: many\n", "line 3", "data.block_length"),
    "a fraction": ("fit:\n  epochs: 1.5\n", "line 2", "fit.epochs"),
    "a yes": ("fit:\n  epochs: true\n", "line 2", "fit.epochs"),
    "a group as a value": ("seed: 1\nmodel: x\n", "line 2", "model"),
    "a list": ("- seed\n", "line 1", "mapping"),
    "twice": ("seed: 1\nseed: 2\n", "line 2", "seed"),
    "broken": ("seed: 1\nmodel: [1, 2\n", "line 3", "not valid YAML"),
    "tab": ("model:\n\tname: x\n", "line 2", "not valid YAML"),
}


@pytest.mark.parametrize(
    ("layers", "words"),
    [("3-1", "1-3"), ("x", "0,4,40-63"), ("99", "last layer, which is 3"), ("2-", "0,4,40-63"), ("", "0,4,40-63")],
)
@pytest.mark.parametrize("command", ["sweep", "capture"])
def test_bad_layers(experiment: Path, tmp_path: Path, command: str, layers: str, words: str) -> None:
    sentence = refuse(command, "--config", experiment, "-o", tmp_path / "run", "--layers", layers)
    assert "--layers" in sentence
    assert repr(layers) in sentence
    assert words in sentence


@pytest.mark.parametrize("layer", [-1, 4])
def test_train_layer_of_a_layer_that_is_not_there(experiment: Path, tmp_path: Path, layer: int) -> None:
    assert str(layer) in refuse("train-layer", "--config", experiment, "-o", tmp_path, "--", layer)


@pytest.mark.parametrize("codec", ["nonsense:3", ""])
def test_an_unknown_codec_is_answered_with_all_grammars(experiment: Path, tmp_path: Path, codec: str) -> None:
    sentence = refuse("sweep", "--config", experiment, "-o", tmp_path, "--codec", codec)
    assert repr(codec) in sentence
    for grammar in ("ae:D", "pca:D", "mean", "identity", "resid(A,B)"):
        assert grammar in sentence


@pytest.mark.parametrize("codec", ["ae", "ae:", "ae:0", "ae:4x", "pca:x", "mean:2", "resid(pca:2)", "share:0"])
def test_a_codec_that_does_not_parse_is_answered_with_its_grammar(experiment: Path, tmp_path: Path, codec: str) -> None:
    sentence = refuse("sweep", "--config", experiment, "-o", tmp_path, "--codec", codec)
    assert repr(codec) in sentence
    family = codec.partition(":")[0].partition("(")[0]
    assert f"write {family}" in sentence


@pytest.mark.parametrize("codec", ["ae:33", "pca:1000"])
def test_more_dimensions_than_the_width(experiment: Path, tmp_path: Path, codec: str) -> None:
    sentence = refuse("sweep", "--config", experiment, "-o", tmp_path, "--codec", codec)
    assert repr(codec) in sentence
    assert "width 32" in sentence


@pytest.mark.parametrize("budget", ["abc", "-1", "nan", "inf", "0", "%", "", "2.5%%"])
def test_a_bad_budget(experiment: Path, finished: Path, tmp_path: Path, budget: str) -> None:
    for command in (("run", experiment, "-o", tmp_path), ("select", "-o", finished)):
        sentence = refuse(*command, "--budget", budget)
        assert repr(budget) in sentence
        assert "7%" in sentence


@pytest.mark.parametrize("kind", list(BAD_YAMLS))
def test_a_malformed_experiment_names_line_and_key(tmp_path: Path, kind: str) -> None:
    text, line, key = BAD_YAMLS[kind]
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    sentence = refuse("run", path)
    assert str(path) in sentence
    assert line in sentence
    assert key in sentence


def test_a_missing_experiment(tmp_path: Path) -> None:
    assert str(tmp_path / "none.yaml") in refuse("run", tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["seed", "nothing.such=1", "seed=x", "fit.epochs=[1", "fit.epochs=-1"])
def test_a_bad_set(experiment: Path, tmp_path: Path, text: str) -> None:
    assert text.partition("=")[0] in refuse("sweep", "--config", experiment, "-o", tmp_path, "--set", text)
