"""What the page `vlbridge app` does, without the page: questions to one model or several, and looking inside.

Each model has an engine of `vlbridge.serving`: a queue, and a thread that answers one question after the other. People
who use the page at the same time wait in these queues. Nothing is kept here between two questions: what a person has
said and shown comes with each of them.
"""

from __future__ import annotations

import os
import queue
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

import torch
from PIL import Image

from .demo import photograph_warning
from .images import ImageError, load_image
from .inference import model_source
from .inspection.inspection_budget import token_budget
from .inspection.inspection_drawing import overlay
from .inspection.inspection_geometry import Grid
from .inspection.inspection_looking import WordLikelihood, ids_of
from .inspection.inspection_report import PictureFindings, inspect_picture
from .serving.serving_engine import Engine, Job
from .serving.serving_requests import (
    FAILED,
    ChatRequest,
    Limits,
    RequestError,
    check_characters,
    check_pixels,
    refused,
)


# What one picture, question or answer of the page may be
PAGE_LIMITS = Limits(max_bytes=16 << 20, max_new_tokens=256, max_waiting=64, max_seconds=120.0)
POLL_SECONDS = 0.05  # how often new text is fetched
MOST_WORDS = 32  # words of an answer that are drawn
LONGEST_SIDE = 512  # of drawn words, in pixels


# ---------------------------------------------------------------------- what people give


@dataclass(frozen=True, eq=False)
class Example:
    """A picture with the answer that the model should have given, shown before the question.

    Args:
        picture: The picture.
        answer: The answer, or the caption.
        question: The question; empty for captions.
    """

    picture: Image.Image
    answer: str
    question: str = ""


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question: What was asked; empty for captions.
        answer: What the model said.
    """

    question: str
    answer: str


@dataclass(frozen=True, eq=False)
class Asked:
    """What a person wants to know.

    Args:
        picture: The picture.
        question: The question; empty asks for a caption.
        examples: Examples in the order in which they are shown.
        turns: By a model's name what was said about the picture before, for a conversation.
        max_new_tokens: Longest answer, in tokens.
    """

    picture: Image.Image
    question: str = ""
    examples: Sequence[Example] = ()
    turns: Mapping[str, Sequence[Turn]] = field(default_factory=dict)
    max_new_tokens: int = 40


def read_picture(path: str | os.PathLike, limits: Limits = PAGE_LIMITS) -> Image.Image:
    """Read a picture that somebody has sent.

    Args:
        path: Its file.
        limits: How large it may be: `max_bytes` of the file, and `max_pixels`, checked before it is decoded.

    Returns:
        The picture in mode `"RGB"`.

    Raises:
        RequestError: It is too large, or no picture; the message is that of the command line.
    """
    path = Path(path)
    try:
        size = path.stat().st_size if path.is_file() else 0
        if size > limits.max_bytes:
            raise RequestError(
                f"{path.name} has {size / 2**20:.1f} MiB; this server takes at most {limits.max_bytes / 2**20:.1f}. "
                "Make it smaller: the model scales it down anyway.", 413
            )  # fmt: skip
        check_pixels(path, path.name, limits)
        return load_image(path)
    except ImageError as error:
        raise RequestError(f"{path.name}: {error.reason}") from error


# ---------------------------------------------------------------------- models


@dataclass
class Reply:
    """What a model has said so far.

    Args:
        text: The text.
        state: `"waiting"`, `"answering"`, `"done"` or `"failed"`.
        ahead: Questions before this one, while it waits.
        error: What went wrong, in words.
        stopped: Why the answer ends early, in words; empty if it does not.
        tokens: Length of the answer, in tokens, once it is done.
        seconds: Time that it took, without waiting, once it is done.
        prompt_tokens: Length of the prompt, pictures included, in tokens.
    """

    text: str = ""
    state: str = "waiting"
    ahead: int = 0
    error: str = ""
    stopped: str = ""
    tokens: int = 0
    seconds: float = 0.0
    prompt_tokens: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more comes."""
        return self.state in ("done", "failed")


class Bridge:
    """A model of the page.

    Args:
        name: What the page calls it.
        model: Folder or Hub id; `None` takes the embedded bridge.
        device: Where to put it, as for `vlbridge.inference.load`.
        dtype: Its precision, as for `vlbridge.inference.load`.
        limits: What questions may be.

    Raises:
        ValueError: The model is not a bridged one that generates text, or there is no such device or dtype.
        OSError: There is no such model.
    """

    def __init__(
        self,
        name: str,
        model: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        limits: Limits = PAGE_LIMITS,
    ):
        self.name, self.source, self.limits = name, model_source(model), limits
        self.engine = Engine(self.source, name=name, device=device, dtype=dtype, limits=limits)

    def warning(self, picture: Image.Image, name: str = "The picture") -> str | None:
        """What to say if the model can't know such pictures, see `demo.photograph_warning`.

        Args:
            picture: The picture.
            name: What to call it.
        """
        return photograph_warning(picture, name, self.source, "vlbridge app llava")

    def job(self, asked: Asked, on_text=None) -> Job:
        """What the engine gets to do.

        Args:
            asked: What is asked.
            on_text: Called with each new piece of text.

        Raises:
            RequestError: Something is beyond the limits, or contradicts something else.
        """
        turns = asked.turns.get(self.name, ())
        if asked.examples and turns:
            raise RequestError(
                "Examples can't be shown in the middle of a conversation: take the examples away, or start over."
            )
        if len(asked.examples) >= self.limits.max_images:
            raise RequestError(f"There are more than {self.limits.max_images} pictures, the most this server takes.")
        if not 1 <= asked.max_new_tokens <= self.limits.max_new_tokens:
            raise RequestError(
                f"The longest answer is {asked.max_new_tokens} tokens; expected 1 to {self.limits.max_new_tokens}."
            )
        texts = [asked.question, *(text for turn in turns for text in (turn.question, turn.answer))]
        texts += [text for example in asked.examples for text in (example.question, example.answer)]
        check_characters(texts, self.limits)
        request = ChatRequest(None, [], asked.max_new_tokens, True, {"do_sample": False})
        if not asked.examples:
            request.messages = self.messages(asked, turns)
            return self.engine.prepare(request, on_text)
        self.engine.check_texts(texts)
        shown = [
            {"image": example.picture, "question": example.question, "answer": example.answer}
            if example.question
            else {"image": example.picture, "caption": example.answer}
            for example in asked.examples
        ]
        query = {"image": asked.picture, **({"question": asked.question} if asked.question else {})}
        prompt, images = self.engine.processor.few_shot(shown, query, tokenize=False)
        return self.engine.prepare_prompt(request, prompt, images, on_text)

    def messages(self, asked: Asked, turns: Sequence[Turn]) -> list[dict]:
        """A conversation as processors take it: the picture stands before the first question.

        Args:
            asked: What is asked now.
            turns: What was said before.
        """
        caption = self.engine.processor.caption_prompt
        messages = []
        for turn in (*turns, Turn(asked.question, "")):
            messages.append({"role": "user", "content": [{"type": "text", "text": turn.question or caption}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
        messages.pop()
        messages[0]["content"].insert(0, {"type": "image", "image": asked.picture})
        return messages

    def budget(self, asked: Asked, reply: Reply) -> dict:
        """How a prompt and its answer fill the language model's context.

        Args:
            asked: What was asked.
            reply: The reply to it.

        Returns:
            Tokens: `pictures`, `text`, `answer`, `left` (`None` without a limit) and `window`, all in positions; and
            `visual_tokens`, what the picture becomes, which some families read without positions.
        """
        config = self.engine.model.config
        rows = [
            token_budget({"": config}, size=picture.size, tokens_per_turn=0)[0]
            for picture in (asked.picture, *(example.picture for example in asked.examples))
        ]
        pictures = sum(row["prompt_tokens"] for row in rows)
        window = rows[0]["context_window"]
        return {
            "pictures": pictures,
            "text": max(reply.prompt_tokens - pictures, 0),
            "answer": reply.tokens,
            "left": None if window is None else max(window - reply.prompt_tokens - reply.tokens, 0),
            "window": window,
            "visual_tokens": rows[0]["visual_tokens"],
        }

    def look(self, picture: Image.Image, question: str, answer: str) -> Look:
        """Whether and where the model looks for each word of an answer.

        Args:
            picture: The picture.
            question: What was asked about it; empty for captions.
            answer: What the model has said.

        Raises:
            RequestError: There is no answer, the queue is full, or the model can't be looked into.
        """
        if not answer.strip():
            raise RequestError("There is no answer to look into yet.")
        model, processor = self.engine.model, self.engine.processor
        asked = question or processor.caption_prompt

        def inspect() -> PictureFindings:
            return inspect_picture(
                model, processor, "", picture, asked, ids_of(model, processor, answer), with_occlusion=False
            )

        try:
            found = self.engine.call(inspect).result()
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(in_words(error)) from error
        return Look(found.words, found.shares.tolist(), list(word_overlays(found)))

    def close(self) -> None:
        """End the engine."""
        self.engine.close()


def names_of(sources: Sequence[str | None]) -> list[str]:
    """What the page calls models: the folders' last names or ids, or whole paths where these would be the same.

    Args:
        sources: Folders and Hub ids; `None` is the embedded bridge.

    Raises:
        ValueError: One is given twice.
    """
    if len(set(sources)) < len(sources):
        twice = next(source for number, source in enumerate(sources) if source in sources[:number])
        raise ValueError(f"{twice or 'the embedded bridge'} is given twice")
    short = [
        "embedded bridge" if source is None else Path(source).resolve().name if Path(source).is_dir() else source
        for source in sources
    ]
    return [
        name if short.count(name) == 1 else str(source or model_source())
        for name, source in zip(short, sources)
    ]  # fmt: skip


def in_words(error: BaseException) -> str:
    """An error of a model as the page shows it; what it does not show goes to stderr.

    Args:
        error: The error.
    """
    if isinstance(error, RequestError):
        return str(error)
    said = refused(error)
    if said is None:
        traceback.print_exception(error, file=sys.stderr)
    return said or FAILED


# ---------------------------------------------------------------------- answers


class _Running:
    """A question that a model works on.

    Args:
        bridge: The model.
        asked: The question.
    """

    def __init__(self, bridge: Bridge, asked: Asked):
        self.reply, self.limits, self.engine = Reply(), bridge.limits, bridge.engine
        self.pieces: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.job: Job | None = None
        try:
            job = bridge.job(asked, self.pieces.put)
            self.reply.prompt_tokens = job.prompt_tokens
            self.reply.ahead = self.engine.waiting
            self.job = self.engine.submit(job)
        except (RequestError, ValueError) as error:
            self.reply.state, self.reply.error = "failed", in_words(error)

    def update(self) -> None:
        """Take over what the model has said since the last time."""
        reply, job = self.reply, self.job
        if reply.ended or job is None:
            return
        ended = job.done.done()  # before the queue is emptied: nothing is put into it after the end
        while not self.pieces.empty():
            reply.text += self.pieces.get()
        if not ended:
            reply.state = "answering" if job.done.running() else "waiting"
            reply.ahead = min(reply.ahead, max(self.engine.waiting - 1, 0))
            return
        try:
            answer = job.done.result()
        except CancelledError:
            reply.state, reply.stopped = "done", "stopped before it began"
            return
        except Exception as error:
            reply.state, reply.error = "failed", in_words(error)
            return
        reply.state, reply.text = "done", answer.text
        reply.tokens, reply.seconds, reply.prompt_tokens = answer.completion_tokens, job.seconds, job.prompt_tokens
        if answer.finish_reason == "length":
            if job.cancelled.is_set():
                reply.stopped = "stopped"
            elif answer.completion_tokens < job.request.max_new_tokens:
                reply.stopped = f"cut off after {self.limits.max_seconds:g} seconds"
            else:
                reply.stopped = f"cut off after {answer.completion_tokens} tokens"

    def stop(self) -> None:
        """End the answer at the next token, or take the question out of the queue."""
        if self.job is not None:
            self.job.cancelled.set()


def replies(bridges: Sequence[Bridge], asked: Asked, stop: Event | None = None) -> Iterator[dict[str, Reply]]:
    """Ask one model, or several at the same time, and follow what they say.

    Args:
        bridges: The models.
        asked: What to ask. Conversations differ by model.
        stop: Ends the answers when it is set.

    Yields:
        The replies by the models' names, whenever one of them has changed; at last with all of them ended. What goes
        wrong with one model is in its reply, and the others go on.
    """
    running = {bridge.name: _Running(bridge, asked) for bridge in bridges}
    found = {name: each.reply for name, each in running.items()}
    try:
        seen = None
        while True:
            for each in running.values():
                each.update()
            if (now := repr(found)) != seen:
                yield found
                seen = now
            if all(reply.ended for reply in found.values()):
                return
            if stop is not None and stop.is_set():
                for each in running.values():
                    each.stop()
            time.sleep(POLL_SECONDS)
    finally:
        for each in running.values():  # the person has left
            each.stop()


# ---------------------------------------------------------------------- looking inside


@dataclass(frozen=True, eq=False)
class Look:
    """Whether and where a model looks for each word of an answer.

    Args:
        words: How likely each word is with the picture, and with a grey one.
        shares: How much of the language model's attention lies on the picture, for each word, from 0 to 1.
        overlays: Words, and the picture with their attention over it.
    """

    words: list[WordLikelihood]
    shares: list[float]
    overlays: list[tuple[str, Image.Image]]


def word_overlays(found: PictureFindings) -> Iterator[tuple[str, Image.Image]]:
    """Draw where a model looks for each word that it looks for.

    Args:
        found: From `inspect_picture`.

    Yields:
        The word, and the picture, at most `LONGEST_SIDE` pixels long, with the attention over it.
    """
    small = found.picture.copy()
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    across, down = small.width / found.picture.width, small.height / found.picture.height
    grids = [
        Grid((left * across, top * down, right * across, bottom * down), grid.tokens)
        for grid in found.grids
        for left, top, right, bottom in [grid.box]
    ]
    for word, weights in list(zip(found.words, found.word_maps))[:MOST_WORDS]:
        if float(torch.as_tensor(weights).sum()) > 0:
            yield word.word or "(space)", overlay(small, weights, grids)


__all__ = [
    "PAGE_LIMITS",
    "Asked",
    "Bridge",
    "Example",
    "Look",
    "Reply",
    "Turn",
    "in_words",
    "names_of",
    "read_picture",
    "replies",
]
