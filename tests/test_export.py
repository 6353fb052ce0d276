"""A bundle's repository loads in a process without LeanKV, and generates what LeanKV's own cache generates."""

import ast
import base64
import copy
import json
import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import leankv
from leankv.cache.bundle import Bundle
from leankv.cache.plan import PlanSpec, Site
from leankv.cli import app
from leankv.codecs.integers import IntegersRecipe
from leankv.config.experiment import ModelConfig
from leankv.errors import UserError
from leankv.export.modeling_leankv import attach
from leankv.export.repository import write_repository
from leankv.export.sources import PRESENT, path_of, travelling_files
from leankv.models.loading import LoadedModel, load_model
from tests import tiny

pytestmark = pytest.mark.whole_runs

SPEC = "transform:s0.2"
NEW = 12

READER = Path(__file__).with_name("without_leankv.py")


@pytest.fixture(scope="module")
def loaded(llama_folder: Path) -> LoadedModel:
    return load_model(ModelConfig(str(llama_folder), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def bundle(loaded: LoadedModel) -> Bundle:
    plan = PlanSpec.uniform(SPEC).with_layers([1], k="int:4")
    return leankv.fit(plan, loaded.model, loaded.tokenizer, tiny.text(20_000), sinks=2, window=4, block_length=48)


def read_without_leankv(repository: Path, prompt: str, kind: str = "plain") -> dict[str, Any]:
    """What a process says that has transformers, and of LeanKV and what it brings along nothing."""
    environment = {
        **os.environ,
        "PYTHONPATH": sysconfig.get_paths()["purelib"],
        "HF_MODULES_CACHE": str(repository.parent / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    # -S: no .pth files, which may lead to LeanKV; run where it does not lie.
    ran = subprocess.run(
        [sys.executable, "-S", str(READER), str(repository), str(NEW), kind],
        input=prompt,
        capture_output=True,
        text=True,
        env=environment,
        cwd=repository.parent,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def test_the_repository_generates_without_leankv(bundle: Bundle, loaded: LoadedModel, tmp_path: Path) -> None:
    files = write_repository(tmp_path / "repository", bundle, loaded, with_weights=True)
    assert "model.safetensors" in files
    prompt = tiny.text(120, seed=4)
    found = read_without_leankv(tmp_path / "repository", prompt)
    inputs = loaded.tokenizer(prompt, return_tensors="pt")
    how = {"max_new_tokens": NEW, "do_sample": False}
    with leankv.compressed(loaded.model, bundle):
        expected = loaded.model.generate(**inputs, **how)
    assert found["ours"] == expected.tolist()
    assert found["stock"] == loaded.model.generate(**inputs, **how).tolist()
    assert found["cache"] == "LeanCache"
    assert found["model"] == "LlamaForCausalLM"


def test_a_base_that_is_named_loads_in_nf4_with_codecs_in_full_precision(
    bundle: Bundle, loaded: LoadedModel, tmp_path: Path
) -> None:
    files = write_repository(tmp_path / "repository", bundle, loaded)
    assert "model.safetensors" not in files
    found = read_without_leankv(tmp_path / "repository", tiny.text(120, seed=4), "nf4")
    dtypes = {str(tensor.dtype) for codec in bundle.plan.values() for tensor in codec.state_dict().values()}
    assert found["codecs"] == sorted(dtypes)
    assert found["cache"] == "LeanCache"
    assert len(found["ours"][0]) == len(found["stock"][0])


def test_a_repository_and_leankv_may_be_loaded_together(
    bundle: Bundle, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    write_repository(tmp_path / "repository", bundle, loaded)
    exported = AutoModelForCausalLM.from_pretrained(
        tmp_path / "repository", trust_remote_code=True, dtype=loaded.model.dtype
    )
    inputs = loaded.tokenizer(tiny.text(120, seed=4), return_tensors="pt")
    how = {"max_new_tokens": NEW, "do_sample": False}
    with leankv.compressed(loaded.model, bundle):
        expected = loaded.model.generate(**inputs, **how)
        assert torch.equal(exported.generate(**inputs, **how), expected)
        assert torch.equal(loaded.model.generate(**inputs, **how), expected)
    assert type(exported.new_cache()) is not type(bundle.new_cache())


def test_an_exported_model_proposes_where_layers_slide() -> None:
    main, text = tiny.build("mistral", seed=1), tiny.tokens(1, 30)
    how = {"attention_mask": torch.ones_like(text), "max_new_tokens": NEW, "do_sample": False}
    expected = main.generate(text, **how)
    model = tiny.build("mistral")
    model = attach(model, leankv.fit("int:4", model, None, tiny.tokens(8, 48), sinks=0, window=0))
    assert torch.equal(main.generate(text, assistant_model=model, **how), expected)


def test_only_what_is_in_use_travels() -> None:
    files = travelling_files(["int"])
    assert "leankv_codecs_integers.py" in files
    assert not any("transform" in name or "autoencoder" in name for name in files)
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module is not None
                outside = node.module.partition(".")[0]
                assert outside != "leankv", name
                assert outside in PRESENT or "except ImportError" in text, (name, outside)
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(f"{own}.py" in files for own in names), (name, names)


def test_comments_and_docstrings_travel() -> None:
    text = path_of("leankv.cache.part_store").read_text(encoding="utf-8")
    copy = travelling_files(["int"])["leankv_cache_part_store.py"]
    kept = [line for line in text.splitlines() if "import" not in line and line.strip()]
    assert [line for line in copy.splitlines() if "import" not in line and line.strip()] == kept


def test_other_folders_are_left_alone(bundle: Bundle, loaded: LoadedModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        write_repository(tmp_path, bundle, loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    for _ in range(2):  # an export may be written again
        write_repository(tmp_path / "repository", bundle, loaded)


def test_a_base_that_nobody_could_find_is_refused(bundle: Bundle, loaded: LoadedModel, tmp_path: Path) -> None:
    lost = LoadedModel(loaded.model, loaded.tokenizer, "here", loaded.geometry, loaded.fingerprint, loaded.numerics)
    with pytest.raises(UserError, match="--with-weights"):
        write_repository(tmp_path / "repository", bundle, lost)
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    ("of", "value", "sentence"),
    [("_hf_peft_config_loaded", True, "is an adapter, .*merge_and_unload"), ("__class__", None, "code of its own")],
)
def test_weights_that_would_not_load_alone_are_not_written(
    bundle: Bundle, loaded: LoadedModel, tmp_path: Path, of: str, value: Any, sentence: str
) -> None:
    model = copy.copy(loaded.model)
    own = type("Own", (type(loaded.model),), {"__module__": "transformers_modules.own.modeling"})
    setattr(model, of, value or own)
    with pytest.raises(UserError, match=sentence):
        write_repository(tmp_path / "repository", bundle, replace(loaded, model=model), with_weights=True)
    assert not (tmp_path / "repository").exists()


def test_codecs_of_ones_own_do_not_travel(bundle: Bundle, loaded: LoadedModel, tmp_path: Path) -> None:
    class Mine(IntegersRecipe):
        family = "mine"
        revision = 1

    own = copy.copy(bundle.plan[Site(1, "k")])
    own.recipe = Mine(4)
    mine = replace(bundle, plan={**bundle.plan, Site(1, "k"): own})
    with pytest.raises(UserError, match="would not travel"):
        write_repository(tmp_path / "repository", mine, loaded)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files asks."""

    files: dict[str, bytes]
    made: list[dict[str, Any]]
    carded: list[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("authorization") != "Bearer secret":
            self._answer(401, {"error": "no token"})
        elif self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self._answer(200, {"url": f"http://{self.headers['Host']}/me/lean"})
        elif self.path == "/api/validate-yaml":  # the card's metadata
            self.carded.append(json.loads(body)["content"])
            self._answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            answers = [{"path": own["path"], "uploadMode": "regular", "shouldIgnore": False} for own in asked]
            self._answer(200, {"files": answers})
        else:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            host = self.headers["Host"]
            self._answer(200, {"commitUrl": f"http://{host}/me/lean/commit/1", "commitOid": "1", "success": True})

    def do_GET(self) -> None:
        is_known = self.headers.get("authorization") == "Bearer secret"
        self._answer(200 if is_known else 401, {"siblings": [], "sha": "0", "id": "me/lean"})

    def _answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, type[Hub]]]:
    """A stand-in for the hub: its address, and what it was given."""
    Hub.files, Hub.made, Hub.carded = {}, [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Hub
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_uploads_what_was_exported(
    bundle: Bundle, loaded: LoadedModel, tmp_path: Path, hub: tuple[str, type[Hub]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, served = hub
    repository = tmp_path / "repository"
    write_repository(repository, bundle, loaded, with_weights=True)
    monkeypatch.setenv("HF_TOKEN", "secret")
    command = ["push", str(repository), "--to", "me/lean", "--private", "--endpoint", address]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    assert f"{address}/me/lean/commit/1" in ran.output
    assert served.made[0]["visibility"] == "private"
    sent = {path.name: path.read_bytes() for path in repository.iterdir() if not path.name.startswith(".")}
    assert served.files == sent
    assert served.carded == [(repository / "README.md").read_text()]

    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert "hf auth login" in refused.output

    elsewhere = CliRunner().invoke(app, ["push", str(tmp_path), "--to", "me/lean", "--endpoint", address])
    assert elsewhere.exit_code == 2
    assert "is no finished leankv export" in elsewhere.output
    loaded.model.save_pretrained(repository)  # an export that was stopped among its weights
    halfway = CliRunner().invoke(app, command)
    assert halfway.exit_code == 2
    assert "is no finished leankv export" in halfway.output

    assert "model.safetensors" not in write_repository(repository, bundle, loaded)
    local = CliRunner().invoke(app, command)
    assert local.exit_code == 2
    assert "--with-weights" in local.output


def test_a_base_on_the_hub_is_pinned_to_the_commit_that_was_loaded(
    bundle: Bundle, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_hub = replace(loaded, name="someone/base")
    asked = replace(bundle, experiment={**bundle.experiment, "model": {"revision": "v2"}})
    for commit, expected in (("c0ffee", "c0ffee"), (None, "v2")):
        monkeypatch.setattr(loaded.model.config, "_commit_hash", commit, raising=False)
        write_repository(tmp_path / "repository", asked, from_hub, license="mit")
        config = json.loads((tmp_path / "repository" / "config.json").read_text())
        assert (config["base_model"], config["base_revision"]) == ("someone/base", expected)


def test_export_is_a_command(bundle: Bundle, loaded: LoadedModel, tmp_path: Path) -> None:
    bundle.save(tmp_path / "bundle")
    command = ["export", "--bundle", str(tmp_path / "bundle"), "--to", str(tmp_path / "repository")]
    ran = CliRunner().invoke(app, [*command, "--device", "cpu", "--dtype", "float32", "--license", "mit"])
    assert ran.exit_code == 0, ran.output
    assert "loads on this machine only" in ran.output
    card = (tmp_path / "repository" / "README.md").read_text()
    assert "license: mit" in card
    assert str(tmp_path) not in card
    config = json.loads((tmp_path / "repository" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_leankv.LeanKVForCausalLM"
    assert torch.equal(
        leankv.load(tmp_path / "repository", loaded.model).plan[Site(0, "k")].state_dict()["mean"],
        bundle.plan[Site(0, "k")].state_dict()["mean"],
    )
