"""The models of CapFilt: captioners, which sample captions of images, and filters, which score how well texts match.

Source: BLIP (arXiv 2201.12086, section 3.3); `lavis/models/blip_models/blip_image_text_matching.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopPLogitsWarper,
)

from ..inference import answer
from ..modeling.modeling_qformer_pretraining import QFormerBlip2ForPreTraining
from ..modeling.modeling_qformer_retrieval import QFormerBlip2ForImageTextRetrieval


# ---------------------------------------------------------------------- captioners


class SeededSampling(LogitsProcessor):
    """Nucleus sampling with a random generator per row, to be used with greedy search.

    The token with the largest sum of score and Gumbel noise is a draw from the distribution of the scores. Unlike with
    `do_sample=True`, the caption of a row does not depend on the other rows of the batch.

    Args:
        top_p: Draw from the likeliest tokens whose probabilities add up to this, 0 to 1.
        generators: One per row, on the CPU, so that every device draws the same.
    """

    def __init__(self, top_p: float, generators: Sequence[torch.Generator]):
        self.nucleus, self.generators = TopPLogitsWarper(top_p), generators

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Add Gumbel noise to the scores of the nucleus.

        Args:
            input_ids: The tokens so far, `(batch, tokens)`; they are not read.
            scores: Scores of the next token, `(batch, vocab_size)`.

        Returns:
            Scores with noise, `(batch, vocab_size)`, float32; `-inf` outside the nucleus.
        """
        scores = self.nucleus(input_ids, scores.float())
        exponential = torch.stack(
            [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self.generators]
        )
        return scores - exponential.clamp_min(torch.finfo(torch.float32).tiny).log().to(scores.device)


class Captioner:
    """Captions by any model of `AutoModelForImageTextToText` with a chat template; all of this package have one.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
        prompt: What to ask for; `None` takes the processor's `caption_prompt`.

    Raises:
        ValueError: The processor has no chat template.
    """

    model_class = AutoModelForImageTextToText
    default_prompt = "Describe the image briefly."

    def __init__(self, model: PreTrainedModel, processor, prompt: str | None = None):
        self.model, self.processor = model, processor
        own = getattr(processor, "caption_prompt", self.default_prompt)
        self.prompt = own if prompt is None else prompt
        self.check()

    def check(self) -> None:
        """Refuse a processor that can't write the prompt.

        Raises:
            ValueError: It has no chat template.
        """
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(
                f"{type(self.model).__name__} can't serve as captioner: its processor has no chat template. Expected a "
                "bridged model of this package, stage 1 of Q-Former BLIP-2, or BLIP's captioner."
            )

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], generators: Sequence[torch.Generator], max_new_tokens: int, top_p: float
    ) -> list[str]:
        """One sampled caption per image.

        Args:
            images: RGB images.
            generators: One per image, on the CPU.
            max_new_tokens: Maximum length of a caption, in tokens.
            top_p: See `SeededSampling`.

        Returns:
            The captions; one may be empty.
        """
        sampling = LogitsProcessorList([SeededSampling(top_p, generators)])
        options = {"max_new_tokens": max_new_tokens, "num_beams": 1, "do_sample": False, "logits_processor": sampling}
        return [" ".join(text.split()) for text in self.generate(images, **options)]

    def generate(self, images: Sequence[Image.Image], **options) -> list[str]:
        """One text per image, by the model's `generate` with these options."""
        return answer(self.model, self.processor, images, self.prompt, batch_size=len(images), **options)

    def decode(self, generated: torch.LongTensor, prefix: torch.LongTensor) -> list[str]:
        """The texts after a prefix.

        Args:
            generated: `(batch, prefix and new tokens)`.
            prefix: The tokens that they all begin with, `(batch, prefix_length)`.
        """
        return self.processor.tokenizer.batch_decode(generated[:, prefix.shape[1] :], skip_special_tokens=True)


class BlipCaptioner(Captioner):
    """BLIP's (2022) captioner."""

    model_class = BlipForConditionalGeneration
    default_prompt = "a picture of "  # Source: `lavis/configs/models/blip_caption_base_coco.yaml`

    def check(self) -> None:
        """Accept every processor: BLIP's captioner needs no chat template."""

    def generate(self, images: Sequence[Image.Image], **options) -> list[str]:
        """One text per image, by the model's `generate` with these options.

        Args:
            images: RGB images.
            options: Passed on to `generate`.

        Returns:
            The texts, without the prompt.
        """
        inputs = self.processor(images=list(images), text=[self.prompt] * len(images), return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        # `generate` itself puts [DEC] first and leaves [SEP] out
        prefix = inputs["input_ids"][:, :-1]
        return self.decode(self.model.generate(**inputs, **options), prefix)


class Stage1Captioner(Captioner):
    """Stage 1 of Q-Former BLIP-2, which has learned to caption (ITG)."""

    model_class = QFormerBlip2ForPreTraining
    default_prompt = ""

    def check(self) -> None:
        """Accept every processor: stage 1 needs no chat template."""

    def generate(self, images: Sequence[Image.Image], **options) -> list[str]:
        """One text per image, by the model's `generate` with these options.

        Args:
            images: RGB images.
            options: Passed on to `generate`.

        Returns:
            The texts, without the prompt.
        """
        inputs = self.processor(images=list(images), text=[self.prompt] * len(images), return_tensors="pt")
        inputs = inputs.to(self.model.device)
        prefix = inputs["input_ids"][:, :-1].clone()  # without [SEP]
        prefix[:, 0] = self.model.config.bos_token_id
        generated = self.model.generate(pixel_values=inputs["pixel_values"], input_ids=prefix, **options)
        return self.decode(generated, prefix)


CAPTIONERS = {"blip": BlipCaptioner, "qformer_blip2_pretraining": Stage1Captioner}


def load_captioner(
    name: str | os.PathLike, prompt: str | None = None, dtype: str = "auto", device: str | torch.device = "cpu"
) -> Captioner:
    """Load a captioner.

    Args:
        name: Folder or Hub id.
        prompt: See `Captioner`.
        dtype: As for `from_pretrained`.
        device: Where to put it.

    Returns:
        The captioner for this type of model, its model in eval mode.

    Raises:
        ValueError: The model can't caption, see `Captioner`.
        OSError: There is no such model.
    """
    captioner_class = CAPTIONERS.get(AutoConfig.from_pretrained(name).model_type, Captioner)
    model = captioner_class.model_class.from_pretrained(name, dtype=dtype).to(device).eval()
    return captioner_class(model, AutoProcessor.from_pretrained(name), prompt)


# ---------------------------------------------------------------------- filters


class Matcher:
    """How likely a text describes an image, by the matching head (ITM) of stage 1 of Q-Former BLIP-2.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
    """

    model_class = QFormerBlip2ForImageTextRetrieval

    def __init__(self, model: PreTrainedModel, processor):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]], batch_size: int
    ) -> list[list[float]]:
        """Score every image's texts.

        Args:
            images: RGB images; each is encoded once.
            texts: Texts of each image.
            batch_size: Number of pairs per batch.

        Returns:
            Probability of a match, 0 to 1, for each text of each image.

        Raises:
            FloatingPointError: A score is not finite.
        """
        pixel_values = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        encoded = self.encode(pixel_values.to(self.model.device))
        pairs = [(index, text) for index, image_texts in enumerate(texts) for text in image_texts]
        scores: list[list[float]] = [[] for _ in images]
        for start in range(0, len(pairs), batch_size):
            indices, chunk = zip(*pairs[start : start + batch_size])
            tokens = self.tokenize(list(chunk)).to(self.model.device)
            logits = self.logits(encoded[list(indices)], tokens["input_ids"], tokens["attention_mask"])
            if not logits.isfinite().all():
                raise FloatingPointError(
                    f"The filter's scores are not finite in {self.model.dtype}; try another dtype (bfloat16, float32)."
                )
            for index, score in zip(indices, logits.float().softmax(dim=-1)[:, 1].tolist()):
                scores[index].append(score)
        return scores

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(num_images, channels, height, width)` to patch features `(num_images, num_patches, vision_dim)`."""
        return self.model.get_patch_features(pixel_values)

    def tokenize(self, texts: list[str]):
        """Token ids and attention mask of texts, `(batch, text_tokens)`; long texts are cut off."""
        return self.processor(text=texts, return_tensors="pt")

    def logits(
        self, encoded: torch.Tensor, input_ids: torch.LongTensor, attention_mask: torch.LongTensor
    ) -> torch.Tensor:
        """Scores of no match and match, `(batch, 2)`, of encoded images and tokenized texts."""
        return self.model.get_itm_logits(patch_features=encoded, input_ids=input_ids, attention_mask=attention_mask)


class BlipMatcher(Matcher):
    """How likely a text describes an image, by the matching head of BLIP (2022); its texts begin with `[ENC]`.

    Args:
        model: The model, in eval mode.
        processor: Its processor.

    Raises:
        ValueError: The model knows `[ENC]`, but the tokenizer does not tell which token it is.
    """

    model_class = BlipForImageTextRetrieval
    max_length = 35  # tokens. Source: `blip_image_text_matching.py`, `max_txt_len`

    def __init__(self, model: PreTrainedModel, processor):
        super().__init__(model, processor)
        tokenizer, vocab_size = processor.tokenizer, model.config.text_config.vocab_size
        self.enc_token_id = tokenizer.get_vocab().get("[ENC]")
        if self.enc_token_id is None and vocab_size != len(tokenizer):
            if vocab_size != len(tokenizer) + 2:
                raise ValueError(
                    f"BLIP's matcher needs the id of [ENC]: the model knows {vocab_size} tokens, its tokenizer "
                    f"{len(tokenizer)} without [ENC]. Add [DEC] and [ENC] to the tokenizer, in this order."
                )
            # checkpoints on the Hub: their tokenizers lack the last two tokens, [DEC] and [ENC]
            self.enc_token_id = vocab_size - 1

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Map `(num_images, channels, height, width)` to patch features `(num_images, num_patches, vision_dim)`."""
        return self.model.vision_model(pixel_values=pixel_values.to(self.model.dtype)).last_hidden_state

    def tokenize(self, texts: list[str]):
        """Token ids, the first of them `[ENC]`, and attention mask of texts, both `(batch, text_tokens)`."""
        tokens = self.processor.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        if self.enc_token_id is not None:
            tokens["input_ids"][:, 0] = self.enc_token_id
        return tokens

    def logits(
        self, encoded: torch.Tensor, input_ids: torch.LongTensor, attention_mask: torch.LongTensor
    ) -> torch.Tensor:
        """Scores of no match and match, `(batch, 2)`, of encoded images and tokenized texts."""
        output = self.model.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=encoded
        )
        return self.model.itm_head(output.last_hidden_state[:, 0])


MATCHERS = {"blip": BlipMatcher, "qformer_blip2_pretraining": Matcher}


def load_matcher(name: str | os.PathLike, dtype: str = "auto", device: str | torch.device = "cpu") -> Matcher:
    """Load a filter.

    Args:
        name: Folder or Hub id.
        dtype: As for `from_pretrained`.
        device: Where to put it.

    Returns:
        The matcher for this type of model, its model in eval mode.

    Raises:
        ValueError: The model has no image-text matching head.
        OSError: There is no such model.
    """
    model_type = AutoConfig.from_pretrained(name).model_type
    if model_type not in MATCHERS:
        raise ValueError(
            f"{name} is a {model_type!r} model, which can't serve as filter; expected one of {', '.join(MATCHERS)}: "
            "stage 1 of Q-Former BLIP-2, or BLIP's image-text matcher."
        )
    matcher_class = MATCHERS[model_type]
    model, info = matcher_class.model_class.from_pretrained(name, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"{name} has no image-text matching head: {len(info['missing_keys'])} tensors are missing, such as "
            f"{sorted(info['missing_keys'])[0]}."
        )
    return matcher_class(model.to(device).eval(), AutoProcessor.from_pretrained(name))


__all__ = [
    "BlipCaptioner",
    "BlipMatcher",
    "Captioner",
    "Matcher",
    "SeededSampling",
    "Stage1Captioner",
    "load_captioner",
    "load_matcher",
]
