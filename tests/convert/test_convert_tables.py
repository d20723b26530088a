"""Tables: names match in full, no key is left over, and one table serves both directions."""

from __future__ import annotations

import pytest
import torch

from vlbridge.convert.convert_tables import (
    ConversionError,
    Drop,
    Fuse,
    Missing,
    Rename,
    Reshape,
    Split,
    Twin,
    ZeroKeyBias,
    check,
    dropped,
    invert,
    plan,
    twins,
)


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


def test_both_directions():
    there = converted(TABLE, TENSORS)
    assert set(there) == {
        *(f"layers.{n}.{part}" for n in (0, 10) for part in ("layer_norm.weight", "q", "k", "v")),
        "head.fused",
    }
    assert there["layers.0.k"].tolist() == [[4, 5], [6, 7]]
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, piece in plan(TABLE, TENSORS).items():
        assert piece.shape(shapes) == tuple(there[name].shape)
    # equal parts can be split again; those of this Fuse are not equal
    back = converted(invert(TABLE[:2]), {name: tensor for name, tensor in there.items() if name != "head.fused"})
    assert back.keys() == {name for name in TENSORS if "body" in name and "cache" not in name}
    for name, tensor in back.items():
        assert torch.equal(tensor, TENSORS[name])
    assert invert([Drop("a", "why")]) == []


@pytest.mark.parametrize(
    "rule",
    [
        Rename("a.{}", "b.{}"),
        Split("a", ("b", "c")),
        Fuse(("a", "b"), "c"),
        Reshape("a", "b", (), (1,)),
        Twin("a", "b"),
        ZeroKeyBias(("q.{}", "v.{}"), "qkv.{}"),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_rules_know_their_inverse(rule):
    assert rule.inverse() != rule and rule.inverse().inverse() == rule
    longer = rule.renamed(lambda name: f"source.{name}", lambda name: f"target.{name}")
    assert all(name.startswith("source.") for name in longer.source_names)
    assert all(name.startswith("target.") for name in longer.inverse().source_names)


def test_scalars_in_both_directions():
    table, tensors = [Reshape("temp", "temperature", (), (1,))], {"temp": torch.tensor(0.07)}
    there = converted(table, tensors)
    assert there["temperature"].tolist() == [tensors["temp"].item()]
    assert plan(table, tensors)["temperature"].shape({"temp": ()}) == (1,)
    assert torch.equal(converted(invert(table), there)["temp"], tensors["temp"])
    with pytest.raises(ConversionError, match=r"temp is \[1\], expected \[\]"):
        plan(table, tensors)["temperature"].shape({"temp": (1,)})


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
def test_keys_that_do_not_fit_are_refused(table, keys, message):
    with pytest.raises(ConversionError, match=message):
        plan(table, keys)


@pytest.mark.parametrize(
    "given, message",
    [({"a": (1,)}, "1 tensors are missing: b"), ({"a": (1,), "b": (2,), "c": ()}, "no place in the model: c"),
     ({"a": (1,), "b": (3,)}, r"b is \[3\], expected \[2\]")],
)  # fmt: skip
def test_check_raises(given, message):
    check({"a": (1,), "b": (2,)}, {"a": (1,), "b": (2,)}, "it")
    with pytest.raises(ConversionError, match=message):
        check(given, {"a": (1,), "b": (2,)}, "it")


def test_second_copies_and_missing_tensors():
    table = [Rename("a", "b"), Twin("copy", "b"), Missing("c", "it has none"), Drop("old", "a buffer")]
    assert twins(table, ["a", "copy"]) == {"copy": "b"}
    assert dropped(table, ["a", "old"]) == {"old": "a buffer"}
    assert set(plan(table, ["a", "copy", "old"])) == {"b"}
    back = invert(table)
    assert dropped(back, ["b", "c"]) == {"c": "it has none"}
    tensors = {"b": torch.ones(2), "c": torch.zeros(1)}
    assert {name: tensor.tolist() for name, tensor in converted(back, tensors).items()} == {"a": [1, 1], "copy": [1, 1]}
