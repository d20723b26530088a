"""The official releases of the three families: where they lie, their parts, and the figures published about them.

Sources: `README.md` and the model cards of open_flamingo and its paper (arXiv 2308.01390, tables 11 and 12); LAVIS'
`lavis/configs/models/blip2/*.yaml`, `projects/{blip2,instructblip}/README.md`, BLIP-2 (arXiv 2301.12597, table 2);
LLaVA's `docs/MODEL_ZOO.md`.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from tqdm import tqdm
from transformers.utils import logging

from .files import BLOCK_BYTES, cache_dir, read_json, replacing, sha256_of, write_json
from .version import __version__


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class File:
    """A file of a Hub repository, or at a URL.

    Args:
        where: A Hub repository, or the URL of the file itself.
        name: Its path in the repository; `None` for a URL.
        revision: Commit of the repository, if it is pinned.
    """

    where: str
    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Release:
    """An official release.

    Args:
        name: Its Hub id, or LAVIS' architecture and type.
        family: `"openflamingo"`, `"blip2"` or `"llava"`: the command that converts it.
        title: Its name in words.
        checkpoint: The trained weights: a `File`, or the Hub id of a whole repository; `None` if they can't be
            downloaded as they are.
        vision: The frozen vision encoder: a `File` or a Hub id; `None` if the checkpoint holds it or names it.
        language: Hub id of the frozen language model; `None` if the checkpoint holds it or there is none.
        tokenizer: Hub id of the language model's tokenizer, if it does not lie beside it.
        holds: Names of the vision encoder and the language model that the checkpoint holds or was made from, if they
            are not named above; in this order, as Hub ids if there are any.
        licence: The licence of the weights, as their publishers name it; `None` if they don't.
        prompts: Prompts by task.
        generation: Generation defaults of the official code or evaluation.
        config: Fields that shapes can't tell, as the converter takes them.
        published: Published figures, by benchmark and setting.
        note: What else users have to know or do.
    """

    name: str
    family: str
    title: str
    checkpoint: File | str | None
    vision: File | str | None = None
    language: str | None = None
    tokenizer: str | None = None
    holds: tuple[str, ...] = ()
    licence: str | None = None
    prompts: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, object] = field(default_factory=dict)
    config: Mapping[str, object] = field(default_factory=dict)
    published: Mapping[str, object] = field(default_factory=dict)
    note: str | None = None


# ---------------------------------------------------------------------- OpenFlamingo

CLIP_L = "openai/clip-vit-large-patch14"
SHOTS = (0, 4, 8, 16, 32)
_FLAMINGO_PROMPTS = {
    "caption": "<image>Output:{caption}<|endofchunk|>",
    "vqa": "<image>Question:{question} Short answer:{answer}<|endofchunk|>",
}
# as the official evaluation generates
_FLAMINGO_GENERATION = {"num_beams": 3, "length_penalty": 0.0}


def _flamingo(name: str, title: str, language: str, cider: tuple = (), vqa: tuple = (), **more) -> Release:
    published = {}
    if cider:
        published = {"COCO CIDEr": dict(zip(SHOTS, cider)), "VQAv2": dict(zip(SHOTS, vqa))}
    published.update(more.pop("published", {}))
    repository = f"openflamingo/{name}"
    return Release(
        repository, "openflamingo", title, File(repository, "checkpoint.pt"), CLIP_L, language,
        prompts=_FLAMINGO_PROMPTS, generation=_FLAMINGO_GENERATION, published=published, **more,
    )  # fmt: skip


OPENFLAMINGO = (
    _flamingo(
        "OpenFlamingo-3B-vitl-mpt1b", "OpenFlamingo 3B (MPT-1B)", "anas-awadalla/mpt-1b-redpajama-200b",
        (74.9, 77.3, 85.9, 89.8, 93.0), (44.6, 45.8, 46.2, 46.6, 47.0),
    ),
    _flamingo(
        "OpenFlamingo-3B-vitl-mpt1b-langinstruct", "OpenFlamingo 3B Instruct (MPT-1B Dolly)",
        "anas-awadalla/mpt-1b-redpajama-200b-dolly", (74.4, 82.7, 87.8, 91.9, 94.8), (44.1, 45.7, 45.9, 45.8, 44.8),
    ),
    _flamingo(
        "OpenFlamingo-4B-vitl-rpj3b", "OpenFlamingo 4B (RedPajama-3B)", "togethercomputer/RedPajama-INCITE-Base-3B-v1",
        (76.7, 81.8, 90.7, 93.9, 95.1), (45.1, 49.0, 48.3, 45.5, 43.0),
    ),
    _flamingo(
        "OpenFlamingo-4B-vitl-rpj3b-langinstruct", "OpenFlamingo 4B Instruct (RedPajama-3B Instruct)",
        "togethercomputer/RedPajama-INCITE-Instruct-3B-v1",
        (81.2, 85.8, 94.8, 98.0, 99.2), (46.9, 49.0, 47.4, 45.1, 47.3),
    ),
    _flamingo(
        "OpenFlamingo-9B-vitl-mpt7b", "OpenFlamingo 9B (MPT-7B)", "anas-awadalla/mpt-7b",
        (79.5, 89.0, 96.3, 98.8, 99.5), (52.7, 54.8, 54.8, 54.3, 53.3),
        published={"COCO CIDEr, RICES": {0: 76.8, 32: 109.0}, "VQAv2, RICES": {0: 53.0, 32: 56.8}},
        note="The first Hub card has other VQAv2 figures: 48.3, 49.4, 51.8, 51.3, 50.2.",
    ),
    Release(
        "openflamingo/OpenFlamingo-9B-deprecated", "openflamingo", "OpenFlamingo 9B, first release (LLaMA-7B)",
        File("openflamingo/OpenFlamingo-9B-deprecated", "checkpoint.pt"), CLIP_L, None,
        holds=("LLaMA-7B",), licence="academic research only, as LLaMA's", prompts=_FLAMINGO_PROMPTS,
        generation=_FLAMINGO_GENERATION,
        published={"COCO CIDEr": dict(zip(SHOTS, (65.52, 74.28, 79.26, 81.84, 84.52))),
                   "VQAv2": dict(zip(SHOTS, (43.55, 44.05, 47.5, 48.87, 50.34)))},
        note="LLaMA-7B is not on the Hub for everyone: give it with --language.",
    ),
)  # fmt: skip

# ---------------------------------------------------------------------- BLIP-2 and InstructBLIP

LAVIS_FILES = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/"
EVA = File(f"{LAVIS_FILES}BLIP2/eva_vit_g.pth")
CLIP_L_LAVIS = File(f"{LAVIS_FILES}BLIP2/clip_vit_L.pth")
_EVA_NAME = "EVA-CLIP ViT-g/14"
_BLIP2_PROMPTS = {"caption": "a photo of", "vqa": "Question: {question} Answer:"}
_BLIP2_GENERATION = {"num_beams": 5, "max_new_tokens": 30, "repetition_penalty": 1.0, "length_penalty": 1.0}
_INSTRUCT_GENERATION = {"num_beams": 5, "max_new_tokens": 256, "repetition_penalty": 1.5, "length_penalty": 1.0}


def _blip2(kind: str, title: str, file: str, language: str | None = None, **more) -> Release:
    architecture = {None: "blip2", "facebook": "blip2_opt", "google": "blip2_t5"}[language and language.split("/")[0]]
    more.setdefault("vision", EVA)
    if language is not None:
        more = {"prompts": _BLIP2_PROMPTS, "generation": _BLIP2_GENERATION, **more}
    return Release(
        f"{architecture}/{kind}", "blip2", title, File(f"{LAVIS_FILES}BLIP2/{file}.pth"), language=language, **more
    )


def _zero_shot(val: float, test: float, okvqa: float, gqa: float) -> dict:
    return {"VQAv2 val": val, "VQAv2 test-dev": test, "OK-VQA": okvqa, "GQA": gqa}


def _instruct(kind: str, title: str, file: str, language: str | None, **more) -> Release:
    architecture = "blip2_t5_instruct" if language else "blip2_vicuna_instruct"
    return Release(
        f"{architecture}/{kind}", "blip2", title, File(f"{LAVIS_FILES}InstructBLIP/{file}.pth"), EVA, language,
        prompts={"caption": "A short image description:"}, generation=_INSTRUCT_GENERATION, **more,
    )  # fmt: skip


_VICUNA_NOTE = "Vicuna v1.1 is made from LLaMA's weights and its published differences: give it with --language."
BLIP2 = (
    _blip2("pretrain", "BLIP-2, stage 1 (ViT-g)", "blip2_pretrained"),
    _blip2("pretrain_vitL", "BLIP-2, stage 1 (ViT-L)", "blip2_pretrained_vitL", vision=CLIP_L_LAVIS),
    _blip2("coco", "BLIP-2, retrieval on COCO", "blip2_finetune_coco", vision=None, holds=(_EVA_NAME,)),
    _blip2("pretrain_opt2.7b", "BLIP-2 (OPT-2.7B)", "blip2_pretrained_opt2.7b", "facebook/opt-2.7b",
           published=_zero_shot(53.5, 52.3, 31.7, 34.6)),
    _blip2("pretrain_opt6.7b", "BLIP-2 (OPT-6.7B)", "blip2_pretrained_opt6.7b", "facebook/opt-6.7b",
           published=_zero_shot(54.3, 52.6, 36.4, 36.4)),
    _blip2("caption_coco_opt2.7b", "BLIP-2, captions on COCO (OPT-2.7B)", "blip2_caption_opt2.7b", "facebook/opt-2.7b",
           vision=None, holds=(_EVA_NAME,), published={"COCO CIDEr": 145.8}),
    _blip2("caption_coco_opt6.7b", "BLIP-2, captions on COCO (OPT-6.7B)", "blip2_caption_opt6.7b", "facebook/opt-6.7b",
           vision=None, holds=(_EVA_NAME,), published={"COCO CIDEr": 145.2}),
    _blip2("pretrain_flant5xl", "BLIP-2 (FlanT5-XL)", "blip2_pretrained_flant5xl", "google/flan-t5-xl",
           published=_zero_shot(63.1, 63.0, 40.7, 44.2)),
    _blip2("pretrain_flant5xl_vitL", "BLIP-2 (FlanT5-XL, ViT-L)", "blip2_pretrained_flant5xl_vitL", "google/flan-t5-xl",
           vision=CLIP_L_LAVIS),
    _blip2("pretrain_flant5xxl", "BLIP-2 (FlanT5-XXL)", "blip2_pretrained_flant5xxl", "google/flan-t5-xxl",
           published=_zero_shot(65.2, 65.0, 45.9, 44.7)),
    _blip2("caption_coco_flant5xl", "BLIP-2, captions on COCO (FlanT5-XL)", "blip2_caption_flant5xl",
           "google/flan-t5-xl", vision=None, holds=(_EVA_NAME,), published={"COCO CIDEr": 144.5}),
    _instruct("flant5xl", "InstructBLIP (FlanT5-XL)", "instruct_blip_flanxl_trimmed", "google/flan-t5-xl"),
    _instruct("flant5xxl", "InstructBLIP (FlanT5-XXL)", "instruct_blip_flanxxl_trimmed", "google/flan-t5-xxl"),
    _instruct("vicuna7b", "InstructBLIP (Vicuna-7B)", "instruct_blip_vicuna7b_trimmed", None,
              note=_VICUNA_NOTE, holds=("lmsys/vicuna-7b-v1.1",)),
    _instruct("vicuna13b", "InstructBLIP (Vicuna-13B)", "instruct_blip_vicuna13b_trimmed", None,
              note=_VICUNA_NOTE, holds=("lmsys/vicuna-13b-v1.1",)),
)  # fmt: skip

# ---------------------------------------------------------------------- LLaVA

_LLAVA_MEASURED = ("VQAv2", "GQA", "TextVQA", "POPE")
_BASE_LICENCE = "that of the language model"  # as the model zoo has it


def _llava(name: str, title: str, figures: tuple = (), **more) -> Release:
    repository = f"liuhaotian/{name}"
    return Release(
        repository, "llava", title, more.pop("checkpoint", repository), licence=_BASE_LICENCE,
        generation={"max_new_tokens": 512}, published=dict(zip(_LLAVA_MEASURED, figures)), **more,
    )  # fmt: skip


_DELTA_NOTE = (
    "The repository holds differences from LLaMA's weights: add them up with the official llava.model.apply_delta, and "
    "convert the folder that it writes with `vlbridge convert llava --checkpoint`."
)
_CLIP_336 = "openai/clip-vit-large-patch14-336"
LLAVA = (
    _llava("llava-v1.6-vicuna-7b", "LLaVA-1.6 (Vicuna-7B)", (81.8, 64.2, 64.9, 86.5),
           holds=(_CLIP_336, "lmsys/vicuna-7b-v1.5")),
    _llava("llava-v1.6-vicuna-13b", "LLaVA-1.6 (Vicuna-13B)", (82.8, 65.4, 67.1, 86.2),
           holds=(_CLIP_336, "lmsys/vicuna-13b-v1.5")),
    _llava("llava-v1.6-mistral-7b", "LLaVA-1.6 (Mistral-7B)", (82.2, 64.8, 65.7, 86.7),
           holds=(_CLIP_336, "mistralai/Mistral-7B-Instruct-v0.2")),
    _llava("llava-v1.6-34b", "LLaVA-1.6 (Hermes-Yi-34B)", (83.7, 67.1, 69.5, 87.7),
           holds=(_CLIP_336, "NousResearch/Nous-Hermes-2-Yi-34B")),
    _llava("llava-v1.5-7b", "LLaVA-1.5 (Vicuna-7B)", (78.5, 62.0, 58.2, 85.9),
           holds=(_CLIP_336, "lmsys/vicuna-7b-v1.5")),
    _llava("llava-v1.5-13b", "LLaVA-1.5 (Vicuna-13B)", (80.0, 63.3, 61.3, 85.9),
           holds=(_CLIP_336, "lmsys/vicuna-13b-v1.5")),
    _llava("llava-v1.5-7b-lora", "LLaVA-1.5, LoRA (Vicuna-7B)", (79.1, 63.0, 58.2, 86.4),
           language="lmsys/vicuna-7b-v1.5", holds=(_CLIP_336,)),
    _llava("llava-v1.5-13b-lora", "LLaVA-1.5, LoRA (Vicuna-13B)", (80.0, 63.3, 60.2, 86.7),
           language="lmsys/vicuna-13b-v1.5", holds=(_CLIP_336,)),
    _llava("llava-llama-2-13b-chat-lightning-preview", "LLaVA-1 (LLaMA-2-13B-Chat)",
           holds=(CLIP_L, "meta-llama/Llama-2-13b-chat-hf")),
    _llava("LLaVA-7b-delta-v0", "LLaVA-1 (Vicuna-7B v0)", checkpoint=None, note=_DELTA_NOTE,
           holds=(CLIP_L, "LLaMA-7B")),
    _llava("LLaVA-13b-delta-v0", "LLaVA-1 (Vicuna-13B v0)", checkpoint=None, note=_DELTA_NOTE,
           holds=(CLIP_L, "LLaMA-13B")),
    _llava("LLaVA-Lightning-7B-delta-v1-1", "LLaVA-1 (Vicuna-7B v1.1)", checkpoint=None, note=_DELTA_NOTE,
           holds=(CLIP_L, "LLaMA-7B")),
    _llava("LLaVA-13b-delta-v1-1", "LLaVA-1 (Vicuna-13B v1.1)", checkpoint=None, note=_DELTA_NOTE,
           holds=(CLIP_L, "LLaMA-13B")),
)  # fmt: skip

CATALOGUE = {release.name: release for release in (*OPENFLAMINGO, *BLIP2, *LLAVA)}


# ---------------------------------------------------------------------- fetching and converting


def find(name: str) -> Release:
    """A release by its name.

    Raises:
        ValueError: There is none of that name; the error suggests similar ones.
    """
    if name in CATALOGUE:
        return CATALOGUE[name]
    lowered = {known.lower(): known for known in CATALOGUE}
    near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.5)]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"{name!r} is no official release that the catalogue knows.{hint} `vlbridge list` shows all of them."
    )


def fetch(part: File | str | None) -> str | None:
    """Download a part of a release, unless it is in the cache; a Hub id is returned as it is.

    Files from URLs are kept in the folder `releases` of `cache_dir`, each beside a note of its size and SHA-256, with
    which it is compared whenever it is used again.

    Args:
        part: What a `Release` has.

    Returns:
        A path, or the Hub id.

    Raises:
        OSError: The file can't be downloaded, or what came is not the whole file.
    """
    if not isinstance(part, File):
        return part
    if part.name is not None:
        from huggingface_hub import hf_hub_download

        return hf_hub_download(part.where, part.name, revision=part.revision)
    path = cache_dir() / "releases" / part.where.rsplit("/", 1)[-1]
    if not path.exists() or _is_damaged(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _download(part.where, path)
        except (OSError, HTTPException) as error:
            raise OSError(f"{part.where} can't be fetched: {error}") from error
    return os.fspath(path)


def _note_of(path: Path) -> Path:
    """The note of a downloaded file's URL, size and SHA-256."""
    return path.with_name(f"{path.name}.origin")


def _is_damaged(path: Path) -> bool:
    """Whether a downloaded file is no longer what was downloaded; files without a note are taken as they are."""
    note = read_json(_note_of(path), {})
    if not note or (path.stat().st_size == note.get("bytes") and sha256_of(path) == note.get("sha256")):
        return False
    logger.warning(f"{path} has changed since it was downloaded: it is downloaded again.")
    return True


def _download(url: str, path: Path) -> None:
    """Download a file, and note its size and SHA-256 beside it.

    Raises:
        OSError: The server can't be reached, or what it sent does not have the length or the MD5 that it announced.
    """
    sha256, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with urlopen(Request(url, headers={"User-Agent": f"vlbridge/{__version__}"})) as response:
        length = response.headers.get("Content-Length")
        # Google's storage, where LAVIS' files lie, sends the MD5 of most files: x-goog-hash: crc32c=...,md5=...
        hashes = re.findall(r"md5=([\w+/=]+)", ",".join(response.headers.get_all("x-goog-hash", [])))
        total = None if length is None else int(length)
        with replacing(path) as temporary:
            with (
                open(temporary, "wb") as file,
                tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as progress,
            ):
                while block := response.read(BLOCK_BYTES):
                    file.write(block)
                    sha256.update(block)
                    md5.update(block)
                    progress.update(len(block))
            size = temporary.stat().st_size
            if total not in (None, size):
                raise OSError(f"the connection ended after {size:,} of {total:,} bytes")
            if hashes and base64.b64encode(md5.digest()).decode() != hashes[0]:
                raise OSError(f"its MD5 is {base64.b64encode(md5.digest()).decode()}, the server announced {hashes[0]}")
            write_json(_note_of(path), {"url": url, "bytes": size, "sha256": sha256.hexdigest()})


def needs_language(release: Release) -> bool:
    """Whether a release comes without its language model, and names none that can be fetched."""
    without = release.family == "openflamingo" or "vicuna" in release.name and release.family == "blip2"
    return without and release.language is None


def rows() -> list[dict]:
    """The catalogue as plain data, for `vlbridge list`."""
    return [dataclasses.asdict(release) for release in CATALOGUE.values()]


__all__ = ["CATALOGUE", "File", "Release", "fetch", "find", "needs_language", "rows"]
