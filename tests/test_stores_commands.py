"""Commands that keep caches on disk: `prefix add`, `prefix list`, `prefix drop`, `generate --store`, `chat`."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from leankv.cache.pages import PAGE
from leankv.cli import app
from leankv.config.experiment import ModelConfig
from leankv.errors import UserError
from leankv.evaluation.conversation import Conversation
from leankv.models.loading import LoadedModel, load_model
from tests import tiny
from tests.run_folders import refuse, succeed, succeed_json
from tests.test_encode_all import bundle_of

pytestmark = pytest.mark.whole_runs

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "manual.txt"
    path.write_text(tiny.text(300, seed=5)[:300], encoding="utf-8")  # a token a byte: one page and a bit
    return path


def test_a_text_is_added_listed_and_dropped(bundle: Path, document: Path, tmp_path: Path) -> None:
    where = ("--bundle", bundle, "--store", tmp_path / "store")
    told = succeed_json("prefix", "add", document, *where)
    assert (told["tokens"], told["stored_tokens"], told["new_pages"]) == (300, PAGE, 1)
    assert 0 < told["bytes"] < told["uncompressed_bytes"]
    assert succeed_json("prefix", "add", document, *where)["new_pages"] == 0
    (listed,) = succeed_json("prefix", "list", *where)
    assert listed == {"title": "manual.txt", "tokens": PAGE, "nbytes": told["bytes"], "shared": 0}
    assert "manual.txt" in succeed("prefix", "list", *where).stdout
    assert succeed_json("prefix", "drop", document, *where) == {"freed_bytes": told["bytes"]}
    assert succeed_json("prefix", "list", *where) == []
    assert "1 pages are new" in succeed("prefix", "add", document, *where).stdout
    assert succeed_json("prefix", "drop", "--all", *where)["freed_bytes"] > 0
    document = document.rename(document.with_name("notes [draft].txt"))  # no markup, but a name
    assert document.name in succeed("prefix", "add", document, *where).stdout
    assert document.name in succeed("prefix", "list", *where).stdout
    assert "not both" in refuse("prefix", "drop", *where)
    assert "not both" in refuse("prefix", "drop", document, "--all", *where)


def test_what_cannot_be_added_is_refused(bundle: Path, tmp_path: Path) -> None:
    where = ("--bundle", bundle, "--store", tmp_path / "store")
    assert "cannot be read" in refuse("prefix", "add", tmp_path / "none.txt", *where)
    long = tmp_path / "long.txt"
    long.write_text(tiny.text(3000), encoding="utf-8")
    assert "longer than the model's 512 positions" in refuse("prefix", "add", long, *where)
    short = tmp_path / "short.txt"
    short.write_text("once there was", encoding="utf-8")
    assert "less than a page" in succeed("prefix", "add", short, *where).stdout
    long.write_text(tiny.text(400)[:400], encoding="utf-8")
    assert "raise max_bytes" in refuse("prefix", "add", long, *where, "--max-size", "1000")


def test_generate_reads_from_the_store_what_it_has_put_there(bundle: Path, document: Path, tmp_path: Path) -> None:
    options = ("--bundle", bundle, "--max-new-tokens", 6, "--file", document)
    store = ("--store", tmp_path / "store")
    first = succeed_json("generate", " in short:", *options, *store)
    second = succeed_json("generate", " in short:", *options, *store)
    other = succeed_json("generate", " and then:", *options, *store)
    assert first["text"] == second["text"]
    assert first["tokens_at_start"] == second["tokens_at_start"] == other["tokens_at_start"] == PAGE
    assert succeed_json("generate", " in short:", *options)["tokens_at_start"] == 0
    assert f"{PAGE} tokens were there at the start" in succeed("generate", " in short:", *options, *store).stdout


def test_generate_keeps_a_store_within_a_size(bundle: Path, document: Path, tmp_path: Path) -> None:
    options = ("--bundle", bundle, "--max-new-tokens", 2, "--file", document)
    assert "name one with --store" in refuse("generate", "so", *options, "--max-size", "10MB")
    folder = tmp_path / "store"
    succeed("generate", "so", *options, "--store", folder)
    (page,) = folder.glob("*.page")
    document.write_text(tiny.text(300, seed=6)[:300], encoding="utf-8")
    succeed("generate", "so", *options, "--store", folder, "--max-size", page.stat().st_size * 3 // 2)
    (other,) = folder.glob("*.page")
    assert other != page


# -- conversations -----------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(llama_folder: Path) -> LoadedModel:
    loaded = load_model(ModelConfig(name=str(llama_folder), device="cpu", dtype="float32"))
    loaded.tokenizer.chat_template = TEMPLATE
    return loaded


def say(talk: Conversation, text: str) -> Any:
    return talk.say(text, 8, 0.0, 0, lambda piece: None)


def test_a_conversation_goes_on_in_another_process(loaded: LoadedModel, tmp_path: Path) -> None:
    """As it would have in one; nothing that was said is computed again."""
    bundle = bundle_of(loaded.model, "transform:s0.3")
    whole, first = Conversation(loaded, bundle), Conversation(loaded, bundle, tmp_path)
    for talk in (whole, first):
        say(talk, "who is there?")
    second = Conversation(loaded, bundle, tmp_path)
    assert second.turns == first.turns
    assert second.tokens == first.tokens > 20
    expected, got = say(whole, "and then?"), say(second, "and then?")
    assert got.text == expected.text
    assert got.tokens_at_start == expected.tokens_at_start > 0
    assert [turn["role"] for turn in second.turns] == ["user", "assistant"] * 2
    second.begin_anew()
    assert say(second, "hello").tokens_at_start == 0


def test_a_turn_that_was_interrupted_may_be_said_again(loaded: LoadedModel) -> None:
    bundle = bundle_of(loaded.model, "int:4")
    talk, plain = Conversation(loaded, bundle), Conversation(loaded, bundle)

    def interrupt(piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.say("who is there?", 8, 0.0, 0, interrupt)
    assert talk.turns == []
    assert say(talk, "who is there?").text == say(plain, "who is there?").text


def test_what_templates_write_otherwise_is_rolled_back(loaded: LoadedModel, tmp_path: Path) -> None:
    """An answer that ends elsewhere than it was generated."""
    bundle = bundle_of(loaded.model, "int:4")
    talk = Conversation(loaded, bundle, tmp_path)
    say(talk, "who is there?")
    before = talk.tokens
    talk.turns[-1]["content"] = "nobody"
    told = say(talk, "and then?")
    assert 0 < told.tokens_at_start < before
    plain = Conversation(loaded, bundle)
    plain.turns = [{"role": "user", "content": "who is there?"}, {"role": "assistant", "content": "nobody"}]
    assert say(plain, "and then?").text == told.text


def test_a_damaged_cache_is_told_and_computed_again(loaded: LoadedModel, tmp_path: Path) -> None:
    bundle, told = bundle_of(loaded.model, "int:4"), []
    say(Conversation(loaded, bundle, tmp_path), "who is there?")
    codes = tmp_path / "conversation.safetensors"
    codes.write_bytes(codes.read_bytes()[:-1])
    talk = Conversation(loaded, bundle, tmp_path, on_damage=told.append)
    assert len(told) == 1
    assert len(talk.turns) == 2
    assert say(talk, "and then?").tokens_at_start == 0
    (tmp_path / "conversation.json").write_text(json.dumps({"turns": [1], "ids": []}))
    with pytest.raises(UserError, match="is no conversation"):
        Conversation(loaded, bundle, tmp_path)


def test_a_conversation_that_is_too_long_is_refused(loaded: LoadedModel) -> None:
    talk = Conversation(loaded, bundle_of(loaded.model, "int:4"))
    with pytest.raises(UserError, match="begin another one"):
        say(talk, "x" * 600)
    assert talk.turns == []
    loaded.tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        Conversation(loaded, talk.bundle)


def test_the_command_talks_until_it_is_told_to_end(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chat(said: str, *options: object) -> str:
        arguments = ["chat", "--bundle", bundle, "--store", tmp_path, "--max-new-tokens", 5, *options]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=said)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    assert "has no chat template" in refuse("chat", "--bundle", bundle)

    def with_template(*arguments: Any, **given: Any) -> Any:
        loaded = load_model(*arguments, **given)
        loaded.tokenizer.chat_template = TEMPLATE
        return loaded

    monkeypatch.setattr("leankv.models.loading.load_model", with_template)
    first = chat("who?\n\n/exit\n")
    assert "0 tokens were there at the start" in first
    second = chat("who else?\n")
    assert "2 turns" in second
    assert " 0 tokens were there at the start" not in second
    assert " 0 tokens were there at the start" in chat("/new\nwho?\n")
    assert "no name of a file" in refuse("chat", "--bundle", bundle, "--name", "../x")
