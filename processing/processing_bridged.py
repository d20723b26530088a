"""What the three families' processors share: one `<image>` per image in, the right number of placeholders out."""

from __future__ import annotations

from typing import ClassVar

from transformers import ProcessorMixin
from transformers.image_utils import get_image_size
from transformers.processing_utils import MultiModalData

from ..configuration.configuration_bridged import BridgedConfig, num_patches


# Puts lists of text and images together, so that a language model's own template, which expects strings, can be used.
FLATTEN_CONTENT = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is string or message.content is not iterable -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- else -%}
{%- set content = namespace(text='') -%}
{%- for item in message.content -%}
{%- if item.type == 'image' -%}
{%- set content.text = content.text + IMAGE -%}
{%- elif item.type == 'text' -%}
{%- set content.text = content.text + item.text -%}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


class BridgedProcessor(ProcessorMixin):
    """Images and text to model inputs.

    Args:
        image_processor: The vision encoder's image processor.
        tokenizer: The language model's tokenizer; it must know `image_token`.
        chat_template: Jinja template; `None` builds one from the tokenizer's own, or the family's plain one.
        image_token: Placeholder that stands for one image in the text.
        patch_size: Pixels per patch and side.
        num_prefix_tokens: Tokens in front of the patches (CLS, registers).
        vision_layout: `"sequence"` or `"grid"`, see `BridgedConfig`.
        vision_feature_select_strategy: `"patch"` or `"full"`, see `BridgedConfig`.
        num_query_tokens: Visual tokens per image, for families where the image's size does not matter.
        image_size: Side that the vision encoder was made for, in pixels.
        caption_prompt: What to ask for a caption.

    Raises:
        ValueError: The tokenizer does not know `image_token` as one token.
    """

    # What the family puts between an image and the text behind it
    image_separator: ClassVar[str] = ""
    # Template for language models that have none
    plain_chat_template: ClassVar[str] = ""
    default_caption_prompt: ClassVar[str] = "Describe the image briefly."
    valid_processor_kwargs = ProcessorMixin.valid_processor_kwargs

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
        **kwargs,
    ):
        self.image_token = image_token
        ids = tokenizer.encode(image_token, add_special_tokens=False)
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(
                f"The tokenizer splits {image_token!r} into {len(ids)} tokens; it must be one special token. Add it with "
                f"tokenizer.add_special_tokens({{'extra_special_tokens': [{image_token!r}]}}), or use vlbridge.compose()."
            )
        self.image_token_id = ids[0]
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens
        self.vision_layout = vision_layout
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_query_tokens = num_query_tokens
        self.image_size = image_size
        self.caption_prompt = caption_prompt or self.default_caption_prompt
        super().__init__(image_processor, tokenizer, chat_template=chat_template or self.build_chat_template(tokenizer))

    @classmethod
    def from_config(cls, config: BridgedConfig, image_processor, tokenizer, **kwargs) -> BridgedProcessor:
        """The processor that belongs to a model.

        Args:
            config: The model's configuration, its vision geometry filled in.
            image_processor: See the class.
            tokenizer: See the class.
            kwargs: Further arguments of the class.

        Raises:
            ValueError: The parts do not belong to the model, see `check`.
        """
        kwargs.setdefault("image_token", tokenizer.convert_ids_to_tokens(config.image_token_id))
        processor = cls(
            image_processor=image_processor,
            tokenizer=tokenizer,
            patch_size=config.patch_size,
            num_prefix_tokens=config.num_prefix_tokens,
            vision_layout=config.vision_layout,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_query_tokens=cls.query_tokens(config),
            image_size=config.image_size,
            **kwargs,
        )
        processor.check(config)
        return processor

    @staticmethod
    def query_tokens(config: BridgedConfig) -> int | None:
        """Visual tokens per image where the image's size does not matter, else `None`."""
        return None

    @classmethod
    def build_chat_template(cls, tokenizer) -> str:
        """The tokenizer's template, taught to take images; else the family's plain one."""
        own = getattr(tokenizer, "chat_template", None)
        template = own if isinstance(own, str) else cls.plain_chat_template
        return FLATTEN_CONTENT.replace("IMAGE", repr("<image>" + cls.image_separator)) + template

    def num_image_tokens(self, height: int, width: int) -> int:
        """Visual tokens that one image becomes.

        Args:
            height: Height as the vision encoder receives it, in pixels.
            width: Width, in pixels.
        """
        return num_patches(self, height, width) if self.num_query_tokens is None else self.num_query_tokens

    def output_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of what the image processor makes; `None` where it depends on the image."""
        for name in ("crop_size", "size"):
            wanted = getattr(self.image_processor, name, None)
            used = getattr(self.image_processor, f"do_{'center_crop' if name == 'crop_size' else 'resize'}", None)
            if wanted is None or not used:
                continue
            height = wanted["height"] if "height" in wanted else None
            width = wanted["width"] if "width" in wanted else None
            if height is not None and width is not None:
                return height, width
        return None

    def check(self, config: BridgedConfig) -> None:
        """Refuse a model that this processor does not belong to, before the first image.

        Args:
            config: The model's configuration.

        Raises:
            ValueError: Placeholder, image size or number of visual tokens differ.
        """
        if self.image_token_id != config.image_token_id:
            raise ValueError(
                f"The processor's {self.image_token!r} has id {self.image_token_id}, the model's image_token_id is "
                f"{config.image_token_id}. Use the processor that was saved with the model."
            )
        size = self.output_size()
        if size is None:
            return
        if config.vision_layout == "sequence" and config.image_size and size != (config.image_size, config.image_size):
            raise ValueError(
                f"The image processor makes images of {size[0]}x{size[1]} pixels, but the vision encoder was made for "
                f"{config.image_size}x{config.image_size}. Set the image processor's size (and crop_size) to that."
            )
        ours, theirs = self.num_image_tokens(*size), config.num_image_tokens(*size)
        if ours != theirs:
            raise ValueError(
                f"For {size[0]}x{size[1]} pixels the processor writes {ours} image tokens, but the model makes {theirs} "
                "features. Use the processor that was saved with the model, or Processor.from_config(model.config, ...)."
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        height, width = get_image_size(image_inputs["pixel_values"][image_idx])
        return self.image_token * self.num_image_tokens(height, width)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Placeholders per image, for servers that plan ahead.

        Args:
            image_sizes: List of `(height, width)`, in pixels.
        """
        if image_sizes is None:
            return MultiModalData()
        counts = [
            self.num_image_tokens(*(self.output_size() or size))
            if self.num_query_tokens is None
            else self.num_query_tokens
            for size in image_sizes
        ]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))


__all__ = ["BridgedProcessor"]
