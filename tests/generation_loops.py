"""Generation in the slow, obvious way: the whole model runs anew for every token, without a cache."""

from __future__ import annotations

import torch
from tiny import tiny_image, tiny_model


# each family, and the Q-Former with both kinds of language models
FAMILIES = [("mlp", "llama"), ("qformer", "opt"), ("qformer", "t5"), ("perceiver", "llama")]
TEXTS = ["<image>abababab ab", "<image>c<image>hm?"]
NEW = 6


def endless(bridge: str, language: str = "llama", **options):
    """A tiny model that never ends, so that all rows have the same length, and its processor."""
    model, processor = tiny_model(bridge, language, **options)
    model.generation_config.eos_token_id = None
    return model, processor


def inputs_of(processor, texts=TEXTS):
    """Inputs of some texts, padded on the left; every `<image>` has a picture of its own."""
    images = [tiny_image(index) for index in range(sum(text.count("<image>") for text in texts))]
    return processor(images=images or None, text=list(texts), return_tensors="pt", padding=True)


@torch.no_grad()
def next_outputs(model, inputs, written: torch.Tensor, **options):
    """Outputs of `forward` for the prompts and the tokens written so far, `(rows, tokens)`."""
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    if model.config.is_encoder_decoder:
        start = torch.full((len(written), 1), model.config.decoder_start_token_id)
        return model(**inputs, decoder_input_ids=torch.cat([start, written], dim=1), **options)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], written], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(written)], dim=1)
    return model(**inputs, **options)


def next_scores(model, inputs, written: torch.Tensor) -> torch.Tensor:
    """Logits of the next token, `(rows, columns)`, minus infinity for placeholders that visual tokens replace."""
    logits = next_outputs(model, inputs, written, num_logits=model.num_logits_to_generate).logits[:, -1]
    if model.config.visual_tokens_in_prompt:
        logits[:, model.config.image_token_id] = -torch.inf
    return logits


def loop(model, inputs, choose=lambda scores: scores.argmax(dim=-1), steps: int = NEW) -> torch.Tensor:
    """The tokens that `choose` takes from the scores one after another, `(rows, steps)`."""
    written = torch.empty(len(inputs["input_ids"]), 0, dtype=torch.long)
    for _ in range(steps):
        written = torch.cat([written, choose(next_scores(model, inputs, written))[:, None]], dim=1)
    return written


def new_tokens(model, inputs, **options):
    """What `generate` writes, without the prompt."""
    found = model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **options})
    found = getattr(found, "sequences", found)
    return found[:, 1:] if model.config.is_encoder_decoder else found[:, inputs["input_ids"].shape[1] :]
