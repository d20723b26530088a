"""Feature maps of photographs that nobody took: what EfficientNet-Lite0 might see when it is sure of a class.

The encoder's last block ends in a batch norm, whose weights say how strongly each of its 320 channels answers to
ImageNet's photographs, and its class head says what a class looks like to it. A map begins as noise of that strength;
in a region of it, the class is then strengthened by gradient steps until the head is as sure as was drawn. So a bridge
learns the names of ImageNet's classes without a single photograph, and no photograph's rights matter.

Six of seven maps are of one class, of most of which the head is sure; the others are of several or none, of which it is
not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForImageClassification

from vlbridge import demo
from vlbridge.files import replacing
from vlbridge.modeling.modeling_class_head import everyday_words


GRID = 7  # rows and columns of a map
STEPS, STEP = 40, 1.2
ASIDE, ASIDE_STEPS = 0.7, 5  # share of the maps of one thing that show another too, and how strongly
SURE, UNSURE = 0.5, 0.25  # probabilities of a class above and below which the head is sure, and knows nothing


class Head:
    """EfficientNet-Lite0 from its last block on, and everyday words for its classes."""

    def __init__(self):
        model = AutoModelForImageClassification.from_pretrained(demo.resolve(demo.VISION)).eval().requires_grad_(False)
        self.network = model.timm_model
        norm = [module for module in self.network.blocks[-1].modules() if hasattr(module, "running_mean")][-1]
        self.mean, self.spread = norm.bias.clone(), norm.weight.abs().clone()
        words = everyday_words([model.config.id2label[index] for index in range(1000)])
        self.names = sorted(set(words))
        self.word_of_class = torch.tensor([self.names.index(word) for word in words])

    def features(self, maps: torch.Tensor) -> torch.Tensor:
        """What the encoder makes of maps of its last block: `(n, 49, 320)` to `(n, 49, 1280)`."""
        grid = maps.transpose(1, 2).unflatten(2, (GRID, GRID))
        return self.network.bn2(self.network.conv_head(grid)).flatten(2).transpose(1, 2)

    def logits(self, maps: torch.Tensor) -> torch.Tensor:
        """Of the classes, `(n, 1000)`, for maps `(n, 49, 320)`."""
        return self.network.classifier(self.features(maps).mean(dim=1))


@dataclass
class Maps:
    """Maps and what the head says about them.

    Args:
        maps: `(n, 49, 320)`, half precision.
        classes: `(n,)`: the likeliest class.
        sure: `(n,)`: probability of the likeliest class.
    """

    maps: torch.Tensor
    classes: torch.Tensor
    sure: torch.Tensor


def _blobs(count: int, generator: torch.Generator) -> torch.Tensor:
    """Soft regions around random places, `(count, 49, 1)`."""
    place = torch.rand(count, 2, generator=generator) * 4 + 1
    size = 1.0 + 2.5 * torch.rand(count, 1, generator=generator)
    axis = torch.arange(GRID).float()
    distance = (axis[None, :, None] - place[:, :1, None]) ** 2 + (axis[None, None] - place[:, 1:, None]) ** 2
    return torch.exp(-distance / (2 * size[..., None] ** 2)).flatten(1)[..., None]


def _step(gradient: torch.Tensor, region: torch.Tensor, head: Head) -> torch.Tensor:
    """A step along the gradient, of one length everywhere in a region, in units of what each channel varies by."""
    gradient = gradient * head.spread
    return STEP * gradient / gradient.norm(dim=2, keepdim=True).clamp(min=1e-12) * region * head.spread


def make_maps(head: Head, classes: torch.Tensor, several: torch.Tensor, generator: torch.Generator) -> Maps:
    """Maps of given classes.

    Args:
        head: The encoder's end.
        classes: `(n, 4)`: the class, and others that a map of several shows too.
        several: `(n,)`: how many of the four are strengthened; 0 leaves the noise as it is.
        generator: Of the noise.
    """
    count = len(classes)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # what all places have in common, what neighbours have in common, and what is one place's own
    smooth = torch.nn.functional.avg_pool2d(noise(count, 320, GRID + 4, GRID + 4), 5, stride=1) * 5
    mixed = 0.65 * noise(count, 320, 1, 1) + 0.6 * smooth + 0.25 * noise(count, 320, GRID, GRID)
    strength = 0.6 + 0.5 * torch.rand(count, 1, 1, generator=generator)
    maps = head.mean + head.spread * strength * mixed.flatten(2).transpose(1, 2)
    region = _blobs(count, generator)
    drawn = torch.rand(count, generator=generator)
    wanted = torch.where(several == 1, 0.3 + 0.69 * drawn**0.5, 0.06 + 0.4 * drawn)
    shown = (torch.arange(4) < several[:, None]).float()
    # photographs of one thing show others too, in other places
    aside = ((several == 1) & (torch.rand(count, generator=generator) < ASIDE)).nonzero()[:, 0]
    elsewhere = _blobs(len(aside), generator)
    for _ in range(ASIDE_STEPS):
        moved = maps[aside].requires_grad_()
        chosen = head.logits(moved).log_softmax(dim=-1).gather(1, classes[aside, 1:2])
        (gradient,) = torch.autograd.grad(chosen.sum(), moved)
        maps[aside] += _step(gradient, elsewhere, head)
    rows = (several > 0).nonzero()[:, 0]  # of which the head is not as sure yet as was drawn
    for _ in range(STEPS):
        moved = maps[rows].requires_grad_()
        chosen = head.logits(moved).log_softmax(dim=-1).gather(1, classes[rows])
        there = shown[rows]
        short = (chosen.exp() * there).max(dim=1).values < wanted[rows]
        if not short.any():
            break
        # several: the least likely of them first
        loss = torch.where(there.bool(), chosen, torch.inf).min(dim=1).values
        (gradient,) = torch.autograd.grad(loss[short].sum(), moved)
        rows, gradient = rows[short], gradient[short]
        maps[rows] += _step(gradient, region[rows], head)
    sure, likeliest = head.logits(maps).softmax(dim=-1).max(dim=-1)
    return Maps(maps.half(), likeliest, sure)


def all_maps(head: Head, per_word: int, file: Path | None = None, seed: int = 0, batch_size: int = 128) -> Maps:
    """Maps of every word, and a sixth as many of which the head is not sure.

    Args:
        head: The encoder's end.
        per_word: Maps of each word.
        file: Where to keep them; read if it is there.
        seed: Of all that is drawn.
        batch_size: Maps made at a time.
    """
    if file is not None and file.is_file():
        return Maps(**torch.load(file, weights_only=True))
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for word in range(len(head.names)):
        of_word = (head.word_of_class == word).nonzero()[:, 0]
        order = torch.cat([of_word[torch.randperm(len(of_word), generator=generator)] for _ in range(per_word)])
        chosen.append(order[:per_word])
    single = torch.cat(chosen)
    total = len(single) + len(single) // 6
    classes = torch.randint(1000, (total, 4), generator=generator)
    classes[: len(single), 0] = single
    several = torch.randint(0, 4, (total,), generator=generator)
    several = torch.where(several == 1, 4, several)
    several[: len(single)] = 1
    order = torch.randperm(total, generator=generator)
    parts = [
        make_maps(head, classes[rows], several[rows], generator)
        for rows in tqdm(order.split(batch_size), desc="maps of classes", unit="batch")
    ]
    found = Maps(*(torch.cat([getattr(part, name) for part in parts]) for name in ("maps", "classes", "sure")))
    if file is not None:
        with replacing(file) as partial:
            torch.save(vars(found), partial)
    return found
