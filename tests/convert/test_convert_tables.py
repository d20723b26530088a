"""Tables: full matches only, nothing unmapped, and the same table for the way back."""

from __future__ import annotations

import pytest
import torch

from vlbridge.convert.convert_tables import ConversionError, Drop, Fuse, Rename, Split, check, invert, plan


TABLE = [
    Rename("body.{}.norm.weight", "layers.{}.layer_norm.weight"),
    Split("body.{}.qkv", ("layers.{}.q", "layers.{}.k", "layers.{}.v")),
    Fuse(("head.up", "head.gate"), "head.fused"),
    Drop("body.{}.cache", "a buffer"),
]
TENSORS = {
    "body.0.norm.weight": torch.arange(2.0),
    "body.0.qkv": torch.arange(12.0).reshape(6, 2),
    "body.10.norm.weight": torch.ones(2),
    "body.10.qkv": torch.ones(6, 2),
    "body.10.cache": torch.zeros(()),
    "head.up": torch.ones(1, 2),
    "head.gate": torch.zeros(2, 2),
}


def converted(table, tensors):
    return {name: piece.load(tensors.__getitem__) for name, piece in plan(table, tensors).items()}


def test_there_and_back():
    there = converted(TABLE, TENSORS)
    assert set(there) == {
        *(f"layers.{n}.{part}" for n in (0, 10) for part in ("layer_norm.weight", "q", "k", "v")),
        "head.fused",
    }
    assert there["layers.0.k"].tolist() == [[4, 5], [6, 7]]
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, piece in plan(TABLE, TENSORS).items():
        assert piece.shape(shapes) == tuple(there[name].shape)
    # parts of one size are split again; this Fuse's are not, so that its way back is another table's business
    back = converted(invert(TABLE[:2]), {name: tensor for name, tensor in there.items() if name != "head.fused"})
    assert back.keys() == {name for name in TENSORS if "body" in name and "cache" not in name}
    for name, tensor in back.items():
        assert torch.equal(tensor, TENSORS[name])
    assert invert([Drop("a", "why")]) == []


@pytest.mark.parametrize(
    "table, keys, message",
    [
        (TABLE, ["body.0.norm.weight.extra"], "no conversion table: body.0.norm.weight.extra"),
        (TABLE, ["xbody.0.norm.weight"], "no conversion table"),
        ([Rename("a.{}", "b.{}"), Rename("a.1", "c")], ["a.1"], "matched by 2 rules"),
        ([Rename("a", "c"), Rename("b", "c")], ["a", "b"], "c is given twice: by a and by b"),
        (TABLE, ["head.up"], "Parts are missing of head.fused"),
    ],
)
def test_what_does_not_fit_is_refused(table, keys, message):
    with pytest.raises(ConversionError, match=message):
        plan(table, keys)


@pytest.mark.parametrize(
    "given, message",
    [({"a": (1,)}, "1 tensors are missing: b"), ({"a": (1,), "b": (2,), "c": ()}, "no place in the model: c"),
     ({"a": (1,), "b": (3,)}, r"b is \[3\], expected \[2\]")],
)  # fmt: skip
def test_check_is_loud(given, message):
    check({"a": (1,), "b": (2,)}, {"a": (1,), "b": (2,)}, "it")
    with pytest.raises(ConversionError, match=message):
        check(given, {"a": (1,), "b": (2,)}, "it")
