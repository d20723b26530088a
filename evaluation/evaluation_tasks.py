"""Tasks, from the YAML files in `tasks/`: where a benchmark's files lie, what is asked and how answers are made."""

from __future__ import annotations

import string
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from pathlib import Path

import yaml

from ..families import FAMILIES
from .evaluation_metrics import LETTERS
from .evaluation_samples import READERS, Sample


KINDS = ("answer", "caption", "choice", "class", "retrieval")
SCORES = ("captions", "classes", "exact", "letters", "pope", "retrieval", "vqa")
FIELDS = ("question", "context", "choices")


class TaskError(ValueError):
    """There is no such task, or its file or what was asked of it is wrong."""


@dataclass(frozen=True)
class Asking:
    """How a family is asked.

    Args:
        prompt: What is asked, with `{question}`, `{context}` and `{choices}` (`A. ...` in lines); `None` where the
            family's processor has words of its own, for captions.
        form: `"few_shot"`: the family's own few-shot prompt (see `BridgedProcessor.few_shot`), `"chat"`: a
            conversation in the language model's format, for families whose few-shot prompt is none.
        method: `"generate"`, or `"rank"`: the likeliest of the choices.
        generation: Arguments of `generate`.
        stop_at: Generated texts end where one of these begins.
        top_k: In retrieval, the number of candidates that are read again together with the query.
        source: Where all this comes from.
    """

    prompt: str | None = None
    form: str = "few_shot"
    method: str = "generate"
    generation: dict = field(default_factory=dict)
    stop_at: tuple[str, ...] = ()
    top_k: int = 128
    source: str = ""

    def question_of(self, sample: Sample) -> str | None:
        """What is asked about a sample; `None` leaves it to the processor."""
        prompt = self.prompt
        if prompt is None:
            return sample.question
        if not sample.context:  # no empty line, and no two spaces, where a question has no context
            for empty in (" {context}", "{context}\n", "{context}"):
                prompt = prompt.replace(empty, "")
        choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, sample.choices or ()))
        return prompt.format(question=sample.question or "", context=sample.context, choices=choices)

    def cut(self, text: str) -> str:
        """A generated text up to where the next part of the prompt would begin."""
        for stop in self.stop_at:
            text = text.split(stop, 1)[0]
        return text.strip()


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Args:
        name: Name on the command line.
        title: What it is.
        dataset: Its name on model cards; `None`: the folder's.
        reader: A key of `READERS`.
        kind: One of `KINDS`.
        score: One of `SCORES`.
        split: Split that is evaluated by default.
        demonstration_split: Split that demonstrations are taken from; `None` where the benchmark has none for it.
        splits: Names of splits in the files, and their real names.
        layout: The files that the folder must hold.
        notes: What one must know about the figures.
        families: How each family is asked; `"default"`: all others.
    """

    name: str
    title: str
    reader: str
    kind: str
    score: str
    split: str
    families: dict[str, Asking]
    dataset: str | None = None
    demonstration_split: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    layout: str = ""
    notes: str = ""

    def asking(self, family: str | None) -> Asking:
        """How a family is asked.

        Args:
            family: Its name in `FAMILIES`; `None` for models without a language model.
        """
        return self.families.get(family or "default") or self.families.get("default") or Asking()

    def split_name(self, split: str) -> str:
        """A split's real name, for results and model cards."""
        return self.splits.get(split, split)

    def check_split(self, split: str) -> None:
        """Refuse splits that the benchmark does not have.

        Raises:
            TaskError: It has no such split.
        """
        if self.splits and split not in self.splits:
            raise TaskError(f"{self.name} has no split {split!r}; expected one of {', '.join(self.splits)}.")


def task_names() -> list[str]:
    """Names of all tasks."""
    folder = resources.files(__package__).joinpath("tasks")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_task(name: str) -> Task:
    """A task by its name, or from a YAML file of the same form.

    Raises:
        TaskError: There is no such task, or its file is wrong.
    """
    if name in task_names():
        place, text = name, resources.files(__package__).joinpath("tasks", f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")):
        try:
            place, text = name, Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"{name} can't be read: {error}") from error
    else:
        raise TaskError(f"task is {name!r}; expected one of {', '.join(task_names())}, or a YAML file.")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TaskError(f"{place} is no YAML: {' '.join(str(error).split())}") from error
    return _task(Path(name).stem, place, content)


def _task(name: str, place: str, content) -> Task:
    """A task from a file's content.

    Raises:
        TaskError: A field is missing, unknown or wrong.
    """
    _refuse_unknown(content, {entry.name for entry in fields(Task)} - {"name"}, place)
    content = dict(content)
    families = content.pop("families", None) or {}
    known = (*FAMILIES, "default")
    if not isinstance(families, dict) or (unknown := [family for family in families if family not in known]):
        raise TaskError(f"{place}: families has {unknown or families!r}; expected some of {', '.join(known)}.")
    asked = {family: _asking(f"{place}, {family}", given) for family, given in families.items()}
    if missing := [key for key in ("title", "reader", "kind", "score", "split") if not content.get(key)]:
        raise TaskError(f"{place} has no {missing[0]}.")
    for key, allowed in (("reader", READERS), ("kind", KINDS), ("score", SCORES)):
        if content[key] not in allowed:
            raise TaskError(f"{place}: {key} is {content[key]!r}; expected one of {', '.join(allowed)}.")
    if not isinstance(content.get("splits", {}), dict):
        raise TaskError(f"{place}: splits is {content['splits']!r}; expected their real names by name.")
    return Task(name=name, families=asked, **content)


def _refuse_unknown(content, names: set[str], place: str) -> None:
    if not isinstance(content, dict) or (unknown := sorted(set(map(str, content)) - names)):
        found = f"is a {type(content).__name__}" if not isinstance(content, dict) else f"has {', '.join(unknown)}"
        raise TaskError(f"{place} {found}; expected some of {', '.join(sorted(names))}.")


def _asking(place: str, content) -> Asking:
    _refuse_unknown(content, {entry.name for entry in fields(Asking)}, place)
    asking = Asking(**{**content, "stop_at": tuple(content.get("stop_at") or ())})
    check_asking(asking, place)
    return asking


def check_asking(asking: Asking, place: str) -> None:
    """Refuse prompts and settings that can't be used.

    Args:
        asking: From a file or the command line.
        place: Where it is from, for the error.

    Raises:
        TaskError: Something is wrong.
    """
    if asking.form not in ("chat", "few_shot"):
        raise TaskError(f"{place}: form is {asking.form!r}; expected 'chat' or 'few_shot'.")
    if asking.method not in ("generate", "rank"):
        raise TaskError(f"{place}: method is {asking.method!r}; expected 'generate' or 'rank'.")
    if not isinstance(asking.generation, dict):
        raise TaskError(f"{place}: generation is {asking.generation!r}; expected arguments of generate by name.")
    if asking.prompt is not None:
        try:
            found = {name for _, name, _, _ in string.Formatter().parse(asking.prompt) if name is not None}
        except ValueError as error:
            raise TaskError(f"{place}: prompt {asking.prompt!r}: {error}; write a brace twice.") from error
        if unknown := sorted(found - set(FIELDS)):
            raise TaskError(
                f"{place}: prompt {asking.prompt!r} has {{{unknown[0]}}}; expected {{question}}, {{context}} or "
                "{choices}, and other braces twice."
            )


def changed(asking: Asking, **given) -> Asking:
    """How a family is asked, with some of it changed.

    Args:
        asking: From the task.
        given: Fields of `Asking`, `None` for those that stay; `generation` is added to the task's.

    Raises:
        TaskError: A value can't be used.
    """
    changes = given.pop("generation", None)
    if changes:
        given["generation"] = {**asking.generation, **changes}
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return asking
    result = replace(asking, **given)
    check_asking(result, "the arguments")
    return replace(result, source=f"{asking.source}; changed: {', '.join(sorted(given))}")


def as_json(asking: Asking) -> dict:
    """All fields, for the results' file."""
    return {**asdict(asking), "stop_at": list(asking.stop_at)}


__all__ = ["Asking", "Task", "TaskError", "as_json", "changed", "check_asking", "load_task", "task_names"]
