"""Log-likelihoods of answers behind few-shot prompts: what `few_shot.rank_answers` is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers.modeling_outputs import BaseModelOutput

from .compat import cache_of
from .prompts import (
    Prefix,
    Prompt,
    PromptMaker,
    common_length,
    is_plain,
    later_states,
    select_rows,
    select_states,
    whole_prompts,
)


@dataclass(eq=False)
class Candidates(Prompt):
    """A query and its choices.

    Args:
        continuations: For every choice the ids that follow `ids`.
    """

    continuations: list[list[int]]


def candidates_of(
    maker: PromptMaker, prompt: Prompt, demonstrations: Sequence[dict], query: dict, choices: Sequence[str]
) -> Candidates:
    """The ids of a query's choices, behind the ids that all of them share with the prompt.

    Args:
        maker: Maker of the prompt.
        prompt: The query's prompt.
        demonstrations: What the prompt shows.
        query: The query.
        choices: Its choices.
    """
    choices = [choice.strip() for choice in choices]
    if maker.model.config.is_encoder_decoder:
        rows = maker.tokenize(choices, add_special_tokens=False)
        return Candidates(prompt.template, prompt.text, prompt.ids, prompt.images, rows)
    before, gap = _before_answer(maker.processor, prompt, demonstrations, query)
    text = prompt.text + before
    ids = maker.tokenize([text])[0] if before else prompt.ids
    rows = _continued_ids(maker, text, ids, [gap + choice for choice in choices])
    shared = min([len(ids), *(common_length(ids, row) for row in rows)])
    return Candidates(prompt.template, text, ids[:shared], prompt.images, [row[shared:] for row in rows])


def _before_answer(processor, prompt: Prompt, demonstrations: Sequence[dict], query: dict) -> tuple[str, str]:
    """What the prompt's format writes between a prompt and its answer: text (such as empty thoughts), and a space."""
    turns = [{name: value for name, value in turn.items() if value is not None} for turn in (*demonstrations, query)]
    for turn in turns:
        if "caption" in turn:
            turn["answer"] = turn.pop("caption")
    mark = "ANSWER"
    while mark in prompt.template:
        mark += "R"
    turns[-1]["answer"] = mark
    answered = processor.few_shot_text(turns)
    if not answered.startswith(prompt.template) or mark not in answered:
        return "", ""
    between = answered[len(prompt.template) : answered.index(mark)]
    before = between.rstrip()
    return before, between[len(before) :]


def _continued_ids(maker: PromptMaker, text: str, ids: list[int], added: list[str]) -> list[list[int]]:
    """Ids of a text with something added to it; if possible, only what follows its last image is tokenized again."""
    start = text.rfind(maker.processor.image_token)
    if start >= 0:
        tail = maker.tokenize([text[start:]], add_special_tokens=False)[0]
        if ids[-len(tail) :] == tail:
            rows = maker.tokenize([text[start:] + each for each in added], add_special_tokens=False)
            return [ids[: -len(tail)] + row for row in rows]
    return maker.tokenize([text + each for each in added])


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def log_likelihoods(
    maker: PromptMaker, queries: list[Candidates], prefix: Prefix | None, batch_size: int
) -> list[list[float]]:
    """Log-likelihood of every continuation, summed over its tokens.

    Args:
        maker: Maker of the prompts.
        queries: Queries and their continuations.
        prefix: The prefix that all of them begin with, or `None`.
        batch_size: Number of continuations per batch.

    Returns:
        A list per query.
    """
    model = maker.model
    rows = [(number, tokens) for number, query in enumerate(queries) for tokens in query.continuations]
    if model.config.is_encoder_decoder:
        scores = _decoder_scores(maker, queries, rows, batch_size)
    else:
        scores = _continuation_scores(maker, queries, rows, prefix, batch_size)
    found: list[list[float]] = [[] for _ in queries]
    for (number, _), score in zip(rows, scores):
        found[number].append(score)
    return found


def _continuation_scores(maker: PromptMaker, queries, rows, prefix: Prefix | None, batch_size: int) -> list[float]:
    """Scores of the rows `(number of the query, continuation)`: every query is run once."""
    model = maker.model
    if prefix is None:
        whole, known = whole_prompts(maker, queries)
    else:
        whole, known = prefix.continued(maker, [query.ids for query in queries])
        known.update(maker.image_inputs(queries, skip=prefix.num_images))
    mask = whole["attention_mask"]
    new = whole["input_ids"][:, 0 if prefix is None else len(prefix.ids) :]
    outputs = model(input_ids=new, attention_mask=mask, use_cache=True, logits_to_keep=1, **known)
    cache = cache_of(outputs)
    if not is_plain(cache):
        return _whole_scores(maker, queries, rows, batch_size)
    first = _log_softmax(outputs.logits[:, -1])
    scores = [float(first[number, tokens[0]]) for number, tokens in rows]
    states = later_states(model, outputs.visual_states)
    longer = [place for place, (_, tokens) in enumerate(rows) if len(tokens) > 1]
    for start in range(0, len(longer), batch_size):
        places = longer[start : start + batch_size]
        index = torch.tensor([rows[place][0] for place in places])
        ids, is_token = maker.padded([rows[place][1] for place in places], left=False)
        logits = model(
            input_ids=ids[:, :-1],
            attention_mask=torch.cat([mask[index.to(mask.device)], is_token[:, :-1]], dim=1),
            cache=select_rows(cache, index),
            visual_states=select_states(states, index, len(queries)),
        ).logits
        for place, likelihood in zip(places, _of_tokens(logits, ids[:, 1:], is_token[:, 1:])):
            scores[place] += likelihood
    return scores


def _of_tokens(logits: torch.Tensor, ids: torch.Tensor, is_token: torch.Tensor) -> list[float]:
    """Summed log-likelihood of each row's ids, `(batch, tokens)`, by the logits that predict them."""
    chosen = _log_softmax(logits).gather(-1, ids[..., None].to(logits.device))[..., 0]
    return chosen.masked_fill(~is_token.bool().to(logits.device), 0).sum(dim=-1).tolist()


def _whole_scores(maker: PromptMaker, queries, rows, batch_size: int) -> list[float]:
    """The same scores without a cache: prompt and continuation in one row."""
    scores = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        whole = [replace(queries[number], ids=queries[number].ids + tokens) for number, tokens in part]
        inputs, images = whole_prompts(maker, whole)
        longest = max(len(tokens) for _, tokens in part)
        ids, is_token = maker.padded([tokens for _, tokens in part])
        logits = maker.model(**inputs, **images, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
        scores += _of_tokens(logits, ids, is_token)
    return scores


def _decoder_scores(maker: PromptMaker, queries, rows, batch_size: int) -> list[float]:
    """Scores of an encoder-decoder, whose encoder reads every prompt once."""
    model = maker.model
    inputs, images = whole_prompts(maker, queries)
    start_of_answer = model.language_model.prepare_decoder_input_ids_from_labels(inputs["input_ids"][:, :1])
    encoded = model(**inputs, **images, decoder_input_ids=start_of_answer).encoder_last_hidden_state
    scores = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        index = torch.tensor([number for number, _ in part], device=encoded.device)
        ids, is_token = maker.padded([tokens for _, tokens in part], left=False)
        logits = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded[index]),
            attention_mask=inputs["attention_mask"][index],
            labels=ids.masked_fill(is_token == 0, -100),
        ).logits
        scores += _of_tokens(logits, ids, is_token)
    return scores


__all__ = ["Candidates", "candidates_of", "log_likelihoods"]
