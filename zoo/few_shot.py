"""Few-shot answers: demonstrations that all queries share are run once, and encoded images are used again.

    answerer = FewShotAnswerer(model, processor, demonstrations, max_new_tokens=10)
    answerer.answer(queries)                                     # the same demonstrations for every query
    answer_with(model, processor, chosen, queries)               # a list of demonstrations for each query
    rank_answers(model, processor, demonstrations, queries, choices)

Demonstrations and queries are those of `processor.few_shot`: `{"image", "question", "answer"}` or `{"image",
"caption"}`, and `{"image", "question"}` or `{"image"}`. All families take them in the same way: Perceiver-Flamingo
reads them interleaved, the others as several images in one prompt. Answers are those of the full prompts; in half
precision, as between batches of different size, rounding may decide between tokens that are equally likely.

An encoder-decoder reads its prompt in both directions, so that no part of it can be run once: there only the encoded
images are used again. So it is for language models with sliding windows and for static caches; and an instruction-aware
Q-Former reads every image together with the query, so that patch features are all that is kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import BatchFeature

from .inference import BATCH_SIZE, MAX_NEW_TOKENS, generate_texts
from .modeling import BridgedModel
from .prompts import ImageCache, Prefix, Prompt, PromptMaker, common_length, whole_prompts, without_pictures
from .ranking import candidates_of, log_likelihoods


NORMALIZE = ("sum", "mean")
# Options of `generate` with which a prompt can't be continued from a cache, or that bring a cache of their own
NOT_SHARED = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size", "custom_generate", "cache",
              "past_key_values")  # fmt: skip
# Options of `generate` that look at the prompt's tokens, padding included
LOOKING_BACK = ("repetition_penalty", "no_repeat_ngram_size", "logits_processor")
# Language models with learned positions, which follow the attention mask; so do rotary ones
LEARNED_POSITIONS = ("gpt2", "opt")


# ---------------------------------------------------------------------- choosing demonstrations


def draw(pool_size: int, k: int, seed: int | str = 0, exclude: int | Collection[int] = ()) -> list[int]:
    """Draw demonstrations at random.

    The same seed gives the same ones for every model and on every machine, and more of them begin with the fewer ones:
    4 shots are the first 4 of 8. For other demonstrations per query make the query a part of the seed.

    Args:
        pool_size: Number of demonstrations to draw from.
        k: Number of demonstrations to draw.
        seed: The seed, such as `0` or `f"{seed}-{query}"`.
        exclude: Index or indices that must not be drawn: the query itself.

    Returns:
        Different indices below `pool_size`, in the order in which they were drawn.

    Raises:
        ValueError: The pool is too small.
    """
    left_out = {exclude} if isinstance(exclude, int) else set(exclude)
    available = pool_size - sum(0 <= index < pool_size for index in left_out)
    if not 0 <= k <= available:
        raise ValueError(f"{k} demonstrations are wanted, but the pool has {available} beside what is excluded.")
    generator = random.Random(str(seed))
    chosen: dict[int, None] = {}
    while len(chosen) < k:
        index = int(generator.random() * pool_size)  # of Python's generators only this one never changes
        if index not in left_out:
            chosen[index] = None
    return list(chosen)


# ---------------------------------------------------------------------- answers


class FewShotAnswerer:
    """Answers queries that share their demonstrations, which are encoded and run through the language model once.

    It belongs to the model as it is: after a change of its weights, its bridge or its device, make a new one.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        demonstrations: The examples that every prompt shows, in this order; none for answers without examples.
        text_only: Show the demonstrations without their pictures.
        image_cache: Encoded images of earlier calls, for the same model; by default a new one.
        max_new_tokens: Maximum length of an answer, in tokens.
        generation_options: Further arguments of `generate`; it decodes greedily unless they say otherwise.

    Raises:
        ValueError: A demonstration or one of its images can't be read.
    """

    def __init__(
        self,
        model: BridgedModel,
        processor,
        demonstrations: Sequence[dict],
        *,
        text_only: bool = False,
        image_cache: ImageCache | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        **generation_options,
    ):
        self.model, self.processor = model, processor
        self.images = image_cache or ImageCache(model, processor)
        self.maker = PromptMaker(self.images)
        self.options = {"max_new_tokens": max_new_tokens, **generation_options}
        shown = without_pictures(demonstrations) if text_only else [dict(each) for each in demonstrations]
        processor.few_shot(shown, {"question": "?"}, tokenize=False)  # names the demonstration that is wrong
        with_image = [each for each in shown if each.get("image") is not None]
        for each, image in zip(with_image, self.images.encode([each["image"] for each in with_image])):
            each["image"] = image
        self.demonstrations = shown
        self._prefix: Prefix | None = None
        self._shares: bool | None = None  # not known before the first queries

    def setting(self, name: str, default: bool = True):
        """The value of a setting of `generate`.

        Args:
            name: Its name, such as `"num_beams"`.
            default: Whether to look into the model's own generation configuration, after the options.
        """
        places = [
            self.options,
            self.options.get("generation_config"),
            self.model.generation_config if default else None,
        ]
        values = (place.get(name) if isinstance(place, dict) else getattr(place, name, None) for place in places)
        return next((value for value in values if value is not None), None)

    # ------------------------------------------------------------------ the shared prefix

    @property
    def prefix(self) -> Prefix | None:
        """What all prompts share; `None` before the first queries, and where nothing can be shared."""
        return self._prefix

    def _can_share(self, generating: bool) -> bool:
        """Whether the family, the language model and the options allow a shared prefix."""
        if self.model.config.is_encoder_decoder or self.images.reads_instructions:
            return False
        if not generating:
            return True
        return (
            self.setting("use_cache", default=False) is not False  # MPT's default; it has a cache all the same
            and self.setting("cache_implementation") is None
            and not any(self.setting(name) for name in NOT_SHARED)
        )

    def _find_prefix(self, prompts: Sequence[Prompt]) -> Prefix | None:
        """Run what two different queries, and nearly all of these prompts, begin with."""
        probes = self.maker.make([self.demonstrations] * 2, [{"question": "a"}, {"question": "0"}])
        ids = probes[0].ids[: common_length(*(probe.ids for probe in probes))]
        lengths = [min(common_length(ids, prompt.ids), len(prompt.ids) - 1) for prompt in prompts]
        usual = [length for length in lengths if 2 * length >= len(ids)]  # others are run whole
        return Prefix.run(self.maker, ids[: min(usual)], probes[0].images) if usual and ids else None

    def _prefix_of(self, prompts: Sequence[Prompt], generating: bool = True) -> Prefix | None:
        if not prompts or not self._can_share(generating):
            return None
        if self._shares is None:
            self._prefix = self._find_prefix(prompts)
            self._shares = self._prefix is not None
        return self._prefix

    @property
    def allows_gaps(self) -> bool:
        """Whether padding between the prefix and shorter queries changes nothing.

        Distances of ALiBi count it, and so do options that look for tokens in the prompt: there queries of equal length
        are batched.
        """
        return follows_mask(self.model) and all(self.setting(name) in (None, 0, 1) for name in LOOKING_BACK)

    # ------------------------------------------------------------------ public methods

    def answer(self, queries: Sequence[dict], batch_size: int = BATCH_SIZE) -> list[str]:
        """Answer queries.

        Args:
            queries: `{"image"}` for a caption, `{"image", "question"}` for an answer.
            batch_size: Number of queries per batch.

        Returns:
            One text per query; with `num_return_sequences` so many of each, one query's after the other's.

        Raises:
            ValueError: A query or its image can't be read.
        """
        texts = []
        window = batch_size if self.allows_gaps else 8 * batch_size
        for start in range(0, len(queries), window):
            asked = queries[start : start + window]
            prompts = self.maker.make([self.demonstrations] * len(asked), asked)
            prefix = self._prefix_of(prompts)
            answers = in_batches(
                prompts,
                lambda batch, prefix: self._generate(batch, prefix),
                prefix,
                batch_size,
                self.allows_gaps,
            )
            texts += [text for answer in answers for text in answer]
        return texts

    def _generate(self, prompts: list[Prompt], prefix: Prefix | None) -> list[list[str]]:
        """Texts of one batch: a list per prompt."""
        if prefix is None:
            inputs, known = whole_prompts(self.maker, prompts)
        else:
            copies = max(self.setting("num_beams") or 1, self.setting("num_return_sequences") or 1)
            inputs, known = prefix.continued(self.maker, [prompt.ids for prompt in prompts], copies)
            known.update(self.maker.image_inputs(prompts, skip=prefix.num_images), use_cache=True)
        texts = generate_texts(self.model, self.processor, BatchFeature(inputs), **{**known, **self.options})
        each = len(texts) // len(prompts)
        return [texts[start : start + each] for start in range(0, len(texts), each)]

    def rank(
        self,
        queries: Sequence[dict],
        choices: Sequence[Sequence[str]],
        normalize: str = "sum",
        batch_size: int = BATCH_SIZE,
    ) -> list[list[float]]:
        """Score given answers instead of generating.

        Args:
            queries: As for `answer`.
            choices: For each query, the texts to choose from.
            normalize: As for `rank_answers`.
            batch_size: Queries per batch.

        Returns:
            For each query, the log-likelihood of each choice, in nats.

        Raises:
            ValueError: There are no choices for a query, or `normalize` is unknown.
        """
        return self._rank([self.demonstrations] * len(queries), queries, choices, normalize, batch_size, share=True)

    @torch.no_grad()
    def _rank(self, demonstrations, queries, choices, normalize: str, batch_size: int, share: bool):
        check_choices(queries, choices, normalize)
        scores = []
        gaps = follows_mask(self.model)
        window = batch_size if gaps else 8 * batch_size
        for start in range(0, len(queries), window):
            part = slice(start, start + window)
            asked = zip(demonstrations[part], queries[part], choices[part])
            prompts = self.maker.make(demonstrations[part], queries[part])
            candidates = [candidates_of(self.maker, prompt, *each) for prompt, each in zip(prompts, asked)]
            prefix = self._prefix_of(candidates, generating=False) if share else None
            found = in_batches(
                candidates,
                lambda batch, prefix: log_likelihoods(self.maker, batch, prefix, batch_size),
                prefix,
                batch_size,
                gaps,
            )
            for query, likelihoods in zip(candidates, found):
                lengths = [len(each) if normalize == "mean" else 1 for each in query.continuations]
                scores.append([value / length for value, length in zip(likelihoods, lengths)])
        return scores


def follows_mask(model: BridgedModel) -> bool:
    """Whether a language model takes tokens' positions from the attention mask, not from their places in the row."""
    config = model.config.text_config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) is not None and not getattr(config, "alibi", False)
    return rotary or config.model_type in LEARNED_POSITIONS


def in_batches(prompts: Sequence[Prompt], run: Callable, prefix: Prefix | None, batch_size: int, gaps: bool) -> list:
    """Run prompts in batches: those that begin with the prefix, and the others.

    Args:
        prompts: The prompts.
        run: Function of a batch, and of its prefix or `None`, that returns a list with one result per prompt.
        prefix: The prefix, or `None`.
        batch_size: Number of prompts per batch.
        gaps: Whether prompts of different length may continue the prefix in one batch.

    Returns:
        The results, in the order of the prompts.
    """
    shared = [n for n, prompt in enumerate(prompts) if prefix is not None and prefix.begins(prompt.ids)]
    others = sorted(set(range(len(prompts))) - set(shared))
    results: list = [None] * len(prompts)
    for numbers, part in ((shared, prefix), (others, None)):
        lengths = [len(prompts[number].ids) for number in numbers]
        for batch in batches(lengths, batch_size, gaps or part is None):
            chosen = [numbers[place] for place in batch]
            for number, result in zip(chosen, run([prompts[number] for number in chosen], part)):
                results[number] = result
    return results


def batches(lengths: Sequence[int], batch_size: int, ragged: bool) -> Iterator[list[int]]:
    """Places of batches: as they come if they may be ragged, else of equal length."""
    groups: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        groups.setdefault(0 if ragged else length, []).append(place)
    for group in groups.values():
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


def answer_with(
    model: BridgedModel,
    processor,
    demonstrations: Sequence[Sequence[dict]],
    queries: Sequence[dict],
    *,
    batch_size: int = BATCH_SIZE,
    text_only: bool = False,
    image_cache: ImageCache | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    **options,
) -> list[str]:
    """Answer queries that have demonstrations of their own; every picture is encoded once.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        demonstrations: For each query the examples that its prompt shows, in that order.
        queries: `{"image"}` for a caption, `{"image", "question"}` for an answer.
        batch_size: Number of queries per batch.
        text_only: Show the demonstrations without their pictures.
        image_cache: Encoded images of earlier calls, for the same model; by default a new one of `CACHE_BYTES`.
        max_new_tokens: Maximum length of an answer, in tokens.
        options: Further arguments of `generate`; it decodes greedily unless they say otherwise.

    Returns:
        One text per query; with `num_return_sequences` so many of each, one query's after the other's.

    Raises:
        ValueError: There is not one list of demonstrations per query, or one of them can't be read.
    """
    _check_lists(demonstrations, queries)
    maker = PromptMaker(image_cache or ImageCache(model, processor))
    texts = []
    for start in range(0, len(queries), batch_size):
        shown = demonstrations[start : start + batch_size]
        shown = [without_pictures(each) for each in shown] if text_only else shown
        inputs, images = whole_prompts(maker, maker.make(shown, queries[start : start + batch_size]))
        options_of_batch = {**images, "max_new_tokens": max_new_tokens, **options}
        texts += generate_texts(model, processor, BatchFeature(inputs), **options_of_batch)
    return texts


def _check_lists(demonstrations: Sequence, queries: Sequence) -> None:
    if len(demonstrations) != len(queries):
        raise ValueError(
            f"{len(queries)} queries, but demonstrations for {len(demonstrations)}: give a list per query."
        )


# ---------------------------------------------------------------------- rank classification


def rank_answers(
    model: BridgedModel,
    processor,
    demonstrations: Sequence,
    queries: Sequence[dict],
    choices: Sequence[Sequence[str]],
    normalize: str = "sum",
    *,
    batch_size: int = BATCH_SIZE,
    text_only: bool = False,
    image_cache: ImageCache | None = None,
) -> list[list[float]]:
    """Rank classification: how likely each choice is as the answer.

    A choice is written where the family's prompt has its answers. What is scored are the tokens after the prompt (the
    space before the answer is one of them, or a part of one), without the end of the turn; an encoder-decoder's are
    those of the choice alone. The choices of a query share its prompt, which is run once.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        demonstrations: The examples that every prompt shows, or a list of examples for each query.
        queries: `{"image"}` for a caption, `{"image", "question"}` for an answer.
        choices: The possible answers of every query; whitespace around them is removed.
        normalize: `"sum"` of the tokens' log-likelihoods, or their `"mean"`, which does not prefer short answers.
        batch_size: Number of rows per batch.
        text_only: Show the demonstrations without their pictures.
        image_cache: Encoded images of earlier calls, for the same model; by default a new one.

    Returns:
        For every query one number per choice; the largest is the most likely one.

    Raises:
        ValueError: There is not one list of choices (or of demonstrations) per query, or one of them can't be read.
    """
    options: dict[str, Any] = {"text_only": text_only, "image_cache": image_cache}
    if all(isinstance(each, dict) for each in demonstrations):
        return FewShotAnswerer(model, processor, demonstrations, **options).rank(
            queries, choices, normalize, batch_size
        )
    _check_lists(demonstrations, queries)
    shown = [without_pictures(each) for each in demonstrations] if text_only else demonstrations
    answerer = FewShotAnswerer(model, processor, [], **options)
    return answerer._rank(shown, queries, choices, normalize, batch_size, share=False)


def check_choices(queries: Sequence, choices: Sequence, normalize: str) -> None:
    """Check the arguments of `rank_answers`; raises a `ValueError` that says what is wrong."""
    if normalize not in NORMALIZE:
        raise ValueError(f"normalize is {normalize!r}; expected one of {', '.join(NORMALIZE)}.")
    if len(choices) != len(queries):
        raise ValueError(f"{len(queries)} queries, but choices for {len(choices)}: give a list per query.")
    for number, each in enumerate(choices):
        if isinstance(each, str) or not all(isinstance(choice, str) and choice.strip() for choice in each):
            raise ValueError(
                f"The choices of query {number} are {each!r}; expected a list of texts, none of them empty."
            )


__all__ = ["FewShotAnswerer", "answer_with", "draw", "rank_answers"]
