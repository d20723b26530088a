"""Conversion of official checkpoints."""

from .convert_openflamingo import convert_openflamingo
from .convert_tables import ConversionError


__all__ = ["ConversionError", "convert_openflamingo"]
