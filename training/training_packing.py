"""Packing: several samples in one row, each as if it stood alone.

- Samples stand one after the other, each with its own images. A token sees its own sample only, and positions start
  at zero in each.
- Questions about one picture share what they have in common, mainly the picture: every question is a branch after the
  shared prefix, and sees the prefix and itself.

A packed batch gives the loss and the gradients that it gives unpacked: the same samples, the same learned tokens, with
less padding or none. So batches stay as they were, and only become fewer rows: a `per_device_train_batch_size` of 64
with `max_tokens: 2048` may be 64 samples in 5 rows.

Rows need a mask that says which token sees which, and `"sdpa"` and `"eager"` take one. Flash attention takes lengths of
samples instead (`cu_seq_lens_q` in transformers) and can't express branches: it is refused, not approximated.
"""

from __future__ import annotations

import torch
from torch.utils.data import get_worker_info

from ..compat import attention_of
from .training_encoding import IGNORED, Encoder, SampleError, checked_kind
from .training_features import FeatureStore, PreparedEncoder


ROW_NAMES = ("input_ids", "labels", "position_ids", "branch_ids", "segment_ids")  # of a sample, `(tokens,)` each
MAX_WORKERS = 256


# ---------------------------------------------------------------------- samples


def common_prefix(sequences: list[list[int]]) -> int:
    """Length of the longest common prefix."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({ids[i] for ids in sequences}) > 1), shortest)


def share_prefix(sequences: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Several sequences with the same beginning as one sample: the shared prefix once, and a branch for each.

    Args:
        sequences: `(input_ids, labels)` of each, the labels as long as the ids and -100 where nothing is learned.

    Returns:
        `input_ids`, `labels`, `position_ids` and `branch_ids` (0 for the shared prefix, else the sequence's number from
        1), each `(tokens,)`.
    """
    # the token before the first learned one stays in its branch, as it predicts that one
    shared = common_prefix([ids for ids, _ in sequences])
    for ids, labels in sequences:
        first = next((place for place, label in enumerate(labels) if label != IGNORED), len(ids))
        shared = min(shared, max(first - 1, 0))
    input_ids, labels = list(sequences[0][0][:shared]), [IGNORED] * shared
    position_ids, branch_ids = list(range(shared)), [0] * shared
    for number, (ids, learned) in enumerate(sequences, start=1):
        input_ids += ids[shared:]
        labels += learned[shared:]
        position_ids += range(shared, len(ids))
        branch_ids += [number] * (len(ids) - shared)
    sample = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "branch_ids": branch_ids}
    return {name: torch.tensor(values) for name, values in sample.items()}


def append_pairs(pairs: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """Prompts with the same beginning, and their answers, as one sample.

    Args:
        pairs: Token ids of `(prompt, answer)`. The answer's tokens are learned, the prompt's are not.

    Returns:
        The sample, see `share_prefix`.
    """
    return share_prefix([([*prompt, *answer], [IGNORED] * len(prompt) + list(answer)) for prompt, answer in pairs])


def _complete(sample: dict) -> dict[str, torch.Tensor]:
    """What a row holds of each token of one sample, `(tokens,)` each; `next_ids` is what the token predicts.

    The last token of a branch or sample predicts nothing and no other token sees it: if it was learned, it is left out.
    """
    ids, labels = sample["input_ids"], sample["labels"]
    tokens, zeros = torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.long)
    row = {
        "input_ids": ids,
        "position_ids": sample.get("position_ids", tokens),
        "branch_ids": sample.get("branch_ids", zeros),
        "segment_ids": sample.get("segment_ids", zeros),
    }
    begins = torch.ones(len(ids) + 1, dtype=torch.bool)  # of a branch or segment; one more after the last token
    begins[1:-1] = (row["branch_ids"].diff() != 0) | (row["segment_ids"].diff() != 0)
    row["next_ids"] = torch.nn.functional.pad(labels[1:], (0, 1), value=IGNORED).masked_fill(begins[1:], IGNORED)
    kept = ~(begins[1:] & (labels != IGNORED))
    return {name: values[kept] for name, values in row.items()}


# ---------------------------------------------------------------------- rows


def first_fit(lengths: list[int], max_tokens: int | None) -> list[list[int]]:
    """Put samples in rows: each goes to the first row that has room for it.

    Args:
        lengths: Number of tokens of each sample.
        max_tokens: Longest row; a longer sample has a row of its own. `None`: all in one row.

    Returns:
        Numbers of the samples of each row, in their order.
    """
    rows: list[list[int]] = []
    used: list[int] = []
    for number, length in enumerate(lengths):
        for row, total in enumerate(used):
            if max_tokens is None or total + length <= max_tokens:
                rows[row].append(number)
                used[row] += length
                break
        else:
            rows.append([number])
            used.append(length)
    return rows


def packed_mask(segment_ids: torch.Tensor, branch_ids: torch.Tensor) -> torch.Tensor:
    """Which tokens a token sees: earlier ones of the same sample, in its shared prefix and in the same branch.

    Args:
        segment_ids: `(batch, tokens)`: the sample that a token belongs to, -1 for padding.
        branch_ids: `(batch, tokens)`: 0 for a sample's shared prefix, else the branch's number.

    Returns:
        Bool, `(batch, 1, tokens, tokens)`, true where attention is allowed. Padding sees padding.
    """
    same_segment = segment_ids[:, :, None] == segment_ids[:, None]
    same_branch = (branch_ids[:, :, None] == branch_ids[:, None]) | (branch_ids[:, None] == 0)
    return (same_segment & same_branch).tril()[:, None]


class PackedCollator:
    """Makes packed rows of samples; logits are computed only where something is learned.

    Args:
        max_tokens: Longest row, in tokens; `None` puts all samples in one row.

    Raises:
        ValueError: `max_tokens` is not positive.
    """

    def __init__(self, max_tokens: int | None = None):
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; expected a positive number of tokens, or None.")
        self.max_tokens = max_tokens
        # per worker, in memory that all processes share: batches, samples, rows, tokens, places of the packed rows, and
        # places of the same batches unpacked
        self._counts = torch.zeros(MAX_WORKERS, 6, dtype=torch.int64).share_memory_()

    def order(self, samples: list[dict]) -> list[list[int]]:
        """Numbers of the samples of each row; images have to be in this order, too."""
        return first_fit([len(_complete(sample)["input_ids"]) for sample in samples], self.max_tokens)

    def rows(self, samples: list[dict], order: list[list[int]]) -> dict[str, torch.Tensor]:
        """Everything of a batch except its images.

        Args:
            samples: Samples with `input_ids` and `labels`, `(tokens,)`, and what `share_prefix` gives.
            order: The samples of each row, from `order`.

        Returns:
            `input_ids`, `position_ids` and `segment_ids`, `(rows, tokens)`; `attention_mask`, `(rows, 1, tokens,
            tokens)`; `logits_to_keep`, the columns where a row learns something, the last one twice; `shift_labels`,
            what is predicted there, `(rows, columns)`; `labels`, the same one column later: who shifts labels, as
            `Trainer` does to smooth them, compares the same.
        """
        fillers = {"input_ids": 0, "position_ids": 0, "branch_ids": 0, "segment_ids": -1, "next_ids": IGNORED}
        columns: dict[str, list] = {name: [] for name in fillers}
        for numbers in order:
            parts, segments = [_complete(samples[number]) for number in numbers], 0
            for part in parts:
                part["segment_ids"] = part["segment_ids"] + segments
                segments = int(part["segment_ids"].max()) + 1 if len(part["segment_ids"]) else segments
            for name, values in columns.items():
                values.append(torch.cat([part[name] for part in parts]))
        row = {
            name: torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fillers[name])
            for name, values in columns.items()
        }
        self._count(samples, columns["input_ids"], row["input_ids"])
        learned = (row["next_ids"] != IGNORED).any(dim=0).nonzero()[:, 0]
        if not len(learned):  # of no columns there would be no mean
            learned = learned.new_zeros(1)
        next_ids = torch.nn.functional.pad(row["next_ids"][:, learned], (0, 1), value=IGNORED)
        return {
            "input_ids": row["input_ids"],
            "position_ids": row["position_ids"],
            "segment_ids": row["segment_ids"],
            "attention_mask": packed_mask(row["segment_ids"], row["branch_ids"]),
            "logits_to_keep": torch.cat([learned, learned[-1:]]),
            "labels": next_ids.roll(1, dims=1),
            "shift_labels": next_ids,
            "use_cache": False,
        }

    def __call__(self, samples: list[dict]) -> dict:
        """Rows with their images, each sample having `patch_features` `(num_patches, vision_dim)` of its one image."""
        order = self.order(samples)
        features = [samples[number]["patch_features"] for numbers in order for number in numbers]
        return {**self.rows(samples, order), "patch_features": torch.stack(features)}

    # ------------------------------------------------------------------ counting

    def _count(self, samples: list[dict], rows: list[torch.Tensor], padded: torch.Tensor) -> None:
        info = get_worker_info()
        worker = 0 if info is None else info.id + 1
        alone = [length for sample in samples for length in _lengths_alone(sample)]
        counts = [1, len(alone), len(rows), sum(map(len, rows)), padded.numel(), len(alone) * max(alone)]
        self._counts[min(worker, MAX_WORKERS - 1)] += torch.tensor(counts)

    def savings(self) -> dict[str, float]:
        """What packing has saved so far, in all workers of this process.

        Returns:
            `batches`, `samples` (one per question), `rows`, `tokens`, `padding`: places of the packed rows without a
            token, and `places_saved`: the share of the places that the same batches would have had, unpacked and
            padded.
        """
        batches, samples, rows, tokens, places, unpacked = self._counts.sum(dim=0).tolist()
        return {
            "batches": batches, "samples": samples, "rows": rows, "tokens": tokens, "padding": places - tokens,
            "places_saved": 1 - places / max(unpacked, 1),
        }  # fmt: skip


def _lengths_alone(sample: dict) -> list[int]:
    """Tokens of each sequence in a sample, if it stood in a row of its own."""
    branches, segments = sample.get("branch_ids"), sample.get("segment_ids")
    if segments is not None:
        return torch.bincount(segments).tolist()
    if branches is None:
        return [len(sample["input_ids"])]
    counts = torch.bincount(branches).tolist()
    return [counts[0] + count for count in counts[1:]]


# ---------------------------------------------------------------------- records


def check_packable(model, max_tokens: int | None = None) -> None:
    """Refuse models whose results for packed samples would differ from those for single ones.

    Args:
        model: The model.
        max_tokens: Longest row, in tokens.

    Raises:
        ValueError: The model can't be trained on packed rows; the message says why.
    """
    config = model.config
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "language_model", None) is None:
        raise ValueError("Packing puts texts for a language model in one row; stage 1 of Q-Former BLIP-2 has none.")
    name = type(base.language_model).__name__
    if config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder: packing is for decoder-only language models. Leave packing out."
        )
    text_config = base.language_model.config.get_text_config()
    if "position_ids" not in base._language_model_arguments or getattr(text_config, "alibi", False):
        raise ValueError(
            f"{name} does not use position_ids: it would count positions from the row's beginning, not from the "
            "sample's. Leave packing out."
        )
    if (attention := attention_of(text_config)) not in ("sdpa", "eager"):
        raise ValueError(
            f"The language model's attn_implementation is {attention!r}: packed rows need a mask of their own, which "
            "only 'sdpa' and 'eager' take. Call model.language_model.set_attn_implementation('sdpa'), or leave packing "
            "out."
        )
    window = getattr(text_config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(text_config, "layer_types", None) or ["sliding_attention"])
    if window and slides and getattr(text_config, "use_sliding_window", True) and window < (max_tokens or window + 1):
        raise ValueError(
            f"{name} has attention over a window of {window} tokens, which packed rows do not have. Set max_tokens to "
            f"{window} at most, or leave packing out."
        )


def independent(record: dict) -> list[dict]:
    """The questions of a conversation as conversations of their own.

    Each begins with the system's message and the images that were shown up to it.

    Args:
        record: A record with `messages`: the system's first, if there is one, then user and assistant in turn.
    """
    messages = record["messages"]
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns, found, shown = messages[len(system) :], [], 0
    for question, answer in zip(turns[::2], turns[1::2]):
        before = [{"type": "image", "text": None}] * shown
        shown += sum(item["type"] == "image" for item in question["content"])
        asked = {**question, "content": [*before, *question["content"]]}
        found.append({**record, "images": record["images"][:shown], "messages": [*system, asked, answer]})
    return found


class PackedEncoder(PreparedEncoder):
    """An encoder whose batches are packed.

    Args:
        encoder: The model's encoder, from `encoder_for`.
        model: The model; it is only read.
        max_tokens: Longest row, in tokens; a longer sample has a row of its own.
        independent_turns: The questions of a conversation don't see each other: each is answered from the images alone.
            They follow the images as branches.
        store: Where features of images are, see `FeatureCache`.

    Raises:
        ValueError: The model can't be trained on packed rows, see `check_packable`.
    """

    def __init__(
        self,
        encoder: Encoder,
        model,
        max_tokens: int,
        independent_turns: bool = False,
        store: FeatureStore | None = None,
    ):
        super().__init__(encoder, store)
        check_packable(model, max_tokens)
        self.packer, self.independent_turns = PackedCollator(max_tokens), independent_turns

    def encode(self, record: dict) -> dict:
        """Model inputs of one record; with `independent_turns`, of all its questions together.

        Args:
            record: The record, see `training_encoding`.

        Returns:
            As `PreparedEncoder.encode`; several questions are merged into one sample, see `merge`.

        Raises:
            SampleError: Nothing can be learned from it.
        """
        if not self.independent_turns or checked_kind(record) != "messages":
            return super().encode(record)
        prepared, samples, problem = self.prepare(record), [], None
        for part in independent(record):
            try:
                samples.append(self.encode_prepared(part, prepared[: len(part["images"])]))
            except SampleError as error:
                problem = error
        if not samples:
            raise problem
        return samples[0] if len(samples) == 1 else self.merge(samples)

    def merge(self, samples: list[dict]) -> dict:
        """Merge samples about the same images into one.

        They become branches after a shared prefix that holds the images, or, if they don't share one, follow each
        other as segments.

        Args:
            samples: What `encode_prepared` gave for each of them.
        """
        sequences = [(sample["input_ids"].tolist(), sample["labels"].tolist()) for sample in samples]
        shared = share_prefix(sequences)
        own = {name: value for name, value in samples[0].items() if name not in ROW_NAMES}
        after = (shared["input_ids"] == self.image_token_id) & (shared["branch_ids"] > 0)
        if not bool(after.any()) and all(_same_images(own, sample) for sample in samples[1:]):
            return {**own, **shared}
        merged = {name: torch.cat([sample[name] for sample in samples]) for name in ("input_ids", "labels")}
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        merged["position_ids"] = torch.cat([torch.arange(length) for length in lengths.tolist()])
        merged["segment_ids"] = torch.arange(len(samples)).repeat_interleave(lengths)
        merged["images"] = [image for sample in samples for image in sample["images"]]
        for name in ("patch_features", *self.image_arguments):
            if given := [sample[name] for sample in samples if name in sample]:
                merged[name] = self.join_images(name, given)
        return merged

    def collate(self, samples: list[dict]) -> dict:
        """Rows, see `PackedCollator.rows`, and the images in the order in which they stand there."""
        order = self.packer.order(samples)
        batch = super().collate([samples[number] for numbers in order for number in numbers])
        return {**batch, **self.packer.rows(samples, order)}


def _same_images(one: dict, other: dict) -> bool:
    """Whether two samples have the same images, and what else the bridge reads with them."""
    if one.get("images") != other.get("images"):
        return False
    names = [name for name, value in one.items() if name != "images" and isinstance(value, torch.Tensor)]
    return all(name in other and torch.equal(one[name], other[name]) for name in names)


__all__ = [
    "PackedCollator",
    "PackedEncoder",
    "append_pairs",
    "check_packable",
    "common_prefix",
    "first_fit",
    "independent",
    "packed_mask",
    "share_prefix",
]
