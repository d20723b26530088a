"""Licences of weights: those of known parts, and the one that applies to a model of several parts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, try_to_load_from_cache


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

PERMISSIVE, CONDITIONS_OF_USE, SHARE_ALIKE, NON_COMMERCIAL, UNKNOWN = range(5)
ASKS = (
    "permissive",
    "conditions of use",
    "derived works under the same licence",
    "no commercial use",
    "not known: ask the publisher",
)


@dataclass(frozen=True)
class Licence:
    """A licence of weights.

    Args:
        id: The Hub's identifier; `"other"` if the Hub has none.
        strictness: `PERMISSIVE` to `UNKNOWN`: the highest value of all parts applies to the whole.
        share_alike: Derived works must have the same licence.
        name: Name of a licence whose identifier is `"other"`.
        link: Address of the text of a licence whose identifier is `"other"`.
    """

    id: str
    strictness: int
    share_alike: bool = False
    name: str | None = None
    link: str | None = None

    @property
    def label(self) -> str:
        """Name of the licence."""
        return self.name or self.id


def _licences(strictness: int, *ids: str, share_alike: bool = False) -> dict[str, Licence]:
    return {name: Licence(name, strictness, share_alike) for name in ids}


# In ascending order of their demands
LICENCES = {
    **_licences(PERMISSIVE, "cc0-1.0", "unlicense", "mit", "isc", "zlib", "bsd-2-clause", "bsd-3-clause"),
    **_licences(PERMISSIVE, "cc-by-3.0", "cc-by-4.0", "apache-2.0"),
    **_licences(
        CONDITIONS_OF_USE, "openrail", "openrail++", "bigscience-openrail-m", "bigscience-bloom-rail-1.0",
        "creativeml-openrail-m", "bigcode-openrail-m", "gemma", "llama3.3", "llama3.2", "llama3.1", "llama3", "llama2",
    ),
    **_licences(SHARE_ALIKE, "mpl-2.0", "lgpl-2.1", "lgpl-3.0", share_alike=True),
    **_licences(SHARE_ALIKE, "cc-by-sa-3.0", "cc-by-sa-4.0", "gpl-2.0", "gpl-3.0", "agpl-3.0", share_alike=True),
    **_licences(NON_COMMERCIAL, "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0"),
    **_licences(NON_COMMERCIAL, "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", share_alike=True),
    "opt": Licence(
        "other", NON_COMMERCIAL, name="opt-175b",
        link="https://github.com/facebookresearch/metaseq/blob/main/projects/OPT/MODEL_LICENSE.md",
    ),
    "llama": Licence(
        "other", NON_COMMERCIAL, name="llama-1",
        link="https://github.com/facebookresearch/llama/blob/llama_v1/MODEL_CARD.md",
    ),
    "unknown": Licence("other", UNKNOWN, name="unknown"),
}  # fmt: skip

# The first full match applies. CLIP's and EVA's weights have the licence of their code.
PART_LICENCES = (
    (r"openai/clip-vit-.*|EVA-CLIP .*|openai-community/gpt2.*", "mit"),
    (r"google/siglip2?-.*|google/vit-.*|facebook/dinov2-.*|microsoft/resnet-.*", "apache-2.0"),
    (r"timm/tf_efficientnet_lite0\..*|HuggingFaceTB/SmolLM.*", "apache-2.0"),
    (r"google/flan-t5-.*|google-t5/.*|google-bert/.*", "apache-2.0"),
    (r"(anas-awadalla|mosaicml)/mpt-1b-redpajama-200b-dolly", "cc-by-sa-3.0"),
    (r"(anas-awadalla|mosaicml)/mpt-(1b-redpajama-200b|7b)", "apache-2.0"),
    (r"togethercomputer/RedPajama-INCITE-.*|EleutherAI/(pythia|gpt-neox)-.*", "apache-2.0"),
    (r"mistralai/Mistral-7B-.*|NousResearch/Nous-Hermes-2-Yi-34B|Qwen/Qwen3-.*", "apache-2.0"),
    (r"lmsys/vicuna-.*-v1\.5(-16k)?|meta-llama/Llama-2-.*", "llama2"),
    (r"lmsys/vicuna-.*|LLaMA-\d+B", "llama"),
    (r"meta-llama/(Meta-)?Llama-3-.*", "llama3"),
    (r"meta-llama/(Meta-)?Llama-3\.1-.*", "llama3.1"),
    (r"meta-llama/Llama-3\.2-.*", "llama3.2"),
    (r"meta-llama/Llama-3\.3-.*", "llama3.3"),
    (r"google/gemma-.*", "gemma"),
    (r"facebook/opt-.*", "opt"),
)


def licence_of(name: str) -> Licence:
    """Look up the licence of a part.

    Args:
        name: Hub id, folder or other name of the part.

    Returns:
        The licence in the table of known parts; otherwise the one in the part's card, if that is in a local folder or
        in the Hub's cache (there is no network access); otherwise `LICENCES["unknown"]`.
    """
    for pattern, licence in PART_LICENCES:
        if re.fullmatch(pattern, name):
            return LICENCES[licence]
    path = Path(name) / "README.md"
    if not path.is_file() and HUB_ID.fullmatch(name):
        found = try_to_load_from_cache(name, "README.md")
        path = Path(found) if isinstance(found, str) else path
    if path.is_file():
        try:
            data = ModelCard.load(path, ignore_metadata_errors=True).data
        except ValueError:  # not a model card
            return LICENCES["unknown"]
        if data.license in LICENCES:
            return LICENCES[data.license]
        if data.license:
            return Licence("other", UNKNOWN, name=data.license_name or str(data.license), link=data.license_link)
    return LICENCES["unknown"]


def strictest(licences: Iterable[Licence]) -> Licence:
    """The licence with the highest demands; the unknown one if there are none."""
    order = list(LICENCES.values())

    def demands(licence: Licence) -> tuple[int, int]:
        return licence.strictness, order.index(licence) if licence in order else len(order)

    return max(licences, key=demands, default=LICENCES["unknown"])


def licence_conflicts(parts: Mapping[str, Licence], claimed: str | None = None) -> list[str]:
    """Describe conflicts between licences, one sentence each; the list is empty if there are none.

    Args:
        parts: Licences by the names of the parts.
        claimed: Identifier of the licence that the model itself is published under.
    """
    found = []
    for name, licence in parts.items():
        others = [
            f"{other} ({its.label})"
            for other, its in parts.items()
            if its.strictness not in (PERMISSIVE, UNKNOWN) and its.label != licence.label
        ]
        if licence.share_alike and others:
            found.append(
                f"{name} requires {licence.label} for derived works, which is impossible for a model that is also "
                f"derived from {' and '.join(others)}."
            )
    if claimed is not None:
        whole = strictest(parts.values())
        claim = LICENCES.get(claimed, LICENCES["unknown"])
        if claim.strictness < whole.strictness != UNKNOWN:
            which = next(name for name, licence in parts.items() if licence == whole)
            found.append(f"It is said to be under {claimed}, but {which} allows no more than {whole.label} does.")
    return found


__all__ = ["HUB_ID", "LICENCES", "Licence", "licence_conflicts", "licence_of", "strictest"]
