"""Heavy tests: collected only by `run_conformance.py`, which sets VLBRIDGE_CONFORMANCE.

Exclusions become strict xfails.
"""

import os
import sys
from pathlib import Path

import pytest


ENABLED = bool(os.environ.get("VLBRIDGE_CONFORMANCE"))
collect_ignore_glob = [] if ENABLED else ["*.py"]

if ENABLED:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # helpers here, and `tiny`


def pytest_collection_modifyitems(items):
    """An excluded test still runs, and has to fail: one that passes again is a stale exclusion."""
    if not ENABLED:
        return
    from exclusions import find

    for item in items:
        if getattr(item, "cls", None) is not None and hasattr(item.cls, "family"):
            exclusion = find(item.cls.family.name, getattr(item.cls, "language", None), item.name)
            if exclusion is not None:
                item.add_marker(pytest.mark.xfail(reason=exclusion.marker, run=exclusion.run, strict=True))
