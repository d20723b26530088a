"""A language model that is small enough to be trained in seconds: for exercises and trials, on a few sentences."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from .. import demo
from ..extensions import where_to_load


def train_language_model(
    texts: Sequence[str],
    output: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike = demo.LANGUAGE,
    vocab_size: int = 400,
    hidden_size: int = 128,
    num_hidden_layers: int = 4,
    steps: int = 150,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> float:
    """Train a small LLaMA from scratch on texts, and save it with a tokenizer: a part for `vlbridge.compose`.

    It knows these texts and nothing else. What needs a language model's knowledge can't be tried with it; how a bridge
    is trained to a frozen language model can, in seconds instead of hours.

    Args:
        texts: What it learns, each by itself and with an end. Special tokens in them are read as such.
        output: Folder for the model and its tokenizer.
        tokenizer: Folder or Hub id of the tokenizer that it gets, with a vocabulary made of `texts`; the special tokens
            and the chat template stay.
        vocab_size: Largest number of tokens.
        hidden_size: Width; heads have 32 of it each.
        num_hidden_layers: Number of layers.
        steps: Training steps, with a learning rate that falls to 0 in a straight line.
        batch_size: Texts per step, drawn at random.
        learning_rate: The first learning rate of AdamW.
        seed: Of the weights and of what is drawn.

    Returns:
        The mean loss of the last tenth of the steps, in nats per token.

    Raises:
        ValueError: There are no texts, or a number is not positive.
        OSError: The tokenizer can't be loaded.
    """
    if not texts or min(vocab_size, num_hidden_layers, steps, batch_size) < 1 or hidden_size % 32:
        raise ValueError(
            f"{len(texts)} texts, vocab_size={vocab_size}, num_hidden_layers={num_hidden_layers}, steps={steps}, "
            f"batch_size={batch_size}, hidden_size={hidden_size}; expected at least 1 of each, and a multiple of 32."
        )
    source = AutoTokenizer.from_pretrained(where_to_load(os.fspath(tokenizer)))
    words = source.train_new_from_iterator(texts, vocab_size)
    end = words.eos_token_id
    rows = [torch.tensor([*ids, end]) for ids in words(list(texts), add_special_tokens=False)["input_ids"]]
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=hidden_size, intermediate_size=4 * hidden_size,
        num_hidden_layers=num_hidden_layers, num_attention_heads=hidden_size // 32, max_position_embeddings=2048,
        bos_token_id=words.bos_token_id, eos_token_id=end, pad_token_id=words.pad_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    losses = _fit(model, rows, steps, batch_size, learning_rate, generator)
    model.eval().save_pretrained(output)
    words.save_pretrained(output)
    last = losses[-max(steps // 10, 1) :]
    return sum(last) / len(last)


def _fit(model, rows: list[torch.Tensor], steps, batch_size, learning_rate, generator) -> list[float]:
    """Train on rows of ids, and return the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    losses = []
    for _ in range(steps):
        chosen = [rows[int(index)] for index in torch.randint(len(rows), (batch_size,), generator=generator)]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        is_token = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in chosen])[:, None]
        loss = model(ids, attention_mask=is_token.long(), labels=ids.masked_fill(~is_token, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return losses


__all__ = ["train_language_model"]
