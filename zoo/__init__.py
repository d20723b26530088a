"""vlbridge: compose, train, convert, share and run bridges between frozen vision encoders and frozen language models.

`import vlbridge` registers the families with `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`,
`AutoModelForMultimodalLM` and `AutoProcessor`, and their classifiers with `AutoModelForImageClassification`.
"""

from . import demo, hub  # noqa: F401  (both register with vlbridge.extensions)
from .assets import default_model, example_photograph, example_picture
from .compat import warn_of_untested
from .compose import compose
from .configuration import (
    MLPLlavaClassificationConfig,
    MLPLlavaConfig,
    PerceiverFlamingoClassificationConfig,
    PerceiverFlamingoConfig,
    QFormerBlip2ClassificationConfig,
    QFormerBlip2Config,
    QFormerBlip2PreTrainingConfig,
)
from .families import FAMILIES, register
from .few_shot import FewShotAnswerer, answer_with, rank_answers
from .modeling import (
    FrozenPartError,
    MLPLlavaForConditionalGeneration,
    MLPLlavaForImageClassification,
    PerceiverFlamingoForConditionalGeneration,
    PerceiverFlamingoForImageClassification,
    QFormerBlip2ForConditionalGeneration,
    QFormerBlip2ForImageClassification,
    QFormerBlip2ForImageTextRetrieval,
    QFormerBlip2ForPreTraining,
)
from .processing import (
    MLPLlavaProcessor,
    PerceiverFlamingoProcessor,
    QFormerBlip2PreTrainingProcessor,
    QFormerBlip2Processor,
)
from .retrieval import ImageIndex
from .transplant import transplant
from .version import __version__


warn_of_untested()
register()

__all__ = [
    "FAMILIES",
    "FewShotAnswerer",
    "FrozenPartError",
    "ImageIndex",
    "MLPLlavaClassificationConfig",
    "MLPLlavaConfig",
    "MLPLlavaForConditionalGeneration",
    "MLPLlavaForImageClassification",
    "MLPLlavaProcessor",
    "PerceiverFlamingoClassificationConfig",
    "PerceiverFlamingoConfig",
    "PerceiverFlamingoForConditionalGeneration",
    "PerceiverFlamingoForImageClassification",
    "PerceiverFlamingoProcessor",
    "QFormerBlip2ClassificationConfig",
    "QFormerBlip2Config",
    "QFormerBlip2ForConditionalGeneration",
    "QFormerBlip2ForImageClassification",
    "QFormerBlip2ForImageTextRetrieval",
    "QFormerBlip2ForPreTraining",
    "QFormerBlip2PreTrainingConfig",
    "QFormerBlip2PreTrainingProcessor",
    "QFormerBlip2Processor",
    "__version__",
    "answer_with",
    "compose",
    "default_model",
    "example_photograph",
    "example_picture",
    "rank_answers",
    "transplant",
]
