"""Samples: what is asked about a picture, and all that people answered. The benchmarks' official files as samples."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..images import expand_paths
from ..training.training_records import open_image
from ..training.training_rows import as_object, parse_json, read_json, read_rows
from ..training.training_sources import load
from ..training.training_sources_common import field_value, key_value, list_value, text_value
from .evaluation_metrics import LETTERS


@dataclass(frozen=True)
class Sample:
    """One thing to ask.

    Args:
        id: What the data set calls it.
        image: `{"path", "bytes"}`, as in records of training data.
        references: All right answers, or all captions that people wrote.
        question: What is asked; `None` where a caption or a class is wanted.
        choices: What to choose from.
        kind: Type of the question or domain of the picture, for the breakdown.
        context: What is said before the question.
        answer: What a demonstration says; by default the first reference.
    """

    id: str
    image: dict
    references: tuple[str, ...]
    question: str | None = None
    choices: tuple[str, ...] | None = None
    kind: str | None = None
    context: str = ""
    answer: str | None = None

    @property
    def image_key(self) -> str:
        """The same for all samples about one picture."""
        return self.image.get("path") or self.id

    @property
    def said(self) -> str:
        """What a demonstration says."""
        return self.references[0] if self.answer is None else self.answer

    def open(self):
        """The picture.

        Raises:
            vlbridge.images.ImageError: It is missing or broken.
        """
        return open_image(self.image)


def _picture(*parts: str | os.PathLike) -> dict:
    return {"path": os.path.join(*map(str, parts)), "bytes": None}


def _first(folder: Path, *names: str) -> Path:
    """The first of several files that there is.

    Raises:
        ValueError: There is none.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has no {' and no '.join(names)}; see the task's layout.")


def _folder(folder: Path, *names: str) -> Path:
    """The first of several folders that there is; the first name where there is none, for the error."""
    return next((folder / name for name in names if (folder / name).is_dir()), folder / names[0])


def _texts(values, place: str, what: str) -> tuple[str, ...]:
    return tuple(text_value(value, place, what) for value in list_value(values, place, what))


# ---------------------------------------------------------------------- by the layer for training data


def _records(source: str, path, **options) -> Iterator[dict]:
    """Records of a layout that training reads too.

    Raises:
        ValueError: A record is broken.
    """
    for record in load(source, path, streaming=True, **options):
        if record["why_broken"] is not None:
            raise ValueError(record["why_broken"])
        yield record


def _vqa(
    folder: Path, questions: Path, annotations: Path, images: Path, image_name: str, kinds: tuple[str, ...]
) -> Iterator[Sample]:
    """VQAv2's two files, which other data sets have too.

    Raises:
        ValueError: There are no answers, or a record is broken.
    """
    if not annotations.is_file():
        raise ValueError(f"{folder} has no {annotations.name}: without people's answers there is nothing to compare.")
    types, chosen = {}, {}
    rows = field_value(as_object(read_json(annotations), str(annotations)), "annotations", str(annotations))
    for number, row in enumerate(list_value(rows, str(annotations), "annotations")):
        place = f"{annotations}, annotation {number}"
        key = str(key_value(field_value(row, "question_id", place), place, "question_id"))
        types[key] = next((str(row[kind]) for kind in kinds if row.get(kind)), None)
        chosen[key] = row.get("multiple_choice_answer")
    records = _records("vqav2", questions, annotations=annotations, images=images, image_name=image_name)
    for record in records:
        if not record["answers"]:
            raise ValueError(f"{annotations}: question {record['id']} has no answers.")
        yield Sample(
            id=record["id"],
            image=record["images"][0],
            references=tuple(record["answers"]),
            question=record["messages"][0]["content"][-1]["text"],
            kind=types[record["id"]],
            answer=_most_common(record["answers"], chosen[record["id"]]),
        )


def _most_common(answers, chosen: str | None = None) -> str:
    """The most frequent answer; of equally frequent ones the one that the annotation has chosen, else the first."""
    counts = Counter(answers)
    return chosen if counts.get(chosen, 0) == max(counts.values()) else counts.most_common(1)[0][0]


def read_vqav2(folder: Path, split: str) -> Iterator[Sample]:
    """VQAv2: `v2_OpenEnded_mscoco_{split}_questions.json`, `v2_mscoco_{split}_annotations.json` and `{split}/`."""
    questions = _first(folder, f"v2_OpenEnded_mscoco_{split}_questions.json")
    annotations = folder / f"v2_mscoco_{split}_annotations.json"
    name = f"COCO_{split}_{{image_id:012d}}.jpg"
    return _vqa(folder, questions, annotations, folder / split, name, ("answer_type",))


def read_okvqa(folder: Path, split: str) -> Iterator[Sample]:
    """OK-VQA: `OpenEnded_mscoco_{split}_questions.json`, `mscoco_{split}_annotations.json` and `{split}/`."""
    questions = _first(folder, f"OpenEnded_mscoco_{split}_questions.json")
    annotations = folder / f"mscoco_{split}_annotations.json"
    name = f"COCO_{split}_{{image_id:012d}}.jpg"
    return _vqa(folder, questions, annotations, folder / split, name, ("question_type",))


def read_textvqa(folder: Path, split: str) -> Iterator[Sample]:
    """TextVQA: `TextVQA_0.5.1_{split}.json` and `train_images/`; or VQAv2's two files, as OpenFlamingo has them."""
    images = _folder(folder, "train_images", "images")
    if (folder / f"{split}_questions_vqa_format.json").is_file():
        questions, annotations = (folder / f"{split}_{what}_vqa_format.json" for what in ("questions", "annotations"))
        yield from _vqa(folder, questions, annotations, images, "{image_id}.jpg", ())
        return
    file = _first(folder, f"TextVQA_0.5.1_{split}.json")
    rows = field_value(as_object(read_json(file), str(file)), "data", str(file))
    for number, row in enumerate(list_value(rows, str(file), "data")):
        place = f"{file}, data {number}"
        answers = _texts(field_value(row, "answers", place), place, "answers")
        name = key_value(field_value(row, "image_id", place), place, "image_id")
        yield _answered(
            id=str(key_value(field_value(row, "question_id", place), place, "question_id")),
            image=_picture(images, f"{name}.jpg"),
            question=text_value(field_value(row, "question", place), place, "question"),
            answers=answers,
            place=place,
        )


def read_vizwiz(folder: Path, split: str) -> Iterator[Sample]:
    """VizWiz: `Annotations/{split}.json` and `{split}/`; or VQAv2's two files, as OpenFlamingo has them."""
    if (folder / f"{split}_questions_vqa_format.json").is_file():
        questions, annotations = (folder / f"{split}_{what}_vqa_format.json" for what in ("questions", "annotations"))
        yield from _vqa(folder, questions, annotations, folder / split, "{image_id}", ("question_type",))
        return
    file = _first(folder, f"Annotations/{split}.json", f"annotations/{split}.json", f"{split}.json")
    for place, row in read_rows(file):
        answers = field_value(row, "answers", place)
        answers = [field_value(one, "answer", f"{place}, answers") for one in list_value(answers, place, "answers")]
        name = text_value(field_value(row, "image", place), place, "image")
        yield _answered(
            id=name,
            image=_picture(folder / split, name),
            question=text_value(field_value(row, "question", place), place, "question"),
            answers=_texts(answers, place, "answer"),
            kind=row.get("answer_type"),
            place=place,
        )


def _answered(place: str, answers: tuple[str, ...], **fields) -> Sample:
    """A sample whose demonstrations say the most frequent answer.

    Raises:
        ValueError: There are no answers.
    """
    if not answers:
        raise ValueError(f"{place} has no answers: there is nothing to compare with.")
    return Sample(references=answers, answer=_most_common(answers), **fields)


# ---------------------------------------------------------------------- questions with one answer


def read_gqa(folder: Path, split: str) -> Iterator[Sample]:
    """GQA: `{split}_questions.json` (also in `questions/`) and `images/`."""
    file = _first(folder, f"{split}_questions.json", f"questions/{split}_questions.json")
    for key, row in as_object(read_json(file), str(file)).items():
        place = f"{file}, {key}"
        types = as_object(row, place).get("types")
        name = key_value(field_value(row, "imageId", place), place, "imageId")
        yield Sample(
            id=key,
            image=_picture(folder, "images", f"{name}.jpg"),
            references=(text_value(field_value(row, "answer", place), place, "answer"),),
            question=text_value(field_value(row, "question", place), place, "question"),
            kind=types.get("structural") if isinstance(types, dict) else None,
        )


def read_pope(folder: Path, split: str) -> Iterator[Sample]:
    """POPE: `coco_pope_{split}.json` (also in `coco/`), one object per line, and `val2014/`; `all` reads all three."""
    for name in ("random", "popular", "adversarial") if split == "all" else (split,):
        file = _first(folder, f"coco_pope_{name}.json", f"coco/coco_pope_{name}.json")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            place = f"{file}, line {number}"
            row = as_object(parse_json(line, place), place)
            label = text_value(field_value(row, "label", place), place, "label")
            if label not in ("yes", "no"):
                raise ValueError(f"{place}: label is {label!r}; expected 'yes' or 'no'.")
            key = key_value(field_value(row, "question_id", place), place, "question_id")
            yield Sample(
                id=f"{name} {key}",
                image=_picture(folder, "val2014", text_value(field_value(row, "image", place), place, "image")),
                references=(label,),
                question=text_value(field_value(row, "text", place), place, "text"),
                kind=name,
            )


def read_scienceqa(folder: Path, split: str) -> Iterator[Sample]:
    """ScienceQA's questions with a picture: `problems.json`, `pid_splits.json` and `images/{split}/{id}/image.png`."""
    file, splits = _first(folder, "problems.json"), _first(folder, "pid_splits.json")
    problems = as_object(read_json(file), str(file))
    images = _folder(folder, f"images/{split}", split)
    for key in list_value(
        field_value(as_object(read_json(splits), str(splits)), split, str(splits)), str(splits), split
    ):
        place = f"{file}, {key}"
        row = as_object(field_value(problems, str(key), str(file)), place)
        if not row.get("image"):
            continue
        choices = _texts(field_value(row, "choices", place), place, "choices")
        right = field_value(row, "answer", place)
        if not isinstance(right, int) or not 0 <= right < min(len(choices), len(LETTERS)):
            raise ValueError(f"{place}: answer is {right!r}; expected the number of one of {len(choices)} choices.")
        yield Sample(
            id=str(key),
            image=_picture(images, str(key), text_value(row["image"], place, "image")),
            references=(LETTERS[right],),
            question=text_value(field_value(row, "question", place), place, "question"),
            choices=choices,
            kind=row.get("subject"),
            context=text_value(row.get("hint") or "", place, "hint"),
        )


def read_easy_vqa(folder: Path, split: str) -> Iterator[Sample]:
    """easy-VQA: `{split}/questions.json` and `{split}/images/`."""
    from ..training.training_easy_vqa import COLORS, NEGATED, SHAPES, load_split

    file = _first(folder, f"{split}/questions.json")
    for number, row in enumerate(list_value(read_json(file), str(file), "questions")):
        if not isinstance(row, list) or [type(value) for value in row] != [str, str, int]:
            raise ValueError(f"{file}, row {number} is {row!r}; expected a question, an answer and a picture's number.")
    for example in load_split(folder, split):
        for number, (question, answer) in enumerate(example.questions):
            shown = (answer == "yes") != bool(NEGATED.search(question))
            kind = "yes/no, shown" if shown else "yes/no, absent"
            yield Sample(
                id=f"{example.image.stem}-{number}",
                image=_picture(example.image),
                references=(answer,),
                question=question,
                kind="color" if answer in COLORS else "shape" if answer in SHAPES else kind,
            )


# ---------------------------------------------------------------------- captions and classes


def _karpathy(folder: Path, file: Path, split: str, picture: Callable[[dict, str], dict]) -> Iterator[Sample]:
    """Karpathy's files: `{"images": [{"filename", "split", "sentences": [{"raw"}, ...]}, ...]}`."""
    wanted = ("train", "restval") if split == "train" else (split,)
    rows = list_value(field_value(as_object(read_json(file), str(file)), "images", str(file)), str(file), "images")
    for number, row in enumerate(rows):
        place = f"{file}, image {number}"
        if field_value(row, "split", place) not in wanted:
            continue
        sentences = list_value(field_value(row, "sentences", place), place, "sentences")
        captions = _texts([field_value(one, "raw", f"{place}, sentences") for one in sentences], place, "raw")
        if not captions:
            raise ValueError(f"{place} has no sentences.")
        yield Sample(id=_name_of(row, number, place), image=picture(row, place), references=captions)


def _name_of(row: dict, number: int, place: str) -> str:
    value = next((row[key] for key in ("cocoid", "imgid", "id") if row.get(key) is not None), number)
    return str(key_value(value, place, "id"))


def read_coco_karpathy(folder: Path, split: str) -> Iterator[Sample]:
    """COCO in Karpathy's splits: `dataset_coco.json`, `train2014/` and `val2014/`."""

    def picture(row: dict, place: str) -> dict:
        names = (text_value(field_value(row, key, place), place, key) for key in ("filepath", "filename"))
        return _picture(folder, *names)

    return _karpathy(folder, _first(folder, "dataset_coco.json"), split, picture)


def read_flickr30k(folder: Path, split: str) -> Iterator[Sample]:
    """Flickr30k in Karpathy's splits: `dataset_flickr30k.json` and `flickr30k-images/`."""
    images = _folder(folder, "flickr30k-images", "images")

    def picture(row: dict, place: str) -> dict:
        return _picture(images, text_value(field_value(row, "filename", place), place, "filename"))

    return _karpathy(folder, _first(folder, "dataset_flickr30k.json"), split, picture)


def read_nocaps(folder: Path, split: str) -> Iterator[Sample]:
    """NoCaps: `nocaps_{split}_4500_captions.json` and `{split}/` (or `images/`); pictures by domain."""
    file = _first(folder, f"nocaps_{split}_4500_captions.json", f"nocaps_{split}.json")
    images = _folder(folder, split, "images")
    found: dict[str, tuple[dict, list[str]]] = {}
    domains = {}
    content = as_object(read_json(file), str(file))
    for number, row in enumerate(list_value(field_value(content, "images", str(file)), str(file), "images")):
        name = os.path.join(str(images), str(field_value(row, "file_name", f"{file}, image {number}")))
        domains[name] = row.get("domain")
    for record in _records("coco_captions", file, images=images):
        image = record["images"][0]
        found.setdefault(image["path"], (image, []))[1].append(record["caption"])
    for name, (image, captions) in found.items():
        yield Sample(id=Path(name).name, image=image, references=tuple(captions), kind=domains.get(name))


def read_imagefolder(folder: Path, split: str) -> Iterator[Sample]:
    """A folder of pictures per class, or pictures with `label` in their metadata: `{split}/`, or the folder itself.

    Not by `datasets`, which guesses splits from names: ImageNet's `ILSVRC2012_val_...` would be a split of their own.
    """
    place = folder / split if (folder / split).is_dir() else folder
    metadata = next(
        (place / name for name in ("metadata.jsonl", "metadata.csv", "metadata.parquet") if (place / name).is_file()),
        None,
    )
    labelled = _of_folders(place) if metadata is None else _of_metadata(place, metadata)
    words = tuple(sorted({word for _, word in labelled}))
    if len(words) < 2:
        raise ValueError(
            f"{place}: the pictures have {len(words)} classes; expected a subfolder per class, or 'label'."
        )
    for file, word in labelled:
        name = str(file.relative_to(place))
        yield Sample(id=name, image=_picture(file), references=(word,), choices=words, kind=word)


def _of_folders(place: Path) -> list[tuple[Path, str]]:
    found = []
    for folder in sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")):
        found += [(Path(file), folder.name.replace("_", " ")) for file in expand_paths([folder], recursive=True)]
    return found


def _of_metadata(place: Path, metadata: Path) -> list[tuple[Path, str]]:
    found = []
    for row_place, row in read_rows(metadata):
        name = text_value(field_value(row, "file_name", row_place), row_place, "file_name")
        label = key_value(field_value(row, "label", row_place), row_place, "label")
        found.append((place / name, str(label).replace("_", " ")))
    return found


#: Readers by name: `reader(folder, split)`.
READERS: dict[str, Callable[[Path, str], Iterator[Sample]]] = {
    "coco_karpathy": read_coco_karpathy,
    "easy_vqa": read_easy_vqa,
    "flickr30k": read_flickr30k,
    "gqa": read_gqa,
    "imagefolder": read_imagefolder,
    "nocaps": read_nocaps,
    "okvqa": read_okvqa,
    "pope": read_pope,
    "scienceqa": read_scienceqa,
    "textvqa": read_textvqa,
    "vizwiz": read_vizwiz,
    "vqav2": read_vqav2,
}


def read_samples(reader: str, folder: str | os.PathLike, split: str) -> list[Sample]:
    """Read a split of a data set.

    Args:
        reader: A key of `READERS`.
        folder: The data set's folder.
        split: Its name in the files.

    Raises:
        ValueError: The folder or a row is not as expected, or the split is empty.
        OSError: A file can't be read.
    """
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected the data set's.")
    samples = list(READERS[reader](folder, split))
    if not samples:
        raise ValueError(f"{folder}: split {split!r} has no samples.")
    seen = set()
    for sample in samples:
        if sample.id in seen:
            raise ValueError(f"{folder}: split {split!r} has {sample.id!r} twice.")
        seen.add(sample.id)
    return samples


__all__ = ["READERS", "Sample", "read_samples"]
