"""Image-text retrieval with a model from stage 1 of Q-Former BLIP-2.

Source: `lavis/models/blip2_models/blip2.py`, `compute_sim_matrix`, of the official code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput

from ..compat import can_return_tuple
from .modeling_contrastive import similarities_of
from .modeling_qformer_pretraining import QFormerBlip2Stage1Model


@dataclass
class QFormerBlip2RetrievalOutput(ModelOutput):
    """Scores of images and texts.

    Args:
        itc_scores: Cosine similarities, `(num_images, num_texts)`.
        itm_logits: Scores of no match and match of pairs, `(batch, 2)`.
        image_features: Unit vectors, `(num_images, num_query_tokens, embed_dim)`.
        text_features: Unit vectors, `(num_texts, embed_dim)`.
    """

    itc_scores: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    text_features: torch.Tensor | None = None


@dataclass
class RankingOutput(ModelOutput):
    """Scores of many images and many texts.

    Args:
        itc_scores: Cosine similarities, `(num_images, num_texts)`.
        image_to_text: Score of each text for an image, `(num_images, num_texts)`: the sum of similarity and matching
            score for the `top_k` most similar texts, minus infinity for the others.
        text_to_image: Score of each image for a text, `(num_texts, num_images)`: the sum of similarity and matching
            score for the `top_k` most similar images, minus infinity for the others.
    """

    itc_scores: torch.Tensor | None = None
    image_to_text: torch.Tensor | None = None
    text_to_image: torch.Tensor | None = None


class QFormerBlip2ForImageTextRetrieval(QFormerBlip2Stage1Model):
    """Scores of images and texts, by the similarity of their features or by reading them together.

    Args:
        config: The configuration.
        vision_model: A loaded encoder, which is used without a copy; by default it is built from the configuration.
    """

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        use_image_text_matching_head: bool = False,
    ) -> QFormerBlip2RetrievalOutput:
        """Compare images and texts.

        Args:
            pixel_values: `(num_images, channels, height, width)`.
            input_ids: `(num_texts, text_tokens)`.
            attention_mask: `(num_texts, text_tokens)`, 0 for padding.
            patch_features: `(num_images, num_patches, vision_dim)` instead of `pixel_values`.
            use_image_text_matching_head: Read each image together with the text at the same index, instead of comparing
                the features of all images with those of all texts.

        Raises:
            ValueError: With the matching head, the numbers of images and texts differ.
        """
        normed = self._normed(pixel_values, patch_features)
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        bridge = self.bridge
        if use_image_text_matching_head:
            if normed.shape[0] != input_ids.shape[0]:
                raise ValueError(f"{normed.shape[0]} images, but {input_ids.shape[0]} texts; matching takes pairs.")
            return QFormerBlip2RetrievalOutput(itm_logits=bridge.itm_logits(normed, input_ids, attention_mask))
        image_features = bridge.image_features(bridge.qformer(normed))
        text_features = bridge.text_features(bridge.qformer(None, input_ids, attention_mask))
        return QFormerBlip2RetrievalOutput(
            itc_scores=similarities_of(image_features, text_features),
            image_features=image_features,
            text_features=text_features,
        )

    @torch.no_grad()
    def rank(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        top_k: int = 128,
        batch_size: int = 32,
    ) -> RankingOutput:
        """Rank many texts for many images and vice versa: all by similarity, then the best by matching.

        Args:
            pixel_values: `(num_images, channels, height, width)`; all inputs may be on any device.
            input_ids: `(num_texts, text_tokens)`.
            attention_mask: `(num_texts, text_tokens)`, 0 for padding.
            patch_features: `(num_images, num_patches, vision_dim)` instead of `pixel_values`.
            top_k: Number of the most similar candidates to rank again with the matching head; 0 for none.
            batch_size: Number of images, texts or pairs per forward pass.

        Returns:
            A `RankingOutput`, on the CPU. With `top_k=0` its scores are the similarities.

        Source: `lavis/models/blip2_models/blip2.py`, `compute_sim_matrix`.
        """
        device = self.bridge.temperature.device
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        patches, image_features, text_features = [], [], []
        for batch in (pixel_values if patch_features is None else patch_features).split(batch_size):
            batch = batch.to(device)
            batch = self.get_patch_features(batch) if patch_features is None else batch
            image_features.append(self.get_image_features(patch_features=batch).pooler_output)
            patches.append(batch.cpu())
        for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size)):
            text_features.append(self.get_text_features(ids.to(device), mask.to(device)).pooler_output)
        texts, patches = torch.cat(text_features), torch.cat(patches)
        itc_scores = torch.cat([similarities_of(images, texts).cpu() for images in image_features])
        if top_k == 0:
            return RankingOutput(itc_scores=itc_scores, image_to_text=itc_scores, text_to_image=itc_scores.T)

        chosen = [torch.zeros(itc_scores.shape, dtype=torch.bool) for _ in range(2)]
        for dim, mask in zip((1, 0), chosen):
            best = itc_scores.topk(min(top_k, itc_scores.shape[dim]), dim=dim).indices
            mask.scatter_(dim, best, True)
        scores = itc_scores.clone()
        pairs = (chosen[0] | chosen[1]).nonzero()  # (pairs, 2): which image, which text
        for images, ids in (part.unbind(dim=1) for part in pairs.split(batch_size)):
            logits = self.get_itm_logits(
                patch_features=patches[images].to(device),
                input_ids=input_ids[ids.to(input_ids.device)].to(device),
                attention_mask=attention_mask[ids.to(attention_mask.device)].to(device),
            )
            scores[images, ids] += logits[:, 1].cpu()
        image_to_text, text_to_image = (scores.masked_fill(~mask, -torch.inf) for mask in chosen)
        return RankingOutput(itc_scores=itc_scores, image_to_text=image_to_text, text_to_image=text_to_image.T)


__all__ = ["QFormerBlip2ForImageTextRetrieval", "QFormerBlip2RetrievalOutput", "RankingOutput"]
