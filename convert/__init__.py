"""Conversion of checkpoints: official layouts and transformers' own classes to vlbridge, and back."""

from .convert_blip import convert_blip
from .convert_blip2 import convert_blip2
from .convert_export import export
from .convert_llava import convert_llava
from .convert_openflamingo import convert_openflamingo
from .convert_release import convert_release
from .convert_tables import ConversionError


__all__ = [
    "ConversionError",
    "convert_blip",
    "convert_blip2",
    "convert_llava",
    "convert_openflamingo",
    "convert_release",
    "export",
]
