"""Train an MLP bridge on easy-VQA, from which the shipped one begins (`three_bridges.py`, which measures both).

    python examples/easy_vqa.py --output FOLDER

Only the bridge is trained, so two things need not be done again and again: the encoder runs once per image (its patch
features are kept), and all questions about one image share that image's tokens (they are packed into one row, each
seeing the image and itself only, so that every question is exactly what it would be alone).
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import typer
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, Trainer, TrainerCallback, TrainingArguments, set_seed

import vlbridge
from vlbridge import demo
from vlbridge.compat import cache_argument, cache_of
from vlbridge.prompts import later_states
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
from vlbridge.training.training_features import FeatureCache
from vlbridge.training.training_packing import PackedCollator, append_pairs, common_prefix


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Args:
        steps: Of one picture each.
        num_pairs: Matched pairs per picture; the rest of what is asked about it are its own questions.
        about: What the pairs are about, `"{shape}"`, `"{color}"` or both.
        negated: Ask negated questions in pairs too.
    """

    steps: int
    num_pairs: int = 0
    about: tuple[str, ...] = ("{shape}", "{color}")
    negated: bool = True


# Naming first. Comparing a question with the picture is then learned with three shapes and plain questions in a hundred
# steps, and carries over to negated questions and to colours; if everything is asked at once, it is not learned in
# several times as many steps.
CURRICULUM = (
    Stage(300),
    Stage(120, 5, ("{shape}",), negated=False),
    Stage(120, 5, ("{shape}",)),
    Stage(320, 4),
    Stage(300, 3),
)


def blind_baseline(train: list[Example], test: list[Example]) -> float:
    """Accuracy of the most frequent training answer of the exact question."""
    answers = defaultdict(Counter)
    for example in train:
        for question, answer in example.questions:
            answers[question][answer] += 1
    pairs = [pair for example in test for pair in example.questions]
    right = sum(answers[question].most_common(1)[0][0] == answer for question, answer in pairs if question in answers)
    return right / len(pairs)


def conversation(question: str, image=None) -> list[dict]:
    """A user's turn: the picture, then the question."""
    picture = {"type": "image"} if image is None else {"type": "image", "image": image}
    return [{"role": "user", "content": [picture, {"type": "text", "text": question}]}]


def num_placeholders(processor) -> int:
    """Places of a picture in the prompt: one for each visual token, or one where visual tokens are read beside it."""
    return processor.num_multimodal_tokens(image_sizes=[processor.output_size()]).num_image_tokens[0]


class PackedConversations(Dataset):
    """Per picture: its patch features and its packed questions.

    Args:
        examples: What to train on.
        features: `(num_examples, num_patches, vision_dim)`.
        processor: The model's processor.
        num_questions: Questions of one picture in one row, drawn again every time: matched pairs, and the picture's own
            or its caption.
        curriculum: What is asked when.
        seed: Of the draw.
    """

    def __init__(self, examples, features, processor, num_questions: int, curriculum=CURRICULUM, seed: int = 0):
        self.examples, self.features, self.processor = examples, features, processor
        self.num_questions = num_questions
        self.stages = [stage for stage in curriculum for _ in range(stage.steps)]
        self.drawn = 0
        self.templates = yes_no_templates(examples)
        self.generator = torch.Generator().manual_seed(seed)
        self.num_tokens = num_placeholders(processor)
        self.prompts: dict[str, list[int]] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))

    def tokenize(self, text: str) -> list[int]:
        text = text.replace(self.processor.image_token, self.processor.image_token * self.num_tokens)
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, question: str) -> list[int]:
        if question not in self.prompts:
            text = self.processor.apply_chat_template(conversation(question), add_generation_prompt=True)
            self.prompts[question] = self.tokenize(text)
        return self.prompts[question]

    def __getitem__(self, index: int) -> dict:
        example = self.examples[index]
        own, caption, found = list(example.questions), caption_of(example), properties_of(example)
        if caption:
            own.append((self.processor.caption_prompt, caption))
        stage = self.stages[min(self.drawn, len(self.stages) - 1)]
        self.drawn += 1
        asked = []
        for _ in range(stage.num_pairs if len(found) == 2 else 0):
            about = stage.about[self.draw(len(stage.about))]  # as often about shapes as about colours
            templates = [
                form for form in self.templates if about in form and (stage.negated or not NEGATED.search(form))
            ]
            asked += matched_pair(found, templates, self.draw)
        order = torch.randperm(len(own), generator=self.generator).tolist()
        asked += [own[choice] for choice in order[: self.num_questions - len(asked)]]
        end = [self.processor.tokenizer.eos_token_id]
        pairs = [(self.prompt(question), self.tokenize(answer) + end) for question, answer in asked]
        return {"patch_features": self.features[index].float(), **append_pairs(pairs)}


def encode(model, processor, examples: list[Example], batch_size: int = 8) -> torch.Tensor:
    """Patch features of every picture, `(num_examples, num_patches, vision_dim)`, in half precision; kept on disk."""
    model.vision_model.to(memory_format=torch.channels_last)  # twice as fast for a CNN on a CPU
    cache = FeatureCache(model, processor, dtype="float16", batch_size=batch_size)
    cache.fill([{"images": [{"path": str(example.image), "bytes": None}]} for example in examples])
    return cache.get(example.image for example in examples)


@torch.no_grad()
def answer_all(model, processor, examples: list[Example], features: torch.Tensor, max_new_tokens: int = 6) -> list[str]:
    """Greedy answers to all questions, one conversation each, through `generate()`.

    What the conversations about one picture have in common, above all the picture, runs through the language model
    once.
    """
    num_tokens, tokenizer = num_placeholders(processor), processor.tokenizer
    answers = []
    for index, example in enumerate(tqdm(examples, desc="answering", unit="picture")):
        turns = [conversation(question) for question, _ in example.questions]
        texts = processor.apply_chat_template(turns, add_generation_prompt=True)
        texts = [text.replace(processor.image_token, processor.image_token * num_tokens) for text in texts]
        prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
        shared = min(common_prefix(prompts), min(map(len, prompts)) - 1)
        prefix = torch.tensor([prompts[0][:shared]], device=model.device)
        patch_features = features[index : index + 1].float().to(model.device)
        outputs = model(input_ids=prefix, patch_features=patch_features, use_cache=True, logits_to_keep=1)
        cache, states = cache_of(outputs), later_states(model, outputs.visual_states)
        cache.batch_repeat_interleave(len(prompts))
        rest = tokenizer.pad({"input_ids": [prompt[shared:] for prompt in prompts]}, return_tensors="pt").to(
            model.device
        )
        prefix = prefix.expand(len(prompts), -1)
        ids = torch.cat([prefix, rest["input_ids"]], dim=1)
        generated = model.generate(
            ids,
            attention_mask=torch.cat([torch.ones_like(prefix), rest["attention_mask"]], dim=1),
            **cache_argument(cache),
            **({} if states is None else {"visual_states": states}),
            do_sample=False,
            max_new_tokens=max_new_tokens,
        )[:, ids.shape[1] :]
        answers += [text.strip().lower() for text in processor.batch_decode(generated, skip_special_tokens=True)]
    return answers


def warm_up(
    model, processor, examples: list[Example], features: torch.Tensor, steps: int, learning_rate: float = 1e-3
) -> None:
    """Let every visual token begin as the words for what is in the picture.

    The language model is not run: the bridge learns to give the sum of the colour's and the shape's own embeddings.
    That gives the language model's loss something to work with; starting from random tokens it stays blind for long.

    Args:
        examples: Pictures; those whose colour or shape nothing tells are left out.
        features: Their patch features.
        steps: Of 48 pictures each.
        learning_rate: Falls to zero along a cosine.
    """
    embeddings = model.get_input_embeddings().weight.detach().float()
    words = {
        word: processor.tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in (*COLORS, *SHAPES)
    }
    shown = {index: properties_of(example) for index, example in enumerate(examples)}
    known = torch.tensor([index for index, found in shown.items() if len(found) == 2])
    targets = torch.stack(
        [sum(embeddings[words[word]].mean(dim=0) for word in shown[index].values()) for index in known.tolist()]
    )
    optimizer = torch.optim.AdamW(model.bridge.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), desc="warming up", unit="step"):
        drawn = torch.randint(len(known), (48,))
        visual_tokens = model.bridge(features[known[drawn]].float().to(model.device))  # (48, num_patches, text_dim)
        wanted = targets[drawn][:, None].expand_as(visual_tokens)
        torch.nn.functional.mse_loss(visual_tokens, wanted).mul(100).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def kind_of(question: str, answer: str) -> str:
    """What a question is about; yes/no questions by whether the thing they name is in the picture."""
    if answer in COLORS or answer in SHAPES:
        return "color" if answer in COLORS else "shape"
    return "yes/no, shown" if (answer == "yes") != bool(NEGATED.search(question)) else "yes/no, absent"


def accuracies(examples: list[Example], given: list[str]) -> tuple[float, dict[str, float]]:
    """Accuracy of the answers to all questions, and of each kind's."""
    asked = [pair for example in examples for pair in example.questions]
    totals = Counter(kind_of(*pair) for pair in asked)
    hits = Counter(kind_of(*pair) for pair, said in zip(asked, given, strict=True) if pair[1] == said)
    return hits.total() / len(asked), {kind: hits[kind] / totals[kind] for kind in sorted(totals)}


class AnswerSomeQuestions(TrainerCallback):
    """Accuracy on a few held-out questions now and then, asked the way users will."""

    def __init__(self, processor, examples, features, every: int):
        self.processor, self.examples, self.features, self.every = processor, examples, features, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every:
            return
        model.eval()
        given = answer_all(model, self.processor, self.examples, self.features)
        accuracy, by_kind = accuracies(self.examples, given)
        shares = ", ".join(f"{kind} {share:.3f}" for kind, share in by_kind.items())
        print(f"step {state.global_step}: accuracy {accuracy:.4f} ({shares})", flush=True)
        model.train()


def train(
    output: Path = typer.Option(..., help="Folder to write the bridge to."),
    steps: int = typer.Option(0, help="Only the curriculum's last ones (0: all), without the warm-up."),
    learning_rate: float = typer.Option(1e-3, help="Falls to zero in the curriculum's last stage."),
    num_questions: int = typer.Option(12, help="Asked about a picture, one picture per step."),
    warm_up_steps: int = 300,
    dtype: str = typer.Option(
        "float32", help="Of the language model; on a CPU without bf16 instructions, bfloat16 is slow."
    ),
    seed: int = 0,
    limit: int = typer.Option(0, help="Use this many pictures only (0: all)."),
    resume_from: Path | None = typer.Option(None, help="Start from this bridge instead of a fresh one."),
) -> None:
    """Train an MLP bridge between EfficientNet-Lite0 and SmolLM2-135M-Instruct."""
    set_seed(seed)
    started = time.time()
    data = demo.easy_vqa_dir()
    examples = load_split(data, "train")
    # the last pictures of the training split watch over training; the test split is not touched
    num_chosen = min(limit or len(examples), len(examples) - 16)
    chosen, held_out = examples[:num_chosen], examples[-16:]
    if resume_from is None:
        model, processor = vlbridge.compose(demo.VISION, demo.LANGUAGE, "mlp")
    else:
        model = AutoModel.from_pretrained(resume_from)
        processor = AutoProcessor.from_pretrained(resume_from)
    model.language_model.to(getattr(torch, dtype))
    if torch.cuda.is_available():
        model.cuda()
    features = encode(model, processor, examples)
    if resume_from is None:
        warm_up(model, processor, chosen, features[:num_chosen], warm_up_steps)
    dataset = PackedConversations(chosen, features, processor, num_questions, seed=seed)
    dataset.stages = dataset.stages[-steps:]
    last = sum(stage is dataset.stages[-1] for stage in dataset.stages)
    arguments = TrainingArguments(
        output_dir=str(output.with_suffix(".training")),
        max_steps=len(dataset.stages),
        per_device_train_batch_size=1,
        learning_rate=learning_rate,
        adam_beta2=0.95,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": max(1, last - 20), "decay_type": "linear"},
        warmup_steps=20,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        seed=seed,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    watch = AnswerSomeQuestions(processor, held_out, features[-16:], every=200)
    Trainer(
        model=model, args=arguments, train_dataset=dataset, data_collator=PackedCollator(), callbacks=[watch]
    ).train()
    model.eval().save_pretrained(output, bridge_only=True)
    processor.save_pretrained(output)
    print(f"trained in {(time.time() - started) / 60:.1f} minutes, saved to {output}")


if __name__ == "__main__":
    typer.run(train)
