"""A run that one can watch: `training.png`, and `training.html` with the same picture, figures and samples.

Both are written again and again while training goes on, at logging steps, as long as that takes less than a hundredth
of the run's time, and at the end. What they show is `trainer.state.log_history`, which a resumed run goes on with.
"""

from __future__ import annotations

import html
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path

from transformers import TrainerCallback
from transformers.utils import logging

from ..drawing import empty_figure, page_html, png_html, table_html
from ..files import replacing, write_text
from .training_gates import KINDS, gate_history, gates, plot_gates
from .training_parameters import group_of


logger = logging.get_logger(__name__)

SHARE = 0.01  # of the run's time that drawing may take
GUESS = 1.0  # seconds that the first picture takes, libraries loaded
REFRESH = 20  # seconds between a browser's looks at the page
RATES = "learning_rates/"
COLUMNS = 4  # of samples: those of so many steps


class RunReport(TrainerCallback):
    """Draws a run while it goes on.

    Gates and the learning rates of all groups of parameters are added to the entries of `log_history`.

    Args:
        trainer: The trainer.
        title: What the run is called.
    """

    def __init__(self, trainer, title: str):
        self.trainer, self.title = trainer, title
        self.has_gates = not trainer.is_deepspeed_enabled and hasattr(
            getattr(trainer.bare_model, "bridge", None), "cross_attention_layers"
        )
        self.started, self.spent, self.last = time.monotonic(), 0.0, GUESS
        self.complained = False

    def on_log(self, args, state, control, optimizer=None, **kwargs):
        """Add what the trainer does not log itself, and draw if that is cheap by now."""
        about = state.log_history[-1]
        if "loss" in about:
            about.update(self._learning_rates(optimizer))
            for row in gates(self.trainer.bare_model) if self.has_gates else ():  # of all processes: it may be sharded
                about.update({f"gates/{kind}/layer_{row['layer']}": row[kind] for kind in KINDS})
        if self.spent + self.last <= SHARE * (time.monotonic() - self.started):
            self.write(refresh=REFRESH)

    def on_train_end(self, args, state, control, **kwargs):
        """Draw the whole run."""
        self.write()

    def _learning_rates(self, optimizer) -> dict[str, float]:
        names = {id(parameter): group_of(name) for name, parameter in self.trainer.model.named_parameters()}
        groups = optimizer.param_groups if optimizer is not None else []
        named = {names.get(id(group["params"][0])): group["lr"] for group in groups if group["params"]}
        return {f"{RATES}{name}": rate for name, rate in named.items() if name is not None and len(named) > 1}

    def write(self, summary: dict | None = None, refresh: int | None = None) -> None:
        """Write the picture and the page. That they can't be written is said once and stops nothing.

        Args:
            summary: What `training_summary.json` will hold, when training has ended.
            refresh: Seconds after which a browser looks again; `None` when nothing more will come.
        """
        if not self.trainer.is_world_process_zero():
            return
        began, folder, history = time.monotonic(), Path(self.trainer.args.output_dir), self.trainer.state.log_history
        try:
            picture = self._picture(history)
            if picture is not None:
                with replacing(folder / "training.png") as temporary:
                    temporary.write_bytes(picture[0])
            write_text(folder / "training.html", page_html(self.title, self._parts(history, picture, summary), refresh))
        except OSError as error:
            self._complain(f"The run's page can't be written: {error}")
        self.last = time.monotonic() - began
        self.spent += self.last

    def _complain(self, message: str) -> None:
        if not self.complained:
            logger.warning(message)
        self.complained = True

    def _picture(self, history: list[dict]) -> tuple[bytes, tuple[int, int]] | None:
        """The run as a PNG, and its size in pixels; `None` if there is nothing to draw or nothing to draw with."""
        try:
            figure = draw_run(history)
        except ImportError as error:
            self._complain(f"{error}. The run goes on without training.png.")
            return None
        if figure is None:
            return None
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue(), tuple(round(100 * inches) for inches in figure.get_size_inches())

    def _parts(self, history: list[dict], picture, summary: dict | None) -> Iterator[str]:
        state, minutes = self.trainer.state, self.trainer.seconds / 60
        yield f"<h1>{html.escape(self.title)}</h1>"
        yield f"<p>Step {state.global_step:,} of {state.max_steps:,}, {minutes:.1f} minutes.</p>"
        if picture is not None:
            yield png_html(picture[0], "", "", picture[1])
        if latest := latest_figures(history):
            yield "<h2>Latest figures</h2>"
            yield table_html(latest, ("figure", "value", "step"))
        if summary is not None and summary["evaluation"]:
            yield "<h2>Evaluation</h2>"
            yield table_html(summary["evaluation"], ("dataset", "split", "metric", "value", "records"))
        rows, steps = samples_of(Path(self.trainer.args.output_dir) / "samples.jsonl")
        if rows:
            yield "<h2>Samples</h2><p class='note'>What the model said about a few fixed records, by step.</p>"
            yield table_html(rows, ("record", "wanted", *(f"step {step}" for step in steps)))


def draw_run(history: list[dict]):
    """A run: losses, learning rates and, where there are any, gates.

    Args:
        history: `trainer.state.log_history`.

    Returns:
        A figure of matplotlib, or `None` if nothing has been logged.

    Raises:
        ImportError: matplotlib is not installed.
    """
    losses = {name: points(history, name) for name in names_of(history) if name.endswith("loss")}
    losses.pop("train_loss", None)
    rates = {name.removeprefix(RATES): points(history, name) for name in names_of(history) if name.startswith(RATES)}
    rates = rates or {"learning rate": points(history, "learning_rate")}
    opened = gate_history(history)
    if not losses:
        return None
    figure = empty_figure(9, 7 if opened else 3.5)
    above, *below = figure.subplots(2 if opened else 1, 2, squeeze=False)
    for axes, curves, title in ((above[0], losses, "loss"), (above[1], rates, "learning rate")):
        for name, (steps, values) in curves.items():
            axes.plot(steps, values, label=name, marker="." if len(steps) < 30 else None)
        axes.set(title=title, xlabel="step")
        axes.legend(fontsize=8)
    for axes, kind in zip(below[0] if opened else (), KINDS):
        plot_gates(axes, opened, kind)
    return figure


def names_of(history: list[dict]) -> list[str]:
    """Names of what was logged, in the order in which they came first."""
    return list(dict.fromkeys(name for logged in history for name in logged))


def points(history: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of what was logged under a name.

    Args:
        history: `trainer.state.log_history`.
        name: The name.
    """
    found = [(logged["step"], logged[name]) for logged in history if isinstance(logged.get(name), (int, float))]
    return [step for step, _ in found], [value for _, value in found]


def latest_figures(history: list[dict]) -> list[dict]:
    """The last value of everything that was logged but gates: rows of `figure`, `value` and `step`.

    Args:
        history: `trainer.state.log_history`.
    """
    rows = []
    for name in names_of(history):
        steps, values = points(history, name)
        if name != "step" and steps and not name.startswith("gates/"):
            value = values[-1]
            rows.append(
                {"figure": name, "value": f"{value:.4g}" if isinstance(value, float) else value, "step": steps[-1]}
            )
    return rows


def samples_of(file: Path) -> tuple[list[dict], list[int]]:
    """What a model said about its fixed records, by step.

    Args:
        file: `samples.jsonl`.

    Returns:
        One row per record: `record`, `wanted` and `step N`; and the steps: the first one and the last ones.
    """
    if not file.exists():
        return [], []
    said = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    steps = sorted({row["step"] for row in said})
    steps = steps if len(steps) <= COLUMNS else [steps[0], *steps[1 - COLUMNS :]]
    rows: dict[str, dict] = {}
    for row in said:
        if row["step"] in steps:
            about = rows.setdefault(row["id"], {"record": row["id"], "wanted": row["wanted"]})
            about[f"step {row['step']}"] = row["generated"]
    return list(rows.values()), steps


__all__ = ["RunReport", "draw_run", "latest_figures", "names_of", "points", "samples_of"]
