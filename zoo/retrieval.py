"""RICES: the images that are nearest to a query's, by the model's own frozen encoder, as its demonstrations.

    index = ImageIndex.build(model, processor, images, path="coco-train.safetensors")
    index.nearest([picture], k=4)                                   # [[most similar, ..., 4th]]
    index.demonstrations(pool, [picture], k=4)                      # the same of `pool`, the most similar one last

Source: Yang et al., "An Empirical Study of GPT-3 for Few-Shot Knowledge-Based VQA" (arXiv 2109.05014, section 3.3);
`open_flamingo/eval/rices.py`. They take CLIP's image embedding; here it is the mean of the encoder's patch features, as
the bridge gets them, which every encoder has.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .compat_hooks import process_images
from .files import replacing
from .modeling import BridgedModel
from .modeling.modeling_pins import tensor_digest
from .processing.processing_inputs import is_list, pictures
from .prompts import image_key


BATCH_SIZE = 16
FORMAT = "1"
Excluded = Sequence[int | None | Collection[int]]


def encoder_facts(model: BridgedModel, processor) -> dict:
    """Everything that a feature depends on beside the image.

    The encoder is identified by the tensors in memory, not by where they came from: an encoder that was loaded in
    another dtype, quantised or trained gives other features.

    Args:
        model: The model.
        processor: Its processor.
    """
    config, ignored = model.config, {"_name_or_path", "transformers_version", "processor_class", "_processor_class"}
    image_processor = getattr(processor, "image_processor", processor)  # classifiers have that alone
    digest = hashlib.sha256()
    for name, tensor in sorted(model.vision_model.state_dict().items()):
        digest.update(tensor_digest(name, tensor))
    vision = {name: value for name, value in config.vision_config.to_dict().items() if name not in ignored}
    pixels = {name: value for name, value in image_processor.to_dict().items() if name not in ignored}
    chosen = ("vision_feature_layer", "vision_feature_select_strategy", "pooling", "pooling_factor")
    cut = ("image_aspect_ratio", "image_grid_pinpoints", "image_size")
    return {
        "vision_sha256": digest.hexdigest(),
        "vision_config": vision,
        "features": {name: getattr(config, name, None) for name in chosen},
        "image_processor": pixels,
        "processor": {name: getattr(processor, name, None) for name in cut},
    }


def encoder_pin(model: BridgedModel, processor) -> str:
    """Hash of `encoder_facts`; families whose options change nothing have the same one.

    Args:
        model: The model.
        processor: Its processor.
    """
    facts = encoder_facts(model, processor)
    if facts["features"]["pooling"] is None:
        del facts["features"]["pooling"], facts["features"]["pooling_factor"]
    if facts["processor"]["image_grid_pinpoints"] is None:  # images become squares
        facts["processor"] = {"padded": facts["processor"]["image_aspect_ratio"] == "pad"}
    about = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(about.encode()).hexdigest()


class ImageIndex:
    """Features of images, and the model that made them. `build` makes or reads one.

    Args:
        model: The model whose encoder is used.
        processor: Its processor.
        features: `(num_images, dim)` of length 1, in float32 on the CPU.
        ids: A name per image.
        batch_size: Number of images that the encoder gets at a time.
    """

    def __init__(
        self, model: BridgedModel, processor, features: torch.Tensor, ids: list[str], batch_size: int = BATCH_SIZE
    ):
        self.model, self.processor = model, processor
        self.features, self.ids, self.batch_size = features, ids, batch_size

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def build(
        cls,
        model: BridgedModel,
        processor,
        images: Sequence,
        path: str | os.PathLike | None = None,
        batch_size: int = BATCH_SIZE,
        ids: Sequence[str] | None = None,
    ) -> ImageIndex:
        """Make an index, or read the one that was made before.

        Args:
            model: The model whose encoder is used; it needs no language model.
            processor: Its processor.
            images: The images to choose from, of any kind that the processor takes.
            path: File of the index (safetensors): it is read if it exists, and written otherwise.
            batch_size: Number of images that the encoder gets at a time.
            ids: A name per image, by which a file is recognised; by default the hash of each image's content, for which
                all of them are read.

        Raises:
            ValueError: There are no images; or the file was made of others or by another encoder, or is damaged.
            OSError: The file can't be written.
        """
        names = [image_key(image) for image in images] if ids is None else [str(name) for name in ids]
        if len(names) != len(images):
            raise ValueError(f"{len(names)} ids, but {len(images)} images: give a name per image.")
        if not names:
            raise ValueError("There are no images to make an index of.")
        if path is not None and Path(path).exists():
            features = _read(Path(path), encoder_pin(model, processor), names)
            return cls(model, processor, features, names, batch_size)
        index = cls(model, processor, torch.empty(0, 0), names, batch_size)
        index.features = index.features_of(images)
        if path is not None:
            index.save(path)
        return index

    def save(self, path: str | os.PathLike) -> None:
        """Write the index to a file, atomically.

        Args:
            path: The file; its folder is created if it does not exist.

        Raises:
            OSError: It can't be written.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        names = torch.tensor(list(json.dumps(self.ids).encode()), dtype=torch.uint8)
        part = (self.model.config.frozen_parts or {}).get("vision_model") or {}
        about = {"format": FORMAT, "encoder": encoder_pin(self.model, self.processor), "vision_model": json.dumps(part)}
        with replacing(path) as temporary:
            temporary.write_bytes(save({"features": self.features.contiguous(), "ids": names}, about))

    @torch.no_grad()
    def features_of(self, images: Sequence) -> torch.Tensor:
        """Mean-pooled features of length 1.

        Args:
            images: Images of any kind that the processor takes; lists of them are videos.

        Returns:
            `(num_images, dim)`, in float32 on the CPU.
        """
        found: list[torch.Tensor] = [torch.empty(0)] * len(images)
        device = next(self.model.vision_model.parameters()).device
        for start in range(0, len(images), self.batch_size):
            alike: dict[tuple, list[tuple[int, torch.Tensor]]] = {}  # sizes may differ
            for number in range(start, min(start + self.batch_size, len(images))):
                image = images[number]
                frames = pictures(list(image) if is_list(image) else [image], self.processor.image_processor, {})
                pixels = torch.as_tensor(process_images(self.processor, frames, return_tensors="pt")[0]["pixel_values"])
                alike.setdefault(tuple(pixels.shape[1:]), []).append((number, pixels))
            for group in alike.values():
                pixels = torch.cat([each for _, each in group]).to(device)
                features = self.model.get_patch_features(pixels)
                counts = [len(each) for _, each in group]  # frames or tiles
                for (number, _), of_image in zip(group, features.split(counts)):
                    found[number] = of_image.float().flatten(0, 1).mean(dim=0).cpu()
        if not found:
            return torch.empty(0, self.features.shape[1])
        return torch.nn.functional.normalize(torch.stack(found), dim=-1)

    def nearest(
        self, images_or_features: Sequence | torch.Tensor, k: int, exclude: Excluded | None = None
    ) -> list[list[int]]:
        """The most similar images of the index, by the cosine of their features.

        Args:
            images_or_features: Images, or their features `(num_images, dim)`.
            k: Number of images wanted.
            exclude: For every image an index, or several, or `None`, that must not be among them: the image itself.

        Returns:
            For every image the indices of the `k` nearest ones, the most similar first; of equal ones the first.

        Raises:
            ValueError: `k` is too large, or `exclude` does not have an entry per image, or a wrong one.
        """
        features = images_or_features
        if not (isinstance(features, torch.Tensor) and features.ndim == 2 and features.shape[1] == self.dim):
            features = self.features_of(list(images_or_features))
        features = torch.nn.functional.normalize(features.detach().float().cpu(), dim=-1)
        excluded = [None] * len(features) if exclude is None else list(exclude)
        if len(excluded) != len(features):
            raise ValueError(f"{len(features)} images, but exclude has {len(excluded)} entries: give one per image.")
        found = []
        for feature, left_out in zip(features, excluded):
            similarity = self.features @ feature
            without = set() if left_out is None else {left_out} if isinstance(left_out, int) else set(left_out)
            if wrong := sorted(index for index in without if not 0 <= index < len(self)):
                raise ValueError(f"exclude has {wrong[0]}; expected indices from 0 to {len(self) - 1}, or None.")
            similarity[torch.tensor(sorted(without), dtype=torch.long)] = -torch.inf
            available = len(self) - len(without)
            if not 0 <= k <= available:
                raise ValueError(f"{k} images are wanted, but the index has {available} beside what is excluded.")
            found.append(similarity.argsort(descending=True, stable=True)[:k].tolist())
        return found

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.features.shape[1]

    def demonstrations(
        self,
        pool: Sequence[dict],
        images_or_features: Sequence | torch.Tensor,
        k: int,
        exclude: Excluded | None = None,
    ) -> list[list[dict]]:
        """Demonstrations for every query, for `answer_with`: the most similar one last, next to the query.

        Args:
            pool: A demonstration per image of the index.
            images_or_features: The queries' images, or their features.
            k: Number of demonstrations.
            exclude: See `nearest`.

        Raises:
            ValueError: The pool does not belong to the index, or see `nearest`.
        """
        if len(pool) != len(self):
            raise ValueError(f"pool has {len(pool)} demonstrations, but the index {len(self)} images.")
        return [[pool[index] for index in reversed(row)] for row in self.nearest(images_or_features, k, exclude)]


def _read(path: Path, encoder: str, ids: list[str]) -> torch.Tensor:
    """Features in a file, if it holds those of these images by this encoder."""
    wrong = f"Delete {path}, or give another path."
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            features = file.get_tensor("features") if "encoder" in about else None
            known = json.loads(bytes(file.get_tensor("ids").tolist())) if features is not None else []
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as an index of images ({error}). {wrong}") from error
    if features is None or about.get("format") != FORMAT:
        raise ValueError(f"{path} is not an index of images of this release. {wrong}")
    if about["encoder"] != encoder:
        raise ValueError(
            f"{path} was made by another encoder, or in another dtype, or with other settings of the image processor: "
            f"its hash is {about['encoder'][:12]}, expected {encoder[:12]}. {wrong}"
        )
    if known != ids:
        first = next((n for n, pair in enumerate(zip(known, ids)) if pair[0] != pair[1]), min(len(known), len(ids)))
        raise ValueError(
            f"{path} holds other images: {len(known)} of them, expected {len(ids)}; the first difference is image "
            f"{first}. {wrong}"
        )
    return features


__all__ = ["ImageIndex", "encoder_facts", "encoder_pin"]
