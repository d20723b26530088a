"""The benchmarks' official files, small: each function writes one into a folder."""

from __future__ import annotations

import json
from pathlib import Path

from tiny import tiny_image


def write_json(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_picture(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny_image(seed).save(path)


def answers(*texts: str) -> list[dict]:
    return [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(texts, 1)]


def write_vqav2(folder: Path, prefix: str = "v2_", split: str = "val2014", count: int = 3) -> None:
    questions, rows = [], []
    for n in range(count):
        write_picture(folder / split / f"COCO_{split}_{n:012d}.jpg", n)
        questions.append({"question_id": 10 + n, "image_id": n, "question": f"what is {n}?"})
        rows.append({
            "question_id": 10 + n, "image_id": n, "question_type": "what is", "answer_type": ("other", "number")[n % 2],
            "answers": answers(*[str(n)] * 6, *["x"] * 4), "multiple_choice_answer": str(n),
        })  # fmt: skip
    write_json(folder / f"{prefix}OpenEnded_mscoco_{split}_questions.json", {"questions": questions})
    write_json(folder / f"{prefix}mscoco_{split}_annotations.json", {"annotations": rows})


def write_okvqa(folder: Path) -> None:
    write_vqav2(folder, prefix="")


def write_textvqa(folder: Path) -> None:
    rows = []
    for n in range(2):
        write_picture(folder / "train_images" / f"abc{n}.jpg", n)
        said = ["dakota"] * 4 + ["dakota digital"] * 6
        rows.append({"question_id": n, "image_id": f"abc{n}", "question": "what brand?", "answers": said})
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": rows})


def write_vizwiz(folder: Path) -> None:
    rows = []
    for n in range(2):
        name = f"VizWiz_val_{n:08d}.jpg"
        write_picture(folder / "val" / name, n)
        said = [{"answer": "unanswerable", "answer_confidence": "yes"}] * 10
        rows.append({"image": name, "question": "Is it?", "answers": said, "answer_type": ("other", "yes/no")[n]})
    write_json(folder / "Annotations" / "val.json", rows)


def write_vizwiz_of_openflamingo(folder: Path) -> None:
    write_picture(folder / "val" / "VizWiz_val_00000000.jpg")
    question = {"question": "What?", "image_id": "VizWiz_val_00000000.jpg", "question_id": 0}
    row = {"question_id": 0, "image_id": "VizWiz_val_00000000.jpg", "question_type": "other",
           "answers": answers("no", "yes", "yes"), "multiple_choice_answer": "no"}  # fmt: skip
    write_json(folder / "val_questions_vqa_format.json", {"questions": [question]})
    write_json(folder / "val_annotations_vqa_format.json", {"annotations": [row]})


def write_gqa(folder: Path) -> None:
    write_picture(folder / "images" / "n1.jpg")
    row = {"question": "Is it red?", "imageId": "n1", "answer": "no", "types": {"structural": "verify"}}
    write_json(folder / "questions" / "testdev_balanced_questions.json", {"201": row})


def write_pope(folder: Path) -> None:
    for n, name in enumerate(("random", "popular", "adversarial")):
        write_picture(folder / "val2014" / f"COCO_val2014_{n:012d}.jpg", n)
        lines = [
            {"question_id": q, "image": f"COCO_val2014_{n:012d}.jpg", "text": f"Is there a {q}?", "label": label}
            for q, label in enumerate(("yes", "no"), 1)
        ]
        (folder / f"coco_pope_{name}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_scienceqa(folder: Path) -> None:
    problems = {}
    for n in range(3):
        image = "image.png" if n else None
        if image:
            write_picture(folder / "images" / "test" / str(n) / "image.png", n)
        problems[str(n)] = {
            "question": f"Which {n}?", "choices": ["dog", "cat", "fish"], "answer": n,
            "hint": "" if n == 1 else "Look.", "image": image, "subject": "natural science",
        }  # fmt: skip
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": ["0", "1", "2"]})


def write_easy_vqa(folder: Path, counts: dict[str, int] | None = None) -> None:
    for split, count in (counts or {"test": 4, "train": 6}).items():
        rows = []
        for n in range(count):
            write_picture(folder / split / "images" / f"{n}.png", n + (100 if split == "train" else 0))
            rows += [
                [f"what color is shape {n}?", "red", n],
                ["is there a red shape?", "yes", n],
                ["is there a blue shape?", "no", n],
            ]
        write_json(folder / split / "questions.json", rows)


def write_karpathy(folder: Path, name: str = "coco", count: int = 4) -> None:
    rows = []
    for n in range(count + 2):
        split = "test" if n < count else ("train", "restval")[n - count]
        row = {"filename": f"{n}.jpg", "split": split, "imgid": n,
               "sentences": [{"raw": f"a picture of number {n}"}, {"raw": f"w{n} w{n + 20}"}]}  # fmt: skip
        if name == "coco":
            row |= {"filepath": "val2014", "cocoid": 100 + n}
        write_picture(folder / ("val2014" if name == "coco" else "flickr30k-images") / f"{n}.jpg", n)
        rows.append(row)
    write_json(folder / f"dataset_{name}.json", {"images": rows})


def write_nocaps(folder: Path) -> None:
    images, rows = [], []
    for n in range(4):
        write_picture(folder / "val" / f"n{n}.jpg", n)
        images.append({"id": n, "file_name": f"n{n}.jpg", "domain": ("in-domain", "out-domain")[n % 2]})
        rows += [{"id": 10 * n + k, "image_id": n, "caption": f"a thing {n} {k}"} for k in range(2)]
    write_json(folder / "nocaps_val_4500_captions.json", {"images": images, "annotations": rows})


def write_classes(folder: Path, split: str = "test") -> None:
    for n in range(4):
        write_picture(folder / split / ("cat", "hot_dog")[n % 2] / f"{split}{n}.png", n)
