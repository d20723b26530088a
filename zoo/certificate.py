"""The certificate of a conversion: `conversion.json`, which the converters write beside a converted model.

It names the files that went in and came out by their SHA-256, and says what was checked and with what result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


CERTIFICATE = "conversion.json"


def read_certificate(folder: str | os.PathLike) -> dict:
    """Read the certificate beside a model.

    Args:
        folder: The model's folder.

    Returns:
        The certificate; empty if the folder has none.
    """
    path = Path(folder) / CERTIFICATE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def card_section(certificate: Mapping) -> str:
    """Describe a conversion in a section for a model card.

    Args:
        certificate: What `read_certificate` gives.

    Returns:
        Markdown, from its heading to the end of its last line.
    """
    versions = certificate["versions"]
    lines = [
        "## Conversion",
        "",
        f"From {certificate['from']} to {certificate['to']} with vlbridge {versions['vlbridge']} and transformers "
        f"{versions['transformers']}; the whole record is in `{CERTIFICATE}`.",
        "",
        "| checked | result |",
        "|---|---|",
    ]
    for check in certificate["checks"]:
        if "why" in check:
            result = check["why"]
        elif "equal" in check:
            result = "equal" if check["equal"] else "not equal"
        else:
            result = f"largest difference {check['largest_difference']:.3g}"
        lines.append(f"| {check['what']} | {result} |")
    if certificate["notes"]:
        lines += ["", *(f"- {note}" for note in certificate["notes"])]
    return "\n".join(lines) + "\n"


__all__ = ["CERTIFICATE", "card_section", "read_certificate"]
