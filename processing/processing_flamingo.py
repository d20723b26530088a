"""Processor of Perceiver-Flamingo."""

from __future__ import annotations

import torch

from ..compat import MultiModalData
from ..configuration.configuration_flamingo import PerceiverFlamingoConfig
from .processing_bridged import BridgedProcessor
from .processing_inputs import is_list


class PerceiverFlamingoProcessor(BridgedProcessor):
    """Processor of Perceiver-Flamingo. The arguments are those of `BridgedProcessor`."""

    takes_videos = True
    # Source: OpenFlamingo (arXiv 2308.01390), section 3.3: `<image>Output:{caption}<|endofchunk|>`.
    default_caption_prompt = "Output:"
    plain_chat_template = (
        "{%- for message in messages -%}"
        "{%- if message.role == 'assistant' -%}"
        "{% generation %}{{ message.content + '<|endofchunk|>' }}{% endgeneration %}"
        "{%- else -%}{{ message.content }}{%- endif -%}"
        "{%- endfor -%}"
    )

    @staticmethod
    def query_tokens(config: PerceiverFlamingoConfig) -> int:
        """Visual tokens per image."""
        return config.num_latents

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """See `ProcessorMixin.replace_image_token`."""
        return self.image_token  # one token marks the image's place; its features are conditioning

    def num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """See `BridgedProcessor.num_multimodal_tokens`; the prompt holds one token per image."""
        data = super().num_multimodal_tokens(image_sizes, **kwargs)
        if image_sizes is not None:
            data.num_image_tokens = [1] * len(image_sizes)
        return data

    def few_shot_text(self, turns: list[dict]) -> str:
        """Build the prompt of demonstrations and a query in OpenFlamingo's format.

        Captions are `<image>Output:...`, questions are `<image>Question:... Short answer:...`.

        Args:
            turns: Demonstrations and the query, which is last, as checked by `few_shot`.

        Source: `open_flamingo/eval/eval_model.py` and its models' `get_caption_prompt` and `get_vqa_prompt`.
        """
        text = ""
        for turn in turns:
            text += self.image_token if "image" in turn else ""
            text += f"Question:{turn['question']} Short answer:" if "question" in turn else "Output:"
            text += f"{turn['answer']}<|endofchunk|>" if "answer" in turn else ""
        return text

    @staticmethod
    def nest(images: list[list]) -> list:
        """See `BridgedProcessor.nest`; Flamingo takes one list of images per text."""
        return images

    def __call__(self, images=None, text=None, **kwargs):
        """Images and text to model inputs.

        Args:
            images: An image, a list of images, or a list of lists (one per text). In a list of lists, an image may be a
                video, given as a list of frames: `images=[[[frame, frame], image]]`.
            text: A text or a list of texts, with one `<image>` per image or video, or none, see
                `BridgedProcessor.__call__`.
            kwargs: Passed on to `ProcessorMixin.__call__`.

        Returns:
            Model inputs; with videos `pixel_values` is `(num_images, num_frames, channels, height, width)` and
            `patch_mask`, `(num_images, num_frames)`, is false for padding frames.

        Raises:
            ValueError: A video has no frames.
        """
        slots, text = self.lay_out(images, text, kwargs)
        if slots is None or not any(map(is_list, slots)):
            return super().__call__(images=slots, text=text, **kwargs)
        slots = [list(slot) if is_list(slot) else [slot] for slot in slots]
        if empty := [number for number, slot in enumerate(slots) if not slot]:
            raise ValueError(f"Image {empty[0]} is a video without frames.")
        kwargs["return_tensors"] = "pt"  # frames are padded as tensors below
        inputs = super().__call__(images=[slot[0] for slot in slots], text=text, **kwargs)
        frames = self.image_processor([frame for slot in slots for frame in slot], return_tensors="pt")["pixel_values"]
        lengths = [len(slot) for slot in slots]
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(frames.split(lengths), batch_first=True)
        inputs["patch_mask"] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return inputs


__all__ = ["PerceiverFlamingoProcessor"]
