"""Stage 1 of Q-Former BLIP-2: the Q-Former learns to read images with three objectives.

Source: BLIP-2 (arXiv 2301.12597, section 3.2); `lavis/models/blip2_models/blip2_qformer.py` and
`lavis/models/blip2_models/blip2.py` (`compute_sim_matrix`) of the official code.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast

from ..compat import accepts_cache, cache_argument, can_return_tuple
from ..compat import initialization as init
from ..configuration.configuration_qformer import QFormerBlip2PreTrainingConfig
from ..processing.processing_parts import load_image_processor
from ..processing.processing_qformer import QFormerBlip2PreTrainingProcessor, bert_tokenizer, end_of_text
from .modeling_bridge import Bridge
from .modeling_bridged import BridgedModel
from .modeling_contrastive import draw_negatives, gather, gather_texts, num_processes, similarities_of
from .modeling_parts import resolve_part
from .modeling_qformer_layers import KeyValues, QFormer, QFormerLMHead


# ---------------------------------------------------------------------- parts


class QFormerPreTrainingBridge(Bridge):
    """Layer norm on the patch features, Q-Former, and the heads of the three objectives.

    Its methods take patch features after the layer norm, `(batch, num_patches, vision_dim)`.
    """

    def __init__(self, config: QFormerBlip2PreTrainingConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config, None)
        width = config.qformer_config.hidden_size
        self.vision_layer_norm = nn.LayerNorm(config.vision_feature_size, eps=config.vision_layer_norm_eps)
        self.qformer = QFormer(config.qformer_config, config.vision_feature_size)
        self.vision_projection = nn.Linear(width, config.embed_dim)
        self.text_projection = nn.Linear(width, config.embed_dim)
        self.itm_head = nn.Linear(width, 2)  # no match, match
        self.temperature = nn.Parameter(torch.tensor([config.itc_temperature]))  # FSDP can't shard scalars
        self.lm_head = QFormerLMHead(config.qformer_config)

    def init_parameters(self, config: QFormerBlip2PreTrainingConfig) -> None:
        """Set the temperature to the configuration's `itc_temperature`."""
        init.constant_(self.temperature, config.itc_temperature)

    def image_features(self, query_output: torch.Tensor) -> torch.Tensor:
        """Map `(batch, num_query_tokens, hidden_size)` to unit vectors, `(batch, num_query_tokens, embed_dim)`."""
        # In float32: squares of large components overflow in float16.
        return nn.functional.normalize(self.vision_projection(query_output).float(), dim=-1)

    def text_features(self, text_output: torch.Tensor) -> torch.Tensor:
        """Map `(batch, text_tokens, hidden_size)` to the first token's unit vector, `(batch, embed_dim)`."""
        return nn.functional.normalize(self.text_projection(text_output[:, 0]).float(), dim=-1)

    def multimodal_features(
        self,
        normed: torch.Tensor | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_key_values: KeyValues | None = None,
    ) -> torch.Tensor:
        """Queries that have read image and text: `(batch, num_query_tokens, hidden_size)`.

        Instead of the patch features, `image_key_values` holds what an earlier pass of the Q-Former made of them.
        """
        hidden_states = self.qformer(normed, input_ids, attention_mask, "itm", image_key_values=image_key_values)
        return hidden_states[:, : self.qformer.query_tokens.shape[1]]

    def itm_logits(self, *inputs) -> torch.Tensor:
        """Scores of no match and match, `(batch, 2)`, for the arguments of `multimodal_features`."""
        return self.itm_head(self.multimodal_features(*inputs)).float().mean(dim=1)


@dataclass
class QFormerBlip2PreTrainingOutput(CausalLMOutputWithPast):
    """Output of stage 1.

    It inherits from transformers' `CausalLMOutputWithPast`: `loss`, the weighted sum of the three losses; `logits`,
    scores of the caption's tokens, `(batch, text_tokens, vocab_size)`; and, when captioning, the cache of queries and
    text.

    Args:
        loss_itc: Image-text contrastive loss; `None` if it was not computed.
        loss_itm: Image-text matching loss; `None` if it was not computed.
        loss_itg: Image-grounded text generation loss; `None` if it was not computed.
        similarities: Cosine similarities of this process's images and all processes' texts, `(batch, texts)`.
        itm_logits: `(3 * batch, 2)`: scores of the pairs, of the texts with other images, and of the images with other
            texts.
        image_features: Unit vectors, `(batch, num_query_tokens, embed_dim)`.
        text_features: Unit vectors, `(batch, embed_dim)`.
        image_negatives: Index, among the images of all processes, of the image drawn for each text, `(batch,)`.
        text_negatives: Index, among the texts of all processes, of the text drawn for each image, `(batch,)`.
    """

    loss_itc: torch.Tensor | None = None
    loss_itm: torch.Tensor | None = None
    loss_itg: torch.Tensor | None = None
    similarities: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    text_features: torch.Tensor | None = None
    image_negatives: torch.Tensor | None = None
    text_negatives: torch.Tensor | None = None


@dataclass
class Pairs:
    """A batch of pairs, together with the texts of all processes.

    Args:
        normed: Patch features after the layer norm, `(batch, num_patches, vision_dim)`.
        input_ids: This process's texts, `(batch, text_tokens)`.
        attention_mask: `(batch, text_tokens)`, 0 for padding.
        all_ids: Texts of all processes, `(processes * batch, text_tokens)`.
        all_masks: Mask of the texts of all processes, `(processes * batch, text_tokens)`.
        first: Index of this process's first pair among those of all processes.
        gather: Concatenates a tensor of this process with those of all others.
    """

    normed: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    all_ids: torch.Tensor
    all_masks: torch.Tensor
    first: int
    gather: Callable[[torch.Tensor], torch.Tensor]


def _rows_of(key_values: KeyValues, rows: torch.Tensor) -> KeyValues:
    """Some rows of the keys and values of every layer."""
    return [(key, value) if key is None else (key[rows], value[rows]) for key, value in key_values]


# ---------------------------------------------------------------------- models


class QFormerBlip2Stage1Model(BridgedModel):
    """Base of pre-training and retrieval: features and scores. There is no language model."""

    config_class = QFormerBlip2PreTrainingConfig
    auto_classes = ("AutoModel", "AutoModelForPreTraining")
    config: QFormerBlip2PreTrainingConfig
    bridge_class = QFormerPreTrainingBridge
    accepts_loss_kwargs = False
    _no_split_modules = ["QFormerLayer"]
    _tied_weights_keys = {"bridge.lm_head.decoder.weight": "bridge.qformer.word_embeddings.weight"}

    def get_input_embeddings(self) -> nn.Module:
        """Word embeddings of the Q-Former."""
        return self.bridge.qformer.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the Q-Former's word embeddings."""
        self.bridge.qformer.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        """Output layer of the head that predicts tokens."""
        return self.bridge.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Set the output layer of the head that predicts tokens."""
        self.bridge.lm_head.decoder = new_embeddings

    def _inherit_generation_config(self) -> GenerationConfig:
        """The official generation defaults for captions, with the configuration's special tokens."""
        config = self.config
        return GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
            max_length=30, min_length=10, num_beams=3,
        )  # fmt: skip

    @classmethod
    def from_vision(
        cls,
        vision,
        tokenizer="google-bert/bert-base-uncased",
        *,
        init_from: str | os.PathLike | PreTrainedModel | None = None,
        image_processor=None,
        dtype: torch.dtype | str | None = None,
        max_length: int = 32,
        **options,
    ):
        """Put a new Q-Former on top of a vision encoder, which is frozen, to begin stage 1.

        Args:
            vision: Vision encoder: Hub id, folder, configuration (random weights) or loaded model.
            tokenizer: BERT's tokenizer: object, Hub id or folder; `[DEC]` is added if it has no beginning of sequence.
            init_from: BERT to initialise the Q-Former with, see `load_bert`; `None` for random weights.
            image_processor: The encoder's image processor: object, Hub id or folder; by default it is loaded from the
                encoder's repository.
            dtype: Data type of the vision encoder; the Q-Former is in float32.
            max_length: Longest text, in tokens.
            options: Fields of `QFormerBlip2PreTrainingConfig`; `qformer_config` as a dict.

        Returns:
            Model (in eval mode) and processor.

        Raises:
            ValueError: The parts do not fit together.
        """
        vision_model, name, pin = resolve_part("vision_model", vision, dtype)
        tokenizer = bert_tokenizer(copy.deepcopy(tokenizer))
        qformer = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        config = QFormerBlip2PreTrainingConfig(
            vision_config=vision_model.config,
            qformer_config={**qformer, **options.pop("qformer_config", {})},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end_of_text(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            frozen_parts={"vision_model": pin},
            **options,
        )
        image_processor = load_image_processor(image_processor, name, config.vision_config)
        processor = QFormerBlip2PreTrainingProcessor.from_config(
            config, image_processor, tokenizer, max_length=max_length
        )
        model = cls(config, vision_model=vision_model)
        if init_from is not None:
            model.load_bert(init_from)
        return model.eval(), processor

    @torch.no_grad()
    def load_bert(self, source: str | os.PathLike | PreTrainedModel, **hub_kwargs) -> None:
        """Copy BERT's weights into the Q-Former and the head that predicts tokens, see `QFormer.load_bert`.

        Args:
            source: Hub id, folder, or a loaded `BertForMaskedLM`.
            hub_kwargs: `revision`, `token` and other arguments of `from_pretrained`.

        Raises:
            ValueError: `source` is not a BERT of this size, or its checkpoint is incomplete.
        """
        head, known = self.bridge.qformer.load_bert(source, **hub_kwargs), self.bridge.lm_head
        known.transform_dense.weight.copy_(head["transform.dense.weight"])
        known.transform_dense.bias.copy_(head["transform.dense.bias"])
        known.transform_layer_norm.weight.copy_(head["transform.LayerNorm.weight"])
        known.transform_layer_norm.bias.copy_(head["transform.LayerNorm.bias"])
        known.bias[: len(head["bias"])].copy_(head["bias"])

    # ------------------------------------------------------------------ features

    def _normed(self, pixel_values: torch.Tensor | None, patch_features: torch.Tensor | None) -> torch.Tensor:
        """Patch features after the layer norm, which the Q-Former reads."""
        if (pixel_values is None) == (patch_features is None):
            raise ValueError("Give exactly one of pixel_values and patch_features.")
        if patch_features is None:
            patch_features = self.get_patch_features(pixel_values)
        return self.bridge.vision_layer_norm(patch_features.to(self.bridge.dtype))

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, patch_features: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Features of images alone.

        Args:
            pixel_values: `(num_images, channels, height, width)`.
            patch_features: `(num_images, num_patches, vision_dim)` from `get_patch_features`, instead of pixels.

        Returns:
            `last_hidden_state`: the queries, `(num_images, num_query_tokens, hidden_size)`; `pooler_output`: unit
            vectors to compare with texts, `(num_images, num_query_tokens, embed_dim)`.
        """
        queries = self.bridge.qformer(self._normed(pixel_values, patch_features))
        return BaseModelOutputWithPooling(last_hidden_state=queries, pooler_output=self.bridge.image_features(queries))

    @can_return_tuple
    def get_text_features(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """Features of texts alone.

        Args:
            input_ids: `(num_texts, text_tokens)`, beginning with `[CLS]`, padded on the right.
            attention_mask: `(num_texts, text_tokens)`, 0 for padding.

        Returns:
            `last_hidden_state`: `(num_texts, text_tokens, hidden_size)`; `pooler_output`: unit vectors to compare with
            images, `(num_texts, embed_dim)`.
        """
        hidden_states = self.bridge.qformer(None, input_ids, attention_mask)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.bridge.text_features(hidden_states)
        )

    def get_multimodal_features(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Queries that have read an image together with a text: `(batch, num_query_tokens, hidden_size)`.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            input_ids: `(batch, text_tokens)`.
            attention_mask: `(batch, text_tokens)`, 0 for padding.
            patch_features: `(batch, num_patches, vision_dim)` instead of `pixel_values`.
        """
        normed = self._normed(pixel_values, patch_features)
        return self.bridge.multimodal_features(normed, input_ids, attention_mask)

    def get_itm_logits(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Scores of no match and match, `(batch, 2)`; for the arguments see `get_multimodal_features`."""
        return self.bridge.itm_logits(self._normed(pixel_values, patch_features), input_ids, attention_mask)


class QFormerBlip2ForPreTraining(QFormerBlip2Stage1Model):
    """Stage 1: contrastive, matching and generation loss over image-text pairs, and captions.

    Args:
        config: The configuration, which holds the weights of the losses.
        vision_model: A loaded encoder, which is used without a copy; by default it is built from the configuration.
    """

    @accepts_cache
    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        itg_targets: torch.LongTensor | None = None,
        image_ids: torch.LongTensor | None = None,
        image_negatives: torch.LongTensor | None = None,
        text_negatives: torch.LongTensor | None = None,
        generator: torch.Generator | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        return_loss: bool = True,
    ) -> QFormerBlip2PreTrainingOutput:
        """Compute the losses of a batch of pairs.

        If a process group is initialised, images are compared with the texts of all processes and vice versa; the mean
        of the processes' losses and gradients equals that of one process with all pairs.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            input_ids: `(batch, text_tokens)`, `[CLS]` text `[SEP]`, padded on the right.
            attention_mask: `(batch, text_tokens)`, 0 for padding.
            patch_features: `(batch, num_patches, vision_dim)` from `get_patch_features`, instead of pixels.
            itg_targets: `(batch, text_tokens)`: targets of the generation loss, aligned with `input_ids`, which is the
                default; -100 is ignored. (With the name `labels`, `Trainer` would compute no evaluation loss for
                batches without them.)
            image_ids: `(batch,)`: pairs with the same id show the same image and are not negatives of each other.
            image_negatives: `(batch,)`: index of each text's negative among all processes' images; drawn if `None`.
            text_negatives: `(batch,)`: index of each image's negative among all processes' texts; drawn if `None`.
            generator: Random number generator for drawing negatives.
            cache: When captioning, the cache of the queries and of the text so far; no losses are computed then.
                `past_key_values` is another name for it.
            use_cache: When captioning, extend the cache.
            return_loss: Compute the losses, instead of similarities and features only.

        Returns:
            A `QFormerBlip2PreTrainingOutput`.

        Raises:
            ValueError: Inputs are missing, or there are no negatives to draw from.

        Source: BLIP-2, section 3.2; `blip2_qformer.py`, `Blip2Qformer.forward`.
        """
        if cache is not None:
            return self._caption_step(input_ids, attention_mask, cache, use_cache)
        if input_ids is None:
            raise ValueError("Stage 1 needs pairs: input_ids are missing. Images alone: get_image_features.")
        config = self.config
        if attention_mask is None:
            attention_mask = (input_ids != config.pad_token_id).long()
        pairs = self._pairs(self._normed(pixel_values, patch_features), input_ids, attention_mask, return_loss)
        itc, itm, itg = (bool(return_loss and w) for w in (config.itc_weight, config.itm_weight, config.itg_weight))
        drawn = itm and (image_negatives is None or text_negatives is None)
        compared = itc or drawn or not return_loss

        output = QFormerBlip2PreTrainingOutput()
        queries, key_values, of_images = self.bridge.qformer(pairs.normed, return_key_values=True)
        if compared:
            with torch.set_grad_enabled(torch.is_grad_enabled() and (itc or not return_loss)):
                scores = self._compare(pairs, queries, output)  # of both directions
            positives = self._positives(image_ids, pairs)
        if itc:
            output.loss_itc = self._contrastive_loss(scores, positives)
        if itm:
            if drawn:
                options = {"floor": config.negatives_floor, "generator": generator}
                image_to_text, text_to_image = (each.detach() for each in scores)
                if image_negatives is None:
                    image_negatives = draw_negatives(text_to_image, positives, **options)
                if text_negatives is None:
                    text_negatives = draw_negatives(image_to_text, positives, **options)
            output.image_negatives, output.text_negatives = image_negatives, text_negatives
            self._add_matching_loss(pairs, of_images, output)
        if itg:
            self._add_generation_loss(pairs, key_values, itg_targets, output)
        terms = (
            (config.itc_weight, output.loss_itc),
            (config.itm_weight, output.loss_itm),
            (config.itg_weight, output.loss_itg),
        )
        weighted = [weight * loss for weight, loss in terms if loss is not None]
        output.loss = sum(weighted) if weighted else None
        return QFormerBlip2PreTrainingOutput(**output)

    def _pairs(self, normed: torch.Tensor, input_ids, attention_mask, return_loss: bool) -> Pairs:
        """Gather the texts of all processes.

        Raises:
            ValueError: The numbers of texts and images differ.
        """
        batch = len(normed)
        if input_ids.shape[0] != batch:
            raise ValueError(f"{batch} images, but {input_ids.shape[0]} texts; expected pairs.")
        if not return_loss:
            return Pairs(normed, input_ids, attention_mask, input_ids, attention_mask, 0, nn.Identity())
        if num_processes() == 1:
            return Pairs(normed, input_ids, attention_mask, input_ids, attention_mask, 0, gather)
        all_ids, all_masks = gather_texts(input_ids, attention_mask, self.config.pad_token_id)
        first = dist.get_rank() * batch
        own = slice(first, first + batch)
        return Pairs(normed, all_ids[own], all_masks[own], all_ids, all_masks, first, gather)

    def _compare(self, pairs: Pairs, queries: torch.Tensor, output) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare images and texts: similarities divided by the temperature, image to text and text to image.

        Returns:
            `(batch, texts of all processes)` and `(batch, images of all processes)`.
        """
        bridge = self.bridge
        image_features = bridge.image_features(queries)  # (batch, num_query_tokens, embed_dim)
        text_features = bridge.text_features(bridge.qformer(None, pairs.input_ids, pairs.attention_mask))
        image_to_text = similarities_of(image_features, pairs.gather(text_features))
        text_to_image = similarities_of(pairs.gather(image_features), text_features).T
        output.similarities = image_to_text
        output.image_features, output.text_features = image_features, text_features
        temperature = bridge.temperature.float()
        return image_to_text / temperature, text_to_image / temperature

    def _contrastive_loss(self, scores: tuple[torch.Tensor, torch.Tensor], positives: torch.Tensor) -> torch.Tensor:
        targets = positives.float() / positives.sum(dim=1, keepdim=True)
        smoothing = self.config.label_smoothing
        losses = [nn.functional.cross_entropy(each, targets, label_smoothing=smoothing) for each in scores]
        return sum(losses) / 2

    def _add_matching_loss(self, pairs: Pairs, of_images: KeyValues, output) -> None:
        """Compute the matching loss of the pairs, the texts with other images, and the images with other texts.

        Of this process's images it takes the keys and values that the queries have read.
        """
        own, negatives = torch.arange(len(pairs.normed), device=pairs.normed.device), output.image_negatives
        ids, masks = pairs.input_ids, pairs.attention_mask
        other_ids, other_masks = pairs.all_ids[output.text_negatives], pairs.all_masks[output.text_negatives]
        if num_processes() == 1:
            images = _rows_of(of_images, torch.cat((own, negatives, own)))
            texts = torch.cat((ids, ids, other_ids)), torch.cat((masks, masks, other_masks))
            output.itm_logits = self.bridge.itm_logits(None, *texts, images)  # (3 * batch, 2)
        else:
            images = _rows_of(of_images, torch.cat((own, own)))
            texts = torch.cat((ids, other_ids)), torch.cat((masks, other_masks))
            of_pairs, of_other_texts = self.bridge.itm_logits(None, *texts, images).chunk(2)
            of_other_images = self.bridge.itm_logits(pairs.gather(pairs.normed)[negatives], ids, masks)
            output.itm_logits = torch.cat((of_pairs, of_other_images, of_other_texts))
        matches = (torch.arange(3 * len(own), device=own.device) < len(own)).long()
        output.loss_itm = nn.functional.cross_entropy(output.itm_logits, matches)

    def _add_generation_loss(self, pairs: Pairs, key_values, targets, output) -> None:
        """Compute the generation loss of the captions, which attend to the queries' keys and values."""
        decoder_ids = pairs.input_ids.clone()
        decoder_ids[:, 0] = self.config.bos_token_id
        hidden = self.bridge.qformer(None, decoder_ids, pairs.attention_mask, "itg", key_values)
        output.logits = self.bridge.lm_head(hidden)  # (batch, text_tokens, vocab_size)
        output.loss_itg = self._generation_loss(output.logits, decoder_ids, pairs.attention_mask, targets)

    @staticmethod
    def _positives(image_ids: torch.Tensor | None, pairs: Pairs) -> torch.Tensor:
        """Boolean, `(batch, pairs of all processes)`, true for pairs that show the same image."""
        if image_ids is None:
            batch = len(pairs.normed)
            image_ids = torch.arange(pairs.first, pairs.first + batch, device=pairs.normed.device)
        return image_ids[:, None] == pairs.gather(image_ids)[None]

    def _generation_loss(self, logits, decoder_ids, attention_mask, targets) -> torch.Tensor:
        """Next-token loss, averaged over the tokens of all processes."""
        if targets is None:
            targets = decoder_ids.masked_fill(attention_mask == 0, -100)
        labels = nn.functional.pad(targets[:, 1:], (0, logits.shape[1] - targets.shape[1]), value=-100)
        count = (labels != -100).sum()
        if num_processes() > 1:
            count = gather(count[None]).sum() / num_processes()
        total = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels.flatten(),
            label_smoothing=self.config.label_smoothing,
            reduction="sum",
        )
        return total / count.clamp(min=1)

    # ------------------------------------------------------------------ captions

    def _caption_step(
        self, input_ids, attention_mask, cache: Cache, use_cache: bool | None
    ) -> QFormerBlip2PreTrainingOutput:
        """Run one step of captioning with the cache of the queries and the text so far."""
        past = [(layer.keys, layer.values) for layer in cache.layers]
        options = {"past_key_values": past, "return_key_values": True}
        hidden, key_values, _ = self.bridge.qformer(None, input_ids, attention_mask, "itg", **options)
        if use_cache:
            for index, (key, value) in enumerate(key_values):
                cache.update(key, value, index)
        return QFormerBlip2PreTrainingOutput(logits=self.bridge.lm_head(hidden), **cache_argument(cache))

    @property
    def num_logits(self) -> int:
        """Number of columns of the logits."""
        return self.config.qformer_config.vocab_size

    num_logits_to_generate = num_logits  # texts have no placeholders

    @torch.no_grad()
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        **kwargs,
    ):
        """Caption images. The queries read the images once.

        Args:
            pixel_values: `(batch, channels, height, width)`.
            patch_features: `(batch, num_patches, vision_dim)` instead of `pixel_values`.
            input_ids: `(batch, text_tokens)`: the beginning of the captions, `[DEC]` first, without padding; the
                default is `[DEC]` alone.
            kwargs: Arguments of `GenerationMixin.generate`. The defaults are the official ones: 3 beams, 10 to 30
                tokens.

        Returns:
            Ids, `[DEC]` first, as for `GenerationMixin.generate`.

        Raises:
            ValueError: `input_ids` are padded.

        Source: `blip2_qformer.py`, `Blip2Qformer.generate`.
        """
        _, key_values, _ = self.bridge.qformer(self._normed(pixel_values, patch_features), return_key_values=True)
        cache = DynamicCache()
        for index, (key, value) in enumerate(key_values):
            cache.update(key, value, index)
        if input_ids is None:
            input_ids = torch.full((key.shape[0], 1), self.config.bos_token_id, device=key.device)
        mask = kwargs.pop("attention_mask", None)
        mask = input_ids != self.config.pad_token_id if mask is None else mask
        if not bool(mask.all()):
            raise ValueError("The beginnings of the captions have different lengths; caption those images separately.")
        settings = [
            self._generation_setting(name, kwargs.get("generation_config"), kwargs)
            for name in ("num_beams", "num_return_sequences")
        ]
        rows_per_image = max(setting or 1 for setting in settings)
        if rows_per_image > 1:  # `generate` does not expand a cache that was passed in
            cache.batch_repeat_interleave(rows_per_image)
        return super().generate(input_ids=input_ids, attention_mask=mask.long(), **cache_argument(cache), **kwargs)

    @accepts_cache
    def prepare_inputs_for_generation(self, input_ids, cache=None, attention_mask=None, use_cache=None, **kwargs):
        """See `GenerationMixin.prepare_inputs_for_generation`; the cache holds the queries too."""
        seen = cache.get_seq_length() - self.config.qformer_config.num_query_tokens
        return {
            "input_ids": input_ids[:, seen:],
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            **cache_argument(cache),
        }


__all__ = [
    "QFormerBlip2ForPreTraining",
    "QFormerBlip2PreTrainingOutput",
    "QFormerBlip2Stage1Model",
    "QFormerPreTrainingBridge",
]
