"""transformers' model, configuration, training and pipeline suites against every registered family."""

from __future__ import annotations

import copy
import unittest
from contextlib import contextmanager

import suites
import tiny
import torch
from transformers import SiglipVisionConfig
from transformers.models.auto import modeling_auto

from vlbridge.families import FAMILIES, Family
from vlbridge.modeling.modeling_bridge import fill_vision_geometry


ModelTesterMixin = suites.load("test_modeling_common").ModelTesterMixin
ConfigTester = suites.load("test_configuration_common").ConfigTester
TrainingTesterMixin = suites.load("test_training_mixin").TrainingTesterMixin
PipelineTesterMixin = suites.load_pipeline_suite().PipelineTesterMixin

# In the tables, as in language models with spare rows; neither among the first 20 tokens, which the training suite
# uses as text, nor among the last 15, which the resizing tests cut off.
IMAGE_TOKEN, END_OF_CHUNK = 20, 21
# What each family was published with, and where inputs differ in kind
LANGUAGE_MODELS = {"mlp": ["llama"], "qformer": ["opt", "t5"], "perceiver": ["llama", "gpt_neox"]}


# What the suites know about a class, they look up by name in transformers' own tables.
for _family in FAMILIES.values():
    _names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    _names[_family.config_class.model_type] = _family.model_class.__name__


class BridgedModelTester:
    """Tiny configuration and inputs of a family, with nothing frozen: the suites look at every gradient.

    Args:
        parent: The test case.
        family: The family under test.
        language: Kind of language model, a key of `tiny.LANGUAGE`.
    """

    is_training = True
    batch_size = 7  # the attention tests extend smaller batches with rows that have no placeholders
    num_channels = 3
    text_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4

    def __init__(self, parent: unittest.TestCase, family: Family, language: str):
        self.parent, self.family, self.language = parent, family, language
        config = self.get_config()
        self.image_size = config.image_size
        self.vision_config = config.vision_config
        self.text_config = config.text_config
        self.num_placeholders = config.num_image_tokens(30, 30) if config.visual_tokens_in_prompt else 1
        self.seq_length = self.num_placeholders + self.text_length
        self.encoder_seq_length = self.key_length = self.seq_length
        self.image_token_id = config.image_token_id

    def get_config(self):
        vision_config = SiglipVisionConfig(**tiny.SMALL, image_size=30, patch_size=6, vision_use_head=False)
        text_config = tiny.LANGUAGE[self.language]()
        config = self.family.config_class(
            vision_config=vision_config.to_dict(),
            text_config=text_config.to_dict(),
            # T5's suite draws targets from 3 on, and placeholders among targets have no loss
            image_token_id=2 if self.language == "t5" else IMAGE_TOKEN,
            special_token_ids=[IMAGE_TOKEN, END_OF_CHUNK] if self.family.special_tokens else None,
            freeze_vision_model=False,
            freeze_language_model=False,
            **copy.deepcopy(tiny.BRIDGE_OPTIONS[self.family.name]),
        )
        fill_vision_geometry(config)
        config.vocab_size = text_config.vocab_size  # the training suite asks the outermost configuration
        return config

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(30, 80, (self.batch_size, self.text_length), generator=generator)
        placeholders = torch.full((self.batch_size, self.num_placeholders), config.image_token_id)
        inputs = {
            "input_ids": torch.cat((placeholders, text), dim=1),
            "attention_mask": torch.ones(self.batch_size, self.seq_length, dtype=torch.long),
            "pixel_values": torch.randn(
                self.batch_size, self.num_channels, self.image_size, self.image_size, generator=generator
            ),
        }
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(30, 80, (self.batch_size, self.seq_length), generator=generator)
            inputs["decoder_attention_mask"] = torch.ones(self.batch_size, self.seq_length, dtype=torch.long)
        return config, inputs


class FamilyTests(ModelTesterMixin, TrainingTesterMixin, PipelineTesterMixin):
    """The suites' settings for bridged models."""

    family: Family
    language: str
    model_tester = None
    _is_composite = True
    additional_model_inputs = ["pixel_values"]
    training_overfit_steps = 500  # OPT takes longer than Llama

    def setUp(self):
        self.model_tester = BridgedModelTester(self, self.family, self.language)
        self.config_tester = ConfigTester(self, config_class=self.family.config_class, has_text_modality=False)

    @contextmanager
    def subTest(self, *args, **kwargs):
        """One test, one verdict."""
        yield

    def test_config(self):
        self.config_tester.run_common_tests()


for _family in FAMILIES.values():
    for _index, _language in enumerate(LANGUAGE_MODELS.get(_family.name, ["llama"])):
        _tasks = () if _index else ("image-text-to-text", "any-to-any")  # the pipelines' tiny models are one per family
        _name = f"{_family.model_class.__name__}_{_language}Test"
        globals()[_name] = type(
            _name,
            (FamilyTests, unittest.TestCase),
            {
                "family": _family,
                "language": _language,
                "is_encoder_decoder": _language == "t5",
                "__module__": __name__,
                "all_model_classes": (_family.model_class,),
                "pipeline_model_mapping": {task: _family.model_class for task in _tasks},
            },
        )
