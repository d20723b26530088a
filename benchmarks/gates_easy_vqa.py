"""Trains the small Perceiver recipe and draws its gates over the steps, with the step at which naming begins.

    python benchmarks/gates_easy_vqa.py --output runs/small_perceiver --result benchmarks/results/gates_easy_vqa.json

Every few steps the model is asked what is in pictures of easy-VQA's test split. Naming begins at the first step from
which on it says both words, colour and shape, of at least half of them. The run is the one that `vlbridge train
small_perceiver` makes; the gates, and what the resampler's tokens owe to the picture, are logged beside it.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from gpu_smoke import versions
from transformers import TrainerCallback

from vlbridge.files import write_text
from vlbridge.inspection import GateLogger, gate_history
from vlbridge.inspection.inspection_drawing import draw_gates
from vlbridge.inspection.inspection_gates import share_history
from vlbridge.training.training_checkpoints import last_checkpoint
from vlbridge.training.training_recipes import read_recipe
from vlbridge.training.training_run import build_trainer, finish, load_data
from vlbridge.training.training_samples import generate


NAMED = "captions_right"


class NamingLogger(TrainerCallback):
    """Logs every so many steps how many captions of held-out pictures are generated word for word."""

    def __init__(self, trainer, records, every: int):
        self.trainer, self.records, self.every = trainer, records, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            texts = generate(model, self.trainer.encoder, self.records, max_new_tokens=8, batch_size=16)
            right = sum(text.strip().lower() == wanted.strip().lower() for text, wanted in texts)
            self.trainer.log({NAMED: right / len(texts)})


def naming_begins(history: list[dict], share: float = 0.5) -> int | None:
    """The first logged step from which on at least `share` of the captions are right; `None` if there is none."""
    begins = None
    for row in history:
        if NAMED in row:
            begins = (row["step"] if begins is None else begins) if row[NAMED] >= share else None
    return begins


def main(
    output: Annotated[Path, typer.Option(help="Folder of the run; an interrupted one is resumed.")],
    result: Annotated[Path, typer.Option()] = Path("benchmarks/results/gates_easy_vqa.json"),
    recipe: Annotated[str, typer.Option(help="A recipe of a perceiver bridge on easy-VQA.")] = "small_perceiver",
    settings: Annotated[list[str] | None, typer.Option("--set", help="As for vlbridge train.")] = None,
    every: Annotated[int, typer.Option(help="Steps between two looks.")] = 10,
    pictures: Annotated[int, typer.Option(help="Pictures to name.")] = 40,
    precision: Annotated[str, typer.Option(help="highest, or medium: matrices are multiplied in bf16.")] = "medium",
) -> None:
    torch.set_float32_matmul_precision(precision)
    run = read_recipe(recipe, [f"arguments.logging_steps={every}", *(settings or [])])
    asked = run.data[0].options["caption_question"]
    options = {"questions_per_image": 0, "caption_question": asked}
    records = load_data(dataclasses.replace(run.evaluation[0], options=options, limit=pictures))
    trainer = build_trainer(run, output)
    probe, _ = trainer.encoder.prompts(list(records.select(range(8))))
    trainer.add_callback(NamingLogger(trainer, records, every))
    trainer.add_callback(GateLogger(trainer, probe))
    trainer.train(resume_from_checkpoint=last_checkpoint(output))
    history = trainer.state.log_history
    begins = naming_begins(history)
    figures = {
        "recipe": recipe,
        "steps": trainer.state.global_step,
        "seconds": round(trainer.seconds, 1),
        "pictures_named": len(records),
        "naming_begins_at_step": begins,
        "captions_right": [[row["step"], row[NAMED]] for row in history if NAMED in row],
        "losses": [[row["step"], row["loss"]] for row in history if "loss" in row],
        "image_variance_share": [[row["step"], row["image_variance_share"]] for row in share_history(history)],
        "gates": gate_history(history),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "float32_matmul_precision": precision,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
    }
    write_text(result, json.dumps(figures, indent=1) + "\n")
    marks = {} if begins is None else {"naming begins": begins}
    draw_gates(figures["gates"], marks).savefig(result.with_suffix(".png"))
    finish(trainer, run)


if __name__ == "__main__":
    typer.run(main)
