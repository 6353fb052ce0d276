"""PEFT adapters: a model that carries one is a model like any other, merged or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import leankv
from leankv.config.experiment import ModelConfig
from leankv.models.fingerprint import fingerprint
from leankv.models.loading import load_model
from tests import tiny

peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.whole_runs, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model's folder and an adapter's, as they are published: the adapter brings no tokenizer."""
    base, adapter = (tmp_path_factory.mktemp("adapters") / name for name in ("base", "adapter"))
    tiny.save(base, tiny.build("llama"))
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(adapter)
    return base, adapter


def wrapped(folders: tuple[Path, Path]) -> Any:
    """The adapter on its base, as peft hands it out."""
    base, adapter = folders
    return peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), adapter).eval()


def test_an_adapters_folder_loads_with_its_base_and_its_tokenizer(folders: tuple[Path, Path]) -> None:
    base, adapter = (load_model(ModelConfig(str(folder), device="cpu", dtype="float32")) for folder in folders)
    ids = tiny.tokens(1, 20)
    with torch.no_grad():
        own = adapter.model(ids).logits
        torch.testing.assert_close(own, wrapped(folders)(input_ids=ids).logits)
        assert not torch.allclose(own, base.model(ids).logits, atol=1e-2)
    assert adapter.fingerprint != base.fingerprint
    assert adapter.tokenizer("a b").input_ids == base.tokenizer("a b").input_ids


def test_which_adapter_is_active_and_how_strongly_is_part_of_the_fingerprint(folders: tuple[Path, Path]) -> None:
    model = wrapped(folders)
    told = [fingerprint(model)]
    with model.disable_adapter():
        told.append(fingerprint(model))
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    told.append(fingerprint(model))
    assert len(set(told)) == 3
    assert fingerprint(wrapped(folders)) == told[0]


def test_a_model_with_an_adapter_is_fitted_measured_and_generates(folders: tuple[Path, Path]) -> None:
    model, ids = wrapped(folders), tiny.tokens(4, 40)
    bundle = leankv.fit("int:8", model, None, ids, sinks=2, key_space="pre-rope", error_metric="none")
    report = leankv.perplexity(model, None, ids, bundle=bundle, protocol="stream", block_length=40)
    assert report.ppl == pytest.approx(report.base_ppl, rel=0.02)
    given = {"input_ids": ids[:1], "max_new_tokens": 5, "do_sample": False}
    through = model.generate(**given, past_key_values=bundle.new_cache())
    with leankv.compressed(model, bundle):
        assert torch.equal(model.generate(**given), through)
    merged = model.merge_and_unload()
    with pytest.raises(leankv.UserError, match="other weights"):
        leankv.perplexity(merged, None, ids, bundle=bundle, block_length=40)
