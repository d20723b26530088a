"""Base of the three families' processors: one `<image>` per image in, the right number of placeholders out."""

from __future__ import annotations

import os
import re
import tempfile
import threading
from pathlib import Path
from typing import ClassVar

from huggingface_hub import CommitInfo
from transformers import BaseImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from ..compat import MultiModalData, get_image_size
from ..compat_hooks import ProcessorHooks
from ..configuration.configuration_bridged import BridgedConfig, num_patches
from ..extensions import publisher, take_push_options
from .processing_backends import KeepsBackend, as_described
from .processing_inputs import check_contents, is_list, pictures, pictures_of_texts, rows_of


# Joins lists of text and images to strings, which is what a language model's own template expects.
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
{%- else -%}
{{ raise_exception("A message has content of type '" ~ item.type ~ "'; expected 'text' or 'image'.") }}
{%- endif -%}
{%- endfor -%}
{%- set flat.messages = flat.messages + [dict(message, content=content.text)] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""

# A turn of ChatML as most templates write it: the role, the words and the end of the turn in one expression
CHATML_TURN = re.compile(
    r"""\{\{(?P<left>-?)\s*['"]<\|im_start\|>['"]\s*\+\s*(?P<role>message(?:\.role|\[['"]role['"]\]))"""
    r"""\s*\+\s*(?P<line>['"](?:\n|\\n)['"])\s*\+\s*(?P<words>message(?:\.content|\[['"]content['"]\])(?:\s*\|\s*trim)?)"""
    r"""\s*\+\s*['"]<\|im_end\|>(?:['"]\s*\+\s*['"])?(?:\n|\\n)['"]\s*(?P<right>-?)\}\}"""
)


def mark_answers(template: str) -> str:
    """Put `{% generation %}` around the assistant's words and the end of its turn, in templates that write ChatML.

    What the template writes stays the same. Templates that have such markers, or write turns in another way, are
    returned as they are.

    Args:
        template: A Jinja template.
    """
    if re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return template

    def marked(turn: re.Match) -> str:
        words = f"{turn['words']} + '<|im_end|>'"
        return (
            f"{{{{{turn['left']} '<|im_start|>' + {turn['role']} + {turn['line']} }}}}"
            f"{{%- if {turn['role']} == 'assistant' -%}}"
            f"{{% generation %}}{{{{ {words} }}}}{{% endgeneration %}}"
            f"{{%- else -%}}{{{{ {words} }}}}{{%- endif -%}}"
            f"{{{{ {turn['line']} {turn['right']}}}}}"
        )

    return CHATML_TURN.sub(marked, template)


# Its `templated` is true while this thread applies a chat template, which has put the images in their places
_call = threading.local()

TURN_KEYS = ("image", "caption", "question", "answer")


def _checked_turn(turn: dict, name: str, answered: bool = True) -> dict:
    """Check a demonstration or query, and bring it into one form: `image`, `question` (not for captions) and `answer`.

    Raises:
        ValueError: A key is missing, unknown or contradicts another one.
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


class BridgedProcessor(KeepsBackend, ProcessorHooks, ProcessorMixin):
    """Images and text to model inputs.

    Args:
        image_processor: The vision encoder's image processor; with `image_backend` or `crop_rounding`, see
            `vlbridge.processing.processing_backends`, it is replaced by one that computes so.
        tokenizer: The language model's tokenizer; it must know `image_token`.
        chat_template: Jinja template; `None` builds one from the tokenizer's template, or from the family's plain one.
        image_token: Placeholder that stands for one image in the text.
        patch_size: Side of one patch, in pixels.
        num_prefix_tokens: Tokens before the patches (CLS, registers).
        vision_layout: `"sequence"` or `"grid"`, see `BridgedConfig`.
        vision_feature_select_strategy: `"patch"` or `"full"`, see `BridgedConfig`.
        num_query_tokens: Visual tokens per image, for families in which the image's size does not matter.
        image_size: Side of the images that the vision encoder was trained on, in pixels.
        caption_prompt: Prompt that asks for a caption.

    Raises:
        ValueError: The tokenizer does not know `image_token` as one token.
    """

    # Whether an image may be a video, a list of frames
    takes_videos: ClassVar[bool] = False
    # Text that the family puts between an image and the text that follows it
    image_separator: ClassVar[str] = ""
    # Template for language models that have none
    plain_chat_template: ClassVar[str] = (
        "{%- for message in messages -%}"
        "{%- if message.role == 'assistant' -%}"
        "{{ ' ' }}{% generation %}{{ message.content }}{% endgeneration %}{{ '\\n' }}"
        "{%- else -%}{{ message.content }}{%- endif -%}"
        "{%- endfor -%}"
    )
    default_caption_prompt: ClassVar[str] = "Describe the image briefly."
    # Arguments of the class that `compose` accepts and passes on
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
                f"The tokenizer splits {image_token!r} into {len(ids)} tokens; it must be one special token. Add it "
                f"with tokenizer.add_special_tokens({{'extra_special_tokens': [{image_token!r}]}}), or use "
                "vlbridge.compose()."
            )
        self.image_token_id = ids[0]
        # LLaMA's tokenizer does not save `legacy` (transformers 5.23), and would tokenize differently after reloading.
        if isinstance(getattr(tokenizer, "legacy", None), bool):
            tokenizer.init_kwargs["legacy"] = tokenizer.legacy
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens
        self.vision_layout = vision_layout
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_query_tokens = num_query_tokens
        self.image_size = image_size
        self.caption_prompt = caption_prompt or self.default_caption_prompt
        super().__init__(
            as_described(image_processor),
            tokenizer,
            chat_template=chat_template or self.build_chat_template(tokenizer),
        )

    @classmethod
    def from_config(
        cls, config: BridgedConfig, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase, **kwargs
    ) -> BridgedProcessor:
        """Build the processor of a model.

        Args:
            config: The model's configuration, with its vision geometry filled in.
            image_processor: The vision encoder's image processor.
            tokenizer: The language model's tokenizer.
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
        """Fill in the fields of a new model's configuration that follow from options of the processor.

        `compose` calls this method; families without such options do nothing.

        Args:
            config: The model's configuration, with its vision geometry filled in.
            options: The `compose_options` that were given.
        """

    @staticmethod
    def query_tokens(config: BridgedConfig) -> int | None:
        """Visual tokens per image, or `None` if the number depends on the image's size.

        Here it is the configuration's `num_visual_tokens`, if it has this field.
        """
        return getattr(config, "num_visual_tokens", None)

    @classmethod
    def build_chat_template(
        cls, tokenizer: PreTrainedTokenizerBase, template: str | None = None, image: str = "<image>"
    ) -> str:
        """Extend a chat template so that it accepts images.

        Args:
            tokenizer: The language model's tokenizer.
            template: Template for messages whose content is a string; `None` takes the tokenizer's, or the family's
                plain one if the tokenizer has none.
            image: Text that stands for one image.

        Returns:
            A Jinja template. The assistant's words are marked as far as `mark_answers` can do that.
        """
        own = getattr(tokenizer, "chat_template", None)
        if template is None:
            template = own if isinstance(own, str) else cls.plain_chat_template
        return FLATTEN_CONTENT.replace("IMAGE", repr(image + cls.image_separator)) + mark_answers(template)

    def num_image_tokens(self, height: int, width: int) -> int:
        """Visual tokens that one image becomes.

        Args:
            height: Height of the image as the vision encoder receives it, in pixels.
            width: Width of the same image, in pixels.
        """
        return num_patches(self, height, width) if self.num_query_tokens is None else self.num_query_tokens

    # ------------------------------------------------------------------ calls

    def apply_chat_template(self, conversation, *args, **kwargs):
        """Write conversations in the language model's format; see transformers' `ProcessorMixin.apply_chat_template`.

        Args:
            conversation: A list of messages, or a list of such lists. Contents are texts and images.
            *args: As for `ProcessorMixin`.
            **kwargs: As for `ProcessorMixin`.

        Raises:
            ValueError: A message holds something else than text and images, or not one image per placeholder.
        """
        check_contents(conversation)
        before, _call.templated = getattr(_call, "templated", False), True
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        finally:
            _call.templated = before

    def text_with_images(self, text: str, num_images: int) -> str:
        """Put images in the place that the family's official code gives them: before the text.

        Args:
            text: Text without placeholders.
            num_images: Number of images, at least one.

        Returns:
            Text with one placeholder per image.
        """
        return self.image_token * num_images + text

    def lay_out(self, images, text, options: dict) -> tuple[list | None, list[str] | None]:
        """Find out which images belong to which text, and put them there if the texts don't say where they stand.

        What comes out may go in again: it stays the same.

        Args:
            images: A picture, a list of the pictures of all texts, or a list with one list per text.
            text: A text, a list of texts, or `None`, which asks for captions.
            options: Arguments of the call; those that the texts ask for are added.

        Returns:
            All images in one list, or `None`; and texts with one placeholder per image.

        Raises:
            ValueError: The numbers of images and placeholders differ, or a row without images should be captioned.
        """
        texts = [text] if isinstance(text, str) else text
        if images is None or (texts is not None and not all(isinstance(sample, str) for sample in texts)):
            return images, text
        images = pictures(images, self.image_processor, options)
        if texts is None:
            rows, nested = rows_of(images)
            rows = rows if nested else [[image] for image in rows]
            if empty := [number for number, row in enumerate(rows) if not row] or ([0] if not rows else []):
                raise ValueError(f"Row {empty[0]} of images is empty and has no text: there is nothing to caption.")
            asked = [self.caption_prompt] * len(rows)
            if "padding" not in (options.get("text_kwargs") or {}):
                options.setdefault("padding", True)
        else:
            asked = list(texts)
            counts = [sample.count(self.image_token) for sample in asked]
            rows = pictures_of_texts(images, counts, self.image_token, places=not getattr(_call, "templated", False))
        if not self.takes_videos and (lists := [n for n, row in enumerate(rows) if any(map(is_list, row))]):
            raise ValueError(f"Text {lists[0]} has a list where a picture should be; this model takes no videos.")
        laid = [
            self.text_with_images(sample, len(row)) if row and self.image_token not in sample else sample
            for sample, row in zip(asked, rows)
        ]
        if laid != asked:
            self.begin_once(laid, options)
        return [image for row in rows for image in row] or None, laid

    def begin_once(self, texts: list[str], options: dict) -> None:
        """Leave the beginning of sequence to the texts if a template has written it.

        Args:
            texts: The texts of a call.
            options: Arguments of the call; `add_special_tokens` is added.

        Raises:
            ValueError: Some texts begin with it and others don't.
        """
        begin = self.tokenizer.bos_token
        given = {**options, **(options.get("text_kwargs") or {})}
        if not begin or "add_special_tokens" in given or not any(text.startswith(begin) for text in texts):
            return
        if not all(text.startswith(begin) for text in texts):
            raise ValueError(
                f"The chat template begins texts with {begin!r}, but only texts that images were put into are in it. "
                "Call apply_chat_template for all texts, or process texts without images in a call of their own."
            )
        options["add_special_tokens"] = False

    def __call__(self, images=None, text=None, **kwargs):
        """Images and text to model inputs.

        Args:
            images: A picture, a list of the pictures of all texts, or a list with one list per text: pictures of
                Pillow, arrays, tensors, files or addresses. They are read as 8-bit RGB, transparency as white.
            text: A text or a list of texts, with one image token per image, or with none: the images are put where
                the family's official code has them then. Images alone ask for a caption with `caption_prompt`.
            kwargs: Passed on to `ProcessorMixin.__call__`.

        Raises:
            ValueError: The numbers of images and image tokens differ, in all or (for a list of lists) in one text.
        """
        images, text = self.lay_out(images, text, kwargs)
        return super().__call__(images=images, text=text, **kwargs)

    # ------------------------------------------------------------------ few-shot prompts

    def few_shot_text(self, turns: list[dict]) -> str:
        """Build the prompt of demonstrations and a query as a conversation in the language model's own format.

        Args:
            turns: Demonstrations and the query, which is last, as checked by `few_shot`.
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
    ) -> BatchFeature | tuple:
        """Build model inputs that show some examples before a query.

        Args:
            demonstrations: Examples in the order in which they are shown, each `{"image", "caption"}` or `{"image",
                "question", "answer"}`; without `"image"` an example is text only. For a batch, one list per query.
            query: `{"image"}` or `{"image", "question"}`; a list of them is a batch.
            tokenize: Whether to return model inputs, or the prompts and the images.
            kwargs: Passed on to the processor's call.

        Returns:
            Inputs of `generate`, padded and as tensors. With `tokenize=False` the prompt and the list of its images, or
            lists of both for a batch.

        Raises:
            ValueError: A key of a demonstration or query is missing, unknown or contradicts another one.
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
        if begin and all(text.startswith(begin) for text in texts):  # added by the chat template already
            options.setdefault("add_special_tokens", False)
        return self(text=texts, images=self.nest(images) if flat else None, **options)

    @staticmethod
    def nest(images: list[list]) -> list:
        """Arrange the images of a batch of prompts as the processor's call expects them."""
        return [image for sample in images for image in sample]

    def output_size(self) -> tuple[int, int] | None:
        """Height and width of the image processor's output in pixels, or `None` if they depend on the image."""
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
        """Height and width of the image processor's output for one picture, in pixels.

        Args:
            height: Height of the picture, in pixels.
            width: Width of the picture, in pixels.
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
        """Check that this processor belongs to a model.

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
                f"For {size[0]}x{size[1]} pixels the processor writes {ours} image tokens, but the model makes "
                f"{theirs} features. Use the processor that was saved with the model, or "
                "Processor.from_config(model.config, ...)."
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """See `ProcessorMixin.replace_image_token`."""
        height, width = get_image_size(image_inputs["pixel_values"][image_idx])
        return self.image_token * self.num_image_tokens(height, width)

    def get_text_with_replacements(self, text: list[str], images_replacements=(), *more, **kwargs):
        """See `ProcessorMixin.get_text_with_replacements`; raises a `ValueError` if images and placeholders differ."""
        count = sum(sample.count(self.image_token) for sample in text)
        if count != len(images_replacements):
            given = f"{len(images_replacements)} images were passed" if images_replacements else "no images were passed"
            raise ValueError(f"The number of {self.image_token} tokens in the text is {count}, but {given}.")
        return super().get_text_with_replacements(text, images_replacements, *more, **kwargs)

    def num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """Number of placeholders per image, for inference servers that allocate memory before processing.

        Args:
            image_sizes: List of `(height, width)`, in pixels.
            kwargs: Ignored.
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
    ) -> list[str]:
        """Save the processor.

        Args:
            save_directory: Folder to write to; it may be the model's.
            push_to_hub: Upload the folder afterwards; `repo_id` defaults to its name.
            with_code: Save the code too, so that transformers alone can load it with `trust_remote_code=True`.
            kwargs: Arguments of `push_folder` and of `ProcessorMixin.save_pretrained`.

        Returns:
            Paths of the configuration files that were written.
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

    def push_to_hub(self, repo_id: str, *, with_code: bool = False, **kwargs) -> CommitInfo:
        """Upload the processor in one commit.

        To upload it together with its model, call `model.push_to_hub(..., processor=processor)`.

        Args:
            repo_id: `name` or `owner/name`; the repository is created if it does not exist.
            with_code: Upload the code too, as for `save_pretrained`.
            kwargs: `private`, `token`, `revision`, `create_pr`, `commit_message` and `commit_description`, as for
                `push_folder`.

        Returns:
            The commit.

        Raises:
            TypeError: An argument is unknown.
        """
        hub = take_push_options(kwargs)
        if kwargs:
            raise TypeError(f"push_to_hub has no argument {', '.join(sorted(kwargs))}.")
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, with_code=with_code)
            return publisher("push_to_hub").upload(
                Path(folder), repo_id, **{"commit_message": "Upload processor", **hub}
            )


__all__ = ["BridgedProcessor", "mark_answers"]
