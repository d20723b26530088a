"""Bridges as repositories: pushed and loaded with the Hub's real client, pinned, in one commit, with their code."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from tiny import BRIDGE_OPTIONS, LANGUAGE, VISION, clip_image_processor, spread_weights, tiny_image, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor
from typer.testing import CliRunner

import vlbridge
from vlbridge.assets import SHIPPED
from vlbridge.cli import app
from vlbridge.convert import convert_openflamingo
from vlbridge.hub import push_folder
from vlbridge.modeling.modeling_pins import weights_sha256
from vlbridge.remote_code import auto_map_of, flat_code


families = pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
# Flamingo's is one that transformers does not have
LANGUAGE_OF = {**dict.fromkeys(vlbridge.FAMILIES, "llama"), "perceiver": "mosaic_gpt"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of frozen parts."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(3)
    for name, config in (
        ("clip", VISION["clip"]()),
        ("llama", LANGUAGE["llama"]()),
        ("mosaic_gpt", LANGUAGE["mosaic_gpt"]()),
    ):
        auto_class = AutoModel if name == "clip" else AutoModelForCausalLM
        model = auto_class.from_config(config)
        spread_weights(model)
        model.save_pretrained(folder / name)
        (clip_image_processor() if name == "clip" else tiny_tokenizer()).save_pretrained(folder / name)
    return folder


@pytest.fixture
def repositories(hub, parts):
    """The Hub, the frozen parts on it."""
    for folder in parts.iterdir():
        hub.add(f"lab/{folder.name}", folder)
    return hub


def composed(bridge, vision="lab/clip", language=None, **options):
    language = f"lab/{LANGUAGE_OF[bridge]}" if language is None else language
    torch.manual_seed(4)
    model, processor = vlbridge.compose(vision, language, bridge, **BRIDGE_OPTIONS[bridge], **options)
    spread_weights(model.bridge)
    return model, processor


@torch.no_grad()
def logits_of(model, processor):
    inputs = processor(images=[tiny_image()], text=["<image>what"], return_tensors="pt")
    return model(**inputs).logits


def of_kind(hub, *kinds: str) -> list[str]:
    return [path for method, path in hub.requests if any(kind in path for kind in kinds)]


# ---------------------------------------------------------------------- pushing and loading


@pytest.mark.core
@families
def test_a_bridge_is_one_commit_and_one_line(bridge, repositories):
    """Online, from the cache, and without a network that the client knows or does not know of."""
    hub = repositories
    model, processor = composed(bridge)
    commit = model.push_to_hub("me/bridge", bridge_only=True, processor=processor)
    assert len(hub.history("me/bridge")) == 2 and hub.history("me/bridge")[0] == commit.oid
    files = hub.files("me/bridge")
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json",
            "chat_template.jinja", "tokenizer.json", "README.md"} <= files.keys()  # fmt: skip
    pins = json.loads(files["config.json"])["frozen_parts"]
    for part, name in (("vision_model", "clip"), ("language_model", LANGUAGE_OF[bridge])):
        assert pins[part]["source"] == f"lab/{name}"
        assert pins[part]["revision"] == hub.history(f"lab/{name}")[0] and len(pins[part]["sha256"]) == 64
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model == ["lab/clip", f"lab/{LANGUAGE_OF[bridge]}"]

    expected = logits_of(model, processor)
    loaded, loaded_processor = AutoModel.from_pretrained("me/bridge"), AutoProcessor.from_pretrained("me/bridge")
    assert torch.equal(logits_of(loaded, loaded_processor), expected)
    assert loaded.generation_config.to_dict() == model.generation_config.to_dict()
    hub.requests.clear()
    assert torch.equal(logits_of(AutoModel.from_pretrained("me/bridge"), processor), expected)
    assert not of_kind(hub, "/cdn/")  # all of it was in the cache
    for known in (True, False):
        with hub.offline(known=known):
            again = AutoModel.from_pretrained("me/bridge")
            assert torch.equal(logits_of(again, AutoProcessor.from_pretrained("me/bridge")), expected)
    hub.requests.clear()
    assert torch.equal(logits_of(AutoModel.from_pretrained("me/bridge", local_files_only=True), processor), expected)
    assert not hub.requests


@pytest.mark.core
def test_saving_and_pushing(repositories, tmp_path):
    """`save_pretrained(push_to_hub=True)`, the processor on its own, branches, pull requests, private repositories."""
    hub = repositories
    model, processor = composed("mlp")
    processor.save_pretrained(tmp_path / "bridge")
    model.save_pretrained(tmp_path / "bridge", bridge_only=True, push_to_hub=True, repo_id="me/bridge", private=True)
    assert hub.repositories["me/bridge"].private
    assert hub.files("me/bridge") == {path.name: path.read_bytes() for path in (tmp_path / "bridge").iterdir()}
    with pytest.raises(OSError, match="not a valid model identifier"):
        AutoModel.from_pretrained("me/bridge", token=False)
    first = hub.history("me/bridge")[0]
    assert processor.push_to_hub("me/bridge").oid == first  # nothing new
    before = {name: tensor.clone() for name, tensor in model.bridge.state_dict().items()}
    with torch.no_grad():
        model.bridge.linear_1.bias += 1
    hub.repositories["me/bridge"].commits[first].files["README.md"] = type(
        hub.repositories["me/bridge"].commits[first].files["README.md"]
    )(b"Written by hand.")
    model.push_to_hub("me/bridge", bridge_only=True, tags=["shapes"])
    assert hub.files("me/bridge")["README.md"] == b"Written by hand."
    assert "processor_config.json" in hub.files("me/bridge")
    for revision, changed in ((first, False), ("main", True)):
        loaded = AutoModel.from_pretrained("me/bridge", revision=revision)
        assert torch.equal(loaded.bridge.linear_1.bias, before["linear_1.bias"] + changed)
    request = model.push_to_hub("me/whole", revision="experiment", create_pr=False)
    assert hub.history("me/whole", "experiment")[0] == request.oid and not hub.files("me/whole")
    assert torch.equal(
        logits_of(AutoModel.from_pretrained("me/whole", revision="experiment"), processor), logits_of(model, processor)
    )
    assert model.push_to_hub("me/bridge", create_pr=True).pr_num == 1
    with pytest.raises(TypeError, match="no argument privat"):
        model.push_to_hub("me/bridge", privat=True)
    with pytest.raises(ValueError, match="no files"):
        push_folder(tmp_path / "empty", "me/bridge")
    (tmp_path / "run" / "checkpoint-7").mkdir(parents=True)
    for name in ("checkpoint-7/optimizer.pt", "checkpoint-7.md"):
        (tmp_path / "run" / name).write_text("of a run")
    push_folder(tmp_path / "run", "me/run")
    assert hub.files("me/run").keys() == {"checkpoint-7.md"}


def test_a_bridge_that_nobody_else_could_load_is_not_pushed(repositories, tmp_path):
    hub = repositories
    model, processor = composed("mlp")
    for part in ("vision_model", "language_model"):
        getattr(model, part).save_pretrained(tmp_path / part)
        model.config.frozen_parts[part] = {"source": str(tmp_path / part)}
    before = set(hub.repositories)
    for push in (
        lambda: model.push_to_hub("me/stranded", bridge_only=True),
        lambda: model.save_pretrained(tmp_path / "bridge", bridge_only=True, push_to_hub=True, repo_id="me/stranded"),
    ):
        with pytest.raises(ValueError, match="a folder of this machine: nobody else could load"):
            push()
    processor.save_pretrained(tmp_path / "bridge")
    saved = (tmp_path / "bridge" / "config.json").read_bytes()
    command = ["push", str(tmp_path / "bridge"), "me/stranded"]
    named = [f"--part=language_model=lab/{LANGUAGE_OF['mlp']}", "--part=vision_model=lab/clip"]
    for arguments, code, message in (
        ([], 1, "--part language_model=OWNER/NAME"),
        (named[:1], 1, "--part vision_model=OWNER/NAME"),
        ([named[0], named[0].replace("language", "vision")], 1, "does not hold the weights of the vision_model"),
        (["--part=bridge=lab/clip"], 1, "there is no part 'bridge' to name"),
        (["--part=vision_model"], 2, "expected PART=ID"),
    ):
        done = CliRunner().invoke(app, [*command, *arguments])
        assert done.exit_code == code and message in done.stderr, done.output
    assert set(hub.repositories) == before
    done = CliRunner().invoke(app, [*command, *named])
    assert done.exit_code == 0, done.output
    pins = json.loads(hub.files("me/stranded")["config.json"])["frozen_parts"]
    assert pins["vision_model"]["source"] == "lab/clip" and pins["vision_model"]["revision"]
    assert (tmp_path / "bridge" / "config.json").read_bytes() == saved
    loaded = AutoModel.from_pretrained("me/stranded")
    assert torch.equal(logits_of(loaded, processor), logits_of(model, processor))


def test_the_command(repositories, tmp_path, monkeypatch):
    """A saved folder goes up as it is, with a card and the code that it lacks."""
    hub = repositories
    model, processor = composed("qformer")
    model.save_pretrained(tmp_path / "whole", processor=processor)
    model.save_pretrained(tmp_path / "bridge", bridge_only=True, processor=processor)
    (tmp_path / "bridge" / "notes").mkdir()
    (tmp_path / "bridge" / "notes" / "log.txt").write_text("loss")
    for name in ("whole", "bridge"):
        saved = {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        done = CliRunner().invoke(app, ["push", str(tmp_path / name), f"lab/{name}", "--with-code", "--private"])
        assert done.exit_code == 0, done.output
        assert done.stdout.strip() == f"{hub.endpoint}/lab/{name}/commit/{hub.history(f'lab/{name}')[0]}"
        assert saved == {path: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}
        files = hub.files(f"lab/{name}")
        assert {path.relative_to(tmp_path / name).as_posix() for path in saved} <= files.keys()
        assert {"README.md", "modeling_qformer.py", "processing_qformer.py"} <= files.keys()
        assert "AutoProcessor" in json.loads(files["processor_config.json"])["auto_map"]
        assert hub.repositories[f"lab/{name}"].private and len(hub.history(f"lab/{name}")) == 2
        assert torch.equal(logits_of(AutoModel.from_pretrained(f"lab/{name}"), processor), logits_of(model, processor))
    for arguments, message in (
        ([str(tmp_path), "lab/x"], "no config.json"),
        ([str(tmp_path / "bridge"), "someone/x"], "403"),
    ):
        done = CliRunner().invoke(app, ["push", *arguments])
        assert done.exit_code == 1 and message in done.stderr
    assert "lab/x" not in hub.repositories
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = CliRunner().invoke(app, ["push", str(tmp_path / "bridge"), "lab/x"])
    assert done.exit_code == 1 and done.stderr.endswith("Log in first: hf auth login\n")


@families
def test_what_was_pushed_is_loaded_again(bridge, repositories, tmp_path, monkeypatch):
    """After the upload, from an empty cache: what can't be loaded then is an error that says what to do."""
    hub = repositories
    model, processor = composed(bridge)
    model.save_pretrained(tmp_path / "bridge", bridge_only=True, processor=processor)
    command = ["push", str(tmp_path / "bridge"), "me/bridge"]
    hub.requests.clear()
    assert CliRunner().invoke(app, command).exit_code == 0
    asked = [path for method, path in hub.requests[[m for m, _ in hub.requests].index("POST") :]]
    last = [number for number, path in enumerate(asked) if "/commit/" in path][-1]
    for place in ("/resolve/", "/models/lab/clip", f"/models/lab/{LANGUAGE_OF[bridge]}"):
        assert any(place in path for path in asked[last:]), place
    assert any("safetensors" in path or "/cdn/" in path for path in asked[last:])

    # a part that is not there any more
    part = hub.repositories.pop("lab/clip")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "me/bridge was uploaded" in done.stderr, done.output
    assert "its vision_model, lab/clip at commit" in done.stderr and "--part vision_model=OWNER/NAME" in done.stderr
    hub.repositories["lab/clip"] = part

    # weights that were changed on the way, and a Hub that does not give them
    before = vlbridge.hub.sha256_of
    monkeypatch.setattr(vlbridge.hub, "sha256_of", lambda path: str(path) if str(path).endswith("tensors") else "1")
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "there is not what was sent. Push it again." in done.stderr, done.output
    monkeypatch.setattr(vlbridge.hub, "sha256_of", before)
    hub.fail(r"/resolve/.*/config.json", times=99, status=503)
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "it can't be fetched from there" in done.stderr, done.output


# ---------------------------------------------------------------------- failures


@pytest.mark.core
def test_uploads_are_repeated(repositories):
    hub = repositories
    model, processor = composed("mlp")
    hub.fail("/repos/create", status=503)
    hub.fail("/preupload/", status=500)
    hub.fail("/lfs/", method="PUT", cut_after=1000)
    hub.fail("/commit/", status=429, retry_after=9)
    hub.fail("/commit/", answer_lost=True)
    model.push_to_hub("me/bridge", bridge_only=True, processor=processor)
    assert not any(failure.times for failure in hub.failures)
    assert 9 in hub.waits
    assert len(hub.history("me/bridge")) == 2  # not once more for the answer that was lost
    assert torch.equal(logits_of(AutoModel.from_pretrained("me/bridge"), processor), logits_of(model, processor))


@pytest.mark.parametrize("where", [{"path": "^/lfs/", "cut_after": 1000}, {"path": "/commit/", "status": 503}])
def test_nothing_is_half_published(where, repositories):
    hub = repositories
    model, processor = composed("mlp")
    model.push_to_hub("me/bridge", bridge_only=True, processor=processor)
    published, first = hub.files("me/bridge"), hub.history("me/bridge")
    expected = logits_of(model, processor)
    with torch.no_grad():
        model.bridge.linear_1.bias += 1
    hub.fail(**where, times=1000)
    with pytest.raises((RuntimeError, HfHubHTTPError)):
        model.push_to_hub("me/bridge", bridge_only=True)
    assert hub.files("me/bridge") == published and hub.history("me/bridge") == first
    assert torch.equal(logits_of(AutoModel.from_pretrained("me/bridge"), processor), expected)
    hub.failures.clear()
    model.push_to_hub("me/bridge", bridge_only=True)
    loaded = AutoModel.from_pretrained("me/bridge")
    assert torch.equal(logits_of(loaded, processor), logits_of(model, processor))


def test_what_is_refused_is_not_repeated(repositories):
    hub = repositories
    model, _ = composed("mlp")
    with pytest.raises(HfHubHTTPError, match="403"):
        model.push_to_hub("someone/bridge", bridge_only=True)
    with pytest.raises(HfHubHTTPError):
        model.push_to_hub("me/bridge", bridge_only=True, token="wrong")
    assert not hub.waits and "me/bridge" not in hub.repositories


@pytest.mark.parametrize(
    "failure",
    [{"cut_after": 2000}, {"cut_after": 2000, "reset": True}, {"status": 503}, {"status": 429, "retry_after": 3}],
)
def test_downloads_are_repeated(failure, repositories):
    """Of the bridge's weights and of the parts'."""
    hub = repositories
    model, processor = composed("mlp")
    model.push_to_hub("me/bridge", bridge_only=True)
    forget_cache()
    for _ in range(3):  # large files: the bridge and both parts
        hub.fail("/cdn/", **failure)
    loaded = AutoModel.from_pretrained("me/bridge")
    assert not any(failure.times for failure in hub.failures)
    assert torch.equal(logits_of(loaded, processor), logits_of(model, processor))


@pytest.mark.parametrize("path", ["/cdn/", r"/resolve/\w+/config.json"])
def test_a_download_that_failed_works_when_repeated(path, repositories):
    hub = repositories
    model, processor = composed("mlp")
    model.push_to_hub("me/bridge", bridge_only=True)
    forget_cache()
    hub.fail(path, method="GET", times=1000, cut_after=100, reset=True)
    with pytest.raises(Exception, match="reset|connect|load"):
        AutoModel.from_pretrained("me/bridge")
    hub.failures.clear()
    assert torch.equal(logits_of(AutoModel.from_pretrained("me/bridge"), processor), logits_of(model, processor))


def forget_cache() -> None:
    import shutil

    from huggingface_hub import constants

    assert "hf_home" in constants.HF_HUB_CACHE
    shutil.rmtree(constants.HF_HUB_CACHE)


# ---------------------------------------------------------------------- pins


@pytest.fixture
def pushed(repositories):
    """A bridge on the Hub, and what it says."""
    model, processor = composed("mlp")
    model.push_to_hub("me/bridge", bridge_only=True, processor=processor)
    return repositories, model, processor


@pytest.fixture
def warnings(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def other_weights(parts: Path, name: str, folder: Path) -> Path:
    """A part of the same shape with other weights."""
    tensors = {key: tensor + 0.1 for key, tensor in load_file(parts / name / "model.safetensors").items()}
    folder.mkdir()
    for path in (parts / name).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["vision_model", "language_model"])
def test_another_part_of_the_same_shape_is_refused_unless_allowed(part, parts, tmp_path, warnings):
    """A local folder whose content was replaced."""
    mine = tmp_path / "parts"
    mine.mkdir()
    for name in ("clip", "llama"):
        (mine / name).symlink_to(parts / name)
    model, processor = composed("mlp", str(mine / "clip"), str(mine / "llama"))
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    name = {"vision_model": "clip", "language_model": "llama"}[part]
    (mine / name).unlink()
    other = other_weights(parts, name, mine / name)
    with pytest.raises(vlbridge.FrozenPartError, match=f"{part}.*allow_mismatch=True"):
        AutoModel.from_pretrained(tmp_path / "bridge")
    warnings.clear()
    loaded = AutoModel.from_pretrained(tmp_path / "bridge", allow_mismatch=True)
    hashes = [weights_sha256(str(folder)) for folder in (other, parts / name)]
    assert all(digest in warnings.text for digest in hashes) and part in warnings.text
    used = getattr(loaded, part).state_dict()
    stored = load_file(other / "model.safetensors")
    assert stored.keys() <= used.keys() and all(torch.equal(used[key], tensor) for key, tensor in stored.items())
    assert not torch.equal(logits_of(loaded, processor), logits_of(model, processor))


def test_another_shape_is_refused_even_where_allowed(parts, tmp_path):
    mine = tmp_path / "llama"
    mine.symlink_to(parts / "llama")
    model, _ = composed("mlp", str(parts / "clip"), str(mine))
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    mine.unlink()
    config = LANGUAGE["llama"]()
    config.num_hidden_layers, config.intermediate_size = 1, 64
    AutoModelForCausalLM.from_config(config).save_pretrained(mine)
    with pytest.raises(
        vlbridge.FrozenPartError, match=r"does not have the shape.*missing model.layers.1|has shape \[64"
    ):
        AutoModel.from_pretrained(tmp_path / "bridge", allow_mismatch=True)


def test_a_part_that_has_moved_on_is_still_found_at_its_commit(pushed, parts, tmp_path):
    hub, model, processor = pushed
    hub.add("lab/llama", other_weights(parts, "llama", tmp_path / "llama"))
    forget_cache()
    assert torch.equal(logits_of(AutoModel.from_pretrained("me/bridge"), processor), logits_of(model, processor))


def test_a_missing_part_is_named(pushed):
    hub, _, _ = pushed
    forget_cache()
    del hub.repositories["lab/llama"]
    for allow_mismatch in (False, True):
        with pytest.raises(vlbridge.FrozenPartError, match="language_model 'lab/llama' at revision"):
            AutoModel.from_pretrained("me/bridge", allow_mismatch=allow_mismatch)
    for known in (True, False):
        with hub.offline(known=known), pytest.raises(vlbridge.FrozenPartError, match="lab/llama.*couldn't connect"):
            AutoModel.from_pretrained("me/bridge")


@pytest.mark.core
def test_sharded_parts_and_bridges(repositories, parts, tmp_path):
    hub = repositories
    AutoModelForCausalLM.from_pretrained(parts / "llama").save_pretrained(tmp_path / "llama", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "llama")
    hub.add("lab/sharded", tmp_path / "llama")
    model, processor = composed("mlp", language="lab/sharded")
    model.push_to_hub("me/bridge", bridge_only=True, max_shard_size="5KB")
    assert sum(name.endswith(".safetensors") for name in hub.files("me/bridge")) > 1
    assert torch.equal(logits_of(AutoModel.from_pretrained("me/bridge"), processor), logits_of(model, processor))
    with hub.offline():
        AutoModel.from_pretrained("me/bridge")
    # one file where there were several, and the other way round: nothing old is left to be read
    for max_shard_size in ("5GB", "5KB"):
        with torch.no_grad():
            model.bridge.linear_1.bias += 1
        for save in (model.save_pretrained, model.push_to_hub):
            place = "me/bridge" if save == model.push_to_hub else tmp_path / "bridge"
            save(place, bridge_only=True, max_shard_size=max_shard_size)
            loaded = AutoModel.from_pretrained(place)
            assert torch.equal(loaded.bridge.linear_1.bias, model.bridge.linear_1.bias)


def test_parts_in_memory_are_shared(pushed, monkeypatch):
    hub, model, processor = pushed
    forget_cache()
    hub.requests.clear()
    loaded = AutoModel.from_pretrained(
        "me/bridge", vision_model=model.vision_model, language_model=model.language_model, allow_mismatch=True
    )
    assert loaded.language_model is model.language_model and loaded.vision_model is model.vision_model
    assert torch.equal(logits_of(loaded, processor), logits_of(model, processor))
    assert not of_kind(hub, "lab/")
    # transformers' Auto classes copy their arguments, unless they are given the configuration too
    monkeypatch.setattr(type(model.language_model), "__deepcopy__", lambda *_: pytest.fail("copied"), raising=False)
    config = AutoConfig.from_pretrained("me/bridge")
    loaded = AutoModel.from_pretrained(
        "me/bridge", config=config, vision_model=model.vision_model, language_model=model.language_model
    )
    assert loaded.language_model is model.language_model


@pytest.mark.parametrize(
    ("part", "config", "message"),
    [
        ("language_model", lambda: LANGUAGE["opt"](), "is a opt; this bridge was trained with a llama"),
        ("language_model", lambda: _smaller(LANGUAGE["llama"]()), "num_hidden_layers is 1, expected 2"),
        ("vision_model", lambda: _smaller(VISION["clip"]()), "num_hidden_layers is 1, expected 2"),
    ],
)
def test_parts_in_memory_of_another_kind_are_refused(part, config, message, pushed):
    config = config()
    given = (AutoModel if part == "vision_model" else AutoModelForCausalLM).from_config(config)
    with pytest.raises(vlbridge.FrozenPartError, match=message):
        AutoModel.from_pretrained("me/bridge", **{part: given})


def _smaller(config):
    config.num_hidden_layers = 1
    return config


# ---------------------------------------------------------------------- trained tensors of frozen parts


CASES = Path(__file__).parents[1] / "parity" / "cases" / "openflamingo"


@pytest.mark.core
@pytest.mark.parametrize("case", ["of3b_mosaicgpt_every1", "of9b_mpt_every4_trainlayout_frozenemb"])
def test_trained_tables_travel_with_the_bridge(case, tmp_path):
    """OpenFlamingo trained the embedding tables, or let them grow by its special tokens."""
    case, whole = CASES / case, tmp_path / "whole"
    clip = json.loads((case / "meta.json").read_text())["config"]["clip"]
    heads = {"num_attention_heads": clip["vision_cfg"]["width"] // clip["vision_cfg"]["head_width"]}
    convert_openflamingo(case / "checkpoint.pt", case / "clip_open_clip.pt", case / "base_lm", whole,
                         tokenizer=case / "tokenizer_base", config={"vision_config": heads})  # fmt: skip
    model, processor = AutoModel.from_pretrained(whole), AutoProcessor.from_pretrained(whole)
    model.vision_model.save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="needs to know where the vision_model comes from"):
        model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    trained = model.set_frozen_parts(vision_model=tmp_path / "clip", language_model=case / "base_lm")
    assert trained == ["language_model.transformer.wte.weight"]
    model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    saved = load_file(tmp_path / "bridge" / "model.safetensors")
    assert {name for name in saved if not name.startswith("bridge.")} == set(trained)
    loaded = AutoModel.from_pretrained(tmp_path / "bridge")
    assert loaded.config.trained_tensors == trained
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(loaded, processor), logits_of(model, processor))
    assert not any(parameter.requires_grad for parameter in loaded.language_model.parameters())

    # one that is shared is not changed under the hands of others
    base = type(model.language_model)(model.config.text_config)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(vlbridge.FrozenPartError, match="brings a trained language_model.transformer.wte.weight"):
        AutoModel.from_pretrained(tmp_path / "bridge", language_model=base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    shared = AutoModel.from_pretrained(tmp_path / "bridge", language_model=loaded.language_model)
    assert shared.language_model is loaded.language_model

    # damaged or wrong lists
    config_path = tmp_path / "bridge" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({**config, "trained_tensors": [*trained, "language_model.nothing"]}))
    with pytest.raises(ValueError, match="language_model.nothing"):
        AutoModel.from_pretrained(tmp_path / "bridge")
    del config["trained_tensors"]
    config_path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="wte"):
        AutoModel.from_pretrained(tmp_path / "bridge")


def test_wrong_origins_are_refused(parts, tmp_path):
    model, _ = composed("mlp", str(parts / "clip"), str(parts / "llama"))
    other = other_weights(parts, "llama", tmp_path / "llama")
    with pytest.raises(ValueError, match=r"differs from .* in 2\d of 2\d tensors"):
        model.set_frozen_parts(language_model=other)
    with pytest.raises(ValueError, match="no part text_model"):
        model.set_frozen_parts(text_model=other)
    assert model.set_frozen_parts(language_model=parts / "llama") == []
    model.config.trained_tensors = ["language_model.model.embed_tokens.weigth"]
    with pytest.raises(ValueError, match="embed_tokens.weigth"):
        model.save_pretrained(tmp_path / "bridge", bridge_only=True)
    assert not (tmp_path / "bridge").exists()


# ---------------------------------------------------------------------- without vlbridge


@pytest.mark.parametrize(
    "model_class",
    [
        *(family.model_class for family in vlbridge.FAMILIES.values()),
        *(family.classifier_class for family in vlbridge.FAMILIES.values()),
        vlbridge.QFormerBlip2ForPreTraining,
        vlbridge.QFormerBlip2ForImageTextRetrieval,
    ],
)
def test_flat_code_imports_nothing_but_itself(model_class):
    auto_map = auto_map_of(model_class.config_class, model_class)
    assert auto_map.keys() >= {"AutoConfig", "AutoModel"} and auto_map["AutoModel"] is model_class
    files = flat_code(auto_map.values())
    assert f"{model_class.__module__.rpartition('.')[2]}.py" in files
    for name, source in files.items():
        compile(source, name, "exec")
        for line in source.splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1:2] and words[1].startswith("."):
                assert f"{words[1][1:]}.py" in files, f"{name}: {line}"
            if words[:2] and words[0] in ("from", "import") and words[1].startswith("vlbridge"):
                assert line.startswith("     "), f"{name}: {line}"  # inside a function, in `try`


REMOTE = """
import json, sys
from PIL import Image
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

for missing in ("vlbridge", "accelerate", "peft", "timm"):
    try:
        __import__(missing)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{missing} is here")
image, folder, *repositories = sys.argv[1:]
image = Image.open(image)

def answer(model, place):
    processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
    inputs = processor(images=[image], text=["<image>what"], return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()

answers = {}
for place in repositories:
    model = AutoModel.from_pretrained(place, trust_remote_code=True)
    assert "transformers_modules" in type(model).__module__
    answers[place] = answer(model, place)
for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    assert type(auto_class.from_pretrained(place, trust_remote_code=True)).__name__ == type(model).__name__
assert type(AutoConfig.from_pretrained(place, trust_remote_code=True)).__name__ == type(model.config).__name__

# saved again, from here
processor = AutoProcessor.from_pretrained(place, trust_remote_code=True)
model.save_pretrained(folder + "/again", bridge_only=True, processor=processor)
answers["again"] = answer(AutoModel.from_pretrained(folder + "/again", trust_remote_code=True), folder + "/again")
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def bare_environment(tmp_path_factory):
    """Installed packages without this one, and without what transformers itself does not need."""
    view = tmp_path_factory.mktemp("site-packages")
    left_out = ("vlbridge", "__editable__", "accelerate", "peft", "timm", "bitsandbytes", "datasets", "gguf", "gradio")
    for path in Path(transformers.__file__).parents[1].iterdir():
        if not path.name.lower().startswith(left_out) and path.suffix != ".pth":
            (view / path.name).symlink_to(path)
    return view


@pytest.mark.core
def test_the_code_travels_along(repositories, bare_environment, tmp_path):
    """In an environment without vlbridge: all families, whole and bridge alone, the same tokens as here."""
    hub = repositories
    expected = {}
    tiny_image().save(tmp_path / "image.png")
    for bridge in vlbridge.FAMILIES:
        model, processor = composed(bridge)
        inputs = processor(images=[tiny_image()], text=["<image>what"], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist()
        for bridge_only in (False, True):
            repo = f"me/{bridge}-{'bridge' if bridge_only else 'whole'}.v1"
            model.push_to_hub(repo, bridge_only=bridge_only, with_code=True, processor=processor)
            expected[repo] = tokens
        auto_map = json.loads(hub.files(repo)["config.json"])["auto_map"]
        assert auto_map.keys() >= {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
        assert "AutoProcessor" in json.loads(hub.files(repo)["processor_config.json"])["auto_map"]
        # here, the package's own code is used
        assert type(AutoModelForMultimodalLM.from_pretrained(repo)) is type(model)
    script = tmp_path / "script.py"
    script.write_text(REMOTE)
    environment = hub.environment(tmp_path / "home", PYTHONPATH=str(bare_environment))
    done = subprocess.run(
        [sys.executable, "-S", script, tmp_path / "image.png", tmp_path, *expected],
        capture_output=True, text=True, env=environment, timeout=500, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    expected["again"] = tokens  # of the last one
    assert answers == expected


@pytest.mark.core
def test_code_beside_a_processor_alone(repositories, tmp_path):
    _, processor = composed("mlp")
    processor.save_pretrained(tmp_path / "processor", with_code=True)
    about = json.loads((tmp_path / "processor" / "processor_config.json").read_text())
    assert about["auto_map"] == {"AutoProcessor": "processing_llava.MLPLlavaProcessor"}
    assert (tmp_path / "processor" / "processing_llava.py").is_file()


# ---------------------------------------------------------------------- the embedded default


@pytest.fixture(scope="module", params=SHIPPED)
def embedded(request):
    """Loaded before the local Hub takes the real one's place: its parts may still have to be fetched."""
    folder = vlbridge.default_model(request.param)
    return AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@pytest.mark.core
def test_the_embedded_bridges_are_small(embedded, hub):
    """12 MB, and 4 more of processor and card; one line of AutoModel, online and offline."""
    model, processor = embedded
    model.push_to_hub("me/easy-vqa", bridge_only=True, processor=processor)
    sizes = {name: len(content) for name, content in hub.files("me/easy-vqa").items()}
    assert sizes["model.safetensors"] <= 12_000_000 and sum(sizes.values()) <= 16_000_000
    assert hub.files("me/easy-vqa")["README.md"]
    expected = model.state_dict()
    loaded = AutoModel.from_pretrained("me/easy-vqa").state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    with hub.offline():
        loaded = AutoModel.from_pretrained("me/easy-vqa").state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
