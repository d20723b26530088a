"""The one list of transformers' common tests that vlbridge does not pass, each with its reason.

Excluded tests run all the same and have to fail, so that an exclusion can't outlive its reason.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass

import transformers
from packaging.version import Version


@dataclass(frozen=True)
class Exclusion:
    """A test that is expected to fail.

    Args:
        test: Name of the test, or a pattern with `*`.
        reason: Why vlbridge does otherwise.
        families: Names of the families concerned; empty means all.
        languages: Kinds of language models concerned; empty means all.
        since: First release of transformers whose test asks for it; empty means all.
        before: First release of transformers where it passes; empty means none.
        run: Run it and require that it fails; false only for tests that would hang or take minutes.
    """

    test: str
    reason: str
    families: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    since: str = ""
    before: str = ""
    run: bool = True

    @property
    def applies(self) -> bool:
        """Whether the installed release of transformers has the test in this form."""
        version = Version(transformers.__version__)
        return not (self.since and version < Version(self.since)) and not (
            self.before and version >= Version(self.before)
        )

    @property
    def marker(self) -> str:
        """What identifies the exclusion in pytest's reports."""
        return f"{self.test}: {self.reason}"

    @property
    def scope(self) -> str:
        return ", ".join((*self.families, *self.languages)) or "all"

    def matches(self, family: str, language: str | None, test: str) -> bool:
        if not self.applies:
            return False
        if self.families and family not in self.families or self.languages and language not in self.languages:
            return False
        return fnmatch.fnmatchcase(test, self.test)


EXCLUSIONS = [
    Exclusion(
        "test_attention_outputs",
        "It counts the outputs of an encoder-decoder and finds one more than text models have: image_hidden_states, "
        "which are returned as Llava returns them.",
        languages=("t5",),
    ),
    Exclusion(
        "test_generation_tester_mixin_inheritance",
        "It asks for the generation suite, which the sdist leaves out; tests/modeling covers every way of generating.",
    ),
    Exclusion(
        "test_inputs_embeds",
        "It gives images with inputs_embeds alone. Placeholders are found by their id, as <image> need not have a row "
        "of its own in the frozen table, so this is refused with a clear error; inputs_embeds without images work.",
    ),
    Exclusion(
        "test_training_overfit",
        "It prompts with the first token and expects the text behind it in the same sequence, as a decoder-only model "
        "writes it; an encoder-decoder's answer is a sequence of its own. tests/modeling trains every combination.",
        languages=("t5",),
    ),
    *(
        Exclusion(
            "test_multimodal_outputs_are_returned",
            "Since 5.24 it wants image_outputs, the whole output of get_image_features, in what forward returns. Here "
            "image_hidden_states are there, and get_image_features gives the rest.",
            languages=(language,),
            since="5.24",
        )
        for language in ("llama", "opt", "gpt_neox")
    ),
    Exclusion(
        "test_training_gradient_checkpointing_use_reentrant_true",
        "Before 5.23 hooks are recomputed with the layer they belong to, and the images' keys and values would be "
        "differentiated twice: it is refused in words.",
        families=("perceiver",),
        before="5.23",
    ),
]


def find(family: str, language: str | None, test: str) -> Exclusion | None:
    """The exclusion that a test falls under."""
    return next((exclusion for exclusion in EXCLUSIONS if exclusion.matches(family, language, test)), None)
