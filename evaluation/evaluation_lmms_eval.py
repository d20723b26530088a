"""The model `vlbridge` of lmms-eval, which finds it by an entry point of this package.

    lmms-eval --model vlbridge --model_args pretrained=FOLDER --tasks gqa --batch_size 8

Nothing else in this package imports this module: it needs lmms-eval.

Source: the chat models of lmms-eval 0.7.3, such as `lmms_eval/models/chat/huggingface.py`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from lmms_eval.api.model import lmms
from tqdm import tqdm
from transformers import GenerationConfig

from ..few_shot import answer_with
from ..inference import generate_texts, load
from ..prompts import ImageCache
from .evaluation_tasks import Asking


FORMS = ("chat", "few_shot")
MAX_NEW_TOKENS = 256  # for tasks that set no limit
SAMPLING = ("temperature", "top_k", "top_p")

logger = logging.getLogger(__name__)


def manifest():
    """What lmms-eval's entry point `lmms_eval.models` asks for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vlbridge", chat_class_path=f"{__name__}.VLBridge")


# ---------------------------------------------------------------------- messages


def _text_or_file(given: str | None) -> str | None:
    """A text, or what the file of that name holds."""
    return Path(given).read_text(encoding="utf-8").strip() if given and os.path.isfile(given) else given


def few_shot_messages(demonstrations: Sequence[dict], query: dict) -> list[dict]:
    """Messages that show demonstrations before a query, for a task's `doc_to_messages`.

    lmms-eval's own demonstrations (`num_fewshot`) are texts without pictures. `vlbridge.few_shot.draw` and
    `vlbridge.ImageIndex` choose demonstrations.

    Args:
        demonstrations: In the order in which they are shown, each `{"image", "question", "answer"}`; without `"image"`
            one is text only.
        query: `{"image", "question"}`.

    Returns:
        Messages in lmms-eval's form.
    """
    messages = []
    for turn in (*demonstrations, query):
        content = [{"type": "image", "url": turn["image"]}] if turn.get("image") is not None else []
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": turn["question"]}]})
        if "answer" in turn:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn["answer"]}]})
    return messages


def conversation_of(messages: Sequence[dict], system_prompt: str | None = None) -> list[dict]:
    """Bring lmms-eval's messages into the form of transformers' chat templates.

    Args:
        messages: What a task's `doc_to_messages` returns.
        system_prompt: Said first, instead of the messages' own system prompt.

    Raises:
        ValueError: A message has something else than texts and images.
    """
    conversation = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if other := [part["type"] for part in parts if part["type"] not in ("text", "image")]:
            raise ValueError(f"the task gives {other[0]} to read; expected texts and images, which are all that "
                             "vlbridge's models take.")  # fmt: skip
        parts = [
            {"type": "image", "image": part.get("url")} if part["type"] == "image" else dict(part) for part in parts
        ]
        conversation.append({"role": message["role"], "content": parts})
    if system_prompt:
        own = bool(conversation) and conversation[0]["role"] == "system"
        said = {"role": "system", "content": [{"type": "text", "text": system_prompt}]}
        conversation = [said, *conversation[own:]]
    return conversation


def turns_of(conversation: Sequence[dict]) -> tuple[list[dict], dict]:
    """The demonstrations and the query of a conversation, as `processor.few_shot` takes them.

    Args:
        conversation: Questions of the user, each with at most one image, with the assistant's answers between them.

    Raises:
        ValueError: It is no such conversation.
    """
    roles = [message["role"] for message in conversation]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise ValueError(
            f"form=few_shot reads questions and answers that end with a question; the task has messages of "
            f"{', '.join(roles) or 'nobody'}. Use form=chat, without a system prompt."
        )
    turns: list[dict] = []
    for message in conversation:
        images = [part["image"] for part in message["content"] if part["type"] == "image"]
        text = "\n".join(part["text"] for part in message["content"] if part["type"] == "text")
        if message["role"] == "assistant":
            turns[-1]["answer"] = text
            continue
        if len(images) > 1:
            raise ValueError(f"form=few_shot takes one image per question; the task has {len(images)}. Use form=chat.")
        turns.append({**({"image": images[0]} if images else {}), "question": text})
    return turns[:-1], turns[-1]


# ---------------------------------------------------------------------- generation


def generation_options(given: dict, max_new_tokens: int = MAX_NEW_TOKENS) -> tuple[dict, tuple[str, ...]]:
    """Arguments of `generate`, and where answers end, from a task's `generation_kwargs`.

    Args:
        given: The task's. A temperature above 0 means sampling, unless `do_sample` says otherwise.
        max_new_tokens: Limit where the task sets none.

    Raises:
        ValueError: The task wants several answers at once.
    """
    options = {name: value for name, value in given.items() if value is not None}
    until = options.pop("until", ())
    until = (until,) if isinstance(until, str) else tuple(until)
    limit = options.pop("max_gen_toks", max_new_tokens)
    options.setdefault("max_new_tokens", limit)
    if options.get("num_return_sequences", 1) != 1:
        raise ValueError(
            f"num_return_sequences is {options['num_return_sequences']}; expected 1. For several answers per question "
            "use lmms-eval's --repeats."
        )
    if unknown := sorted(set(options) - set(vars(GenerationConfig()))):
        logger.warning(f"generate() takes no {', '.join(unknown)}; ignored, as these are not for vlbridge's models.")
        options = {name: value for name, value in options.items() if name not in unknown}
    temperature = options.get("temperature")
    samples = options.get("do_sample", bool(temperature)) and temperature != 0
    if not samples:
        options = {name: value for name, value in options.items() if name not in SAMPLING}
    return {**options, "do_sample": samples}, tuple(text for text in until if text)


class VLBridge(lmms):
    """lmms-eval's door to bridged models of every family.

    Args:
        pretrained: Folder or Hub id; by default the embedded bridge.
        batch_size: Questions per batch.
        device: Where to put the model; by default cuda, else mps, else cpu, and each process' own with several.
        dtype: By default float32 on the cpu and bfloat16 on other devices.
        form: `"chat"`: the language model's own format; `"few_shot"`: the family's few-shot prompt, of which messages
            between user and assistant are the demonstrations.
        system_prompt: A text, or a file that holds it.
        max_new_tokens: Limit for tasks that set none, in tokens.
        max_batch_size: Not used; lmms-eval passes it on.

    Raises:
        ValueError: An argument can't be used, or it is not a bridged model that generates text.
        OSError: There is no such model.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | os.PathLike | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        form: str = "chat",
        system_prompt: str | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected a number, at least 1.")
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; expected one of {', '.join(FORMS)}.")
        if form == "few_shot" and system_prompt:
            raise ValueError("form=few_shot has no place for a system prompt. Use form=chat.")
        self.batch_size, self.form, self.max_new_tokens = int(batch_size), form, int(max_new_tokens)
        self.system_prompt = _text_or_file(system_prompt)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if device is None and self._world_size > 1:
            device = str(self.accelerator.device)
        self.model, self.processor = load(pretrained, device, dtype)
        self.device = self.model.device
        self._images: ImageCache | None = None

    def _answer(self, conversations: list[list[dict]], generation: dict) -> list[str]:
        """Answers of one batch."""
        options, until = generation_options(generation, self.max_new_tokens)
        if self.form == "few_shot":
            if self._images is None:
                self._images = ImageCache(self.model, self.processor)
            demonstrations, queries = zip(*map(turns_of, conversations))
            texts = answer_with(
                self.model, self.processor, demonstrations, queries,
                batch_size=len(queries), image_cache=self._images, **options,
            )  # fmt: skip
        else:
            inputs = self.processor.apply_chat_template(
                conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
                processor_kwargs={"padding": True},
            )  # fmt: skip
            texts = generate_texts(self.model, self.processor, inputs, **options)
        return [Asking(stop_at=until).cut(text) for text in texts]

    def _document(self, request):
        _, _, _, number, task, split = request.args
        return self.task_dict[task][split][number]

    def clean(self) -> None:
        """Free the model and what was kept of images, after all requests."""
        self._images = None
        super().clean()

    # ------------------------------------------------------------------ lmms-eval's methods

    def generate_until(self, requests: list) -> list[str]:
        """Answer requests, in batches of those with the same `generation_kwargs`.

        Args:
            requests: lmms-eval's, of chat tasks.

        Returns:
            One text per request.

        Raises:
            ValueError: A task has something else than texts and images, or settings that can't be used.
        """
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(number)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=self.rank != 0, desc="vlbridge") as bar:
            for numbers in alike.values():
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    conversations = [
                        conversation_of(requests[number].args[1](self._document(requests[number])), self.system_prompt)
                        for number in batch
                    ]
                    for number, text in zip(batch, self._answer(conversations, requests[batch[0]].args[2])):
                        texts[number] = text
                        context, _, generation, *_ = requests[number].args
                        self.cache_hook.add_partial("generate_until", (context, generation), text)
                    bar.update(len(batch))
        return texts

    def generate_until_multi_round(self, requests: list) -> list[list[str]]:
        """Answer requests whose later questions depend on earlier answers.

        Args:
            requests: lmms-eval's, of chat tasks.

        Returns:
            Per request the texts of all rounds.

        Raises:
            ValueError: A task has something else than texts and images, or settings that can't be used.
        """
        answered = []
        for request in tqdm(requests, disable=self.rank != 0, desc="vlbridge"):
            _, messages_of, generation, *_ = request.args
            document, texts, about = self._document(request), [], None
            messages = messages_of(document)
            while messages is not None:
                conversation = conversation_of(messages, self.system_prompt)
                texts += self._answer([conversation], generation)
                following = messages_of(
                    document, round_idx=len(texts), previous_output=list(texts), previous_round_info=about
                )
                messages = None
                if isinstance(following, tuple) and len(following) == 4 and not following[1]:
                    messages, _, _, about = following
            answered.append(texts)
        return answered

    def loglikelihood(self, requests: list) -> list[tuple[float, bool]]:
        """Not for chat models: lmms-eval asks these to generate only.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "lmms-eval asks chat models for no likelihoods. To rank answers use `vlbridge evaluate --method rank`."
        )


__all__ = ["VLBridge", "conversation_of", "few_shot_messages", "generation_options", "manifest", "turns_of"]
