"""CapFilt: caption images anew, score their captions, those from the web and the new ones, and keep what matches.

Source: BLIP (arXiv 2201.12086, sections 3.3 and 4.1); `lavis/models/blip_models/blip_image_text_matching.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    TopPLogitsWarper,
)

from ..cli import answer
from ..images import ImageError, load_image
from ..modeling.modeling_qformer_pretraining import QFormerBlip2ForPreTraining
from ..modeling.modeling_qformer_retrieval import QFormerBlip2ForImageTextRetrieval
from .training_rows import FORMATS, as_object, json_rows, read_json, read_rows


IMAGE_KEYS = ("image", "file_name", "image_path")
CAPTION_KEYS = ("caption", "text", "captions")
METADATA, SCORES, OPTIONS, SUMMARY = "metadata.jsonl", "scores.jsonl", "options.json", "summary.json"
WEB, SYNTHETIC = "web", "synthetic"


# ---------------------------------------------------------------------- what is read


@dataclass
class Sample:
    """An image and what is said about it.

    Args:
        image: Its name in the data set; its captions' randomness is drawn from it.
        path: Where it lies.
        captions: Its captions; there may be none.
    """

    image: str
    path: Path
    captions: list[str]


def read_samples(data: str | os.PathLike, images: str | os.PathLike | None = None) -> list[Sample]:
    """Read image-text pairs; captions of one image are put together.

    Args:
        data: JSON, JSON Lines, CSV or TSV with an image and a caption (or, in JSON, a list of captions) per row; COCO's
            captions; or a folder with such a `metadata.jsonl` or `metadata.csv`.
        images: Folder that the images' paths are relative to; by default that of the file.

    Raises:
        ValueError: It is none of these, or a row lacks something.
        OSError: It can't be read.
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
                f"{place} has {', '.join(map(str, row)) or 'nothing'}; expected an image ({', '.join(IMAGE_KEYS)}) and its "
                f"caption ({', '.join(CAPTION_KEYS)})."
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
    """Rows, each with the words to name it by."""
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


# ---------------------------------------------------------------------- captioners


class SeededSampling(LogitsProcessor):
    """Nucleus sampling with a random generator per row, for greedy search: the largest of scores and Gumbel noise is a
    draw from their distribution. A row's caption does not depend on the others' as it does with `do_sample=True`.

    Args:
        top_p: Smallest probability of what is drawn from: the likeliest tokens that reach it together.
        generators: One per row, on the CPU, so that every device draws the same.
    """

    def __init__(self, top_p: float, generators: Sequence[torch.Generator]):
        self.nucleus, self.generators = TopPLogitsWarper(top_p), generators

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores = self.nucleus(input_ids, scores.float())
        exponential = torch.stack(
            [torch.empty(scores.shape[-1]).exponential_(generator=generator) for generator in self.generators]
        )
        return scores - exponential.clamp_min(torch.finfo(torch.float32).tiny).log().to(scores.device)


class Captioner:
    """Captions by any model of `AutoModelForImageTextToText` that holds conversations, all of this package among them.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
        prompt: What to ask for; by default the processor's `caption_prompt`.

    Raises:
        ValueError: The processor has no chat template.
    """

    model_class = AutoModelForImageTextToText
    default_prompt = "Describe the image briefly."

    def __init__(self, model: PreTrainedModel, processor, prompt: str | None = None):
        self.model, self.processor = model, processor
        own = getattr(processor, "caption_prompt", self.default_prompt)
        self.prompt = own if prompt is None else prompt
        self.check()

    def check(self) -> None:
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(
                f"{type(self.model).__name__} can't serve as captioner: its processor has no chat template. Expected a "
                "bridged model of this package, stage 1 of Q-Former BLIP-2, or BLIP's captioner."
            )

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], generators: Sequence[torch.Generator], max_new_tokens: int, top_p: float
    ) -> list[str]:
        """One sampled caption per image.

        Args:
            images: RGB images.
            generators: One per image, on the CPU.
            max_new_tokens: Longest caption, in tokens.
            top_p: See `SeededSampling`.
        """
        sampling = LogitsProcessorList([SeededSampling(top_p, generators)])
        options = {"max_new_tokens": max_new_tokens, "num_beams": 1, "do_sample": False, "logits_processor": sampling}
        return [" ".join(text.split()) for text in self.generate(images, **options)]

    def generate(self, images: Sequence[Image.Image], **options) -> list[str]:
        return answer(self.model, self.processor, images, self.prompt, batch_size=len(images), **options)

    def decode(self, generated: torch.LongTensor, begins: torch.LongTensor) -> list[str]:
        """Texts behind what they all begin with."""
        return self.processor.tokenizer.batch_decode(generated[:, begins.shape[1] :], skip_special_tokens=True)


class BlipCaptioner(Captioner):
    """BLIP's (2022) captioner."""

    model_class = BlipForConditionalGeneration
    default_prompt = "a picture of "  # Source: `lavis/configs/models/blip_caption_base_coco.yaml`

    def check(self) -> None:
        pass

    def generate(self, images: Sequence[Image.Image], **options) -> list[str]:
        inputs = self.processor(images=list(images), text=[self.prompt] * len(images), return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        # `generate` itself puts [DEC] first and leaves [SEP] out
        begins = inputs["input_ids"][:, :-1]
        return self.decode(self.model.generate(**inputs, **options), begins)


class Stage1Captioner(Captioner):
    """Stage 1 of Q-Former BLIP-2, which has learned to caption (ITG)."""

    model_class = QFormerBlip2ForPreTraining
    default_prompt = ""

    def check(self) -> None:
        pass

    def generate(self, images: Sequence[Image.Image], **options) -> list[str]:
        inputs = self.processor(images=list(images), text=[self.prompt] * len(images), return_tensors="pt")
        inputs = inputs.to(self.model.device)
        begins = inputs["input_ids"][:, :-1].clone()  # without [SEP]
        begins[:, 0] = self.model.config.bos_token_id
        return self.decode(
            self.model.generate(pixel_values=inputs["pixel_values"], input_ids=begins, **options), begins
        )


CAPTIONERS = {"blip": BlipCaptioner, "qformer_blip2_pretraining": Stage1Captioner}


def load_captioner(
    name: str | os.PathLike, prompt: str | None = None, dtype: str = "auto", device: str | torch.device = "cpu"
) -> Captioner:
    """Load a captioner.

    Args:
        name: Folder, or id on the Hub.
        prompt: See `Captioner`.
        dtype: As for `from_pretrained`.
        device: Where to put it.

    Raises:
        ValueError: The model can't caption, see `Captioner`.
    """
    kind = CAPTIONERS.get(AutoConfig.from_pretrained(name).model_type, Captioner)
    model = kind.model_class.from_pretrained(name, dtype=dtype).to(device).eval()
    return kind(model, AutoProcessor.from_pretrained(name), prompt)


# ---------------------------------------------------------------------- filters


class Matcher:
    """How likely a text describes an image, by the matching head (ITM) of stage 1 of Q-Former BLIP-2.

    Args:
        model: The model, in eval mode.
        processor: Its processor.
    """

    model_class = QFormerBlip2ForImageTextRetrieval

    def __init__(self, model: PreTrainedModel, processor):
        self.model, self.processor = model, processor

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[Sequence[str]], batch_size: int
    ) -> list[list[float]]:
        """Score every image's texts.

        Args:
            images: RGB images; each is encoded once.
            texts: Texts of each image.
            batch_size: Pairs at a time.

        Returns:
            Probability of a match, 0 to 1, for each text of each image.

        Raises:
            FloatingPointError: Scores are not finite.
        """
        pixel_values = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        encoded = self.encode(pixel_values.to(self.model.device))
        pairs = [(index, text) for index, own in enumerate(texts) for text in own]
        scores: list[list[float]] = [[] for _ in images]
        for start in range(0, len(pairs), batch_size):
            indices, chunk = zip(*pairs[start : start + batch_size])
            tokens = self.tokenize(list(chunk)).to(self.model.device)
            logits = self.logits(encoded[list(indices)], tokens["input_ids"], tokens["attention_mask"])
            if not logits.isfinite().all():
                raise FloatingPointError(
                    f"The filter's scores are not finite in {self.model.dtype}; try another dtype (bfloat16, float32)."
                )
            for index, score in zip(indices, logits.float().softmax(dim=-1)[:, 1].tolist()):
                scores[index].append(score)
        return scores

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_patch_features(pixel_values)

    def tokenize(self, texts: list[str]):
        return self.processor(text=texts, return_tensors="pt")

    def logits(self, encoded, input_ids, attention_mask) -> torch.Tensor:
        """Scores of no match and match, `(batch, 2)`."""
        return self.model.get_itm_logits(patch_features=encoded, input_ids=input_ids, attention_mask=attention_mask)


class BlipMatcher(Matcher):
    """The same by the matching head of BLIP (2022), which reads `[ENC]` where texts have `[CLS]`.

    Raises:
        ValueError: There is an `[ENC]`, but the tokenizer does not tell which token it is.
    """

    model_class = BlipForImageTextRetrieval
    max_length = 35  # tokens. Source: `blip_image_text_matching.py`, `max_txt_len`

    def __init__(self, model: PreTrainedModel, processor):
        super().__init__(model, processor)
        tokenizer, known = processor.tokenizer, model.config.text_config.vocab_size
        self.enc_token_id = tokenizer.get_vocab().get("[ENC]")
        if self.enc_token_id is None and known != len(tokenizer):
            if known != len(tokenizer) + 2:
                raise ValueError(
                    f"BLIP's matcher needs the id of [ENC]: the model knows {known} tokens, its tokenizer {len(tokenizer)} "
                    "without [ENC]. Add [DEC] and [ENC] to the tokenizer, in this order."
                )
            self.enc_token_id = known - 1  # checkpoints on the Hub: their tokenizers lack [DEC] and [ENC], the last two

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.vision_model(pixel_values=pixel_values.to(self.model.dtype)).last_hidden_state

    def tokenize(self, texts: list[str]):
        tokens = self.processor.tokenizer(
            texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        if self.enc_token_id is not None:
            tokens["input_ids"][:, 0] = self.enc_token_id
        return tokens

    def logits(self, encoded, input_ids, attention_mask) -> torch.Tensor:
        read = self.model.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=encoded
        )
        return self.model.itm_head(read.last_hidden_state[:, 0])


MATCHERS = {"blip": BlipMatcher, "qformer_blip2_pretraining": Matcher}


def load_matcher(name: str | os.PathLike, dtype: str = "auto", device: str | torch.device = "cpu") -> Matcher:
    """Load a filter.

    Args:
        name: Folder, or id on the Hub.
        dtype: As for `from_pretrained`.
        device: Where to put it.

    Raises:
        ValueError: The model has no image-text matching head.
    """
    kind = AutoConfig.from_pretrained(name).model_type
    if kind not in MATCHERS:
        raise ValueError(
            f"{name} is a {kind!r} model, which can't serve as filter; expected one of {', '.join(MATCHERS)}: stage 1 of "
            "Q-Former BLIP-2, or BLIP's image-text matcher."
        )
    matcher = MATCHERS[kind]
    model, info = matcher.model_class.from_pretrained(name, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"{name} has no image-text matching head: {len(info['missing_keys'])} tensors are missing, such as "
            f"{sorted(info['missing_keys'])[0]}."
        )
    return matcher(model.to(device).eval(), AutoProcessor.from_pretrained(name))


# ---------------------------------------------------------------------- the whole


@dataclass(frozen=True)
class Settings:
    """What the result depends on; it is written beside it.

    Args:
        captioner: Folder or Hub id; not needed where `num_captions` is 0.
        filter: Folder or Hub id.
        prompt: What the captioner is asked; `None` takes its own.
        num_captions: Captions to generate per image; 0 filters only.
        max_new_tokens: Longest caption, in tokens.
        top_p: Of nucleus sampling.
        seed: Of the captions. What an image gets depends on its name and on nothing else.
        dtype: Of both models.

    Raises:
        ValueError: A value is not what it may be.
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
    """The settings of a run that is begun or goes on.

    Args:
        output: Folder of the run.
        default_dtype: For a run that begins, where `given` has no `dtype`.
        given: Fields of `Settings`; `None` where nothing was said: then a run goes on as it began.

    Raises:
        ValueError: The run in `output` began with other settings.
    """
    path = Path(output) / OPTIONS
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("captioner", "filter"):  # the same folder, from wherever it is named
        if name in given and os.path.isdir(given[name]):
            given[name] = os.path.abspath(given[name])
    recorded = as_object(read_json(path), str(path)) if path.is_file() else {}
    if unknown := sorted(recorded.keys() - {field.name for field in fields(Settings)}):
        raise ValueError(f"{path} has {', '.join(unknown)}: it is not of this version. Choose another output folder.")
    other = [name for name in given if name in recorded and given[name] != recorded[name]]
    if other:
        differences = ", ".join(f"{name} {recorded[name]!r} (now {given[name]!r})" for name in other)
        raise ValueError(
            f"{output} was begun with {differences}. Go on with the same settings, or choose another output folder."
        )
    return Settings(**{"dtype": default_dtype, **recorded, **given})


def load_models(settings: Settings, device: str | torch.device) -> tuple[Captioner | None, Matcher]:
    """Captioner, where one is needed, and filter."""
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
) -> dict:
    """Caption, score and clean. A run that was cut short goes on where it was; another threshold computes nothing anew.

    Args:
        samples: Image-text pairs, from `read_samples`.
        output: Folder to write to: `scores.jsonl`, a line per image with all captions and their scores, or with what is
            wrong with it; `metadata.jsonl`, a line per caption that is kept, which `datasets` loads as "imagefolder", with
            links to the images in `images`; `options.json`; `summary.json`.
        settings: What the scores depend on, from `settings_for`.
        threshold: Probability of a match, 0 to 1, from which on a caption is kept.
        batch_size: Images at a time for the captioner, pairs for the filter.
        device: Where to put the models.
        load: Gives the models; called if there is something to compute.
        progress: Show a bar on stderr.

    Returns:
        `threshold`, `images`, `failed`: those that could not be read, with reasons; `web` and `synthetic`: how many
        `captions` were scored and `kept`.

    Raises:
        ValueError: A setting, or what lies in `output`, can't be used.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is {threshold}; expected a probability, 0 to 1.")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    _write(output / OPTIONS, json.dumps(asdict(settings), indent=2) + "\n")
    records = read_scores(output / SCORES)
    left = [sample for sample in samples if not _is_done(records.get(sample.image), sample)]
    if left:
        captioner, matcher = load(settings, device)
        with (
            (output / SCORES).open("a", encoding="utf-8") as file,
            tqdm(
                total=len(samples), initial=len(samples) - len(left), desc="capfilt", unit="image", disable=not progress
            ) as bar,
        ):
            for batch in _loaded(left, batch_size):
                for record in _score_all(batch, captioner, matcher, settings, batch_size):
                    records[record["image"]] = record
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                bar.update(len(batch))
    return _keep(samples, records, output, threshold)


def read_scores(path: str | os.PathLike) -> dict[str, dict]:
    """What was computed so far, by image; where an image stands twice the later line counts.

    A last line that is cut off is taken out of the file.

    Raises:
        ValueError: Another line is damaged.
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
                    f"{path}, line {number} is damaged ({error}); take it out to compute it anew."
                ) from error
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)
    return records


def _is_done(record: dict | None, sample: Sample) -> bool:
    """Images that could not be read are tried again, and so are those with other captions than before."""
    return record is not None and "captions" in record and _texts(record, WEB) == sample.captions


def _texts(record: dict, source: str) -> list[str]:
    return [caption["text"] for caption in record["captions"] if caption["source"] == source]


def _loaded(samples: Sequence[Sample], batch_size: int) -> Iterator[list[tuple[Sample, Image.Image | ImageError]]]:
    """Batches with their images, or what is wrong with them; the next batch is read meanwhile."""

    def read(sample: Sample) -> Image.Image | ImageError:
        try:
            return load_image(sample.path)
        except ImageError as error:
            return error

    with ThreadPoolExecutor() as pool:
        coming: deque = deque()
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            coming.append((batch, [pool.submit(read, sample) for sample in batch]))
            if len(coming) > 1:
                batch, images = coming.popleft()
                yield [(sample, image.result()) for sample, image in zip(batch, images)]
        for batch, images in coming:
            yield [(sample, image.result()) for sample, image in zip(batch, images)]


def generator_of(sample: Sample, seed: int, index: int) -> torch.Generator:
    """Where the randomness of an image's caption comes from."""
    digest = hashlib.sha256(f"{seed}/{index}/{sample.image}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _score_all(batch, captioner, matcher, settings: Settings, batch_size: int) -> list[dict]:
    """A line for each image of a batch. Where models refuse a batch, the images are tried one by one."""
    good = [(sample, image) for sample, image in batch if not isinstance(image, ImageError)]
    scored = {sample.image: {"error": image.reason} for sample, image in batch if isinstance(image, ImageError)}
    for part in (good, *([pair] for pair in good)):
        if not part or part[0][0].image in scored:
            continue
        try:
            scored |= _score(part, captioner, matcher, settings, batch_size)
        except ValueError as error:
            if len(part) == 1:
                scored[part[0][0].image] = {"error": " ".join(str(error).split())}
    return [{"image": sample.image, **scored[sample.image]} for sample, _ in batch]


def _score(pairs, captioner, matcher, settings: Settings, batch_size: int) -> dict[str, dict]:
    """All captions of images, by their names."""
    samples, images = zip(*pairs)
    captions = [[{"text": text, "source": WEB} for text in sample.captions] for sample in samples]
    for index in range(settings.num_captions):
        generators = [generator_of(sample, settings.seed, index) for sample in samples]
        texts = captioner(images, generators, settings.max_new_tokens, settings.top_p)
        for own, text in zip(captions, texts, strict=True):
            own.append({"text": text, "source": SYNTHETIC})
    # a captioner may say nothing: that is recorded, but there is nothing to score
    said = [[caption for caption in own if caption["text"]] for own in captions]
    scores = matcher(images, [[caption["text"] for caption in own] for own in said], batch_size)
    for own, numbers in zip(said, scores, strict=True):
        for caption, number in zip(own, numbers, strict=True):
            caption["itm_score"] = number
    return {
        sample.image: {"captions": [{"itm_score": None, **caption} for caption in own]}
        for sample, own in zip(samples, captions, strict=True)
    }


def _keep(samples: Sequence[Sample], records: dict[str, dict], output: Path, threshold: float) -> dict:
    """Write what passes, and a summary."""
    failed = {sample.image: records[sample.image]["error"] for sample in samples if "error" in records[sample.image]}
    summary = {"threshold": threshold, "images": len(samples), "failed": failed}
    summary |= {source: {"captions": 0, "kept": 0} for source in (WEB, SYNTHETIC)}
    root = os.path.commonpath([os.path.abspath(sample.path.parent) for sample in samples])
    temporary = output / f".{METADATA}.{os.getpid()}"
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for sample in samples:
                link = None
                for caption in records[sample.image].get("captions", ()):
                    counts, score = summary[caption["source"]], caption["itm_score"]
                    counts["captions"] += 1
                    if score is None or score < threshold:
                        continue
                    counts["kept"] += 1
                    link = link or _link(sample.path, root, output)
                    row = {
                        "file_name": link, "text": caption["text"], "source": caption["source"], "itm_score": score
                    }  # fmt: skip
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, output / METADATA)
    finally:
        temporary.unlink(missing_ok=True)
    _write(output / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def _link(path: Path, root: str, output: Path) -> str:
    """Name of an image within `output`: `datasets` refuses others. It is linked to, or copied where that can't be done."""
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


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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
