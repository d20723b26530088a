"""The class that vLLM runs: our vision encoder, bridge and processor before vLLM's own class for the language model.

This is the only module that imports vLLM. Everything it uses is described in vLLM's guide for authors of models, which
does not promise to keep it; `vlbridge.compat_vllm` lists what is overridden, for a tripwire.

Source: "Multi-Modal Support" and "Plugin System" in vLLM's documentation (docs.vllm.ai, 0.32).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from transformers import AutoModel

from ..compat import CompatibilityError
from .serving_plugin import check_vllm, refuse_for_vllm


check_vllm()  # before the imports, which other releases may not have

from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal  # noqa: E402
from vllm.model_executor.models.module_mapping import MultiModelKeys  # noqa: E402
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix  # noqa: E402
from vllm.multimodal import MULTIMODAL_REGISTRY  # noqa: E402
from vllm.multimodal.inputs import MultiModalFieldConfig  # noqa: E402
from vllm.multimodal.processing import (  # noqa: E402
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)


_INSTRUCTION = ("qformer_input_ids", "qformer_attention_mask")


class BridgedInfo(BaseProcessingInfo):
    """What vLLM asks about a model before it is loaded."""

    def __init__(self, ctx):
        super().__init__(ctx)
        config = self.get_hf_config()
        if problem := refuse_for_vllm(config) or refuse_for_vllm(config, self.get_hf_processor()):
            raise CompatibilityError(problem)  # vLLM takes a ValueError for a model without images

    def get_hf_processor(self, **kwargs: object):
        """The model's processor; a request's arguments are for its calls, not for making it."""
        return self.ctx.get_hf_processor()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of images."""
        return {"image": None}

    def largest_image(self) -> tuple[int, int]:
        """Height and width, in pixels, of a picture that becomes as many visual tokens as one can."""
        processor = self.get_hf_processor()
        side = self.get_hf_config().image_size
        sizes = [tuple(size) for size in getattr(processor, "image_grid_pinpoints", None) or [(side, side)]]
        counts = processor.num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
        return sizes[counts.index(max(counts))]


class BridgedDummyInputs(BaseDummyInputsBuilder[BridgedInfo]):
    """The largest input, with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """One placeholder per image."""
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options):
        """Pictures of the size with the most visual tokens."""
        height, width = self.info.largest_image()
        count, overrides = mm_counts.get("image", 0), mm_options.get("image")
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count, overrides=overrides)}


class BridgedVLLMProcessor(BaseMultiModalProcessor[BridgedInfo]):
    """Our processor for images, and placeholders in prompts that vLLM has tokenised."""

    def apply(self, inputs, timing_ctx):
        """Give the Q-Former the instruction: the prompt without its images, which is hashed with each image."""
        if getattr(self.info.get_hf_processor(), "qformer_tokenizer", None) is not None:
            given = {"qformer_text": self.instruction(inputs.prompt), **inputs.hf_processor_mm_kwargs}
            inputs = dataclasses.replace(inputs, hf_processor_mm_kwargs=given)
        return super().apply(inputs, timing_ctx)

    def instruction(self, prompt: Sequence[int]) -> str:
        """The text of a prompt without its images, as `QFormerBlip2Processor.instructions` makes it."""
        processor = self.info.get_hf_processor()
        text = processor.tokenizer.decode(list(prompt), skip_special_tokens=False)
        return processor.instructions([text if processor.image_token in text else processor.image_token + text])[0]

    def _get_hf_mm_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.dummy_inputs.get_dummy_text(mm_counts)

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict.fromkeys(("pixel_values", *_INSTRUCTION), MultiModalFieldConfig.batched("image"))
        if "image_sizes" in hf_inputs:  # each picture was cut into tiles
            sizes = hf_inputs["image_sizes"].tolist()
            tiles = self.info.get_hf_processor().num_multimodal_tokens(image_sizes=sizes)["num_image_patches"]
            fields["pixel_values"] = MultiModalFieldConfig.flat_from_sizes("image", torch.tensor(tiles))
            fields["image_sizes"] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> list[PromptReplacement]:
        processor = self.info.get_hf_processor()
        more = processor.tokenizer.encode(getattr(processor, "text_start", ""), add_special_tokens=False)

        def replacement(number: int) -> PromptUpdateDetails:
            # Counted from what the processor made, which may have turned the picture (EXIF)
            image = out_mm_kwargs["image"][number]
            tiled = "image_sizes" in image
            size = image["image_sizes"].data.tolist() if tiled else image["pixel_values"].data.shape[-2:]
            ids = [processor.image_token_id] * processor.num_image_tokens(*size) + more
            return PromptUpdateDetails.select_token_id(ids, processor.image_token_id)

        return [PromptReplacement(modality="image", target=[processor.image_token_id], replacement=replacement)]


@MULTIMODAL_REGISTRY.register_processor(BridgedVLLMProcessor, info=BridgedInfo, dummy_inputs=BridgedDummyInputs)
class BridgedModelForVLLM(nn.Module, SupportsMultiModal, SupportsLoRA):
    """A bridged model whose language model is vLLM's own.

    Our checkpoint code loads the model on the CPU, whole: parts of a bridge-only checkpoint are found and verified as
    always. Encoder and bridge are kept; the language model's tensors go to vLLM's class, which shards them if it runs
    on several devices. Encoder and bridge are not sharded: each process has them whole.

    Args:
        vllm_config: vLLM's configuration.
        prefix: Where this model stands in another one.
    """

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """Text of an image, for chat templates that take strings."""
        return "<image>"

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config = config = model_config.hf_config
        self.configure_mm_token_handling(config.text_config.vocab_size, [config.image_token_id])
        device = torch.get_default_device()
        with torch.device("cpu"):  # vLLM's device has no room for a second language model
            loaded = AutoModel.from_pretrained(
                model_config.model, revision=model_config.revision, dtype=model_config.dtype
            )
        theirs, loaded.language_model = loaded.language_model, None
        self._language_weights = theirs.state_dict()
        with self._mark_tower_model(vllm_config, "image"):
            self.bridged = loaded.eval().to(device)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config,
                hf_config=config.text_config,
                architectures=config.text_config.architectures or [type(theirs).__name__],
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors
        self.packed_modules_mapping = getattr(self.language_model, "packed_modules_mapping", {})  # for LoRA

    def get_mm_mapping(self) -> MultiModelKeys:
        """Which modules are the language model, which LoRA applies to."""
        return MultiModelKeys.from_string_field("language_model", "bridged.bridge", "bridged.vision_model")

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Give vLLM's language model its tensors, which are loaded already.

        Args:
            weights: The folder's tensors as vLLM reads them; they are not looked at.

        Returns:
            Names of all parameters that have their values.
        """
        loaded = self.language_model.load_weights(self._language_weights.items())
        self._language_weights = {}
        names = {f"bridged.{name}" for name, _ in self.bridged.named_parameters()}
        return names | {f"language_model.{name}" for name in loaded}

    def embed_multimodal(self, **kwargs) -> list[torch.Tensor]:
        """Turn images into visual tokens.

        Args:
            kwargs: The images of one step, as `_get_mm_fields_config` describes them; tensors, or lists of tensors that
                differ in shape.

        Returns:
            `(num_image_tokens, text_dim)` for each image.
        """
        images = {name: kwargs[name] for name in self.bridged.image_arguments if kwargs.get(name) is not None}
        for name in _INSTRUCTION:  # requests differ in the length of their instructions
            if isinstance(images.get(name), (list, tuple)):
                images[name] = nn.utils.rnn.pad_sequence(list(images[name]), batch_first=True)
        pixel_values = images.pop("pixel_values", None)
        if pixel_values is None:
            return []
        if isinstance(pixel_values, torch.Tensor):
            return list(self.bridged.get_image_features(pixel_values, **images).pooler_output)
        found = []
        for number, picture in enumerate(pixel_values):  # pictures of several sizes
            own = {name: values[number : number + 1] for name, values in images.items()}
            found += list(self.bridged.get_image_features(picture[None], **own).pooler_output)
        return found

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        """Run the language model."""
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Scores of the next token, `(rows, vocabulary)`; the placeholder is never generated."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None and self.config.image_token_id < logits.shape[-1]:
            logits[..., self.config.image_token_id] = -torch.inf
        return logits


__all__ = ["BridgedModelForVLLM"]
