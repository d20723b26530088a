"""What images leave of a context window over the turns of a conversation, and what else they cost."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig

from ..compat import cache_of
from ..configuration import BridgedConfig, MLPLlavaConfig, PerceiverFlamingoConfig, QFormerBlip2Config
from ..configuration.configuration_llava import default_grid_pinpoints
from ..inference import bridged_config, model_source
from ..modeling import BridgedModel
from .inspection_attention import in_eval_mode, on_device


WINDOW = 8192  # of the examples, as in the documents' exercise


def example_configs(window: int = WINDOW) -> dict[str, BridgedConfig]:
    """Configurations with the numbers of visual tokens that are often compared: 196, 576, up to 2,928, 64 and 32.

    LLaVA-1.6's five tiles have 2,880 patches; its lines of tiles end with a token each, up to 48.

    Args:
        window: Context window of the language model, a LLaMA of 7 billion parameters, in tokens.
    """
    text = LlamaConfig(max_position_embeddings=window)

    def common(width: int, size: int, patch: int) -> dict:
        vision = CLIPVisionConfig(hidden_size=width, num_attention_heads=width // 64, image_size=size, patch_size=patch)
        known = {"vision_hidden_size": width, "patch_size": patch, "num_prefix_tokens": 1, "image_size": size}
        return {"vision_config": vision, "text_config": text, "vision_layout": "sequence", **known}

    base, large = common(768, 224, 16), common(1024, 336, 14)
    return {
        "MLP, ViT-B/16 at 224": MLPLlavaConfig(**base),
        "MLP, ViT-L/14 at 336 (LLaVA-1.5)": MLPLlavaConfig(**large),
        "MLP, tiles (LLaVA-1.6)": MLPLlavaConfig(**large, image_grid_pinpoints=default_grid_pinpoints(336)),
        "Perceiver (Flamingo)": PerceiverFlamingoConfig(**common(1024, 224, 14), num_latents=64),
        "Q-Former (BLIP-2)": QFormerBlip2Config(
            **common(1408, 224, 14), qformer_config={"num_query_tokens": 32, "hidden_size": 768}
        ),
    }


def _config(model) -> BridgedConfig:
    if isinstance(model, BridgedConfig):
        return model
    if hasattr(model, "config"):
        return model.config
    return bridged_config(model_source(model), generates=True)


def _image_tokens(config: BridgedConfig, size: tuple[int, int] | None) -> int:
    """Visual tokens of a picture of `(width, height)`; `None` for one that becomes the most."""
    if size is not None and getattr(config, "image_grid_pinpoints", None) is not None:
        return config.num_image_tokens(size[1], size[0])
    return config.image_token_range()[1]


def token_budget(
    models: dict[str, str | os.PathLike | BridgedConfig | BridgedModel],
    num_images: int = 1,
    size: tuple[int, int] | None = None,
    turns: int = 1,
    tokens_per_turn: int = 100,
    window: int | None = None,
) -> list[dict]:
    """What images leave for text, turn by turn.

    Args:
        models: Models by the names that the table gives them: folders, Hub ids, configurations or loaded models.
        num_images: Images at the beginning of the conversation.
        size: Width and height of each, in pixels, for models that cut them into tiles; `None` takes those that become
            the most tokens.
        turns: Number of turns: a question and its answer each.
        tokens_per_turn: Text of a turn, in tokens.
        window: Context window in tokens, if the configuration's should not be taken.

    Returns:
        One row per model and turn: `model`, `turn`, `visual_tokens` per image, `prompt_tokens` (positions that all
        images take), `context_window`, `left` (`None` without a limit), `left_share` and `turns_left`, how many turns
        of this length still fit. For families that condition the language model also `cross_attention_bytes`, the keys
        and values of all images, in 16 bits, and `cross_attention_flops`, what each token of text costs to read them.

    Raises:
        ValueError: A number is out of range, or a model is not a bridged one with a language model.
    """
    if num_images < 0 or turns < 1 or tokens_per_turn < 0:
        raise ValueError(
            f"num_images={num_images}, turns={turns}, tokens_per_turn={tokens_per_turn}; expected at least 0, 1 and 0."
        )
    rows = []
    for name, model in models.items():
        config = _config(model)
        visual = _image_tokens(config, size)
        prompt = num_images * (visual if config.visual_tokens_in_prompt else 1)
        limit = window or getattr(config.text_config.get_text_config(), "max_position_embeddings", None)
        for turn in range(1, turns + 1):
            left = None if limit is None else limit - prompt - turn * tokens_per_turn
            rows.append({
                "model": name,
                "turn": turn,
                "visual_tokens": visual,
                "prompt_tokens": prompt,
                "context_window": limit,
                "left": left,
                "left_share": None if left is None else left / limit,
                "turns_left": None if left is None or not tokens_per_turn else max(left, 0) // tokens_per_turn,
                **cross_attention_cost(config, num_images),
            })  # fmt: skip
    return rows


def cross_attention_cost(config: BridgedConfig, num_images: int = 1) -> dict:
    """What conditioning costs besides tokens: keys and values of all images, and reading them.

    Args:
        config: The model's configuration.
        num_images: Number of images.

    Returns:
        `cross_attention_bytes`, with 16 bits per number, and `cross_attention_flops`, multiplications and additions per
        token of text, with its query and output projections; both 0 for families whose visual tokens are in the prompt.
    """
    if config.visual_tokens_in_prompt:
        return {"cross_attention_bytes": 0, "cross_attention_flops": 0}
    text = config.text_config.get_text_config()
    layers = text.num_hidden_layers // config.cross_attention_every_n_layers
    inner = config.cross_attention_num_heads * config.cross_attention_head_dim
    keys = num_images * config.num_latents
    read = (1 if config.only_attend_immediate_media and num_images else num_images) * config.num_latents
    return {
        "cross_attention_bytes": layers * keys * inner * 2 * 2,
        "cross_attention_flops": layers * (2 * 2 * text.hidden_size * inner + 2 * 2 * read * inner),
    }


@torch.no_grad()
def measure_budget(
    model: BridgedModel,
    processor,
    picture: Image.Image,
    counts: Iterable[int] = (0, 1, 2, 4),
    text: str = "Describe the image briefly.",
    repeats: int = 3,
) -> list[dict]:
    """Measure what images cost: prompts with several copies of a picture run once each.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        picture: The picture.
        counts: Numbers of images to try.
        text: What follows them.
        repeats: Runs of each, of which the fastest counts.

    Returns:
        One row per count: `images`, `prompt_tokens`, `seconds` until the first token, `cache_bytes` (the language
        model's cache, and keys and values of cross-attention) and `peak_bytes` (most memory in use, on NVIDIA GPUs;
        else `None`).
    """
    rows, on_gpu = [], model.device.type == "cuda"
    for count in counts:
        prompt = processor.text_with_images(text, count) if count else text
        inputs = on_device(processor(images=[picture] * count or None, text=prompt, return_tensors="pt"), model)
        if model.config.is_encoder_decoder:
            start_id = model.config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.full((1, 1), start_id, device=model.device)
        seconds = []
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(model.device)
        for _ in range(repeats):
            start = time.perf_counter()
            with in_eval_mode(model):
                outputs = model(**inputs, use_cache=True, logits_to_keep=1)
            if on_gpu:
                torch.cuda.synchronize(model.device)
            seconds.append(time.perf_counter() - start)
        rows.append({
            "images": count,
            "prompt_tokens": inputs["input_ids"].shape[1],
            "seconds": min(seconds),
            "cache_bytes": _bytes_of(cache_of(outputs)) + _bytes_of(outputs.visual_states),
            "peak_bytes": torch.cuda.max_memory_allocated(model.device) if on_gpu else None,
        })  # fmt: skip
    return rows


def _bytes_of(value, known: set[int] | None = None) -> int:
    """Memory of all tensors in a cache or output, each counted once."""
    known = set() if known is None else known
    if isinstance(value, torch.Tensor):
        if value.data_ptr() in known:
            return 0
        known.add(value.data_ptr())
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_bytes_of(each, known) for each in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_bytes_of(each, known) for each in value)
    return _bytes_of(vars(value), known) if "ache" in type(value).__name__ or "Layer" in type(value).__name__ else 0


__all__ = ["cross_attention_cost", "example_configs", "measure_budget", "token_budget"]
