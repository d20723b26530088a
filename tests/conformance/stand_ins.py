"""What the suites import but the sdist of transformers leaves out, as little as they need.

The generation and export suites themselves are not in the sdist: `tests/modeling` covers generation.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import ModuleType

import tiny


class ExportTesterMixin:
    """No export test comes with the sdist."""


class GenerationTesterMixin:
    """No generation test comes with the sdist."""


# Options that every configuration takes, none of them at its default
config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 3,
    "id2label": {0: "circle", 1: "square"},
    "label2id": {"circle": 0, "square": 1},
}


def url_to_local_path(url: str) -> str:
    """A picture that `suites.save_tiny_models` made in place of those on the Hub; other files are not needed."""
    if not url.endswith((".png", ".jpg")):
        return url
    return os.path.join(os.environ["TRANSFORMERS_TINY_MODEL_PATH"], "picture.png")


class ImageTextToTextPipelineTests:
    """What every image-text-to-text pipeline must do: single, many, chat, and more tokens on request."""

    task = "image-text-to-text"

    def get_test_pipeline(self, model, tokenizer, image_processor=None, dtype="float32", **processors):
        from transformers import AutoProcessor, pipeline

        processor = AutoProcessor.from_pretrained(model.name_or_path)
        pipe = pipeline(self.task, model=model, processor=processor, dtype=dtype, max_new_tokens=5)
        picture = tiny.tiny_image(1)
        examples = [
            {"images": picture, "text": f"{processor.image_token}What is it?"},
            {"images": tiny.tiny_image(2), "text": f"A longer question: {processor.image_token}where is it?"},
        ]
        return pipe, examples

    def run_pipeline_test(self, pipe, examples):
        for example in examples:
            (answer,) = pipe(**example)
            assert answer["input_text"] == example["text"]
            assert answer["generated_text"].startswith(example["text"]), answer
            (new,) = pipe(**example, return_full_text=False)
            assert example["text"] + new["generated_text"] == answer["generated_text"]
        many = pipe(images=[example["images"] for example in examples], text=[example["text"] for example in examples])
        assert len(many) == len(examples)
        content = [{"type": "image", "image": examples[0]["images"]}, {"type": "text", "text": "What is it?"}]
        (chat,) = pipe(text=[{"role": "user", "content": content}])
        assert chat["generated_text"][-1]["role"] == "assistant"


class AnyToAnyPipelineTests(ImageTextToTextPipelineTests):
    """The same through the pipeline for any modalities."""

    task = "any-to-any"


def other_pipelines(suites: Path) -> dict[str, list[type]]:
    """Stand-ins for tests of pipelines that no bridge has, which suites before transformers 5.20 import all the same.

    Args:
        suites: Folder of the suites.
    """
    imports = re.findall(
        r"^from \.(pipelines\.\w+) import (\w+)$", (suites / "test_pipeline_mixin.py").read_text(), re.MULTILINE
    )
    return {f"{suites.name}.{module}": [type(name, (), {})] for module, name in imports}


def install(suites: Path) -> None:
    """Put the stand-ins where the suites look for them.

    Args:
        suites: Folder of the suites; its name is the package that they are imported as.
    """
    package = suites.name
    homes = {
        **other_pipelines(suites),
        f"{package}.exporters.test_export": [ExportTesterMixin],
        f"{package}.generation.test_utils": [GenerationTesterMixin],
        f"{package}.utils.test_configuration_utils": [],
        f"{package}.pipelines.test_pipelines_image_text_to_text": [ImageTextToTextPipelineTests],
        f"{package}.pipelines.test_pipelines_any_to_any": [AnyToAnyPipelineTests],
        "fetch_hub_objects_for_ci": [url_to_local_path],
    }
    for name, members in homes.items():
        module = sys.modules.setdefault(name, ModuleType(name))
        for member in members:
            setattr(module, member.__name__, member)
        parent = name.rpartition(".")[0]
        if parent and parent != package:
            sys.modules.setdefault(parent, ModuleType(parent)).__path__ = []
    sys.modules[f"{package}.utils.test_configuration_utils"].config_common_kwargs = config_common_kwargs
