"""The engine behind `vlbridge serve --engine transformers`: one model, a queue, and a thread that answers in batches.

`transformers serve` can run the families too, but loads whatever model a client names, answers bad requests with 500
and goes on generating for clients that have left; its server has no public place to change that.
"""

from __future__ import annotations

import copy
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from ..inference import load
from ..prompts import ImageCache, PromptMaker, whole_prompts
from .serving_requests import ChatRequest, Limits, RequestError


HELD_PICTURES = 16  # pictures of the largest size that requests may hold in memory, all together
# Encoded pictures that are kept for further questions about them, for all bridges together: how many, and bytes
KEPT_PICTURES, KEPT_BYTES = 256, 1 << 28


@dataclass(eq=False)
class Job:
    """A request in the queue.

    Args:
        request: What is asked.
        bridge: Name of the bridge that answers.
        prompt: The templated prompt.
        images: Its pictures.
        prompt_tokens: Its length, in tokens, pictures included.
        on_text: Called in the engine's thread with each new piece of text, for streams.
    """

    request: ChatRequest
    bridge: str
    prompt: str
    images: list
    prompt_tokens: int
    on_text: Callable[[str], None] | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: Future = field(default_factory=Future)
    seconds: float = 0.0  # that its batch took, once it is answered

    @property
    def pixels(self) -> int:
        """Size of its pictures, which are held in memory until it is answered."""
        return sum(image.width * image.height for image in self.images)

    @property
    def kind(self) -> tuple:
        """Jobs of one kind can be answered in one batch: one that samples or streams is alone."""
        options = self.request.options
        if options["do_sample"] or "stop_strings" in options or self.on_text is not None:
            return (id(self),)
        return self.bridge, bool(self.images)


@dataclass(eq=False)
class Call:
    """A function that wants the model for itself; it stands in the queue like a request.

    Args:
        function: The function.
    """

    function: Callable[[], Any]
    cancelled: threading.Event = field(default_factory=threading.Event)
    done: Future = field(default_factory=Future)
    pixels: int = 0

    @property
    def kind(self) -> tuple:
        """It is alone in its batch."""
        return (id(self),)


@dataclass(frozen=True)
class Answer:
    """An answer.

    Args:
        text: Its text.
        completion_tokens: Its length, in tokens.
        finish_reason: `"stop"`, or `"length"` if it was cut off.
    """

    text: str
    completion_tokens: int
    finish_reason: str


class _Ended(StoppingCriteria):
    """Ends the rows that have their own maximum or whose client has left, and all of them when time is up.

    Args:
        jobs: The job of each row.
        prompt_length: Tokens before the answer; 1 for encoder-decoders.
        deadline: When time is up, as `time.monotonic` tells it; infinity for never.
    """

    def __init__(self, jobs: list[Job], prompt_length: int, deadline: float):
        self.jobs = jobs
        self.prompt_length = prompt_length
        self.deadline = deadline

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        """Which rows end, `(rows,)`."""
        length = input_ids.shape[1] - self.prompt_length
        late = time.monotonic() >= self.deadline
        ended = [late or job.cancelled.is_set() or length >= job.request.max_new_tokens for job in self.jobs]
        return torch.tensor(ended, device=input_ids.device)


class _Pieces(TextStreamer):
    """Hands new text to a job.

    Args:
        tokenizer: The tokenizer.
        job: The job.
        skip_prompt: Whether the prompt comes first.
    """

    def __init__(self, tokenizer, job: Job, skip_prompt: bool):
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.job = job

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called with each new piece of text."""
        if text:
            self.job.on_text(text)


class Engine:
    """A model that answers chat requests, batch by batch, in a thread of its own.

    Args:
        model: Folder or Hub id; `None` takes the embedded bridge.
        bridges: Further bridges on the same parts, by name: folders or Hub ids of bridge checkpoints.
        name: What requests call the model.
        device: Where to put it, as for `vlbridge.inference.load`.
        dtype: Its precision, as for `vlbridge.inference.load`.
        limits: What requests may ask for.
        max_batch: Most requests that are answered together.

    Raises:
        FrozenPartError: A bridge was trained with other parts.
    """

    def __init__(
        self,
        model: str | None = None,
        bridges: Mapping[str, str] | None = None,
        name: str = "vlbridge",
        device: str | None = None,
        dtype: str | None = None,
        limits: Limits | None = None,
        max_batch: int = 8,
    ):
        self.limits = limits or Limits()
        self.model, self.processor = load(model, device, dtype)
        self.name, self.base = name, self.model.active_bridge
        for bridge, place in (bridges or {}).items():
            self.model.add_bridge(bridge, place)
        # Every bridge makes other visual tokens of a picture
        share, kept = KEPT_BYTES // len(self.model.bridges), max(KEPT_PICTURES // len(self.model.bridges), 1)
        self.prompts = {
            bridge: PromptMaker(ImageCache(self.model, self.processor, share, max_images=kept))
            for bridge in self.model.bridges
        }
        self.tokenizer = copy.deepcopy(self.processor.tokenizer)  # another thread must not change the engine's settings
        self.max_batch = max_batch
        self.jobs: queue.Queue[Job | Call | None] = queue.Queue()
        self.waiting = 0  # jobs that are not answered yet, those of the running batch included
        self.pixels = 0  # of their pictures
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.thread = threading.Thread(target=self._work, name="vlbridge-engine", daemon=True)
        self.thread.start()

    # ------------------------------------------------------------------ in the server's thread

    @property
    def names(self) -> list[str]:
        """What requests may call as `model`: the base, and `base:bridge` for each further bridge."""
        return [self.name, *(f"{self.name}:{bridge}" for bridge in self.model.bridges if bridge != self.base)]

    def bridge_named(self, model: str | None) -> str:
        """The bridge that a request's model stands for.

        Args:
            model: One of `names`; `None` is the base.

        Raises:
            RequestError: There is no such model here.
        """
        if model not in (None, *self.names):
            raise RequestError(f"There is no model {model[:200]!r} here; expected {' or '.join(self.names)}.", 404)
        return self.base if model in (None, self.name) else model.removeprefix(f"{self.name}:")

    def prepare(self, request: ChatRequest, on_text: Callable[[str], None] | None = None) -> Job:
        """Make a job of a request: its prompt, checked for its length.

        Args:
            request: The request.
            on_text: Called with each new piece of text, for streams.

        Raises:
            RequestError: The chat template refuses the conversation, or the prompt is too long for the model.
        """
        parts = [part for message in request.messages for part in message["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        self.check_texts(part["text"] for part in parts if part["type"] == "text")
        try:
            prompt = self.processor.apply_chat_template(request.messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates raise whatever they like
            raise RequestError(f"The model's chat template refuses the conversation: {error}") from error
        return self.prepare_prompt(request, prompt, images, on_text)

    def check_texts(self, texts: Iterable[str]) -> None:
        """Refuse texts that contain the token which stands for a picture.

        Args:
            texts: What people have written.

        Raises:
            RequestError: One of them does.
        """
        token = self.processor.image_token
        if any(token in text for text in texts):
            raise RequestError(f"A text contains {token}, which stands for a picture here; leave it out.")

    def prepare_prompt(
        self, request: ChatRequest, prompt: str, images: list, on_text: Callable[[str], None] | None = None
    ) -> Job:
        """Make a job of a prompt that is written already, such as one with examples.

        Args:
            request: The request; its messages are not read.
            prompt: The prompt, with one placeholder per picture.
            images: The pictures.
            on_text: Called with each new piece of text, for streams.

        Raises:
            RequestError: There is no such model, or the prompt is too long for it.
        """
        bridge = self.bridge_named(request.model)
        with self.lock:
            length = len(self.tokenizer(prompt)["input_ids"])
        if images and self.model.config.visual_tokens_in_prompt:
            sizes = [(image.height, image.width) for image in images]
            length += sum(self.processor.num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]) - len(images)
        window = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if window is not None and length + request.max_new_tokens > window:
            raise RequestError(
                f"The prompt has {length} tokens, and {request.max_new_tokens} more are asked for; the model's "
                f"context has {window}. Shorten the conversation, or lower max_tokens.", 413
            )  # fmt: skip
        return Job(request, bridge, prompt, images, length, on_text)

    def call(self, function: Callable[[], Any]) -> Future:
        """Run a function in the engine's thread, when nothing else uses the model.

        Args:
            function: The function.

        Returns:
            Its result, or what it has raised.

        Raises:
            RequestError: The queue is full.
        """
        return self.submit(Call(function)).done

    def submit(self, job):
        """Put a job or a call in the queue, and return it.

        Raises:
            RequestError: The queue is full.
        """
        with self.lock:
            full = self.waiting >= self.limits.max_waiting
            if full or (self.waiting and self.pixels + job.pixels > HELD_PICTURES * self.limits.max_pixels):
                self.counts["refused"] += 1
                raise RequestError(f"{self.waiting} requests are waiting already; try again later.", 429)
            self.waiting += 1
            self.pixels += job.pixels
        self.jobs.put(job)
        return job

    def healthy(self) -> bool:
        """Whether the engine's thread is alive."""
        return self.thread.is_alive()

    def close(self) -> None:
        """End the thread after the jobs in the queue."""
        self.jobs.put(None)
        self.thread.join(timeout=60)

    # ------------------------------------------------------------------ in the engine's thread

    def _work(self) -> None:
        held: list[Job | Call] = []
        ending = False
        while not (ending and not held):
            if not held:
                job = self.jobs.get()
                if job is None:
                    return
                held.append(job)
            while True:
                try:
                    job = self.jobs.get_nowait()
                except queue.Empty:
                    break
                if job is None:
                    ending = True
                else:
                    held.append(job)
            first = held[0].kind
            batch = [job for job in held if job.kind == first][: self.max_batch]
            held = [job for job in held if job not in batch]
            if alive := [job for job in batch if self._begin(job)]:
                self._run(alive)

    def _begin(self, job: Job | Call) -> bool:
        """Whether a job's client is still there; from here on nobody else can end the job."""
        if not job.cancelled.is_set() and job.done.set_running_or_notify_cancel():
            return True
        job.done.cancel()
        self._count("cancelled", job)
        return False

    def _count(self, outcome: str, job: Job | Call, tokens: int = 0) -> None:
        with self.lock:
            self.waiting -= 1
            self.pixels -= job.pixels
            self.counts[outcome] += 1
            self.counts["tokens"] += tokens

    def _run(self, batch: list[Job]) -> None:
        """Answer a batch; if it fails, its jobs one by one, so that one does not cost the others their answers."""
        if isinstance(batch[0], Call):
            self._run_call(batch[0])
            return
        started = time.monotonic()
        try:
            answers = self._answers(batch)
        except Exception as error:
            if len(batch) > 1:
                for job in batch:
                    self._run([job])
                return
            self._count("failed", batch[0])
            batch[0].done.set_exception(error)
            return
        seconds = time.monotonic() - started
        self.counts["batches"] += 1
        self.counts["seconds"] += seconds
        for job, answer in zip(batch, answers):
            job.seconds = seconds
            self._count("cancelled" if job.cancelled.is_set() else "answered", job, answer.completion_tokens)
            job.done.set_result(answer)

    def _run_call(self, call: Call) -> None:
        try:
            result = call.function()
        except Exception as error:
            self._count("failed", call)
            call.done.set_exception(error)
            return
        self._count("called", call)
        call.done.set_result(result)

    def _answers(self, jobs: list[Job]) -> list[Answer]:
        deadline = time.monotonic() + (math.inf if self.limits.max_seconds is None else self.limits.max_seconds)
        model, processor = self.model, self.processor
        if model.active_bridge != jobs[0].bridge:
            model.set_bridge(jobs[0].bridge)
        maker = self.prompts[jobs[0].bridge]
        prompts = maker.of_templates([job.prompt for job in jobs], [job.images for job in jobs])
        inputs, images = whole_prompts(maker, prompts)
        for job, mask in zip(jobs, inputs["attention_mask"]):
            job.prompt_tokens = int(mask.sum())
        start = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        options = {
            "num_beams": 1,
            **jobs[0].request.options,
            "max_new_tokens": max(job.request.max_new_tokens for job in jobs),
        }
        if "stop_strings" in options:
            options["tokenizer"] = processor.tokenizer
        if jobs[0].on_text is not None:
            options["streamer"] = _Pieces(processor.tokenizer, jobs[0], not model.config.is_encoder_decoder)
        rows = model.generate(
            **inputs, **images, **options, stopping_criteria=StoppingCriteriaList([_Ended(jobs, start, deadline)])
        )
        return [self._answer(job, row[start:].tolist(), options) for job, row in zip(jobs, rows)]

    def _answer(self, job: Job, ids: list[int], options: dict) -> Answer:
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        ids = ids[: job.request.max_new_tokens]
        first = next((number for number, token in enumerate(ids) if token in ends), None)
        ids = ids if first is None else ids[: first + 1]
        text = self.processor.decode(ids, skip_special_tokens=True).strip()
        stopped = first is not None
        for stop in options.get("stop_strings", []):
            if stop in text:
                text, stopped = text[: text.index(stop)], True
        return Answer(text, len(ids), "stop" if stopped else "length")


__all__ = ["Answer", "Call", "Engine", "Job"]
