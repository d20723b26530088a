"""Packing: many short answers behind one shared prefix, each as if it stood alone."""

from __future__ import annotations

import torch


def common_prefix(sequences: list[list[int]]) -> int:
    """Length of the longest common prefix."""
    shortest = min(map(len, sequences))
    return next((i for i in range(shortest) if len({ids[i] for ids in sequences}) > 1), shortest)


def pack(pairs: list[tuple[list[int], list[int]]]) -> dict:
    """Pack prompts that begin alike, and their answers, into one row.

    Args:
        pairs: Token ids of `(prompt, answer)`. The answer's tokens are learned, the prompt's are not.

    Returns:
        `input_ids`, `position_ids`, `branch_ids` (0 for the shared prefix, else the pair's number) and `next_ids` (the
        token to predict at each position, -100 where nothing is learned), each `(tokens,)`.
    """
    # One token of every prompt stays in its branch, so that the first answer token is predicted from there.
    shared = min(common_prefix([prompt for prompt, _ in pairs]), min(len(prompt) for prompt, _ in pairs) - 1)
    input_ids, position_ids = list(pairs[0][0][:shared]), list(range(shared))
    branch_ids, next_ids = [0] * shared, [-100] * shared
    for number, (prompt, answer) in enumerate(pairs, start=1):
        branch = [*prompt[shared:], *answer[:-1]]
        input_ids += branch
        position_ids += range(shared, shared + len(branch))
        branch_ids += [number] * len(branch)
        next_ids += [-100] * (len(prompt) - shared - 1) + list(answer)
    packed = {"input_ids": input_ids, "position_ids": position_ids, "branch_ids": branch_ids, "next_ids": next_ids}
    return {name: torch.tensor(values) for name, values in packed.items()}


def branch_mask(branch_ids: torch.Tensor) -> torch.Tensor:
    """Who sees whom: everybody the prefix, and what came before in the same branch.

    Args:
        branch_ids: `(tokens,)`.

    Returns:
        Bool, `(1, 1, tokens, tokens)`, true where attention is allowed.
    """
    same = (branch_ids[:, None] == branch_ids[None]) | (branch_ids[None] == 0)
    return same.tril()[None, None]


class PackedCollator:
    """One packed row to model inputs; logits are computed where something is learned, nowhere else."""

    def __call__(self, rows: list[dict]) -> dict:
        if len(rows) != 1:
            raise ValueError(
                f"A step takes one packed row, got {len(rows)}: use gradient accumulation for larger batches."
            )
        row = rows[0]
        learned = (row["next_ids"] != -100).nonzero()[:, 0]
        return {
            "input_ids": row["input_ids"][None],
            "position_ids": row["position_ids"][None],
            "attention_mask": branch_mask(row["branch_ids"]),
            "patch_features": row["patch_features"][None],
            "logits_to_keep": learned,
            "labels": row["next_ids"][learned][None],  # counted by the trainer
            "shift_labels": row["next_ids"][learned][None],
            "use_cache": False,
        }


__all__ = ["PackedCollator", "branch_mask", "common_prefix", "pack"]
