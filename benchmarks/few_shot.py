"""Questions per second at 4 to 32 shots, with demonstrations that are run once and with full prompts, for all families.

    python benchmarks/few_shot.py --output benchmarks/results/few_shot.json
    python benchmarks/few_shot.py --size tiny --queries 2 --rounds 1                             # to try the script

Every query has the same demonstrations, a picture of its own and a short question, and gets an answer of a few tokens.

- shared: `FewShotAnswerer.answer`, a new one for every number of shots; what it does once (encoding the demonstrations
  and running them through the language model) is timed by itself, and is not in the questions per second;
- encoded: `answer_with`: full prompts, whose pictures are encoded once;
- full: `answer_few_shot`: full prompts, all pictures of every query, which is what there was before.

The weights are random; the shapes are those of small real models. All sides must give the same answers, or the exit
code is 1. Times are medians over rounds in which the sides take turns, so that a busy moment hits all of them. The full
sides answer fewer queries, because each takes so long.
"""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import statistics
import string
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, PreTrainedTokenizerFast

import vlbridge
from vlbridge.few_shot import FewShotAnswerer, answer_with
from vlbridge.inference import answer_few_shot
from vlbridge.prompts import ImageCache


SHOTS = (4, 8, 16, 32)
WORDS = [f"w{number}" for number in range(500)]
# Vision encoder, language model and options of the bridges. "small": ViT-S/32 (49 patches), and SmolLM2-135M's width
# with 12 of its 30 layers.
SIZES = {
    "small": (
        dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536, image_size=224,
             patch_size=32),
        dict(hidden_size=576, num_hidden_layers=12, num_attention_heads=9, num_key_value_heads=3,
             intermediate_size=1536),
        {
            "mlp": {},
            "qformer": {"qformer_config": dict(hidden_size=384, num_attention_heads=6, intermediate_size=1536,
                                               num_hidden_layers=6, num_query_tokens=32)},
            "perceiver": {"resampler_depth": 2, "cross_attention_every_n_layers": 3},
        },
    ),
    "tiny": (
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32,
             patch_size=8),
        dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64),
        {
            "mlp": {},
            "qformer": {"qformer_config": dict(hidden_size=32, num_attention_heads=4, intermediate_size=64,
                                               num_hidden_layers=2, num_query_tokens=8)},
            "perceiver": {"resampler_depth": 1, "cross_attention_every_n_layers": 3, "num_latents": 8},
        },
    ),
}  # fmt: skip


def word_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    known = {token: index for index, token in enumerate([*special, *WORDS, *string.punctuation, "Question", "Short",
                                                         "answer", "USER", "ASSISTANT"])}  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def build(family: str, size: str):
    vision, language, bridges = SIZES[size]
    torch.manual_seed(0)
    model, processor = vlbridge.compose(
        CLIPVisionConfig(**vision, projection_dim=32),
        LlamaConfig(**language, vocab_size=1000, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2,
                    pad_token_id=0),
        family, tokenizer=word_tokenizer(), **bridges[family],
    )  # fmt: skip
    for name, parameter in model.named_parameters():  # open gates, so that pictures matter
        if name.endswith("_gate.weight"):
            parameter.data.fill_(0.5)
    return model.eval(), processor


def picture(seed: int, side: int) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (6, 6, 3), generator=generator, dtype=torch.uint8).numpy()
    return Image.fromarray(coarse).resize((side, side))


def turns(first: int, count: int, side: int, answered: bool) -> list[dict]:
    """Five words of question and one of answer, about pictures of their own."""
    made = []
    for number in range(first, first + count):
        words = [WORDS[(7 * number + place) % len(WORDS)] for place in range(5)]
        turn = {"image": picture(number, side), "question": " ".join(words) + " ?"}
        made.append({**turn, "answer": WORDS[number % len(WORDS)]} if answered else turn)
    return made


def timed(function: Callable, *args, **kwargs) -> tuple:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    answers = function(*args, **kwargs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, answers


def measure(model, processor, shots: int, queries: int, full_queries: int, rounds: int, batch_size: int, tokens: int):
    """Questions per second of every side at one number of shots."""
    side = processor.output_size()[0]
    demonstrations = turns(0, shots, side, answered=True)
    asked = turns(1000, queries, side, answered=False)
    options = {"max_new_tokens": tokens, "eos_token_id": None}
    first, few = asked[:1], asked[:full_queries]

    def prepared():
        answerer = FewShotAnswerer(model, processor, demonstrations, **options)
        answerer.answer(first)
        return answerer

    seconds: dict[str, list[float]] = {"once": [], "shared": [], "encoded": [], "full": []}
    agree = True
    for _ in range(rounds):
        once, answerer = timed(prepared)
        # a cache of its own, so that pictures of queries are encoded again in every round
        answerer.images = answerer.maker.images = ImageCache(model, processor)
        shared, answers = timed(answerer.answer, asked, batch_size)
        cache = ImageCache(model, processor)
        cache.encode([each["image"] for each in demonstrations])
        given = (model, processor, [demonstrations] * len(few), few)
        encoded, of_encoded = timed(answer_with, *given, batch_size=batch_size, image_cache=cache, **options)
        full, of_full = timed(answer_few_shot, *given, batch_size=batch_size, **options)
        agree &= answers[: len(few)] == of_encoded == of_full
        for name, value in (("once", once), ("shared", shared), ("encoded", encoded), ("full", full)):
            seconds[name].append(value)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rates = {"shared": queries / medians["shared"], **{name: len(few) / medians[name] for name in ("encoded", "full")}}
    return {
        "shots": shots,
        "prefix_tokens": len(answerer.prefix.ids),
        "seconds_once": round(medians["once"], 3),
        "questions_per_second": {name: round(rate, 3) for name, rate in rates.items()},
        "shared_over_full": round(rates["shared"] / rates["full"], 2),
        "shared_over_encoded": round(rates["shared"] / rates["encoded"], 2),
        "same_answers": agree,
    }


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file to write the result to.")] = None,
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "small",
    queries: Annotated[int, typer.Option(min=1, help="Queries per round, with shared demonstrations.")] = 16,
    full_queries: Annotated[int, typer.Option(min=1, help="Queries per round, with full prompts.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Queries per batch.")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens per answer.")] = 4,
    device: Annotated[str, typer.Option(help="Where to run.")] = "cpu",
    family: Annotated[list[str] | None, typer.Option(help="Families; by default all.")] = None,
) -> None:
    """Measure, and print or write the result."""
    families, agree = {}, True
    for name in family or vlbridge.FAMILIES:
        model, processor = build(name, size)
        model.to(device)
        families[name] = []
        for shots in SHOTS:
            found = measure(model, processor, shots, queries, full_queries, rounds, batch_size, tokens)
            families[name].append(found)
            agree &= found["same_answers"]
            print(f"{name:10} {json.dumps(found)}", file=sys.stderr, flush=True)
        del model
    place = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU: {platform.machine()}"
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"{place}, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "command": shlex.join(["python", "benchmarks/few_shot.py", *sys.argv[1:]]),
        "size": size,
        "queries": queries,
        "queries_of_full_prompts": min(full_queries, queries),
        "rounds": rounds,
        "batch_size": batch_size,
        "tokens_per_answer": tokens,
        "families": families,
    }
    text = json.dumps(result, indent=2) + "\n"
    if output is None:
        print(text)
    else:
        output.write_text(text)
    if not agree:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
