"""Few-shot prompts for the engine in `few_shot`: images are encoded once, and a common prefix is run once.

`ImageCache` keeps encoded images, by their content. `PromptMaker` makes prompts of demonstrations and queries, with the
ids that the processor would give, without processing an image again. A `Prefix` holds the language model's cache of
tokens that many prompts begin with; `continued` puts the prompts' other tokens behind it.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from .compat import cache_of
from .compat_hooks import process_images
from .files import sha256_of
from .modeling import BridgedModel
from .processing.processing_inputs import is_list, pictures


CACHE_BYTES = 1 << 30  # encoded images that are kept, in bytes
# Settings of a tokenizer that a processor passes on to it
TOKENIZER_OPTIONS = ("add_special_tokens", "truncation", "max_length", "stride")


def image_key(image) -> str:
    """Name of an image: the hash of its file, its pixels, or its address.

    Args:
        image: A picture of Pillow, an array or tensor, a file or an address; or a list of them, a video.

    Raises:
        ValueError: It is none of them.
    """
    if is_list(image):
        return hashlib.sha256("|".join(map(image_key, image)).encode()).hexdigest()
    if isinstance(image, Image.Image):
        digest = hashlib.sha256(f"{image.mode}|{image.size}|{image.getpalette()}|{image.getexif().tobytes()}|".encode())
        digest.update(image.tobytes())
        return digest.hexdigest()
    if isinstance(image, (np.ndarray, torch.Tensor)):
        values = image.detach().cpu().float().numpy() if isinstance(image, torch.Tensor) else image
        digest = hashlib.sha256(f"{type(image).__name__}|{image.dtype}|{tuple(image.shape)}|".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
        return digest.hexdigest()
    if isinstance(image, (str, os.PathLike)):
        if len(place := os.fspath(image)) < 4096 and os.path.isfile(place):
            return sha256_of(place)
        return hashlib.sha256(place.encode()).hexdigest()
    raise ValueError(
        f"An image is a {type(image).__name__}; expected one of Pillow, an array or tensor, a file or an address."
    )


# ---------------------------------------------------------------------- encoded images


@dataclass(eq=False)
class EncodedImage:
    """An image after the vision encoder. It may stand in a demonstration or query in place of the picture.

    Args:
        replacement: The text that stands for it in the prompt: its placeholders.
        num_placeholders: Number of placeholders in it.
        features: `(num_image_tokens, text_dim)`, its visual tokens; `(num_patches, vision_dim)`, its patch features, if
            the visual tokens depend on the prompt.
    """

    replacement: str
    num_placeholders: int
    features: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Size of the features, in bytes."""
        return self.features.numel() * self.features.element_size()


class ImageCache:
    """Encoded images by their content, so that a picture that occurs several times is encoded once.

    It belongs to the model as it is: after a change of the encoder or the bridge, make a new one.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        max_bytes: Size of the features that are kept, in bytes; the images that were used last stay.
        batch_size: Number of images that the vision encoder gets at a time.
        max_images: Number of images that are kept; `None` for as many as `max_bytes` allows.
    """

    def __init__(
        self,
        model: BridgedModel,
        processor,
        max_bytes: int = CACHE_BYTES,
        batch_size: int = 16,
        max_images: int | None = None,
    ):
        self.model, self.processor = model, processor
        self.max_bytes, self.batch_size, self.max_images = max_bytes, batch_size, max_images
        self.num_encoded = 0  # images that went through the encoder so far
        self._kept: OrderedDict[str, EncodedImage] = OrderedDict()
        self._num_bytes = 0

    @property
    def reads_instructions(self) -> bool:
        """Whether an image's visual tokens depend on its prompt: an instruction-aware Q-Former reads it."""
        return getattr(self.processor, "qformer_tokenizer", None) is not None

    @torch.no_grad()
    def encode(self, images: Iterable) -> list[EncodedImage]:
        """Encode images; those that are known, or encoded already, are not encoded again.

        Args:
            images: Pictures of any kind that the processor takes; lists of them are videos.

        Raises:
            ValueError: One of them can't be read, or is a video and the model takes none.
        """
        images = list(images)
        keys = [id(image) if isinstance(image, EncodedImage) else image_key(image) for image in images]
        found, missing = {}, {}
        for key, image in zip(keys, images):
            if isinstance(image, EncodedImage):
                found[key] = image
            elif key in self._kept:
                self._kept.move_to_end(key)
                found[key] = self._kept[key]
            else:
                missing[key] = image
        alike: dict[tuple, list[tuple]] = {}  # images that fit into one tensor
        for key, image in missing.items():
            inputs, replacement = self._processed(image)
            shape = tuple((name, tensor.shape[1:], tensor.dtype) for name, tensor in sorted(inputs.items()))
            alike.setdefault(shape, []).append((key, inputs, replacement))
        for group in alike.values():
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                features = self._features([inputs for _, inputs, _ in batch])
                for (key, _, replacement), of_image in zip(batch, features):
                    count = replacement.count(self.processor.image_token)
                    found[key] = EncodedImage(replacement, count, of_image.clone())
                    self._keep(key, found[key])
        return [found[key] for key in keys]

    def _processed(self, image) -> tuple[dict[str, torch.Tensor], str]:
        """Model inputs of one image, and the text that stands for it."""
        frames = list(image) if is_list(image) else [image]
        if is_list(image) and not (self.processor.takes_videos and frames):
            raise ValueError(
                "An image is a video without frames."
                if self.processor.takes_videos
                else "An image is a list, which stands for a video; this model takes no videos."
            )
        frames = pictures(frames, self.processor.image_processor, {})
        inputs, replacements = process_images(self.processor, frames, return_tensors="pt")
        given = {name: torch.as_tensor(inputs[name]) for name in self.model.image_arguments if name in inputs}
        if is_list(image):
            given["pixel_values"] = given["pixel_values"][None]  # (1, num_frames, channels, height, width)
        return given, replacements[0]

    def _features(self, images: list[dict[str, torch.Tensor]]) -> Sequence[torch.Tensor]:
        """Features of images whose inputs have equal shapes, one tensor per image."""
        self.num_encoded += len(images)
        device = self.model.device
        inputs = {name: torch.cat([image[name] for image in images]).to(device) for name in images[0]}
        if self.reads_instructions:
            return self.model.get_patch_features(inputs["pixel_values"])
        return self.model.get_image_features(**inputs, return_dict=True).pooler_output

    def _keep(self, key: str, image: EncodedImage) -> None:
        self._kept[key] = image
        self._num_bytes += image.num_bytes
        most = len(self._kept) if self.max_images is None else self.max_images
        while self._kept and (self._num_bytes > self.max_bytes or len(self._kept) > most):
            self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes


# ---------------------------------------------------------------------- prompts


@dataclass(eq=False)
class Prompt:
    """A prompt with demonstrations and a query.

    Args:
        template: Its text with one image token per image.
        text: Its text with all placeholders.
        ids: The ids of `text`.
        images: Its images.
    """

    template: str
    text: str
    ids: list[int]
    images: list[EncodedImage]


def without_pictures(demonstrations: Iterable[dict]) -> list[dict]:
    """Demonstrations as text only."""
    return [{name: value for name, value in shown.items() if name != "image"} for shown in demonstrations]


class PromptMaker:
    """Makes prompts and model inputs of demonstrations and queries.

    Args:
        images: The encoded images, of the model and the processor that the prompts are for.
    """

    def __init__(self, images: ImageCache):
        self.images, self.model, self.processor = images, images.model, images.processor
        known = self.processor.tokenizer.init_kwargs
        self._options = {
            name: getattr(self.processor.tokenizer, name, known[name]) for name in TOKENIZER_OPTIONS if name in known
        }
        self._head: tuple[str, list[int]] | None = None  # the beginning of the last prompts, and its ids

    def make(self, demonstrations: Sequence[Sequence[dict]], queries: Sequence[dict]) -> list[Prompt]:
        """Make a prompt per query, with the ids of `processor.few_shot`.

        Args:
            demonstrations: A list of demonstrations per query, see `BridgedProcessor.few_shot`.
            queries: The queries.

        Raises:
            ValueError: A demonstration or query can't be read.
        """
        shown = [list(each) for each in demonstrations]
        return self.of_templates(*self.processor.few_shot(shown, list(queries), tokenize=False))

    def of_templates(self, templates: Sequence[str], pictures_of: Sequence[Sequence]) -> list[Prompt]:
        """Make prompts of texts, with the ids of the processor's call.

        Args:
            templates: Texts with one image token per image, such as chat templates write.
            pictures_of: The images of each text.

        Raises:
            ValueError: An image can't be read.
        """
        encoded = iter(self.images.encode([image for images in pictures_of for image in images]))
        images = [[next(encoded) for _ in each] for each in pictures_of]
        replacements = [image.replacement for each in images for image in each]
        texts, _ = self.processor.get_text_with_replacements(list(templates), replacements)
        return list(map(Prompt, templates, texts, self._ids(texts), images))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts; what they share up to their last image, which is most of them, is tokenized once."""
        places = [max(text.rfind(self.processor.image_token), 0) for text in texts]
        heads = {text[:place] for text, place in zip(texts, places)}
        if len(heads) > 1 or not all(places):
            return self.tokenize(texts)
        (head,) = heads
        tails = self.tokenize([text[len(head) :] for text in texts], add_special_tokens=False)
        if self._head is None or self._head[0] != head:
            ids = self.tokenize(texts[:1])[0]
            if ids[-len(tails[0]) :] != tails[0]:  # this tokenizer reads a part in another way
                return self.tokenize(texts)
            self._head = (head, ids[: -len(tails[0])])
        return [self._head[1] + tail for tail in tails]

    def tokenize(self, texts: list[str], **options) -> list[list[int]]:
        """Ids of texts with all placeholders, as the processor's call makes them.

        Args:
            texts: The texts.
            options: Arguments of the tokenizer.
        """
        tokenizer = self.processor.tokenizer
        begin = tokenizer.bos_token
        if begin and all(text.startswith(begin) for text in texts):  # written by the chat template
            options.setdefault("add_special_tokens", False)
        return tokenizer(texts, **{**self._options, **options})["input_ids"] if texts else []

    def image_inputs(self, prompts: Sequence[Prompt], skip: int = 0) -> dict:
        """Arguments of `generate` and `forward` for the images of a batch.

        Args:
            prompts: The batch.
            skip: Number of first images of every prompt that are left out, because a prefix has them.
        """
        features = [image.features for prompt in prompts for image in prompt.images[skip:]]
        if not features:
            return {}
        if self.images.reads_instructions:
            # As `QFormerBlip2Processor` does it: every image with the text of its prompt
            encoded = self.processor.qformer_tokenizer(
                self.processor.instructions([prompt.template for prompt in prompts]),
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=self.processor.qformer_max_length,
                return_tensors="pt",
            ).to(self.model.device)
            return {
                "patch_features": torch.stack(features),
                "qformer_input_ids": encoded["input_ids"],
                "qformer_attention_mask": encoded["attention_mask"],
            }
        same = all(each.shape == features[0].shape for each in features)
        encoded = BaseModelOutputWithPooling(pooler_output=torch.stack(features) if same else features)
        return {"mm_encoder_outputs": {"image": encoded}}

    def padded(self, rows: Sequence[Sequence[int]], left: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids `(batch, tokens)` of rows that are padded, and their attention mask.

        Args:
            rows: Ids of every row.
            left: Whether the padding comes first.
        """
        pad, width = self.processor.tokenizer.pad_token_id or 0, max(map(len, rows))
        ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(len(row))
            ids[number, place] = torch.tensor(row, dtype=ids.dtype)
            mask[number, place] = 1
        return ids.to(self.model.device), mask.to(self.model.device)


def whole_prompts(maker: PromptMaker, prompts: Sequence[Prompt]) -> tuple[dict, dict]:
    """Model inputs of whole prompts, padded on the left: tokens, and images that are encoded already."""
    ids, mask = maker.padded([prompt.ids for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}, maker.image_inputs(prompts)


# ---------------------------------------------------------------------- common prefixes


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Number of ids that two sequences begin with."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(place for place in range(shorter) if first[place] != second[place])


def is_plain(cache: Cache | None) -> bool:
    """Whether a cache holds every token in its place, so that it can be copied and continued with padding between."""
    return type(cache) is DynamicCache and all(type(layer) is DynamicLayer for layer in cache.layers)


def select_rows(cache: Cache, rows: torch.Tensor) -> DynamicCache:
    """A new cache with some rows of another one, which stays as it is.

    Args:
        cache: A cache that `is_plain` accepts.
        rows: Indices of rows; each may occur several times.
    """
    selected = DynamicCache()
    for index, layer in enumerate(cache.layers):
        if layer.keys.shape[0] == 1:  # copied when it is added
            states = (each.expand(len(rows), -1, -1, -1) for each in (layer.keys, layer.values))
        else:
            states = (each.index_select(0, rows.to(each.device)) for each in (layer.keys, layer.values))
        selected.update(*states, index)
    return selected


def select_states(states: ModelOutput | None, rows: torch.Tensor, num_rows: int) -> ModelOutput | None:
    """Some rows of the conditioning of a batch; `None` stays `None`.

    Args:
        states: The `visual_states` of a batch.
        rows: Indices of rows; each may occur several times.
        num_rows: Number of rows of the batch, which may share the states of one row.
    """
    if states is None:
        return None

    def of_rows(value):
        return tuple(map(of_rows, value)) if isinstance(value, tuple) else value.index_select(0, rows.to(value.device))

    return type(states)(**{name: of_rows(value) for name, value in states.repeat_to(num_rows).items()})


class Prefix:
    """Tokens that prompts begin with, after they went through the model.

    Args:
        ids: The ids.
        num_images: Number of images among them.
        cache: The language model's cache of them, of one row.
        visual_states: The conditioning that later tokens can see; `None` for families without.
    """

    def __init__(self, ids: list[int], num_images: int, cache: Cache, visual_states: ModelOutput | None):
        self.ids, self.num_images, self.cache, self.visual_states = ids, num_images, cache, visual_states

    @classmethod
    @torch.no_grad()
    def run(cls, maker: PromptMaker, ids: list[int], images: list[EncodedImage]) -> Prefix | None:
        """Run a prefix once.

        Args:
            maker: Maker of the prompts.
            ids: The ids; an image that is not complete is left out, and what follows it.
            images: The images of the prompts that begin with them.

        Returns:
            The prefix; `None` if nothing is left, or if this model's cache can't be continued by several prompts
            (sliding windows and recurrent layers forget).
        """
        model = maker.model
        places = [place for place, token in enumerate(ids) if token == model.config.image_token_id]
        used = num_images = 0
        for image in images:
            if used + image.num_placeholders > len(places):
                ids = ids[: places[used]] if used < len(places) else ids
                break
            used, num_images = used + image.num_placeholders, num_images + 1
        if not ids:
            return None
        rows, mask = maker.padded([ids])
        part = Prompt("", "", ids, images[:num_images])
        outputs = model(
            input_ids=rows, attention_mask=mask, use_cache=True, logits_to_keep=1, **maker.image_inputs([part])
        )
        cache = cache_of(outputs)
        if not is_plain(cache):
            return None
        return cls(ids, num_images, cache, later_states(model, outputs.visual_states))

    def begins(self, ids: Sequence[int]) -> bool:
        """Whether a prompt begins with this prefix, and continues after it."""
        return len(ids) > len(self.ids) and ids[: len(self.ids)] == self.ids

    def continued(self, maker: PromptMaker, rows: Sequence[Sequence[int]], copies: int = 1) -> tuple[dict, dict]:
        """Model inputs of prompts that begin with this prefix, for the tokens that follow it.

        Padding stands between the prefix and shorter continuations.

        Args:
            maker: Maker of the prompts.
            rows: Ids of the prompts, the prefix included.
            copies: Number of rows in the cache for each prompt: its beams.

        Returns:
            `input_ids` `(batch, tokens)` and `attention_mask` of the whole prompts, the padding included; and the
            arguments that hold what was run already.
        """
        length = len(self.ids)
        ids, mask = maker.padded([row[length:] for row in rows])
        first = torch.tensor(self.ids, device=ids.device).expand(len(rows), -1)
        whole = {
            "input_ids": torch.cat([first, ids], dim=1),
            "attention_mask": torch.cat([torch.ones_like(first), mask], dim=1),
        }
        known = {"cache": select_rows(self.cache, torch.zeros(len(rows) * copies, dtype=torch.long))}
        if self.visual_states is not None:
            known["visual_states"] = self.visual_states
        return whole, known


def later_states(model: BridgedModel, visual_states: ModelOutput | None) -> ModelOutput | None:
    """The part of a prompt's conditioning that tokens behind it can see."""
    return model.visual_states_for_generation(None, None, visual_states).decoding


__all__ = [
    "CACHE_BYTES",
    "EncodedImage",
    "ImageCache",
    "Prefix",
    "Prompt",
    "PromptMaker",
    "common_length",
    "image_key",
    "is_plain",
    "later_states",
    "select_rows",
    "select_states",
    "whole_prompts",
    "without_pictures",
]
