"""Model cards: of a saved model from what lies in its folder, of a release from the catalogue.

`python -m vlbridge.cards` writes those of the catalogue and of the shipped bridges to `model_cards/`.

Licence identifiers and fields of the header are the Hub's: https://huggingface.co/docs/hub/model-cards and
https://huggingface.co/docs/hub/repositories-licenses.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open
from transformers import AutoConfig

from .catalogue import CATALOGUE, CLIP_L_LAVIS, EVA, File, Release, needs_language
from .certificate import card_section, read_certificate
from .configuration import BridgedConfig
from .configuration.configuration_classification import ClassificationConfigMixin
from .families import FAMILIES
from .licences import ASKS, HUB_ID, LICENCES, UNKNOWN, Licence, licence_conflicts, licence_of, strictest
from .modeling.modeling_pins import FrozenPartError, checkpoint_files, frozen_parts_of
from .training_summary import SUMMARY, read_training_summary


logger = logging.getLogger(__name__)

# ---------------------------------------------------------------------- what a card is made of


@dataclass
class Part:
    """A part of a model, as a card names it.

    Args:
        role: `"vision encoder"` or `"language model"`; `""` where it is not known.
        name: Hub id, or what else it is called.
        licence: Its licence.
        pin: Commit and hashes.
    """

    role: str
    name: str
    licence: Licence
    pin: str = ""

    @property
    def on_hub(self) -> bool:
        return HUB_ID.fullmatch(self.name) is not None

    @property
    def link(self) -> str:
        return f"[{self.name}](https://huggingface.co/{self.name})" if self.on_hub else self.name


@dataclass
class _About:
    """Everything that the template is told."""

    title: str
    model_type: str
    parts: list[Part]
    relation: str | None = None
    claimed: str | None = None
    description: str = ""
    pipeline_tag: str = "image-text-to-text"
    use: str = ""
    convert: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    prompts: Mapping[str, str] = field(default_factory=dict)
    generation: Mapping[str, object] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    language: str | list[str] | None = None
    training: dict[str, str] = field(default_factory=dict)
    training_notes: str = ""
    results: list[EvalResult] = field(default_factory=list)
    evaluation_notes: str = ""
    conversion: str = ""
    limits: str = ""
    note: str = ""


def _render(about: _About) -> ModelCard:
    licences = {part.name: part.licence for part in about.parts}
    claim = LICENCES.get(about.claimed or "")
    whole = strictest([*licences.values(), *([claim] if claim is not None else [])])
    conflicts = licence_conflicts(licences, about.claimed)
    for conflict in conflicts:
        logger.warning(f"{about.title}: {conflict}")
    conflicts += [
        f"That of {name} is not known ({licence.label}): ask its publisher before you share or use this model."
        for name, licence in licences.items()
        if licence.strictness == UNKNOWN
    ]
    base_models = list(dict.fromkeys(part.name for part in about.parts if part.on_hub))
    datasets = [name for name in about.datasets if HUB_ID.fullmatch(name)]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=about.pipeline_tag,
        license=whole.id,
        license_name=whole.name,
        license_link=whole.link,
        base_model=base_models or None,
        base_model_relation=about.relation if base_models else None,
        datasets=datasets or None,
        language=about.language,
        metrics=sorted({result.metric_type for result in about.results}) or None,
        model_name=about.title if about.results else None,
        eval_results=about.results or None,
        tags=["vlbridge", about.model_type],
    )
    template = resources.files("vlbridge.model_cards").joinpath("template.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(
        data,
        template_str=template,
        about=about,
        licence=whole,
        conflicts=conflicts,
        asks=ASKS,
        rows=[
            (result.dataset_name, result.dataset_split or "", result.metric_name, result.metric_value)
            for result in about.results
        ],
        sources=sorted({(result.source_name, result.source_url) for result in about.results if result.source_url}),
    )
    card.content = re.sub(r"\n{3,}", "\n\n", card.content).rstrip() + "\n"
    return card


def _slug(name: str) -> str:
    return re.sub(r"[^\w./-]+", "-", name).strip("-").lower()


# ---------------------------------------------------------------------- of a folder

GENERATION = "image-text-to-text"
RETRIEVAL = "zero-shot-image-classification"  # stage 1 says which of several texts goes with an image
CLASSIFICATION = "image-classification"
WHAT = {
    "perceiver_flamingo": "A Perceiver-Flamingo bridge (Perceiver Resampler and gated cross-attention layers)",
    "qformer_blip2": "A Q-Former BLIP-2 bridge (Q-Former and a linear layer)",
    "qformer_blip2_pretraining": "A Q-Former of stage 1 of BLIP-2 (contrast, matching and captioning)",
    "mlp_llava": "An MLP-LLaVA bridge (linear layers)",
    "perceiver_flamingo_classification": "A classifier on the latents of a Perceiver Resampler",
    "qformer_blip2_classification": "A classifier on the query tokens of a Q-Former",
    "mlp_llava_classification": "A classifier on the visual tokens of an MLP-LLaVA bridge",
}
ROLES = {"vision_model": "vision encoder", "language_model": "language model"}
LIMITS = (
    "For research and for applications that were tested on data of their own. It describes what it was trained to "
    "describe and may name things that are not in the picture; it inherits what its parts and its training data get "
    "wrong or leave out. Not for decisions about people, nor where a wrong answer does harm."
)


def _use(source: str, task: str, encoder_decoder: bool = False, remote_code: bool = False) -> str:
    """How to use a model, in six lines.

    Args:
        source: A Python expression for where it lies.
        task: Its pipeline's name.
        encoder_decoder: What it generates does not begin with the prompt.
        remote_code: Its code lies beside it.
    """
    trust = ", trust_remote_code=True" if remote_code else ""
    if task == CLASSIFICATION:
        return (
            ("" if remote_code else "import vlbridge\n") + "from transformers import pipeline\n"
            f"classify = pipeline({task!r}, model={source}{trust})\n"
            'print(classify("picture.png"))'
        )
    if task == RETRIEVAL:
        return (
            "from transformers import AutoProcessor\n"
            "import vlbridge\n"
            f"processor = AutoProcessor.from_pretrained({source})\n"
            f"model = vlbridge.QFormerBlip2ForImageTextRetrieval.from_pretrained({source})\n"
            'inputs = processor(images=["picture.png"], text=["what may be in it"], return_tensors="pt")\n'
            "print(model(**inputs).itc_scores)"
        )
    cut = "" if encoder_decoder else '[:, inputs["input_ids"].shape[1] :]'
    return (
        ("" if remote_code else "import vlbridge\n") + "from transformers import AutoModel, AutoProcessor\n"
        f"model = AutoModel.from_pretrained({source}{trust})\n"
        f"processor = AutoProcessor.from_pretrained({source}{trust})\n"
        'inputs = processor.few_shot([], {"image": "picture.png"})\n'
        f"print(processor.batch_decode(model.generate(**inputs, max_new_tokens=30){cut}, skip_special_tokens=True))"
    )


def _counts(folder: Path) -> dict[str, str]:
    """Parameters and bytes of the weights in a folder, from their headers."""
    try:
        files = checkpoint_files(os.fspath(folder))
    except FrozenPartError:
        return {}
    bridge = other = 0
    for path in files:
        if path.suffix != ".safetensors":
            return {"Size of the weights": f"{sum(file.stat().st_size for file in files):,} bytes"}
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():
                count = 1
                for side in tensors.get_slice(name).get_shape():
                    count *= side
                bridge, other = (bridge + count, other) if name.startswith("bridge.") else (bridge, other + count)
    facts = {"Parameters of the bridge": f"{bridge:,}"}
    if other:
        facts["Parameters of its parts"] = f"{other:,}, in the same files"
    return {**facts, "Size of the weights": f"{sum(file.stat().st_size for file in files):,} bytes"}


def _geometry(config: BridgedConfig) -> dict[str, str]:
    try:
        fewest, most = config.image_token_range()
    except (ValueError, TypeError):  # a configuration that no model has filled in yet
        return {}
    tokens = f"{most}" if fewest == most else f"{fewest} to {most}"
    size = f"{config.image_size} x {config.image_size} pixels"
    where = "" if config.visual_tokens_in_prompt else "; one in the prompt"
    kind = "tiles" if fewest != most else "pictures"
    return {"Visual tokens per image": f"{tokens} ({kind} of {size}{where})"}


def _parts_of(config: BridgedConfig, certificate: Mapping, release: Release | None) -> list[Part]:
    """The parts of a saved model: from its pins, else from what the converter read them from."""
    checkpoint = set(certificate.get("checkpoint", ()))
    read_from: dict[str, set[str]] = {}
    for name, about in certificate.get("tensors", {}).items():
        read_from.setdefault(name.split(".")[0], set()).add(about["from"])
    parts = []
    for part in frozen_parts_of(config):
        pin = (config.frozen_parts or {}).get(part) or {}
        sources = [pin["source"]] if pin.get("source") else sorted(read_from.get(part, set()) - checkpoint)
        said = []
        if pin.get("revision"):
            said.append(f"commit `{pin['revision']}`")
        hashes = [(pin.get("sha256"), "")] + [
            (other.get("sha256"), f" ({other.get('source')})") for other in pin.get("alternatives") or []
        ]
        said += [f"SHA-256 of the weights `{sha256}`{where}" for sha256, where in hashes if sha256]
        for source in sources:
            name = source if HUB_ID.fullmatch(source) else Path(source).name
            parts.append(Part(ROLES[part], name, licence_of(source), ", ".join(said)))
    if release is not None:
        known = {part.name for part in parts}
        parts += [part for part in parts_of_release(release) if part.name not in known]
    elif not parts:
        parts += [Part("", name, licence_of(name)) for name in sorted(checkpoint) if HUB_ID.fullmatch(name)]
    return parts


def card_of_folder(folder: str | os.PathLike, repo_id: str | None = None) -> ModelCard:
    """The card of a saved model, from what lies in its folder: nothing is downloaded and no weight is read.

    It is made from `config.json` (parts and their pins, geometry), the headers of the weights, `conversion.json` (see
    `vlbridge.convert`), `generation_config.json` and `training_summary.json` (see `read_training_summary`).

    Args:
        folder: Of the saved model.
        repo_id: Hub id that the model gets; `None`: the folder's name.

    Returns:
        The card; `str(card)` is README.md.

    Raises:
        ValueError: There is no bridged model in the folder, or its training summary is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected the folder of a saved model.")
    name = repo_id or folder.resolve().name
    return _render(_about_folder(folder, name.split("/")[-1], json.dumps(name)))


def _saved(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _training_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """What a card's table tells about the training."""
    return {
        name: value
        for name, value in (
            ("Recipe", summary.get("recipe")),
            ("Data", ", ".join(map(str, summary.get("datasets", [])))),
            ("Steps", f"{summary['steps']:,}" if "steps" in summary else None),
            ("Time", f"{summary['seconds'] / 60:,.1f} minutes" if "seconds" in summary else None),
            ("Hardware", summary.get("hardware")),
            *((f"`{key}`", f"`{value}`") for key, value in sorted(summary.get("arguments", {}).items())),
        )
        if value
    }


def _results_of(summary: Mapping[str, Any], task: str) -> list[EvalResult]:
    """The evaluations of a training summary, as the Hub reads them."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=_slug(result["dataset"]),
            dataset_name=result["dataset"],
            dataset_split=result.get("split"),
            metric_type=_slug(result["metric"]),
            metric_name=result["metric"] + (f", {result['task']}" if result.get("task") else ""),
            metric_value=result["value"],
        )
        for result in summary.get("evaluation", [])
    ]


def _about_folder(folder: Path, title: str, source: str) -> _About:
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, BridgedConfig):
        raise ValueError(f"{folder} holds a {config.model_type!r} model; expected a bridged one.")
    summary, certificate = read_training_summary(folder), read_certificate(folder)
    release = CATALOGUE.get(certificate.get("release", ""))
    parts = _parts_of(config, certificate, release)
    between = " and ".join(f"{part.link}" for part in parts if part.role)
    task = GENERATION if config.text_config is not None else RETRIEVAL
    if isinstance(config, ClassificationConfigMixin):
        task = CLASSIFICATION
    kind = "classifier on" if isinstance(config, ClassificationConfigMixin) else "bridge,"
    what = WHAT.get(config.model_type, f"A {kind} {config.model_type}")
    description = summary.get("description") or (
        f"{what}" + (f" for {between}." if between else ".") + (f" Converted from {release.title}." if release else "")
    )
    if config.bridge_only:
        description += (
            "\n\nThe repository holds the bridge alone. Loading fetches the frozen parts from where its configuration "
            "says, and refuses others."
        )
    facts = {**_counts(folder), **_geometry(config)}
    if asks_with := _saved(folder / "processor_config.json").get("caption_prompt"):
        facts["Asks for a caption with"] = f"`{asks_with}`"
    trained = [ROLES[part] for part in frozen_parts_of(config) if not getattr(config, f"freeze_{part}")]
    if trained:
        facts["Trained with the bridge"] = " and ".join(trained)
    results = _results_of(summary, task)
    if release is not None:
        results += published_results(release)
    generation = {
        key: value
        for key, value in _saved(folder / "generation_config.json").items()
        if not key.startswith("_") and not key.endswith(("_token_id", "_version"))
    }
    return _About(
        title=title,
        model_type=config.model_type,
        parts=parts,
        relation="adapter" if config.bridge_only else "finetune",
        claimed=summary.get("license"),
        description=description,
        pipeline_tag=task,
        use=_use(
            source,
            task,
            encoder_decoder=config.is_encoder_decoder,
            remote_code=bool(getattr(config, "auto_map", None)),
        ),
        facts=facts,
        prompts=release.prompts if release else {},
        generation=generation,
        datasets=list(map(str, summary.get("datasets", []))),
        language=summary.get("language"),
        training=_training_of(summary),
        training_notes=summary.get("notes", ""),
        results=results,
        evaluation_notes=summary.get("evaluation_notes", ""),
        conversion=card_section(certificate) if certificate else "",
        limits=summary.get("limits") or LIMITS,
    )


# ---------------------------------------------------------------------- of a release

PAPERS = {
    "openflamingo": ("OpenFlamingo, arXiv 2308.01390", "https://arxiv.org/abs/2308.01390"),
    "blip2": ("BLIP-2, arXiv 2301.12597", "https://arxiv.org/abs/2301.12597"),
    "instructblip": ("InstructBLIP, arXiv 2305.06500", "https://arxiv.org/abs/2305.06500"),
    "llava": ("LLaVA's model zoo", "https://github.com/haotian-liu/LLaVA/blob/main/docs/MODEL_ZOO.md"),
}
# Name in the catalogue -> data set, metric, split
BENCHMARKS = {
    "COCO CIDEr": ("COCO captions", "CIDEr", None),
    "VQAv2": ("VQAv2", "accuracy", None),
    "VQAv2 val": ("VQAv2", "accuracy", "val"),
    "VQAv2 test-dev": ("VQAv2", "accuracy", "test-dev"),
    "OK-VQA": ("OK-VQA", "accuracy", None),
    "GQA": ("GQA", "accuracy", None),
    "TextVQA": ("TextVQA", "accuracy", None),
    "POPE": ("POPE", "F1", None),
}
# What a release's name has in it, the first that fits -> visual tokens per image
VISUAL_TOKENS = {
    "OpenFlamingo": "64; one in the prompt",
    "blip2": "32",
    "llava-v1.6": "up to 2,880 (576 of the picture as a whole and of each of at most four tiles)",
    "llava-v1.5": "576",
    "": "256",  # LLaVA-1: 224 x 224 pixels
}
FILES_OF_LAVIS = {EVA: "EVA-CLIP ViT-g/14", CLIP_L_LAVIS: "openai/clip-vit-large-patch14"}
MODEL_TYPES = {
    "openflamingo": FAMILIES["perceiver"].config_class.model_type,
    "blip2": FAMILIES["qformer"].config_class.model_type,
    "llava": FAMILIES["mlp"].config_class.model_type,
}


def _paper(release: Release) -> tuple[str, str]:
    """What a release was published in, and where that is."""
    if release.name.endswith("-deprecated"):  # older than the paper
        return "its model card", f"https://huggingface.co/{release.name}"
    instruct = release.family == "blip2" and "instruct" in release.name
    return PAPERS["instructblip" if instruct else release.family]


def release_title(release: Release) -> str:
    """What the model of a release is called: the name of its repository, or LAVIS' architecture and type."""
    return release.name.replace("/", "-") if release.family == "blip2" else release.name.split("/")[-1]


def parts_of_release(release: Release) -> list[Part]:
    """Vision encoder and language model of a release, as far as the catalogue knows them."""
    found = []
    for role, part in (("vision encoder", release.vision), ("language model", release.language)):
        if part is not None:
            name = FILES_OF_LAVIS[part] if isinstance(part, File) else part
            found.append(Part(role, name, licence_of(name)))
    roles = {part.role for part in found}
    missing = [role for role in ROLES.values() if role not in roles]
    return found + [Part(role, name, licence_of(name)) for role, name in zip(missing, release.holds)]


def published_results(release: Release) -> list[EvalResult]:
    """The published figures of a release.

    Raises:
        KeyError: The catalogue names a benchmark that `BENCHMARKS` does not.
    """
    paper, link = _paper(release)
    results = []
    for what, value in release.published.items():
        benchmark, _, setting = what.partition(", ")
        dataset, metric, split = BENCHMARKS[benchmark]
        by_shots = value if isinstance(value, Mapping) else {None: value}
        for shots, figure in by_shots.items():
            said = [f"{shots} shots"] if shots is not None else []
            results.append(
                EvalResult(
                    task_type="image-text-to-text",
                    dataset_type=_slug(dataset),
                    dataset_name=dataset,
                    dataset_split=split,
                    metric_type=_slug(metric),
                    metric_name=", ".join([metric, *said, *([setting] if setting else [])]),
                    metric_value=figure,
                    source_name=paper,
                    source_url=link,
                )
            )
    return results


def card_of_release(release: Release) -> ModelCard:
    """The card of an official release, from the catalogue: what it is, how to convert it, what was published about it.

    Args:
        release: From `vlbridge.catalogue`.
    """
    title = release_title(release)
    paper, link = _paper(release)
    stage1 = release.family == "blip2" and not release.prompts
    command = None if release.checkpoint is None else f"vlbridge convert {release.name} {title}"
    if needs_language(release) and command:
        command += " --language FOLDER"
    tokens = next(tokens for what, tokens in VISUAL_TOKENS.items() if what in release.name)
    return _render(
        _About(
            title=title,
            model_type=MODEL_TYPES[release.family] + ("_pretraining" if stage1 else ""),
            parts=parts_of_release(release),
            relation="finetune",
            claimed=release.licence if release.licence in LICENCES else None,
            description=f"{release.title}: an official release, `{release.name}`, as a model of vlbridge. "
            f"Source: [{paper}]({link}).",
            pipeline_tag=RETRIEVAL if stage1 else GENERATION,
            convert=command or "",
            use=_use(json.dumps(title), RETRIEVAL if stage1 else GENERATION, "t5" in release.name) if command else "",
            note=release.note or "",
            facts={"Visual tokens per image": tokens},
            prompts=release.prompts,
            generation=release.generation,
            language="en",
            results=published_results(release),
            evaluation_notes="As published; not measured again." if release.published else "",
            limits=LIMITS,
        )
    )


# ---------------------------------------------------------------------- the committed cards


def committed_cards() -> dict[str, str]:
    """The cards in `model_cards/`, by file name: every release of the catalogue and the shipped bridges."""
    from .assets import SHIPPED, default_model

    cards = {f"{release_title(release)}.md": card_of_release(release) for release in CATALOGUE.values()}
    for family, name in SHIPPED.items():
        place = f'vlbridge.default_model("{family}")'
        cards[f"{name}.md"] = _render(_about_folder(Path(default_model(family)), name, place))
    return {name: str(card) for name, card in cards.items()}


def main() -> None:
    """Write the cards to `model_cards/` of this checkout."""
    folder = Path(__file__).resolve().parents[1] / "model_cards"
    if not (folder / "template.md").is_file():
        raise SystemExit(f"{folder} is not there: the cards are written in a checkout of the project.")
    for name, card in committed_cards().items():
        temporary = folder / f".{name}.tmp"
        temporary.write_text(card, encoding="utf-8")
        os.replace(temporary, folder / name)
        print(folder / name)


__all__ = [
    "LICENCES",
    "SUMMARY",
    "Licence",
    "card_of_folder",
    "card_of_release",
    "committed_cards",
    "licence_conflicts",
    "licence_of",
    "read_training_summary",
    "strictest",
]


if __name__ == "__main__":
    main()
