"""What the papers and our documents claim about bridges, tested at a small scale over several seeds.

    python benchmarks/claims.py --output benchmarks/results/claims.json      # about an hour on one CPU core
    python benchmarks/claims.py --claims gates --seeds 1 --steps 3 --reader-steps 3 --pictures 40    # to try it

EfficientNet-Lite0 is the frozen encoder. The frozen language model is a Llama of 1.0 M parameters, the *reader*, that
has learned from texts alone to count what a caption before them names, to repeat the caption, and to go on in the way
of examples: what a bridge tells it in place of the caption, it can use. So bridges are trained in minutes, and a claim
can have seeds.

- gates: a Perceiver's tanh gates, which begin at 0, open during training (Flamingo, section 2.4);
- stage1: a Q-Former that was trained in stage 1 learns stage 2 faster than a fresh one (BLIP-2, section 4.4);
- projector: a two-layer MLP beats a linear layer (LLaVA-1.5, section 3.2);
- shots: examples in the prompt help a Flamingo and not a BLIP-2 (Flamingo, section 3.1; BLIP-2, section 4.2). The task
  is to say the colour or the shape of a drawing, and examples alone tell which. BLIP-2 is trained on single pairs;
  a Q-Former that was trained on the Flamingo's interleaved examples says whether the bridge or the data matter;
- queries: the queries of a Q-Former specialise (our docs/concepts.md): how different what they read and what they say
  is, before and after training;
- tokens: few visual tokens limit counting more than naming (our docs/concepts.md).

Scenes are those of examples/scenes.py. Of new ones are counted: how often the likeliest answer to "how many shapes" and
"how many circles" is right, and how often the likeliest next word is, where a caption has a colour or a shape.
"""

from __future__ import annotations

import datetime
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from gpu_smoke import versions
from qformer_stages import word_tokenizer
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, set_seed

import vlbridge
from vlbridge import demo
from vlbridge.files import cache_dir, write_json
from vlbridge.inspection import bridge_attention, effective_rank, patch_attention, similarity_within, visual_tokens
from vlbridge.inspection import gates as tanh_gates
from vlbridge.inspection.inspection_queries import mean_off_diagonal
from vlbridge.training.training_easy_vqa import COLORS, SHAPES, Example, load_split, properties_of
from vlbridge.training.training_packing import PackedCollator, append_pairs


sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from easy_vqa import encode, num_placeholders  # noqa: E402
from imitation import step_down  # noqa: E402
from scenes import NUMBERS, Shape, ask, caption_of_scene, draw_scene  # noqa: E402
from three_bridges import scenes  # noqa: E402


END = "[SEP]"
LAST = -1  # the encoder's last block, 320 channels
READER = {
    "hidden_size": 144, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 400, "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip
QFORMER = {
    "num_query_tokens": 16, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "intermediate_size": 512, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
PERCEIVER = {
    "num_latents": 16, "resampler_depth": 2, "resampler_num_heads": 4, "cross_attention_every_n_layers": 1,
    "cross_attention_num_heads": 4, "latents_init_std": 0.1,
}  # fmt: skip
RATE = 1e-3  # of every bridge
LOOKS = (0.125, 0.25, 0.5, 1.0)  # shares of the steps after which stage 2 is measured
SHOTS, MOST_SHOTS = (0, 1, 4), 4
TASKS = ("color", "shape")
COUNTS = ("count", "count of a kind")


# ---------------------------------------------------------------------- the reader


def words_of(text: str) -> str:
    """A text with spaces around its commas, stops and question marks: words are tokens."""
    for mark in ",.?":
        text = text.replace(mark, f" {mark} ")
    return " ".join(text.split())


def tokens_of(tokenizer, text: str) -> list[int]:
    """A text's tokens, one for each word."""
    return tokenizer(words_of(text), add_special_tokens=False)["input_ids"]


def questions_about(shapes: list[Shape], rng: random.Random) -> list[tuple[str, str]]:
    """How many shapes there are, and how many of one kind; then the caption, asked for by a full stop."""
    counts = [rng.choice(ask(shapes, kind, rng)) for kind in COUNTS]
    return [*counts, (".", caption_of_scene(shapes))]


def read_text(rng: random.Random) -> list[tuple[str, bool]]:
    """A text for the reader, in parts, each with whether it is to be learned: what is asked, not what is told."""
    if rng.random() < 0.3:
        task, parts = rng.choice(TASKS), []
        for _ in range(MOST_SHOTS + 1):
            shown = {"color": rng.choice(COLORS), "shape": rng.choice(SHAPES)}
            parts += [(f"a {shown['color']} {shown['shape']}. output", False), (f"{shown[task]} {END}", True)]
        return parts
    shapes = draw_scene(rng)
    asked = questions_about(shapes, rng)
    rng.shuffle(asked)
    parts = [(f"{caption_of_scene(shapes)}.", False)]
    for question, answer in asked:
        parts += [(question, False), (f"{answer} {END}", True)]
    return parts


def make_reader(folder: Path, steps: int, seed: int = 0, batch_size: int = 32) -> float:
    """Train the reader on texts, and save it with its tokenizer.

    Returns:
        Share of the words to be learned that it finds the likeliest, in its last steps.
    """
    rng = random.Random(seed)
    everything = [text for _ in range(2000) for text, _ in read_text(rng)] + list(NUMBERS)
    tokenizer = word_tokenizer([words_of(text.replace(END, "")) for text in everything])
    set_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=3, **READER))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 2), pct_start=0.1)
    right = []
    for _ in tqdm(range(steps), desc="reader", unit="step"):
        ids, labels = [], []
        for _ in range(batch_size):
            parts = [(tokens_of(tokenizer, text), learned) for text, learned in read_text(rng)]
            ids.append(torch.tensor([token for tokens, _ in parts for token in tokens]))
            labels.append(torch.tensor([token if learned else -100 for tokens, learned in parts for token in tokens]))
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        out = model(input_ids=pad_sequence(ids, batch_first=True), labels=labels)
        step_down(out.loss, [*model.parameters()], optimizer, schedule)
        wanted = labels[:, 1:]
        right.append((out.logits[:, :-1].argmax(dim=-1) == wanted)[wanted != -100].float().mean().item())
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return round(statistics.mean(right[-20:]), 4)


# ---------------------------------------------------------------------- data and models


class Scenes:
    """Scenes with their features, and what is asked about them.

    Args:
        shapes: What each shows.
        features: `(num_scenes, num_patches, vision_dim)`.
    """

    def __init__(self, shapes: list[list[Shape]], features: torch.Tensor):
        self.shapes, self.features = shapes, features


class Bench:
    """What all claims share: the reader, and pictures as the encoder sees them.

    Args:
        reader: Folder of the reader.
        pictures: Scenes and drawings to train on; a tenth as many are new ones.
        steps: Of each bridge.
        batch_size: Pictures of a step.
    """

    def __init__(self, reader: Path, pictures: int, steps: int, batch_size: int = 16):
        self.reader, self.steps, self.batch_size = reader, steps, batch_size
        self.looks = {max(1, int(share * steps)) for share in LOOKS}
        model, processor = self.compose("qformer")
        new = max(pictures // 10, 8)
        drawn = {
            "train": scenes(cache_dir() / "scenes", pictures, "train"),
            "new": scenes(cache_dir() / "scenes_test", new, "test"),
        }
        easy = [one for one in load_split(demo.easy_vqa_dir(), "train") if len(properties_of(one)) == 2][
            : pictures + new
        ]
        pictured = [*drawn["train"], *drawn["new"]]
        features = encode(model, processor, [*(Example(scene.image, []) for scene in pictured), *easy])
        self.scenes = {
            "train": Scenes([scene.shapes for scene in drawn["train"]], features[:pictures]),
            "new": Scenes([scene.shapes for scene in drawn["new"]], features[pictures : len(pictured)]),
        }
        self.drawings = features[len(pictured) :], [properties_of(one) for one in easy]
        self.new_drawings = new

    def compose(self, bridge: str, **options):
        """A bridged model between the encoder and the reader, in float32, and its processor."""
        if bridge == "qformer":
            options["qformer_config"] = {**QFORMER, **options.get("qformer_config", {})}
        elif bridge == "perceiver":
            options = {**PERCEIVER, **options}
        options["vision_feature_layer"] = LAST
        return vlbridge.compose(demo.VISION, str(self.reader), bridge, dtype=torch.float32, **options)

    def sample(self, processor, features: torch.Tensor, pairs: list[tuple[str, str]]) -> dict:
        """Questions about one picture, packed behind its visual tokens."""
        image, tokenizer = processor.image_token * num_placeholders(processor), processor.tokenizer
        tokens = [
            (tokens_of(tokenizer, f"{image} {one}"), tokens_of(tokenizer, f"{said} {END}")) for one, said in pairs
        ]
        return {"patch_features": features.float(), **append_pairs(tokens)}

    def batch(self, processor, number: int, seed: int) -> dict:
        """What a step learns from: some scenes, with questions about each."""
        rng, known, samples = random.Random(f"{seed}:{number}"), self.scenes["train"], []
        for place in rng.sample(range(len(known.shapes)), self.batch_size):
            pairs = questions_about(known.shapes[place], rng)
            samples.append(self.sample(processor, known.features[place], pairs))
        return PackedCollator(max_tokens=256)(samples)

    def learn(self, model, processor, seed: int, look: Callable[[int], None] | None = None) -> list[float]:
        """Train a bridge on questions about scenes, see `learn`."""
        return learn(model, self.steps, lambda number: self.batch(processor, number, seed), look)

    @torch.inference_mode()
    def right(self, model, processor) -> dict[str, float]:
        """Share of words of answers about new scenes that are the likeliest: counts; colours and shapes of captions."""
        told = [processor.tokenizer.convert_tokens_to_ids([*names]) for names in (COLORS, SHAPES)]
        found: dict[str, list[bool]] = {kind: [] for kind in (*COUNTS, *TASKS)}
        for place, (shapes, features) in enumerate(zip(self.scenes["new"].shapes, self.scenes["new"].features)):
            pairs = questions_about(shapes, random.Random(place))
            batch = PackedCollator()([self.sample(processor, features, pairs)])
            wanted = batch["shift_labels"][0, :-1]
            logits = model(**{**batch, "labels": None, "shift_labels": None}).logits[0]
            same = logits[: len(wanted)].argmax(dim=-1) == wanted
            for kind, start in zip(COUNTS, (0, 2)):  # each is a word and the end
                found[kind].append(same[start].item())
            for kind, ids in zip(TASKS, told):
                found[kind] += same[torch.isin(wanted, torch.tensor(ids))].tolist()
        shares = {kind: round(statistics.mean(hits), 4) for kind, hits in found.items()}
        return {"all": round(statistics.mean(shares.values()), 4), **shares}


def learn(model, steps: int, batch: Callable[[int], dict], look: Callable[[int], None] | None = None) -> list[float]:
    """Train a bridge: AdamW, the rate rises over 5 % of the steps and falls along a cosine.

    Args:
        model: The model.
        steps: Number of steps.
        batch: What a step learns from, by its number.
        look: Called with the number of steps that were made, after each.

    Returns:
        The loss of every step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 2), pct_start=0.05)
    losses = []
    model.train()
    for number in range(steps):
        loss = model(**batch(number)).loss
        step_down(loss, parameters, optimizer, schedule)
        losses.append(loss.item())
        if look is not None:
            model.eval()
            look(number + 1)
            model.train()
    model.eval()
    return losses


def last(losses: list[float]) -> float:
    """Mean of the last twentieth of the losses."""
    return round(statistics.mean(losses[-max(1, len(losses) // 20) :]), 4)


# ---------------------------------------------------------------------- claims


def gates(bench: Bench, seed: int) -> dict:
    """Mean of |tanh(gate)| during training: `[step, of attention, of feed-forward layers]`."""
    set_seed(seed)
    model, processor = bench.compose("perceiver", gate_init=0.0)
    opened = []

    def look(step: int) -> None:
        if step in bench.looks:
            opened.append([step, *(round(statistics.mean(abs(row[kind]) for row in tanh_gates(model)), 4)
                                   for kind in ("attention", "feed_forward"))])  # fmt: skip

    losses = bench.learn(model, processor, seed, look)
    return {"opened": opened, "loss": last(losses), "right": bench.right(model, processor)}


def train_stage1(bench: Bench, seed: int, folder: Path) -> dict:
    """A Q-Former from stage 1 on captions of scenes, 32 pairs in each step."""
    set_seed(seed)
    known = bench.scenes["train"]
    captions = [words_of(caption_of_scene(shapes)) for shapes in known.shapes]
    tokenizer = word_tokenizer(captions)
    model, processor = vlbridge.QFormerBlip2ForPreTraining.from_vision(
        demo.resolve(demo.VISION), tokenizer, embed_dim=64, max_length=32, vision_feature_layer=LAST,
        qformer_config={**QFORMER, "max_position_embeddings": 64},
    )  # fmt: skip

    def batch(number: int) -> dict:
        rows = random.Random(f"{seed}:{number}").sample(range(len(captions)), 2 * bench.batch_size)
        texts = [captions[row] for row in rows]
        same = torch.tensor([texts.index(text) for text in texts])
        tokens = processor(text=texts, padding=True, return_tensors="pt")
        return {"patch_features": known.features[rows].float(), "image_ids": same, **tokens}

    losses = learn(model, bench.steps, batch)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return {"loss": last(losses)}


def stage1(bench: Bench, seed: int) -> dict:
    """Stage 2 from a fresh Q-Former, and from one of stage 1, which costs as many steps again."""
    folder = bench.reader.parent / f"stage1_{seed}"
    found = {"stage 1": train_stage1(bench, seed, folder)}
    for name in ("fresh", "from stage 1"):
        set_seed(seed)
        if name == "fresh":
            model, processor = bench.compose("qformer")
        else:
            model, processor = vlbridge.QFormerBlip2ForConditionalGeneration.from_stage1(
                folder, str(bench.reader), dtype=torch.float32
            )
        reached = []

        def look(step: int, model=model, processor=processor, reached=reached) -> None:
            if step in bench.looks:
                reached.append([step, bench.right(model, processor)["all"]])

        losses = bench.learn(model, processor, seed, look)
        found[name] = {"loss": last(losses), "right": reached}
    return found


def projector(bench: Bench, seed: int) -> dict:
    """A linear layer and a two-layer MLP on the same steps."""
    found = {}
    for kind in ("linear", "mlp2x_gelu"):
        set_seed(seed)
        model, processor = bench.compose("mlp", projector_type=kind)
        losses = bench.learn(model, processor, seed)
        parameters = sum(parameter.numel() for parameter in model.bridge.parameters())
        found[kind] = {"loss": last(losses), "parameters": parameters, "right": bench.right(model, processor)}
    return found


def shot_batch(bench: Bench, processor, rows: list[list[int]], tasks: list[str]) -> dict:
    """Drawings in a row, each with the answer that a task has for it.

    Args:
        bench: The pictures.
        processor: The model's processor.
        rows: Numbers of the drawings of each row, all of one length.
        tasks: The task of each row.

    Returns:
        A batch whose labels are the answers and ends.
    """
    features, shown = bench.drawings
    tokenizer, image = processor.tokenizer, processor.image_token * num_placeholders(processor)
    ids, labels = [], []
    for row, task in zip(rows, tasks):
        parts = [f"{image} output {shown[place][task]} {END}" for place in row]
        ids.append([token for part in parts for token in tokenizer(part, add_special_tokens=False)["input_ids"]])
        learned = ids[-1].copy()
        length = len(learned) // len(row)
        labels.append([token if place % length >= length - 2 else -100 for place, token in enumerate(learned)])
    flat = [place for row in rows for place in row]
    return {
        "input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), len(ids[0]), dtype=torch.long),
        "labels": torch.tensor(labels), "patch_features": features[flat].float(),
    }  # fmt: skip


def shots(bench: Bench, seed: int, tested: int = 300) -> dict:
    """Whether examples tell a model which of two tasks is meant."""
    num_known = len(bench.drawings[1]) - bench.new_drawings
    kinds = {
        "Perceiver, interleaved": ("perceiver", True),
        "Q-Former, single pairs": ("qformer", False),
        "Q-Former, interleaved": ("qformer", True),
    }
    found = {}
    for name, (bridge, interleaved) in kinds.items():
        set_seed(seed)
        model, processor = bench.compose(bridge)

        def batch(number: int, processor=processor, interleaved=interleaved) -> dict:
            rng = random.Random(f"{seed}:{number}")
            length = rng.randint(1, MOST_SHOTS + 1) if interleaved else 1
            count = max(1, 2 * bench.batch_size // length)  # as many pictures per step for all
            rows = [rng.sample(range(num_known), length) for _ in range(count)]
            return shot_batch(bench, processor, rows, [rng.choice(TASKS) for _ in rows])

        losses = learn(model, bench.steps, batch)
        found[name] = {"loss": last(losses)}
        for count in SHOTS:
            rng, hits = random.Random(seed), []
            for start in range(0, tested, 20):
                rows = [rng.sample(range(num_known), count) + [rng.randrange(num_known, num_known + bench.new_drawings)]
                        for _ in range(min(20, tested - start))]  # fmt: skip
                given = shot_batch(bench, processor, rows, [rng.choice(TASKS) for _ in rows])
                wanted = given.pop("labels")[:, -2]
                with torch.inference_mode():
                    hits += (model(**given).logits[:, -3].argmax(dim=-1) == wanted).tolist()
            found[name][f"{count} shots"] = round(statistics.mean(hits), 4)
    return found


def likeness(model, features: torch.Tensor) -> dict[str, float]:
    """How alike queries are, on average over pictures and pairs of queries.

    Returns:
        `looks`: overlap of where two queries look, from 0 to 1; `says`: cosine similarity of their visual tokens, of
        which what all have in common is taken away; `rank`: how many directions the tokens of a picture span.
    """
    inputs = {"patch_features": features}
    tokens = visual_tokens(model, inputs)
    maps = patch_attention(bridge_attention(model, inputs), features.shape[1])
    overlap = torch.minimum(maps[:, :, None], maps[:, None]).sum(dim=-1)
    alike = similarity_within(tokens - tokens.mean(dim=(0, 1)))
    return {
        "looks": round(mean_off_diagonal(overlap).mean().item(), 4),
        "says": round(mean_off_diagonal(alike).mean().item(), 4),
        "rank": round(effective_rank(tokens).mean().item(), 2),
    }


def queries(bench: Bench, seed: int) -> dict:
    """How alike queries are before and after training."""
    set_seed(seed)
    model, processor = bench.compose("qformer")
    some = bench.scenes["new"].features[:64].float()
    before = likeness(model.eval(), some)
    bench.learn(model, processor, seed)
    return {"before": before, "after": likeness(model, some), "right": bench.right(model, processor)}


def tokens(bench: Bench, seed: int) -> dict:
    """Q-Formers with few and many queries."""
    found = {}
    for count in (1, 4, 16):
        set_seed(seed)
        model, processor = bench.compose("qformer", qformer_config={"num_query_tokens": count})
        losses = bench.learn(model, processor, seed)
        found[str(count)] = {"loss": last(losses), "right": bench.right(model, processor)}
    return found


CLAIMS = {one.__name__: one for one in (gates, stage1, projector, shots, queries, tokens)}


def main(
    output: Annotated[
        Path | None, typer.Option(help="JSON file with the figures; claims that it has are kept.")
    ] = None,
    claims: Annotated[str, typer.Option(help="Which, with commas between.")] = ",".join(CLAIMS),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Of each bridge, 16 pictures each.")] = 600,
    reader_steps: Annotated[int, typer.Option(min=1, help="Of the language model, 32 texts each.")] = 1200,
    pictures: Annotated[int, typer.Option(min=32, help="Scenes to train on.")] = 3000,
    folder: Annotated[Path, typer.Option(help="For the reader and stage 1.")] = Path("claims"),
) -> None:
    """Test claims, and write what came of it after each run."""
    if unknown := set(claims.split(",")) - set(CLAIMS):
        raise typer.BadParameter(
            f"{', '.join(sorted(unknown))}; expected of {', '.join(CLAIMS)}", param_hint="--claims"
        )
    transformers.logging.set_verbosity_error()
    reader = folder / "reader"
    report: dict = json.loads(output.read_text()) if output is not None and output.is_file() else {}
    if not (reader / "config.json").is_file():
        report["reader_right"] = make_reader(reader, reader_steps)
    report |= {"date": datetime.date.today().isoformat(), "versions": versions(), "steps": steps, "pictures": pictures}
    report["reader_parameters"] = AutoModelForCausalLM.from_pretrained(reader).num_parameters()
    bench = Bench(reader, pictures, steps)
    for name in claims.split(","):
        runs = report.setdefault(name, [])
        for seed in range(len(runs), seeds):
            started = time.time()
            runs.append({"seed": seed, **CLAIMS[name](bench, seed), "seconds": round(time.time() - started)})
            print(name, json.dumps(runs[-1]), flush=True)
            if output is not None:
                write_json(output, report)


if __name__ == "__main__":
    typer.run(main)
