"""Model cards: true, complete, what the Hub accepts, and with an example that runs."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from packaging.version import Version
from tiny import COMBINATIONS, tiny_bridge_folder, tiny_image, tiny_model, tiny_stage1
from transformers import AutoModel, AutoProcessor

import vlbridge
from vlbridge import cards
from vlbridge.assets import SHIPPED
from vlbridge.cards import card_of_folder, card_of_release
from vlbridge.catalogue import CATALOGUE, find
from vlbridge.licences import LICENCES, licence_conflicts, licence_of, strictest
from vlbridge.training_summary import SUMMARY


ROOT = Path(__file__).parents[2]
# of https://huggingface.co/docs/hub/repositories-licenses and https://huggingface.co/tasks, those that are used here
LICENCE_IDS = {"apache-2.0", "mit", "cc-by-sa-3.0", "llama2", "other"}
PIPELINE_TAGS = {"image-text-to-text", "zero-shot-image-classification"}


def example_of(card: ModelCard) -> str:
    return re.search(r"^## Use\n\n```python\n(.*?)^```$", str(card), re.MULTILINE | re.DOTALL)[1]


@pytest.fixture
def folder(tmp_path):
    """A small saved model."""
    model, processor = tiny_model("mlp")
    model.save_pretrained(tmp_path / "small")
    processor.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def pin(folder: Path, **sources) -> None:
    """Turn a saved model into a bridge whose parts are said to come from elsewhere."""
    saved = json.loads((folder / "config.json").read_text())
    saved["bridge_only"] = True
    saved["frozen_parts"] = {
        part: {"source": source, "revision": "0123abc", "sha256": "ab" * 32} for part, source in sources.items()
    }
    (folder / "config.json").write_text(json.dumps(saved))


# ---------------------------------------------------------------------- the example


@pytest.mark.parametrize("bridge, language", COMBINATIONS)
def test_six_lines_are_enough(bridge, language, tmp_path, monkeypatch, capsys):
    model, processor = tiny_model(bridge, language)
    model.save_pretrained(tmp_path / "bridge")
    processor.save_pretrained(tmp_path / "bridge")
    tiny_image().save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    example = example_of(card_of_folder("bridge"))
    assert len(example.splitlines()) == 6
    exec(example, {})
    printed = capsys.readouterr().out
    inputs = processor.few_shot([], {"image": tiny_image()})
    tokens = model.generate(**inputs, max_new_tokens=30)
    if not model.config.is_encoder_decoder:
        tokens = tokens[:, inputs["input_ids"].shape[1] :]
    assert printed == f"{processor.batch_decode(tokens, skip_special_tokens=True)}\n"


def test_six_lines_of_retrieval(tmp_path, monkeypatch, capsys):
    model, processor = tiny_stage1()
    model.save_pretrained(tmp_path / "stage1")
    processor.save_pretrained(tmp_path / "stage1")
    tiny_image().save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    card = card_of_folder("stage1")
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    example = example_of(card)
    assert len(example.splitlines()) == 6
    exec(example, {})
    assert capsys.readouterr().out.startswith("tensor([[")


def test_code_beside_the_weights_needs_no_vlbridge(folder):
    saved = json.loads((folder / "config.json").read_text())
    saved["auto_map"] = {"AutoModel": "modeling_llava.MLPLlavaForConditionalGeneration"}
    (folder / "config.json").write_text(json.dumps(saved))
    example = example_of(card_of_folder(folder, "me/small"))
    assert "vlbridge" not in example and example.count('("me/small", trust_remote_code=True)') == 2


# ---------------------------------------------------------------------- what is in a card


@pytest.mark.core
@pytest.mark.parametrize("bridge", vlbridge.FAMILIES)
def test_card_of_a_bridge(bridge, tmp_path):
    folder = tiny_bridge_folder(tmp_path, bridge)
    card = card_of_folder(folder, "me/bridge")
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    text = str(card)
    pins = model.config.frozen_parts
    assert pins["vision_model"]["sha256"] in text and pins["language_model"]["sha256"] in text
    assert str(tmp_path) not in text and "| language model | old |" in text
    assert f"| Parameters of the bridge | {sum(p.numel() for p in model.bridge.parameters()):,} |" in text
    assert f"| Size of the weights | {(folder / 'model.safetensors').stat().st_size:,} bytes |" in text
    assert f"| Visual tokens per image | {model.config.num_image_tokens(30, 30)} (" in text
    assert processor.caption_prompt in text
    assert card.data.base_model is None  # folders are nothing that the Hub knows
    assert card.data.to_dict()["tags"] == ["vlbridge", model.config.model_type]


def test_header(folder):
    """As the Hub reads it back."""
    pin(folder, vision_model="openai/clip-vit-large-patch14", language_model="facebook/opt-2.7b")
    summary = {
        "datasets": ["HuggingFaceM4/COCO", "our own pictures"],
        "steps": 1200,
        "arguments": {"learning_rate": 0.001},
        "evaluation": [
            {"dataset": "VQAv2", "split": "val", "metric": "accuracy", "value": 0.5},
            {"dataset": "VQAv2", "split": "val", "metric": "accuracy", "value": 0.25, "task": "number"},
        ],
    }
    (folder / SUMMARY).write_text(json.dumps(summary))
    text = str(card_of_folder(folder, "me/bridge"))
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-text-to-text"
    assert data["base_model"] == ["openai/clip-vit-large-patch14", "facebook/opt-2.7b"]
    assert data["base_model_relation"] == "adapter"
    assert (
        data["license"] == "other" and data["license_name"] == "opt-175b" and data["license_link"].startswith("https:")
    )
    assert data["datasets"] == ["HuggingFaceM4/COCO"]
    results = ModelCard(text).data.eval_results
    assert [(each.dataset_type, each.dataset_split, each.metric_name, each.metric_value) for each in results] == [
        ("vqav2", "val", "accuracy", 0.5),
        ("vqav2", "val", "accuracy, number", 0.25),
    ]
    for line in (
        "| Data | HuggingFaceM4/COCO, our own pictures |",
        "| Steps | 1,200 |",
        "| `learning_rate` | `0.001` |",
    ):
        assert line in text
    assert "commit `0123abc`" in text


def test_what_was_checked_at_conversion_is_told(folder):
    certificate = {
        "release": "openflamingo/OpenFlamingo-3B-vitl-mpt1b",
        "from": "OpenFlamingo",
        "to": "vlbridge",
        "checkpoint": ["checkpoint.pt"],
        "checks": [{"what": "logits", "largest_difference": 2.5e-6}],
        "notes": [],
        "versions": {"vlbridge": "1", "transformers": "2"},
        "tensors": {
            "vision_model.a": {"from": "openai/clip-vit-large-patch14"},
            "language_model.a": {"from": "my-mpt"},
            "bridge.a": {"from": "checkpoint.pt"},
        },
    }
    (folder / "conversion.json").write_text(json.dumps(certificate))
    card = card_of_folder(folder)
    text = str(card)
    assert "| logits | largest difference 2.5e-06 |" in text
    assert "| COCO captions |  | CIDEr, 4 shots | 77.3 |" in text and "`<image>Output:{caption}" in text
    assert "openai/clip-vit-large-patch14" in card.data.base_model
    assert "| language model | my-mpt |" in text


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "no JSON"),
        ("[]", "holds a list"),
        ('{"steps": "many"}', "steps='many'; expected int"),
        ('{"evaluation": [{"dataset": "a"}]}', "expected an object with dataset, metric and a number"),
        ('{"evaluation": [{"dataset": "a", "metric": "b", "value": "high"}]}', "a number as value"),
    ],
)
def test_damaged_summaries_are_refused(folder, text, message):
    (folder / SUMMARY).write_text(text)
    with pytest.raises(ValueError, match=message):
        card_of_folder(folder)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no config.json"):
        card_of_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama' model; expected a bridged one"):
        card_of_folder(tmp_path)


# ---------------------------------------------------------------------- licences


def test_the_strictest_licence_holds():
    names = ("openai/clip-vit-base-patch32", "google/gemma-2-2b", "anas-awadalla/mpt-1b-redpajama-200b-dolly")
    found = [licence_of(name) for name in names]
    assert [licence.id for licence in found] == ["mit", "gemma", "cc-by-sa-3.0"]
    for count, expected in ((1, "mit"), (2, "gemma"), (3, "cc-by-sa-3.0")):
        assert strictest(found[:count]).id == expected
        assert strictest(reversed(found[:count])).id == expected
    assert strictest([LICENCES["gpl-3.0"], LICENCES["cc-by-nc-4.0"], LICENCES["mit"]]).id == "cc-by-nc-4.0"
    assert strictest([LICENCES["mit"], licence_of("someone/something")]).name == "unknown"
    assert strictest([LICENCES["apache-2.0"], LICENCES["mit"]]).id == "apache-2.0"
    assert strictest([]).name == "unknown"


@pytest.mark.parametrize(
    "one, other, claimed, expected",
    [
        ("mit", "apache-2.0", None, None),
        ("mit", "gpl-3.0", "gpl-3.0", None),
        ("mit", "llama2", "llama2", None),
        ("gpl-3.0", "llama2", None, "one requires gpl-3.0"),
        ("cc-by-nc-sa-4.0", "gpl-3.0", None, "other requires gpl-3.0"),
        ("mit", "cc-by-nc-4.0", "apache-2.0", "other allows no more than cc-by-nc-4.0"),
        ("mit", "llama2", "mit", "other allows no more than llama2"),
        ("mit", "unknown", "mit", None),
    ],
)
def test_conflicts(one, other, claimed, expected):
    said = " ".join(licence_conflicts({"one": LICENCES[one], "other": LICENCES[other]}, claimed))
    assert expected in said if expected else not said


def test_conflicts_are_logged_and_in_the_card(folder, caplog):
    pin(folder, vision_model="openai/clip-vit-large-patch14", language_model="meta-llama/Llama-2-7b-hf")
    (folder / SUMMARY).write_text('{"license": "mit"}')
    with caplog.at_level(logging.WARNING, logger="vlbridge.cards"):
        card = card_of_folder(folder, "me/bridge")
    assert card.data.license == "llama2"
    said = "It is said to be under mit, but meta-llama/Llama-2-7b-hf allows no more than llama2 does."
    assert said in str(card) and said in caplog.text


def test_unknown_licences_are_in_the_card_alone(folder, caplog):
    """A bridge is saved often while it is trained."""
    pin(folder, vision_model="openai/clip-vit-large-patch14", language_model="someone/something")
    with caplog.at_level(logging.WARNING, logger="vlbridge.cards"):
        text = str(card_of_folder(folder, "me/bridge"))
    assert "That of someone/something is not known" in text and "\nlicense: other\nlicense_name: unknown\n" in text
    assert not caplog.records


def test_a_part_says_its_licence_itself(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A part\n")
    assert licence_of(str(tmp_path)) == LICENCES["cc-by-nc-4.0"]
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: ours\n---\n# A part\n")
    assert licence_of(str(tmp_path)).label == "ours" and licence_of(str(tmp_path)).strictness == cards.UNKNOWN
    (tmp_path / "README.md").write_text("# A part\n")
    assert licence_of(str(tmp_path)).label == "unknown"


# ---------------------------------------------------------------------- the committed cards


@pytest.fixture(scope="module")
def committed() -> dict[str, str]:
    return cards.committed_cards()


def test_committed_cards_are_those_that_are_generated(committed):
    """If not: `python -m vlbridge.cards`."""
    there = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "model_cards").glob("*.md")}
    there.pop("template.md")
    assert sorted(there) == sorted(committed)
    assert [name for name in there if there[name] != committed[name]] == []
    assert len(committed) == len(CATALOGUE) + len(SHIPPED)


def test_committed_cards_are_complete(committed):
    for name, text in committed.items():
        header = yaml.safe_load(text.split("---\n")[1])
        data = ModelCard(text).data
        assert data.license in LICENCE_IDS, name
        assert (data.license == "other") == (data.license_name is not None), name
        assert data.pipeline_tag in PIPELINE_TAGS and data.library_name == "transformers", name
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", base) for base in header.get("base_model", [])), name
        for result in data.eval_results or []:
            assert result.dataset_name and result.dataset_type and result.metric_type and result.metric_name, name
            assert isinstance(result.metric_value, (int, float)), name
        for heading in ("## Parts", "## Intended use and limits"):
            assert text.count(f"\n{heading}\n") == 1, name
        assert "{{" not in text and "None" not in text and "\n\n\n" not in text, name


def test_cards_of_releases_have_the_published_figures():
    for release in CATALOGUE.values():
        results = ModelCard(str(card_of_release(release))).data.eval_results or []
        figures = [
            value
            for each in release.published.values()
            for value in (each.values() if isinstance(each, dict) else [each])
        ]
        assert sorted(result.metric_value for result in results) == sorted(figures)
        assert all(result.source_url.startswith("https://") for result in results)
    text = str(card_of_release(find("openflamingo/OpenFlamingo-3B-vitl-mpt1b-langinstruct")))
    assert "\nlicense: cc-by-sa-3.0\n" in text
    assert "vlbridge convert openflamingo/OpenFlamingo-3B-vitl-mpt1b-langinstruct OpenFlamingo-3B" in text
    assert "\nlicense: llama2\n" in str(card_of_release(find("liuhaotian/llava-v1.5-7b")))


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2.2"),
    reason="huggingface_hub before 2.2 validates at huggingface.co, whatever HF_ENDPOINT says",
)
def test_the_hub_accepts_them(hub, committed):
    """huggingface_hub's own validation, which asks the Hub."""
    for text in committed.values():
        ModelCard(text).validate()
    with pytest.raises(ValueError):
        ModelCard("---\nlicense: 5\n---\n").validate()


@pytest.mark.parametrize("family", SHIPPED)
def test_the_example_of_a_shipped_bridge(family, committed, tmp_path, monkeypatch, capsys):
    shutil.copy(vlbridge.example_picture(), tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    exec(example_of(ModelCard(committed[f"{SHIPPED[family]}.md"])), {})
    assert "triangle" in capsys.readouterr().out
