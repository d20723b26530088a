"""LLaVA's layouts: full-size manifests map completely, every way of saving comes back, what doesn't fit is refused.

The numbers of converted models are compared with the official ones in tests/parity.
"""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import LANGUAGE, VISION, clip_image_processor, spread_weights, tiny_image, tiny_model, tiny_tokenizer
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from typer.testing import CliRunner

from vlbridge.cli import app
from vlbridge.configuration import MLPLlavaConfig
from vlbridge.configuration.configuration_llava import anyres_layout
from vlbridge.convert import ConversionError, convert_llava
from vlbridge.convert.convert_files import TensorFiles
from vlbridge.convert.convert_llava import plan_conversion
from vlbridge.convert.convert_llava_checkpoint import Checkpoint, infer_projector, infer_text_config
from vlbridge.convert.convert_llava_names import checkpoint_table, usual_names
from vlbridge.convert.convert_llava_processor import conversation_of
from vlbridge.convert.convert_tables import invert, plan
from vlbridge.convert.convert_vision import OPEN_CLIP_TABLE


MANIFESTS = Path(__file__).parent / "manifests"
CASE = Path(__file__).parents[1] / "parity" / "cases" / "llava" / "v16_anyres"
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


class Manifest:
    """Checkpoints with names, shapes and dtypes, but no data."""

    def __init__(self, content: dict, path: str = "manifest"):
        self.path = path
        self.shapes = {key: tuple(shape) for key, (shape, _) in content.items()}
        self.dtypes = {key: getattr(torch, dtype) for key, (_, dtype) in content.items()}


def manifest(name: str) -> dict:
    return json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))


VICUNA = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
MISTRAL = {**VICUNA["7b"], "intermediate_size": 14336, "num_key_value_heads": 8}
YI = {"hidden_size": 7168, "intermediate_size": 20480, "num_hidden_layers": 60, "num_attention_heads": 56,
      "num_key_value_heads": 8, "vocab_size": 64000}  # fmt: skip
INDEX = json.loads((MANIFESTS / "index_llava.json").read_text())
RELEASES = sorted({name.rpartition(".")[0] for name in INDEX})


def official_config(release: str) -> dict:
    """The fields of the release's `config.json` that these tests need."""
    size = release.rpartition("_")[2]
    fields = {"model_type": "llava_llama", **VICUNA[size], "vocab_size": 32003 if "v1_" in release else 32000}
    fields["mm_projector_type"] = "linear" if "v1_" in release else "mlp2x_gelu"
    fields.update(mm_vision_select_layer=-2, mm_hidden_size=1024, tune_mm_mlp_adapter=False, use_mm_proj=True)
    return {**fields, **MISTRAL, "model_type": "llava_mistral"} if "mistral" in release else fields


def planned(checkpoint: dict, fields: dict, vision: dict | None, base: dict | None = None, **options):
    release = Checkpoint(Manifest(checkpoint, "checkpoint"))
    text_config = infer_text_config(fields, "config.json")
    assert not any(hasattr(text_config, name) for name in fields if "mm_" in name)
    side = 224 if fields["mm_projector_type"] == "linear" else 336
    vision_config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
        image_size=side,
    )  # fmt: skip
    projector = infer_projector(release.files.shapes, release.layout, fields["mm_projector_type"])
    config = MLPLlavaConfig(
        vision_config=vision_config, text_config=text_config, vision_feature_layer=-2, **{**projector, **options}
    )
    tower = None
    if vision is not None:
        start = "model.vision_tower.vision_tower."
        tower = Manifest({key.removeprefix(start): value for key, value in vision.items()}, "vision")
    return plan_conversion(
        release, tower, None if base is None else Checkpoint(Manifest(base, "base")), config, 2
    )  # fmt: skip


def taken_from(conversion, path: str) -> set[str]:
    return {key for files, piece, _ in conversion.pieces.values() if files.path == path for key in piece.sources}


def count(content: dict) -> int:
    return sum(math.prod(shape) for shape, _ in content.values())


@pytest.mark.parametrize("release", RELEASES)
def test_full_size_manifests_map_completely(release):
    """As released, and with the vision tower and the buffers that older or self-trained checkpoints hold."""
    checkpoint, fields = manifest(f"{release}.checkpoint"), official_config(release)
    assert len(checkpoint) == INDEX[f"{release}.checkpoint"]["n_keys"]
    assert count(checkpoint) == INDEX[f"{release}.checkpoint"]["n_elements"]
    options = {"image_grid_pinpoints": PINPOINTS} if "model.image_newline" in checkpoint else {}
    if options:
        done = planned(checkpoint, fields, None, **options)
        assert taken_from(done, "checkpoint") == checkpoint.keys()
    else:
        tower = manifest(f"{release}.vision_tower_if_present")
        done = planned(checkpoint, fields, tower, **options)
        assert taken_from(done, "checkpoint") == checkpoint.keys() and len(taken_from(done, "vision")) == len(tower)
        buffers = {"model.vision_tower.vision_tower.vision_model.embeddings.position_ids": [[1, 257], "int64"]}
        for layer in range(fields["num_hidden_layers"]):
            buffers[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = [[64], "float32"]
        done = planned({**checkpoint, **tower, **buffers}, fields, None)
        assert taken_from(done, "checkpoint") == {*checkpoint, *tower}
        checkpoint = {**checkpoint, **tower}
    assert sum(tensor.numel() for tensor in done.model.state_dict().values()) == count(checkpoint)
    # and back
    back = plan(invert(checkpoint_table(done.config, done.pieces)), done.pieces)
    assert {key: piece.sources[0] for key, piece in back.items()} == {
        piece.sources[0]: name for name, (_, piece, _) in done.pieces.items()
    }
    assert back.keys() == checkpoint.keys()


@pytest.mark.parametrize("release", RELEASES)
def test_full_size_projectors_map_completely(release):
    """Stage 1's file, alone and as LoRA fine-tunes name it, with the language model of the whole release."""
    whole, projector = manifest(f"{release}.checkpoint"), manifest(f"{release}.stage1_mm_projector_bin")
    vision = {key: value for key, value in whole.items() if "vision_tower" in key}
    vision = vision or manifest(f"{release}.vision_tower_if_present")
    left_out = ("mm_projector", "vision_tower", "image_newline")
    base = {key: value for key, value in whole.items() if not any(part in key for part in left_out)}
    for prefix in ("", "base_model.model."):
        named = {prefix + key: value for key, value in projector.items()}
        done = planned(named, official_config(release), vision, base)
        assert taken_from(done, "checkpoint") == projector.keys() and taken_from(done, "base") == base.keys()
        assert done.config.projector_type == official_config(release)["mm_projector_type"]
    with pytest.raises(ConversionError, match="image_newline, which is not in the checkpoint"):
        planned(projector, official_config(release), vision, base, image_grid_pinpoints=PINPOINTS)


def test_the_34b_maps_completely():
    """It has no manifest: Yi's names come from transformers' class, LLaVA's parts from the 13B."""
    smaller = manifest("llava_v1.6_vicuna_13b.checkpoint")
    with torch.device("meta"):
        language = LlamaForCausalLM(LlamaConfig(**YI))
    checkpoint = {key: [list(tensor.shape), "bfloat16"] for key, tensor in language.state_dict().items()}
    for key, (shape, dtype) in smaller.items():
        if any(part in key for part in ("vision_tower", "mm_projector", "image_newline")):
            checkpoint[key] = [[{5120: 7168}.get(side, side) for side in shape], dtype]
    fields = {"model_type": "llava_llama", **YI, "mm_projector_type": "mlp2x_gelu"}
    done = planned(checkpoint, fields, None, image_grid_pinpoints=PINPOINTS)
    assert taken_from(done, "checkpoint") == checkpoint.keys()


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize(
    "layout, key, name",
    [
        ("official", "module.model.mm_projector.0.weight", "model.mm_projector.0.weight"),
        ("official", "base_model.model.model.mm_projector.bias", "model.mm_projector.bias"),
        ("official", "base_model.model.lm_head.weight", "lm_head.weight"),
        ("official", "mm_projector.2.bias", "model.mm_projector.2.bias"),
        (
            "official",
            "model.vision_tower.vision_tower.embeddings.class_embedding",
            "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
        ),
        ("official", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("transformers", "model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("transformers", "lm_head.weight", "language_model.lm_head.weight"),
        ("transformers", "language_model.lm_head.weight", "language_model.lm_head.weight"),
        ("transformers", "model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("transformers", "model.vision_tower.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("transformers", "vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.vision_model.pre_layrnorm.bias"),
        ("transformers", "model.image_newline", "image_newline"),
    ],
)
def test_many_spellings_are_one_name(layout, key, name):
    assert usual_names([key], layout) == {key: name}


def test_one_tensor_under_two_names_is_refused():
    with pytest.raises(ConversionError, match="two names of model.mm_projector.bias"):
        usual_names(["model.mm_projector.bias", "mm_projector.bias"], "official")


# ---------------------------------------------------------------------- from end to end


def official_tensors(model, vision: bool = True) -> dict[str, torch.Tensor]:
    """A model of vlbridge as the official code would save it: with the inverted table."""
    tensors = model.state_dict()
    pieces = plan(invert(checkpoint_table(model.config, tensors)), tensors)
    official = {name: piece.load(tensors.__getitem__).clone() for name, piece in pieces.items()}
    return official if vision else {name: tensor for name, tensor in official.items() if "vision_tower" not in name}


def write_config(folder: Path, model, **more) -> None:
    own = {name: value for name, value in model.config.text_config.to_dict().items() if value is not None}
    fields = {**own, "model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]}
    fields.update(mm_projector_type=model.config.projector_type, mm_vision_select_layer=-2, mm_use_im_patch_token=False)
    (folder / "config.json").write_text(json.dumps({**fields, **more}))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A model, and its parts as they lie on disk: encoder, language model, whole checkpoint, projector alone."""
    folder = tmp_path_factory.mktemp("llava")
    model, _ = tiny_model("mlp", vision_feature_layer=-2)
    model.vision_model.save_pretrained(folder / "clip")
    clip_image_processor().save_pretrained(folder / "clip")
    model.language_model.save_pretrained(folder / "llm")
    tiny_tokenizer().save_pretrained(folder / "llm")
    whole = folder / "llava"
    whole.mkdir()
    write_config(whole, model, mm_vision_tower=str(folder / "clip"), image_aspect_ratio="pad")
    tiny_tokenizer().save_pretrained(whole)
    official = official_tensors(model, vision=False)
    torch.save(official, whole / "pytorch_model.bin")
    torch.save(
        {name: tensor for name, tensor in official.items() if "mm_projector" in name}, folder / "mm_projector.bin"
    )
    return folder, model


def assert_same(output: Path, model) -> None:
    loaded = AutoModel.from_pretrained(output).state_dict()
    expected = model.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(loaded[name], tensor, atol=0, rtol=0, msg=name)


def shard(tensors: dict, folder: Path) -> None:
    names, where = sorted(tensors), {}
    for number, chosen in enumerate((names[::2], names[1::2]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: tensors[name] for name in chosen}, folder / file)
        where.update((name, file) for name in chosen)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("layout", ["bin", "sharded", "safetensors", "deepspeed", "transformers 5", "one file"])
@pytest.mark.parametrize("tower", [False, True], ids=["", "tower"])
def test_every_way_of_saving_gives_the_same_model(parts, tmp_path, layout, tower):
    folder, model = parts
    place = shutil.copytree(folder / "llava", tmp_path / "checkpoint")
    tensors = official_tensors(model, vision=tower)
    (place / "pytorch_model.bin").unlink()
    if layout == "sharded":
        shard(tensors, place)
    elif layout == "safetensors":
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    else:
        if layout == "transformers 5":
            tensors = {name.replace(".vision_model.", "."): tensor for name, tensor in tensors.items()}
        if layout == "deepspeed":
            tensors = {"module": {f"module.{name}": tensor for name, tensor in tensors.items()}, "global_step": 1}
        torch.save(tensors, place / ("consolidated.pt" if layout == "one file" else "pytorch_model.bin"))
    # the release also has its projector in a file
    shutil.copy(folder / "mm_projector.bin", place)
    done = convert_llava(place / "consolidated.pt" if layout == "one file" else place, output=tmp_path / "out")
    assert done.notes == []
    assert_same(tmp_path / "out", model)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_aspect_ratio == "pad" and processor.image_processor.crop_size["height"] == 30


@pytest.mark.parametrize("projector_type", ["identity", "linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_other_projectors(projector_type, tmp_path):
    model, _ = tiny_model("mlp", "mistral", vision_feature_layer=-2, projector_type=projector_type)
    model.vision_model.save_pretrained(tmp_path / "clip")
    place = tmp_path / "llava"
    place.mkdir()
    write_config(place, model, model_type="llava_mistral", mm_vision_tower=str(tmp_path / "clip"))
    tiny_tokenizer().save_pretrained(place)
    torch.save(official_tensors(model, vision=False), place / "pytorch_model.bin")
    done = convert_llava(place, output=tmp_path / "out")
    # one layer of an MLP is a linear one; only its name differs
    assert done.config.projector_type == projector_type
    assert_same(tmp_path / "out", model)


def test_half_precision_stays(parts, tmp_path):
    """All parts are loaded in the dtype of the language model, whatever that of the vision encoder's file."""
    folder, model = parts
    place = shutil.copytree(folder / "llava", tmp_path / "checkpoint")
    tensors = {name: tensor.half() for name, tensor in official_tensors(model, vision=False).items()}
    torch.save(tensors, place / "pytorch_model.bin")
    convert_llava(place, output=tmp_path / "out")
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}
    # merged weights keep it, too
    lora(folder, model, tmp_path / "lora")
    llm = shutil.copytree(folder / "llm", tmp_path / "llm")
    save_file({k: t.half() for k, t in load_file(llm / "model.safetensors").items()}, llm / "model.safetensors")
    convert_llava(tmp_path / "lora", language=llm, output=tmp_path / "merged")
    assert TensorFiles(tmp_path / "merged").dtypes["language_model.model.layers.0.mlp.up_proj.weight"] == torch.float16


def test_the_tower_in_the_checkpoint_is_used(parts, tmp_path):
    folder, model = parts
    place = shutil.copytree(folder / "llava", tmp_path / "checkpoint")
    trained = official_tensors(model)
    name = "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding"
    trained[name] += 1
    torch.save(trained, place / "pytorch_model.bin")
    done = convert_llava(place, folder / "clip", output=tmp_path / "out")
    assert [note for note in done.notes if "the checkpoint's own" in note] == done.notes != []
    class_embedding = AutoModel.from_pretrained(tmp_path / "out").vision_model.embeddings.class_embedding
    assert torch.equal(class_embedding, trained[name])


@pytest.mark.core
def test_a_projector_alone(parts, tmp_path):
    folder, model = parts
    convert_llava(
        folder / "mm_projector.bin", folder / "clip", folder / "llm", output=tmp_path / "out",
    )  # fmt: skip
    assert_same(tmp_path / "out", model)
    # with a configuration beside it, in a folder, and a LLaVA as language model
    place = tmp_path / "stage1"
    place.mkdir()
    shutil.copy(folder / "mm_projector.bin", place)
    write_config(place, model, mm_vision_tower=str(folder / "clip"), mm_vision_select_layer=-1)
    done = convert_llava(place, language=folder / "llava", output=tmp_path / "again", conversation="vicuna_v1")
    assert done.config.vision_feature_layer == -1
    assert_same(tmp_path / "again", model)


def test_an_encoder_in_open_clips_layout(parts, tmp_path):
    folder, model = parts
    ours = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("vision_model.")}
    pieces = plan(invert(OPEN_CLIP_TABLE), ours)
    torch.save({name: piece.load(ours.__getitem__) for name, piece in pieces.items()}, tmp_path / "clip.pt")
    convert_llava(
        folder / "mm_projector.bin", tmp_path / "clip.pt", folder / "llm", output=tmp_path / "out",
        config={"vision_config": {"num_attention_heads": 4}},
    )  # fmt: skip
    assert_same(tmp_path / "out", model)
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_processor.crop_size["height"] == 30


def test_tokens_around_images(parts, tmp_path):
    """v1's projector with `<im_start>` and `<im_end>`: it brings their rows; the head's are the mean of the others."""
    folder, model = parts
    old = model.get_input_embeddings().weight
    rows = torch.randn(2, old.shape[1])
    projector = torch.load(folder / "mm_projector.bin")
    torch.save(
        {**projector, "model.embed_tokens.weight": torch.cat([old.detach() + 1, rows])}, tmp_path / "mm_projector.bin"
    )
    convert_llava(
        tmp_path / "mm_projector.bin", folder / "clip", folder / "llm", output=tmp_path / "out", conversation="llava_v1"
    )
    loaded, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.get_input_embeddings().weight, torch.cat([old, rows]))
    head = model.get_output_embeddings().weight
    assert torch.equal(loaded.get_output_embeddings().weight[:-2], head)
    torch.testing.assert_close(loaded.get_output_embeddings().weight[-1], head.mean(dim=0))
    ids = processor.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>", "<image>"])
    assert ids == [len(old), len(old) + 1, loaded.config.image_token_id]
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    asked = processor.apply_chat_template([message], add_generation_prompt=True)
    assert "USER: <im_start><image><im_end>\nwhat? ASSISTANT:" in asked
    given = processor(images=tiny_image(), text=asked, return_tensors="pt")
    assert loaded(**given).logits.shape[-1] == len(old) + 2


# ---------------------------------------------------------------------- LoRA


def lora(folder: Path, model, place: Path, kind: str = "safetensors", **settings) -> LlamaForCausalLM:
    """Write a fine-tune as the official code does; returns the language model as PEFT merges it."""
    place.mkdir()
    base = LlamaForCausalLM.from_pretrained(folder / "llm")
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    peft = get_peft_model(base, LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": targets, **settings}))
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    peft.save_pretrained(place)
    adapter = load_file(place / "adapter_model.safetensors")
    if kind == "bin":
        (place / "adapter_model.safetensors").unlink()
        torch.save(adapter, place / "adapter_model.bin")
    write_config(place, model, mm_vision_tower=str(folder / "clip"))
    projector = torch.load(folder / "mm_projector.bin")
    torch.save(
        {f"base_model.model.{name}": tensor for name, tensor in projector.items()}, place / "non_lora_trainables.bin"
    )
    return peft.merge_and_unload()


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("safetensors", {}),
        ("bin", {}),
        ("bin", {"use_rslora": True}),
        ("safetensors", {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {r"layers.1.self_attn.q_proj": 2}}),
    ],
)
def test_lora_is_merged_as_peft_merges_it(parts, tmp_path, kind, settings):
    folder, model = parts
    merged = lora(folder, model, tmp_path / "lora", kind, **settings)
    convert_llava(tmp_path / "lora", language=folder / "llm", output=tmp_path / "out")
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(loaded.language_model.state_dict()[name], tensor, atol=1e-6, rtol=0, msg=name)
    assert not torch.equal(
        loaded.language_model.model.layers[0].mlp.up_proj.weight,
        model.language_model.model.layers[0].mlp.up_proj.weight,
    )
    assert all(
        torch.equal(tensor, model.bridge.state_dict()[name]) for name, tensor in loaded.bridge.state_dict().items()
    )


def test_lora_on_a_llava(parts, tmp_path):
    """The base is a LLaVA that the adapter names; its projector stayed frozen, so only the base has it."""
    folder, model = parts
    merged = lora(folder, model, tmp_path / "lora")
    (tmp_path / "lora" / "non_lora_trainables.bin").unlink()
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(folder / "llava")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    convert_llava(tmp_path / "lora", output=tmp_path / "out")
    loaded = AutoModel.from_pretrained(tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(loaded.language_model.state_dict()[name], merged.state_dict()[name], atol=1e-6, rtol=0)
    assert torch.equal(loaded.bridge.linear_2.weight, model.bridge.linear_2.weight)
    inputs = json.loads((tmp_path / "out" / "conversion.json").read_text())["inputs"]
    assert inputs.keys() == {"clip", "llava", "adapter_model.safetensors"}


@pytest.mark.parametrize(
    "settings, tensors, message",
    [
        ({"use_dora": True}, {}, "DoRA"),
        ({"peft_type": "LOHA"}, {}, "LOHA"),
        ({}, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": None}, "only one of LoRA's two"),
        ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 100)}, "lora_embedding_A is not"),
        ({}, {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(3, 5)}, r"of \[32, 5\]"),
        ({}, {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(3, 32),
              "base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight": torch.ones(32, 3)}, "layers.7"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit_are_refused(parts, tmp_path, settings, tensors, message):
    folder, model = parts
    place = tmp_path / "lora"
    lora(folder, model, place)
    file = place / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    changed = {**load_file(place / "adapter_model.safetensors"), **tensors}
    save_file({name: t for name, t in changed.items() if t is not None}, place / "adapter_model.safetensors")
    with pytest.raises(ConversionError, match=message):
        convert_llava(place, language=folder / "llm", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- transformers' own repositories


def native(kind: str, folder: Path):
    """A repository like `llava-hf/*`: `<image>` has a row in the language model's table."""
    torch.manual_seed(3)
    config_class, model_class = {
        "llava": (LlavaConfig, LlavaForConditionalGeneration),
        "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    }[kind]
    text_config = LANGUAGE["llama"]()
    text_config.vocab_size = 104
    options = {"image_grid_pinpoints": [[30, 60], [60, 30], [60, 60]]} if kind == "llava_next" else {}
    config = config_class(
        vision_config=VISION["clip"](), text_config=text_config, image_token_index=100, image_seq_length=25, **options
    )
    theirs = model_class(config).eval()
    spread_weights(theirs)
    theirs.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    processor = clip_image_processor()
    processor.save_pretrained(folder)
    if kind == "llava_next":
        file = folder / "preprocessor_config.json"
        fields = {**json.loads(file.read_text()), "image_processor_type": "LlavaNextImageProcessor", "do_pad": True}
        file.write_text(json.dumps(fields))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 'theirs' }}"}))
    return theirs


@pytest.mark.core
@pytest.mark.parametrize("names", ["as saved", "old", "new"])
@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_transformers_repositories(kind, names, tmp_path):
    theirs = native(kind, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    if names != "as saved":  # both ways of naming, wherever the library stands
        usual = usual_names(load_file(file), "transformers")
        tensors = {usual[key]: tensor for key, tensor in load_file(file).items()}
        assert "language_model.lm_head.weight" in tensors
        if names == "new":
            tensors = theirs.state_dict()
            assert "model.multi_modal_projector.linear_1.weight" in tensors
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file, metadata={"format": "pt"})
    convert_llava(tmp_path / "hf", output=tmp_path / "out")
    ours, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert ours.config.image_token_id == 100 and processor.chat_template == "{{ 'theirs' }}"
    assert processor.image_aspect_ratio == {"llava": "square", "llava_next": "anyres"}[kind]
    inputs = processor(
        images=[tiny_image(0, (60, 33)), tiny_image(1, (30, 59)), tiny_image(2)],
        text=["a<image>b", "<image><image>c d"],
        padding=True, return_tensors="pt",
    )  # fmt: skip
    given = dict(inputs)
    if kind == "llava_next":  # they want every image's tiles padded to the same number
        counts = [anyres_layout(ours.config, *size).num_tiles for size in inputs["image_sizes"].tolist()]
        assert len(set(counts)) > 1
        tiles = given["pixel_values"].split(counts)
        given["pixel_values"] = torch.nn.utils.rnn.pad_sequence(list(tiles), batch_first=True)
    attended = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**given, position_ids=(attended.cumsum(-1) - 1).clamp(min=0)).logits[attended]
        torch.testing.assert_close(ours(**inputs).logits[attended], expected, atol=2e-5, rtol=0)  # fp32, 2 layers


def test_a_padding_repository_stays_one(tmp_path):
    native("llava", tmp_path / "hf")
    file = tmp_path / "hf" / "preprocessor_config.json"
    fields = {**json.loads(file.read_text()), "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    file.write_text(json.dumps(fields))
    (tmp_path / "hf" / "chat_template.json").unlink()
    convert_llava(tmp_path / "hf", output=tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_aspect_ratio == "pad" and "USER: " in processor.chat_template


# ---------------------------------------------------------------------- the processor


@pytest.mark.core
@pytest.mark.parametrize(
    "language, name, conversation",
    [("mistral", "any", "mistral_instruct"), ("llama", "llava-v1-0719-336px-lora-vicuna", "vicuna_v1"),
     ("llama", "llava-llama-2-13b-chat", "llava_llama_2"), ("llama", "LLaVA-13b-v0", "llava_v0")],
)  # fmt: skip
def test_conversations_are_those_of_the_releases(language, name, conversation, tmp_path):
    config = MLPLlavaConfig(vision_config=VISION["clip"](), text_config=LANGUAGE[language]())
    assert conversation_of(name, config, tiny_tokenizer()) == conversation
    if language == "llama" and conversation == "vicuna_v1":
        config.projector_type = "linear"
        assert conversation_of(name, config, tiny_tokenizer()) == "llava_v1"
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
        assert conversation_of(name, config, tokenizer) == "chatml_direct"


def test_chatml_ends_a_turn(parts, tmp_path):
    folder, _ = parts
    place = shutil.copytree(folder / "llava", tmp_path / "checkpoint")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.save_pretrained(place)
    convert_llava(place, output=tmp_path / "out")
    loaded, processor = AutoModel.from_pretrained(tmp_path / "out"), AutoProcessor.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.eos_token_id == [2, processor.tokenizer.convert_tokens_to_ids("<|im_end|>")]
    asked = processor.apply_chat_template([{"role": "user", "content": "what?"}], add_generation_prompt=True)
    assert asked.endswith("<|im_start|>user\nwhat?<|im_end|><|im_start|>assistant\n")


def test_text_after_an_image_is_tokenised_like_separate_text(tmp_path):
    """The releases' tokenizers put sentencepiece's space before a whole text only (`legacy` is false), but the
    official code tokenises the text after an image separately."""
    pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece files by it")
    place = shutil.copytree(CASE / "checkpoint", tmp_path / "checkpoint")
    settings = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**settings, "legacy": False}))
    convert_llava(place, CASE / "clip_vision_tower", output=tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    meta, inputs = json.loads((CASE / "meta.json").read_text()), load_file(CASE / "inputs.safetensors")
    for tag in ("one", "multi"):
        [prompt], [official] = meta["prompts"][tag]["prompts"], inputs[f"{tag}.input_ids"].tolist()
        images = [tiny_image(index) for index in range(prompt.count("<image>"))]
        [ids] = processor(images=images, text=prompt)["input_ids"]
        image = processor.image_token_id
        once = [token for index, token in enumerate(ids) if token != image or ids[index - 1] != image]
        assert [-200 if token == image else token for token in once] == official
    # after other special tokens nothing is added
    assert processor.tokenizer.tokenize("</s>USER") != processor.tokenizer.tokenize("</s> USER")


def test_official_pinpoints_have_the_width_first(tmp_path):
    pytest.importorskip("google.protobuf", reason="transformers reads sentencepiece files by it")
    place = shutil.copytree(CASE / "checkpoint", tmp_path / "checkpoint")
    fields = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**fields, "image_grid_pinpoints": "[(28, 56), (84, 28)]"}))
    done = convert_llava(place, CASE / "clip_vision_tower", output=tmp_path / "out")
    assert done.config.image_grid_pinpoints == [[56, 28], [28, 84]]
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_grid_pinpoints == [[56, 28], [28, 84]]


# ---------------------------------------------------------------------- what doesn't fit


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if "mm_projector" in name], "no projector"),
        (lambda tensors: tensors.pop("model.mm_projector.0.bias"), "missing: bridge.linear_1.bias"),
        (lambda tensors: tensors.update({"model.extra": torch.ones(1)}), "conversion table: model.extra"),
        (lambda tensors: tensors.update({"model.mm_projector.2.weight": torch.ones(32, 9)}), "expected .32, 32."),
        (lambda tensors: tensors.update({"model.mm_projector.0.weight": torch.ones(32, 9)}), "width 9, but the vision"),
        (lambda tensors: tensors.update({"model.mm_projector.2.weight": torch.ones(9, 32)}), "width 9, but the lang"),
        (lambda tensors: tensors.update({"model.mm_projector.query": torch.ones(1)}), "neither linear nor an MLP"),
        (lambda tensors: tensors.update({"model.mm_projector.0.weight": torch.ones(0)}), "ZeRO-3"),
        (lambda tensors: tensors.pop("lm_head.weight"), "missing: language_model.lm_head.weight"),
    ],
)  # fmt: skip
def test_a_changed_checkpoint_is_refused(parts, tmp_path, change, message):
    folder, model = parts
    place = shutil.copytree(folder / "llava", tmp_path / "checkpoint")
    tensors = official_tensors(model, vision=False)
    change(tensors)
    torch.save(tensors, place / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=message) as error:
        convert_llava(place, output=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_aspect_ratio": "anyres_max_9"}, "expected square, pad or anyres"),
        ({"image_aspect_ratio": "anyres"}, "image_grid_pinpoints None; expected a list"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": "(1x1),...,(6x6)"}, "expected a list of .width"),
        ({"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[30, 60]], "mm_patch_merge_type": "spatial_unpad"},
         "image_newline, which is not in the checkpoint"),
        ({"mm_vision_select_feature": "cls"}, "expected patch or cls_patch"),
        ({"mm_projector_type": "mlp2x_relu"}, "'mlp2x_relu'; expected identity, linear"),
        ({"model_type": "llava_mpt"}, "llava_mpt is not known"),
        ({"mm_use_im_start_end": True}, "<im_end> is token 101, but the language model has 100 rows"),
        ({"mm_vision_tower": "/nowhere/clip"}, "names '/nowhere/clip' as its vision tower"),
        ({"mm_vision_tower": None}, "does not name its vision tower"),
    ],
)  # fmt: skip
def test_a_changed_configuration_is_refused(parts, tmp_path, fields, message):
    folder, _ = parts
    place = shutil.copytree(folder / "llava", tmp_path / "checkpoint")
    (place / "config.json").write_text(json.dumps({**json.loads((place / "config.json").read_text()), **fields}))
    with pytest.raises(ConversionError, match=message):
        convert_llava(place, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_parts_are_named(parts, tmp_path):
    folder, _ = parts
    out, projector = tmp_path / "out", folder / "mm_projector.bin"
    with pytest.raises(ConversionError, match="holds no language model: give"):
        convert_llava(projector, folder / "clip", output=out)
    with pytest.raises(ConversionError, match="give the vision encoder's folder"):
        convert_llava(projector, language=folder / "llm", output=out)
    with pytest.raises(ConversionError, match="no language model with its config.json in"):
        convert_llava(projector, folder / "clip", folder / "clip", output=out)
    delta = shutil.copytree(folder / "llava", tmp_path / "llava-7b-delta-v1")
    with pytest.raises(ConversionError, match="apply_delta"):
        convert_llava(delta, output=out)
    (delta / "config.json").unlink()
    lone = delta.rename(tmp_path / "lone")
    with pytest.raises(ConversionError, match="no config.json beside"):
        convert_llava(lone, output=out)
    done = convert_llava(folder / "llava", language=folder / "llm", output=tmp_path / "noted")
    assert [note for note in done.notes if "is not used" in note]
    assert not out.exists()


@pytest.mark.parametrize(
    "index, message",
    [
        ({"weight_map": {"a": "../llava/pytorch_model.bin"}}, "not beside it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not beside it"),
        ({"weight_map": {"a": "..\\secret.bin"}}, "not beside it"),
        ({"weight_map": {"a": "pytorch_model-00007-of-00009.bin"}}, "pytorch_model-00007-of-00009.bin"),
        ({"weights": {}}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_that_names_other_files_is_refused(parts, tmp_path, index, message):
    folder, _ = parts
    place = shutil.copytree(folder / "llava", tmp_path / "checkpoint")
    (place / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (place / "pytorch_model.bin").unlink()
    with pytest.raises(ConversionError, match=message):
        convert_llava(place, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


def test_files_that_could_run_code_are_not_read(parts, tmp_path, capsys):
    folder, model = parts
    torch.save({"model.mm_projector.weight": Harmful()}, tmp_path / "mm_projector.bin")
    with pytest.raises(ConversionError, match="read safely"):
        convert_llava(tmp_path / "mm_projector.bin", folder / "clip", folder / "llm", output=tmp_path / "out")
    lora(folder, model, tmp_path / "lora")
    torch.save(Harmful(), tmp_path / "lora" / "non_lora_trainables.bin")
    with pytest.raises(ConversionError, match="read safely"):
        convert_llava(tmp_path / "lora", language=folder / "llm", output=tmp_path / "out")
    assert "must not run" not in capsys.readouterr().out and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------- command line


def test_command_line(parts, tmp_path):
    folder, model = parts

    def run(*arguments):
        return CliRunner().invoke(app, ["convert", "llava", *map(str, arguments)])

    done = run("--checkpoint", folder / "llava", "--language", folder / "llm", "--output", tmp_path / "whole")
    assert done.exit_code == 0 and "mlp_llava" in done.output and "is not used" in done.output, done.output
    (tmp_path / "config.json").write_text(json.dumps({"vision_feature_layer": -2}))
    done = run("--checkpoint", folder / "mm_projector.bin", "--vision", folder / "clip", "--language", folder / "llm",
               "--conversation", "vicuna_v1", "--config", tmp_path / "config.json",
               "--output", tmp_path / "out")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert_same(tmp_path / "out", model)
    assert "ASSISTANT" in AutoProcessor.from_pretrained(tmp_path / "out").chat_template
    for checkpoint in ("none.bin", tmp_path / "none"):
        done = run("--checkpoint", checkpoint, "--output", tmp_path / "x")
        assert done.exit_code and "no such file or folder" in done.output
    done = run("--checkpoint", folder / "mm_projector.bin", "--output", tmp_path / "x")
    assert done.exit_code and "give the one it was trained with (--language)" in done.output
    assert TensorFiles(tmp_path / "out").shapes.keys() == model.state_dict().keys()
