"""Processor of MLP-LLaVA: square, padded or tiled images, and the official releases' conversations."""

from __future__ import annotations

import math
import re

from PIL import Image
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..compat import MultiModalData, make_flat_list_of_images, to_pil_image
from ..configuration.configuration_llava import (
    MLPLlavaConfig,
    anyres_layout,
    best_resolution,
    default_grid_pinpoints,
    num_llava_tokens,
)
from .processing_bridged import BridgedProcessor


# ---------------------------------------------------------------------- conversations

# The conversation's system message if it begins with one, else the release's.
_SYSTEM = """\
{%- set system = SYSTEM -%}
{%- if messages and messages[0].role == 'system' -%}
{%- set system = messages[0].content -%}
{%- set messages = messages[1:] -%}
{%- endif -%}
"""
# The loss begins where the generation prompt ends, so that training and generation see the same tokens.
_TURNS = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ USER_TURN }}
{%- elif message.role == 'assistant' -%}{{ PROMPT }}{% generation %}{{ ANSWER }}{% endgeneration %}
{%- else -%}{{ raise_exception("A " + message.role + " message stands where only user and assistant can.") }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ PROMPT }}{%- endif -%}
"""


def _conversation(begin: str, user: str, prompt: str, answer: str, system: str = "") -> str:
    """Build a chat template from Jinja expressions: the conversation's beginning and the parts of its turns."""
    turns = _TURNS
    for name, expression in (("USER_TURN", user), ("PROMPT", prompt), ("ANSWER", answer)):
        turns = turns.replace(name, expression)
    return _SYSTEM.replace("SYSTEM", repr(system)) + "{{- " + begin + " -}}\n" + turns


def _vicuna(system: str) -> str:
    return _conversation(
        begin="system + ' ' if system else ''",
        user="'USER: ' + message.content + ' '",
        prompt="'ASSISTANT:'",
        answer="' ' + message.content + (eos_token or '')",
        system=system,
    )


def _chatml(system: str) -> str:
    return _conversation(
        begin="'<|im_start|>system\\n' + system + '<|im_end|>'",
        user="'<|im_start|>user\\n' + message.content + '<|im_end|>'",
        prompt="'<|im_start|>assistant\\n'",
        answer="message.content + '<|im_end|>'",
        system=system,
    )


def _llama_2(system: str, begin_of_turn: str) -> str:
    """Llama 2's template: the first question holds the system prompt; the tokenizer adds the first turn's beginning."""
    first = (
        "(('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system else '') if loop.first else '') "
        "+ message.content + ' [/INST]'"
    )
    return _conversation(
        begin="raise_exception('The first message must be the user\\'s: the system prompt stands in it.') "
        "if messages and messages[0].role != 'user' else ''",
        user=f"('' if loop.first else {begin_of_turn}) + '[INST] ' + {first}",
        prompt="''",
        answer="' ' + message.content + ' ' + (eos_token or '')",
        system=system,
    )


_GIVES = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
_HUMAN = f"A chat between a curious human and an artificial intelligence assistant. {_GIVES.format('human')}"
_USER = f"A chat between a curious user and an artificial intelligence assistant. {_GIVES.format('user')}"
_V0 = _conversation(
    begin="system + '###'",
    user="'Human: ' + message.content + '###'",
    prompt="'Assistant:'",
    answer="' ' + message.content + '###'",
    system=_HUMAN,
)
_V1 = _vicuna(_USER)

#: The official releases' conversations. If a turn does not end with the end of sequence (v0: `###`, ChatML:
#: `<|im_end|>`), pass `stop_strings` or `eos_token_id` to `generate`.
#: Source: `llava/conversation.py` (1.2.2); `vicuna_v0` is without its example turns, like the official `llava_v0`.
CONVERSATIONS = {
    "v0": _V0,
    "vicuna_v0": _V0,
    "llava_v0": _V0,
    "v1": _V1,
    "vicuna_v1": _V1,
    "llava_v1": _vicuna(_HUMAN),
    "llava_llama_2": _llama_2(
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.",
        begin_of_turn="(bos_token or '')",
    ),
    "mistral_instruct": _llama_2("", begin_of_turn="''"),
    "chatml_direct": _chatml("Answer the questions."),
    "mpt": _chatml(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    # Stage 1, `preprocess_plain` in `llava/train/train.py`: the picture, then its caption; the user's text is left out.
    "plain": _conversation(
        begin="system",
        user="'<image>' * message.content.count('<image>')",
        prompt="''",
        answer="message.content + '\\n'",
    ),
}


# ---------------------------------------------------------------------- images


def expand_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Put a picture in the middle of a square.

    Args:
        image: An RGB image.
        color: Colour of the border, as RGB values from 0 to 255.

    Source: `expand2square` in `llava/mm_utils.py`.
    """
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def cut_into_tiles(image: Image.Image, side: int, image_grid_pinpoints: list[list[int]]) -> list[Image.Image]:
    """Cut a picture, scaled to its best resolution, into tiles, after the whole picture squeezed into a square.

    Args:
        image: An RGB image.
        side: Side of every tile, in pixels.
        image_grid_pinpoints: Resolutions to choose from, `(height, width)` in pixels.

    Returns:
        The base image and the tiles, row by row, all `side` x `side`; the border around the picture is black.

    Source: `process_anyres_image` and `resize_and_pad_image` in `llava/mm_utils.py`.
    """
    height, width = best_resolution(image.height, image.width, image_grid_pinpoints)
    scale_x, scale_y = width / image.width, height / image.height
    if scale_x < scale_y:
        size = width, min(math.ceil(image.height * scale_x), height)
    else:
        size = min(math.ceil(image.width * scale_y), width), height
    picture = Image.new("RGB", (width, height))
    picture.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
    tiles = [
        picture.crop((left, top, left + side, top + side))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    return [image.resize((side, side), Image.Resampling.BICUBIC), *tiles]


# ---------------------------------------------------------------------- processor


class MLPLlavaProcessor(BridgedProcessor):
    """Processor of MLP-LLaVA. The other arguments are those of `BridgedProcessor`.

    Args:
        image_aspect_ratio: How to process pictures that are not square: `"square"` leaves them to the image processor
            (most crop the centre), `"pad"` first pads them to a square with the encoder's mean colour (LLaVA-1.5),
            `"anyres"` cuts them into tiles (LLaVA-NeXT).
        image_grid_pinpoints: Resolutions to choose from for `"anyres"`, see `MLPLlavaConfig`.
        patch_merge_type: How the tiles of `"anyres"` are put together, see `MLPLlavaConfig`.
        pooling: How the number of tokens is reduced, see `MLPLlavaConfig`.
        pooling_factor: Side of the neighbourhood that becomes one token, in patches.
        conversation: Name of an official release's conversation, one of `CONVERSATIONS`, instead of `chat_template`.
        mm_use_im_start_end: The conversation puts `<im_start>` and `<im_end>` around images, as some releases of v1
            do; the tokenizer and the language model must know these tokens.
        space_after_image: Tokenise the text after an image like the beginning of a text, as the official code does. It
            makes a difference for sentencepiece tokenizers, which add a space only before a whole text.

    Raises:
        ValueError: `conversation` is unknown, or `image_aspect_ratio` and `image_grid_pinpoints` contradict each
            other.
    """

    # Source: the official conversations put `<image>\n` before the first question (`llava/constants.py`,
    # `llava/train/train.py`) and use the format of Vicuna v1 (`llava/conversation.py`).
    image_separator = "\n"
    plain_chat_template = _vicuna("")
    compose_options = (*BridgedProcessor.compose_options, "image_aspect_ratio", "conversation")
    # Fields that the processor shares with the model's configuration
    shared_fields = ("image_grid_pinpoints", "patch_merge_type", "pooling", "pooling_factor")

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<image>",
        patch_size=None,
        num_prefix_tokens=0,
        vision_layout="sequence",
        vision_feature_select_strategy="patch",
        num_query_tokens=None,
        image_size=None,
        caption_prompt=None,
        image_aspect_ratio="square",
        image_grid_pinpoints=None,
        patch_merge_type="spatial_unpad",
        pooling=None,
        pooling_factor=1,
        conversation=None,
        mm_use_im_start_end=False,
        space_after_image=False,
        **kwargs,
    ):
        if image_aspect_ratio not in ("square", "pad", "anyres"):
            raise ValueError(f"image_aspect_ratio is {image_aspect_ratio!r}; expected 'square', 'pad' or 'anyres'.")
        if (image_aspect_ratio == "anyres") != (image_grid_pinpoints is not None):
            raise ValueError(
                f"image_aspect_ratio is {image_aspect_ratio!r} and image_grid_pinpoints is {image_grid_pinpoints}; "
                "expected 'anyres' with resolutions, or neither."
            )
        if conversation is not None:
            if chat_template is not None:
                raise ValueError("Give chat_template or conversation, not both.")
            if conversation not in CONVERSATIONS:
                raise ValueError(f"conversation is {conversation!r}; expected one of {', '.join(CONVERSATIONS)}.")
            image = "<im_start><image><im_end>" if mm_use_im_start_end else "<image>"
            chat_template = self.build_chat_template(tokenizer, CONVERSATIONS[conversation], image)
        self.image_aspect_ratio = image_aspect_ratio
        self.image_grid_pinpoints = image_grid_pinpoints
        self.patch_merge_type = patch_merge_type
        self.pooling = pooling
        self.pooling_factor = pooling_factor
        self.mm_use_im_start_end = mm_use_im_start_end
        self.space_after_image = space_after_image
        super().__init__(
            image_processor=image_processor,
            tokenizer=tokenizer,
            chat_template=chat_template,
            image_token=image_token,
            patch_size=patch_size,
            num_prefix_tokens=num_prefix_tokens,
            vision_layout=vision_layout,
            vision_feature_select_strategy=vision_feature_select_strategy,
            num_query_tokens=num_query_tokens,
            image_size=image_size,
            caption_prompt=caption_prompt,
            **kwargs,
        )

    @classmethod
    def complete_config(cls, config: MLPLlavaConfig, image_aspect_ratio: str | None = None, **options) -> None:
        """Fill in `image_grid_pinpoints` if `image_aspect_ratio` is `"anyres"`, see `BridgedProcessor`."""
        if image_aspect_ratio == "anyres" and config.image_grid_pinpoints is None:
            config.image_grid_pinpoints = default_grid_pinpoints(config.image_size)

    @classmethod
    def from_config(
        cls, config: MLPLlavaConfig, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, **kwargs
    ) -> MLPLlavaProcessor:
        """See `BridgedProcessor.from_config`."""
        kwargs = {**{name: getattr(config, name) for name in cls.shared_fields}, **kwargs}
        kwargs.setdefault("image_aspect_ratio", "square" if kwargs["image_grid_pinpoints"] is None else "anyres")
        return super().from_config(config, image_processor, tokenizer, **kwargs)

    def check(self, config: MLPLlavaConfig) -> None:
        """See `BridgedProcessor.check`."""
        for name in (*self.shared_fields, *(("image_size",) if self.image_grid_pinpoints else ())):
            if getattr(self, name) != getattr(config, name):
                raise ValueError(
                    f"The processor's {name} is {getattr(self, name)}, the model's is {getattr(config, name)}. Use the "
                    "processor that was saved with the model, or Processor.from_config(model.config, ...)."
                )
        for pinpoint in self.image_grid_pinpoints or ():
            anyres_layout(self, *pinpoint)  # raises if the resolution can't be cut into tiles
        super().check(config)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs; with tiles also `image_sizes`."""
        return super().model_input_names + ([] if self.image_grid_pinpoints is None else ["image_sizes"])

    def num_image_tokens(self, height: int, width: int) -> int:
        """Visual tokens that one image becomes.

        Args:
            height: Height in pixels: of the original image if it is cut into tiles, else as the vision model
                receives it.
            width: Width of the same image, in pixels.
        """
        return num_llava_tokens(self, height, width)

    def text_with_images(self, text: str, num_images: int) -> str:
        """See `BridgedProcessor.text_with_images`; here it becomes the user's turn in the model's conversation.

        Raises:
            ValueError: The chat template leaves out the text or images.
        """
        content = [*({"type": "image"} for _ in range(num_images)), {"type": "text", "text": text}]
        turn = [{"role": "user", "content": content}]
        prompt = self.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        if prompt.count(self.image_token) != num_images or (text.strip() not in prompt and text != self.caption_prompt):
            raise ValueError(
                f"The chat template makes {prompt!r} of {text!r} and {num_images} images, so something is left out. "
                f"Write {self.image_token} into the text, or set processor.chat_template."
            )
        return prompt

    def get_text_with_replacements(self, text: list[str], images_replacements=(), *more, **kwargs):
        """See `BridgedProcessor.get_text_with_replacements`."""
        images_replacements = list(images_replacements)
        if self.space_after_image:
            # Spaces belong to the replacements: transformers shifts the assistant's spans by their length only.
            rests = [
                sample[found.end() :] for sample in text for found in re.finditer(re.escape(self.image_token), sample)
            ]
            for number, rest in enumerate(rests):
                if number < len(images_replacements) and rest and not rest.startswith(self.image_token):
                    images_replacements[number] += " "
        return super().get_text_with_replacements(text, images_replacements, *more, **kwargs)

    def process_images(self, default, images, **kwargs):
        """See `ProcessorHooks.process_images`; pads pictures or cuts them into tiles."""
        if self.image_aspect_ratio == "square":
            return default(images, **kwargs)
        if not kwargs.get("do_rescale", True):
            raise ValueError(
                f"image_aspect_ratio={self.image_aspect_ratio!r} works on pictures of 0 to 255, which are rescaled "
                "afterwards; leave do_rescale on."
            )
        images = [to_pil_image(image).convert("RGB") for image in make_flat_list_of_images(images)]
        if self.image_aspect_ratio == "pad":
            mean = getattr(self.image_processor, "image_mean", None) or (0, 0, 0)
            color = tuple(int(channel * 255) for channel in mean)
            return default([expand_to_square(image, color) for image in images], **kwargs)
        tiles = [tile for image in images for tile in cut_into_tiles(image, self.image_size, self.image_grid_pinpoints)]
        # Tiles have the encoder's size already: resizing or cropping them again would only lose their borders.
        inputs = self.image_processor(tiles, **{**kwargs, "do_resize": False, "do_center_crop": False})
        inputs["image_sizes"] = [[image.height, image.width] for image in images]
        return inputs, [self.image_token * self.num_image_tokens(*size) for size in inputs["image_sizes"]]

    def processed_size(self, height: int, width: int) -> tuple[int, int]:
        """See `BridgedProcessor.processed_size`."""
        if self.image_aspect_ratio == "pad":
            height = width = max(height, width)
        return super().processed_size(height, width)

    def num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """See `BridgedProcessor.num_multimodal_tokens`."""
        if image_sizes is None or self.image_grid_pinpoints is None:
            return super().num_multimodal_tokens(image_sizes, **kwargs)
        layouts = [anyres_layout(self, *size) for size in image_sizes]
        return MultiModalData(
            num_image_tokens=[layout.num_image_tokens for layout in layouts],
            num_image_patches=[layout.num_tiles for layout in layouts],
        )


__all__ = ["CONVERSATIONS", "MLPLlavaProcessor", "cut_into_tiles", "expand_to_square"]
