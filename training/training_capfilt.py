"""CapFilt: generate captions for images, score them and the captions from the web, and keep those that match.

Source: BLIP (arXiv 2201.12086, sections 3.3 and 4.1); `lavis/models/blip_models/blip_image_text_matching.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from ..bulk import ahead, num_workers, share
from ..files import replacing, write_json
from ..images import ImageError, load_image
from ..row_files import RowFiles
from .training_capfilt_models import (
    BlipCaptioner,
    BlipMatcher,
    Captioner,
    Matcher,
    SeededSampling,
    Stage1Captioner,
    load_captioner,
    load_matcher,
)
from .training_rows import FORMATS, as_object, json_rows, read_json, read_rows


IMAGE_KEYS = ("image", "file_name", "image_path")
CAPTION_KEYS = ("caption", "text", "captions")
METADATA, SCORES, OPTIONS, SUMMARY = "metadata.jsonl", "scores.jsonl", "options.json", "summary.json"
PARTS = "parts"
WEB, SYNTHETIC = "web", "synthetic"


# ---------------------------------------------------------------------- image-text pairs


@dataclass
class Sample:
    """An image and its captions.

    Args:
        image: Its name in the data set; it also seeds the sampling of its captions.
        path: The image file.
        captions: Its captions; there may be none.
    """

    image: str
    path: Path
    captions: list[str]


def read_samples(data: str | os.PathLike, images: str | os.PathLike | None = None) -> list[Sample]:
    """Read image-text pairs. Captions of the same image are put together.

    Args:
        data: JSON, JSON Lines, CSV or TSV with an image and a caption (or, in JSON, a list of captions) per row; COCO
            captions; or a folder with such a `metadata.jsonl` or `metadata.csv`.
        images: Folder that image paths are relative to; `None` takes the folder of the file.

    Returns:
        One sample per image, in the order of the file.

    Raises:
        ValueError: The file is none of these, or a row lacks something.
        OSError: The file can't be read.
    """
    path = Path(data)
    if path.is_dir():
        path = next((path / name for name in (METADATA, "metadata.csv") if (path / name).is_file()), path / METADATA)
    root = path.parent if images is None else Path(images)
    found: dict[str, Sample] = {}
    for place, row in _rows(path):
        image = next((row[key] for key in IMAGE_KEYS if row.get(key)), None)
        key = next((key for key in CAPTION_KEYS if key in row), None)
        if not isinstance(image, str) or key is None:
            raise ValueError(
                f"{place} has {', '.join(map(str, row)) or 'nothing'}; expected an image ({', '.join(IMAGE_KEYS)}) and "
                f"its caption ({', '.join(CAPTION_KEYS)})."
            )
        captions = row[key] if isinstance(row[key], list) else [row[key]]
        if not all(caption is None or isinstance(caption, str) for caption in captions):
            raise ValueError(f"{place}: {key} is {row[key]!r}; expected a text, or a list of texts.")
        sample = found.setdefault(image, Sample(image, root / image, []))
        for caption in (" ".join((caption or "").split()) for caption in captions):
            if caption and caption not in sample.captions:
                sample.captions.append(caption)
    if not found:
        raise ValueError(f"{path} has no image-text pairs.")
    return list(found.values())


def _rows(path: Path) -> Iterator[tuple[str, dict]]:
    """The rows of a file, each with the words that name it in an error."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: expected {', '.join(FORMATS)}, or a folder with {METADATA}.")
    if path.suffix.lower() != ".json":
        yield from read_rows(path)
        return
    content = read_json(path)
    if not isinstance(content, dict):
        yield from json_rows(content, path)
        return
    if not {"images", "annotations"} <= content.keys():
        raise ValueError(f"{path} holds an object; expected a list of rows, or COCO's images and annotations.")
    names = {image["id"]: image["file_name"] for image in content["images"]}
    yield from ((f"{path}, image {key}", {"image": name, "caption": None}) for key, name in names.items())
    for number, row in enumerate(content["annotations"]):
        place = f"{path}, annotation {number}"
        if row.get("image_id") not in names:
            raise ValueError(f"{place} is of image {row.get('image_id')}, which is not among the images.")
        yield place, {"image": names[row["image_id"]], **{k: row[k] for k in CAPTION_KEYS if k in row}}


# ---------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings:
    """What the scores depend on. It is saved in the output folder.

    Args:
        captioner: Folder or Hub id; not needed if `num_captions` is 0.
        filter: Folder or Hub id.
        prompt: What the captioner is asked; `None` takes its own prompt.
        num_captions: Captions to generate per image; 0 only filters.
        max_new_tokens: Maximum length of a caption, in tokens.
        top_p: Probability mass for nucleus sampling, more than 0, at most 1.
        seed: Random seed for the captions. Beyond it, what is drawn for an image depends on the image's name only.
        dtype: Name of the dtype of both models.

    Raises:
        ValueError: A value is out of range, or a model is missing.
    """

    captioner: str | None = None
    filter: str | None = None
    prompt: str | None = None
    num_captions: int = 1
    max_new_tokens: int = 30
    top_p: float = 0.9
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self):
        if self.num_captions < 0 or self.max_new_tokens < 1:
            raise ValueError(
                f"num_captions is {self.num_captions}, max_new_tokens {self.max_new_tokens}; expected 0 and 1 at least."
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; expected more than 0, at most 1.")
        if self.filter is None:
            raise ValueError("The filter is missing: stage 1 of Q-Former BLIP-2, or BLIP's image-text matcher.")
        if self.captioner is None and self.num_captions:
            raise ValueError("The captioner is missing; with num_captions=0 the captions that exist are only filtered.")


def settings_for(output: str | os.PathLike, default_dtype: str = "float32", **given) -> Settings:
    """The settings of a new or resumed run.

    Args:
        output: Folder of the run.
        default_dtype: The dtype of a new run if `given` has none.
        given: Fields of `Settings`. A resumed run keeps its value of those that are missing or `None`.

    Returns:
        The settings.

    Raises:
        ValueError: The run in `output` was started with other settings.
    """
    path = Path(output) / OPTIONS
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("captioner", "filter"):  # the same folder, from wherever it is named
        if name in given and os.path.isdir(given[name]):
            given[name] = os.path.abspath(given[name])
    recorded = as_object(read_json(path), str(path)) if path.is_file() else {}
    if unknown := sorted(recorded.keys() - {field.name for field in fields(Settings)}):
        raise ValueError(
            f"{path} has {', '.join(unknown)}: it was written by another version. Choose another output folder."
        )
    other = [name for name in given if name in recorded and given[name] != recorded[name]]
    if other:
        differences = ", ".join(f"{name} {recorded[name]!r} (now {given[name]!r})" for name in other)
        raise ValueError(
            f"{output} was started with {differences}. Resume with the same settings, or choose another output folder."
        )
    return Settings(**{"dtype": default_dtype, **recorded, **given})


# ---------------------------------------------------------------------- running


def load_models(settings: Settings, device: str | torch.device) -> tuple[Captioner | None, Matcher]:
    """Load the captioner, if one is needed, and the filter.

    Args:
        settings: They name the models.
        device: Where to put them.

    Returns:
        The captioner, `None` if no captions are generated; and the filter.

    Raises:
        ValueError: A model can't do what it is needed for.
        OSError: There is no such model.
    """
    captioner = None
    if settings.num_captions:
        captioner = load_captioner(settings.captioner, settings.prompt, settings.dtype, device)
    return captioner, load_matcher(settings.filter, settings.dtype, device)


def capfilt(
    samples: Sequence[Sample],
    output: str | os.PathLike,
    settings: Settings,
    *,
    threshold: float = 0.5,
    batch_size: int = 8,
    device: str | torch.device = "cpu",
    load: Callable[[Settings, str | torch.device], tuple[Captioner | None, Matcher]] = load_models,
    progress: bool = True,
    shard: tuple[int, int] = (1, 1),
) -> dict:
    """Generate captions, score all captions, and keep those that match.

    An interrupted run resumes where it stopped. Scores are cached: changing the threshold does not rerun the models.

    Args:
        samples: Image-text pairs, from `read_samples`.
        output: Folder to write to:
            - `scores.jsonl`: a line per image with all captions and their scores, or with what is wrong with it.
            - `metadata.jsonl`: a line per caption that is kept, which `datasets` loads as "imagefolder", with links to
              the images in `images`.
            - `options.json`: the settings.
            - `summary.json`: what is returned.
            - `parts`: a file of scores per batch while the run lasts; with several processes it stays.
        settings: What the scores depend on, from `settings_for`.
        threshold: Captions are kept that match with at least this probability, 0 to 1.
        batch_size: Number of images per batch of the captioner, and of pairs per batch of the filter.
        device: Where to put the models.
        load: Gives the models; called only if there is something to compute.
        progress: Show a progress bar on stderr.
        shard: Which process this is, from 1, of how many that share the images.

    Returns:
        `threshold`; `images`, their number; `failed`, the reason for each image that could not be read; `web` and
        `synthetic`, how many `captions` were scored and `kept`. While other processes have still to do some of the
        images: `images`, and `left`, the number of those.

    Raises:
        ValueError: The threshold, or what is in `output`, can't be used.
        OSError: A file can't be written.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a probability, 0 to 1.")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / OPTIONS, asdict(settings))
    records = read_scores(output / SCORES)
    rows = RowFiles(output / PARTS)
    records |= {record["image"]: record for record in rows.rows()}
    remaining = [sample for sample in samples if not _is_done(records.get(sample.image), sample)]
    mine = [sample for sample in share(samples, *shard) if not _is_done(records.get(sample.image), sample)]
    if mine:
        captioner, matcher = load(settings, device)
        with tqdm(total=len(mine), desc="capfilt", unit="image", disable=not progress) as bar:
            batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
            first = max(rows.done(), default=-1) // shard[1] + 1  # numbers that no other process takes
            for number, batch in enumerate(ahead(_read_images, batches, num_workers(), depth=2), first):
                scored = _score_all(batch, captioner, matcher, settings, batch_size)
                rows.write(number * shard[1] + shard[0] - 1, scored)
                records |= {record["image"]: record for record in scored}
                bar.update(len(batch))
    if len(mine) < len(remaining):  # the last of the processes finds everything
        records |= {record["image"]: record for record in rows.rows()}
        left = sum(not _is_settled(records.get(sample.image), sample) for sample in samples)
        if left:
            return {"images": len(samples), "left": left}
    if remaining:
        with replacing(output / SCORES) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(records[sample.image], ensure_ascii=False) + "\n" for sample in samples)
    if shard[1] == 1:
        shutil.rmtree(rows.folder, ignore_errors=True)
    return _keep(samples, records, output, threshold)


def read_scores(path: str | os.PathLike) -> dict[str, dict]:
    """Read the scores that were computed so far. An incomplete last line is removed from the file.

    Args:
        path: `scores.jsonl`; it need not exist.

    Returns:
        The record of each image; if an image has several lines, the last one counts.

    Raises:
        ValueError: A line other than the last is damaged.
    """
    path, records, end = Path(path), {}, 0
    if not path.is_file():
        return records
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                records[record["image"]] = record
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path}, line {number} is damaged ({error}); delete the line to compute it again."
                ) from error
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)
    return records


def _is_done(record: dict | None, sample: Sample) -> bool:
    """Images that could not be read are tried again, and so are those whose captions have changed."""
    return record is not None and "captions" in record and _texts(record, WEB) == sample.captions


def _texts(record: dict, source: str) -> list[str]:
    return [caption["text"] for caption in record["captions"] if caption["source"] == source]


def _is_settled(record: dict | None, sample: Sample) -> bool:
    """Whether a process has done what it could about an image."""
    return record is not None and ("error" in record or _is_done(record, sample))


def _read_images(batch: Sequence[Sample]) -> list[tuple[Sample, Image.Image | ImageError]]:
    """Samples with their images, or what is wrong with them."""
    found: list[tuple[Sample, Image.Image | ImageError]] = []
    for sample in batch:
        try:
            found.append((sample, load_image(sample.path)))
        except ImageError as error:
            found.append((sample, error))
    return found


def generator_of(sample: Sample, seed: int, index: int) -> torch.Generator:
    """The random generator for one caption of an image.

    Args:
        sample: The image.
        seed: The run's.
        index: Which of the image's captions it is, from 0.
    """
    digest = hashlib.sha256(f"{seed}/{index}/{sample.image}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _score_all(batch, captioner, matcher, settings: Settings, batch_size: int) -> list[dict]:
    """The record of each image of a batch. If the models refuse a batch, its images are tried one by one."""
    readable = [(sample, image) for sample, image in batch if not isinstance(image, ImageError)]
    scored = {sample.image: {"error": image.reason} for sample, image in batch if isinstance(image, ImageError)}
    for part in (readable, *([pair] for pair in readable)):
        if not part or part[0][0].image in scored:
            continue
        try:
            scored |= _score(part, captioner, matcher, settings, batch_size)
        except ValueError as error:
            if len(part) == 1:
                scored[part[0][0].image] = {"error": " ".join(str(error).split())}
    return [{"image": sample.image, **scored[sample.image]} for sample, _ in batch]


def _score(pairs, captioner, matcher, settings: Settings, batch_size: int) -> dict[str, dict]:
    """Captions and scores of images, by the images' names."""
    samples, images = zip(*pairs)
    captions = [[{"text": text, "source": WEB} for text in sample.captions] for sample in samples]
    for index in range(settings.num_captions):
        generators = [generator_of(sample, settings.seed, index) for sample in samples]
        texts = captioner(images, generators, settings.max_new_tokens, settings.top_p)
        for image_captions, text in zip(captions, texts, strict=True):
            image_captions.append({"text": text, "source": SYNTHETIC})
    # an empty caption is recorded, but there is nothing to score
    scorable = [[caption for caption in image_captions if caption["text"]] for image_captions in captions]
    texts = [[caption["text"] for caption in image_captions] for image_captions in scorable]
    for image_captions, scores in zip(scorable, matcher(images, texts, batch_size), strict=True):
        for caption, score in zip(image_captions, scores, strict=True):
            caption["itm_score"] = score
    return {
        sample.image: {"captions": [{"itm_score": None, **caption} for caption in image_captions]}
        for sample, image_captions in zip(samples, captions, strict=True)
    }


# ---------------------------------------------------------------------- what is kept


def _keep(samples: Sequence[Sample], records: dict[str, dict], output: Path, threshold: float) -> dict:
    """Write the captions that pass the threshold, and a summary."""
    failed = {sample.image: records[sample.image]["error"] for sample in samples if "error" in records[sample.image]}
    summary = {"threshold": threshold, "images": len(samples), "failed": failed}
    summary |= {source: {"captions": 0, "kept": 0} for source in (WEB, SYNTHETIC)}
    root = os.path.commonpath([os.path.abspath(sample.path.parent) for sample in samples])
    with replacing(output / METADATA) as temporary, temporary.open("w", encoding="utf-8") as file:
        for sample in samples:
            link = None
            for caption in records[sample.image].get("captions", ()):
                counts, score = summary[caption["source"]], caption["itm_score"]
                counts["captions"] += 1
                if score is None or score < threshold:
                    continue
                counts["kept"] += 1
                link = link or _link(sample.path, root, output)
                row = {"file_name": link, "text": caption["text"], "source": caption["source"], "itm_score": score}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_json(output / SUMMARY, summary, ensure_ascii=False)
    return summary


def _link(path: Path, root: str, output: Path) -> str:
    """Name of an image within `output`, as `datasets` requires: a link is made, or a copy if links are not possible."""
    path = os.path.abspath(path)
    inside = os.path.relpath(path, os.path.abspath(output))
    if not inside.startswith(os.pardir):
        return Path(inside).as_posix()
    name = Path("images") / os.path.relpath(path, root)
    link = output / name
    link.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(path, os.path.realpath(link.parent))
    if os.path.lexists(link):
        if not link.is_symlink() or os.readlink(link) == target:
            return name.as_posix()
        link.unlink()
    try:
        link.symlink_to(target)
    except OSError:
        shutil.copyfile(path, link)
    return name.as_posix()


__all__ = [
    "BlipCaptioner",
    "BlipMatcher",
    "Captioner",
    "Sample",
    "SeededSampling",
    "Settings",
    "Stage1Captioner",
    "Matcher",
    "capfilt",
    "generator_of",
    "load_captioner",
    "load_matcher",
    "load_models",
    "read_samples",
    "read_scores",
    "settings_for",
]
