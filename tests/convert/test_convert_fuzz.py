"""Seeded corruptions of checkpoints: each is refused by name, or changes nothing; none runs code, crashes or leaves
files behind.

The real converters run on the parity cases, whose checkpoints are written in other layouts and then damaged. "Refused"
is one `ConversionError` that names the tensor or the file; "changes nothing" is an output that is the same bit by bit
(padding in a zip, tensors that are not used).

What can't be known: a flipped bit in the numbers of a safetensors file or of `torch.save`'s old format, which have no
checksums, as long as the number stays finite; and whatever makes another valid model, such as one latent less in a
resampler (`FREE`). Flipped bits in today's format of `torch.save` are all found: its CRC-32s are compared.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from vlbridge.cli import app
from vlbridge.convert import ConversionError, convert_blip, convert_blip2, convert_llava, convert_openflamingo
from vlbridge.convert.convert_files import TensorFiles


CASES = Path(__file__).parents[1] / "parity" / "cases"
BLIP, STAGE1 = CASES / "blip" / "blip_caption_itm", CASES / "blip2" / "stage1_qformer"
LLAVA, FLAMINGO = CASES / "llava" / "v16_anyres", CASES / "openflamingo" / "of9b_mpt_every4_trainlayout_frozenemb"
CLIP = json.loads((FLAMINGO / "meta.json").read_text())["config"]["clip"]["vision_cfg"]
HEADS = {"num_attention_heads": 4}
SETTINGS = {  # what shapes don't tell
    "blip": {"vision_config": HEADS, "text_config": HEADS},
    "blip2": {"vision_config": HEADS, "qformer_config": HEADS},
    "openflamingo": {"vision_config": {"num_attention_heads": CLIP["width"] // CLIP["head_width"]}},
}

# converters, given a checkpoint and a folder to write to
CONVERTERS = {
    "blip": lambda checkpoint, output: convert_blip(
        checkpoint,
        output,
        BLIP / "bert-base-uncased",
        SETTINGS["blip"],
        verify=False,
    ),
    "blip2": lambda checkpoint, output: convert_blip2(
        checkpoint,
        STAGE1 / "vit.pth",
        output=output,
        qformer_tokenizer=STAGE1 / "bert-base-uncased",
        config=SETTINGS["blip2"],
        verify=False,
    ),
    "llava": lambda checkpoint, output: convert_llava(
        checkpoint, LLAVA / "clip_vision_tower", output=output, verify=False
    ),
    "openflamingo": lambda checkpoint, output: convert_openflamingo(
        checkpoint,
        FLAMINGO / "clip_open_clip.pt",
        FLAMINGO / "base_lm",
        output,
        tokenizer=FLAMINGO / "tokenizer_base",
        config=SETTINGS["openflamingo"],
        verify=False,
    ),
}
CHECKPOINTS = {
    "blip": BLIP / "itm.pth",
    "blip2": STAGE1 / "checkpoint.pth",
    "llava": LLAVA / "checkpoint",
    "openflamingo": FLAMINGO / "checkpoint.pt",
}
WRAPPERS = {"blip": "model", "blip2": "model", "llava": None, "openflamingo": "model_state_dict"}
# tensors that alone determine a size of the model: with another length they make another valid model
FREE = {"perceiver.latents", "perceiver.frame_embs", "perceiver.media_time_embs", "query_tokens"}
FREE |= {"text_encoder.embeddings.position_embeddings.weight", "Qformer.bert.embeddings.position_embeddings.weight"}
ROUNDS = 2  # of every corruption, family and layout
COUNTS: dict[str, Counter] = {}


# ---------------------------------------------------------------------- layouts


@pytest.fixture(scope="module")
def tensors() -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for family, path in CHECKPOINTS.items():
        files = TensorFiles(path)
        found[family] = {name: files.read(name).clone() for name in files.shapes}
    return found


def lay_out(given: dict[str, torch.Tensor], folder: Path, layout: str, family: str) -> tuple[Path, Path]:
    """Write a checkpoint; returns the converter's argument, and the file that is to be damaged."""
    folder.mkdir(parents=True)
    if family == "llava":
        for path in (LLAVA / "checkpoint").iterdir():
            if not path.name.startswith("model"):
                shutil.copy(path, folder)
    stem = "pytorch_model.bin" if family == "llava" else "checkpoint.pth"
    if layout in ("zip", "legacy"):
        wrapper = WRAPPERS[family]
        content = given if wrapper is None else {wrapper: given, "epoch": 1}
        torch.save(content, folder / stem, _use_new_zipfile_serialization=layout == "zip")
        return (folder if family == "llava" else folder / stem), folder / stem
    if layout == "safetensors":
        save_file(given, folder / "model.safetensors")
        return (folder if family == "llava" else folder / "model.safetensors"), folder / "model.safetensors"
    names = sorted(given)
    where = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({name: given[name] for name in names if where[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder, folder / "model.safetensors.index.json"


def written(folder: Path) -> dict[str, tuple]:
    """Every tensor of an output, bit by bit."""
    files = TensorFiles(folder)
    return {
        name: (files.dtypes[name], files.shapes[name], files.read(name).reshape(-1).view(torch.uint8).numpy().tobytes())
        for name in files.shapes
    }


@pytest.fixture(scope="module")
def clean(tensors, tmp_path_factory):
    """By family: the conversion of an undamaged checkpoint, and the output's names for each of its keys."""
    folder = tmp_path_factory.mktemp("clean")
    found = {}
    for family in CONVERTERS:
        checkpoint, _ = lay_out(tensors[family], folder / f"{family}_in", "safetensors", family)
        done = CONVERTERS[family](checkpoint, folder / family)
        names: dict[str, list[str]] = {}
        for target, (_, piece, _) in done.pieces.items():
            for source in piece.sources:
                names.setdefault(source, []).append(target)
        found[family] = written(folder / family), names
    return found


# ---------------------------------------------------------------------- corruptions
# corruptions of tensors change the dictionary, and return the keys that they changed


def pick(rng: random.Random, given: dict, at_least: int = 0) -> str:
    return rng.choice(sorted(name for name, tensor in given.items() if tensor.dim() >= at_least))


def put(value: float, rng, given):
    key = rng.choice(sorted(name for name, tensor in given.items() if tensor.is_floating_point()))
    given[key] = given[key].clone()
    given[key].view(-1)[rng.randrange(given[key].numel())] = value
    return {key}


def cast(dtype: torch.dtype, rng, given):
    key = rng.choice(sorted(name for name, tensor in given.items() if tensor.is_floating_point()))
    given[key] = given[key].to(dtype)
    return {key}


def drop(rng, given):
    key = pick(rng, given)
    del given[key]
    return {key}


def add(rng, given):
    key = rng.choice(["extra.weight", pick(rng, given) + ".more", "module", "a/../b", "\u00e9\n", "7"])
    given[key] = torch.ones(3)
    return {key}


def misname(rng, given):
    key = pick(rng, given)
    at = rng.randrange(len(key))
    other = key[:at] + chr(ord(key[at]) ^ 1) + key[at + 1 :]
    given[other] = given.pop(key)
    return {key, other}


def swap(rng, given):
    key = pick(rng, given)
    other = rng.choice(sorted(name for name, tensor in given.items() if tensor.shape != given[key].shape))
    given[key], given[other] = given[other], given[key]
    return {key, other}


def one_row_more(rng, given):
    key = pick(rng, given, 1)
    given[key] = torch.cat([given[key], given[key][:1]])
    return {key}


def one_row_less(rng, given):
    key = rng.choice(sorted(name for name, tensor in given.items() if tensor.dim() and len(tensor) > 1))
    given[key] = given[key][:-1].clone()
    return {key}


def narrower(rng, given):
    key = rng.choice(sorted(name for name, tensor in given.items() if tensor.dim() > 1 and tensor.shape[-1] > 1))
    given[key] = given[key][..., :-1].clone()
    return {key}


def flat(rng, given):
    key = pick(rng, given, 2)
    given[key] = given[key].reshape(-1)
    return {key}


def scalar(rng, given):
    key = pick(rng, given, 1)
    given[key] = given[key].reshape(-1)[0].clone()
    return {key}


def deeper(rng, given):
    key = pick(rng, given, 1)
    given[key] = given[key][None]
    return {key}


def without_rows(rng, given):
    key = pick(rng, given, 1)
    given[key] = given[key][:0].clone()
    return {key}


OF_TENSORS = {
    "NaN": partial(put, float("nan")),
    "infinity": partial(put, float("inf")),
    "minus infinity": partial(put, float("-inf")),
    "int64": partial(cast, torch.int64),
    "int8": partial(cast, torch.int8),
    "uint8": partial(cast, torch.uint8),
    "bool": partial(cast, torch.bool),
    "float8_e4m3fn": partial(cast, torch.float8_e4m3fn),
    "float8_e5m2": partial(cast, torch.float8_e5m2),
    "missing key": drop,
    "extra key": add,
    "misnamed key": misname,
    "swapped tensors": swap,
    "one row more": one_row_more,
    "one row less": one_row_less,
    "one column less": narrower,
    "flat": flat,
    "scalar": scalar,
    "one dimension more": deeper,
    "no rows": without_rows,
}

# corruptions of bytes take the content of a file, and return another


def truncated(rng, data):
    return data[: rng.choice([1, 7, 8, 9, len(data) // 2, len(data) - 1, rng.randrange(len(data))])]


def flipped(rng, data, end=None):
    data = bytearray(data)
    data[rng.randrange(end or len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def flipped_header(rng, data):
    return flipped(rng, data, 8 + int.from_bytes(data[:8], "little"))


def flipped_length(rng, data):
    return flipped(rng, data, 8)


def header_changed(change, rng, data):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    raw = change(rng, header)
    raw = json.dumps(header).encode() if raw is None else raw
    return len(raw).to_bytes(8, "little") + raw + data[8 + length :]


def field(name, value, rng, header):
    key = rng.choice(sorted(key for key in header if key != "__metadata__"))
    header[key][name] = value(header[key][name]) if callable(value) else value


def field_gone(rng, header):
    del header[rng.choice(sorted(set(header) - {"__metadata__"}))][rng.choice(["dtype", "shape", "data_offsets"])]


def twice(rng, header):
    key = rng.choice(sorted(set(header) - {"__metadata__"}))
    return json.dumps(header)[:-1].encode() + f", {json.dumps(key)}: {json.dumps(header[key])}}}".encode()


def overlapping(rng, header):
    one, other = rng.sample(sorted(key for key in header if key != "__metadata__"), 2)
    size = header[one]["data_offsets"][1] - header[one]["data_offsets"][0]
    start = header[other]["data_offsets"][0]
    header[one]["data_offsets"] = [start, start + size]


def hidden_data(rng, data):
    return data + bytes(rng.randrange(1, 64))


def header_length(length, rng, data):
    return struct.pack("<Q", length) + data[8:]


def raw_header(raw, rng, header):
    return raw


def other_content(content, rng, data):
    return content


SAFETENSORS = {
    "truncated": truncated,
    "flipped bit in the header": flipped_header,
    "flipped bit in the header's length": flipped_length,
    "bytes behind the end": hidden_data,
    "overlapping": partial(header_changed, overlapping),
    "offsets out of range": partial(
        header_changed, partial(field, "data_offsets", lambda old: [old[0] + 10**9, old[1] + 10**9])
    ),
    "offsets reversed": partial(header_changed, partial(field, "data_offsets", lambda old: old[::-1])),
    "negative offsets": partial(header_changed, partial(field, "data_offsets", lambda old: [-old[1], -old[0]])),
    "offsets of text": partial(header_changed, partial(field, "data_offsets", ["0", "4"])),
    "one offset": partial(header_changed, partial(field, "data_offsets", [0])),
    "huge shape": partial(header_changed, partial(field, "shape", [2**62, 2**62])),
    "negative shape": partial(header_changed, partial(field, "shape", lambda old: [-1, *old[1:]])),
    "shape of fractions": partial(header_changed, partial(field, "shape", lambda old: [*map(float, old), 1.0])),
    "shape of truths": partial(header_changed, partial(field, "shape", lambda old: [*old, True])),
    "no shape": partial(header_changed, partial(field, "shape", None)),
    "unknown dtype": partial(header_changed, partial(field, "dtype", "F31")),
    "dtype of the same size": partial(header_changed, partial(field, "dtype", "I32")),
    "smaller dtype": partial(header_changed, partial(field, "dtype", "F16")),
    "dtype of another kind": partial(header_changed, partial(field, "dtype", 32)),
    "field missing": partial(header_changed, field_gone),
    "key twice": partial(header_changed, twice),
    "no object": partial(header_changed, partial(raw_header, b"[1, 2]")),
    "nested deeply": partial(header_changed, partial(raw_header, b"[" * 100_000)),
    "no UTF-8": partial(header_changed, partial(raw_header, b'{"\xff\xfe": 1}')),
    "numbers for metadata": partial(header_changed, lambda rng, header: header.update({"__metadata__": {"format": 1}})),
    "huge header": partial(header_length, 2**63),
    "header longer than the file": partial(header_length, 10**8),
    "empty header": partial(header_length, 0),
    "empty": partial(other_content, b""),
    "a web page": partial(other_content, b"<!DOCTYPE html><html>404</html>"),
    "a pointer of Git LFS": partial(
        other_content, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    ),
}


def rewritten(change, rng, data):
    """A zip with other records."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    records, compression = change(rng, records)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in records:
            archive.writestr(name, content)
    return out.getvalue()


def without_record(rng, records):
    gone = rng.choice([name for name, _ in records if "/data/" in name or name.endswith("data.pkl")])
    return [each for each in records if each[0] != gone], zipfile.ZIP_STORED


def shorter_record(rng, records):
    name = rng.choice([name for name, _ in records if "/data/" in name])
    return [(each, content[:-1] if each == name else content) for each, content in records], zipfile.ZIP_STORED


def record_twice(rng, records):
    return [*records, rng.choice(records)], zipfile.ZIP_STORED


def bomb(rng, records):
    big = [(name, bytes(10**7) if name.endswith("data.pkl") else content) for name, content in records]
    return big, zipfile.ZIP_DEFLATED


def flipped_pickle(rng, records):
    return [
        (name, flipped(rng, content) if name.endswith("data.pkl") else content) for name, content in records
    ], zipfile.ZIP_STORED


def bigger_entry(rng, data):
    """The directory claims another size of a record."""
    data = bytearray(data)
    at = [place for place in range(len(data) - 4) if data[place : place + 4] == b"PK\x01\x02"]
    place = rng.choice(at)
    struct.pack_into("<II", data, place + 20, 2**31, 2**31)
    return bytes(data)


ZIP = {
    "truncated": truncated,
    "flipped bit": flipped,
    "flipped bit near the end": lambda rng, data: data[:-400] + flipped(rng, data[-400:]),
    "flipped bit in the first record": lambda rng, data: flipped(rng, data, 8192),
    "bytes behind the end": hidden_data,
    "compressed": partial(rewritten, lambda rng, records: (records, zipfile.ZIP_DEFLATED)),
    "zip bomb": partial(rewritten, bomb),
    "record missing": partial(rewritten, without_record),
    "record too short": partial(rewritten, shorter_record),
    "record twice": partial(rewritten, record_twice),
    "record too large": bigger_entry,
    "no records": partial(rewritten, lambda rng, records: ([], zipfile.ZIP_STORED)),
    "other zip": partial(rewritten, lambda rng, records: ([("a.txt", b"a")], zipfile.ZIP_STORED)),
    "only the magic": partial(other_content, b"PK"),
    "empty": partial(other_content, b""),
}
LEGACY = {"truncated": truncated, "cut in the beginning": lambda rng, data: data[rng.randrange(1, 100) :]}


def entry(change, rng, data):
    index = json.loads(data)
    key = rng.choice(sorted(index["weight_map"]))
    index["weight_map"][key] = change(index["weight_map"][key])
    return json.dumps(index).encode()


def every_entry(shard, rng, data):
    return json.dumps({"weight_map": dict.fromkeys(json.loads(data)["weight_map"], shard)}).encode()


INDEX = {
    "path to a parent": partial(entry, lambda shard: f"../{shard}"),
    "path through a parent": partial(entry, lambda shard: f"a/../../{shard}"),
    "absolute path": partial(entry, lambda shard: f"/etc/{shard}"),
    "path of Windows": partial(entry, lambda shard: f"..\\{shard}"),
    "drive of Windows": partial(entry, lambda shard: f"C:\\{shard}"),
    "missing shard": partial(entry, lambda shard: "part-9.safetensors"),
    "wrong shard": partial(entry, lambda shard: "part-1.safetensors" if "0" in shard else "part-0.safetensors"),
    "all in one shard": partial(every_entry, "part-0.safetensors"),
    "a number for a shard": partial(entry, lambda shard: 3),
    "nothing for a shard": partial(entry, lambda shard: ""),
    "null for a shard": partial(entry, lambda shard: None),
    "NUL in a shard": partial(entry, lambda shard: f"{shard}\0"),
    "the folder for a shard": partial(entry, lambda shard: "."),
    "itself for a shard": partial(entry, lambda shard: "model.safetensors.index.json"),
    "tensor that is nowhere": lambda rng, data: data[:-2] + b', "nowhere": "part-0.safetensors"}}',
    "no weight_map": partial(other_content, b"{}"),
    "empty weight_map": partial(other_content, b'{"weight_map": {}}'),
    "list for a weight_map": partial(other_content, b'{"weight_map": ["part-0.safetensors"]}'),
    "truncated": truncated,
    "nested deeply": partial(other_content, b"[" * 100_000),
    "no UTF-8": partial(other_content, b'{"weight_map": {"\xff": "part-0.safetensors"}}'),
    "empty": partial(other_content, b""),
}


class Call:
    """An object whose pickle is a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def harmful(sentinel: Path, rng: random.Random) -> Call:
    return rng.choice(
        [
            Call(os.system, f"touch {sentinel}"),
            Call(open, str(sentinel), "w"),
            Call(eval, f"open({str(sentinel)!r}, 'w')"),
            Call(exec, f"open({str(sentinel)!r}, 'w')"),
            Call(os.mkdir, str(sentinel)),
            Call(torch.save, 1, str(sentinel)),
            Call(Path.touch, sentinel),
            Call(shutil.copy, __file__, str(sentinel)),
        ]
    )


PICKLES = {
    "for a tensor": lambda bad, given: {**given, sorted(given)[0]: bad},
    "beside the weights": lambda bad, given: {"model": given, "optimizer": bad},
    "for everything": lambda bad, given: bad,
    "in a list": lambda bad, given: [bad, given],
    "before the weights": lambda bad, given: {"hook": bad, "model": given},
}


# ---------------------------------------------------------------------- the test


def attempt(
    family: str, checkpoint: Path, folder: Path, names: set[str], expected: dict, kind: str, free: bool = False
):
    """Convert a damaged checkpoint: it is refused with one of these names, or the output has not changed.

    Args:
        family: Whose converter.
        checkpoint: What it is given.
        folder: Empty; to be written to, and to be empty afterwards.
        names: One of them must be in the error.
        expected: What the undamaged checkpoint becomes.
        kind: What is counted.
        free: A model of another size is all right.
    """
    count = COUNTS.setdefault(kind, Counter())
    try:
        CONVERTERS[family](checkpoint, folder / "out")
    except ConversionError as error:
        assert any(name in str(error) for name in names), f"{kind}: no name in {error}"
        assert list(folder.iterdir()) == [], f"{kind}: {error}"
        count["refused"] += 1
        return
    found = written(folder / "out")
    if free and {name: shape for name, (_, shape, _) in found.items()} != {
        name: shape for name, (_, shape, _) in expected.items()
    }:
        count["another valid model"] += 1
    else:
        assert found == expected, f"{kind} passed silently"
        count["nothing changed"] += 1
    assert [path.name for path in folder.iterdir()] == ["out"]
    shutil.rmtree(folder / "out")


@pytest.fixture
def target(tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


def seeded(*about) -> random.Random:
    return random.Random(repr(about))


@pytest.mark.parametrize("family", CONVERTERS)
@pytest.mark.parametrize("corruption", OF_TENSORS)
def test_damaged_tensors(corruption, family, tensors, clean, tmp_path, target):
    expected, names = clean[family]
    for number, layout in enumerate(("safetensors", "zip")):
        rng = seeded(corruption, family, layout)
        given = dict(tensors[family])
        keys = OF_TENSORS[corruption](rng, given)
        if layout == "safetensors":  # which takes no tensors that share memory
            given = {name: tensor.contiguous().clone() for name, tensor in given.items()}
        checkpoint, file = lay_out(given, tmp_path / f"in{number}", layout, family)
        # a converter may name the tensor as it is called without prefixes or by what it becomes, or the module that is
        # incomplete
        accepted = set()
        for key in {*keys, *(key.removeprefix("module.") for key in keys)}:
            accepted |= {key, key.rpartition(".")[0] or key, *names.get(key, [])}
        free = bool({key.removeprefix("module.") for key in keys} & FREE)
        attempt(family, checkpoint, target, accepted, expected, corruption, free)


def test_another_size_is_another_model(tensors, clean, tmp_path, target):
    """This can't be noticed: nothing else tells how many latents there were."""
    given = dict(tensors["openflamingo"])
    (key,) = (key for key in given if key.endswith("perceiver.latents"))
    given[key] = given[key][:-1].clone()
    checkpoint, _ = lay_out(given, tmp_path / "in", "zip", "openflamingo")
    kind = "one row less of what nothing else tells"
    attempt("openflamingo", checkpoint, target, {key}, clean["openflamingo"][0], kind, free=True)
    assert COUNTS[kind] == {"another valid model": 1}


def names_in(data: bytes) -> set[str]:
    """Keys of a safetensors header, as far as it can be read."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return set(header) if isinstance(header, dict) else set()
    except (ValueError, RecursionError):
        return set()


def damage(table: dict, layout: str, corruption: str, family: str, tensors, clean, tmp_path: Path, target: Path):
    checkpoint, file = lay_out(tensors[family], tmp_path / "in", layout, family)
    whole = file.read_bytes()
    for number in range(ROUNDS):
        damaged = table[corruption](seeded(corruption, family, number), whole)
        file.write_bytes(damaged)
        keys = {*tensors[family], *names_in(damaged)} - {""}
        names = {file.name, str(checkpoint), *keys, *(key.removeprefix("module.") for key in keys), *clean[family][0]}
        attempt(family, checkpoint, target, names, clean[family][0], f"{layout}: {corruption}")


@pytest.mark.parametrize("family", CONVERTERS)
@pytest.mark.parametrize("corruption", SAFETENSORS)
def test_damaged_safetensors(corruption, family, tensors, clean, tmp_path, target):
    damage(SAFETENSORS, "safetensors", corruption, family, tensors, clean, tmp_path, target)


@pytest.mark.parametrize("family", CONVERTERS)
@pytest.mark.parametrize("corruption", ZIP)
def test_damaged_zips(corruption, family, tensors, clean, tmp_path, target):
    damage(ZIP, "zip", corruption, family, tensors, clean, tmp_path, target)


@pytest.mark.parametrize("family", CONVERTERS)
@pytest.mark.parametrize("corruption", LEGACY)
def test_damaged_files_of_the_old_format(corruption, family, tensors, clean, tmp_path, target):
    damage(LEGACY, "legacy", corruption, family, tensors, clean, tmp_path, target)


@pytest.mark.parametrize("family", CONVERTERS)
@pytest.mark.parametrize("corruption", INDEX)
def test_damaged_indices(corruption, family, tensors, clean, tmp_path, target):
    damage(INDEX, "shards", corruption, family, tensors, clean, tmp_path, target)


@pytest.mark.parametrize("family", CONVERTERS)
@pytest.mark.parametrize("place", PICKLES)
def test_malicious_pickles(place, family, tensors, clean, tmp_path, target):
    sentinel = tmp_path / "sentinel"
    for number, protocol in enumerate((2, 4)):
        rng = seeded(place, family, number)
        few = dict(list(tensors[family].items())[:3])
        checkpoint, file = lay_out(few, tmp_path / f"in{number}", ("zip", "legacy")[number], family)
        content = PICKLES[place](harmful(sentinel, rng), few)
        if rng.random() < 0.5:
            torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.5, pickle_protocol=protocol)
        else:
            file.write_bytes(
                pickle.dumps(content if place != "for a tensor" else {"a": harmful(sentinel, rng)}, protocol)
            )
        attempt(family, checkpoint, target, {file.name}, {}, f"pickle: {place}")
        assert not sentinel.exists()


@pytest.mark.parametrize("family", CONVERTERS)
def test_the_command_reports_it_in_one_line(family, tensors, tmp_path, target):
    given = dict(tensors[family])
    (key,) = put(float("nan"), seeded(family), given)
    checkpoint, _ = lay_out(given, tmp_path / "in", "zip", family)
    parts = {
        "blip": ["--tokenizer", BLIP / "bert-base-uncased"],
        "blip2": ["--vision", STAGE1 / "vit.pth", "--qformer-tokenizer", STAGE1 / "bert-base-uncased"],
        "llava": ["--vision", LLAVA / "clip_vision_tower"],
        "openflamingo": ["--vision", FLAMINGO / "clip_open_clip.pt", "--language", FLAMINGO / "base_lm",
                         "--tokenizer", FLAMINGO / "tokenizer_base"],
    }[family]  # fmt: skip
    if family != "llava":
        (tmp_path / "config.json").write_text(json.dumps(SETTINGS[family]))
        parts += ["--config", tmp_path / "config.json"]
    arguments = ["convert", family, "--checkpoint", checkpoint, "--output", target / "out", *parts]
    done = CliRunner().invoke(app, list(map(str, arguments)))
    lines = [line for line in done.stderr.splitlines() if line.startswith("vlbridge: error:")]
    assert done.exit_code == 1 and len(lines) == 1 and "Traceback" not in done.output
    assert f"{key.removeprefix('module.')} holds NaN or infinity in 1 of" in lines[0]
    assert list(target.iterdir()) == []


def test_counts(record_property):
    """At least 500 if the whole file runs; the report counts them by kind."""
    total = sum((count for count in COUNTS.values()), Counter())
    record_property("corruptions", {kind: dict(count) for kind, count in COUNTS.items()})
    print(f"\n{sum(total.values())} corruptions of {len(COUNTS)} kinds: {dict(total)}")
    for kind, count in COUNTS.items():
        print(f"  {kind}: {dict(count)}")
    assert total.keys() <= {"refused", "nothing changed", "another valid model"}
