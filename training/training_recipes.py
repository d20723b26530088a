"""Recipes: everything that a training run depends on, in one YAML file.

    stage: generative                        # or stage1: the Q-Former's three objectives, without a language model
    vision: openai/clip-vit-large-patch14    # the parts that `vlbridge.compose` takes, with options of the bridge;
    language: lmsys/vicuna-7b-v1.5           # or `from:` a bridge, a model or a stage-1 model: a folder or Hub id
    bridge: mlp
    bridge_options: {vision_feature_layer: -2}
    freeze: [vision_model, language_model]
    data:
      - {source: llava, path: FOLDER, weight: 1.0, options: {}}
    arguments: {learning_rate: 1e-3, per_device_train_batch_size: 32}    # of transformers' TrainingArguments
    learning_rates: {bridge: 1e-3, language_model: 2e-5}                 # where groups differ

`vlbridge train --list` prints those that ship with the package; `--set data.0.path=FOLDER` changes a value.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from ..compat import training_argument
from .training_arguments import problem_of
from .training_recipe_values import RecipeError, build, listed, one_of, unknown, without_defaults


RECIPES = Path(__file__).parent / "recipes"
STAGES = ("generative", "stage1", "classification")
PARTS = ("vision_model", "language_model")
GROUPS = ("bridge", "gates", "resampler", "language_model", "vision_model", "lora")
BENCHMARKS = ("coco_captions", "vqav2", "easy_vqa")  # layouts that hold one data set
SPLITS = ("train", "val", "valid", "validation", "dev", "test")  # as folders and files are called
# Set by the trainer itself, so that a recipe's values would be lost
OWN_ARGUMENTS = ("output_dir", "remove_unused_columns", "resume_from_checkpoint", "push_to_hub", "hub_model_id")


def best_metrics(names: list[str]) -> list[str]:
    """Metrics that every evaluation during training gives.

    Args:
        names: Of the data sets that are evaluated on.
    """
    return ["eval_loss", *(f"eval_{name}_loss" for name in names)]


@dataclass
class DataRecipe:
    """One data set.

    Args:
        source: Its layout, a name of `vlbridge.training.training_data.SOURCES`.
        path: Folder, file or pattern; `None` in shipped recipes, where it has to be given.
        split: Split, where the layout has several.
        name: What logs and model cards call it; by default `source`.
        weight: How often records are drawn from it, in proportion to the other data sets' weights.
        loss_weight: What the mean loss of its tokens counts. Where data sets differ in it, each has its own mean.
        streaming: Read records as they are needed, without an index; needs `max_steps`.
        limit: Use this many records.
        hold_out: One picture in so many, chosen by its name, is not trained on. A data set of `evaluation` with the
            same number has these pictures alone.
        options: For the source.
    """

    source: str
    path: str | None = None
    split: str | None = None
    name: str | None = None
    weight: float = 1.0
    loss_weight: float = 1.0
    streaming: bool = False
    limit: int | None = None
    hold_out: int | None = None
    options: dict = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether it is trained on."""
        return not isinstance(self, EvaluationRecipe)

    def called(self) -> tuple[str, str]:
        """What summaries and cards call the data set and its split; layouts of one's own data are named by the path."""
        name, split = self.name, self.split
        if self.path is not None and self.source not in BENCHMARKS:
            place = Path(self.path)
            if place.suffix in (".json", ".jsonl", ".parquet"):
                place = place.with_suffix("")
            elif place.suffix or "*" in place.name:  # shards
                place = place.parent
            if split is None and place.name in SPLITS:
                split, place = place.name, place.parent
            is_id = self.source == "hub" and not Path(self.path).exists()
            name = name or (self.path if is_id else place.absolute().name)
        return name or self.source, split or ("train" if self.trains or self.hold_out is None else "held-out")


@dataclass
class EvaluationRecipe(DataRecipe):
    """A data set that is not trained on.

    Args:
        generate: At the end of training, let the model answer this many records (-1: all) and compare word for word.
        max_new_tokens: Longest answer then, in tokens.
    """

    generate: int = 0
    max_new_tokens: int = 20


@dataclass
class TextRecipe:
    """How records become text; see `vlbridge.training.training_encoding.Encoder`."""

    prompt: str = ""
    end: str | None = None
    max_length: int | None = None
    prefix_lm: bool = False
    conversation: str | None = None
    max_images: int | None = None
    ask_for_captions: bool = False


@dataclass
class CacheRecipe:
    """Features of the frozen vision encoder on disk; see `vlbridge.training.training_features.FeatureCache`.

    Args:
        folder: Folder of all caches; by default in vlbridge's own cache.
        dtype: `"float32"` is exact; `"float16"` and `"bfloat16"` take half the room.
        max_bytes: Largest size on disk, in bytes; further images are encoded each time.
        batch_size: Images that the encoder gets at a time.
    """

    folder: str | None = None
    dtype: str = "float32"
    max_bytes: int | None = None
    batch_size: int = 16


@dataclass
class PackingRecipe:
    """Several samples of a batch in one row; see `vlbridge.training.training_packing.PackedEncoder`.

    Args:
        max_tokens: Longest row, in tokens.
        independent_turns: The questions of a conversation do not know of each other.
    """

    max_tokens: int
    independent_turns: bool = False


@dataclass
class SamplesRecipe:
    """A table of what the model generates for a few fixed records.

    Args:
        every: Steps between two tables; 0 for none.
        count: Number of records: the first ones of the evaluation data, or of the training data if there is none.
        max_new_tokens: Longest text, in tokens.
    """

    every: int = 0
    count: int = 4
    max_new_tokens: int = 30


@dataclass
class Recipe:
    """A training run.

    Args:
        stage: `"generative"`, `"stage1"` of Q-Former BLIP-2, or `"classification"` of images.
        description: One line, for `vlbridge train --list`.
        vision: Vision encoder, as for `compose`.
        language: Language model, as for `compose`.
        bridge: `"mlp"`, `"qformer"` or `"perceiver"`.
        bridge_options: Further arguments of `compose`, or of `QFormerBlip2ForPreTraining.from_vision`.
        from_: Instead of parts, what an earlier run made (`from` in YAML). From a stage-1 model with `language` stage 2
            begins.
        tokenizer: The tokenizer, where it is not with the language model (in stage 1: the Q-Former's, required).
        image_processor: The image processor, where it is not with the vision encoder.
        dtype: Of all parts, such as `"bfloat16"`; without it, a fresh bridge is in float32.
        attn_implementation: How the language model computes attention: `"sdpa"`, `"eager"`, `"flash_attention_2"`, ...;
            by default transformers' choice.
        freeze: Which parts are not trained.
        text: How records become text.
        cache_features: Keep the vision encoder's features on disk, so that it runs once per image.
        packing: Pack the samples of a batch into fewer rows: losses stay what they are.
        data: What is trained on.
        shuffle_buffer: Streamed records to draw the next one from; map-style data is shuffled as a whole.
        stopping: When several data sets end, see `vlbridge.training.training_data.mix`.
        max_broken: Share (below 1) or number of records that may be left out because they can't be used.
        arguments: Of transformers' `TrainingArguments`.
        learning_rates: By group of parameters, where they differ from `arguments.learning_rate`: `"bridge"`, `"gates"`
            and `"resampler"` (Flamingo's; by default the bridge's), `"language_model"`, `"vision_model"` and `"lora"`.
        no_weight_decay: Beginnings of names of parameters without weight decay, beside norms, biases, gates and
            embeddings.
        lora: LoRA on the frozen parts, see `vlbridge.training.training_peft.lora_config`.
        evaluation: Data sets to evaluate on.
        samples: Table of generations.
        push_to: Hub repository for what was trained.
        private: Whether a new one is private.
    """

    stage: str = "generative"
    description: str = ""
    vision: str | None = None
    language: str | None = None
    bridge: str | None = None
    bridge_options: dict = field(default_factory=dict)
    from_: str | None = None
    tokenizer: str | None = None
    image_processor: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    freeze: list[str] = field(default_factory=lambda: list(PARTS))
    text: TextRecipe = field(default_factory=TextRecipe)
    cache_features: CacheRecipe | None = None
    packing: PackingRecipe | None = None
    data: list[DataRecipe] = field(default_factory=list)
    shuffle_buffer: int = 1000
    stopping: str = "all_exhausted"
    max_broken: float = 0.01
    arguments: dict = field(default_factory=dict)
    learning_rates: dict[str, float] = field(default_factory=dict)
    no_weight_decay: list[str] = field(default_factory=list)
    lora: dict | None = None
    evaluation: list[EvaluationRecipe] = field(default_factory=list)
    samples: SamplesRecipe = field(default_factory=SamplesRecipe)
    push_to: str | None = None
    private: bool = False

    # ------------------------------------------------------------------ reading and writing

    @classmethod
    def from_dict(cls, fields: dict) -> Recipe:
        """A recipe from what a YAML file holds.

        Raises:
            RecipeError: An unknown key, a value of the wrong kind, or things that contradict each other.
        """
        recipe = build(cls, {"from_" if key == "from" else key: value for key, value in fields.items()}, "")
        recipe.check()
        return recipe

    def to_dict(self) -> dict:
        """What a YAML file would hold: nothing that has its default value."""
        fields = without_defaults(self)
        return {"from" if key == "from_" else key: value for key, value in fields.items()}

    def to_yaml(self) -> str:
        """The recipe as YAML, without fields that have their default values."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    # ------------------------------------------------------------------ checks

    def check(self) -> None:
        """Refuse what can't be run, as far as it can be told without reading any data or weights.

        Raises:
            RecipeError: It can't.
        """
        from ..families import FAMILIES

        one_of("stage", self.stage, STAGES)
        if self.from_ is None:
            needed = {"stage1": ["vision", "tokenizer"], "classification": ["vision", "bridge"]}
            needed = needed.get(self.stage, ["vision", "language", "bridge"])
            if missing := [name for name in needed if getattr(self, name) is None]:
                raise RecipeError(
                    f"{listed(missing)} missing: a fresh {self.stage} model needs {listed(needed)}, or give from."
                )
            if self.bridge is not None:
                one_of("bridge", self.bridge, tuple(FAMILIES))
        elif self.vision is not None:
            raise RecipeError("from brings its own vision encoder: leave vision out.")
        absent = ("language", "attn_implementation", "lora", "packing")
        if self.stage == "stage1" and (given := [name for name in absent if getattr(self, name) is not None]):
            raise RecipeError(f"stage1 has no language model: leave {listed(given)} out.")
        unused = (*absent, "tokenizer")
        if self.stage == "classification" and (given := [n for n in unused if getattr(self, n) is not None]):
            raise RecipeError(f"classification has no use for {listed(given)}: leave it out.")
        if self.cache_features is not None and "vision_model" not in self.freeze:
            raise RecipeError(
                "cache_features needs a frozen vision encoder: freeze vision_model, or leave cache_features out."
            )
        if self.packing is not None and len({data.loss_weight for data in self.data}) > 1:
            raise RecipeError("packed rows have samples of several data sets: leave data.*.loss_weight or packing out.")
        for part in self.freeze:
            one_of("freeze", part, PARTS)
        for group in self.learning_rates:
            one_of("learning_rates", group, GROUPS)
        for number, data in enumerate(self.data):
            if data.weight <= 0 or data.loss_weight < 0:
                raise RecipeError(
                    f"data.{number}: weight is {data.weight} and loss_weight {data.loss_weight}; expected weights "
                    "above 0 and loss weights of at least 0."
                )
        for key, sets in (("data", self.data), ("evaluation", self.evaluation)):
            for number, data in enumerate(sets):
                if data.hold_out is not None and data.hold_out < 2:
                    raise RecipeError(f"{key}.{number}.hold_out is {data.hold_out}; expected at least 2 pictures.")
        if not self.data:
            raise RecipeError("data is empty: name at least one data set to train on.")
        streamed = {data.streaming for data in self.data}
        if len(streamed) > 1:
            raise RecipeError("data sets are all streamed or none is: set streaming for all of them.")
        if True in streamed and self.arguments.get("max_steps", -1) <= 0:
            raise RecipeError("streamed data has no length: set arguments.max_steps.")
        known = {f.name for f in dataclasses.fields(TrainingArguments) if f.init} - set(OWN_ARGUMENTS)
        for name in self.arguments:
            if name in OWN_ARGUMENTS:
                raise RecipeError(f"arguments.{name} is not for a recipe to set: see --output, --resume and push_to.")
            if training_argument(name) not in known:
                raise RecipeError(unknown(name, known, "arguments"))
            if problem := problem_of(name, self.arguments[name]):
                raise RecipeError(f"arguments.{name} is {self.arguments[name]!r}; {problem}.")

        self._check_evaluation()

    def _check_evaluation(self) -> None:
        arguments = {training_argument(name): value for name, value in self.arguments.items()}
        evaluates = str(arguments.get("eval_strategy", "no")) != "no"
        if evaluates and not self.evaluation:
            raise RecipeError("arguments.eval_strategy evaluates during training: name a data set in evaluation.")
        if self.stage == "stage1":
            if arguments.get("label_smoothing_factor"):
                raise RecipeError("stage1 has no labels to smooth: leave arguments.label_smoothing_factor out.")
            if len({data.loss_weight for data in self.data}) > 1:
                raise RecipeError("stage1 has no tokens to weigh: leave data.*.loss_weight out.")
        wanted = arguments.get("metric_for_best_model")
        known = best_metrics(self.evaluation_names())
        if wanted is not None and f"eval_{str(wanted).removeprefix('eval_')}" not in known:
            raise RecipeError(f"arguments.metric_for_best_model is {wanted!r}; expected one of {', '.join(known)}.")

    def smoke_test(self) -> Recipe:
        """The recipe with three steps, a few records of each data set, and nothing to push: does it run at all?"""
        recipe = copy.deepcopy(self)
        arguments = {training_argument(name): value for name, value in recipe.arguments.items()}
        rows = arguments.get("per_device_train_batch_size", 8) * arguments.get("gradient_accumulation_steps", 1)
        for data in recipe.data:
            data.limit = min(data.limit or 3 * rows, 3 * rows)
        for held_out in recipe.evaluation:
            count = arguments.get("per_device_eval_batch_size", 8)
            held_out.limit = min(held_out.limit or count, count)
            held_out.generate = min(count, 4) if held_out.generate else 0
        arguments.update(max_steps=3, logging_steps=1, save_steps=3, warmup_steps=1)
        if str(arguments.get("eval_strategy", "no")) != "no":
            arguments.update(eval_strategy="steps", eval_steps=3)
        recipe.arguments, recipe.push_to = arguments, None
        recipe.samples.every = min(recipe.samples.every, 3)
        return recipe

    def evaluation_names(self) -> list[str]:
        """What metrics call the data sets of `evaluation`: name or source, and a number where that is not enough."""
        names: list[str] = []
        for data in self.evaluation:
            name = base = data.name or data.source
            count = 1
            while name in names:
                count += 1
                name = f"{base}_{count}"
            names.append(name)
        return names

    def missing_paths(self) -> list[str]:
        """Keys of data sets that have no path yet."""
        named = (("data", self.data), ("evaluation", self.evaluation))
        return [
            f"{key}.{k}.path"
            for key, sets in named
            for k, data in enumerate(sets)
            if data.path is None and data.source != "easy_vqa"  # which is fetched
        ]

    def training_arguments(self, output_dir: str | Path) -> TrainingArguments:
        """The trainer's arguments.

        Raises:
            RecipeError: `TrainingArguments` refuses them.
        """
        chosen = {training_argument(name): value for name, value in copy.deepcopy(self.arguments).items()}
        given = {"report_to": "none", "prediction_loss_only": True, **chosen}
        if self.stage == "stage1":
            given.setdefault("dataloader_drop_last", True)  # all processes compare batches of one size
        try:
            return TrainingArguments(output_dir=str(output_dir), remove_unused_columns=False, **given)
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(f"arguments: {' '.join(str(error).split())}") from error


# ---------------------------------------------------------------------- from YAML


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, `no` a word, and a key stands once."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(
                    f"{key!r} is given twice in the mapping that begins in line {node.start_mark.line + 1}."
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse(text: str, name: str):
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def read_recipe(recipe: str | Path, settings: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe.

    Args:
        recipe: A YAML file, or the name of a shipped recipe.
        settings: Changes, `"key=value"`, with keys such as `arguments.learning_rate` or `data.0.path` and values in
            YAML.

    Raises:
        RecipeError: There is no such recipe, or something is wrong with it.
    """
    path = Path(recipe).expanduser()
    if not path.is_file():
        known = shipped()
        if str(recipe) not in known:
            near = difflib.get_close_matches(str(recipe), known, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"{recipe} is neither a file nor a shipped recipe; there are {', '.join(known)}.{meant}")
        path = known[str(recipe)]
    fields = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(fields, dict):
        raise RecipeError(f"{path} holds a {type(fields).__name__}, expected keys and values.")
    for setting in sorted(settings, key=lambda setting: not setting.partition("=")[0].endswith(".source")):
        _set(fields, setting)
    try:
        return Recipe.from_dict(fields)
    except RecipeError as error:
        raise RecipeError(f"{path.name}: {error}") from error


def _set(fields: dict, setting: str) -> None:
    """Change one value of a recipe that is not checked yet.

    Raises:
        RecipeError: It is not `key=value`, or there is no such place.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {setting}: expected key=value, such as arguments.max_steps=100.")
    *path, last = key.split(".")
    place: Any = fields
    for step in path:
        if isinstance(place, list):
            place = place[_index(place, step, setting)]
        else:
            if place.get(step) is None:
                place[step] = {}
            place = place[step]
        if not isinstance(place, (dict, list)):
            raise RecipeError(f"--set {setting}: {step} holds {place!r}, which has nothing below it.")
    value = _parse(text, f"--set {setting}")
    if isinstance(place, list):
        place[_index(place, last, setting)] = value
    else:
        if last == "source" and place.get("source") != value:
            place.pop("options", None)  # of the other layout
        place[last] = value


def _index(place: list, step: str, setting: str) -> int:
    if not step.isdigit() or int(step) >= len(place):
        raise RecipeError(f"--set {setting}: {step!r} is none of the {len(place)} entries, counted from 0.")
    return int(step)


__all__ = [
    "CacheRecipe",
    "DataRecipe",
    "EvaluationRecipe",
    "PackingRecipe",
    "RECIPES",
    "Recipe",
    "RecipeError",
    "best_metrics",
    "SamplesRecipe",
    "TextRecipe",
    "read_recipe",
    "shipped",
]
