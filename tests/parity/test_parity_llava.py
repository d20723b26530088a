"""LLaVA v1, v1.5 (whole and LoRA) and v1.6: converted official checkpoints against the official code's outputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from vlbridge.convert import convert_llava
from vlbridge.convert.convert_llava_checkpoint import open_checkpoint
from vlbridge.convert.convert_llava_names import checkpoint_table
from vlbridge.convert.convert_tables import invert, plan
from vlbridge.modeling import MLPLlavaForConditionalGeneration


FAMILY = "llava"
pytestmark = pytest.mark.core
OFFICIAL_IMAGE_TOKEN, IGNORED = -200, -100


def load(output):
    model = AutoModel.from_pretrained(output)
    assert isinstance(model, MLPLlavaForConditionalGeneration)
    return model, AutoProcessor.from_pretrained(output)


def projector_of(case) -> Path:
    """Stage 1's file, which some cases have."""
    return case.folder / "stage1" / "mm_projector.bin"


def applies(case, fixtures) -> bool:
    return "projector" not in fixtures or projector_of(case).is_file()


@pytest.fixture
def projector(case) -> Path:
    return projector_of(case)


@pytest.fixture(scope="module")
def converted(case, tmp_path_factory):
    """The case's checkpoint, converted, and loaded as users load it."""
    pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece files by it")
    output = tmp_path_factory.mktemp("converted") / "model"
    language = case.folder / "base_llm" if case.meta["checkpoint_layout"] == "lora" else None
    done = convert_llava(case.folder / "checkpoint", case.folder / "clip_vision_tower", language, output=output)
    # said where, and only where, something that was given is left aside
    assert bool(done.notes) == case.meta["vision_tower_in_checkpoint"]
    return load(output)


# ---------------------------------------------------------------------- the official batches as ours


def sizes(case) -> torch.Tensor:
    """Heights and widths of all pictures, `(num_images, 2)`."""
    return case.inputs["image_sizes_wh"].flip(-1)


def images_of(case, model, indices: list[int]) -> dict[str, torch.Tensor]:
    pixels = [case.inputs[f"pixel_values.{index}"] for index in indices]
    if model.config.image_grid_pinpoints is None:
        return {"pixel_values": torch.stack(pixels)}
    return {"pixel_values": torch.cat(pixels), "image_sizes": sizes(case)[indices]}


def expanded(case, model, tag: str) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """The official batch as ours, and its labels: placeholders for every visual token, padded as it was."""
    given, prompts = case.inputs, case.meta["prompts"].get(tag, {})
    ids = given[f"{tag}.input_ids"]
    mask = given.get(f"{tag}.attention_mask", torch.ones_like(ids)).bool()
    labels = given.get(f"{tag}.labels", torch.full_like(ids, IGNORED))
    remaining = iter(given[f"{tag}.image_index"].tolist() if prompts else [])
    rows, shown = [], []
    for row, attended, wanted in zip(ids, mask, labels):
        row, wanted = row[attended].tolist(), wanted[attended].tolist()
        if prompts and OFFICIAL_IMAGE_TOKEN not in row:
            next(remaining)  # the official code counts an image for a row without any
        tokens = []
        for token, label in zip(row, wanted):
            if token != OFFICIAL_IMAGE_TOKEN:
                tokens.append((token, label))
                continue
            shown.append(next(remaining))
            anyres = model.config.image_grid_pinpoints is not None
            size = sizes(case)[shown[-1]].tolist() if anyres else given[f"pixel_values.{shown[-1]}"].shape[-2:]
            tokens += [(model.config.image_token_id, IGNORED)] * model.config.num_image_tokens(*size)
        rows.append(tokens)
    length = max(map(len, rows))
    left = prompts.get("padding_side") == "left"
    padding = [[(case.meta["special"]["pad"], IGNORED)] * (length - len(row)) for row in rows]
    whole = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, padding)])
    attention = torch.tensor(
        [
            [0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
            for row, pad in zip(rows, padding)
        ]
    )
    if f"{tag}.expanded_attention_mask" in case.outputs:
        assert torch.equal(attention, case.outputs[f"{tag}.expanded_attention_mask"].long())
    inputs = {"input_ids": whole[..., 0], "attention_mask": attention}
    if shown:
        inputs.update(images_of(case, model, shown))
    return inputs, whole[..., 1] if f"{tag}.labels" in given else None


# ---------------------------------------------------------------------- numbers


def test_features(case, converted):
    model, _ = converted
    everything = images_of(case, model, list(range(len(sizes(case)))))
    with torch.no_grad():
        patch_features = model.get_patch_features(everything["pixel_values"])
        projected = model.bridge.project(patch_features)
        image_features = model.get_image_features(**everything).pooler_output
    torch.testing.assert_close(patch_features, case.outputs["tower_features"], **case.tolerance)
    torch.testing.assert_close(projected, case.outputs["projected"], **case.tolerance)
    if model.config.image_grid_pinpoints is None:
        torch.testing.assert_close(image_features, case.outputs["projected"], **case.tolerance)
        return
    for index, features in enumerate(image_features):
        torch.testing.assert_close(features, case.outputs[f"packed_features.{index}"], **case.tolerance)


def compare_logits(case, model, tag: str) -> None:
    inputs, _ = expanded(case, model, tag)
    with torch.no_grad():
        logits = model(**inputs).logits
    attended = inputs["attention_mask"].bool()
    if f"{tag}.logits" in case.outputs:
        official = case.outputs[f"{tag}.logits"]
    elif f"{tag}.logits_last20" in case.outputs:
        official = case.outputs[f"{tag}.logits_last20"]
        logits, attended = logits[:, -20:], attended[:, -20:]
    else:
        official, positions = case.outputs[f"{tag}.logits_at_positions"], case.outputs[f"{tag}.logits_positions"]
        logits = logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))
        attended = attended.gather(1, positions)
    assert attended.any(dim=1).all()
    torch.testing.assert_close(logits[attended], official[attended], **case.tolerance)


def test_logits(case, converted):
    assert case.tags == ["batch_left", "batch_right", "multi", "one", "textonly"]
    for tag in case.tags:
        compare_logits(case, converted[0], tag)


def test_loss(case, converted):
    model, _ = converted
    recorded = [tag for tag in case.tags if f"{tag}.loss" in case.outputs]
    assert recorded
    for tag in recorded:
        inputs, labels = expanded(case, model, tag)
        assert torch.equal(labels, case.outputs[f"{tag}.expanded_labels"])
        with torch.no_grad():
            loss = model(**inputs, labels=labels).loss
        torch.testing.assert_close(loss, case.outputs[f"{tag}.loss"].squeeze(), **case.tolerance)


@pytest.mark.parametrize("name, settings", [("greedy", {}), ("beam3", {"num_beams": 3})])
def test_generated_tokens(case, converted, name, settings):
    """The official ids begin with a placeholder, and don't hold the prompt."""
    model, _ = converted
    end = case.meta["special"]["eos"]
    recorded = [tag for tag in case.tags if f"{tag}.{name}_ids" in case.outputs]
    assert {"one", "multi", "batch_left"} <= set(recorded)

    def until_end(rows: torch.Tensor) -> list[list[int]]:
        return [row[: row.index(end)] if end in row else row for row in rows.tolist()]

    for tag in recorded:
        inputs, _ = expanded(case, model, tag)
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=12, **settings)
        official = case.outputs[f"{tag}.{name}_ids"]
        assert (official[:, 0] == case.meta["special"]["bos"]).all()
        assert until_end(ids[:, inputs["input_ids"].shape[1] :]) == until_end(official[:, 1:]), tag


# ---------------------------------------------------------------------- the processor


def pictures(case, indices) -> list[Image.Image]:
    paths = sorted((case.folder / "images").glob("*.png"))
    return [Image.open(paths[index]).convert("RGB") for index in indices]


def test_images_through_the_processor(case, converted, tmp_path):
    """From the picture files on, the official pixels: also when saved again."""
    model, processor = converted
    assert processor.image_aspect_ratio == case.meta["preprocess"]["image_aspect_ratio"]
    everything = list(range(len(sizes(case))))
    processor.save_pretrained(tmp_path)
    official = images_of(case, model, everything)
    for each in (processor, AutoProcessor.from_pretrained(tmp_path)):
        given = each(images=pictures(case, everything), text="<image>" * len(everything), return_tensors="pt")
        assert case.same_pixels(given["pixel_values"], official["pixel_values"])
    if "image_sizes" in official:
        assert given["image_sizes"].tolist() == official["image_sizes"].tolist()


def test_prompts_through_the_processor(case, converted, tmp_path):
    """The official prompts, as text and as conversations, become the official ids: also when saved again."""
    model, processor = converted
    processor.save_pretrained(tmp_path)
    processors = (processor, AutoProcessor.from_pretrained(tmp_path))
    special = case.meta["special"]
    ids = {"bos": processor.tokenizer.bos_token_id, "eos": processor.tokenizer.eos_token_id,
           "pad": processor.tokenizer.pad_token_id}  # fmt: skip
    assert ids == {name: special[name] for name in ids}
    for name in ("im_start", "im_end"):
        if special[name] is not None:
            assert processor.tokenizer.convert_tokens_to_ids(f"<{name}>") == special[name]
    checked = 0
    for tag, prompts in case.meta["prompts"].items():
        official, _ = expanded(case, model, tag)
        indices = iter(case.inputs[f"{tag}.image_index"].tolist())
        for row, prompt in enumerate(prompts["prompts"]):
            shown = [next(indices) for _ in range(max(prompt.count("<image>"), 1))][: prompt.count("<image>")]
            images = pictures(case, shown) or None
            expected = official["input_ids"][row][official["attention_mask"][row].bool()].tolist()
            question = prompt.partition("USER: ")[2].removesuffix(" ASSISTANT:").rpartition("\n")[2]
            content = [{"type": "image"}] * len(shown) + [{"type": "text", "text": question}]
            asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            for each in processors:
                for text in (prompt, asked):
                    given = each(images=images, text=text, return_tensors="pt")["input_ids"]
                    assert given[0].tolist() == expected, (tag, text)
            checked += len(shown)
    assert checked


def test_generation_defaults(case, converted):
    model, _ = converted
    special, defaults = case.meta["special"], model.generation_config
    assert (defaults.bos_token_id, defaults.eos_token_id, defaults.pad_token_id) == tuple(
        special[name] for name in ("bos", "eos", "pad")
    )
    assert not defaults.do_sample and defaults.num_beams in (None, 1)


# ---------------------------------------------------------------------- layouts


def test_a_projector_alone(case, projector, tmp_path):
    """Stage 1's file with the language model that it was trained with is the same model."""
    language = shutil.copytree(case.folder / "checkpoint", tmp_path / "language")
    if (case.folder / "base_llm").is_dir():
        shutil.copytree(case.folder / "base_llm", language, dirs_exist_ok=True)
    convert_llava(projector, case.folder / "clip_vision_tower", language, output=tmp_path / "out")
    model, _ = load(tmp_path / "out")
    compare_logits(case, model, "one")
    compare_logits(case, model, "batch_left")


def test_the_tables_lead_back(case, converted):
    """Official names and tensors come back bit by bit; of a LoRA fine-tune what is not merged does."""
    model, _ = converted
    official = open_checkpoint(case.folder / "checkpoint").files
    table = checkpoint_table(model.config, model.state_dict())
    there = {name: piece.load(official.read) for name, piece in plan(table, official.shapes).items()}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in there.items())
    back = {name: piece.load(there.__getitem__) for name, piece in plan(invert(table), there).items()}
    assert back.keys() == official.shapes.keys()
    assert all(torch.equal(tensor, official.read(name)) for name, tensor in back.items())
