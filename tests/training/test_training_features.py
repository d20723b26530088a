"""The feature cache: training with it is training without it, and whatever happens to its files, features are right."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import BRIDGE_OPTIONS, QFORMER, bert_like_tokenizer, clip_image_processor, tiny_image, tiny_model, tiny_stage1
from torch.utils.data import DataLoader
from toy_records import assert_same, caption, document, image, loss_and_gradients, talk
from toy_runs import save_data, save_parts

from vlbridge.images import ImageError
from vlbridge.training.training_encoding import encoder_for
from vlbridge.training.training_features import FeatureCache, FeatureStore, PreparedEncoder, PreparedImage, image_key
from vlbridge.training.training_images import prepare_image
from vlbridge.training.training_recipes import Recipe, RecipeError
from vlbridge.training.training_run import build_trainer, finish


RECORDS = [caption("two dogs", 0), caption("a sea", 1), talk("what?", "a cat", "why?", "so", seed=2)]
# one picture in a row of its own shape, another twice
SHAPES = [(40, 33), (90, 30), (31, 100)]


def counting(model):
    """Count the images that the vision encoder gets."""
    counts = []
    model.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    return counts


def batches(model, processor, records, folder, **options):
    """The same batch with pixels, and with features."""
    encoder = encoder_for(model, processor)
    expected = encoder.collate([encoder.encode(record) for record in records])
    cache = FeatureCache(model, processor, folder, **options)
    cache.fill(records)
    cached = PreparedEncoder(encoder, cache.store)
    return expected, cached.collate([cached.encode(record) for record in records])


# ---------------------------------------------------------------------- equal to uncached


@pytest.mark.core
@pytest.mark.parametrize(
    ("bridge", "language", "options"),
    [
        ("mlp", "llama", {}),
        ("mlp", "llama", {"vision_feature_select_strategy": "full", "vision_feature_layer": -2}),
        ("mlp", "t5", {}),
        ("mlp", "llama", {"image_aspect_ratio": "pad"}),
        ("qformer", "opt", {}),
        ("qformer", "t5", {}),
        ("perceiver", "llama", {}),
    ],
)
def test_loss_and_gradients_are_those_of_pixels(bridge, language, options, tmp_path):
    model, processor = tiny_model(bridge, language, **options)
    model.eval()  # the Q-Former has dropout
    records = RECORDS if bridge != "perceiver" else [*RECORDS, document("before", 0, "one", 3, "two")]
    expected, cached = batches(model, processor, records, tmp_path)
    assert "pixel_values" not in cached
    assert cached.keys() - {"patch_features"} == expected.keys() - {"pixel_values"}
    for name in cached.keys() - {"patch_features"}:
        assert torch.equal(cached[name], expected[name]), name
    counts = counting(model)
    ours = loss_and_gradients(model, cached)
    assert not counts  # the encoder never runs
    assert_same(ours, loss_and_gradients(model, expected))
    assert sum(counts) == len(expected["pixel_values"])


@pytest.mark.parametrize("vision", ["clip", "resnet"])
def test_tiles_of_images_at_any_resolution(vision, tmp_path):
    options = {"image_processor": clip_image_processor()} if vision == "clip" else {}
    if vision == "resnet":
        expected_patches = 64
    model, processor = tiny_model("mlp", vision=vision, image_aspect_ratio="anyres", **options)
    records = []
    for number, shape in enumerate(SHAPES):
        records.append({**caption(f"picture {number}"), "images": [image(number, shape)]})
    expected, cached = batches(model, processor, records, tmp_path)
    assert torch.equal(cached["image_sizes"], expected["image_sizes"])
    assert len(cached["patch_features"]) == len(expected["pixel_values"]) > len(records)
    if vision == "resnet":
        assert cached["patch_features"].shape[1] == expected_patches
    assert torch.equal(cached["input_ids"], expected["input_ids"])
    assert_same(loss_and_gradients(model, cached), loss_and_gradients(model, expected))


def test_pooled_features_are_kept_pooled(tmp_path):
    model, processor = tiny_model("mlp", pooling="average", pooling_factor=2)
    expected, cached = batches(model, processor, RECORDS, tmp_path)
    assert cached["patch_features"].shape[1] == 9
    assert_same(loss_and_gradients(model, cached), loss_and_gradients(model, expected))


@pytest.mark.parametrize(("bridge", "options"), [("mlp", {"image_aspect_ratio": "anyres"}), ("perceiver", {})])
def test_documents_with_more_images_than_are_kept(bridge, options, tmp_path):
    model, processor = tiny_model(bridge, **options)
    encoder = encoder_for(model, processor, max_images=1)
    record = document("before", 0, "one", 1, "two")
    expected = encoder.encode(record)
    cache = FeatureCache(model, processor, tmp_path)
    for store in (None, cache.store):
        sample = PreparedEncoder(encoder, store).encode(record)
        assert len(sample["images"]) == 1
        assert torch.equal(sample["input_ids"], expected["input_ids"])
        assert torch.equal(sample["pixel_values"], expected["pixel_values"])
    cache.fill([record])
    record["images"][1] = {"path": "none.png", "bytes": None}  # not needed
    assert len(PreparedEncoder(encoder, cache.store).encode(record)["patch_features"]) == len(expected["pixel_values"])


def test_instruction_aware_qformers_read_the_same_with_features(tmp_path):
    model, processor = tiny_model("qformer", qformer_config={**QFORMER, "use_text": True, "vocab_size": 60})
    processor.qformer_tokenizer = bert_like_tokenizer()
    model.eval()
    records = [talk("w1 w2", "w7", "w3", "w9"), caption("w4 w5", 1), document(0, "w6", 1, "w8")]
    expected, cached = batches(model, processor, records, tmp_path)
    assert cached.keys() - {"patch_features"} == expected.keys() - {"pixel_values"}
    for name in cached.keys() - {"patch_features"}:
        assert torch.equal(cached[name], expected[name]), name
    assert_same(loss_and_gradients(model, cached), loss_and_gradients(model, expected))


def test_encoders_take_prepared_images_and_leave_the_processor_alone(tmp_path, monkeypatch):
    model, processor = tiny_model("mlp")
    encoder = encoder_for(model, processor)
    expected = encoder.encode(RECORDS[0])
    prepared = [prepare_image(processor, picture) for picture in encoder.images_of(RECORDS[0])]
    state = dict(vars(processor))
    monkeypatch.setattr("vlbridge.training.training_encoder.open_image", lambda value: pytest.fail("a file was opened"))
    sample = encoder.encode(RECORDS[0], images=prepared)
    assert sample.keys() == expected.keys() and vars(processor) == state
    for name, value in expected.items():
        assert torch.equal(sample[name], value), name


def test_stage_1(tmp_path):
    model, processor = tiny_stage1(qformer_config={"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    records = [caption(f"w{number} w{number + 1}", number) for number in range(3)]
    expected, cached = batches(model, processor, records, tmp_path)
    drawn = {"image_negatives": torch.tensor([1, 2, 0]), "text_negatives": torch.tensor([2, 0, 1])}
    ours = loss_and_gradients(model, {**cached, **drawn})
    assert_same(ours, loss_and_gradients(model, {**expected, **drawn}))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_half_precision_is_rounded_once_whether_made_now_or_read(dtype, tolerance, tmp_path):
    model, processor = tiny_model("mlp")
    exact = FeatureCache(model, processor, tmp_path).get([image(0)])
    cache = FeatureCache(model, processor, tmp_path, dtype=dtype)
    made, read = cache.get([image(0)]), cache.get([image(0)])
    assert made.dtype == getattr(torch, dtype) and torch.equal(made, read)
    torch.testing.assert_close(made.float(), exact, atol=0, rtol=tolerance)
    assert len(list(tmp_path.iterdir())) == 2  # a folder each


def test_batches_that_are_not_all_in_the_cache_are_completed(tmp_path):
    model, processor = tiny_model("mlp", image_aspect_ratio="anyres")
    encoder = encoder_for(model, processor)
    expected = encoder.collate([encoder.encode(record) for record in RECORDS])
    cache = FeatureCache(model, processor, tmp_path)
    cache.get([RECORDS[1]["images"][0]])
    cached = PreparedEncoder(encoder, cache.store)
    counts = counting(model)
    batch = cached.collate([cached.encode(record) for record in RECORDS])
    assert {"patch_features", "pixel_values", "uncached"} <= batch.keys()
    completed = cache.complete(batch)
    assert completed.keys() == expected.keys() - {"pixel_values"} | {"patch_features"}
    known = encoder.encode(RECORDS[1])["pixel_values"]
    assert sum(counts) == len(expected["pixel_values"]) - len(known) > 3
    assert_same(loss_and_gradients(model, completed), loss_and_gradients(model, expected))
    again = cached.collate([cached.encode(record) for record in RECORDS])  # now they are there
    assert "uncached" not in again and cache.complete(again) is again
    assert torch.equal(again["patch_features"], completed["patch_features"])


def test_texts_that_are_cut_off_lose_the_features_of_lost_images(tmp_path):
    model, processor = tiny_model("mlp")
    record = document(0, "one", 1, "two")
    encoder = encoder_for(model, processor, max_length=40)
    cache = FeatureCache(model, processor, tmp_path)
    cache.fill([record])
    sample = PreparedEncoder(encoder, cache.store).encode(record)
    assert len(encoder.encode(record)["pixel_values"]) == len(sample["patch_features"]) == len(sample["images"]) == 1
    assert "patch_features" not in PreparedEncoder(encoder, cache.store).encode(
        {"id": "t", "images": [], "document": [{"type": "text", "text": "words"}]}
    )


# ---------------------------------------------------------------------- what features depend on


def test_images_are_named_by_their_files(tmp_path):
    data = image(0)["bytes"]
    (tmp_path / "one.png").write_bytes(data)
    key = image_key(image(0))
    assert key == image_key(tmp_path / "one.png") == image_key({"path": str(tmp_path / "one.png"), "bytes": None})
    assert key != image_key(image(1))
    pictures = [
        tiny_image(0),
        tiny_image(1),
        tiny_image(0).convert("P"),
        Image.new("RGB", (2, 3)),
        Image.new("RGB", (3, 2)),
    ]
    assert len({image_key(picture) for picture in pictures}) == 5
    assert image_key(tiny_image(0)) == image_key(tiny_image(0))
    # a device may have no end
    for wrong in (
        tmp_path, tmp_path / "none.png", "/dev/null", {"path": None, "bytes": None}, {"path": "http://host/a.png"},
    ):  # fmt: skip
        with pytest.raises(ImageError):
            image_key(wrong)


def test_whatever_changes_the_features_changes_the_folder(tmp_path):
    model, processor = tiny_model("mlp")

    def folder(**options):
        return FeatureCache(model, processor, tmp_path, **options).store.folder

    first = folder()
    assert folder() == first and json.loads((first / "about.json").read_text())["dtype"] == "float32"
    processor.save_pretrained(tmp_path / "saved")
    processor = type(processor).from_pretrained(tmp_path / "saved")
    assert folder() == first
    seen = {first, folder(dtype="float16")}
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    seen.add(folder())
    processor.image_aspect_ratio = "pad"
    seen.add(folder())
    model.config.vision_feature_layer = -2
    seen.add(folder())
    with torch.no_grad():
        next(model.vision_model.parameters())[:1].add_(1e-3)
    seen.add(folder())
    model.vision_model.config.hidden_act = "relu"
    seen.add(folder())
    assert len(seen) == 7


def test_encoders_that_are_trained_and_unknown_dtypes_are_refused(tmp_path):
    model, processor = tiny_model("mlp")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        FeatureCache(model, processor, tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="is trained"):
        FeatureCache(model.freeze(vision_model=False), processor, tmp_path)


# ---------------------------------------------------------------------- filling


def test_filling_goes_on_where_it_stopped_and_shares_the_work(tmp_path, capsys):
    model, processor = tiny_model("mlp")
    broken = {**caption("x"), "images": [{"path": str(tmp_path / "none.png"), "bytes": None}]}
    records = [caption(f"{number}", number % 5) for number in range(7)] + [broken]
    cache = FeatureCache(model, processor, tmp_path / "a", batch_size=2)
    counts = counting(model)
    assert cache.fill(records) == {"images": 8, "made": 5, "broken": 1}
    assert "image features: 100%" in capsys.readouterr().err
    assert sum(counts) == 5 and max(counts) <= 2
    assert FeatureCache(model, processor, tmp_path / "a").fill(records, num_workers=1)["made"] == 0
    halves = [FeatureCache(model, processor, tmp_path / "b") for _ in range(2)]
    made = [half.fill(records, rank=rank, world_size=2)["made"] for rank, half in enumerate(halves)]
    assert sum(made) == 5
    everything = FeatureCache(model, processor, tmp_path / "b", batch_size=1)
    one, other = everything.get([image(k) for k in range(5)]), cache.get([image(k) for k in range(5)])
    torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
    assert sum(counts) == 10


# ---------------------------------------------------------------------- disk


def stored(number: int, size: int = 1000) -> PreparedImage:
    features = torch.full((1, size, 1), float(number))
    return PreparedImage((3, 2, 2), (2, 2), 1, f"key{number}", patch_features=features)


def numbers(store: FeatureStore, count: int) -> list[int]:
    """Which of so many images are there; what is there has to be right."""
    found = []
    for number in range(count):
        if (image := store.read(f"key{number}")) is not None:
            assert torch.equal(image.patch_features, stored(number).patch_features)
            assert (image.pixel_shape, image.size, image.num_tiles) == ((3, 2, 2), (2, 2), 1)
            found.append(number)
    return found


@pytest.fixture
def warnings():
    """What the cache says."""
    logger, said = logging.getLogger("vlbridge.training.training_feature_store"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    yield said
    logger.removeHandler(handler)


def test_a_full_cache_keeps_what_it_has_and_says_so(tmp_path, warnings):
    store = FeatureStore(tmp_path, torch.float32, max_bytes=20_000, shard_bytes=8000)
    for number in range(10):
        store.add(stored(number))
    store.flush()
    assert store.full and numbers(store, 10) == [0, 1, 2, 3]
    assert store.num_bytes() <= 20_000
    assert len(warnings) == 1 and "max_bytes=20000 with 4 images" in warnings[0]


def test_a_disk_that_is_full_is_reported(tmp_path, warnings, monkeypatch):
    def no_space(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    store = FeatureStore(tmp_path, torch.float32)
    store.add(stored(0))
    store.flush()
    monkeypatch.setattr("vlbridge.training.training_feature_store.save_file", no_space)
    store.add(stored(1))
    store.flush()
    assert "No space left" in warnings[0] and numbers(store, 2) == [0]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["cut", "header", "bit", "empty", "other"])
def test_damaged_shards_are_noticed_and_made_again(damage, tmp_path, warnings):
    store = FeatureStore(tmp_path, torch.float32)
    for number in range(4):
        store.add(stored(number))
        if number % 2:
            store.flush()
    keys = {store._shard_of[f"key{number}"]: {number, number + 1} for number in (0, 2)}
    first, last = sorted(keys)  # where an image is in several shards, the last one's counts
    path, data = tmp_path / last, bytearray((tmp_path / last).read_bytes())
    if damage == "bit":
        data[-5] ^= 1
    content = {
        "cut": data[: len(data) // 2], "header": b"x" * 50 + data[50:], "bit": data, "empty": b"",
        "other": (tmp_path / first).read_bytes()[:-1] + b"\1",
    }[damage]  # fmt: skip
    os.unlink(path)  # a new file, as a copy or a backup would make it: an old one is still mapped
    path.write_bytes(bytes(content))
    other = FeatureStore(tmp_path, torch.float32)
    assert keys[first] <= set(numbers(other, 4)) < {0, 1, 2, 3}
    assert "is damaged" in warnings[0] and not path.exists()
    for number in range(4):
        other.add(stored(number))
    other.flush()
    assert numbers(FeatureStore(tmp_path, torch.float32), 4) == [0, 1, 2, 3]


def test_what_another_process_deletes_is_gone_not_an_error(tmp_path):
    store = FeatureStore(tmp_path, torch.float32)
    store.add(stored(0))
    store.flush()
    other = FeatureStore(tmp_path, torch.float32)
    (tmp_path / store._shard_of["key0"]).unlink()
    assert other.read("key0") is None and "key0" not in FeatureStore(tmp_path, torch.float32)


def test_shards_that_can_not_be_read_are_left_alone(tmp_path, warnings, monkeypatch):
    store = FeatureStore(tmp_path, torch.float32)
    store.add(stored(0))
    store.flush()

    def no_memory(*args, **kwargs):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr("vlbridge.training.training_feature_store.safe_open", no_memory)
        assert store.read("key0") is None and "key0" not in FeatureStore(tmp_path, torch.float32)
        assert "can't be read" in warnings[0]
    assert numbers(FeatureStore(tmp_path, torch.float32), 1) == [0]


def test_the_folder_is_listed_again_only_when_it_has_changed(tmp_path, monkeypatch):
    first = FeatureStore(tmp_path, torch.float32)
    first.add(stored(0))
    first.flush()
    listings, listdir = [], os.listdir
    monkeypatch.setattr("os.listdir", lambda path: listings.append(path) or listdir(path))
    for hours in (3, 2):
        os.utime(tmp_path, (1e9 + hours, 1e9 + hours))  # long ago: what changes now has another time
        store = FeatureStore(tmp_path, torch.float32)
        listings.clear()
        assert not any(f"key{number}" in store for number in range(10, 110)) and store.read("key10") is None
        assert not listings
        first.add(stored(hours))
        first.flush()
        assert f"key{hours}" in store and listings
    listings.clear()
    store.add(stored(5))
    store.flush()
    assert numbers(store, 6) == [0, 2, 3, 5]


def test_a_change_at_the_time_of_the_last_listing_is_seen(tmp_path):
    """File systems count time in steps: two changes can have the same time."""
    store = FeatureStore(tmp_path, torch.float32)
    before = os.stat(tmp_path)
    other = FeatureStore(tmp_path, torch.float32)
    assert "key0" not in store
    other.add(stored(0))
    other.flush()
    os.utime(tmp_path, ns=(before.st_atime_ns, os.stat(tmp_path).st_mtime_ns))
    assert "key0" in store


def add_many(folder: str, first: int) -> None:
    store = FeatureStore(folder, torch.float32, shard_bytes=8000)
    for number in range(first, first + 40):
        store.add(stored(number))
        assert number == first or store.read(f"key{number - 1}") is not None
    store.flush()


def test_several_processes_add_to_one_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_many, args=(str(tmp_path), first)) for first in (0, 20, 40)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert numbers(FeatureStore(tmp_path, torch.float32), 80) == list(range(80))
    assert not list(tmp_path.glob("*.tmp"))


def add_for_ever(folder: str, pipe) -> None:
    store = FeatureStore(folder, torch.float32, shard_bytes=40_000)
    for number in itertools.count():
        store.add(stored(number))
        pipe.send(number)


def test_a_killed_run_leaves_whole_shards(tmp_path):
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=add_for_ever, args=(str(tmp_path), sender), daemon=True)
    process.start()
    while receiver.recv() < 55:
        pass
    process.kill()
    process.join()
    (tmp_path / "half.tmp").write_bytes(b"half a shard")
    store = FeatureStore(tmp_path, torch.float32)
    found = [number for number in range(100) if f"key{number}" in store]
    assert len(found) >= 50 and numbers(store, len(found)) == list(range(len(found)))
    store.add(stored(1000))
    store.flush()
    assert not list(tmp_path.glob("*.tmp"))


def test_workers_read_what_the_main_process_adds(tmp_path):
    model, processor = tiny_model("mlp")
    cache = FeatureCache(model, processor, tmp_path)
    encoder = PreparedEncoder(encoder_for(model, processor), cache.store)
    loader = DataLoader(
        [encoder_records(k) for k in range(4)], batch_size=2, num_workers=2, collate_fn=Collate(encoder)
    )
    first = [cache.complete(batch) for batch in loader]
    cache.store.flush()
    second = list(loader)
    assert all("uncached" not in batch and "pixel_values" not in batch for batch in second)
    for one, other in zip(first, second):
        assert torch.equal(one["patch_features"], other["patch_features"])
    assert pickle.loads(pickle.dumps(encoder)).encode(RECORDS[0])["input_ids"].tolist()


def encoder_records(number: int) -> dict:
    return caption(f"picture {number}", number)


class Collate:
    def __init__(self, encoder):
        self.encoder = encoder

    def __call__(self, records):
        return self.encoder.collate([self.encoder.encode(record) for record in records])


# ---------------------------------------------------------------------- recipes


def losses(tmp_path, bridge: str, name: str, streaming: bool = False, **more):
    """Train on a recipe, and give the loss of every step with the trainer."""
    parts, data = tmp_path / "parts", tmp_path / "data"
    if not parts.exists():
        save_parts(parts)
        save_data(data)
    options = dict(BRIDGE_OPTIONS[bridge])
    if bridge == "qformer":
        options["qformer_config"] = {**QFORMER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    source = {"source": "llava", "path": str(data / "llava.json"), "options": {"images": str(data / "images")}}
    arguments = {
        "max_steps": 6, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "learning_rate": 1e-3, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    recipe = Recipe.from_dict(
        {
            "vision": str(parts / "vision"),
            "language": str(parts / "llama"),
            "bridge": bridge,
            "bridge_options": options,
            "data": [{**source, "streaming": streaming}],
            "evaluation": [source],
            "arguments": arguments,
            **more,
        }  # fmt: skip
    )
    trainer = build_trainer(recipe, tmp_path / name)
    counts = counting(trainer.model)
    trainer.train()
    found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    summary = finish(trainer, recipe)
    return torch.tensor(found + [row["value"] for row in summary["evaluation"]]), counts, summary


@pytest.mark.parametrize("bridge", ["mlp", "qformer", "perceiver"])
def test_recipes_learn_the_same_cached_and_packed(bridge, tmp_path):
    plain, counts, _ = losses(tmp_path, bridge, "plain")
    assert sum(counts) == 32 and len(plain) == 7  # three epochs of eight pictures, and the evaluation
    cached = {"cache_features": {"folder": str(tmp_path / "features")}}
    packed = {"packing": {"max_tokens": 150}}
    found, counts, summary = losses(tmp_path, bridge, "both", **cached, **packed)
    torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-5)  # six optimizer steps apart
    assert not counts
    assert summary["packing"]["rows"] < summary["packing"]["samples"]


def test_streams_fill_the_cache_as_they_go(tmp_path):
    options = {"streaming": True, "shuffle_buffer": 1, "evaluation": []}
    plain, counts, _ = losses(tmp_path, "mlp", "plain", **options)
    num_shown = sum(counts)
    cached = {"cache_features": {"folder": str(tmp_path / "features")}}
    first, counts, _ = losses(tmp_path, "mlp", "first", **options, **cached)
    assert num_shown == 36 and sum(counts) <= 12  # once for each picture, but for batches that were fetched early
    second, counts, _ = losses(tmp_path, "mlp", "second", **options, **cached)
    assert not counts
    for found in (first, second):
        torch.testing.assert_close(found, plain, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cache_features": {}, "freeze": ["language_model"]}, "needs a frozen vision encoder"),
        ({"packing": {}}, "packing.max_tokens is missing"),
        (
            {"packing": {"max_tokens": 10}, "data": [{"source": "a"}, {"source": "b", "loss_weight": 2.0}]},
            "several data sets",
        ),
        ({"cache_features": {"dtypes": "float16"}}, "did you mean 'dtype'"),
    ],
)
def test_recipes_that_contradict_themselves(fields, message):
    recipe = {"vision": "v", "language": "l", "bridge": "mlp", "data": [{"source": "a"}]}
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict({**recipe, **fields})
