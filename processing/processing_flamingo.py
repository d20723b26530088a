"""Processor of Perceiver-Flamingo."""

from __future__ import annotations

import torch

from ..configuration.configuration_flamingo import PerceiverFlamingoConfig
from .processing_bridged import BridgedProcessor


def _is_list(value) -> bool:
    return isinstance(value, (list, tuple))


class PerceiverFlamingoProcessor(BridgedProcessor):
    __doc__ = BridgedProcessor.__doc__

    # Source: OpenFlamingo (arXiv 2308.01390), section 3.3: `<image>Output:{caption}<|endofchunk|>`.
    default_caption_prompt = "Output:"
    plain_chat_template = (
        "{%- for message in messages -%}"
        "{%- if message.role == 'assistant' -%}{% generation %}{{ message.content + '<|endofchunk|>' }}{% endgeneration %}"
        "{%- else -%}{{ message.content }}{%- endif -%}"
        "{%- endfor -%}"
    )

    @staticmethod
    def query_tokens(config: PerceiverFlamingoConfig) -> int:
        return config.num_latents

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token  # one token marks where an image stands; what it shows is conditioning

    def num_multimodal_tokens(self, image_sizes=None, **kwargs):
        data = super().num_multimodal_tokens(image_sizes, **kwargs)
        if image_sizes is not None:
            data.num_image_tokens = [1] * len(image_sizes)
        return data

    def few_shot_text(self, turns: list[dict]) -> str:
        """OpenFlamingo's prompts: `<image>Output:...` for captions, `<image>Question:... Short answer:...` for questions.

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
        return images

    def __call__(self, images=None, text=None, **kwargs):
        """Images and text to model inputs.

        Args:
            images: An image, a list of them, or a list of lists (one per text). An image may be a list of frames where
                there is a list per text: `images=[[[frame, frame], image]]`.
            text: One or several, with an `<image>` per image (or video).
            kwargs: As for every processor.

        Returns:
            Model inputs; with videos `pixel_values` is `(num_images, num_frames, channels, height, width)` and
            `patch_mask`, `(num_images, num_frames)`, tells frames from padding.
        """
        slots = (
            [slot for sample in images for slot in sample] if _is_list(images) and all(map(_is_list, images)) else []
        )
        if not any(map(_is_list, slots)):
            return super().__call__(images=images, text=text, **kwargs)
        slots = [list(slot) if _is_list(slot) else [slot] for slot in slots]
        if empty := [number for number, slot in enumerate(slots) if not slot]:
            raise ValueError(f"Image {empty[0]} is a video without frames.")
        kwargs["return_tensors"] = "pt"  # frames are put together as tensors
        inputs = super().__call__(images=[slot[0] for slot in slots], text=text, **kwargs)
        frames = self.image_processor([frame for slot in slots for frame in slot], return_tensors="pt")["pixel_values"]
        lengths = [len(slot) for slot in slots]
        inputs["pixel_values"] = torch.nn.utils.rnn.pad_sequence(frames.split(lengths), batch_first=True)
        inputs["patch_mask"] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        return inputs


__all__ = ["PerceiverFlamingoProcessor"]
