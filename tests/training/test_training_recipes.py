"""Recipes: what they may hold, what is refused, and that those that ship can be read and run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors import safe_open
from toy_runs import save_data, save_parts
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

import vlbridge
from vlbridge.cards import card_of_folder
from vlbridge.cli import app
from vlbridge.compat import attention_of
from vlbridge.training import training_resumable, training_run
from vlbridge.training.training_models import build_model
from vlbridge.training.training_recipes import (
    DataRecipe,
    EvaluationRecipe,
    Recipe,
    RecipeError,
    read_recipe,
    shipped,
)
from vlbridge.training.training_run import load_mixture, train


FRESH = {"vision": "v", "language": "l", "bridge": "mlp", "data": [{"source": "llava", "path": "p"}]}
SMALL = [name for name in shipped() if name.startswith("small_")]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Parts, data, and an easy-VQA of three pictures."""
    folder = tmp_path_factory.mktemp("toys")
    parts, data = save_parts(folder / "parts"), save_data(folder / "data")
    colors = ("red", "blue", "green")
    for split in ("train", "test"):
        (folder / "easy" / split / "images").mkdir(parents=True)
        questions = []
        for number, color in enumerate(colors):
            Image.new("RGB", (40, 40), color).save(folder / "easy" / split / "images" / f"{number}.png")
            questions.append(["what color is the circle?", color, number])
            questions.append([f"is there a {colors[number - 1]} shape?", "no", number])
        (folder / "easy" / split / "questions.json").write_text(json.dumps(questions))
    return {"parts": parts, "data": data, "easy": str(folder / "easy")}


def recipe_of(toys, **more) -> Recipe:
    fields = {
        "vision": toys["parts"]["vision"],
        "language": toys["parts"]["language"],
        "bridge": "mlp",
        "data": [{"source": "llava", "path": toys["data"]["llava"], "options": {"images": toys["data"]["images"]}}],
        "arguments": {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True},
    }
    fields.update(more)
    return Recipe.from_dict({key: value for key, value in fields.items() if value is not None})


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learing_rates": {}}, "no key 'learing_rates'; did you mean 'learning_rates'?"),
        ({"data": [{"source": "llava", "pth": "p"}]}, r"data\.0 has no key 'pth'; did you mean 'path'?"),
        ({"data": [{"path": "p"}]}, r"data\.0\.source is missing"),
        ({"data": []}, "data is empty"),
        ({"data": {"source": "llava"}}, "data is {'source': 'llava'}; expected a list"),
        ({"data": [{"source": "llava", "weight": 0}]}, r"data\.0: weight is 0\.0"),
        ({"data": [{"source": "llava", "streaming": True}]}, r"set arguments\.max_steps"),
        (
            {"data": [{"source": "a", "streaming": True}, {"source": "b"}], "arguments": {"max_steps": 1}},
            "all streamed or none",
        ),
        ({"arguments": {"learning_rat": 1}}, "arguments has no key 'learning_rat'; did you mean 'learning_rate'?"),
        ({"arguments": {"output_dir": "x"}}, "output_dir is not for a recipe to set"),
        ({"learning_rates": {"brige": 1e-3}}, "learning_rates is 'brige'; expected one of 'bridge'"),
        ({"learning_rates": {"bridge": "fast"}}, "learning_rates.bridge is 'fast'; expected a value of type float"),
        ({"bridge": "mpl"}, "bridge is 'mpl'; expected one of 'mlp', 'qformer', 'perceiver'"),
        ({"bridge": None}, "bridge missing: a fresh generative model needs vision, language and bridge"),
        ({"stage": "stage1"}, "tokenizer missing"),
        (
            {"stage": "stage1", "tokenizer": "t", "language": None, "attn_implementation": "eager"},
            "stage1 has no language model: leave attn_implementation out",
        ),
        ({"stage": "stage2"}, "stage is 'stage2'; expected one of 'generative', 'stage1'"),
        ({"from": "f"}, "leave vision out"),
        ({"freeze": ["bridge"]}, "freeze is 'bridge'"),
        ({"push_to": 3}, "push_to is 3; expected text"),
        ({"samples": 100}, "samples is 100; expected keys and values"),
        ({"arguments": {"max_steps": "abc"}}, r"arguments\.max_steps is 'abc'; expected a whole number"),
        ({"arguments": {"max_steps": 3.5}}, "expected a whole number"),
        ({"arguments": {"max_steps": 0}}, "expected at least 1, or -1 for whole epochs"),
        ({"arguments": {"bf16": "yes"}}, "expected true or false"),
        ({"arguments": {"lr_scheduler_type": "cosin"}}, "expected one of linear, cosine"),
        ({"arguments": {"label_names": "labels"}}, "expected a list or null"),
        ({"arguments": {"save_total_limit": "two"}}, "expected a whole number or null"),
        ({"arguments": {"learning_rate": -1e-3}}, "expected at least 0"),
        ({"arguments": {"per_device_train_batch_size": 0}}, "expected at least 1"),
        ({"arguments": {"save_steps": 0}}, "expected more than 0"),
        ({"arguments": {"adam_beta2": 1}}, "expected less than 1"),
    ],
)
def test_what_is_wrong_is_said_by_name(change, message):
    with pytest.raises(RecipeError, match=message.replace("?", r"\?") if "did you" in message else message):
        Recipe.from_dict({**FRESH, **change})


def test_yaml_is_read_as_it_is_meant(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(FRESH) + "arguments: {learning_rate: 1e-3, max_steps: 100}\n")
    recipe = read_recipe(path)
    assert recipe.arguments == {"learning_rate": 1e-3, "max_steps": 100}
    recipe = read_recipe(
        path,
        ["arguments.learning_rate=2e-5", "data.0.path=/x y", "data.0.options.images=/z", "learning_rates.bridge=1"],
    )
    assert recipe.arguments["learning_rate"] == 2e-5 and recipe.learning_rates == {"bridge": 1.0}
    assert read_recipe(path, ["arguments.save_strategy=no"]).arguments["save_strategy"] == "no"
    assert read_recipe(path, ["arguments.bf16=true", "arguments.tf32=False"]).arguments["bf16"] is True
    assert recipe.data[0].path == "/x y" and recipe.data[0].options == {"images": "/z"}
    for setting, message in (
        ("max_steps", "expected key=value"),
        ("data.1.path=x", "'1' is none of the 1 entries"),
        ("bridge.x=1", "bridge holds 'mlp'"),
        ("arguments.max_stepps=1", "did you mean 'max_steps'"),
        ("samples=[", "is not valid YAML"),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            read_recipe(path, [setting])
    path.write_text("bridge: mlp\nbridge: qformer\n")
    with pytest.raises(RecipeError, match="'bridge' is given twice"):
        read_recipe(path)
    with pytest.raises(RecipeError, match="Did you mean 'flamingo'"):
        read_recipe("flamigno")


def test_options_do_not_outlive_their_layout():
    changed = read_recipe("small_mlp", ["data.0.options.columns=[a]", "data.0.source=imagefolder", "data.0.path=p"])
    assert changed.data[0].options == {"columns": ["a"]} and changed.data[0].split == "train"
    assert read_recipe("small_mlp", ["data.0.source=easy_vqa"]).data[0].options["multi_turn"]


@pytest.mark.parametrize(
    ("fields", "called"),
    [
        ({"source": "easy_vqa", "split": "test"}, ("easy_vqa", "test")),
        ({"source": "coco_captions", "path": "/coco/captions_val2014.json"}, ("coco_captions", "train")),
        ({"source": "imagefolder", "path": "/my/birds/test"}, ("birds", "test")),
        ({"source": "imagefolder", "path": "/my/birds/", "split": "test"}, ("birds", "test")),
        ({"source": "imagefolder", "path": "/my/birds/test", "name": "garden"}, ("garden", "test")),
        ({"source": "llava", "path": "/my/birds.json"}, ("birds", "train")),
        ({"source": "webdataset", "path": "/my/birds/val/{000..010}.tar"}, ("birds", "val")),
        ({"source": "webdataset", "path": "/my/birds/*.tar"}, ("birds", "train")),
        ({"source": "hub", "path": "owner/birds", "split": "test"}, ("owner/birds", "test")),
    ],
)
def test_data_of_ones_own_is_called_by_its_own_name(fields, called):
    assert DataRecipe(**fields).called() == called


def test_recipes_are_written_as_they_are_read(tmp_path):
    for name, path in shipped().items():
        recipe = read_recipe(name)
        (tmp_path / "again.yaml").write_text(recipe.to_yaml())
        assert read_recipe(tmp_path / "again.yaml") == recipe == read_recipe(path)


def test_arguments_are_checked_by_transformers(tmp_path):
    with pytest.raises(RecipeError, match="arguments: .*save"):
        Recipe.from_dict({**FRESH, "arguments": {"load_best_model_at_end": True}}).training_arguments(tmp_path)
    args = Recipe.from_dict({**FRESH, "arguments": {"bf16": True, "use_cpu": True}}).training_arguments(tmp_path)
    assert args.bf16 and args.report_to == [] and not args.remove_unused_columns


# ---------------------------------------------------------------------- shipped recipes


@pytest.mark.core
@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_can_be_read(name, tmp_path):
    recipe = read_recipe(name)
    assert recipe.description and len(recipe.description) < 120
    recipe.arguments.pop("bf16", None)  # not every machine has it
    args = recipe.training_arguments(tmp_path)
    assert args.max_steps > 0 or args.num_train_epochs > 0
    assert bool(recipe.missing_paths()) != (name in SMALL)
    text = shipped()[name].read_text()
    assert name in SMALL or "# Source: " in text


@pytest.mark.core
@pytest.mark.parametrize("name", SMALL)
def test_small_recipes_run(name, toys, tmp_path, monkeypatch):
    """With tiny parts and three pictures, for two steps."""
    parts = toys["parts"]
    settings = [f"vision={parts['vision']}", f"data.0.path={toys['easy']}", f"evaluation.0.path={toys['easy']}"]
    settings += ["arguments.max_steps=2", "arguments.warmup_steps=1", "arguments.use_cpu=true", "samples.every=1"]
    settings += ["arguments.save_steps=1", "arguments.per_device_train_batch_size=2"]
    if name == "small_blip2_stage1":
        settings += [f"tokenizer={parts['language']}"]  # one that frames no texts by itself
        settings += ["arguments.per_device_eval_batch_size=3"]
    else:
        settings += [f"language={parts['language']}"]
        settings += [f"cache_features.folder={tmp_path / 'features'}"]
    if name == "small_perceiver":
        settings += ["bridge_options.cross_attention_every_n_layers=1"]
    summary = train(read_recipe(name, settings), tmp_path / "run")
    assert summary["steps"] == 2
    values = {(row["dataset"], row["metric"]): row["value"] for row in summary["evaluation"]}
    (generated,) = (row for row in summary["evaluation"] if row["metric"] == "exact_match")
    said = [json.loads(line) for line in (tmp_path / "run" / generated["predictions"]).read_text().splitlines()]
    right = sum(row["wanted"] == row["generated"].strip().lower() for row in said)
    assert values["easy_vqa", "loss"] > 0 and generated["value"] == right / len(said)
    assert len({row["id"] for row in said}) == generated["records"] == len(said)
    assert json.loads((tmp_path / "run" / "training_summary.json").read_text()) == summary
    model, processor = AutoModel.from_pretrained(tmp_path / "run"), AutoProcessor.from_pretrained(tmp_path / "run")
    assert model.config.bridge_only and processor is not None
    shown = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert len(shown) == 2 * min(6, generated["records"])
    if name == "small_blip2_stage1":
        ids = processor(text=["ab"])["input_ids"][0]
        assert [ids[0], ids[-1]] == [processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id] and len(
            ids
        ) == 4


@pytest.mark.core
def test_from_stage_1_to_stage_2(toys, tmp_path):
    captions = {
        "source": "coco_captions",
        "path": toys["data"]["captions"],
        "options": {"images": toys["data"]["images"]},
    }
    qformer = {
        "num_query_tokens": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    stage1 = recipe_of(
        toys, stage="stage1", language=None, bridge=None, tokenizer=toys["parts"]["tokenizer"], data=[captions],
        bridge_options={"qformer_config": qformer, "embed_dim": 16},
    )  # fmt: skip
    train(stage1, tmp_path / "stage1")
    stage2 = recipe_of(
        toys, vision=None, bridge=None, **{"from": str(tmp_path / "stage1")}, data=[captions], text={"end": "\n"}
    )
    model, _ = build_model(stage2)
    learned = AutoModel.from_pretrained(tmp_path / "stage1").bridge.qformer.query_tokens
    torch.testing.assert_close(model.bridge.qformer.query_tokens, learned)
    train(stage2, tmp_path / "stage2")
    stage3 = recipe_of(toys, vision=None, language=None, bridge=None, **{"from": str(tmp_path / "stage2")})
    train(stage3, tmp_path / "stage3")
    assert isinstance(AutoModel.from_pretrained(tmp_path / "stage3"), vlbridge.QFormerBlip2ForConditionalGeneration)
    wrong = recipe_of(
        toys, stage="stage1", vision=None, language=None, bridge=None, **{"from": str(tmp_path / "stage2")}
    )
    with pytest.raises(RecipeError, match="stage is 'stage1', but .* is a QFormerBlip2ForConditionalGeneration"):
        build_model(wrong)


def test_trained_parts_are_kept_in_float32_where_computing_is_in_half_precision(toys):
    recipe = recipe_of(toys, dtype="bfloat16", arguments={"bf16": True}, freeze=["vision_model"])
    model, _ = build_model(recipe)
    for name, parameter in model.named_parameters():
        frozen = name.startswith("vision_model.")
        assert parameter.requires_grad != frozen and parameter.dtype == (torch.bfloat16 if frozen else torch.float32), (
            name
        )


def test_the_language_model_computes_attention_as_the_recipe_says(toys):
    model, _ = build_model(recipe_of(toys, attn_implementation="eager"))
    assert attention_of(model.language_model.config) == "eager" != attention_of(model.vision_model.config)
    with pytest.raises(RecipeError, match="attn_implementation is 'fast', but LlamaForCausalLM keeps 'sdpa'"):
        build_model(recipe_of(toys, attn_implementation="fast"))


@pytest.mark.core
def test_lora_comes_from_its_block(toys, tmp_path):
    recipe = recipe_of(toys, lora={"language": "attention", "r": 4}, learning_rates={"lora": 1e-4, "bridge": 1e-3})
    train(recipe, tmp_path / "run")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in (tmp_path / "run").iterdir()}
    with safe_open(tmp_path / "run" / "adapter_model.safetensors", framework="pt") as tensors:
        names = set(tensors.keys())
    assert any("lora_A" in name for name in names) and any(".bridge." in name for name in names)
    assert all("lora_" in name or ".bridge." in name for name in names)  # nothing of what is frozen


@pytest.mark.parametrize("streaming", [False, True])
def test_mixtures_have_weights_and_names(toys, streaming):
    options = {"images": toys["data"]["images"]}
    data = [
        {"source": "coco_captions", "name": "pairs", "path": toys["data"]["captions"], "weight": 3},
        {"source": "interleaved", "name": "documents", "path": toys["data"]["documents"], "loss_weight": 0.2},
    ]
    recipe = recipe_of(
        toys,
        bridge="perceiver",
        data=[{**d, "streaming": streaming, "options": options} for d in data],
        shuffle_buffer=4,
    )
    records = load_mixture(recipe, seed=0)
    seen = [record["source"] for _, record in zip(range(16), records)]
    again = [record["source"] for _, record in zip(range(16), load_mixture(recipe, seed=0))]
    assert set(seen) == {"pairs", "documents"} and seen.count("pairs") > 8 and seen == again


@pytest.mark.parametrize("streaming", [False, True])
def test_a_saved_data_set_has_a_loss_weight_too(toys, tmp_path, streaming):
    """Its records' own `source` is what the row says, or the path."""
    pictures = [{"bytes": (Path(toys["data"]["images"]) / f"{number}.png").read_bytes()} for number in range(4)]
    rows = {"image": pictures, "caption": [f"picture {number}" for number in range(4)], "source": ["a", "b"] * 2}
    Dataset.from_dict(
        rows, features=Features({"image": ImageFeature(), "caption": Value("string"), "source": Value("string")})
    ).save_to_disk(tmp_path / "saved")
    other = {"source": "coco_captions", "path": toys["data"]["captions"], "options": {"images": toys["data"]["images"]}}
    data = [{"source": "hub", "path": str(tmp_path / "saved"), "loss_weight": 0.5}, other]
    recipe = recipe_of(toys, data=[{**d, "streaming": streaming} for d in data])
    assert {record["source"] for _, record in zip(range(12), load_mixture(recipe, seed=0))} == {"hub", "coco_captions"}
    assert train(recipe, tmp_path / "run")["steps"] == 2


# ---------------------------------------------------------------------- the command


def test_the_command(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner()
    listed = run.invoke(app, ["train", "--list"])
    assert (
        listed.exit_code == 0 and "llava_stage1" in listed.stdout and len(listed.stdout.splitlines()) == len(shipped())
    )
    path = Path("mine.yaml")
    recipe = recipe_of(toys)
    recipe.data[0].path = None
    path.write_text(recipe.to_yaml())
    data = f"data.0.path={toys['data']['llava']}"
    for arguments, code, said in (
        ([], 2, "name a recipe"),
        (["nothing"], 2, "nor a shipped recipe"),
        (["mine.yaml"], 2, "data.0.path missing: say where the data is, such as --set data.0.path=FOLDER"),
        (["mine.yaml", "--set", "data.0.path=/nowhere.json"], 1, "no such file"),
        (["mine.yaml", "--set", data, "--set", "vision=/nowhere"], 1, "nowhere"),
    ):
        done = run.invoke(app, ["train", *arguments])
        assert done.exit_code == code and said in done.output, done.output
    done = run.invoke(app, ["train", "mine.yaml", "--set", data, "--set", "arguments.save_steps=1"])
    assert done.exit_code == 0 and "mine: 2 steps" in done.stdout, done.output
    assert read_recipe(Path("mine/recipe.yaml")).data[0].path == toys["data"]["llava"]
    assert sorted(path.name for path in Path("mine").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    card = card_of_folder(Path("mine"))
    assert "llava" in str(card) and Path("mine/README.md").exists() and not Path("mine/checkpoint-2/README.md").exists()
    for path in Path("mine").glob("checkpoint-*"):
        path.rename(f"kept-{path.name}")
    done = run.invoke(app, ["train", "mine.yaml", "--set", data])
    assert done.exit_code == 2 and "mine holds a saved model, which this run would replace" in done.output
    for path in Path().glob("kept-*"):
        path.rename(Path("mine") / path.name.removeprefix("kept-"))
    done = run.invoke(app, ["train", "mine.yaml", "--set", data])
    assert done.exit_code == 2 and "holds a run already, up to checkpoint-2" in done.output
    done = run.invoke(app, ["train", "mine.yaml", "--set", data, "--set", "arguments.max_steps=3", "--resume"])
    assert done.exit_code == 0 and "mine: 3 steps" in done.stdout, done.output


def test_a_smoke_test_takes_three_steps_on_a_few_records(toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = recipe_of(toys, push_to="me/my-bridge")
    recipe.arguments |= {"max_steps": 100, "per_device_train_batch_size": 1}
    recipe.evaluation = [EvaluationRecipe(**vars(recipe.data[0]), generate=-1)]
    Path("mine.yaml").write_text(recipe.to_yaml())
    done = CliRunner().invoke(app, ["train", "mine.yaml", "--smoke"])
    assert done.exit_code == 0 and "mine-smoke: 3 steps" in done.stdout and "(train): exact_match" in done.stdout
    ran = read_recipe("mine-smoke/recipe.yaml")
    assert ran.data[0].limit == 3 and ran.evaluation[0].generate == 4 and ran.push_to is None
    assert len(Path("mine-smoke/predictions_0.jsonl").read_text().splitlines()) <= 4


def test_results_are_pushed_whole(toys, tmp_path, monkeypatch):
    pushed = {}

    def push(folder, repo_id, **options):
        pushed[repo_id] = {path.name for path in Path(folder).iterdir()}, options["private"]

    monkeypatch.setattr(training_resumable, "push_folder", push)
    with pytest.raises(ValueError, match="nobody else could load the bridge"):  # before any training
        train(recipe_of(toys, push_to="me/my-bridge"), tmp_path / "refused")
    monkeypatch.setattr(training_run, "check_pins", lambda pins: None)
    train(recipe_of(toys, push_to="me/my-bridge", private=True), tmp_path / "run")
    files, private = pushed["me/my-bridge"]
    assert (
        private
        and {"config.json", "model.safetensors", "README.md", "training_summary.json", "processor_config.json"} <= files
    )
    assert not any(name.startswith("checkpoint") for name in files)
