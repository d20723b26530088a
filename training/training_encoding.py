"""Records of a data set to model inputs with labels, for every family and every stage.

`encoder_for(model, processor, ...)` gives the encoder that belongs to a model. `encode(record)` makes what the processor
gives for ONE sample, without a batch dimension:

    input_ids (tokens,)   labels (tokens,), -100 where nothing is learned   pixel_values (num_images, ...)
    and the family's other image arguments

and `collate(samples)` makes a batch of several, padded on the right. A row of the batch gives what it gives alone.

A record has `id`, `images`, and exactly one of

    caption     one text about one image
    messages    a conversation in the chat format, with `{"type": "image"}` where an image stands
    document    a list of `{"type": "image"}` and `{"type": "text", "text": ...}`

What is learned, and where that comes from:

- MLP-LLaVA: of captions the caption, behind the image alone (`preprocess_plain` in LLaVA's `llava/train/train.py`); of
  conversations the assistant's words (`preprocess_v1` there).
- Q-Former BLIP-2: the caption behind the prompt, which is not learned (LAVIS' `blip2_opt.py`, `blip2_vicuna_instruct.py`);
  encoder-decoders read the prompt and write the caption (`blip2_t5.py`).
- Perceiver-Flamingo: pairs as `<image>caption<|endofchunk|>`; documents with a `<|endofchunk|>` in front of every image but
  the first, nothing before the first image; `<image>` never (OpenFlamingo's `open_flamingo/train/{data,train_utils}.py`).
- Stage 1 of Q-Former BLIP-2: image and caption (LAVIS' `blip2_qformer.py`).
- Image classification: the class in `label`; `notes` are for a warm-up in stage 1, as captions.
"""

from __future__ import annotations

import random
import re
import zlib
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from ..compat import render_jinja_template
from ..modeling import BridgedModel
from ..processing.processing_bridged import BridgedProcessor
from ..processing.processing_llava import CONVERSATIONS
from .training_records import kind_of, open_image, structure_problem


IGNORED = -100  # label of what is not learned
Span = tuple[int, int]


class SampleError(ValueError):
    """A record that can't be learned from: it is counted and left out, see the trainer's data sets."""


def checked_kind(record: dict) -> str:
    """What a record is: `"caption"`, `"messages"` or `"document"`.

    Raises:
        SampleError: Its structure is wrong, or it has a class only.
    """
    if problem := structure_problem(record):
        raise SampleError(problem[1])
    kind = kind_of(record)
    if kind is None:
        raise SampleError("the record has a class, but no text to learn")
    return kind


def text_of(content: list[dict] | str) -> str:
    """The text of a message."""
    return content if isinstance(content, str) else " ".join(i["text"].strip() for i in content if i["type"] == "text")


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Special tokens that can end a turn: what follows them (ChatML's line break) is never generated."""
    known = {tokenizer.eos_token, "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endofchunk|>"} - {None}
    vocabulary = tokenizer.get_vocab()
    return [token for token in sorted(known) if token in vocabulary]


class Encoder:
    """What the families share: text with learned spans, and images, to model inputs.

    Args:
        processor: The model's processor.
        model: The model; only its configuration and class are read.
        prompt: What stands between an image and its caption; it is not learned.
        end: What ends a caption; `None` takes the family's.
        max_length: Longest sample, in tokens, image tokens included; longer texts are cut off at the end.
        conversation: Format of conversations in training, where it is another than the processor's: MLP-LLaVA only, one of
            `vlbridge.processing.processing_llava.CONVERSATIONS` (stage 1's is `"plain"`).
        max_images: Images of a document that are kept; the text of later ones stays.
        prefix_lm: Encoder-decoders read the first words of a caption and write the others; where it is split is drawn.
        seed: Of what is drawn: it depends on this and the record's id alone.

    Raises:
        ValueError: An option that this model has no use for.
    """

    default_end: ClassVar[str | None] = None  # `None`: the language model's end of sequence
    caption_end_stops: ClassVar[bool] = True  # generation ends there too

    def __init__(
        self,
        processor: BridgedProcessor,
        model: BridgedModel,
        *,
        prompt: str = "",
        end: str | None = None,
        max_length: int | None = None,
        prefix_lm: bool = False,
        conversation: str | None = None,
        max_images: int | None = None,
        seed: int = 0,
    ):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.chat_template = processor.chat_template if conversation is None else self.template_of(conversation)
        self.end_of_turn = _end_of_turn(self.tokenizer)  # once: a fast tokenizer's whole vocabulary is read for it
        self.image_token, self.image_token_id = processor.image_token, processor.image_token_id
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.image_arguments = [name for name in model.image_arguments if name != "patch_features"]
        end = self.default_end if end is None else end
        self.end = (self.tokenizer.eos_token or "") if end is None else end
        self.prompt, self.max_length, self.max_images, self.seed = prompt, max_length, max_images, seed
        if prefix_lm and not self.is_encoder_decoder:
            raise ValueError(
                "prefix_lm splits captions between encoder and decoder, but the language model is decoder-only. Leave it out."
            )
        if prefix_lm and prompt:
            raise ValueError(f"prefix_lm and the prompt {prompt!r} exclude each other: give one of them.")
        self.prefix_lm = prefix_lm

    def template_of(self, conversation: str) -> str:
        """The chat template of a named conversation.

        Raises:
            ValueError: The family has none of this name.
        """
        raise ValueError(f"conversation is {conversation!r}, but only MLP-LLaVA has named conversations. Leave it out.")

    def chat(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        return self.processor.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt
        )

    # ------------------------------------------------------------------ records

    def encode(self, record: dict) -> dict[str, torch.Tensor]:
        """Model inputs of one record, without a batch dimension.

        Args:
            record: See the module.

        Returns:
            `input_ids` and `labels`, `(tokens,)`, and the family's image arguments.

        Raises:
            SampleError: Nothing can be learned from it.
        """
        kind = checked_kind(record)
        sample = getattr(self, f"encode_{kind}")(record)
        if not bool((sample["labels"] != IGNORED).any()):
            raise SampleError(f"nothing to learn within max_length={self.max_length}")
        return sample

    __call__ = encode

    def encode_caption(self, record: dict) -> dict[str, torch.Tensor]:
        context, caption = self.caption_parts(record)
        return self.encode_pair(context, caption, self.images_of(record))

    def encode_messages(self, record: dict) -> dict[str, torch.Tensor]:
        messages = record["messages"]
        if self.is_encoder_decoder:  # it writes the last answer
            context = self.chat(messages[:-1], add_generation_prompt=True)
            return self.encode_pair(context, text_of(messages[-1]["content"]), self.images_of(record))
        text, spans = self.answer_spans(messages)
        return self.encode_text(text, spans, self.images_of(record), qformer_text=self.instruction(messages))

    def answer_spans(self, messages: list[dict]) -> tuple[str, list[Span]]:
        """A conversation as text, and where the assistant's words stand in it, each with the token that ends its turn.

        Templates with `{% generation %}` say so themselves. Of others, an answer is what stands between the prompt for it
        and the end of its turn.

        Args:
            messages: The conversation.

        Returns:
            The text, and `(start, end)` of every answer, in characters.

        Raises:
            SampleError: The template changes earlier turns when later ones are added, so that no answer can be told.
        """
        if re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template):
            texts, spans = render_jinja_template(
                conversations=[messages],
                chat_template=self.chat_template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
            return texts[0], [tuple(span) for span in spans[0]]
        text = self.chat(messages)
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.chat(messages[:number], add_generation_prompt=True)
            after = self.chat(messages[: number + 1])
            if not (text.startswith(after) and after.startswith(before)):
                raise SampleError(
                    "the chat template does not write turns one after the other, so that it can't be told which words are the "
                    "assistant's; compose with another one (conversation=, or chat_template= with {% generation %})"
                )
            turn = after[len(before) :]
            stops = [turn.rindex(end) + len(end) for end in self.end_of_turn if end in turn]
            spans.append((len(before), len(before) + max(stops, default=len(turn))))
        return text, spans

    def encode_document(self, record: dict) -> dict[str, torch.Tensor]:
        if self.is_encoder_decoder:
            raise SampleError("documents need a decoder-only language model")
        record = self.with_few_images(record)
        text, spans = self.document_text(record)
        return self.encode_text(text, spans, self.images_of(record))

    def with_few_images(self, record: dict) -> dict:
        """A document with its first `max_images` images."""
        if self.max_images is None or len(record["images"]) <= self.max_images:
            return record
        items, seen = [], 0
        for item in record["document"]:
            seen += item["type"] == "image"
            if item["type"] == "text" or seen <= self.max_images:
                items.append(item)
        return {**record, "images": record["images"][: self.max_images], "document": items}

    def caption_parts(self, record: dict) -> tuple[str, str]:
        """What stands in front of a caption, and the caption with its end."""
        caption = record["caption"].strip()
        if self.prefix_lm:
            words = caption.split()
            split = random.Random(f"{self.seed}|{record.get('id')}").randrange(len(words))
            return self.image_token + " ".join(words[:split]), " ".join(words[split:])
        if self.is_encoder_decoder:
            return self.image_token + self.prompt, caption
        gap = " " if self.prompt and not self.prompt[-1].isspace() else ""
        return self.image_token + self.prompt, gap + self.ended(caption)

    def ended(self, text: str) -> str:
        return text + self.end

    def document_text(self, record: dict) -> tuple[str, list[Span]]:
        """A document as text, and what is learned of it: everything from the first image on."""
        parts = [self.image_token if item["type"] == "image" else item["text"].strip() for item in record["document"]]
        text = " ".join(part for part in parts if part)
        text = re.sub(rf"\s*{re.escape(self.image_token)}\s*", self.image_token, self.ended(text))
        return text, [(max(text.find(self.image_token), 0), len(text))]

    def instruction(self, messages: list[dict]) -> str:
        """What the user says: an instruction-aware Q-Former reads it."""
        return " ".join(text_of(message["content"]) for message in messages if message["role"] == "user")

    def check_records(self, records) -> None:
        """Refuse a data set that does not belong to the model; any may, where it has texts."""

    def images_of(self, record: dict) -> list:
        return [open_image(image) for image in record.get("images") or []]

    # ------------------------------------------------------------------ prompts

    def prompt_of(self, record: dict) -> tuple[dict[str, torch.Tensor], str]:
        """What to generate from, and what the record says: `(model inputs of a batch of one, text)`.

        The last answer of a conversation is asked for, the caption of an image, or what follows a document's last image.
        """
        kind = checked_kind(record)
        record = self.with_few_images(record) if kind == "document" else record
        images = self.images_of(record)
        qformer_text = None
        if kind == "messages":
            text, spans = self.answer_spans(record["messages"])
            asked = record["messages"][:-1]
            context = self.chat(asked, add_generation_prompt=True)
            wanted, qformer_text = text[slice(*spans[-1])] if spans else "", self.instruction(asked)
        elif kind == "caption":
            context, wanted = self.caption_parts(record)
        else:
            text, _ = self.document_text(record)
            cut = text.rindex(self.image_token) + len(self.image_token)
            context, wanted = text[:cut], text[cut:]
        inputs = self._process(context, images[: context.count(self.image_token)], qformer_text)
        inputs.pop("offset_mapping")
        inputs.pop("text_replacement_offsets", None)
        special = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        for token in sorted({*special, *self.tokenizer.all_special_tokens}, key=len, reverse=True):
            wanted = wanted.replace(token, "")
        return dict(inputs), wanted.strip()

    # ------------------------------------------------------------------ tokens

    def _process(self, text: str, images: list, qformer_text: str | None = None):
        """The processor's inputs for one text, with what is needed to find characters again."""
        options = {}
        if getattr(self.processor, "qformer_tokenizer", None) is not None and images and qformer_text is not None:
            options["qformer_text"] = [qformer_text]
        begin = self.tokenizer.bos_token
        if begin and text.startswith(begin):  # as at inference, see ProcessorMixin.apply_chat_template
            options["add_special_tokens"] = False
        return self.processor(
            text=[text],
            images=images or None,
            return_tensors="pt",
            return_offsets_mapping=True,
            return_text_replacement_offsets=True,
            **options,
        )

    def encode_pair(self, context: str, answer: str, images: list) -> dict[str, torch.Tensor]:
        """Inputs for an answer behind what it answers; only the answer is learned."""
        if not self.is_encoder_decoder:
            text = context + answer
            plain = context.replace(self.image_token, "").strip()
            return self.encode_text(text, [(len(context), len(text))], images, qformer_text=plain)
        sample = self.encode_text(context, [], images, qformer_text=context.replace(self.image_token, "").strip())
        ids = self.tokenizer(answer)["input_ids"]
        if ids[-1] != self.tokenizer.eos_token_id:
            ids.append(self.tokenizer.eos_token_id)
        if self.max_length is not None and len(ids) > self.max_length:
            ids = [*ids[: self.max_length - 1], ids[-1]]
        sample["labels"] = torch.tensor(ids)
        return sample

    def encode_text(
        self, text: str, spans: list[Span], images: list, qformer_text: str | None = None
    ) -> dict[str, torch.Tensor]:
        """Inputs for a text, of which some characters are learned.

        Args:
            text: With one image token per image.
            spans: `(start, end)` of what is learned, in characters.
            images: As many pictures.
            qformer_text: What an instruction-aware Q-Former reads.

        Raises:
            SampleError: `max_length` leaves no room for the first image.
        """
        if text.count(self.image_token) != len(images):
            raise SampleError(f"{text.count(self.image_token)} images stand in the text, but {len(images)} are given")
        inputs = self._process(text, images, qformer_text)
        offsets = inputs.pop("offset_mapping")[0].tolist()
        spans = self._moved(spans, (inputs.pop("text_replacement_offsets", None) or [[]])[0])
        ids = inputs["input_ids"][0]
        learned = torch.tensor([any(start <= first < end for start, end in spans) for first, last in offsets])
        # special tokens that the tokenizer adds have no characters: behind a learned text they are learned with it
        learned &= torch.tensor([last > first for first, last in offsets])
        learned &= ids != self.image_token_id
        sample = {"input_ids": ids, "labels": ids.masked_fill(~learned, IGNORED)}
        sample.update((name, inputs[name]) for name in self.image_arguments if name in inputs)
        return self._shortened(sample, len(images))

    @staticmethod
    def _moved(spans: list[Span], replacements: list[dict]) -> list[Span]:
        """Where spans are once placeholders have been written out."""

        def moved(place: int) -> int:
            grown = sum(
                len(r["replacement"]) - (r["span"][1] - r["span"][0]) for r in replacements if r["span"][1] <= place
            )
            return place + grown

        return [(moved(start), moved(end)) for start, end in spans]

    def _shortened(self, sample: dict, num_images: int) -> dict[str, torch.Tensor]:
        """The sample cut off at `max_length`, in front of an image that does not fit whole."""
        ids, limit = sample["input_ids"], self.max_length
        if limit is None or len(ids) <= limit:
            return sample
        is_image = ids == self.image_token_id
        counts = self.tokens_per_image(sample, num_images)
        total, kept = 0, 0
        for count in counts:
            last = int(is_image.nonzero()[total + count - 1])  # position of the image's last token
            if last >= limit:
                limit = min(limit, int(is_image.nonzero()[total]))
                break
            total, kept = total + count, kept + 1
        if counts and not kept:
            raise SampleError(f"max_length={self.max_length} leaves no room for the image's {counts[0]} tokens")
        for name in ("input_ids", "labels"):
            sample[name] = sample[name][:limit]
        return self.with_images(sample, kept)

    def tokens_per_image(self, sample: dict, num_images: int) -> list[int]:
        """Placeholders of each image."""
        total = int((sample["input_ids"] == self.image_token_id).sum())
        return [total // num_images] * num_images if num_images else []

    def with_images(self, sample: dict, kept: int) -> dict[str, torch.Tensor]:
        """The sample with its first images alone."""
        for name in self.image_arguments:
            if name in sample:
                sample[name] = sample[name][:kept]
        if not kept:
            for name in self.image_arguments:
                sample.pop(name, None)
        return sample

    # ------------------------------------------------------------------ batches

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """A batch of samples, padded on the right; images of all rows one after the other.

        Args:
            samples: What `encode` gave; `patch_features` may stand in for `pixel_values`.

        Returns:
            Model inputs: `input_ids`, `attention_mask` and `labels` `(batch, tokens)`, images `(num_images, ...)`.
        """
        pad = self.tokenizer.pad_token_id
        rows = torch.nn.utils.rnn.pad_sequence
        ids = [sample["input_ids"] for sample in samples]
        batch = {
            "input_ids": rows(ids, batch_first=True, padding_value=0 if pad is None else pad),
            "attention_mask": rows([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": rows([sample["labels"] for sample in samples], batch_first=True, padding_value=IGNORED),
        }
        for name in ("patch_features", *self.image_arguments):
            given = [sample[name] for sample in samples if name in sample]
            if given:
                batch[name] = self.join_images(name, given)
        return batch

    def join_images(self, name: str, given: list[torch.Tensor]) -> torch.Tensor:
        """One image argument of several samples as one tensor."""
        if any(tensor.shape[1:] != given[0].shape[1:] for tensor in given):  # texts of the Q-Former, or videos
            longest = max(tensor.shape[1] for tensor in given)
            given = [
                torch.cat([tensor, tensor.new_zeros(tensor.shape[0], longest - tensor.shape[1], *tensor.shape[2:])], 1)
                for tensor in given
            ]
        return torch.cat(given)

    # ------------------------------------------------------------------ generation

    def prompts(self, records: list[dict]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """What to generate from, padded on the left, and what the records say: see `prompt_of`."""
        prompts, wanted = zip(*map(self.prompt_of, records))
        longest = max(prompt["input_ids"].shape[1] for prompt in prompts)
        batch, pad = {}, self.tokenizer.pad_token_id or 0
        for name, filler in (("input_ids", pad), ("attention_mask", 0)):
            rows = [torch.nn.functional.pad(p[name], (longest - p[name].shape[1], 0), value=filler) for p in prompts]
            batch[name] = torch.cat(rows)
        for name in self.image_arguments:
            if given := [prompt[name] for prompt in prompts if name in prompt]:
                batch[name] = self.join_images(name, given)
        return batch, list(wanted)

    def answers(self, model: BridgedModel, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
        """What a model says to `prompts`, greedily."""
        return self.decode(model.generate(**inputs, **self.generation_options(model, max_new_tokens)), inputs)

    @property
    def end_token_id(self) -> int | None:
        """The token that ends a caption, where it is one."""
        ids = self.tokenizer(self.end, add_special_tokens=False)["input_ids"] if self.end else []
        return ids[0] if len(ids) == 1 else None

    def generation_options(self, model: BridgedModel, max_new_tokens: int) -> dict:
        """For a greedy `generate`."""
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), self.end_token_id} - {None}
        return {
            "do_sample": False,
            "num_beams": 1,
            "use_cache": True,
            "max_new_tokens": max_new_tokens,
            "eos_token_id": sorted(ends) or None,
        }

    def decode(self, generated: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[str]:
        """The texts of what `generate` gave for `inputs`."""
        if not self.is_encoder_decoder:
            generated = generated[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [(text.strip().split(self.end)[0] if self.end.isspace() else text).strip() for text in texts]


class MLPLlavaEncoder(Encoder):
    # LLaVA's "plain" separator; stage 2 ends its turns otherwise
    default_end = "\n"
    caption_end_stops = False

    def template_of(self, conversation: str) -> str:
        if conversation not in CONVERSATIONS:
            raise ValueError(f"conversation is {conversation!r}; expected one of {', '.join(CONVERSATIONS)}.")
        image = "<im_start><image><im_end>" if self.processor.mm_use_im_start_end else "<image>"
        return self.processor.build_chat_template(self.tokenizer, CONVERSATIONS[conversation], image)

    def tokens_per_image(self, sample: dict, num_images: int) -> list[int]:
        if "image_sizes" in sample:
            return [self.processor.num_image_tokens(*size) for size in sample["image_sizes"].tolist()]
        return super().tokens_per_image(sample, num_images)

    def with_images(self, sample: dict, kept: int) -> dict[str, torch.Tensor]:
        if "image_sizes" in sample and kept:
            tiles = self.processor.num_multimodal_tokens(sample["image_sizes"].tolist()).num_image_patches
            sample["pixel_values"] = sample["pixel_values"][: sum(tiles[:kept])]
            sample["image_sizes"] = sample["image_sizes"][:kept]
            return sample
        return super().with_images(sample, kept)


class QFormerBlip2Encoder(Encoder):
    """Captions behind a prompt; conversations and, for an instruction-aware Q-Former, their questions."""

    def answer_spans(self, messages: list[dict]) -> tuple[str, list[Span]]:
        """As for all families; a conversation whose template does not end its last answer ends as captions do.

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
        return text + self.chunk_end + self.end

    def document_text(self, record: dict) -> tuple[str, list[Span]]:
        parts = [
            f"{self.chunk_end}{self.image_token}" if item["type"] == "image" else item["text"].strip()
            for item in record["document"]
        ]
        text = " ".join(part for part in parts if part).replace(self.chunk_end, "", 1)
        text = re.sub(rf"\s*({re.escape(self.chunk_end)}|{re.escape(self.image_token)})\s*", r"\1", self.ended(text))
        # nothing before the first image, nor behind the last chunk
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

    def encode(self, record: dict) -> dict[str, torch.Tensor]:
        if (kind := checked_kind(record)) != "caption":
            raise SampleError(f"stage 1 learns from captions, the record has {kind}")
        inputs = self.processor(
            images=self.images_of(record),
            text=[self.prompt + record["caption"].strip()],
            max_length=self.max_length,
            return_tensors="pt",
        )
        # captions that are the same word for word are no negatives of each other
        image_id = zlib.crc32(" ".join(record["caption"].lower().split()).encode())
        return {
            "input_ids": inputs["input_ids"][0],
            "pixel_values": inputs["pixel_values"],
            "image_ids": torch.tensor([image_id]),
        }

    __call__ = encode

    def prompts(self, records: list[dict]) -> tuple[dict[str, torch.Tensor], list[str]]:
        images = [image for record in records for image in self.images_of(record)]
        inputs = self.processor.image_processor(images, return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"]}, [record["caption"].strip() for record in records]

    def generation_options(self, model: BridgedModel, max_new_tokens: int) -> dict:
        return {"do_sample": False, "num_beams": 1, "min_length": 0, "max_length": max_new_tokens + 1}

    def decode(self, generated: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(generated, skip_special_tokens=True)]

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().collate([{**sample, "labels": sample["input_ids"]} for sample in samples])
        batch.pop("labels")
        return batch


class ClassificationEncoder(Encoder):
    """Images and the number of their class, in `label`. What a model "says" about an image is the name of its class."""

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
        """Refuse classes with other names or in another order than the model's. One that has no names yet gets the data's.

        Raises:
            ValueError: They differ.
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
                f"the data's classes are {', '.join(names)}; the model's {', '.join(self.names.values())}. Give the data's "
                "in id2label, in their order."
            )

    def encode(self, record: dict) -> dict[str, torch.Tensor]:
        label, images = record.get("label"), record.get("images") or []
        if label is None or len(images) != 1:
            raise SampleError(f"expected one image with a label; the record has {len(images)} and the label {label}")
        if label not in self.names:
            raise SampleError(f"label is {label}; expected 0 to {len(self.names) - 1}")
        inputs = self.processor(images=self.images_of(record), return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"], "labels": torch.tensor(label)}

    __call__ = encode

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        return {
            "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
            "labels": torch.stack([sample["labels"] for sample in samples]),
        }

    def prompts(self, records: list[dict]) -> tuple[dict[str, torch.Tensor], list[str]]:
        samples = self.collate([self.encode(record) for record in records])
        return {"pixel_values": samples["pixel_values"]}, [self.names[label] for label in samples["labels"].tolist()]

    def answers(self, model: BridgedModel, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
        return [self.names[label] for label in model(**inputs).logits.argmax(dim=-1).tolist()]


ENCODERS: dict[str, type[Encoder]] = {
    "mlp_llava": MLPLlavaEncoder,
    "qformer_blip2": QFormerBlip2Encoder,
    "perceiver_flamingo": PerceiverFlamingoEncoder,
    "qformer_blip2_pretraining": Stage1Encoder,
    **dict.fromkeys(
        (f"{name}_classification" for name in ("mlp_llava", "qformer_blip2", "perceiver_flamingo")),
        ClassificationEncoder,
    ),
}


def encoder_for(model: BridgedModel, processor, **options) -> Encoder:
    """The encoder that belongs to a model.

    Args:
        model: A bridged model, stage 1 of Q-Former BLIP-2 or a classifier; it may be wrapped by PEFT.
        processor: Its processor.
        options: Of `Encoder`.

    Raises:
        ValueError: No such model, or an option that it has no use for.
    """
    config = model.config
    if config.model_type not in ENCODERS:
        raise ValueError(f"model_type is {config.model_type!r}; expected one of {', '.join(ENCODERS)}.")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return ENCODERS[config.model_type](processor, base, **options)


__all__ = ["ENCODERS", "Encoder", "SampleError", "encoder_for"]
