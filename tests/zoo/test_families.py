"""The registry of families: transformers' Auto classes, and the tables of names that servers look in."""

from __future__ import annotations

import pytest
from tiny import tiny_model
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.utils import Modality
from transformers.models.auto import modeling_auto

from vlbridge import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_serve_knows_what_takes_images(family):
    model, processor = tiny_model(family)
    assert ModelManager.get_model_modality(model, processor) is Modality.MULTIMODAL
    # by its name there the server chooses the class to load a model with
    assert model.config.model_type in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, AutoModelForMultimodalLM])
def test_names_in_the_tables_do_not_disturb_the_auto_classes(auto_class):
    known = list(auto_class._model_mapping.keys())
    for family in FAMILIES.values():
        assert known.count(family.config_class) == 1
        assert auto_class._model_mapping[family.config_class] is family.model_class
    assert auto_class._model_mapping[LlavaConfig] is LlavaForConditionalGeneration
    assert len(auto_class._model_mapping) >= len(FAMILIES)
