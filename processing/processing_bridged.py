"""What the three families' processors share: one `<image>` per image in, the right number of placeholders out."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import ClassVar

from transformers import ProcessorMixin

from ..compat import MultiModalData, get_image_size
from ..compat_hooks import ProcessorHooks
from ..configuration.configuration_bridged import BridgedConfig, num_patches
from ..extensions import publisher, take_push_options


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


TURN_KEYS = ("image", "caption", "question", "answer")


def _checked_turn(turn: dict, name: str, answered: bool = True) -> dict:
    """A demonstration or query in one form: `image`, `question` (captions have none) and `answer`.

    Raises:
        ValueError: It lacks something, or has something unknown.
    """
    if not isinstance(turn, dict) or (unknown := sorted(set(turn) - set(TURN_KEYS))):
        found = f"has {', '.join(unknown)}" if isinstance(turn, dict) else f"is a {type(turn).__name__}"
        raise ValueError(f"{name} {found}; expected a dict of {', '.join(TURN_KEYS)}.")
    given = {key: value for key, value in turn.items() if value is not None}
    said = [key for key in ("caption", "answer") if key in given]
    if answered and len(said) != 1:
        raise ValueError(
            f"{name} has {' and '.join(said) or 'neither caption nor answer'}; expected exactly one of them."
        )
    if not answered and said:
        raise ValueError(f"{name} has a {said[0]} already: that is for the model to say.")
    if "answer" in given and "question" not in given:
        raise ValueError(f"{name} has an answer but no question; what an image shows goes in 'caption'.")
    if "caption" in given and "question" in given:
        raise ValueError(f"{name} has a question and a caption; the reply to a question goes in 'answer'.")
    if "caption" in given:
        given["answer"] = given.pop("caption")
    return given


class BridgedProcessor(ProcessorHooks, ProcessorMixin):
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
    # Arguments of the class that `compose` passes on
    compose_options: ClassVar[tuple[str, ...]] = ("caption_prompt",)
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
        # LLaMA's class forgets at saving how it was told to split (transformers 5.23), and would split otherwise when loaded
        if isinstance(getattr(tokenizer, "legacy", None), bool):
            tokenizer.init_kwargs["legacy"] = tokenizer.legacy
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

    @classmethod
    def complete_config(cls, config: BridgedConfig, **options) -> None:
        """Fill in fields of a fresh configuration that follow from options of the processor; `compose` asks.

        Args:
            config: The model's configuration, its vision geometry filled in.
            options: Those of `compose_options` that were given.
        """

    @staticmethod
    def query_tokens(config: BridgedConfig) -> int | None:
        """Visual tokens per image where the image's size does not matter, else `None`."""
        return None

    @classmethod
    def build_chat_template(cls, tokenizer, template: str | None = None, image: str = "<image>") -> str:
        """A template, taught to take images.

        Args:
            tokenizer: The language model's.
            template: For messages whose content is a string; `None` takes the tokenizer's, else the family's plain one.
            image: What stands for an image in the text.
        """
        own = getattr(tokenizer, "chat_template", None)
        if template is None:
            template = own if isinstance(own, str) else cls.plain_chat_template
        return FLATTEN_CONTENT.replace("IMAGE", repr(image + cls.image_separator)) + template

    def num_image_tokens(self, height: int, width: int) -> int:
        """Visual tokens that one image becomes.

        Args:
            height: Height as the vision encoder receives it, in pixels.
            width: Width, in pixels.
        """
        return num_patches(self, height, width) if self.num_query_tokens is None else self.num_query_tokens

    # ------------------------------------------------------------------ few-shot prompts

    def few_shot_text(self, turns: list[dict]) -> str:
        """The prompt of demonstrations and a query: a conversation, in the language model's own format.

        Args:
            turns: As for `few_shot`, the query last.
        """
        messages = []
        for turn in turns:
            content = [{"type": "image"}] if "image" in turn else []
            asked = turn.get("question") or self.caption_prompt
            messages.append({"role": "user", "content": [*content, {"type": "text", "text": asked}]})
            if "answer" in turn:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn["answer"]}]})
        return self.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def few_shot(
        self,
        demonstrations: list[dict] | list[list[dict]],
        query: dict | list[dict],
        tokenize: bool = True,
        **kwargs,
    ):
        """Show some examples, then ask.

        Args:
            demonstrations: Examples in the order in which they are shown, each `{"image", "caption"}` or `{"image",
                "question", "answer"}`; without `"image"` it is text only. For a batch, a list per query.
            query: `{"image"}` or `{"image", "question"}`; or a list of them, a batch.
            tokenize: Give model inputs; else the prompts and the images.
            kwargs: For the processor's call.

        Returns:
            What `generate` takes, padded and as tensors. With `tokenize=False` the prompt and the list of its images; of
            a batch, lists of both.

        Raises:
            ValueError: A demonstration or query lacks something or has something unknown.
        """
        batched = not isinstance(query, dict)
        queries = list(query) if batched else [query]
        shown = list(demonstrations) if batched else [demonstrations]
        if len(shown) != len(queries):
            raise ValueError(f"{len(queries)} queries, but demonstrations for {len(shown)}: give a list per query.")
        texts, images = [], []
        for examples, asked in zip(shown, queries):
            turns = [_checked_turn(turn, f"demonstration {number}") for number, turn in enumerate(examples)]
            turns.append(_checked_turn(asked, "the query", answered=False))
            texts.append(self.few_shot_text(turns))
            images.append([turn["image"] for turn in turns if "image" in turn])
        if not tokenize:
            return (texts, images) if batched else (texts[0], images[0])
        flat = [image for sample in images for image in sample]
        options = {"return_tensors": "pt", "padding": True, **kwargs}
        begin = self.tokenizer.bos_token
        if begin and all(text.startswith(begin) for text in texts):  # the conversation's format has put it there
            options.setdefault("add_special_tokens", False)
        return self(text=texts, images=self.nest(images) if flat else None, **options)

    @staticmethod
    def nest(images: list[list]) -> list:
        """The images of a batch of prompts, as the call takes them."""
        return [image for sample in images for image in sample]

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

    def processed_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of what the image processor makes of one picture.

        Args:
            height: Height of the picture, in pixels.
            width: Its width.
        """
        if (fixed := self.output_size()) is not None:
            return fixed
        size = getattr(self.image_processor, "size", None)
        edge = size["shortest_edge"] if size is not None and "shortest_edge" in size else None
        if edge is None or not getattr(self.image_processor, "do_resize", False):
            return height, width
        long = int(edge * max(height, width) / min(height, width))
        return (edge, long) if height <= width else (long, edge)

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

    def get_text_with_replacements(self, text: list[str], images_replacements=(), *more, **kwargs):
        count = sum(sample.count(self.image_token) for sample in text)
        if count != len(images_replacements):
            given = f"{len(images_replacements)} images were passed" if images_replacements else "no images were passed"
            raise ValueError(f"The number of {self.image_token} tokens in the text is {count}, but {given}.")
        return super().get_text_with_replacements(text, images_replacements, *more, **kwargs)

    def num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Placeholders per image, for servers that plan ahead.

        Args:
            image_sizes: List of `(height, width)`, in pixels.
        """
        if image_sizes is None:
            return MultiModalData()
        counts = [
            self.num_image_tokens(*self.processed_size(*size))
            if self.num_query_tokens is None
            else self.num_query_tokens
            for size in image_sizes
        ]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    # ------------------------------------------------------------------ saving

    def save_pretrained(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, with_code: bool = False, **kwargs
    ):
        """Save the processor.

        Args:
            save_directory: Folder to write to: the model's, or one of its own.
            push_to_hub: Upload the folder afterwards; `repo_id` defaults to its name.
            with_code: Write the code too, so that transformers alone loads it with `trust_remote_code=True`.
            kwargs: Those of `push_folder`, and as for every processor.

        Returns:
            Paths of the files with settings.
        """
        hub = take_push_options(kwargs)
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        files = super().save_pretrained(os.fspath(save_directory), **kwargs)
        if with_code:
            publisher("with_code").add_code(Path(save_directory), type(self))
        if push_to_hub:
            publisher("push_to_hub").upload(
                Path(save_directory), repo_id, **{"commit_message": "Upload processor", **hub}
            )
        return files

    def push_to_hub(self, repo_id: str, *, with_code: bool = False, **kwargs):
        """Upload the processor in one commit; to upload it with its model: `model.push_to_hub(..., processor=processor)`.

        Args:
            repo_id: `name` or `owner/name`; the repository is made if it is not there.
            with_code: As for `save_pretrained`.
            kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message` and `commit_description`, as for
                `push_folder`.

        Returns:
            The commit.
        """
        hub = take_push_options(kwargs)
        if kwargs:
            raise TypeError(f"push_to_hub has no argument {', '.join(sorted(kwargs))}.")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, with_code=with_code)
            return publisher("push_to_hub").upload(
                Path(folder), repo_id, **{"commit_message": "Upload processor", **hub}
            )


__all__ = ["BridgedProcessor"]
