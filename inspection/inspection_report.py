"""Everything about a model and some pictures: collected once, then printed or written as one HTML file."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from ..drawing import cell, page_html, picture_html, table_html
from ..inference import question_inputs
from ..modeling import BridgedModel
from .inspection_attention import AnswerAttention, answer_attention
from .inspection_budget import measure_budget, token_budget
from .inspection_drawing import matrix, overlay
from .inspection_gates import gates, image_variance_share, visual_tokens
from .inspection_geometry import Grid, token_grids
from .inspection_looking import Occlusion, WordLikelihood, answer_of, did_it_look, ids_of, occlusion, words_of
from .inspection_queries import (
    Specialisation,
    effective_rank,
    mean_off_diagonal,
    query_table,
    similarity_across,
    similarity_within,
    specialisation,
)


TURNS = 10
MOST_MAPS = 64  # maps of queries in a report


@dataclass(eq=False)
class PictureFindings:
    """What was found about one picture.

    Args:
        name: Its name.
        picture: The picture.
        answer: What the model answered, or was given as its answer.
        words: How likely each word is with the picture and without it.
        word_maps: `(words, tokens)`: where the language model looks for each word; rows that are zero look nowhere.
        shares: `(words,)`: how much of the language model's attention lies on the picture's visual tokens.
        grids: Where the tokens of `word_maps` lie.
        query_maps: `(num_queries, num_patches)`: where each query or latent looks; `None` without them.
        occlusion: What covering parts of the picture costs; `None` if it was not asked for.
    """

    name: str
    picture: Image.Image
    answer: str
    words: list[WordLikelihood]
    word_maps: torch.Tensor
    shares: torch.Tensor
    grids: list[Grid]
    query_maps: torch.Tensor | None
    occlusion: Occlusion | None


@dataclass(eq=False)
class Findings:
    """What was found about a model.

    Args:
        model: Its name.
        model_type: Its family.
        question: What was asked about each picture.
        budget: From `token_budget`.
        measured: From `measure_budget`, with the first picture; empty if it was not asked for.
        gates: From `gates`; empty for families without.
        pictures: What was found about each picture.
        tokens: From `query_figures`; empty without pictures of one size.
        specialisation: Of queries or latents, over at least two pictures; else `None`.
        similarity: `(num_queries, num_queries)`, the mean over pictures; `None` without queries.
    """

    model: str
    model_type: str
    question: str
    budget: list[dict]
    measured: list[dict]
    gates: list[dict]
    pictures: list[PictureFindings]
    tokens: dict
    specialisation: Specialisation | None
    similarity: torch.Tensor | None

    def to_dict(self) -> dict:
        """Everything but pictures and maps, for JSON."""
        return {
            "model": self.model,
            "model_type": self.model_type,
            "question": self.question,
            "budget": self.budget,
            "measured": self.measured,
            "gates": self.gates,
            "visual_tokens": self.tokens,
            "specialisation": None if self.specialisation is None else vars(self.specialisation),
            "pictures": [_picture_dict(found) for found in self.pictures],
        }


def _picture_dict(found: PictureFindings) -> dict:
    words = [
        {**vars(word), "gain": word.gain, "attention_on_picture": float(share)}
        for word, share in zip(found.words, found.shares)
    ]
    hidden = None
    if found.occlusion is not None:
        x, y = found.occlusion.peak
        hidden = {"peak": [x, y], "drop": found.occlusion.drop.tolist()}
    return {"image": found.name, "answer": found.answer, "words": words, "occlusion": hidden}


# ---------------------------------------------------------------------- collecting


def query_figures(tokens: torch.Tensor) -> dict:
    """Figures of the visual tokens of some pictures.

    Args:
        tokens: `(num_images, num_image_tokens, width)`.

    Returns:
        `count`, tokens per picture, `effective_rank`, `similarity_within` pictures, and with several pictures
        `similarity_across` them (of the same token) and `image_variance_share`.
    """
    figures = {"count": tokens.shape[1], "effective_rank": float(effective_rank(tokens).mean())}
    if tokens.shape[1] > 1:
        figures["similarity_within"] = float(mean_off_diagonal(similarity_within(tokens)).mean())
    if len(tokens) > 1:
        figures["similarity_across"] = float(mean_off_diagonal(similarity_across(tokens)).mean())
        figures["image_variance_share"] = image_variance_share(tokens)
    return figures


def inspect_model(
    model: BridgedModel,
    processor,
    name: str,
    pictures: dict[str, Image.Image],
    question: str | None = None,
    answer: str | None = None,
    with_occlusion: bool = True,
    measure: bool = False,
    max_new_tokens: int = 40,
    progress=lambda pictures: pictures,
) -> Findings:
    """Look into a model and what it makes of some pictures.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        name: What to call it.
        pictures: Pictures by name; without any, only gates and token budget are found.
        question: What to ask about each; by default the prompt for captions.
        answer: The answer to look into; by default what the model answers.
        with_occlusion: Whether to cover parts of each picture, which takes up to 65 passes per picture.
        measure: Whether to measure time and memory per image, with the first picture.
        max_new_tokens: Maximum length of an answer, in tokens.
        progress: Wraps the pictures, for a progress bar.

    Returns:
        What was found.

    Raises:
        ValueError: The model answers with nothing, or a picture is too small.
    """
    question = processor.caption_prompt if question is None else question
    names, found, queries = list(pictures), [], []
    for number, label in progress(list(enumerate(names))):
        other = pictures[names[(number + 1) % len(names)]] if len(names) > 1 else None
        ids = answer_of(model, processor, pictures[label], question, max_new_tokens) if answer is None else None
        ids = ids_of(model, processor, answer) if ids is None else ids
        found.append(inspect_picture(model, processor, label, pictures[label], question, ids, other, with_occlusion))
        queries.append(found[-1].query_maps)
    tokens = [visual_tokens(model, question_inputs(processor, [picture], question)) for picture in pictures.values()]
    alike = torch.cat(tokens) if tokens and len({each.shape for each in tokens}) == 1 else None
    has_queries = bool(queries) and queries[0] is not None
    comparable = has_queries and len(queries) > 1 and len({each.shape for each in queries}) == 1
    return Findings(
        model=name,
        model_type=model.config.model_type,
        question=question,
        budget=token_budget({name: model}, turns=TURNS),
        measured=measure_budget(model, processor, pictures[names[0]]) if measure and names else [],
        gates=gates(model) if hasattr(model.bridge, "cross_attention_layers") else [],
        pictures=found,
        tokens={} if alike is None else query_figures(alike.cpu()),
        specialisation=specialisation(torch.stack(queries)) if comparable else None,
        similarity=similarity_within(alike.cpu()).mean(dim=0) if has_queries and alike is not None else None,
    )


def inspect_picture(
    model: BridgedModel,
    processor,
    name: str,
    picture: Image.Image,
    question: str,
    answer_ids: torch.Tensor,
    other: Image.Image | None = None,
    with_occlusion: bool = True,
) -> PictureFindings:
    """Look into what a model makes of one picture.

    Args:
        model: A bridged model with a language model.
        processor: Its processor.
        name: What to call the picture.
        picture: The picture.
        question: What is asked about it.
        answer_ids: `(1, answer_tokens)`.
        other: Another picture, for comparison.
        with_occlusion: Whether to cover parts of the picture.
    """
    attention = answer_attention(model, question_inputs(processor, [picture], question), answer_ids)
    words = words_of(processor, answer_ids[0].tolist())
    to_patches, shares = attention.to_patches().cpu(), attention.share_on_images().cpu()[:, 0]
    return PictureFindings(
        name=name,
        picture=picture,
        answer=processor.tokenizer.decode(answer_ids[0], skip_special_tokens=True).strip(),
        words=did_it_look(model, processor, picture, question, answer_ids, other),
        word_maps=torch.stack([to_patches[tokens].mean(dim=0) for _, tokens in words]),
        shares=torch.stack([shares[tokens].mean() for _, tokens in words]),
        grids=token_grids(model.config, processor, picture.size),
        query_maps=_query_maps(attention),
        occlusion=occlusion(model, processor, picture, question, answer_ids) if with_occlusion else None,
    )


def _query_maps(attention: AnswerAttention) -> torch.Tensor | None:
    return None if attention.bridge is None else attention.bridge_to_patches()[0].cpu()


# ---------------------------------------------------------------------- text


def table_lines(rows: Sequence[dict], columns: Sequence[str]) -> Iterator[str]:
    """Rows as aligned text.

    Args:
        rows: Dicts.
        columns: Their keys to show.
    """
    cells = [[column.replace("_", " ") for column in columns]]
    cells += [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[number]) for line in cells) for number in range(len(columns))]
    for line in cells:
        first, *rest = (cell.ljust(width) if not n else cell.rjust(width)
                        for n, (cell, width) in enumerate(zip(line, widths)))  # fmt: skip
        yield "  ".join([first, *rest]).rstrip()


WORDS = ("word", "picture", "blank", "other", "gain", "attention_on_picture")
BUDGET = ("turn", "visual_tokens", "prompt_tokens", "context_window", "left", "turns_left")
GATES = ("layer", "attention", "feed_forward")
MEASURED = ("images", "prompt_tokens", "seconds", "cache_bytes", "peak_bytes")


def finding_lines(found: Findings) -> Iterator[str]:
    """Findings as text.

    Args:
        found: From `inspect_model`.
    """
    facts = found.to_dict()
    yield f"{found.model}: {found.model_type}"
    for picture in facts["pictures"]:
        yield ""
        yield f"{picture['image']}: {found.question} -> {' '.join(picture['answer'].split())}"
        yield from table_lines(picture["words"], WORDS)
        if picture["occlusion"] is not None:
            yield "the answer depends most on what is at x={:.0f}, y={:.0f}".format(*picture["occlusion"]["peak"])
    if found.tokens:
        yield ""
        yield from (f"visual tokens: {name.replace('_', ' ')} {cell(value)}" for name, value in found.tokens.items())
    if found.specialisation is not None:
        yield _specialised(found.specialisation)
    if found.gates:
        yield ""
        yield "gates (tanh: 0 is closed)"
        yield from table_lines(found.gates, GATES)
    yield ""
    yield "context window, with 100 tokens of text per turn"
    yield from table_lines(found.budget, BUDGET)
    if found.measured:
        yield ""
        yield "measured, until the first token"
        yield from table_lines(found.measured, MEASURED)


def _specialised(score: Specialisation) -> str:
    return (
        f"queries' places differ by {score.score:.3f} nats (by chance {score.null_mean:.3f}, 95 % of the time below "
        f"{score.null_95:.3f}; p = {score.p_value:.3f}); between pictures they move by {score.by_picture:.3f}"
    )


# ---------------------------------------------------------------------- HTML


def _picture_html(found: PictureFindings, facts: dict, question: str) -> Iterator[str]:
    yield f"<h2>{html.escape(found.name)}</h2>"
    yield f"<p><b>{html.escape(question)}</b> {html.escape(found.answer)}</p>"
    figures = [picture_html(found.picture, "the picture")]
    if found.occlusion is not None:
        drop = found.occlusion.drop.flatten()
        figures.append(picture_html(overlay(found.picture, drop, [found.occlusion.grid]), "what the answer depends on"))
    yield f'<div class="grid">{"".join(figures)}</div>'
    yield "<h3>Did it look?</h3><p class='note'>Log-likelihood of each word in nats, with the picture, with a grey one"
    yield "and with another one; what the picture gains; how much attention lies on its visual tokens.</p>"
    yield table_html(facts["words"], WORDS)
    yield "<h3>Where it looks for each word</h3>"
    maps = [picture_html(overlay(found.picture, weights, found.grids), word.word or "(space)")
            for word, weights in zip(found.words, found.word_maps) if float(weights.sum()) > 0]  # fmt: skip
    yield f'<div class="grid">{"".join(maps)}</div>'
    if found.query_maps is not None:
        yield "<h3>What each query looks at</h3>"
        maps = [overlay(found.picture, weights, found.grids) for weights in found.query_maps[:MOST_MAPS]]
        for each in maps:
            each.thumbnail((120, 120))
        yield f'<div class="grid small">{"".join(picture_html(each, str(n)) for n, each in enumerate(maps))}</div>'
        yield "<details><summary>as a table</summary>"
        rows = query_table(found.query_maps[None], found.grids[0].tokens)
        yield table_html(rows, ("query", "entropy", "x", "y"))
        yield "</details>"


def report_html(found: Findings) -> str:
    """Findings as one HTML page that needs nothing else: no network, no scripts.

    Args:
        found: From `inspect_model`.
    """
    facts = found.to_dict()
    parts: list[str] = [f"<h1>{html.escape(found.model)}</h1><p>{html.escape(found.model_type)}</p>"]
    for picture, its_facts in zip(found.pictures, facts["pictures"]):
        parts += _picture_html(picture, its_facts, found.question)
    if found.tokens:
        parts.append("<h2>Visual tokens</h2>")
        parts.append(table_html([{"figure": name.replace("_", " "), "value": value}
                             for name, value in found.tokens.items()], ("figure", "value")))  # fmt: skip
    if found.similarity is not None:
        caption = "cosine similarity of the queries: dark is 0 or less, bright is 1"
        parts.append(picture_html(matrix(found.similarity), caption, "wide"))
    if found.specialisation is not None:
        parts.append(f"<p>{html.escape(_specialised(found.specialisation).capitalize())}.</p>")
    if found.gates:
        parts.append("<h2>Gates</h2><p class='note'>tanh: 0 is closed; the bar shows attention.</p>")
        parts.append(table_html(found.gates, GATES, bar="attention"))
    parts.append("<h2>Context window</h2><p class='note'>One image at the beginning, 100 tokens of text per turn.</p>")
    parts.append(table_html(found.budget, BUDGET))
    if found.measured:
        parts.append("<h3>Measured, until the first token</h3>")
        parts.append(table_html(found.measured, MEASURED))
    return page_html(found.model, parts)


__all__ = [
    "Findings",
    "PictureFindings",
    "finding_lines",
    "inspect_model",
    "inspect_picture",
    "query_figures",
    "report_html",
    "table_lines",
]
