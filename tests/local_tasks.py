"""One task for every harness: questions about pictures in a folder, for vlbridge, lmms-eval and lm-eval alike."""

from __future__ import annotations

import json
from pathlib import Path

from benchmark_layouts import write_easy_vqa, write_json

from vlbridge.evaluation.evaluation_samples import read_samples
from vlbridge.inference import answer


UTILS = """
from PIL import Image


def doc_to_image(doc):
    return [Image.open(doc["picture"])]


def doc_to_visual(doc):
    return doc_to_image(doc)


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    return {"accuracy": float(results[0].strip() == doc["answer"])}


def later_rounds(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    asked = f"is {previous_output[-1]} right?"
    return doc_to_image(doc), asked, round_idx == 3, previous_output, {"round": round_idx}


def process_rounds(doc, results):
    return {"accuracy": float(len(results[0]))}
"""

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: {output_type}
doc_to_target: answer
generation_kwargs: {generation}
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata: {{version: 1}}
"""


def answered_questions(folder: Path, model, processor) -> list[str]:
    """Write easy-VQA's files into a folder, for which a model knows half of the answers; returns what it answers."""
    write_easy_vqa(folder, {"test": 3})
    samples = read_samples("easy_vqa", folder, "test")
    said = [answer(model, processor, [s.open()], s.question, max_new_tokens=8)[0] for s in samples]
    rows = [
        [sample.question, text if number % 2 else "none of these", int(Path(sample.image["path"]).stem)]
        for number, (sample, text) in enumerate(zip(samples, said))
    ]
    write_json(folder / "test" / "questions.json", rows)
    return said


def write_tasks(folder: Path, data: Path, harness: str) -> Path:
    """Write the tasks `local` and, for lmms-eval, `local_rounds` into a folder; returns it."""
    folder.mkdir(parents=True)
    lines = [
        {"picture": sample.image["path"], "question": sample.question, "answer": sample.references[0]}
        for sample in read_samples("easy_vqa", data, "test")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "utils.py").write_text(UTILS)
    limit = "max_gen_toks" if harness == "lm_eval" else "max_new_tokens"
    settings = {"rows": folder / "rows.jsonl", "generation": f"{{{limit}: 8, do_sample: false, until: []}}"}
    local = TASK.format(name="local", output_type="generate_until", **settings)
    results = "process_results: !function utils.process_results\n"
    if harness == "lm_eval":
        local += 'doc_to_image: !function utils.doc_to_image\ndoc_to_text: "<image>{{question}}"\n' + results
    else:
        asks = "doc_to_visual: !function utils.doc_to_visual\ndoc_to_text: !function utils.doc_to_text\n"
        local += asks + results
        rounds = TASK.format(name="local_rounds", output_type="generate_until_multi_round", **settings)
        rounds += asks.replace("utils.doc_to_text", "utils.later_rounds")
        (folder / "local_rounds.yaml").write_text(
            rounds + results.replace("utils.process_results", "utils.process_rounds")
        )
    (folder / "local.yaml").write_text(local)
    return folder
