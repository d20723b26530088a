"""Processors of Q-Former BLIP-2: with a language model (stages 2 and 3), and without one (stage 1 and retrieval)."""

from __future__ import annotations

import os
from typing import ClassVar

import torch
from transformers import AutoTokenizer, BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin

from ..compat import optional_file
from ..compat_hooks import ProcessorHooks
from ..configuration.configuration_bridged import BridgedConfig
from ..configuration.configuration_qformer import QFormerBlip2Config, QFormerBlip2PreTrainingConfig
from .processing_backends import KeepsBackend, as_described
from .processing_bridged import BridgedProcessor
from .processing_inputs import pictures


QFORMER_TOKENIZER = "qformer_tokenizer"  # subfolder of the processor, as for InstructBLIP in transformers


class QFormerBlip2Processor(BridgedProcessor):
    """Processor of Q-Former BLIP-2. The other arguments are those of `BridgedProcessor`.

    Args:
        qformer_tokenizer: BERT's tokenizer, for Q-Formers that read the instruction (InstructBLIP).
        qformer_max_length: Longest instruction for the Q-Former, in tokens; longer ones are truncated.
        text_start: Text that follows an image's tokens: in official models the language model's beginning of sequence
            stands there, not at the beginning of the prompt.
    """

    # Source: BLIP-2, section 4.2 ("Question: {} Answer:") and section 4.1 ("a photo of").
    default_caption_prompt = "a photo of"

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
        qformer_tokenizer=None,
        qformer_max_length=128,
        text_start="",
        **kwargs,
    ):
        self.text_start = text_start
        self.qformer_tokenizer = qformer_tokenizer
        self.qformer_max_length = qformer_max_length
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

    @staticmethod
    def query_tokens(config: QFormerBlip2Config) -> int:
        """Visual tokens per image."""
        return config.qformer_config.num_query_tokens

    @classmethod
    def get_attributes(cls) -> list[str]:
        """See `ProcessorMixin.get_attributes`; the Q-Former's tokenizer is optional, so it is left out."""
        return [name for name in super().get_attributes() if name != QFORMER_TOKENIZER]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model inputs; with a `qformer_tokenizer` also the instruction's."""
        more = [] if self.qformer_tokenizer is None else ["qformer_input_ids", "qformer_attention_mask"]
        return super().model_input_names + more

    def check(self, config: BridgedConfig) -> None:
        """See `BridgedProcessor.check`."""
        super().check(config)
        if self.qformer_tokenizer is None:
            return
        qformer = config.qformer_config
        if not qformer.use_text:
            raise ValueError(
                "The processor has a qformer_tokenizer, but the model's Q-Former reads images only. Compose the model "
                "with qformer_config={'use_text': True}, or leave the tokenizer out."
            )
        if len(self.qformer_tokenizer) > qformer.vocab_size:
            raise ValueError(
                f"The qformer_tokenizer has {len(self.qformer_tokenizer)} tokens, the Q-Former {qformer.vocab_size}."
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """See `BridgedProcessor.replace_image_token`; `text_start` follows the image tokens."""
        return super().replace_image_token(image_inputs, image_idx, **kwargs) + self.text_start

    def instructions(self, text: list[str]) -> list[str]:
        """The instruction that the Q-Former reads with each image: the image's text without image tokens.

        Args:
            text: Texts with one image token per image.

        Returns:
            One instruction per image, in the order of the images.
        """
        counts = [sample.count(self.image_token) for sample in text]
        plain = [" ".join(sample.replace(self.image_token, " ").split()) for sample in text]
        return [instruction for instruction, count in zip(plain, counts) for _ in range(count)]

    def __call__(self, images=None, text=None, qformer_text: str | list[str] | None = None, **kwargs):
        """Images and text to model inputs.

        Args:
            images: See `BridgedProcessor.__call__`.
            text: See `BridgedProcessor.__call__`.
            qformer_text: Instruction that the Q-Former reads instead of `text`: one per text.
            kwargs: Passed on to `ProcessorMixin.__call__`.

        Returns:
            `input_ids`, `attention_mask` and `pixel_values`; with a `qformer_tokenizer` also `qformer_input_ids` and
            `qformer_attention_mask`, both `(num_images, instruction_tokens)`; images of the same text share its
            instruction.

        Raises:
            ValueError: The numbers of `qformer_text` and texts differ, or there is no `qformer_tokenizer` for them.
        """
        images, text = self.lay_out(images, text, kwargs)
        inputs = super().__call__(images=images, text=text, **kwargs)
        if self.qformer_tokenizer is None:
            if qformer_text is not None:
                raise ValueError("qformer_text needs a qformer_tokenizer, which this processor does not have.")
            return inputs
        if images is None or text is None:
            return inputs
        texts = [text] if isinstance(text, str) else list(text)
        instructions = self.instructions(texts)
        if qformer_text is not None:
            given = [qformer_text] if isinstance(qformer_text, str) else list(qformer_text)
            if len(given) != len(texts):
                raise ValueError(f"{len(given)} of qformer_text, but {len(texts)} texts; expected one per text.")
            counts = [sample.count(self.image_token) for sample in texts]
            instructions = [instruction for instruction, count in zip(given, counts) for _ in range(count)]
        if not instructions:
            return inputs
        encoded = self.qformer_tokenizer(
            instructions,
            padding=True,
            padding_side="right",  # positions are counted from the left
            truncation=True,
            max_length=self.qformer_max_length,
            return_tensors="pt" if isinstance(inputs.get("input_ids"), torch.Tensor) else None,
        )
        inputs["qformer_input_ids"] = encoded["input_ids"]
        inputs["qformer_attention_mask"] = encoded["attention_mask"]
        return inputs

    def to_dict(self) -> dict:
        """See `ProcessorMixin.to_dict`; the Q-Former's tokenizer is saved in its own folder."""
        tokenizer, self.qformer_tokenizer = self.qformer_tokenizer, None
        try:  # the base class would write the tokenizer into its JSON file
            fields = super().to_dict()
        finally:
            self.qformer_tokenizer = tokenizer
        fields.pop(QFORMER_TOKENIZER, None)
        return fields

    def save_pretrained(self, save_directory, *args, **kwargs):
        """See `BridgedProcessor.save_pretrained`."""
        if self.qformer_tokenizer is not None:  # saved first, because the base class may upload the folder
            self.qformer_tokenizer.save_pretrained(os.path.join(save_directory, QFORMER_TOKENIZER))
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """See `ProcessorMixin.from_pretrained`; also loads the Q-Former's tokenizer if there is one."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if processor.qformer_tokenizer is None:
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision")
            hub_kwargs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            folder = os.path.join(kwargs.get("subfolder") or "", QFORMER_TOKENIZER)
            found = optional_file(
                pretrained_model_name_or_path, "tokenizer_config.json", subfolder=folder, **hub_kwargs
            )
            if found is not None:
                processor.qformer_tokenizer = AutoTokenizer.from_pretrained(
                    pretrained_model_name_or_path, subfolder=folder, **hub_kwargs
                )
        return processor


class QFormerBlip2PreTrainingProcessor(KeepsBackend, ProcessorHooks, ProcessorMixin):
    """Processor of image-text pairs, for stage 1 and retrieval.

    Args:
        image_processor: The vision encoder's image processor.
        tokenizer: BERT's tokenizer with `[DEC]` as its beginning of sequence.
        max_length: Longest text, in tokens; longer ones are truncated.
    """

    text_defaults: ClassVar[dict] = {
        "padding": True,
        "padding_side": "right",
        "truncation": True,
        "return_token_type_ids": False,
    }

    def __init__(self, image_processor=None, tokenizer=None, max_length=32, **kwargs):
        self.max_length = max_length
        super().__init__(as_described(image_processor), tokenizer)

    @classmethod
    def from_config(
        cls,
        config: QFormerBlip2PreTrainingConfig,
        image_processor: BaseImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        **kwargs,
    ) -> QFormerBlip2PreTrainingProcessor:
        """Build the processor of a model.

        Args:
            config: The model's configuration.
            image_processor: The vision encoder's image processor.
            tokenizer: BERT's tokenizer with `[DEC]` as its beginning of sequence.
            kwargs: Further arguments of the class.

        Raises:
            ValueError: The tokenizer does not belong to the model, see `check`.
        """
        processor = cls(image_processor=image_processor, tokenizer=tokenizer, **kwargs)
        processor.check(config)
        return processor

    def check(self, config: QFormerBlip2PreTrainingConfig) -> None:
        """Check that this processor belongs to a model.

        Args:
            config: The model's configuration.

        Raises:
            ValueError: Special tokens or the size of the vocabulary differ.
        """
        tokenizer = self.tokenizer
        for what, ours, theirs in (
            ("bos_token_id", tokenizer.bos_token_id, config.bos_token_id),
            ("eos_token_id", end_of_text(tokenizer), config.eos_token_id),
            ("pad_token_id", tokenizer.pad_token_id, config.pad_token_id),
        ):
            if ours != theirs:
                raise ValueError(f"The tokenizer's {what} is {ours}, the model's is {theirs}.")
        if len(tokenizer) > config.qformer_config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, the Q-Former {config.qformer_config.vocab_size}."
            )

    def __call__(self, images=None, text=None, **kwargs):
        """Images and texts to model inputs.

        Args:
            images: An image or a list of images; they are read as 8-bit RGB, transparency as white.
            text: A text or a list of texts.
            kwargs: Passed on to `ProcessorMixin.__call__`.

        Returns:
            `pixel_values` of the images; `input_ids` and `attention_mask` of the texts, padded on the right.
        """
        given = kwargs.get("text_kwargs") or {}
        defaults = {"max_length": self.max_length, **self.text_defaults}
        missing = {name: value for name, value in defaults.items() if name not in kwargs and name not in given}
        kwargs["text_kwargs"] = {**missing, **given}
        if images is not None:
            images = pictures(images, self.image_processor, kwargs)
        return super().__call__(images=images, text=text, **kwargs)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id of the token that ends every text: BERT's `[SEP]`."""
    return tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id


def bert_tokenizer(source: PreTrainedTokenizerBase | str | os.PathLike, **hub_kwargs) -> PreTrainedTokenizerBase:
    """BERT's tokenizer with `[DEC]`, which begins captions.

    Args:
        source: Hub id, folder, or a tokenizer, to which `[DEC]` is added in place if it is missing.
        hub_kwargs: `revision`, `token` and other arguments of `from_pretrained`.

    Source: `lavis/models/blip2_models/blip2.py`, `init_tokenizer`.
    """
    if not isinstance(source, PreTrainedTokenizerBase):
        source = AutoTokenizer.from_pretrained(source, **hub_kwargs)
    if source.bos_token is None:
        source.add_special_tokens({"bos_token": "[DEC]"})
    return source


__all__ = ["QFormerBlip2PreTrainingProcessor", "QFormerBlip2Processor", "bert_tokenizer", "end_of_text"]
