"""transformers' processor suite against every registered family."""

from __future__ import annotations

import copy
import unittest

import suites
import tiny
from transformers import AddedToken, CLIPImageProcessor

from vlbridge.families import FAMILIES, Family


ProcessorTesterMixin = suites.load("test_processing_common").ProcessorTesterMixin


class FamilyProcessorTests(ProcessorTesterMixin):
    """The suite's settings for bridged processors."""

    family: Family

    @staticmethod
    def does_processor_return_mm_offsets(processor_class, method_name):
        """All do; the suite would look for the method in the family's own class, not in the shared base."""
        return True

    @classmethod
    def _setup_tokenizer(cls):
        tokenizer = tiny.tiny_tokenizer()
        for token in ("<image>", "<|endofchunk|>"):
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        return tokenizer

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessor(size={"height": 30, "width": 30}, crop_size={"height": 30, "width": 30})

    @classmethod
    def prepare_processor_dict(cls):
        config = cls.family.config_class(**copy.deepcopy(tiny.BRIDGE_OPTIONS[cls.family.name]))
        query_tokens = cls.family.processor_class.query_tokens(config)
        return {"patch_size": 6, "num_prefix_tokens": 1, "image_size": 30, "num_query_tokens": query_tokens}


for _family in FAMILIES.values():
    _name = f"{_family.processor_class.__name__}Test"
    globals()[_name] = type(
        _name,
        (FamilyProcessorTests, unittest.TestCase),
        {"family": _family, "__module__": __name__, "processor_class": _family.processor_class},
    )
