"""Only `vlbridge.compat` uses what other libraries do not promise to keep, and each of these names has a tripwire."""

from __future__ import annotations

import ast
import configparser
import importlib
import inspect
import logging
import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from tiny import COMBINATIONS, tiny_image, tiny_model, tiny_stage1
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlbridge import compat, compat_vllm
from vlbridge.modeling.modeling_bridged import BridgedOutput


pytestmark = pytest.mark.core
ROOT = Path(__file__).parents[2]
FOLDERS = (
    "zoo", "configuration", "modeling", "processing", "convert", "training", "evaluation", "inspection", "serving",
)  # fmt: skip
SOURCES = [
    path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py")) if not path.name.startswith("compat")
]


# ---------------------------------------------------------------------- tripwires


@pytest.mark.parametrize("name", compat.NAMES, ids=lambda name: name.path)
def test_name_is_what_we_take_it_for(name):
    assert compat.problem_with(name) is None


@pytest.mark.parametrize("name", compat.IMPORTED, ids=lambda name: name.short)
def test_imported_names_can_be_had_from_the_module(name):
    if name.expected:
        assert getattr(compat, name.short) is compat.find(name.path)


def name_of(path: str) -> compat.Name:
    return next(name for name in compat.NAMES if name.path == path)


@pytest.mark.parametrize(
    ("path", "module", "owner"),
    [
        ("transformers.utils.generic.can_return_tuple", "transformers.utils.generic", None),
        ("transformers.Trainer._save_checkpoint", "transformers", "Trainer"),
        ("accelerate.utils.save_fsdp_optimizer", "accelerate.utils", None),
    ],
)
def test_a_name_that_is_gone_is_named(monkeypatch, path, module, owner):
    place = importlib.import_module(module)
    monkeypatch.delattr(place if owner is None else getattr(place, owner), path.rpartition(".")[2])
    problem = compat.problem_with(name_of(path))
    assert path in problem and "is gone" in problem and str(compat.version_of(path.partition(".")[0])) in problem


def test_a_parameter_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", lambda self, model: None)
    assert "no longer takes trial" in compat.problem_with(name_of("transformers.Trainer._save_checkpoint"))


def test_an_attribute_that_is_no_longer_set_is_named(monkeypatch):
    monkeypatch.setattr(transformers.PreTrainedModel, "post_init", lambda self: None)
    name = name_of("transformers.PreTrainedModel.all_tied_weights_keys")
    assert "is no longer set by transformers.PreTrainedModel.post_init" in compat.problem_with(name)


def test_asking_for_a_name_that_is_gone_says_what_to_do(monkeypatch):
    monkeypatch.delattr(importlib.import_module("transformers.utils.generic"), "merge_with_config_defaults")
    monkeypatch.delitem(vars(compat), "merge_with_config_defaults", raising=False)
    with pytest.raises(
        compat.CompatibilityError, match=r"merge_with_config_defaults .* is gone.*pip install \"transformers<"
    ):
        _ = compat.merge_with_config_defaults


# ---------------------------------------------------------------------- nothing elsewhere

# What may be imported besides a library's own first level: these are documented
DOCUMENTED = {
    "transformers.utils": {"logging"},
    "transformers.modeling_outputs": None,  # everything
    "accelerate.utils": {"gather_object", "send_to_device"},
    "huggingface_hub.dataclasses": {"strict"},
    "huggingface_hub.errors": None,
    "huggingface_hub.utils": {"logging"},
    "datasets.exceptions": None,
}
LIBRARIES = ("transformers", "peft", "accelerate", "huggingface_hub", "datasets")
# What every model that is written for transformers declares or defines; `compat.USED` has a tripwire for each
DECLARED = {
    "_can_compile_fullgraph", "_can_record_outputs", "_init_weights", "_input_embed_layer", "_no_split_modules",
    "_skip_keys_device_placement", "_supports_attention_backend", "_supports_flash_attn", "_supports_flex_attn",
    "_supports_sdpa", "_tied_weights_keys",
}  # fmt: skip
BASES = (
    transformers.PreTrainedModel,
    transformers.GenerationMixin,
    transformers.PreTrainedConfig,
    transformers.ProcessorMixin,
    transformers.Trainer,
    transformers.TrainerCallback,
    peft.PeftModel,
    torch.nn.Module,
)


def test_what_models_declare_has_tripwires():
    assert DECLARED <= {name.short for name in compat.USED}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_only_documented_names_are_imported(path):
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [(alias.name, set()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found = [(node.module, {alias.name for alias in node.names})]
        else:
            continue
        for module, names in found:
            parts = module.split(".")
            private = parts[0] in (*LIBRARIES, "torch") and any(part.startswith("_") for part in (*parts, *names))
            deep = parts[0] in LIBRARIES and len(parts) > 1
            if deep and module in DOCUMENTED:
                deep = bool(DOCUMENTED[module] is not None and names - DOCUMENTED[module])
            if private or deep:
                wrong.append(f"{path.name}:{node.lineno} {module} {sorted(names)}")
    assert not wrong, f"import these from vlbridge.compat, with a tripwire: {wrong}"


def private_names(tree: ast.AST) -> tuple[set[str], dict[str, int], dict[str, int]]:
    """Private names that code makes, that it reads or sets on objects, and that it defines in classes.

    Returns:
        The first as names alone, the others with the lines they are on.
    """
    own, used, defined = set(), {}, {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Attribute):
            if isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name) and node.value.id == "self":
                own.add(node.attr)
            used[node.attr] = node.lineno
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):  # vars(self)["_name"]
            own.add(node.slice.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            if isinstance(node.args[1], ast.Constant):
                used[node.args[1].value] = node.lineno
        if isinstance(node, ast.ClassDef):
            for statement in node.body:
                targets = getattr(statement, "targets", [getattr(statement, "target", None)])
                names = [target.id for target in targets if isinstance(target, ast.Name)]
                names += [statement.name] if isinstance(statement, ast.FunctionDef) else []
                own.update(names)
                if node.bases:
                    defined.update(dict.fromkeys(names, statement.lineno))
    keep = re.compile(r"_(?!_)")
    return own, *({name: line for name, line in found.items() if keep.match(name)} for found in (used, defined))


def test_no_private_attribute_of_a_library_is_used():
    found = {path: private_names(ast.parse(path.read_text())) for path in SOURCES}
    own = set().union(*(own for own, _, _ in found.values()))
    of_libraries = {name for base in BASES for name in dir(base) if name.startswith("_")}
    wrong = []
    for path, (_, used, defined) in found.items():
        known = own | DECLARED
        if path.name == "serving_vllm.py":  # `make serving` has the tripwires
            known |= {name.short for name in compat_vllm.NAMES}
        wrong += [f"{path.name}:{line} uses {name}" for name, line in used.items() if name not in known]
        wrong += [f"{path.name}:{line} uses {name}" for name, line in used.items() if name in of_libraries - DECLARED]
        wrong += [
            f"{path.name}:{line} defines {name}" for name, line in defined.items() if name in of_libraries - DECLARED
        ]
    assert not wrong, f"take the public way, or go through vlbridge.compat with a tripwire: {sorted(set(wrong))}"


# ---------------------------------------------------------------------- releases


def test_setup_admits_what_was_tested_and_no_more():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    listed = [line for section in ("install_requires", "train") for line in requirements(parser, section)]
    ranges = {Requirement(line).name: Requirement(line).specifier for line in listed}
    assert f"<{compat.UNTESTED['transformers']}" in str(ranges["transformers"])
    for library, untested in compat.UNTESTED.items():
        upper = [Version(part.version) for part in ranges[library] if part.operator == "<"]
        assert all(bound >= Version(untested) for bound in upper), library


def requirements(parser: configparser.ConfigParser, section: str) -> list[str]:
    option = parser["options"] if section == "install_requires" else parser["options.extras_require"]
    return [line for line in option[section].splitlines() if line.strip()]


def test_a_newer_release_is_one_line_and_no_crash(monkeypatch, caplog):
    newer = {"transformers": "5.99.0", "peft": "0.99"}
    installed = compat.version_of
    monkeypatch.setattr(compat, "version_of", lambda name: Version(newer[name]) if name in newer else installed(name))
    with caplog.at_level(logging.WARNING):
        compat.warn_of_untested()
    (record,) = caplog.records
    assert "transformers 5.99.0" in record.message and 'pip install "transformers<' in record.message
    assert "\n" not in record.message


def test_tested_releases_are_silent(monkeypatch, caplog):
    monkeypatch.setattr(compat, "version_of", lambda name: Version("0.1"))
    with caplog.at_level(logging.WARNING):
        compat.warn_of_untested()
    assert not caplog.records


# ---------------------------------------------------------------------- the cache


def test_the_cache_has_the_name_that_generate_uses():
    assert compat.CACHE in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    assert compat.CACHE in CausalLMOutputWithPast.__dataclass_fields__


def test_an_output_without_a_cache_is_refused():
    class Output(dict):
        pass

    with pytest.raises(compat.CompatibilityError, match="Output has no cache"):
        compat.cache_of(Output(logits=1))
    with pytest.raises(compat.CompatibilityError, match="Output has no hidden_states: it has logits"):
        compat.field_of(Output(logits=1), "hidden_states")
    assert compat.field_of(Output(logits=1), "attentions", wanted=False) is None


def test_outputs_answer_to_every_name_that_those_of_transformers_do():
    cache = DynamicCache()
    theirs, ours = (cls(**compat.cache_argument(cache)) for cls in (CausalLMOutputWithPast, BridgedOutput))
    for name in compat.CACHE_NAMES:
        assert getattr(ours, name, None) is getattr(theirs, name, None)
    assert compat.cache_of(ours) is cache and ours[compat.CACHE] is cache


def prompt_of(processor) -> dict:
    return dict(processor(images=[tiny_image()], text="<image> a b", return_tensors="pt"))


@pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)
def test_both_names_of_the_cache_are_taken(bridge, language):
    model, processor = tiny_model(bridge, language)
    inputs = prompt_of(processor)
    if language == "t5":
        inputs["decoder_input_ids"] = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        results = [
            model(**inputs, use_cache=True, **{name: model_cache(model)}) for name in ("cache", "past_key_values")
        ]
        torch.testing.assert_close(results[0].logits, results[1].logits, rtol=0, atol=0)
        assert all(compat.cache_of(outputs).get_seq_length() > 0 for outputs in results)
        with pytest.raises(ValueError, match="one thing under two names"):
            model(**inputs, cache=model_cache(model), past_key_values=model_cache(model))


def model_cache(model):
    cache = DynamicCache()
    return transformers.EncoderDecoderCache(cache, DynamicCache()) if model.config.is_encoder_decoder else cache


def tokens_per_step(model, run) -> list[int]:
    """How many tokens the language model (the Q-Former of stage 1) read in each step of a generation."""
    seen = []

    def count(module, args, kwargs):
        states = [kwargs.get(name) for name in ("decoder_input_ids", "inputs_embeds")]
        seen.append(next(state.shape[1] for state in states if state is not None))

    handle = model.language_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)
def test_a_step_with_the_cache_runs_on_one_token(bridge, language, mode):
    model, processor = tiny_model(bridge, language)
    inputs = prompt_of(processor)
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **MODES[mode]}
    first, *rest = tokens_per_step(model, lambda: model.generate(**inputs, **settings))
    assert first == (1 if language == "t5" else inputs["input_ids"].shape[1])
    assert rest == [1, 1, 1]


@pytest.mark.parametrize(("bridge", "language"), COMBINATIONS)
def test_a_step_by_hand_gives_what_the_whole_gives(bridge, language):
    model, processor = tiny_model(bridge, language)
    inputs, next_id = prompt_of(processor), torch.tensor([[7]])
    ids = "decoder_input_ids" if language == "t5" else "input_ids"
    if language == "t5":
        inputs[ids] = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        outputs = model(**inputs, use_cache=True)
        whole = {**inputs, ids: torch.cat([inputs[ids], next_id], dim=1)}
        step = {ids: next_id}
        if language == "t5":
            encoded = {"last_hidden_state": outputs.encoder_last_hidden_state}
            step["encoder_outputs"] = transformers.modeling_outputs.BaseModelOutput(**encoded)
            step["attention_mask"] = inputs["attention_mask"]
        else:
            whole["attention_mask"] = torch.ones_like(whole[ids])
            step["attention_mask"], step["visual_states"] = whole["attention_mask"], outputs.visual_states
        expected = model(**whole).logits[:, -1:]
        found = model(**step, **compat.cache_argument(compat.cache_of(outputs)), use_cache=True)
    assert found.logits.shape[1] == 1
    torch.testing.assert_close(found.logits, expected, atol=1e-5, rtol=0)  # fp32: other shapes, other order of sums


def test_a_step_of_stage_1_runs_on_one_token():
    model, processor = tiny_stage1()
    pixels = processor(images=[tiny_image()], return_tensors="pt")["pixel_values"]
    seen = []
    handle = model.bridge.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    model.generate(pixel_values=pixels, max_new_tokens=4, min_new_tokens=4, num_beams=2)
    handle.remove()
    assert seen == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_carries_a_cache_by_either_name(name):
    model, processor = tiny_model("mlp", "llama")
    inputs = prompt_of(processor)
    settings = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    cache = StaticCache(config=model.language_model.config, max_cache_len=64)
    assert torch.equal(model.generate(**inputs, **settings, **{name: cache}), expected)
    assert int(cache.get_seq_length()) == expected.shape[1] - 1


# ---------------------------------------------------------------------- stand-ins


def test_a_peft_that_is_too_old_is_said_in_words(monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.99")
    model, _ = tiny_model("mlp", "llama")
    for adapt in (lambda: model.load_adapter("folder"), lambda: model.add_adapter(peft.LoraConfig())):
        with pytest.raises(ValueError, match=r"need PEFT 0\.99 or later; .* is installed\. Use PEFT's own"):
            adapt()
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.1")
    assert compat.lacking_peft() is None


def test_revisions_without_transformers_help(monkeypatch, tmp_path):
    monkeypatch.setattr(compat, "find", lambda path: compat._MISSING)
    assert compat.resolve_revision(str(tmp_path), "main") == "main"
    assert compat.resolve_revision(None) is None
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda self, name, revision=None: type("I", (), {"sha": "abc"})
    )
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    assert compat.resolve_revision("me/model") == "abc"
    assert compat.resolve_revision("me/model", "main", local_files_only=True) == "main"


def test_beam_search_is_told_the_width_of_the_logits(monkeypatch):
    model, _ = tiny_model("mlp", "llama")
    config, size = model.config, model.config.text_config.vocab_size
    monkeypatch.setattr(compat, "BEAMS_READ_VOCAB_SIZE", True)
    with compat.logits_of_width(size + 1):
        assert config.get_text_config().vocab_size == size + 1 and config.text_config.vocab_size == size
    assert config.get_text_config() is config.text_config


def test_transformers_finds_gguf_on_python_3_10(monkeypatch):
    """There `importlib.metadata.packages_distributions` does not list it."""
    import gguf
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "PACKAGE_DISTRIBUTION_MAPPING", {}, raising=False)  # 5.24 has none
    monkeypatch.delattr(gguf, "__version__", raising=False)
    import_utils.is_gguf_available.cache_clear()
    compat.unpack_gguf()
    try:
        assert import_utils.is_gguf_available()
    finally:
        import_utils.is_gguf_available.cache_clear()
