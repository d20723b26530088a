"""Tiny random parts, made on the spot: every kind of encoder and language model that the families are tested with."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    ResNetConfig,
    SiglipVisionConfig,
    SmolLM3Config,
    T5Config,
    TimmWrapperConfig,
    ViTConfig,
)

import vlbridge
from vlbridge import compat
from vlbridge.configuration import MosaicGPTConfig


VOCAB = 96 + 4  # printable characters and the special tokens below
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE_SIZE = 30

VISION = {
    "clip": lambda: CLIPVisionConfig(**SMALL, image_size=IMAGE_SIZE, patch_size=6, projection_dim=16),
    "siglip": lambda: SiglipVisionConfig(**SMALL, image_size=IMAGE_SIZE, patch_size=6),
    "vit": lambda: ViTConfig(**SMALL, image_size=IMAGE_SIZE, patch_size=6),
    "dinov2": lambda: Dinov2Config(**{**SMALL, "mlp_ratio": 2}, image_size=IMAGE_SIZE, patch_size=6),
    "resnet": lambda: ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", image_size=64
    ),
    "timm": lambda: TimmWrapperConfig(architecture="resnet10t", pretrained_cfg={"input_size": [3, 64, 64]}),
}
# number of patches of an image of the size that the encoder takes, without prefix tokens
NUM_PATCHES = {"clip": 25, "siglip": 25, "vit": 25, "dinov2": 25, "resnet": 64, "timm": 4}

TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LANGUAGE = {
    "llama": lambda: LlamaConfig(**SMALL, **TOKENS, num_key_value_heads=2, max_position_embeddings=512),
    "llama_tied": lambda: LlamaConfig(**SMALL, **TOKENS, tie_word_embeddings=True, max_position_embeddings=512),
    "mistral": lambda: MistralConfig(**SMALL, **TOKENS, num_key_value_heads=2, max_position_embeddings=512),
    "qwen3": lambda: Qwen3Config(**SMALL, **TOKENS, num_key_value_heads=2, head_dim=8, max_position_embeddings=512),
    "qwen2": lambda: Qwen2Config(**SMALL, **TOKENS, num_key_value_heads=2, max_position_embeddings=512),
    "gemma2": lambda: Gemma2Config(
        **SMALL, **TOKENS, num_key_value_heads=2, head_dim=8, max_position_embeddings=512, sliding_window=16
    ),
    "phi3": lambda: Phi3Config(**SMALL, **TOKENS, num_key_value_heads=2, max_position_embeddings=512),
    "smollm3": lambda: SmolLM3Config(**SMALL, **TOKENS, num_key_value_heads=2, max_position_embeddings=512),
    "mpt": lambda: MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=512, **TOKENS),
    "mosaic_gpt": lambda: MosaicGPTConfig(d_model=32, n_heads=4, n_layers=2, mlp_ratio=2, max_seq_len=512, **TOKENS),
    "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **TOKENS),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL, **TOKENS, max_position_embeddings=512),
    "opt": lambda: OPTConfig(
        **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
        **TOKENS,
        ffn_dim=48,
        word_embed_proj_dim=24,
        max_position_embeddings=512,
        dropout=0.1,
    ),
    "t5": lambda: T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCAB, pad_token_id=0, eos_token_id=2,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    ),
}  # fmt: skip


def llama_in_whole_blocks() -> LlamaConfig:
    """For bitsandbytes: on CPUs with AVX512-BF16 it packs 4-bit weights in full blocks of 64 columns and 32 rows."""
    sizes = {**SMALL, "hidden_size": 128, "intermediate_size": 192}
    return LlamaConfig(**sizes, **TOKENS, num_key_value_heads=2, max_position_embeddings=512)


QFORMER = {
    "num_query_tokens": 5,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
# small options of every family; families that are not listed are small by default
BRIDGE_OPTIONS = {
    **dict.fromkeys(vlbridge.FAMILIES, {}),
    "mlp": {},
    "qformer": {"qformer_config": QFORMER},
    "perceiver": {"num_latents": 6, "resampler_depth": 2, "resampler_num_heads": 2, "resampler_head_dim": 8,
                  "cross_attention_num_heads": 2, "cross_attention_head_dim": 8},
}  # fmt: skip
# every family with each kind of language model that it must work with
COMBINATIONS = [("mlp", "llama"), ("mlp", "opt"), ("mlp", "t5"), ("qformer", "llama"), ("qformer", "opt"),
                ("qformer", "t5"), ("perceiver", "llama"), ("perceiver", "opt")]  # fmt: skip
LISTED = {family for family, _ in COMBINATIONS}
COMBINATIONS += [
    (family, language) for family in vlbridge.FAMILIES if family not in LISTED for language in ("llama", "t5")
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable character."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *string.printable[:96]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def bert_like_tokenizer() -> PreTrainedTokenizerFast:
    """BERT's special tokens around words `w0` to `w43`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: index for index, token in enumerate([*special, *(f"w{k}" for k in range(44))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{token.strip('[]').lower()}_token": token for token in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny_model(bridge: str, language: str = "llama", vision: str = "clip", seed: int = 0, **options):
    """A composed tiny model and its processor, with gates open and token rows drawn, so that everything matters."""
    torch.manual_seed(seed)
    model, processor = vlbridge.compose(
        VISION[vision](),
        LANGUAGE[language](),
        bridge,
        tokenizer=tiny_tokenizer(),
        **{**BRIDGE_OPTIONS[bridge], **options},
    )
    spread_weights(model)
    return model, processor


def tiny_bridge_folder(folder: Path, bridge: str, language: str = "llama") -> Path:
    """A saved bridge with everything opened and drawn as in `tiny_model`, and its parts: `bridge`, `eye` and `old`."""
    trained, processor = tiny_model(bridge, language)
    trained.vision_model.save_pretrained(folder / "eye")
    trained.language_model.save_pretrained(folder / "old")
    processor.tokenizer.save_pretrained(folder / "old")
    parts = {"image_processor": processor.image_processor, "tokenizer": tiny_tokenizer()}
    model, processor = vlbridge.compose(folder / "eye", folder / "old", bridge, **parts, **BRIDGE_OPTIONS[bridge])
    model.bridge.load_state_dict(trained.bridge.state_dict())
    model.save_pretrained(folder / "bridge", bridge_only=True)
    processor.save_pretrained(folder / "bridge")
    return folder / "bridge"


def tiny_stage1(seed: int = 0, cls=vlbridge.QFormerBlip2ForPreTraining, **options):
    """A tiny model of stage 1 of Q-Former BLIP-2 and its processor."""
    torch.manual_seed(seed)
    qformer_config = {**QFORMER, "max_position_embeddings": 40, **options.pop("qformer_config", {})}
    vision = options.pop("vision", None) or VISION["clip"]()
    model, processor = cls.from_vision(
        vision, bert_like_tokenizer(), qformer_config=qformer_config, **{"embed_dim": 16, **options}
    )
    spread_weights(model)
    return model, processor


def clip_image_processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def spread_weights(model) -> None:
    """Make random weights large enough that a wrong mask or a lost image changes tokens, not the fifth decimal."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_gate.weight"):
                parameter.fill_(0.7)
            elif parameter.ndim > 1:
                parameter.normal_(0, 0.15, generator=generator)


def dequantised_weights(model) -> dict[str, torch.Tensor]:
    """Weights of a model's quantised layers as bitsandbytes reads them, by the layers' names.

    Ask before the model runs: on CPUs with AVX512-BF16 the first run in eval mode packs 4-bit weights another way.
    """
    from bitsandbytes import functional, nn

    weights = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear4bit):
            weights[name] = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        elif isinstance(layer, nn.Linear8bitLt):
            weights[name] = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).float()
    return weights


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def tiny_image(seed: int = 0, size: tuple[int, int] = (40, 33)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def checkpoint_activations(model, **options) -> None:
    """Switch gradient checkpointing on, by the name that it has in this release of transformers."""
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch(options or None)


# ends by itself, with the first release of PEFT that the installed transformers asks for
needs_peft = pytest.mark.skipif(compat.lacking_peft() is not None, reason=compat.lacking_peft() or "")
needs_fsdp2 = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="torch 2.6 has FSDP2 for GPUs alone"
)
# transformers' own decorators, which every language model has, are beyond what torch 2.6 can compile in one graph
needs_compile = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.7"), reason="torch 2.6 can't compile transformers' models in one graph"
)
