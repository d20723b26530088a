"""From records of a data set to model inputs with labels, for every family and every stage.

`encoder_for(model, processor, ...)` gives the encoder that belongs to a model. `encode(record)` makes what the
processor gives for ONE sample, without a batch dimension:

    input_ids (tokens,)   labels (tokens,), -100 where nothing is learned   pixel_values (num_images, ...)
    and the family's other image arguments

and `collate(samples)` makes a batch of several, padded on the right. A row of the batch gives what it gives alone.

A record has `id`, `images`, and exactly one of

    caption     one text about one image
    messages    a conversation in the chat format, with `{"type": "image"}` where an image stands
    document    a list of `{"type": "image"}` and `{"type": "text", "text": ...}`

What is learned, and where that comes from:

- MLP-LLaVA: a caption that follows the image alone (`preprocess_plain` in LLaVA's `llava/train/train.py`); in
  conversations the assistant's words (`preprocess_v1` there).
- Q-Former BLIP-2: the caption after the prompt, which is not learned (LAVIS' `blip2_opt.py`,
  `blip2_vicuna_instruct.py`); encoder-decoders read the prompt and write the caption (`blip2_t5.py`).
- Perceiver-Flamingo: pairs as `<image>caption<|endofchunk|>`; documents with a `<|endofchunk|>` before every image but
  the first, and nothing before the first image; never `<image>` itself (OpenFlamingo's
  `open_flamingo/train/{data,train_utils}.py`).
- Stage 1 of Q-Former BLIP-2: image and caption (LAVIS' `blip2_qformer.py`).
- Image classification: the class in `label`; `notes` are for a warm-up in stage 1, as captions.
"""

from __future__ import annotations

import re
import zlib

import torch

from ..configuration.configuration_bridged import BridgedConfig
from ..configuration.configuration_classification import ClassificationConfigMixin
from ..modeling import BridgedModel
from ..processing.processing_llava import CONVERSATIONS
from .training_encoder import IGNORED, Encoder, SampleError, Span, checked_kind, text_of
from .training_images import PreparedImage


class MLPLlavaEncoder(Encoder):
    """Captions after an image alone, and conversations."""

    default_end = "\n"  # LLaVA's "plain" separator; turns of stage 2 have other ends
    caption_end_stops = False

    def template_of(self, conversation: str) -> str:
        """The chat template of a named conversation.

        Args:
            conversation: A name from `CONVERSATIONS`.

        Raises:
            ValueError: There is no conversation of this name.
        """
        if conversation not in CONVERSATIONS:
            raise ValueError(f"conversation is {conversation!r}; expected one of {', '.join(CONVERSATIONS)}.")
        image = "<im_start><image><im_end>" if self.processor.mm_use_im_start_end else "<image>"
        return self.processor.build_chat_template(self.tokenizer, CONVERSATIONS[conversation], image)

    def tokens_per_image(self, sample: dict, num_images: int) -> list[int]:
        """Number of image tokens of each image; with any-resolution tiling it depends on the image's size."""
        if "image_sizes" in sample:
            return [self.processor.num_image_tokens(*size) for size in sample["image_sizes"].tolist()]
        return super().tokens_per_image(sample, num_images)

    def with_images(self, sample: dict, kept: int) -> dict[str, torch.Tensor]:
        """The sample with its first `kept` images: with any-resolution tiling, all tiles of each."""
        if "image_sizes" in sample and kept:
            tiles = self.processor.num_multimodal_tokens(sample["image_sizes"].tolist()).num_image_patches
            name = "patch_features" if "patch_features" in sample else "pixel_values"
            sample[name] = sample[name][: sum(tiles[:kept])]
            sample["image_sizes"] = sample["image_sizes"][:kept]
            return sample
        return super().with_images(sample, kept)


class QFormerBlip2Encoder(Encoder):
    """Captions after a prompt; conversations and, for an instruction-aware Q-Former, their questions."""

    def answer_spans(self, messages: list[dict]) -> tuple[str, list[Span]]:
        """The answers of a conversation; if its template does not end the last one, it ends as captions do.

        Source: `blip2_vicuna_instruct.py`: answers end with the end of sequence.
        """
        text, spans = super().answer_spans(messages)
        if spans and not text[: spans[-1][1]].endswith((self.end, *self.end_of_turn)):
            start, end = spans[-1]
            text, spans[-1] = text[:end] + self.end, (start, end + len(self.end))
        return text, spans


class PerceiverFlamingoEncoder(Encoder):
    """Pairs and interleaved documents as chunks, each an image and the text that belongs to it."""

    chunk_end = "<|endofchunk|>"

    def ended(self, text: str) -> str:
        """A text with the end of its chunk and the end of the sequence."""
        return text + self.chunk_end + self.end

    def document_text(self, record: dict) -> tuple[str, list[Span]]:
        """A document as text, with the end of the chunk before every image but the first.

        Args:
            record: The record, with `document`.

        Returns:
            The text, and what is learned of it, in characters: everything from the first image to the last chunk's end.
        """
        parts = [
            f"{self.chunk_end}{self.image_token}" if item["type"] == "image" else item["text"].strip()
            for item in record["document"]
        ]
        text = " ".join(part for part in parts if part).replace(self.chunk_end, "", 1)
        text = re.sub(rf"\s*({re.escape(self.chunk_end)}|{re.escape(self.image_token)})\s*", r"\1", self.ended(text))
        # nothing before the first image, nor after the last chunk
        return text, [(max(text.find(self.image_token), 0), len(text) - len(self.end))]


class Stage1Encoder(Encoder):
    """Pairs for stage 1 of Q-Former BLIP-2: the objectives make their own labels."""

    def __init__(self, processor, model, *, prompt: str = "", end=None, max_length=None, seed=0, **others):
        if given := [name for name, value in {"end": end, **others}.items() if value]:
            raise ValueError(
                f"stage 1 has no option {', '.join(given)}: the Q-Former's texts begin and end by themselves."
            )
        self.processor, self.tokenizer, self.prompt = processor, processor.tokenizer, prompt
        self.max_length = processor.max_length if max_length is None else max_length
        self.seed, self.end, self.is_encoder_decoder = seed, "", False
        self.image_arguments = ["pixel_values", "image_ids"]

    def encode(self, record: dict, images: list[PreparedImage] | None = None) -> dict[str, torch.Tensor]:
        """Model inputs of one record, without a batch dimension.

        Args:
            record: The record, with a caption and one image.
            images: The image, if it is prepared already.

        Returns:
            `input_ids`, `(tokens,)`; `pixel_values` or `patch_features`, `(1, ...)`; and `image_ids`, `(1,)`, the same
            number for captions that are the same word for word.

        Raises:
            SampleError: The record has no caption.
            vlbridge.images.ImageError: The image can't be read.
        """
        if (kind := checked_kind(record)) != "caption":
            raise SampleError(f"stage 1 learns from captions, the record has {kind}")
        text = self.prompt + record["caption"].strip()
        inputs = self.processor(text=[text], max_length=self.max_length, return_tensors="pt")
        # captions that are the same word for word are no negatives of each other
        image_id = zlib.crc32(" ".join(record["caption"].lower().split()).encode())
        return {
            "input_ids": inputs["input_ids"][0],
            **self.image_inputs_of(record, images),
            "image_ids": torch.tensor([image_id]),
        }

    __call__ = encode

    def prompts(self, records: list[dict]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Inputs for `generate`, and the captions.

        Args:
            records: The records.

        Returns:
            `pixel_values`, `(num_images, channels, height, width)`, and the caption of each record.
        """
        images = [image for record in records for image in self.images_of(record)]
        inputs = self.processor.image_processor(images, return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"]}, [record["caption"].strip() for record in records]

    def generation_options(self, model: BridgedModel, max_new_tokens: int) -> dict:
        """Options of `generate` for greedy captions of at most `max_new_tokens` tokens."""
        return {"do_sample": False, "num_beams": 1, "min_length": 0, "max_length": max_new_tokens + 1}

    def decode(self, generated: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[str]:
        """The captions in generated tokens, `(batch, tokens)`."""
        return [text.strip() for text in self.tokenizer.batch_decode(generated, skip_special_tokens=True)]

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """A batch of samples, `input_ids` padded on the right; it has no `labels`."""
        batch = super().collate([{**sample, "labels": sample["input_ids"]} for sample in samples])
        batch.pop("labels")
        return batch


class ClassificationEncoder(Encoder):
    """Images and the number of their class, in `label`. What a model generates for an image is its class's name."""

    caption_end_stops = False  # there are no captions

    def __init__(self, processor, model, *, prompt="", end=None, max_length=None, seed=0, **others):
        options = {"prompt": prompt, "end": end, "max_length": max_length, **others}
        if given := [name for name, value in options.items() if value]:
            raise ValueError(f"image classification has no option {', '.join(given)}: it reads no text.")
        if model.config.problem_type not in (None, "single_label_classification"):
            raise ValueError(f"problem_type is {model.config.problem_type!r}; records have one class each.")
        self.processor, self.config = processor, model.config
        self.image_arguments = ["pixel_values"]

    @property
    def names(self) -> dict[int, str]:
        """The classes' names, by number."""
        return self.config.id2label

    def check_records(self, records) -> None:
        """Refuse classes with other names or in another order than the model's. A model without names gets the data's.

        Args:
            records: The data set.

        Raises:
            ValueError: The classes differ.
        """
        names = getattr((getattr(records, "features", None) or {}).get("label"), "names", None)
        if names is None:
            return
        unnamed = all(name == f"LABEL_{number}" for number, name in self.names.items())
        if unnamed and len(names) == len(self.names):
            self.config.id2label = dict(enumerate(names))
            self.config.label2id = {name: number for number, name in enumerate(names)}
        if dict(enumerate(names)) != self.names:
            raise ValueError(
                f"the data's classes are {', '.join(names)}; the model's {', '.join(self.names.values())}. Give the "
                "data's in id2label, in their order."
            )

    def encode(self, record: dict, images: list[PreparedImage] | None = None) -> dict[str, torch.Tensor]:
        """Model inputs of one record.

        Args:
            record: The record, with one image and a `label`.
            images: The image, if it is prepared already.

        Returns:
            `pixel_values` or `patch_features`, `(1, ...)`, and `labels`, the number of the class, `()`.

        Raises:
            SampleError: The record has no label or not exactly one image, or the model has no such class.
            vlbridge.images.ImageError: The image can't be read.
        """
        label, num_images = record.get("label"), len(record.get("images") or [])
        if label is None or num_images != 1:
            raise SampleError(f"expected one image with a label; the record has {num_images} and the label {label}")
        if not isinstance(label, int) or label not in self.names:
            raise SampleError(f"label is {label}; expected 0 to {len(self.names) - 1}")
        return {**self.image_inputs_of(record, images), "labels": torch.tensor(label)}

    __call__ = encode

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """A batch of samples: `labels`, `(batch,)`, and `pixel_values` or `patch_features`, `(batch, ...)`."""
        batch = {"labels": torch.stack([sample["labels"] for sample in samples])}
        for name in ("patch_features", "pixel_values"):
            if given := [sample[name] for sample in samples if name in sample]:
                batch[name] = torch.cat(given)
        return batch

    def prompts(self, records: list[dict]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Model inputs of records, and the names of their classes.

        Args:
            records: The records.

        Returns:
            `pixel_values`, `(num_images, channels, height, width)`, and the name of each record's class.
        """
        samples = self.collate([self.encode(record) for record in records])
        return {"pixel_values": samples["pixel_values"]}, [self.names[label] for label in samples["labels"].tolist()]

    def answers(self, model: BridgedModel, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
        """The name of the likeliest class of each image; `max_new_tokens` is not used."""
        return [self.names[label] for label in model(**inputs).logits.argmax(dim=-1).tolist()]


# Families that are not listed take `Encoder`, all classifiers `ClassificationEncoder`.
ENCODERS: dict[str, type[Encoder]] = {
    "mlp_llava": MLPLlavaEncoder,
    "qformer_blip2": QFormerBlip2Encoder,
    "perceiver_flamingo": PerceiverFlamingoEncoder,
    "qformer_blip2_pretraining": Stage1Encoder,
}


def encoder_for(model: BridgedModel, processor, **options) -> Encoder:
    """The encoder that belongs to a model.

    Args:
        model: A bridged model, stage 1 of Q-Former BLIP-2 or a classifier; it may be wrapped by PEFT.
        processor: Its processor.
        options: Options of `Encoder`.

    Raises:
        ValueError: There is no encoder for the model, or the model has no use for an option.
    """
    config = model.config
    if not isinstance(config, BridgedConfig):
        raise ValueError(
            f"model_type is {config.model_type!r}; expected a bridged model, such as {', '.join(ENCODERS)}."
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    default = ClassificationEncoder if isinstance(config, ClassificationConfigMixin) else Encoder
    return ENCODERS.get(config.model_type, default)(processor, base, **options)


__all__ = [
    "ENCODERS",
    "IGNORED",
    "ClassificationEncoder",
    "Encoder",
    "MLPLlavaEncoder",
    "PerceiverFlamingoEncoder",
    "QFormerBlip2Encoder",
    "SampleError",
    "Stage1Encoder",
    "checked_kind",
    "encoder_for",
    "text_of",
]
