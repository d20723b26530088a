"""Let a Q-Former or a Perceiver begin with what a trained MLP bridge tells the language model.

A bridge that begins with nothing learns from the language model's loss alone, of which almost nothing says what is in
the picture. But an MLP bridge has already found words for pictures that the language model reads. So:

- `exemplars`: of some pictures of each colour and shape, the visual tokens with which the MLP is answered best;
- `imitate_tokens`: a Q-Former learns to say these for every picture of the same colour and shape, and of other pictures
  what the MLP says of them. The language model does not run;
- `imitate_layers`: a Perceiver's visual tokens are not read as words, but change hidden states. What they have to
  change is known from the language model's hidden states with the exemplars and without, and each cross-attention
  layer learns its share of it by itself. The language model runs once about each question, and forward only.

Then come steps on the language model's loss. After 300 of them a Perceiver named 95 % of colours in new drawings; one
that had only been warmed up named at most 23 %.
"""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from dataclasses import dataclass

import torch
from easy_vqa import conversation, kind_of
from tqdm import tqdm
from transformers import DynamicCache

from vlbridge.compat import cache_argument
from vlbridge.modeling.modeling_flamingo import decoder_layers
from vlbridge.training.training_easy_vqa import caption_of


CANDIDATES = 10  # pictures of which an exemplar is the best
ASKED = {"color": 3, "shape": 3, "yes/no, shown": 12, "yes/no, absent": 12}  # of each candidate, beside the caption


class Drawings:
    """Training drawings by what they show, a thing of one colour and shape, with all that is asked about such.

    Args:
        data: Of `three_bridges.py`.
        caption: The question for a caption, and how the answer begins.

    Attributes:
        rows: Of each thing, its pictures' places in the data.
        captions: Of each thing, question and answer.
        questions: Of each thing, all others with their answers.
    """

    def __init__(self, data, caption: tuple[str, str]):
        rows, asked = defaultdict(list), defaultdict(set)
        for row, example in enumerate(data.easy[: len(data.easy) - data.held_back]):
            if (thing := caption_of(example)) is not None:
                rows[thing].append(row)
                asked[thing].update(example.questions)
        question, begin = caption
        self.rows = [rows[thing] for thing in sorted(rows)]
        self.captions = [(question, f"{begin} {thing}.") for thing in sorted(rows)]
        self.questions = [sorted(asked[thing]) for thing in sorted(rows)]


@torch.no_grad()
def exemplars(teacher, questions, drawings: Drawings, seed: int = 0) -> torch.Tensor:
    """The visual tokens of each thing with which a bridge is answered best, of a few pictures.

    Args:
        teacher: A trained model whose visual tokens stand among the words.
        questions: Asks it, of `three_bridges.py`.
        drawings: The pictures.
        seed: Of pictures and questions.

    Returns:
        `(things, num_tokens, text_dim)`.
    """
    rng, best = random.Random(seed), []
    for rows, asked, caption in zip(tqdm(drawings.rows, "exemplars"), drawings.questions, drawings.captions):
        by_kind = defaultdict(list)
        for pair in asked:
            by_kind[kind_of(*pair)].append(pair)
        pairs = [caption]
        for kind, count in ASKED.items():
            pairs += rng.sample(by_kind[kind], min(count, len(by_kind[kind])))
        losses = []
        for row in rng.sample(rows, min(CANDIDATES, len(rows))):
            features = questions.data.features(questions.data.easy_maps[row][None])
            loss = teacher(**questions.batch([questions.sample(features[0], pairs)])).loss
            losses.append((loss.item(), row))
        row = min(losses)[1]
        best.append(teacher.bridge(questions.data.features(questions.data.easy_maps[row][None]))[0])
    return torch.stack(best).float()


def imitate_tokens(
    model, teacher, data, examples: torch.Tensor, drawings: Drawings, steps: int, learning_rate: float
) -> None:
    """Let a bridge give the teacher's visual tokens.

    Args:
        model: A model with as many visual tokens as the teacher.
        teacher: A trained MLP bridge.
        data: Of `three_bridges.py`.
        examples: From `exemplars`: what is given of drawings.
        drawings: The same as there.
        steps: Of 24 drawings, 4 scenes and 12 maps of photographs.
        learning_rate: The highest.
    """
    known = [(row, thing) for thing, rows in enumerate(drawings.rows) for row in rows]
    rows, things = torch.tensor(known).unbind(dim=1)
    parameters = [*model.bridge.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    num_scenes = len(data.scene_maps) - data.held_back
    bar = tqdm(range(steps), desc="imitating tokens", unit="step")
    for _ in bar:
        one = torch.randint(len(rows), (24,))
        others = [
            data.scene_maps[torch.randint(num_scenes, (4,))],
            data.maps.maps[data.usable[torch.randint(len(data.usable), (12,))]],
        ]
        given = model.bridge(data.features(data.easy_maps[rows[one]], *others))
        with torch.no_grad():
            said = teacher.bridge(data.head.features(torch.cat(others).float()))
        wanted = torch.cat([examples[things[one]], said])
        # relative: the language model's first layer norm makes all tokens equally large
        away = (given - wanted).square().sum(dim=-1) / wanted.square().sum(dim=-1)  # (40, num_tokens)
        step_down(away.mean(), parameters, optimizer, schedule)
        bar.set_postfix(drawings=f"{away[:24].mean().item():.3f}", others=f"{away[24:].mean().item():.3f}")


def step_down(loss: torch.Tensor, parameters: list, optimizer, schedule) -> None:
    """One step of an optimizer, with clipped gradients."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


@dataclass
class States:
    """Hidden states of some questions about one thing and their answers, behind the picture.

    Args:
        thing: Number of what is shown.
        mask: Whether there is a token, `(questions, tokens)`; the first one is `<image>`.
        answers: Whether a token has to give the next token of an answer, `(questions, tokens)`.
        without: What comes into each conditioned layer if no picture is seen between it and the conditioned layer
            before, `(layers, questions, tokens, text_dim)`.
        seen: What comes into it with the exemplar's visual tokens, of the same shape.
    """

    thing: int
    mask: torch.Tensor
    answers: torch.Tensor
    without: torch.Tensor
    seen: torch.Tensor


class Watched:
    """Notes what comes into decoder layers, and can put something else in its place."""

    def __init__(self, language_model, places: list[int]):
        self.noted: dict[int, torch.Tensor] = {}
        self.instead: dict[int, torch.Tensor] = {}
        layers = decoder_layers(language_model)
        self.handles = [layers[place].register_forward_pre_hook(self.hook(place), with_kwargs=True) for place in places]

    def hook(self, place: int):
        def watch(module, args, kwargs):
            kwargs = dict(kwargs)
            states = args[0] if args else kwargs.pop("hidden_states")
            self.noted[place] = states
            return (self.instead.get(place, states), *args[1:]), kwargs

        return watch

    def remove(self) -> None:
        """Leave the layers as they were."""
        for handle in self.handles:
            handle.remove()


@torch.no_grad()
def layer_states(
    model, processor, examples: torch.Tensor, drawings: Drawings, per_thing: int, seed: int = 0
) -> list[States]:
    """Hidden states with and without a picture, at the layers that a Perceiver conditions.

    `<image>` stands for one visual token of the other bridge, the last one.

    Args:
        model: A Perceiver-Flamingo.
        processor: Its processor.
        examples: From `exemplars`.
        drawings: The same as there.
        per_thing: Questions about each thing, beside the caption.
        seed: Of the questions.
    """
    every, decoder = model.config.cross_attention_every_n_layers, model.language_model.model
    places = [every * (number + 1) - 1 for number in range(len(model.bridge.cross_attention_layers))]
    tokenizer, rng, found = processor.tokenizer, random.Random(seed), []

    def text_around(question: str) -> list[list[int]]:
        text = processor.apply_chat_template(conversation(question), add_generation_prompt=True)
        return [tokenizer(part, add_special_tokens=False)["input_ids"] for part in text.split(processor.image_token)]

    embed = model.language_model.get_input_embeddings()
    before = text_around("")[0]
    image_row = model.bridge.token_rows.fill(
        examples.new_zeros(1, 1, examples.shape[-1]), torch.tensor([[model.config.image_token_id]])
    )
    watched = Watched(model.language_model, places)

    def run(embeds: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> dict[int, torch.Tensor]:
        """What comes into the watched layers when a cache of one row is continued."""
        cache = copy.deepcopy(cache)
        length = cache.get_seq_length()
        cache.batch_repeat_interleave(len(embeds))
        mask = torch.cat([mask.new_ones(len(embeds), length), mask], dim=1)
        positions = torch.arange(length, mask.shape[1]).expand(len(embeds), -1)
        watched.noted = {}
        decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **cache_argument(cache))
        return watched.noted

    prefix = DynamicCache(config=decoder.config)
    decoder(input_ids=torch.tensor([before]), **cache_argument(prefix))
    for thing, tokens in enumerate(tqdm(examples[:, None], "hidden states")):
        shown = copy.deepcopy(prefix)
        watched.instead = {}
        decoder(inputs_embeds=tokens, **cache_argument(shown))
        last = {place: watched.noted[place][:, -1:] for place in places}
        asked = drawings.questions[thing]
        pairs = [drawings.captions[thing], *rng.sample(asked, min(per_thing, len(asked)))]
        texts = [
            (text_around(question)[1], tokenizer(answer, add_special_tokens=False)["input_ids"])
            for question, answer in pairs
        ]
        texts = [(ask, [*answer, tokenizer.eos_token_id]) for ask, answer in texts]
        texts.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        for start in range(0, len(texts), 24):
            some = texts[start : start + 24]
            ids = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(ask + answer) for ask, answer in some], batch_first=True
            )
            place = torch.arange(ids.shape[1])
            asks, ends = (torch.tensor(sizes)[:, None] for sizes in zip(*((len(a), len(a) + len(b)) for a, b in some)))
            mask, answers = place < ends, (place >= asks - 1) & (place < ends - 1)
            embeds = embed(ids)
            watched.instead = {}
            seen = run(embeds, mask.long(), shown)
            seen = {place: torch.cat([last[place].expand(len(some), -1, -1), seen[place]], dim=1) for place in places}
            mask = torch.nn.functional.pad(mask, (1, 0), value=True)
            answers = torch.nn.functional.pad(answers, (1, 0))
            watched.instead = seen
            without = run(torch.cat([image_row.expand(len(some), -1, -1), embeds], dim=1), mask.long(), prefix)
            both = (torch.stack([states[place] for place in places]).half() for states in (without, seen))
            found.append(States(thing, mask, answers, *both))
    watched.remove()
    return found


ANSWERS = 3.0  # how much more tokens that have to give an answer weigh in the loss


def imitate_layers(
    model, data, states: list[States], drawings: Drawings, steps: int, rates: tuple[float, float], seed: int = 0
) -> None:
    """Let every cross-attention layer change hidden states as visual tokens among the words would change them.

    Args:
        model: A Perceiver-Flamingo.
        data: Of `three_bridges.py`.
        states: From `layer_states`.
        drawings: The same as there.
        steps: Of four times eight questions, each about another picture.
        rates: Highest learning rates of cross-attention layers and of the resampler.
        seed: Of what is drawn.
    """
    layers, rng = model.bridge.cross_attention_layers, random.Random(seed)
    parts = [[*layers.parameters()], [*model.bridge.resampler.parameters()]]
    optimizer = torch.optim.AdamW(
        [{"params": part, "lr": rate} for part, rate in zip(parts, rates)], betas=(0.9, 0.98), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, list(rates), total_steps=steps, pct_start=0.05)
    bar = tqdm(range(steps), desc="imitating layers", unit="step")
    for _ in bar:
        chosen = rng.choices(states, k=4)
        picked = [rng.sample(range(len(one.mask)), min(8, len(one.mask))) for one in chosen]
        rows = [rng.choice(drawings.rows[one.thing]) for one, some in zip(chosen, picked) for _ in some]
        visual_tokens = model.bridge(data.features(data.easy_maps[rows])).split([len(some) for some in picked])
        shares = []  # of what a picture changes, what each layer leaves undone
        for one, some, tokens in zip(chosen, picked, visual_tokens):
            mask = one.mask[some]
            weight = mask + ANSWERS * one.answers[some]
            allowed = torch.ones(*mask.shape, tokens.shape[1], dtype=torch.bool)
            for layer, without, seen in zip(layers, one.without[:, some].float(), one.seen[:, some].float()):
                given = layer(without, *layer.project(tokens), allowed, torch.ones_like(mask))
                left, whole = ((states - seen).square().sum(dim=-1) * weight for states in (given, without))
                shares.append(left.sum() / whole.sum())
        shares = torch.stack(shares)
        step_down(shares.mean(), parts[0] + parts[1], optimizer, schedule)
        bar.set_postfix(left=", ".join(f"{share:.2f}" for share in shares.view(len(chosen), -1).mean(dim=0).tolist()))
