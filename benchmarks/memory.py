"""The memory that each official release needs, computed from its configuration: no weights are downloaded.

    python benchmarks/memory.py --output benchmarks/results/memory.json

The models are built on the meta device, from the configurations that their publishers give, and their tensors are
counted. What is not counted: the CUDA context (about 0.5 GB), activations, and what a framework keeps in reserve. Plan
for a tenth more.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import typer
from torch import nn
from transformers import (
    AutoModel,
    Blip2VisionConfig,
    CLIPVisionConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    OPTConfig,
    PreTrainedConfig,
    T5Config,
)

from vlbridge.catalogue import CATALOGUE, Release
from vlbridge.compat import build_from_config
from vlbridge.configuration import (
    BridgedConfig,
    MLPLlavaConfig,
    PerceiverFlamingoConfig,
    QFormerBlip2Config,
    QFormerBlip2PreTrainingConfig,
)
from vlbridge.configuration.configuration_llava import default_grid_pinpoints
from vlbridge.configuration.configuration_mpt import MosaicGPTConfig
from vlbridge.inspection.inspection_budget import cross_attention_cost
from vlbridge.modeling.modeling_bridge import fill_vision_geometry
from vlbridge.summary import PARTS


TEXT_TOKENS = 1000  # of prompt and answer, beside one picture
BYTES_16_BIT = 2
BYTES_4_BIT = 0.5 + 4 / 64  # bitsandbytes' NF4: a 32-bit scale per 64 weights
BYTES_TRAINED = 16  # float32: the weight, its gradient and AdamW's two moments


def clip(size: int, layers: int = 24) -> CLIPVisionConfig:
    """CLIP ViT-L/14; LAVIS leaves its last layer out."""
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16, patch_size=14,
        image_size=size,
    )  # fmt: skip


def eva() -> Blip2VisionConfig:
    """EVA-CLIP ViT-g/14 without its last layer, which is the class's default."""
    return Blip2VisionConfig()


def llama(width: int, inner: int, layers: int, vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=width // 128,
        vocab_size=vocab_size,
    )  # fmt: skip


def opt(width: int) -> OPTConfig:
    return OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=32, num_attention_heads=32,
        vocab_size=50272,
    )  # fmt: skip


def flan_t5(width: int, inner: int, heads: int) -> T5Config:
    return T5Config(
        d_model=width, d_ff=inner, d_kv=64, num_layers=24, num_heads=heads, vocab_size=32128,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip


def text_config(name: str) -> PreTrainedConfig | None:
    """The configuration of a release's language model, from the release's name; `None` for stage 1 of BLIP-2."""
    name = name.lower()
    vocab_size = 32001 if "instruct" in name else 32003 if "llava-llama-2" in name or "delta" in name else 32000
    if "mpt1b" in name:
        return MosaicGPTConfig(vocab_size=50280)
    if "mpt7b" in name:
        return MptConfig(d_model=4096, n_heads=32, n_layers=32, vocab_size=50280)
    if "rpj3b" in name:
        return GPTNeoXConfig(
            hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, intermediate_size=10240, vocab_size=50280
        )
    if "opt" in name:
        return opt(2560 if "2.7b" in name else 4096)
    if "flant5" in name:
        return flan_t5(4096, 10240, 64) if "xxl" in name else flan_t5(2048, 5120, 32)
    if "mistral" in name:
        return MistralConfig(vocab_size=32000)  # whose defaults are Mistral-7B's
    if "34b" in name:
        return LlamaConfig(
            hidden_size=7168, intermediate_size=20480, num_hidden_layers=60, num_attention_heads=56,
            num_key_value_heads=8, vocab_size=64000,
        )  # fmt: skip
    if "13b" in name:
        return llama(5120, 13824, 40, vocab_size)
    if "7b" in name or "9b" in name:
        return llama(4096, 11008, 32, vocab_size)
    return None


def config_of(release: Release) -> BridgedConfig:
    """A release's configuration as its conversion writes it, as far as sizes depend on it."""
    name, text = release.name, text_config(release.name)
    if release.family == "openflamingo":
        every = 1 if "3B" in name else 2 if "4B" in name else 4
        config = PerceiverFlamingoConfig(
            vision_config=clip(224), text_config=text, num_latents=64, cross_attention_every_n_layers=every
        )
    elif release.family == "llava":
        first = "llava-v1." not in name
        tiles = {"image_grid_pinpoints": default_grid_pinpoints(336)} if "v1.6" in name else {}
        config = MLPLlavaConfig(
            vision_config=clip(224 if first else 336), text_config=text, vision_feature_layer=-2,
            projector_type="linear" if first else "mlp2x_gelu", **tiles,
        )  # fmt: skip
    else:
        vision = clip(224, layers=23) if "vitL" in name else eva()
        qformer = {"use_text": text is None or "instruct" in name}
        common = {"vision_config": vision, "vision_feature_layer": None if "vitL" in name else -1}
        if text is None:
            config = QFormerBlip2PreTrainingConfig(**common, qformer_config=qformer)
        else:
            config = QFormerBlip2Config(**common, text_config=text, qformer_config=qformer)
    fill_vision_geometry(config)
    return config


def build(config: BridgedConfig) -> nn.Module:
    """The model without memory for its tensors."""
    from vlbridge.modeling import QFormerBlip2ForPreTraining

    with torch.device("meta"):
        if isinstance(config, QFormerBlip2PreTrainingConfig):
            return build_from_config(QFormerBlip2ForPreTraining, config)
        model = AutoModel.from_config(config)
    if isinstance(config.text_config, T5Config):
        # FlanT5's output layer has weights of its own; transformers ties it to the embeddings until weights are loaded
        model.language_model.lm_head.weight = nn.Parameter(torch.empty_like(model.language_model.lm_head.weight))
    return model


def parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def in_4_bit(language_model: nn.Module | None) -> float:
    """Bytes of a language model whose linear layers, but the output layer, are quantised; the rest has 16 bits."""
    if language_model is None:
        return 0
    output = language_model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in language_model.modules()
        if isinstance(module, nn.Linear) and module is not output
    )
    return linear * BYTES_4_BIT + (parameters(language_model) - linear) * BYTES_16_BIT


def cache_bytes(config: BridgedConfig, num_tokens: int) -> int:
    """Keys and values of a language model's layers in 16 bits; of a T5's decoder for what its encoder has read."""
    text = config.text_config
    if text is None:
        return 0
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "d_kv", None) or text.hidden_size // text.num_attention_heads
    return text.num_hidden_layers * 2 * heads * head_dim * num_tokens * BYTES_16_BIT


def row_of(release: Release) -> dict:
    """What one release needs, in bytes, and the numbers of parameters of its parts."""
    config = config_of(release)
    model = build(config)
    vision, bridge, language = (parameters(getattr(model, part)) for part in PARTS)
    visual = config.image_token_range()[1]
    cache = 0
    if config.text_config is not None:
        in_prompt = visual if config.visual_tokens_in_prompt else 1
        cache = cache_bytes(config, TEXT_TOKENS + in_prompt) + cross_attention_cost(config)["cross_attention_bytes"]
    weights = (vision + bridge + language) * BYTES_16_BIT
    return {
        "release": release.name,
        "title": release.title,
        "vision_parameters": vision,
        "bridge_parameters": bridge,
        "language_parameters": language,
        "visual_tokens": visual,
        "weights_16_bit": weights,
        "weights_4_bit": round((vision + bridge) * BYTES_16_BIT + in_4_bit(model.language_model)),
        "cache": cache,
        "training_state": bridge * BYTES_TRAINED,
        "training": weights - bridge * BYTES_16_BIT + bridge * BYTES_TRAINED,
    }


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f}"


def table(rows: list[dict]) -> str:
    """The table of docs/hardware.md: sizes in GB, that is 10^9 bytes."""
    lines = [
        "| release | parameters | bridge | visual tokens | answering, 16 bits | answering, 4 bits "
        "| training the bridge |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        total = sum(row[f"{part}_parameters"] for part in ("vision", "bridge", "language"))
        four_bits = gigabytes(row["weights_4_bit"] + row["cache"]) if row["language_parameters"] else "-"
        lines.append(
            f"| `{row['release']}` | {total / 1e9:.2f} B | {row['bridge_parameters'] / 1e6:,.0f} M "
            f"| {row['visual_tokens']:,} | {gigabytes(row['weights_16_bit'] + row['cache'])} | {four_bits} "
            f"| {gigabytes(row['training'])} |"
        )
    return "\n".join(lines)


def main(output: Path = Path("benchmarks/results/memory.json")) -> None:
    """Compute the table, write it as JSON, and print it as Markdown."""
    rows = [row_of(release) for release in CATALOGUE.values()]
    settings = {"text_tokens": TEXT_TOKENS, "bytes_4_bit": BYTES_4_BIT, "bytes_trained": BYTES_TRAINED}
    output.write_text(json.dumps({**settings, "releases": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    typer.run(main)
