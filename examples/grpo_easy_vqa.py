"""Reinforce right answers: GRPO (TRL) on easy-VQA, with the accuracy before and after.

    pip install "vlbridge[demo,eval]" trl
    python examples/grpo_easy_vqa.py --model my-bridge --output my-bridge-grpo

Only the bridge is trained. A sampled answer is rewarded with 1 if it is the right one word for word, else with 0.
Accuracy is that of `vlbridge evaluate` on questions of the test split, drawn by a seed; training asks about the
training split.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from datasets import Dataset, Image
from transformers import AutoModel, AutoProcessor, set_seed
from trl import GRPOConfig, GRPOTrainer

from vlbridge import demo
from vlbridge.evaluation import evaluate
from vlbridge.evaluation.evaluation_models import versions
from vlbridge.evaluation.evaluation_samples import Sample, read_samples
from vlbridge.files import write_json
from vlbridge.inference import model_source
from vlbridge.training.training_run import hardware


def balanced(samples: list[Sample], count: int, seed: int) -> list[Sample]:
    """So many samples, drawn so that every right answer is the answer to equally many, as far as there are enough."""
    draw = random.Random(seed)
    by_answer: dict[str, list[Sample]] = {}
    for sample in draw.sample(samples, len(samples)):
        by_answer.setdefault(sample.references[0], []).append(sample)
    chosen: list[Sample] = []
    while len(chosen) < count and any(by_answer.values()):
        chosen += [left.pop() for left in by_answer.values() if left]
    return draw.sample(chosen[:count], min(count, len(chosen)))


def questions(folder: Path, count: int, seed: int) -> Dataset:
    """Questions of the training split in TRL's form."""
    rows = [
        {
            "prompt": [{"role": "user", "content": sample.question}],
            "image": sample.image["path"],
            "answer": sample.references[0],
        }
        for sample in balanced(list(read_samples("easy_vqa", folder, "train")), count, seed)
    ]
    return Dataset.from_list(rows).cast_column("image", Image())


def right(completions: list, answer: list[str], **_) -> list[float]:
    """1 for a completion that is the right answer word for word, else 0."""
    said = [completion[0]["content"].strip().lower() for completion in completions]
    return [float(text == wanted) for text, wanted in zip(said, answer, strict=True)]


def main(
    output: Annotated[Path, typer.Option(help="Folder for the trained bridge and grpo.json.")],
    model: Annotated[str | None, typer.Option(help="Bridge to start from.", show_default="the embedded one")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    prompts: Annotated[int, typer.Option(min=1, help="Questions per step.")] = 8,
    samples: Annotated[int, typer.Option(min=2, help="Sampled answers per question.")] = 8,
    learning_rate: float = 1e-5,
    limit: Annotated[int, typer.Option(min=1, help="Test questions for the accuracy.")] = 300,
    seed: int = 0,
) -> None:
    """Train with GRPO, and write down the accuracy before and after."""
    set_seed(seed)
    source, folder = model_source(model), demo.easy_vqa_dir()
    bridged, processor = AutoModel.from_pretrained(source), AutoProcessor.from_pretrained(source)
    asked = {"limit": limit, "seed": seed, "batch_size": 16}
    before = evaluate(bridged.eval(), processor, "easy_vqa", folder, **asked)
    trainer = GRPOTrainer(
        bridged,
        reward_funcs=right,
        train_dataset=questions(folder, steps * prompts, seed),
        processing_class=processor,
        args=GRPOConfig(
            output_dir=str(output),
            max_steps=steps,
            per_device_train_batch_size=prompts * samples,
            num_generations=samples,
            max_completion_length=8,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            temperature=1.0,
            beta=0.0,
            disable_dropout=True,
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
        ),
    )
    began = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - began
    after = evaluate(bridged.eval(), processor, "easy_vqa", folder, **asked)
    bridged.save_pretrained(output, bridge_only=True, processor=processor)
    write_json(
        output / "grpo.json",
        {
            "model": source, "steps": steps, "prompts": prompts, "samples": samples, "learning_rate": learning_rate,
            "seed": seed, "questions": limit, "seconds": round(seconds, 1), "hardware": hardware(1),
            "versions": versions(),
            "accuracy": {"before": before["metrics"]["accuracy"], "after": after["metrics"]["accuracy"]},
            "by_kind": {"before": before["breakdown"], "after": after["breakdown"]},
            "rewards": [[log["step"], log["reward"]] for log in trainer.state.log_history if "reward" in log],
        },
    )  # fmt: skip
    for name, result in (("before", before), ("after", after)):
        print(f"accuracy {name}: {result['metrics']['accuracy']}")


if __name__ == "__main__":
    typer.run(main)
