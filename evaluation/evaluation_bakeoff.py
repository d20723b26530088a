"""`bakeoff`: several bridges on the same parts, data and budget, in one table and one picture."""

from __future__ import annotations

import copy
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock

from .. import demo
from ..files import read_json, sha256_of, write_json, write_text
from ..inference import model_source
from ..summary import summarize
from ..training.training_recipes import DataRecipe, Recipe, read_recipe
from ..training_summary import SUMMARY
from .evaluation_bakeoff_entrants import BakeoffError, Entrant, check_entrants, read_entrant
from .evaluation_bakeoff_report import (
    check_packages,
    costs_of,
    draw,
    figures_of,
    main_metric,
    markdown,
    mean_and_spread,
)
from .evaluation_jobs import JobError, in_own_process
from .evaluation_run import RESULTS, TIMING, Options, Questions, read_questions
from .evaluation_tasks import Task, TaskError, load_task


BAKEOFF = "bakeoff"  # of the files
ASKED = "asked.json"  # what all runs in a folder are asked, and how
EVALUATION = "evaluation"  # folder within that of a run
BASELINES = ("blind", "grey", "shuffled")
OPTIONS = ("split", "shots", "demonstrations", "limit", *BASELINES, "batch_size", "device", "dtype")


# ---------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Run:
    """An entrant with a seed.

    Args:
        entrant: The entrant.
        seed: Of its training; `None` for a trained model.
        folder: Where it lies; of a trained model only the evaluation.
    """

    entrant: Entrant
    seed: int | None
    folder: Path

    @property
    def recipe(self) -> Recipe | None:
        """What is trained: with this seed; not pushed, and without answers at the end, which the evaluation makes."""
        if self.entrant.recipe is None:
            return None
        recipe = copy.deepcopy(self.entrant.recipe)
        recipe.arguments["seed"], recipe.push_to = self.seed, None
        for data in recipe.evaluation:
            data.generate = 0
        return recipe

    @property
    def model(self) -> str:
        """What is evaluated: a folder or Hub id."""
        return model_source(self.entrant.source) if self.recipe is None else str(self.folder)

    @property
    def evaluation(self) -> Path:
        """Where its evaluation lies."""
        return self.folder / EVALUATION

    @property
    def label(self) -> str:
        """For progress and errors."""
        return self.entrant.name if self.seed is None else f"{self.entrant.name}, seed {self.seed}"

    def is_trained(self) -> bool:
        """Whether its training is complete: `config.json` is written last."""
        return self.recipe is None or all((self.folder / name).is_file() for name in (SUMMARY, "config.json"))

    def is_evaluated(self, baselines: Sequence[str]) -> bool:
        """Whether its evaluation is complete, with these baselines."""
        result = read_json(self.evaluation / RESULTS)
        return result is not None and set(baselines) <= set(result["baselines"])

    def check_folder(self) -> None:
        """Refuse a folder that holds another run.

        Raises:
            BakeoffError: It does.
        """
        if self.recipe is None:
            now, before = self._weights(), read_json(self.folder / "weights.json")
            if before is not None and before != now:
                raise BakeoffError(f"{self.folder} holds an evaluation of another {self.entrant.source}: delete it.")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "weights.json", now)
            return
        if not (self.folder / "recipe.yaml").is_file():
            return
        before, now = read_recipe(self.folder / "recipe.yaml").to_dict(), self.recipe.to_dict()
        if changed := sorted(key for key in {*before, *now} if before.get(key) != now.get(key)):
            raise BakeoffError(
                f"{self.folder} holds a training with another {', '.join(changed)}: delete it, or name another output."
            )

    def _weights(self) -> dict[str, str]:
        """Hashes of a trained model's files; of a Hub id its name."""
        files = [
            path
            for path in sorted(Path(self.model).glob("*"))
            if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
        ]
        return {"model": self.entrant.source, **{path.name: sha256_of(path) for path in files}}


def seeds_of(seeds: int | str | Sequence[int]) -> list[int]:
    """Seeds from what is given for them.

    Args:
        seeds: Their number (they are 0, 1, ... then), or the seeds; as text such as `"3"`, `"0,1,2"` or `"7,"`.

    Raises:
        BakeoffError: It is none of these, or a seed is there twice.
    """
    expected = BakeoffError(f"seeds is {seeds!r}; expected a number of at least 1, or different seeds such as 0,1,2.")
    if isinstance(seeds, str):
        parts = seeds.split(",")
        if not all(part.strip().isdigit() for part in parts if part.strip()) or not parts[0].strip():
            raise expected
        numbers = [int(part) for part in parts if part.strip()]
        seeds = numbers if len(parts) > 1 else numbers[0]
    found = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not found or len(set(found)) < len(found) or not all(isinstance(seed, int) and seed >= 0 for seed in found):
        raise expected
    return found


# ---------------------------------------------------------------------- the whole


def bakeoff(
    entrants: Sequence[str | os.PathLike] | str | os.PathLike,
    task: str | None = None,
    data: str | os.PathLike | None = None,
    output_dir: str | os.PathLike = BAKEOFF,
    seeds: int | str | Sequence[int] = 1,
    settings: Sequence[str] = (),
    allow_different: bool = False,
    tell: Callable[[str], None] | None = None,
    **options,
) -> dict:
    """Train several bridges on the same parts, data and budget, or take trained ones, and compare them.

    `output_dir` then holds `bakeoff.json`, `bakeoff.md` (a table) and `bakeoff.png`, and a folder `NAME/seed-N` for
    each run. Every training and every evaluation has a process of its own, so that its peak of memory is its own. The
    same call continues where an earlier one was killed: what is complete is only read.

    Args:
        entrants: Recipes, by file or name, and folders or Hub ids of trained models; `"NAME=RECIPE"` names one.
        task: As for `evaluate`; by default easy-VQA, if the recipes are evaluated on it.
        data: Folder with the task's files; for easy-VQA by default what the recipes say, else it is downloaded.
        output_dir: Folder to write to, or to continue in.
        seeds: Number of trainings per recipe, or their seeds: of first weights, and of the order of the data.
        settings: Changes to all recipes, `"key=value"`, as for `read_recipe`.
        allow_different: Compare bridges with different parts, data or budgets, and say so in the table.
        tell: Is called with a line of text when something begins.
        options: Of the evaluation: `OPTIONS`, as in `evaluate`.

    Returns:
        What `bakeoff.json` holds.

    Raises:
        BakeoffError: The bridges can't be compared, or `output_dir` holds something else.
        TaskError: There is no such task or split, or a setting can't be used.
        ValueError: A recipe or the data are not as expected.
        OSError: A file can't be read or written.
        JobError: A training or an evaluation has failed.
        ModuleNotFoundError: A package is not installed.
    """
    chosen = _options(options)
    entrants = [entrants] if isinstance(entrants, (str, os.PathLike)) else list(entrants)
    read = [read_entrant(given, settings) for given in entrants]
    if not read:
        raise BakeoffError("there is nothing to compare: name recipes or trained bridges.")
    numbers, output = seeds_of(seeds), Path(output_dir).expanduser()
    name, place = _task_and_data(read, task, data)
    about = load_task(name)
    check_packages(about.kind)
    different = check_entrants(read, about, chosen, allow_different)
    questions = read_questions(about, place, chosen)
    runs = [
        Run(entrant, seed, output / entrant.name / ("as-it-is" if seed is None else f"seed-{seed}"))
        for entrant in read
        for seed in (numbers if entrant.recipe is not None else [None])
    ]
    output.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(output / ".lock", timeout=0):
            _begin(output, about, questions, chosen)
            for run in runs:
                run.check_folder()
            _run_all(runs, name, place, chosen, tell or (lambda line: None))
            command = _command(entrants, name, place, output_dir, numbers, settings, allow_different, chosen)
            report = _report(runs, numbers, about, chosen, different, command)
            draw(report, output / f"{BAKEOFF}.png")
            write_text(output / f"{BAKEOFF}.md", markdown(report))
            write_json(output / f"{BAKEOFF}.json", report, ensure_ascii=False)
    except filelock.Timeout as error:
        raise BakeoffError(
            f"another bake-off is at work in {output}: wait for it, or choose another output."
        ) from error
    return report


def _options(options: dict) -> Options:
    """How `evaluate` is called.

    Raises:
        BakeoffError: An option is not among `OPTIONS`.
        TaskError: Several processes were started.
    """
    if unknown := sorted(set(options) - set(OPTIONS)):
        raise BakeoffError(f"there is no option {unknown[0]!r}; expected some of {', '.join(OPTIONS)}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TaskError("a bake-off starts processes of its own: run it without accelerate launch or torchrun.")
    return Options(**options)


def _task_and_data(entrants: Sequence[Entrant], task, data) -> tuple[str, str]:
    """Name of the task, and folder of its files.

    Raises:
        BakeoffError: They are not given, and not known.
    """
    own = [data for entrant in entrants if entrant.recipe is not None for data in entrant.recipe.evaluation]
    if task is None:
        if not own or any(data.source != "easy_vqa" for data in own):
            raise BakeoffError("name a task (--task) and the folder of its files (--data).")
        task = "easy_vqa"
    if data is None and task == "easy_vqa":
        data = next((data.path for data in own if data.source == "easy_vqa" and data.path), None) or demo.easy_vqa_dir()
    if data is None:
        raise BakeoffError(f"name the folder of the files of {task} (--data).")
    return str(task), os.path.abspath(os.path.expanduser(data))


def _begin(output: Path, task: Task, questions: Questions, chosen: Options) -> None:
    """Note what all runs are asked; refuse a folder in which something else was asked.

    Raises:
        BakeoffError: It was.
    """
    options = {name: getattr(chosen, name) for name in OPTIONS if name not in BASELINES}
    now = {**options, "questions": questions.sha256, "split": questions.split, "task": asdict(task)}
    now, before = json.loads(json.dumps(now)), read_json(output / ASKED)
    if before is None:
        write_json(output / ASKED, now, ensure_ascii=False)
    elif changed := [key for key in now if before.get(key) != now[key]]:
        raise BakeoffError(
            f"{output} holds a bake-off with another {', '.join(changed)}: choose another output, or delete it."
        )


def _run_all(runs: Sequence[Run], task: str, data: str, chosen: Options, tell: Callable[[str], None]) -> None:
    """Train and evaluate what is not there yet.

    Raises:
        JobError: Something has failed.
    """
    wanted = [name for name in BASELINES if getattr(chosen, name)]
    options = {name: getattr(chosen, name) for name in OPTIONS}
    for number, run in enumerate(runs, start=1):
        jobs = []
        if not run.is_trained():
            jobs.append(("training", {"recipe": run.recipe.to_dict(), "output": str(run.folder)}))
        if jobs or not run.is_evaluated(wanted):
            job = {"model": run.model, "task": task, "data": data, "output": str(run.evaluation), "options": options}
            jobs.append(("evaluation", job))
        for what, job in jobs:
            tell(f"{run.label}: {what} ({number} of {len(runs)})")
            try:
                in_own_process(job)
            except JobError as error:
                raise JobError(f"{run.label}, {what}: {error} The same command continues from here.") from error


def _command(entrants, task, data, output, seeds, settings, allow_different: bool, chosen: Options) -> str:
    """The command line that does this."""
    words = ["vlbridge", "bakeoff", *map(os.fspath, entrants), "--task", task, "--data", data]
    words += ["--seeds", ",".join(map(str, seeds)) + ("," if len(seeds) == 1 else ""), "--output", os.fspath(output)]
    for setting in settings:
        words += ["--set", setting]
    words += ["--allow-different"] if allow_different else []
    for name in OPTIONS:
        value = getattr(chosen, name)
        if value != getattr(Options(), name):
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
    return shlex.join(words)


# ---------------------------------------------------------------------- results


def _report(runs: Sequence[Run], seeds: list[int], task: Task, chosen: Options, different, command: str) -> dict:
    """What `bakeoff.json` holds. Only `measured` differs when the same is done again."""
    wanted = [name for name in BASELINES if getattr(chosen, name)]
    results = {run.folder: read_json(run.evaluation / RESULTS) for run in runs}
    first = results[runs[0].folder]
    entrants, measured = [], {}
    for entrant in dict.fromkeys(run.entrant.name for run in runs):
        own = [run for run in runs if run.entrant.name == entrant]
        entrants.append(_of_entrant(own, results, wanted))
        measured[entrant] = _costs_of_entrant(own)
    notes = list(first["notes"])
    notes += [f"{name}: {first['baselines'][name]['how']}" for name in wanted]
    for run in runs:
        made_with = results[run.folder]["versions"]
        changed = [key for key, version in first["versions"].items() if made_with.get(key) != version]
        if other := [f"{key} {made_with.get(key)}" for key in changed]:
            notes.append(f"{run.label} was evaluated with {', '.join(other)}.")
        if run.entrant.training is None:
            notes.append(f"Data and budget of {run.entrant.name} are not known: there is no recipe.yaml beside it.")
    return {
        "command": command,
        "task": task.name,
        **{key: first[key] for key in ("kind", "dataset")},
        "split": first["split_name"],
        **{key: first[key] for key in ("samples", "samples_of_split", "samples_sha256", "shots")},
        "main_metric": main_metric(first),
        "baselines": wanted,
        "seeds": seeds,
        "in_common": _in_common([run.entrant for run in runs]),
        "differences": different,
        "notes": notes,
        "versions": first["versions"],
        "entrants": entrants,
        "measured": measured,
    }


def _in_common(entrants: Sequence[Entrant]) -> dict[str, object]:
    """Parts, data and budget, where all of which they are known have the same."""
    found = {}
    for facts in ([entrant.parts for entrant in entrants], [entrant.training for entrant in entrants]):
        known = [each for each in facts if each]
        for key, value in (known[0] if known else {}).items():
            if all(each.get(key) == value for each in known):
                found[key] = value
    usual = DataRecipe("")  # what every recipe has that doesn't say otherwise
    return {key: value for key, value in found.items() if value != getattr(usual, key.rpartition(".")[2], ...)}


def _of_entrant(runs: Sequence[Run], results: dict[Path, dict], baselines: Sequence[str]) -> dict:
    """What doesn't differ when the same is done again."""
    first, entrant = results[runs[0].folder], runs[0].entrant
    about = summarize(runs[0].model)
    figures = [figures_of(results[run.folder], baselines) for run in runs]
    return {
        "name": entrant.name,
        "source": entrant.source,
        "trained_before": entrant.recipe is None,
        "family": first["model"]["family"],
        "fewest_visual_tokens": about["fewest_image_tokens"],
        "visual_tokens": about["image_tokens"],
        "bridge_parameters": next(part["parameters"] for part in about["parts"] if part["name"] == "bridge"),
        "runs": [
            {
                "seed": run.seed,
                "folder": f"{run.folder.parent.name}/{run.folder.name}",
                "trained_sha256": results[run.folder]["model"]["trained_sha256"],
                "figures": found,
            }
            for run, found in zip(runs, figures)
        ],
        "summary": mean_and_spread(figures),
    }


def _costs_of_entrant(runs: Sequence[Run]) -> dict:
    """Time, memory and hardware."""
    found = []
    for run in runs:
        summary = read_json(Path(run.model) / SUMMARY, {})
        timing = read_json(run.evaluation / TIMING, {})
        machines = {
            "hardware of training": summary.get("hardware"),
            "hardware of answering": next((one["hardware"] for one in timing.get("runs", [])), None),
        }
        known = {key: value for key, value in machines.items() if value is not None}
        found.append({"seed": run.seed, "figures": costs_of(summary, timing), **known})
    return {"runs": found, "summary": mean_and_spread([run["figures"] for run in found])}


__all__ = [
    "BAKEOFF",
    "BakeoffError",
    "JobError",
    "OPTIONS",
    "bakeoff",
    "seeds_of",
]
