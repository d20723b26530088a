"""Train an MLP, a Q-Former and a Perceiver on the same data, and measure them.

    python examples/easy_vqa.py --output DRAWINGS
    python examples/three_bridges.py train mlp --drawings DRAWINGS --output FOLDER
    python examples/three_bridges.py train qformer --output FOLDER --steps 200
    python examples/three_bridges.py train perceiver --output FOLDER --warm-up-steps 3000 --warm-up-rate 1e-3
    python examples/three_bridges.py evaluate --model FOLDER

The data: easy-VQA's drawings of one shape; scenes of two to five shapes (`scenes.py`); and what the encoder would see
in photographs of ImageNet's classes (`class_maps.py`). Each step of the MLP has questions about drawings, a scene and
photographs, packed behind their visual tokens. The MLP begins as a bridge that knows drawings, beside the encoder's
class head: yes/no questions are learned from drawings with many pairs about each (`easy_vqa.py`), and hardly at all
from a mixture. The other two begin with what the MLP tells the language model (`imitation.py`), and are then asked
about drawings alone. A Q-Former can also come from stage 1: `three_bridges.py stage1`, `train qformer --stage1`.
A run that was killed goes on where its last checkpoint was.
"""

from __future__ import annotations

import copy
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from class_maps import SURE, UNSURE, Head, Maps, all_maps
from easy_vqa import accuracies, answer_all, blind_baseline, conversation, encode, kind_of, num_placeholders
from imitation import Drawings, exemplars, imitate_layers, imitate_tokens, layer_states, step_down
from scenes import KINDS, Shape, ask, caption_of_scene, draw_scene, paint
from torch.nn.utils import parametrize
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, set_seed

import vlbridge
from vlbridge import demo
from vlbridge.assets import default_model
from vlbridge.files import cache_dir, replacing, write_json
from vlbridge.images import load_image
from vlbridge.inference import BATCH_SIZE, answer
from vlbridge.training.training_easy_vqa import (
    COLORS,
    NEGATED,
    SHAPES,
    Example,
    caption_of,
    load_split,
    matched_pair,
    properties_of,
    yes_no_templates,
)
from vlbridge.training.training_packing import PackedCollator, append_pairs


app = typer.Typer(add_completion=False, help=__doc__.splitlines()[0])
LAST = -1  # the encoder's last block, 320 channels
OPTIONS = {
    "mlp": {"global_context": True, "projector_init_from": demo.VISION, "class_names": "everyday", "free_units": 576},
    "qformer": {
        "vision_feature_layer": LAST,
        "qformer_config": {
            "num_query_tokens": 49, "hidden_size": 320, "num_hidden_layers": 4, "num_attention_heads": 5,
            "intermediate_size": 1024, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        },
    },
    "perceiver": {
        "vision_feature_layer": LAST, "num_latents": 16, "resampler_depth": 2, "resampler_num_heads": 4,
        "cross_attention_every_n_layers": 7, "cross_attention_num_heads": 4, "feed_forward_multiplier": 1,
        "latents_init_std": 0.1, "gate_init": 1.0,
    },
}  # fmt: skip
# At first all gradients agree on the form of answers, and Adam's equal steps add up over a wide layer until the
# picture's share is lost. So an MLP learns the form first, by what is added to every visual token:
FORM_RATE, FORM_SHARE = 2e-3, 0.02  # learning rate, and share of the steps
# Learning rate and Adam's epsilon by part. With a small epsilon, the units of classes that are not shown would be moved
# at full rate by next to nothing.
RATES = {
    "mlp": {
        "linear_1.parametrizations.weight.original0": (3e-5, 1e-4),  # the class head
        "linear_1.parametrizations.weight.original1": (2e-4, 1e-8),  # free units
        "linear_1.bias": (3e-5, 1e-4),
        "linear_2.parametrizations.weight.0.matrix": (4e-5, 1e-8),  # shared by all names
        "linear_2.parametrizations.weight.original0": (1e-3, 1e-4),  # names
        "linear_2.parametrizations.weight.original1": (3e-4, 1e-8),  # free units
        "linear_2.bias": (5e-4, 1e-8),
    },
    "qformer": {
        "vision_layer_norm": (1e-4, 1e-8), "qformer": (1e-4, 1e-8), "language_projection.weight": (3e-4, 1e-8),
        "language_projection.bias": (3e-4, 1e-8),
    },
    "perceiver": {
        "token_rows": (5e-4, 1e-8), "resampler": (1e-4, 1e-8), "cross_attention_layers": (5e-4, 1e-8),
    },
}  # fmt: skip
# Stands before the visual tokens, and begins captions: a language model repeats what stands there by itself
SHOWS = "The image shows"
NOTHING = "something I can't name"
PHOTO_QUESTIONS = ("what is in the image?", "what does the photo show?", "what is this?")
NUM_SCENES, NUM_TEST_SCENES, MAPS_PER_WORD = 3000, 300, 10
CLASSES = 1000  # of the encoder's head
# Drawings, scenes and photographs of a step without the language model
WARM_UP_PICTURES = {"perceiver_flamingo": (48, 8, 8), "mlp_llava": (16, 16, 40)}


# ---------------------------------------------------------------------- data


@dataclass
class Scene:
    """A drawn scene and its file."""

    shapes: list[Shape]
    image: Path


def scenes(folder: Path, count: int, seed: str) -> list[Scene]:
    """Scenes whose pictures are in `folder`; those that are missing are drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number in range(count):
        rng = random.Random(f"{seed}:{number}")
        scene = Scene(draw_scene(rng), folder / f"{number}.png")
        if not scene.image.is_file():
            with replacing(scene.image) as file:
                paint(scene.shapes, rng).save(file, format="png")
        found.append(scene)
    return found


def article(word: str) -> str:
    """`"a dog"`, `"an owl"`."""
    return f"{'an' if word[0] in 'aeiouAEIOU' else 'a'} {word}"


def photo_answer(name: str | None) -> str:
    """What is said of a photograph of something; `None` is something that the encoder is not sure of."""
    return f"{SHOWS} {NOTHING if name is None else article(name)}."


@dataclass
class Data:
    """What a bridge is trained on, with the features that it reads.

    Args:
        easy: easy-VQA's training pictures.
        easy_maps: What the encoder's last block makes of them, `(num_pictures, 49, 320)`.
        scenes: Scenes.
        scene_maps: Of the scenes.
        maps: Of photographs that nobody took, see `class_maps`.
        head: The encoder's end.
        read: Makes the features that a bridge reads, `(n, num_patches, vision_dim)`, of maps.
        held_back: Drawings, scenes and pairs of maps at the end that are not trained on.
    """

    easy: list[Example]
    easy_maps: torch.Tensor
    scenes: list[Scene]
    scene_maps: torch.Tensor
    maps: Maps
    head: Head
    read: Callable[[torch.Tensor], torch.Tensor]
    held_back: int = 40

    def __post_init__(self):
        self.words = self.head.word_of_class[self.maps.classes]  # of each map, in `head.names`
        # maps of which the head is sure, or of which it clearly is not
        usable = ((self.maps.sure > SURE) | (self.maps.sure < UNSURE)).nonzero()[:, 0]
        self.held_back_maps = (self.maps.sure > SURE).nonzero()[:, 0][-2 * self.held_back or len(usable) :]
        self.usable = usable[~torch.isin(usable, self.held_back_maps)]

    def features(self, *maps: torch.Tensor) -> torch.Tensor:
        """What the bridge reads of these maps, one after the other."""
        return self.read(torch.cat([some.float() for some in maps]))


def reader(model, head: Head) -> Callable[[torch.Tensor], torch.Tensor]:
    """How a model's features come from the encoder's last block: as they are, or through the end and pooled."""
    if model.config.vision_feature_layer == LAST:
        return lambda maps: maps

    @torch.no_grad()
    def read(maps: torch.Tensor) -> torch.Tensor:
        return head.features(maps)

    return read


def load_data(model, limit: int) -> Data:
    """All training data; pictures are encoded once, and kept."""
    head = Head()
    easy = load_split(demo.easy_vqa_dir(), "train")[: limit or None]
    drawn = scenes(cache_dir() / "scenes", limit or NUM_SCENES, "train")
    maps = all_maps(head, MAPS_PER_WORD if not limit else 1, cache_dir() / f"class_maps_{bool(limit):d}.pt")
    looking = vlbridge.compose(demo.VISION, demo.LANGUAGE, "qformer", **OPTIONS["qformer"])  # at the last block
    pictures = encode(*looking, [*easy, *(Example(scene.image, []) for scene in drawn)])
    return Data(easy, pictures[: len(easy)], drawn, pictures[len(easy) :], maps, head, reader(model, head))


# ---------------------------------------------------------------------- without the language model


class Words:
    """Embeddings of words, as visual tokens begin to give them."""

    def __init__(self, model, processor):
        self.table = model.get_input_embeddings().weight.detach().float()
        self.tokenizer = processor.tokenizer
        self.known: dict[str, torch.Tensor] = {}

    def __call__(self, word: str) -> torch.Tensor:
        """The mean of a word's token embeddings, at the length that one has, `(text_dim,)`."""
        if word not in self.known:
            rows = self.table[self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]]
            mean = rows.mean(dim=0)
            self.known[word] = mean * rows.norm(dim=1).mean() / mean.norm()
        return self.known[word]


def scene_targets(scene: Scene, words: Words, count: int, grid: bool) -> torch.Tensor:
    """What the visual tokens of a scene begin as, `(count, text_dim)`.

    Args:
        scene: The scene.
        words: Embeddings.
        count: Number of visual tokens.
        grid: Tokens are places, and say what is there; otherwise the first ones say what is on the left.
    """
    things = torch.stack([words(one.color) + words(one.shape) for one in scene.shapes])
    if not grid:
        return things[torch.arange(count) * len(things) // count]
    side = round(count**0.5)
    place = (torch.arange(side) + 0.5) * 224 / side
    x = torch.tensor([float(one.x) for one in scene.shapes])
    y = torch.tensor([float(one.y) for one in scene.shapes])
    distance = (place[:, None, None] - y) ** 2 + (place[None, :, None] - x) ** 2
    near = (-distance / (2 * 40.0**2)).flatten(0, 1).softmax(dim=1)
    return near @ things


NAMES = 0.1  # weight of the loss of names
LONGER = 3.0  # length of visual tokens over that of words, where drawings give tokens ten times as long as words


@torch.no_grad()
def add_drawings(model, folder: Path) -> torch.nn.Module:
    """Let the free units be the hidden units of an MLP bridge that knows drawings, and return a copy."""
    drawings, bridge = AutoModel.from_pretrained(folder).bridge, model.bridge
    bridge.linear_1.weight[CLASSES:] = 0
    bridge.linear_1.weight[CLASSES:, : drawings.linear_1.in_features] = drawings.linear_1.weight
    bridge.linear_1.bias[CLASSES:] = drawings.linear_1.bias
    bridge.linear_2.weight[:, CLASSES:] = drawings.linear_2.weight
    bridge.linear_2.bias.copy_(drawings.linear_2.bias)
    return copy.deepcopy(bridge).requires_grad_(False)


def warm_up(model, data: Data, words: Words, steps: int, learning_rate: float, kept: torch.nn.Module | None) -> None:
    """Let visual tokens begin as the words for what is in the picture; the language model is not run.

    All tokens get a word, whether or not their place shows anything: one that was nearly zero would be noise to the
    language model, whose first layer norm makes all tokens equally large.

    Of a Perceiver, whose visual tokens are no embeddings, a linear layer that is thrown away makes them such.

    Args:
        model: The model.
        data: The data.
        words: Embeddings.
        steps: Number of steps.
        learning_rate: The highest.
        kept: A bridge whose visual tokens of drawings of one shape shall stay as they are.
    """
    grid = model.config.model_type == "mlp_llava"
    text_dim, count = words.table.shape[1], model.config.num_image_tokens(224, 224)
    probe = torch.nn.Identity()
    if model.config.model_type == "perceiver_flamingo":
        probe = torch.nn.Linear(model.config.vision_feature_size, text_dim)
    known = [(index, found) for index, example in enumerate(data.easy) if len(found := properties_of(example)) == 2]
    easy = torch.stack([words(found["color"]) + words(found["shape"]) for _, found in known])
    easy_rows = torch.tensor([index for index, _ in known])
    drawn = torch.stack([scene_targets(scene, words, count, grid) for scene in data.scenes])
    names = torch.stack([words(name) for name in data.head.names])
    directions = torch.nn.functional.normalize(names, dim=-1)
    parameters = [
        parameter
        for name, parameter in [*model.bridge.named_parameters(), *probe.named_parameters()]
        if "cross_attention_layers" not in name
    ]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    bar, (num_easy, num_drawn, num_maps) = (
        tqdm(range(steps), desc="warming up", unit="step"),
        WARM_UP_PICTURES[model.config.model_type],
    )
    for step in bar:
        one, two = torch.randint(len(easy_rows), (num_easy,)), torch.randint(len(drawn), (num_drawn,))
        three = data.usable[torch.randint(len(data.usable), (num_maps,))]
        features = data.features(data.easy_maps[easy_rows[one]], data.scene_maps[two], data.maps.maps[three])
        sure = data.maps.sure[three] > SURE
        target = torch.where(sure[:, None], names[data.words[three]], words("something"))[:, None]
        wanted = torch.cat([easy[one][:, None].expand(-1, count, -1), drawn[two], target.expand(-1, count, -1)])
        given, loss = probe(model.bridge(features)), 0.0
        seen = given[-num_maps:][sure]
        if kept is not None:
            before = kept(features[:num_easy])
            loss = ((given[:num_easy] - before).square().sum(dim=-1) / before.square().sum(dim=-1)).mean()
            given, wanted = given[num_easy:], wanted[num_easy:]
        # the direction first: where a place tells little, a squared error would make all words a bit of each
        away = 1 - torch.nn.functional.cosine_similarity(given, wanted, dim=-1)
        length = wanted.norm(dim=-1) * (1 if kept is None else LONGER)
        # and nearer than all other names
        near = torch.nn.functional.normalize(seen, dim=-1) @ directions.T
        names_loss = torch.nn.functional.cross_entropy(
            20 * near.flatten(0, 1), data.words[three][sure].repeat_interleave(count)
        )
        loss += away.mean() + 0.05 * (given.norm(dim=-1) / length - 1).square().mean() + NAMES * names_loss
        step_down(loss, parameters, optimizer, schedule)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", names=f"{names_loss.item():.3f}")
        if step % 200 == 199 or step == steps - 1:
            print(f"warm-up {step + 1}: {json.dumps(read_out(model, probe, data, words))}", flush=True)


@torch.no_grad()
def read_out(model, probe, data: Data, words: Words, count: int = 256) -> dict[str, float]:
    """How often the mean of the visual tokens is nearest to the right words."""
    found: dict[str, float] = {}
    last = slice(-count, None)
    mean = probe(model.bridge(data.features(data.easy_maps[last]))).mean(dim=1)
    shown = [properties_of(example) for example in data.easy[last]]
    pairs = [(color, shape) for color in COLORS for shape in SHAPES]
    table = torch.stack([words(color) + words(shape) for color, shape in pairs])
    nearest = ((mean @ table.T) - table.square().sum(dim=1) / 2).argmax(dim=1).tolist()
    for place, kind in enumerate(("color", "shape")):
        asked = [(pairs[index][place], one[kind]) for index, one in zip(nearest, shown) if kind in one]
        found[kind] = round(sum(said == right for said, right in asked) / len(asked), 3)
    rows = (data.maps.sure > SURE).nonzero()[last, 0]
    mean = probe(model.bridge(data.features(data.maps.maps[rows]))).mean(dim=1)
    table = torch.stack([words(name) for name in data.head.names])
    nearest = torch.nn.functional.cosine_similarity(mean[:, None], table[None], dim=-1).argmax(dim=1)
    found["maps"] = round((nearest == data.words[rows]).float().mean().item(), 3)
    return found


# ---------------------------------------------------------------------- with the language model

# When what is asked about easy-VQA's drawings, in shares of all steps. Naming first. Comparing a question with the
# picture is then learned with three shapes and plain questions, and carries over to negated questions and to colours;
# if everything is asked at once, it is not learned in several times as many steps.
# A bridge that begins with drawings is asked everything from the beginning.
NAMING, PLAIN, NEGATION = 0.25, 0.4, 0.55
# A bridge that begins with what another tells is never asked to name alone, but in this share of its steps; and how far
# the run has come when it begins
NAMED = 0.4
BEGIN = {"qformer": 0.9, "perceiver": NAMING}


class ClassRows(torch.nn.Module):
    """The first layer's weight in two parts, each with a learning rate: the class head's rows, and the free units'."""

    def forward(self, classes: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """Rows of both, `(units, vision_dim)`."""
        return torch.cat([classes, free])

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two parts."""
        return weight[:CLASSES].clone(), weight[CLASSES:].clone()


class SharedMap(torch.nn.Module):
    """Multiplies the outputs of the class units by one matrix.

    What has to change in the name of one class for the language model to say it has to change in all of them; so names
    are learned that few examples or none have shown.
    """

    def __init__(self, text_dim: int):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.eye(text_dim))

    def forward(self, classes: torch.Tensor, free: torch.Tensor) -> torch.Tensor:
        """Columns of both, `(text_dim, units)`."""
        return torch.cat([self.matrix @ classes, free], dim=1)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two parts."""
        return weight[:, :CLASSES].clone(), weight[:, CLASSES:].clone()


class Questions:
    """What is asked in each step: a pure function of its number, so that a run can be resumed.

    Args:
        data: The data.
        processor: The model's processor.
        steps: Of the whole run.
        seed: Of all that is drawn.
        dtype: Precision of the language model.
        begin: How far the run has come when it begins, from 0 to 1: what a bridge knows is not asked in stages.
        alone: Ask about drawings of one shape alone, and always for the caption, which tells colour and shape.
    """

    def __init__(
        self, data: Data, processor, steps: int, seed: int, dtype: torch.dtype, begin: float = 0.0, alone: bool = False
    ):
        self.data, self.processor, self.steps, self.seed, self.dtype = data, processor, steps, seed, dtype
        self.begin, self.alone = begin, alone
        self.templates = yes_no_templates(data.easy)
        self.num_tokens = num_placeholders(processor)
        self.prompts: dict[str, list[int]] = {}
        self.usable = data.usable.tolist()

    def tokenize(self, text: str) -> list[int]:
        text = text.replace(self.processor.image_token, self.processor.image_token * self.num_tokens)
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, question: str) -> list[int]:
        if question not in self.prompts:
            text = self.processor.apply_chat_template(conversation(question), add_generation_prompt=True)
            self.prompts[question] = self.tokenize(text)
        return self.prompts[question]

    def easy(self, index: int, progress: float, rng: random.Random, pairs: int, others: int) -> list[tuple[str, str]]:
        """Matched pairs about what a drawing shows and does not show, and its own questions."""
        example = self.data.easy[index]
        own, caption, found = list(example.questions), caption_of(example), properties_of(example)
        if caption:
            own.append((self.processor.caption_prompt, f"{SHOWS} {caption}."))
        if progress < NAMING:
            own = [pair for pair in own if pair[1] not in ("yes", "no")] * 2  # ends in the caption, too
        asked = []
        for _ in range(pairs if len(found) == 2 else 0):
            about = "{shape}" if progress < NEGATION else rng.choice(("{shape}", "{color}", "{color}"))
            templates = [form for form in self.templates if about in form]
            if progress < PLAIN:
                templates = [form for form in templates if not NEGATED.search(form)]
            asked += matched_pair(found, templates, lambda below: rng.randrange(below))
        named = [own[-1]] if self.alone and caption else []
        return list(dict.fromkeys(asked + named + rng.sample(own, min(others, len(own)))))

    def scene(self, index: int, progress: float, rng: random.Random, count: int) -> list[tuple[str, str]]:
        """The caption, and questions of every kind; first those about names."""
        shapes = self.data.scenes[index].shapes
        caption = (self.processor.caption_prompt, f"{SHOWS} {caption_of_scene(shapes)}.")
        asked = [caption] if rng.random() < 0.3 else []
        kinds = KINDS[1:4] if progress < NAMING else KINDS
        while len(asked) < count:
            asked += ask(shapes, rng.choice(kinds), rng)
        return asked[:count]

    def photo(self, index: int, rng: random.Random) -> list[tuple[str, str]]:
        """What the encoder is sure to see, or that it is not; and now and then a matched pair about it."""
        data = self.data
        name = data.head.names[int(data.words[index])]
        sure = data.maps.sure[index] > SURE
        question = rng.choice((self.processor.caption_prompt, *PHOTO_QUESTIONS))
        asked = [(question, photo_answer(name if sure else None))]
        if sure and rng.random() < 0.3:
            other = rng.choice([word for word in data.head.names if word != name])
            form = rng.choice(("is there {} in the image?", "is this {}?"))
            asked += [(form.format(article(name)), "yes"), (form.format(article(other)), "no")]
        return asked

    def step(self, number: int) -> dict:
        """The batch of a step, packed into rows."""
        rng, data = random.Random(f"{self.seed}:{number}"), self.data
        progress = self.begin + (1 - self.begin) * number / self.steps
        samples = []
        easy = [(3, 3)] * 2  # matched pairs and other questions of each drawing
        others = ["scene", *["photo"] * 9]
        if self.alone:
            easy, others = [(4, 1)] * 3, []
            if rng.random() < NAMED:
                easy, progress = [(0, 3)] * 8, 0.0
        elif progress < NAMING:
            easy = [(0, 4)] * 4
        elif progress < NEGATION:
            easy = [(5, 1), (5, 1), (0, 3)]
        for kind in (*easy, *others):
            if isinstance(kind, tuple):
                pairs = []
                while not pairs:  # some have nothing but yes/no questions, and no shape or colour is told
                    index = rng.randrange(len(data.easy) - data.held_back)
                    pairs = self.easy(index, progress, rng, *kind)
                maps = data.easy_maps[index]
            elif kind == "scene":
                index = rng.randrange(len(data.scenes) - data.held_back)
                pairs, maps = self.scene(index, progress, rng, 3), data.scene_maps[index]
            else:
                index = rng.choice(self.usable)
                pairs, maps = self.photo(index, rng), data.maps.maps[index]
            samples.append(self.sample(data.features(maps[None])[0], pairs))
        return self.batch(samples)

    def sample(self, features: torch.Tensor, pairs: list[tuple[str, str]]) -> dict:
        """Questions about one picture, packed behind its visual tokens."""
        end = [self.processor.tokenizer.eos_token_id]
        tokens = [(self.prompt(question), self.tokenize(answer) + end) for question, answer in pairs]
        return {"patch_features": features, **append_pairs(tokens)}

    def batch(self, samples: list[dict]) -> dict:
        """Rows of samples for eager attention, which adds the mask.

        With AMX it is faster than SDPA, which has no fast kernel for bfloat16 with a mask.
        """
        batch = PackedCollator(max_tokens=420)(samples)
        allowed = batch["attention_mask"]
        mask = torch.zeros(allowed.shape, dtype=self.dtype)
        return {**batch, "attention_mask": mask.masked_fill(~allowed, torch.finfo(self.dtype).min)}

    @torch.inference_mode()
    def right(self, model, features: torch.Tensor, pairs: list[list[tuple[str, str]]]) -> list[list[bool]]:
        """Whether the model would answer each question rightly, word for word, if it always took the likeliest token.

        The right answers are given to it, and it has to find each of their tokens the likeliest: the same, in one pass.
        """
        found, end = [], self.processor.tokenizer.eos_token_id
        for one, asked in zip(features, pairs, strict=True):
            batch = self.batch([self.sample(one.float(), asked)])
            wanted = batch["shift_labels"][0, :-1]
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                logits = model(**{**batch, "labels": None, "shift_labels": None}).logits[0]
            same = logits[: len(wanted)].argmax(dim=-1) == wanted
            ends = (wanted == end).nonzero()[:, 0].tolist()
            begins = [0, *(place + 1 for place in ends[:-1])]
            found.append([bool(same[begin : last + 1].all()) for begin, last in zip(begins, ends, strict=True)])
            assert len(ends) == len(asked), (ends, asked)
        return found


def learn(model, questions: Questions, output: Path, bridge: str, watch, every: int = 200) -> None:
    """Train on the loss of the answers.

    Args:
        model: The model; its language model computes in its own precision.
        questions: What is asked.
        output: The run's folder is next to it.
        bridge: Of `RATES`. The rates rise over 2 % of the steps, and fall to zero in the last 40 %.
        watch: Called with the model, now and then.
        every: Steps between two checkpoints, and between two calls of `watch`.
    """
    steps, state = questions.steps, output.with_suffix(".training.pt")
    parameters = dict(model.bridge.named_parameters())
    groups = [
        {"params": [one for name, one in parameters.items() if name.startswith(part)], "lr": rate, "eps": eps}
        for part, (rate, eps) in RATES[bridge].items()
    ]
    assert sum(len(group["params"]) for group in groups) == len(parameters), list(parameters)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    form_steps = int(FORM_SHARE * steps) if bridge == "mlp" else 0
    if form_steps:
        form = torch.optim.AdamW([parameters["linear_2.bias"]], lr=FORM_RATE, weight_decay=0.0)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / (0.02 * steps), (steps - form_steps - step) / (0.4 * steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    begin = 0
    if state.is_file():
        saved = torch.load(state, weights_only=True)
        model.bridge.load_state_dict(saved["bridge"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        begin = saved["step"]
    model.train()
    bar, losses = tqdm(range(begin, steps), initial=begin, total=steps, desc="training", unit="step"), []
    for number in bar:
        batch = questions.step(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=questions.dtype == torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        if number < form_steps:
            form.step()
        else:
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            schedule.step()
        optimizer.zero_grad()
        losses = [*losses[-49:], loss.item()]
        bar.set_postfix(loss=f"{sum(losses) / len(losses):.3f}")
        if (number + 1) % every == 0 or number + 1 == steps:
            with replacing(state) as file:
                saved = {"bridge": model.bridge.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**saved, "schedule": schedule.state_dict(), "step": number + 1}, file)
            model.eval()
            print(f"step {number + 1}: loss {sum(losses) / len(losses):.3f}; {watch(model)}", flush=True)
            model.train()
    model.eval()


def asked_of(pairs: list[list[tuple[str, str]]], model, processor, features, max_new_tokens: int = 8) -> float:
    """Share of right answers to questions about pictures."""
    examples = [Example(Path(), one) for one in pairs]
    given = answer_all(model, processor, examples, features, max_new_tokens)
    wanted = [answer.lower() for one in pairs for _, answer in one]
    return sum(said == right for said, right in zip(given, wanted, strict=True)) / len(wanted)


class Watch:
    """Answers to a few questions about pictures that are not trained on: the last ones of the training data."""

    def __init__(self, data: Data, questions: Questions):
        self.questions, rng, count = questions, random.Random(5), data.held_back
        self.easy = data.easy[-count:], data.features(data.easy_maps[-count:])
        asked = [[pair for kind in KINDS for pair in ask(scene.shapes, kind, rng)] for scene in data.scenes[-count:]]
        self.scenes = asked, data.features(data.scene_maps[-count:])
        rows = data.held_back_maps
        words = [data.head.names[index] for index in data.words[rows].tolist()]
        self.photos = (
            [[(PHOTO_QUESTIONS[0], photo_answer(word))] for word in words],
            data.features(data.maps.maps[rows]),
        )

    def __call__(self, model) -> str:
        examples, features = self.easy
        pairs = [example.questions for example in examples]
        right = self.questions.right(model, features, pairs)
        found = Counter()
        for asked, hits in zip(pairs, right):
            for pair, hit in zip(asked, hits):
                found[kind_of(*pair), hit] += 1
        kinds = sorted({kind for kind, _ in found})
        shares = ", ".join(
            f"{kind} {found[kind, True] / (found[kind, True] + found[kind, False]):.2f}" for kind in kinds
        )
        asked, features = self.scenes
        scene = [hit for hits in self.questions.right(model, features, asked) for hit in hits]
        asked, features = self.photos
        photo = [hit for hits in self.questions.right(model, features, asked) for hit in hits]
        return f"{shares}; scenes {sum(scene) / len(scene):.3f}; maps {sum(photo) / len(photo):.3f}"


def imitate(model, processor, data: Data, folder: str, steps: int) -> None:
    """Let a Q-Former or a Perceiver begin with what an MLP tells the language model, see `imitation.py`."""
    teacher, its_processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    teacher.float()
    teacher.language_model.set_attn_implementation("eager")
    drawings = Drawings(data, (processor.caption_prompt, SHOWS))
    its_data = replace(data, read=reader(teacher, data.head))
    best = exemplars(teacher, Questions(its_data, its_processor, 1, 0, torch.float32), drawings)
    if model.config.model_type == "qformer_blip2":
        imitate_tokens(model, teacher, data, best, drawings, steps, 5e-4)
    else:
        dtype = model.language_model.dtype
        states = layer_states(model.float(), processor, best, drawings, per_thing=40)
        imitate_layers(model, data, states, drawings, steps, (5e-4, 1e-4))
        model.language_model.to(dtype)


@app.command()
def train(
    bridge: Annotated[str, typer.Argument(help="mlp, qformer or perceiver.")],
    output: Annotated[Path, typer.Option(help="Folder to write the bridge to.")],
    drawings: Annotated[Path | None, typer.Option(help="Of the MLP: what `easy_vqa.py` wrote.")] = None,
    stage1: Annotated[Path | None, typer.Option(help="Of the Q-Former: what `stage1` wrote.")] = None,
    teacher: Annotated[str, typer.Option(help="Of the other two: the MLP that they begin like.")] = default_model(),
    steps: Annotated[int, typer.Option(help="With the language model.")] = 800,
    warm_up_steps: Annotated[int, typer.Option(help="Without the language model; not for the Q-Former.")] = 400,
    warm_up_rate: float = 5e-4,
    imitation_steps: Annotated[int, typer.Option(help="Of the other two: to begin like the MLP.")] = 900,
    dtype: Annotated[str, typer.Option(help="Of the language model: float32 on a CPU without AMX.")] = "bfloat16",
    seed: int = 0,
    limit: Annotated[int, typer.Option(help="Use this many pictures only, to try the program (0: all).")] = 0,
) -> None:
    """Train one bridge between EfficientNet-Lite0 and SmolLM2-135M-Instruct."""
    if drawings is not None and bridge != "mlp":
        raise typer.BadParameter(f"--drawings is for the MLP, not for {bridge}", param_hint="--drawings")
    set_seed(seed)
    started = time.time()
    options = dict(OPTIONS[bridge])
    if stage1 is not None:
        options["qformer_init_from"] = str(stage1)
    model, processor = vlbridge.compose(demo.VISION, demo.LANGUAGE, bridge, **options)
    processor.chat_template = re.sub(r"'<image>(\\n)?'", rf"'{SHOWS}<image>\\n'", processor.chat_template)
    assert f"{SHOWS}<image>\n" in processor.apply_chat_template(conversation("what is this?"))
    kept = None if drawings is None else add_drawings(model, drawings)
    model.language_model.to(getattr(torch, dtype))
    model.language_model.set_attn_implementation("eager")
    model.vision_model.to(memory_format=torch.channels_last)
    data = load_data(model, limit)
    words = Words(model, processor)
    warm = output.with_suffix(".warm.pt")
    model.train()
    if warm.is_file():
        model.bridge.load_state_dict(torch.load(warm, weights_only=True))
    else:
        if bridge != "qformer" and warm_up_steps:
            warm_up(model, data, words, warm_up_steps, warm_up_rate, kept)
        if bridge != "mlp" and imitation_steps:
            imitate(model, processor, data, teacher, imitation_steps)
        with replacing(warm) as file:
            torch.save(model.bridge.state_dict(), file)
    begin = BEGIN.get(bridge, 0.0 if drawings is None else NEGATION)
    questions = Questions(data, processor, steps, seed, model.language_model.dtype, begin=begin, alone=bridge != "mlp")
    if bridge == "mlp":
        parametrize.register_parametrization(model.bridge.linear_1, "weight", ClassRows())
        parametrize.register_parametrization(model.bridge.linear_2, "weight", SharedMap(words.table.shape[1]))
    learn(model, questions, output, bridge, Watch(data, questions))
    if bridge == "mlp":
        parametrize.remove_parametrizations(model.bridge.linear_1, "weight")
        parametrize.remove_parametrizations(model.bridge.linear_2, "weight")
    model.language_model.set_attn_implementation("sdpa")
    model.bridge.to(torch.bfloat16)
    model.save_pretrained(output, bridge_only=True)
    processor.save_pretrained(output)
    print(f"trained in {(time.time() - started) / 60:.1f} minutes, saved to {output}")


@app.command("stage1")
def first_stage(
    output: Annotated[Path, typer.Option(help="Folder to write the stage-1 model to.")],
    steps: int = 1500,
    learning_rate: float = 1e-3,
    dtype: Annotated[str, typer.Option(help="To compute in: float32 on a CPU without AMX.")] = "bfloat16",
    seed: int = 0,
    limit: Annotated[int, typer.Option(help="Use this many pictures only, to try the program (0: all).")] = 0,
) -> None:
    """Train the Q-Former alone on captions: contrast, matching and captioning, 32 pairs in each step."""
    set_seed(seed)
    options = {**OPTIONS["qformer"], "embed_dim": 64}
    options["qformer_config"] = {**options["qformer_config"], "max_position_embeddings": 64}
    model, processor = vlbridge.QFormerBlip2ForPreTraining.from_vision(
        demo.VISION, demo.resolve(demo.LANGUAGE), max_length=48, **options
    )
    data = load_data(model, limit)
    captions = [caption_of(example) for example in data.easy]
    easy = [index for index, caption in enumerate(captions) if caption]
    sure = (data.maps.sure > SURE).nonzero()[:, 0].tolist()
    rng = random.Random(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.05)
    model.train()
    bar, losses = tqdm(range(steps), desc="stage 1", unit="step"), []
    for step in bar:
        rows = rng.sample(easy, 10), rng.sample(range(len(data.scenes)), 6), rng.sample(sure, 16)
        names = [data.head.names[index] for index in data.words[rows[2]].tolist()]
        texts = [captions[index] for index in rows[0]]
        texts += [caption_of_scene(data.scenes[index].shapes) for index in rows[1]]
        texts += [f"a photo of {article(name)}" for name in names]
        features = data.features(data.easy_maps[rows[0]], data.scene_maps[rows[1]], data.maps.maps[rows[2]])
        # pairs with the same caption are no negatives of each other
        same = torch.tensor([texts.index(text) for text in texts])
        inputs = processor(text=texts, padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            out = model(patch_features=features, image_ids=same, **inputs)
        step_down(out.loss, parameters, optimizer, schedule)
        losses = [*losses[-49:], (out.loss_itc.item(), out.loss_itm.item(), out.loss_itg.item())]
        if step % 20 == 0 or step == steps - 1:
            itc, itm, itg = (sum(values) / len(values) for values in zip(*losses))
            bar.set_postfix(itc=f"{itc:.3f}", itm=f"{itm:.3f}", itg=f"{itg:.3f}")
        if step % 200 == 199:
            print(f"stage 1, {step + 1}: contrast {itc:.3f}, matching {itm:.3f}, captioning {itg:.3f}", flush=True)
    model.eval().save_pretrained(output)
    processor.save_pretrained(output)


@torch.inference_mode()
def photographs(folders: list[Path], model, processor, limit: int) -> dict:
    """What a model says about photographs, against what its encoder's class head says.

    Beside a picture may lie a text file of the same name, whose first line says what it shows (Tux Paint's stamps have
    such): then the words of both are looked up in it.
    """
    head, rows = Head(), []
    suffixes = (".png", ".jpg")
    files = [(folder, file) for folder in folders for file in sorted(folder.rglob("*")) if file.suffix in suffixes]
    files = files[: limit or None]
    for start in tqdm(range(0, len(files), BATCH_SIZE), desc="photographs", unit="batch"):
        batch = files[start : start + BATCH_SIZE]
        pictures = [load_image(file) for _, file in batch]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        sure, likeliest = head.network(pixels).softmax(dim=-1).max(dim=-1)
        said = answer(model, processor, pictures, PHOTO_QUESTIONS[0], max_new_tokens=10)
        captions = answer(model, processor, pictures, processor.caption_prompt, max_new_tokens=16)
        for (folder, file), share, index, one, caption in zip(batch, sure, likeliest, said, captions, strict=True):
            text = file.with_suffix(".txt")
            shown = text.read_text(encoding="utf-8", errors="replace").splitlines()[0] if text.is_file() else None
            word = head.names[int(head.word_of_class[index])]
            rows.append(
                {"file": str(file.relative_to(folder)), "sure": round(float(share), 3), "word": word, "said": one,
                 "caption": caption, "shown": shown}
            )  # fmt: skip
    sure = [row for row in rows if row["sure"] > SURE]
    described = [row for row in sure if row["shown"]]
    unsure = [row for row in rows if row["sure"] < UNSURE]

    def named(said: str) -> str:
        """`"The image shows a cat."` as `"cat"`."""
        return re.sub(r"^(a|an) ", "", said.removeprefix(f"{SHOWS} ").rstrip(".")).lower()

    def share(of: list[dict], holds) -> float | None:
        return round(sum(map(holds, of)) / len(of), 4) if of else None

    return {
        "pictures": len(rows),
        "sure": len(sure),
        "encoder's word": share(sure, lambda row: row["word"].lower() in row["said"].lower()),
        "encoder's word in the caption": share(sure, lambda row: row["word"].lower() in row["caption"].lower()),
        "described and sure": len(described),
        "encoder right": share(described, lambda row: row["word"].lower() in row["shown"].lower()),
        "bridge right": share(described, lambda row: named(row["said"]) in row["shown"].lower()),
        "unsure": len(unsure),
        "unsure says so": share(unsure, lambda row: NOTHING in row["said"]),
        "sure says that it is not": share(sure, lambda row: NOTHING in row["said"]),
        "rows": rows,
    }


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Folder or Hub id.")],
    photos: Annotated[list[Path] | None, typer.Option(help="Folders of photographs to ask about too.")] = None,
    dtype: str = "float32",
    limit: Annotated[int, typer.Option(help="Ask about this many pictures only (0: all).")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
) -> None:
    """Accuracy on easy-VQA's test split and on new scenes, by kind of question."""
    bridged, processor = AutoModel.from_pretrained(model, dtype=dtype), AutoProcessor.from_pretrained(model)
    data = demo.easy_vqa_dir()
    test = load_split(data, "test")[: limit or None]
    given = answer_all(bridged, processor, test, encode(bridged, processor, test))
    accuracy, by_kind = accuracies(test, given)
    drawn = scenes(cache_dir() / "scenes_test", min(limit or NUM_TEST_SCENES, NUM_TEST_SCENES), "test")
    features, found = encode(bridged, processor, [Example(scene.image, []) for scene in drawn]), {}
    for kind in KINDS:
        rng = random.Random(kind)
        pairs = [ask(scene.shapes, kind, rng) for scene in drawn]
        kept = [index for index, asked in enumerate(pairs) if asked]
        found[kind] = round(asked_of([pairs[index] for index in kept], bridged, processor, features[kept]), 4)
    figures = {
        "questions": len(given),
        "accuracy": round(accuracy, 4),
        "blind_baseline": round(blind_baseline(load_split(data, "train"), test), 4),
        "by_kind": {kind: round(share, 4) for kind, share in by_kind.items()},
        "scenes": found,
        "dtype": dtype,
    }
    if photos:
        figures["photographs"] = photographs(photos, bridged, processor, limit)
    if output is not None:
        write_json(output, figures)
    figures.get("photographs", {}).pop("rows", None)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    app()
