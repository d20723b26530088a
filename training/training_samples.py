"""What a model generates for records: at the end of a run, and as a table every so many steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from ..files import write_text
from .training_encoding import Encoder


logger = logging.get_logger(__name__)


class SampleTable(TrainerCallback):
    """Every so many steps: what the model generates for a few fixed records.

    It goes to the log, to `samples.jsonl` and `samples.md`, and to loggers that take text.

    Args:
        encoder: Makes prompts of records.
        records: The records.
        every: Steps between two tables.
        max_new_tokens: Longest text, in tokens.
    """

    def __init__(self, encoder: Encoder, records: list[dict], every: int, max_new_tokens: int):
        self.encoder, self.records, self.every, self.max_new_tokens = encoder, records, every, max_new_tokens

    def on_train_begin(self, args, state, control, **kwargs):
        """Drop tables of steps that a resumed run makes again."""
        file = Path(args.output_dir) / "samples.jsonl"
        if state.is_world_process_zero and file.exists():  # tables after the step of the checkpoint are made again
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
            write_text(file, "".join(f"{line}\n" for line in kept if state.global_step))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Generate and write a table every `every` steps."""
        if state.global_step % self.every:
            return
        generated = generate(model, self.encoder, self.records, self.max_new_tokens)
        if not state.is_world_process_zero:
            return
        rows = [{"step": state.global_step, **row} for row in rows_of(self.records, generated)]
        folder = Path(args.output_dir)
        with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        table = _table(rows)
        write_text(folder / "samples.md", f"Step {state.global_step}\n\n{table}\n")
        logger.info(f"Samples at step {state.global_step}:\n{table}")
        for callback in getattr(self, "trainer_callbacks", ()):
            if (writer := getattr(callback, "tb_writer", None)) is not None:
                writer.add_text("samples", table, state.global_step)
        wandb = sys.modules.get("wandb")  # Trainer has imported it where it logs there
        if wandb is not None and wandb.run is not None:
            data = [list(row.values()) for row in rows]
            wandb.log({"samples": wandb.Table(columns=list(rows[0]), data=data)}, commit=False)


def rows_of(records, generated: list[tuple[str, str]]) -> list[dict]:
    """Put what was generated beside the records' own texts.

    Args:
        records: The records.
        generated: What `generate` returned for them.

    Returns:
        `id`, `wanted` and `generated` of each.
    """
    return [
        {"id": str(record.get("id")), "wanted": wanted, "generated": text}
        for record, (text, wanted) in zip(records, generated)
    ]


def _table(rows: list[dict]) -> str:
    def cell(value) -> str:
        return " ".join(str(value).split()).replace("|", "\\|")

    lines = ["| record | wanted | generated |", "|---|---|---|"]
    return "\n".join(lines + [f"| {cell(r['id'])} | {cell(r['wanted'])} | {cell(r['generated'])} |" for r in rows])


@torch.no_grad()
def generate(
    model: PreTrainedModel, encoder: Encoder, records, max_new_tokens: int, batch_size: int = 8
) -> list[tuple[str, str]]:
    """Greedy generations for records.

    Args:
        model: The model; afterwards it is in the mode (training or evaluation) that it was in.
        encoder: Makes prompts of records.
        records: A sequence of them.
        max_new_tokens: Longest text, in tokens.
        batch_size: Records at a time.

    Returns:
        Per record: the generated text, and the record's own.
    """
    was_training, texts = model.training, []
    model.eval()
    try:
        for start in range(0, len(records), batch_size):
            batch = [records[index] for index in range(start, min(start + batch_size, len(records)))]
            inputs, wanted = encoder.prompts(batch)
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            texts += zip(encoder.answers(model, inputs, max_new_tokens), wanted)
    finally:
        model.train(was_training)
    return texts


__all__ = ["SampleTable", "generate", "rows_of"]
