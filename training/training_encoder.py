"""What the encoders of all families share: see `training_encoding`."""

from __future__ import annotations

import random
import re
from typing import Any, ClassVar

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..compat import render_jinja_template
from ..modeling import BridgedModel
from ..processing.processing_bridged import BridgedProcessor
from .training_images import PreparedImage, image_inputs
from .training_records import kind_of, open_image, structure_problem


IGNORED = -100  # label of what is not learned

REFUSED = "the chat template refuses the conversation"
Span = tuple[int, int]
TOKENIZER_OPTIONS = ("add_special_tokens", "padding", "truncation", "max_length", "stride", "pad_to_multiple_of")


class SampleError(ValueError):
    """A record that can't be learned from; it is counted and left out, see the trainer's data sets."""


def checked_kind(record: dict) -> str:
    """Kind of a record: `"caption"`, `"messages"` or `"document"`.

    Args:
        record: The record.

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
        prompt: Text between an image and its caption; it is not learned.
        end: What ends a caption; by default the family's own.
        max_length: Longest sample, in tokens, image tokens included; longer texts are cut off at the end.
        prefix_lm: Encoder-decoders read the first words of a caption and write the others; the place of the split is
            random.
        conversation: Format of conversations in training, if it is not the processor's: MLP-LLaVA only, one of
            `vlbridge.processing.processing_llava.CONVERSATIONS` (stage 1's is `"plain"`).
        max_images: Number of images of a document that are kept; the text of later ones stays.
        ask_for_captions: Captions answer the processor's `caption_prompt`, in a conversation, as `vlbridge caption`
            asks for them; by default they stand behind the image alone, as in the papers' first stages.
        seed: Seed of what is random, which depends on this and the record's id alone.

    Raises:
        ValueError: The model has no use for an option.
    """

    default_end: ClassVar[str | None] = None  # `None`: the language model's end of sequence
    caption_end_stops: ClassVar[bool] = True  # generation ends there too
    max_images: int | None = None

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
        ask_for_captions: bool = False,
        seed: int = 0,
    ):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.chat_template = processor.chat_template if conversation is None else self.template_of(conversation)
        self.end_of_turn = _end_of_turn(self.tokenizer)  # once: a fast tokenizer's whole vocabulary is read for it
        # settings of a tokenizer that a processor passes on to it
        known = {name: value for name, value in self.tokenizer.init_kwargs.items() if name in TOKENIZER_OPTIONS}
        self._tokenizer_options = {name: getattr(self.tokenizer, name, value) for name, value in known.items()}
        self.image_token, self.image_token_id = processor.image_token, processor.image_token_id
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.image_arguments = [name for name in model.image_arguments if name != "patch_features"]
        end = self.default_end if end is None else end
        self.end = (self.tokenizer.eos_token or "") if end is None else end
        self.prompt, self.max_length, self.max_images, self.seed = prompt, max_length, max_images, seed
        self.ask_for_captions = ask_for_captions
        if ask_for_captions and (prompt or prefix_lm):
            raise ValueError("ask_for_captions asks with the processor's own prompt: leave prompt and prefix_lm out.")
        if prefix_lm and not self.is_encoder_decoder:
            raise ValueError(
                "prefix_lm splits captions between encoder and decoder, but the language model is decoder-only. "
                "Leave it out."
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
        """A conversation as text.

        Raises:
            SampleError: The chat template refuses it, such as a system message where it has no place for one.
        """
        try:
            return self.processor.apply_chat_template(
                messages, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise SampleError(f"{REFUSED}: {error}") from error

    # ------------------------------------------------------------------ records

    def encode(self, record: dict, images: list[PreparedImage] | None = None) -> dict[str, torch.Tensor]:
        """Model inputs of one record, without a batch dimension.

        Args:
            record: The record, see `training_encoding`.
            images: The record's images, if they are prepared already: all with `patch_features`, or all with
                `pixel_values`. By default the record's files are opened and processed.

        Returns:
            `input_ids` and `labels`, `(tokens,)`, and the family's image arguments; `patch_features` instead of
            `pixel_values` if `images` have them. A text that was cut off has its first images only.

        Raises:
            SampleError: Nothing can be learned from it.
            vlbridge.images.ImageError: An image can't be read.
        """
        record = self.as_asked(record)
        kind = checked_kind(record)
        if kind == "document":
            if self.is_encoder_decoder:
                raise SampleError("documents need a decoder-only language model")
            record = self.with_few_images(record)
        images = self.images_of(record) if images is None else images[: len(record["images"])]
        sample = getattr(self, f"encode_{kind}")(record, images)
        if not bool((sample["labels"] != IGNORED).any()):
            raise SampleError(f"nothing to learn within max_length={self.max_length}")
        return sample

    __call__ = encode

    def as_asked(self, record: dict) -> dict:
        """A caption as the answer to the processor's `caption_prompt`, with `ask_for_captions`; other records stay."""
        if not self.ask_for_captions or record.get("caption") is None:
            return record
        question = [{"type": "image", "text": None}, {"type": "text", "text": self.processor.caption_prompt}]
        answer = [{"type": "text", "text": record["caption"].strip()}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {**record, "caption": None, "messages": messages}

    def encode_caption(self, record: dict, images: list) -> dict[str, torch.Tensor]:
        """Model inputs of a record with a caption.

        Args:
            record: The record.
            images: Its image, opened or prepared.

        Returns:
            As `encode`.
        """
        context, caption = self.caption_parts(record)
        return self.encode_pair(context, caption, images)

    def encode_messages(self, record: dict, images: list) -> dict[str, torch.Tensor]:
        """Model inputs of a record with a conversation.

        Args:
            record: The record.
            images: Its images, opened or prepared.

        Returns:
            As `encode`.
        """
        messages = record["messages"]
        if self.is_encoder_decoder:  # it writes the last answer
            context = self.chat(messages[:-1], add_generation_prompt=True)
            return self.encode_pair(context, text_of(messages[-1]["content"]), images)
        text, spans = self.answer_spans(messages)
        return self.encode_text(text, spans, images, qformer_text=self.instruction(messages))

    def encode_document(self, record: dict, images: list) -> dict[str, torch.Tensor]:
        """Model inputs of a record with an interleaved document.

        Args:
            record: The record.
            images: Its images, opened or prepared.

        Returns:
            As `encode`.
        """
        text, spans = self.document_text(record)
        return self.encode_text(text, spans, images)

    def answer_spans(self, messages: list[dict]) -> tuple[str, list[Span]]:
        """A conversation as text, and where the assistant's words stand in it, each with the token that ends its turn.

        Templates with `{% generation %}` mark the answers themselves. With others, an answer is what stands between its
        prompt and the end of its turn.

        Args:
            messages: The conversation.

        Returns:
            The text, and `(start, end)` of every answer, in characters.

        Raises:
            SampleError: The template changes earlier turns when later ones are added, so that answers can't be found.
        """
        if re.search(r"\{%-?\s*generation\s*-?%\}", self.chat_template):
            try:
                texts, spans = render_jinja_template(
                    conversations=[messages],
                    chat_template=self.chat_template,
                    return_assistant_tokens_mask=True,
                    **self.tokenizer.special_tokens_map,
                )
            except TemplateError as error:
                raise SampleError(f"{REFUSED}: {error}") from error
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
                    "the chat template does not write turns one after the other, so that the assistant's words can't "
                    "be found; compose with another one (conversation=, or chat_template= with {% generation %})"
                )
            turn = after[len(before) :]
            stops = [turn.rindex(end) + len(end) for end in self.end_of_turn if end in turn]
            spans.append((len(before), len(before) + max(stops, default=len(turn))))
        return text, spans

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
        """What stands before a caption, and the caption with its end."""
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
        """A caption with its end."""
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
        """Refuse a data set that does not belong to the model; texts belong to every language model."""

    def images_of(self, record: dict) -> list:
        """A record's images, opened."""
        return [open_image(image) for image in record.get("images") or []]

    def image_inputs_of(self, record: dict, images: list[PreparedImage] | None) -> dict[str, torch.Tensor]:
        """Model inputs of a record's images, for models that read them apart from the text.

        Args:
            record: The record.
            images: Its images, if they are prepared already.
        """
        if images is not None:
            return image_inputs(self.processor, images)[0]
        inputs = self.processor(images=self.images_of(record), return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"]}

    # ------------------------------------------------------------------ prompts

    def prompt_of(self, record: dict) -> tuple[dict[str, torch.Tensor], str]:
        """What to generate from, and what the record says.

        The model is asked for the last answer of a conversation, the caption of an image, or what follows a document's
        last image.

        Args:
            record: The record.

        Returns:
            Model inputs of a batch of one, and the text.
        """
        record = self.as_asked(record)
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
        options = {"return_tensors": "pt", "return_offsets_mapping": True}
        begin = self.tokenizer.bos_token
        if begin and text.startswith(begin):  # as at inference, see ProcessorMixin.apply_chat_template
            options["add_special_tokens"] = False
        if images and isinstance(images[0], PreparedImage):
            return self._process_prepared(text, images, qformer_text, options)
        if getattr(self.processor, "qformer_tokenizer", None) is not None and images and qformer_text is not None:
            options["qformer_text"] = [qformer_text]
        return self.processor(text=[text], images=images or None, return_text_replacement_offsets=True, **options)

    def _process_prepared(
        self, text: str, images: list[PreparedImage], qformer_text: str | None, options: dict
    ) -> dict[str, Any]:
        """What the processor makes of a text and its images, if the images are prepared already."""
        inputs, placeholders = image_inputs(self.processor, images)
        texts, offsets = self.processor.get_text_with_replacements([text], placeholders)
        inputs.update(self.tokenizer(texts, **{**self._tokenizer_options, **options}))
        inputs["text_replacement_offsets"] = offsets
        if getattr(self.processor, "qformer_tokenizer", None) is not None:
            instructions = self.processor.instructions([text])
            if qformer_text is not None:
                instructions = [qformer_text] * len(images)
            encoded = self.processor.qformer_tokenizer(
                instructions,
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=self.processor.qformer_max_length,
                return_tensors="pt",
            )
            inputs["qformer_input_ids"] = encoded["input_ids"]
            inputs["qformer_attention_mask"] = encoded["attention_mask"]
        return inputs

    def encode_pair(self, context: str, answer: str, images: list) -> dict[str, torch.Tensor]:
        """Inputs of a context and an answer that follows it; only the answer is learned."""
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
        """Inputs of a text in which some characters are learned.

        Args:
            text: The text, with one image token per image.
            spans: `(start, end)` of what is learned, in characters.
            images: As many pictures, opened or prepared.
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
        # special tokens that the tokenizer adds have no characters: after a learned text they are learned with it
        learned &= torch.tensor([last > first for first, last in offsets])
        learned &= ids != self.image_token_id
        sample = {"input_ids": ids, "labels": ids.masked_fill(~learned, IGNORED)}
        sample.update((name, inputs[name]) for name in ("patch_features", *self.image_arguments) if name in inputs)
        return self._shortened(sample, len(images))

    @staticmethod
    def _moved(spans: list[Span], replacements: list[dict]) -> list[Span]:
        """The spans in the text in which the placeholders of images are written out."""

        def moved(place: int) -> int:
            grown = sum(
                len(r["replacement"]) - (r["span"][1] - r["span"][0]) for r in replacements if r["span"][1] <= place
            )
            return place + grown

        return [(moved(start), moved(end)) for start, end in spans]

    def _shortened(self, sample: dict, num_images: int) -> dict[str, torch.Tensor]:
        """The sample cut off at `max_length`, or before an image that does not fit completely."""
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
        """Number of placeholders of each image."""
        total = int((sample["input_ids"] == self.image_token_id).sum())
        return [total // num_images] * num_images if num_images else []

    def with_images(self, sample: dict, kept: int) -> dict[str, torch.Tensor]:
        """The sample with its first `kept` images only."""
        for name in ("patch_features", *self.image_arguments):
            if name in sample:
                sample[name] = sample[name][:kept]
            if not kept:
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
        """What to generate from, padded on the left, and what the records say: see `prompt_of`.

        Args:
            records: The records.

        Returns:
            Model inputs of a batch, and the texts.
        """
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
        """What a model generates for the inputs of `prompts`, greedily."""
        return self.decode(model.generate(**inputs, **self.generation_options(model, max_new_tokens)), inputs)

    @property
    def end_token_id(self) -> int | None:
        """The token that ends a caption; `None` if it is not one token."""
        ids = self.tokenizer(self.end, add_special_tokens=False)["input_ids"] if self.end else []
        return ids[0] if len(ids) == 1 else None

    def generation_options(self, model: BridgedModel, max_new_tokens: int) -> dict:
        """Arguments of `generate` for greedy decoding."""
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
        """The texts that `generate` gave for `inputs`."""
        if not self.is_encoder_decoder:
            generated = generated[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [(text.strip().split(self.end)[0] if self.end.isspace() else text).strip() for text in texts]


__all__ = ["IGNORED", "Encoder", "SampleError", "checked_kind", "text_of"]
