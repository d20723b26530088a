"""easy-VQA: pictures of one shape each, with questions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from .training_sources_common import build_dataset, text_message


def load_easy_vqa(
    path=None, split=None, streaming=False, pairs=0, questions_per_image=None, multi_turn=False, captions=False,
    caption_question=None, seed=0, source="easy_vqa",
):  # fmt: skip
    """easy-VQA: a record per question, or a conversation per picture.

    Args:
        path: The unpacked folder; by default it is downloaded, see `vlbridge.demo.easy_vqa_dir`.
        split: `"train"` or `"test"`; by default `"train"`.
        streaming: Read the folder while the data set is used.
        pairs: Matched pairs per picture beside its own questions, see `training_easy_vqa.matched_pair`.
        questions_per_image: Number of questions per picture, drawn at random; by default all of them.
        multi_turn: Make one conversation of all questions about a picture, instead of a record per question.
        captions: Give the captions that the questions tell (`"a blue circle"`) instead, one per picture that has one.
            Not with `multi_turn`.
        caption_question: Words that ask for the caption, beside these questions.
        seed: Seed of the draw, which depends on nothing else but the picture.
        source: What the records' column `source` says.

    Raises:
        ValueError: The folder does not hold easy-VQA, or has no such split.
    """
    from .. import demo

    folder = Path(demo.easy_vqa_dir() if path is None else path).expanduser()
    split = split or "train"
    file = folder / split / "questions.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no {split}/questions.json; expected easy-VQA, split 'train' or 'test'.")
    return build_dataset(
        _easy_vqa, [str(file.absolute())], "caption" if captions else "messages", streaming, pairs=pairs, seed=seed,
        questions_per_image=questions_per_image, multi_turn=multi_turn, captions=captions,
        caption_question=caption_question, source=source,
    )  # fmt: skip


def _easy_vqa(
    files, pairs, questions_per_image, multi_turn, captions, caption_question, seed, source
) -> Iterator[dict]:
    from .training_easy_vqa import caption_of, matched_pair, properties_of, read_split, yes_no_templates

    (file,) = map(Path, files)
    examples, problems = read_split(file.parent.parent, file.parent.name)
    for problem in problems:
        row = problem.removeprefix(f"{file}, ").partition(":")[0]
        yield {"id": row, "source": source, "images": [], "why_broken": problem}
    templates = yes_no_templates(examples) if pairs else []
    for example in examples:
        record = {"id": example.image.stem, "source": source, "images": [str(example.image)]}
        caption = caption_of(example)
        if captions:
            if caption:
                yield {**record, "caption": caption}
            continue
        draw = random.Random(f"{seed} {example.image.stem}")
        found = properties_of(example)
        asked = [
            pair
            for _ in range(pairs if len(found) == 2 else 0)
            for pair in matched_pair(found, templates, draw.randrange)
        ]
        own = list(example.questions)
        if questions_per_image is not None:
            own = draw.sample(own, min(len(own), max(0, questions_per_image - len(asked))))
        asked = (asked + own)[:questions_per_image]
        if caption_question and caption:
            asked.append((caption_question, caption))
        if pairs or questions_per_image is not None:
            draw.shuffle(asked)  # the first of a pair is not always about what is there
        turns = [[text_message("user", question, 1), text_message("assistant", answer)] for question, answer in asked]
        if not multi_turn:
            yield from (
                {**record, "id": f"{record['id']}-{number}", "messages": turn} for number, turn in enumerate(turns)
            )
        elif turns:
            for turn in turns[1:]:
                turn[0]["content"] = turn[0]["content"][1:]  # the picture is in the first question
            yield {**record, "messages": [message for turn in turns for message in turn]}


__all__ = ["load_easy_vqa"]
