"""The Q-Former: learned queries that read an image through cross-attention, optionally together with text.

Source: BLIP-2 (arXiv 2301.12597, section 3.1), InstructBLIP (arXiv 2305.06500, section 2.3);
`lavis/models/blip2_models/{Qformer,blip2}.py` of the official code.
"""

from __future__ import annotations

import os
import re
from typing import ClassVar, Literal

import torch
from torch import nn
from transformers import BertForMaskedLM, GradientCheckpointingLayer, PreTrainedModel

from ..compat import ACT2FN, ALL_ATTENTION_FUNCTIONS, attention_of, is_flash_attention_requested
from ..compat import initialization as init
from ..configuration.configuration_qformer import QFormerBlip2Config, QFormerConfig
from .modeling_pins import summary


Objective = Literal["itc", "itm", "itg"]
KeyValues = list[tuple[torch.Tensor | None, torch.Tensor | None]]  # keys and values of every layer


def joint_attention_mask(objective: Objective, num_queries: int, text_mask: torch.Tensor) -> torch.Tensor:
    """Mask of the self-attention over queries and text.

    Args:
        objective: With `"itc"`, queries attend to queries and text to text (the paper's unimodal mask). With `"itm"`,
            all attend to all (bidirectional). With `"itg"`, queries attend to queries, text to queries and the text so
            far (multimodal causal).
        num_queries: Number of query tokens before the text.
        text_mask: `(batch, text_tokens)`, 0 for padding, which is never attended to.

    Returns:
        Boolean, `(batch, 1, num_queries + text_tokens, num_queries + text_tokens)`, true where attention is allowed.

    Raises:
        ValueError: `objective` is unknown.

    Source: BLIP-2, figure 2.
    """
    length = num_queries + text_mask.shape[1]
    is_text = torch.arange(length, device=text_mask.device) >= num_queries
    allowed = torch.ones(length, length, dtype=torch.bool, device=text_mask.device)
    if objective == "itc":
        allowed = is_text[:, None] == is_text[None]
    elif objective == "itg":
        allowed = ~is_text[None] | allowed.tril() & is_text[:, None]
    elif objective != "itm":
        raise ValueError(f"objective is {objective!r}; expected 'itc', 'itm' or 'itg'.")
    attended = nn.functional.pad(text_mask.bool(), (num_queries, 0), value=True)  # (batch, length)
    allowed = allowed & attended[:, None, None]
    # A fully masked row (text that is all padding) would give NaN: let it attend to everything.
    return allowed | ~allowed.any(dim=-1, keepdim=True)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention without a fused kernel, with the interface of `ALL_ATTENTION_FUNCTIONS`."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2), weights


class QFormerAttention(nn.Module):
    """BERT's attention, which is followed by a residual connection and a layer norm.

    Args:
        config: The Q-Former's configuration, whose `attn_implementation` is used.
        key_value_size: Width of the states to attend to; `None` for self-attention.
    """

    def __init__(self, config: QFormerConfig, key_value_size: int | None = None):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.attention_dropout = nn.Dropout(config.attention_probs_dropout_prob)  # a module: trainers switch them off
        key_value_size = key_value_size or config.hidden_size
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(key_value_size, config.hidden_size)
        self.value = nn.Linear(key_value_size, config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        key_value_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key: torch.Tensor | None = None,
        past_value: torch.Tensor | None = None,
        is_causal: bool = False,
        known: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run attention, the residual connection and the layer norm.

        Args:
            hidden_states: `(batch, queries, hidden_size)`.
            key_value_states: `(batch, keys, key_value_size)`; `None` for self-attention.
            attention_mask: Mask in the form of the attention implementation, see `QFormer.self_attention_mask`.
            past_key: `(batch, heads, past_keys, head_dim)`: keys of earlier tokens.
            past_value: `(batch, heads, past_keys, head_dim)`: values of earlier tokens.
            is_causal: For flash attention: every token attends to itself and the tokens before it.
            known: Keys and values of the states to attend to, from an earlier call, instead of `key_value_states`.

        Returns:
            Hidden states, `(batch, queries, hidden_size)`, and the keys and values of the new tokens.
        """
        query = self._heads(self.query, hidden_states)
        if known is None:
            key_value_states = hidden_states if key_value_states is None else key_value_states
            known = self._heads(self.key, key_value_states), self._heads(self.value, key_value_states)
        key, value = known
        keys = key if past_key is None else torch.cat((past_key, key), dim=2)
        values = value if past_value is None else torch.cat((past_value, value), dim=2)
        dropout = self.attention_dropout.p if self.training else 0.0
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(attention_of(self.config) or "sdpa", eager_attention)
        attended, _ = attend(
            self, query, keys, values, attention_mask, scaling=self.scaling, dropout=dropout, is_causal=is_causal
        )
        attended = attended.flatten(2)  # (batch, queries, hidden_size)
        return self.layer_norm(hidden_states + self.dropout(self.dense(attended))), key, value

    def _heads(self, projection: nn.Linear, states: torch.Tensor) -> torch.Tensor:
        """Projected states, `(batch, heads, tokens, head_dim)`."""
        return projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class QFormerFeedForward(nn.Module):
    """BERT's feed-forward layers, which are followed by a residual connection and a layer norm."""

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dense = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(..., hidden_size)` to `(..., hidden_size)`."""
        hidden = self.dense(self.activation(self.intermediate(hidden_states)))
        return self.layer_norm(hidden_states + self.dropout(hidden))


class QFormerLayer(GradientCheckpointingLayer):
    """A block of the Q-Former: self-attention, cross-attention to the image, feed-forward.

    Only every `cross_attention_frequency`-th block has cross-attention. Queries and text share the self-attention; only
    queries read the image, and each kind has its own feed-forward.

    Args:
        config: The Q-Former's configuration.
        index: Index of the block.
        vision_dim: Channels of the patch features.
    """

    def __init__(self, config: QFormerConfig, index: int, vision_dim: int):
        super().__init__()
        self.attention = QFormerAttention(config)
        reads_image = index % config.cross_attention_frequency == 0
        self.cross_attention = QFormerAttention(config, vision_dim) if reads_image else None
        self.feed_forward_query = QFormerFeedForward(config)
        self.feed_forward_text = QFormerFeedForward(config) if config.use_text else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        patch_features: torch.Tensor | None,
        num_queries: int,
        attention_mask: torch.Tensor | None = None,
        past_key: torch.Tensor | None = None,
        past_value: torch.Tensor | None = None,
        return_key_values: bool = False,
        is_causal: bool = False,
        image_key: torch.Tensor | None = None,
        image_value: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor | None, ...]:
        """Run the block.

        Args:
            hidden_states: `(batch, num_queries + text_tokens, hidden_size)`.
            patch_features: `(batch, num_patches, vision_dim)`; not needed without queries, or if `image_key` is given.
            num_queries: Number of query tokens at the beginning; 0 for text alone.
            attention_mask: Mask of the self-attention, see `QFormerAttention`.
            past_key: Keys of earlier tokens in the self-attention, `(batch, heads, past_keys, head_dim)`.
            past_value: Values of earlier tokens in the self-attention, `(batch, heads, past_keys, head_dim)`.
            return_key_values: Return the self-attention's keys and values of these tokens too, and the image's; those
                are `None` if the block does not read it.
            is_causal: Whether the self-attention is causal, for flash attention.
            image_key: Keys of the images from an earlier call, `(batch, heads, num_patches, head_dim)`.
            image_value: Values of the images from that call, in the same shape.
        """
        hidden_states, key, value = self.attention(hidden_states, None, attention_mask, past_key, past_value, is_causal)
        queries, text = hidden_states[:, :num_queries], hidden_states[:, num_queries:]
        parts = []
        if num_queries:
            if self.cross_attention is not None:
                known = None if image_key is None else (image_key, image_value)
                queries, image_key, image_value = self.cross_attention(queries, patch_features, known=known)
            parts.append(self.feed_forward_query(queries))
        if text.shape[1]:
            parts.append(self.feed_forward_text(text))
        hidden_states = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return (hidden_states, key, value, image_key, image_value) if return_key_values else hidden_states


class QFormer(nn.Module):
    """The Querying Transformer.

    Args:
        config: The Q-Former's configuration.
        vision_dim: Channels of the patch features.
    """

    # Name in BERT's checkpoint -> names here; `{}` is the index of a layer, a trailing dot stands for weight and bias
    bert_names: ClassVar[dict[str, tuple[str, ...]]] = {
        "bert.embeddings.word_embeddings.weight": ("word_embeddings.weight",),
        "bert.embeddings.position_embeddings.weight": ("position_embeddings.weight",),
        "bert.embeddings.LayerNorm.": ("layer_norm.",),
        "bert.encoder.layer.{}.attention.self.query.": ("layers.{}.attention.query.",),
        "bert.encoder.layer.{}.attention.self.key.": ("layers.{}.attention.key.",),
        "bert.encoder.layer.{}.attention.self.value.": ("layers.{}.attention.value.",),
        "bert.encoder.layer.{}.attention.output.dense.": ("layers.{}.attention.dense.",),
        "bert.encoder.layer.{}.attention.output.LayerNorm.": ("layers.{}.attention.layer_norm.",),
        "bert.encoder.layer.{}.intermediate.dense.": (
            "layers.{}.feed_forward_text.intermediate.",
            "layers.{}.feed_forward_query.intermediate.",
        ),
        "bert.encoder.layer.{}.output.dense.": (
            "layers.{}.feed_forward_text.dense.",
            "layers.{}.feed_forward_query.dense.",
        ),
        "bert.encoder.layer.{}.output.LayerNorm.": (
            "layers.{}.feed_forward_text.layer_norm.",
            "layers.{}.feed_forward_query.layer_norm.",
        ),
    }

    def __init__(self, config: QFormerConfig, vision_dim: int):
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.word_embeddings = self.position_embeddings = None
        if config.use_text:
            self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(
            QFormerLayer(config, index, vision_dim) for index in range(config.num_hidden_layers)
        )

    def init_parameters(self, config: QFormerBlip2Config) -> None:
        """Initialise the query tokens."""
        # transformers' port uses zeros; LAVIS draws random numbers, which breaks the symmetry between queries.
        init.normal_(self.query_tokens, mean=0.0, std=config.initializer_range)

    def embed_text(self, input_ids: torch.LongTensor, first_position: int = 0) -> torch.Tensor:
        """Sum of word and position embeddings, before the layer norm.

        Args:
            input_ids: `(batch, text_tokens)`.
            first_position: Position of the first token.

        Returns:
            `(batch, text_tokens, hidden_size)`.

        Raises:
            ValueError: The Q-Former has no text side, or the text is too long.
        """
        if self.word_embeddings is None:
            raise ValueError(
                "This Q-Former reads images only: text needs one made with qformer_config={'use_text': True}."
            )
        end, longest = first_position + input_ids.shape[1], self.position_embeddings.num_embeddings
        if end > longest:
            raise ValueError(f"The text for the Q-Former has {end} tokens; it takes {longest} at most. Truncate it.")
        positions = torch.arange(first_position, end, device=input_ids.device)
        return self.word_embeddings(input_ids) + self.position_embeddings(positions)

    def check_precision(self) -> None:
        """Check that flash attention, which does not support float32, runs in half precision or under autocast.

        Raises:
            ValueError: The Q-Former is not in half precision, and autocast is not enabled.
        """
        dtype, device = self.query_tokens.dtype, self.query_tokens.device.type
        if is_flash_attention_requested(self.config) and dtype not in (torch.float16, torch.bfloat16):
            if not torch.is_autocast_enabled(device):
                raise ValueError(
                    f"The Q-Former is in {dtype}; {attention_of(self.config)} needs float16 or bfloat16. Give dtype= "
                    "to compose or from_pretrained, train under autocast (bf16=True), or leave the Q-Former at SDPA: "
                    "attn_implementation={'qformer_config': 'sdpa', ...}."
                )

    def self_attention_mask(
        self, objective: Objective, num_queries: int, past: int, text_mask: torch.Tensor
    ) -> tuple[torch.Tensor | None, bool]:
        """Build the mask over queries and text in the form of the attention implementation.

        Args:
            objective: Training objective, see `joint_attention_mask`.
            num_queries: Number of query tokens before the text in this call.
            past: Number of keys of queries and text that were computed earlier.
            text_mask: `(batch, text_tokens)`, earlier text included, 0 for padding.

        Returns:
            The mask and whether it is causal. For SDPA the mask is boolean, `(batch, 1, tokens of this call, all
            tokens)`, true where attention is allowed; for flash attention `(batch, all tokens)`, 0 for padding, or
            `None`; for others additive, in the shape of SDPA's.

        Raises:
            ValueError: Flash attention does not support such a mask.
        """
        implementation = attention_of(self.config) or "sdpa"
        if is_flash_attention_requested(requested_attention_implementation=implementation):
            if past and objective == "itg":
                return None, True  # padding follows the text, so the causal mask hides it
            if not past and (not num_queries or objective == "itm"):
                return nn.functional.pad(text_mask, (num_queries, 0), value=1), objective == "itg"
            raise ValueError(
                f"{implementation} has no mask for {objective!r} over queries and text in one pass. Run the queries "
                "first (return_key_values=True) and the text after them, or use attn_implementation='sdpa'."
            )
        first = self.query_tokens.shape[1] if past else num_queries
        mask = joint_attention_mask(objective, first, text_mask)[:, :, past:]
        if implementation == "sdpa":
            return mask, False
        dtype = self.query_tokens.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(dtype).min
        ), False

    def forward(
        self,
        patch_features: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        objective: Objective = "itm",
        past_key_values: KeyValues | None = None,
        return_key_values: bool = False,
        image_key_values: KeyValues | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, KeyValues, KeyValues]:
        """Read images, text, or both together.

        Args:
            patch_features: `(batch, num_patches, vision_dim)`, after the layer norm; `None` for text without queries,
                and with `image_key_values`.
            input_ids: `(batch, text_tokens)`; `None` for queries alone.
            attention_mask: `(batch, text_tokens)`, 0 for padding. With `past_key_values` it covers the earlier text
                too.
            objective: Selects the mask over queries and text, see `joint_attention_mask`.
            past_key_values: Keys and values per layer of the queries and the text before `input_ids` (for `"itg"` only:
                with the other objectives queries attend to text, so both run together).
            return_key_values: Return the keys and values of this call's tokens and of its images too.
            image_key_values: Keys and values of the images per layer, from an earlier call: a row per text here.

        Returns:
            `(batch, tokens, hidden_size)`, queries first; with `return_key_values` also keys and values per layer, of
            the tokens and of the images (`None` where a layer does not read them).

        Raises:
            ValueError: There is nothing to read, the Q-Former has no text side, or flash attention does not support
                the mask.

        Source: `lavis/models/blip2_models/Qformer.py`, `BertModel.forward`.
        """
        images = patch_features if image_key_values is None else image_key_values[0][0]  # the first layer reads them
        if images is None and input_ids is None:
            raise ValueError("The Q-Former needs patch_features, input_ids or both.")
        num_all_queries = self.query_tokens.shape[1]
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        num_queries = num_all_queries if images is not None else 0
        embedded = []
        if num_queries:
            embedded.append(self.query_tokens.expand(images.shape[0], -1, -1))
        self.check_precision()
        mask, is_causal = None, False
        if input_ids is not None:
            embedded.append(self.embed_text(input_ids, max(past - num_all_queries, 0)))
            text_length = input_ids.shape[1] + max(past - num_all_queries, 0)
            if attention_mask is None:
                attention_mask = input_ids.new_ones(input_ids.shape[0], text_length)
            elif attention_mask.shape[1] != text_length:
                raise ValueError(f"The text has {text_length} tokens, but its mask {attention_mask.shape[1]}.")
            mask, is_causal = self.self_attention_mask(objective, num_queries, past, attention_mask)
        hidden_states = self.dropout(self.layer_norm(torch.cat(embedded, dim=1)))
        nothing = [(None, None)] * len(self.layers)
        key_values, of_images = [], []
        for layer, past_key_value, image in zip(self.layers, past_key_values or nothing, image_key_values or nothing):
            # Reentrant checkpointing gives gradients to positional arguments only.
            outputs = layer(
                hidden_states, patch_features, num_queries, mask, *past_key_value, return_key_values, is_causal, *image
            )
            hidden_states, *rest = outputs if return_key_values else (outputs,)
            key_values.append(tuple(rest[:2]))
            of_images.append(tuple(rest[2:]))
        return (hidden_states, key_values, of_images) if return_key_values else hidden_states

    @torch.no_grad()
    def load_bert(self, source: str | os.PathLike | PreTrainedModel, **hub_kwargs) -> dict[str, torch.Tensor]:
        """Copy BERT's weights. Query tokens and cross-attention, which BERT does not have, are not changed.

        Both feed-forwards of a block are initialised with BERT's one. Rows of the word embeddings beyond BERT's
        vocabulary (`[DEC]`) are not changed.

        Args:
            source: Hub id, folder, or a loaded `BertForMaskedLM`.
            hub_kwargs: `revision`, `token` and other arguments of `from_pretrained`.

        Returns:
            The weights of BERT's language modelling head, by BERT's names: the Q-Former has no such head.

        Raises:
            ValueError: `source` is not a BERT of this size, or its checkpoint is incomplete.

        Source: `lavis/models/blip2_models/blip2.py`, `init_Qformer`; `blip2_qformer.py`, `__init__`.
        """
        bert, missing = source, []
        if isinstance(source, PreTrainedModel) and not isinstance(source, BertForMaskedLM):
            raise ValueError(f"The Q-Former is initialised from a BertForMaskedLM, not from a {type(source).__name__}.")
        if not isinstance(source, PreTrainedModel):
            bert, info = BertForMaskedLM.from_pretrained(os.fspath(source), output_loading_info=True, **hub_kwargs)
            missing = sorted(info["missing_keys"])
        weights, own = bert.state_dict(), self.state_dict()
        problems, copies = [f"{name} is not in the checkpoint" for name in missing], {}
        for name, tensor in weights.items():
            number = "".join(re.findall(r"\.layer\.(\d+)\.", name))
            stem = name.replace(f".layer.{number}.", ".layer.{}.")
            kind = "" if stem in self.bert_names else stem.rpartition(".")[2]
            # Token type embeddings and the head have no target.
            for target in self.bert_names.get(stem.removesuffix(kind), ()):
                target = target.replace("{}", number) + kind
                if target not in own:
                    if not re.search("feed_forward_text|word_embeddings|position_embeddings", target):
                        problems.append(f"there is no room for {name}")
                    continue
                room = own[target]
                if target == "word_embeddings.weight" and len(tensor) < len(room):
                    room = room[: len(tensor)]
                if room.shape != tensor.shape:
                    problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(room.shape)}")
                copies[target] = tensor
        fresh = {name for name in own if "cross_attention" in name} | {"query_tokens"}
        problems += [f"nothing for {name}" for name in sorted(own.keys() - copies.keys() - fresh)]
        if problems:
            name = type(source).__name__ if isinstance(source, PreTrainedModel) else source
            raise ValueError(f"The Q-Former can't be initialised from the BERT in {name}: {summary(problems)}.")
        for target, tensor in copies.items():
            self.get_parameter(target)[: len(tensor)].copy_(tensor)
        return {name.removeprefix("cls.predictions."): t for name, t in weights.items() if name.startswith("cls.")}


class QFormerLMHead(nn.Module):
    """BERT's head for predicting tokens, tied to the Q-Former's word embeddings.

    Args:
        config: The Q-Former's configuration.
    """

    def __init__(self, config: QFormerConfig):
        super().__init__()
        self.transform_dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.transform_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def init_parameters(self, config: QFormerBlip2Config) -> None:
        """Set the bias to zero."""
        init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(..., hidden_size)` to scores `(..., vocab_size)`."""
        hidden = self.transform_layer_norm(self.activation(self.transform_dense(hidden_states)))
        return self.decoder(hidden) + self.bias


__all__ = ["Objective", "QFormer", "QFormerLMHead", "joint_attention_mask"]
