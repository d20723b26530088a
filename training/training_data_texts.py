"""What can be wrong with the texts of records: how they were decoded, and answers that their question says."""

from __future__ import annotations

import html
import re

import ftfy

from .training_records import items_of, kind_of


_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")

_MARKUP = re.compile(
    r"&(?:[a-z]{2,8}|#\d{2,5}|#x[0-9a-f]{2,5});|</?(?:a|b|br|div|i|img|li|p|span|table|td|tr|ul)\b[^<>]*>", re.I
)

_ESCAPED = re.compile(r"\\u[0-9a-fA-F]{4}")
# Steps of ftfy: UTF-8 that was read as Windows-1252 (or Latin-1), in the whole text or in parts of it
_READ_AS_WINDOWS_1252 = ("latin-1", "sloppy-windows-1252", "decode_inconsistent_utf8")
_READ_AS_UTF_8 = (("decode", "utf-8"), ("apply", "decode_inconsistent_utf8"))


def suspicious_encoding(text: str) -> str | None:
    """A sign that a text was decoded or cleaned wrongly.

    Args:
        text: The text.

    Returns:
        What was found, in one line; `None` if there is nothing.
    """
    if "\ufffd" in text:
        return "replacement characters (U+FFFD): bytes were lost when it was decoded"
    if found := _misread_word(text):
        return f"{found[0]!r} seems to be {found[1]!r}, UTF-8 that was read as Windows-1252"
    if found := _CONTROL.search(text):
        return f"control character U+{ord(found[0]):04X}"
    for found in _MARKUP.finditer(text):
        if not found[0].startswith("&") or html.unescape(found[0]) != found[0]:
            return f"markup: {found[0]!r}"
    if found := _ESCAPED.search(text):
        return f"an escape that nobody decoded: {found[0]!r}"
    return None


def _misread_word(text: str) -> tuple[str, str] | None:
    """The first word that is UTF-8 read as Windows-1252, and what it should be; `None` if there is none."""
    if text.isascii():
        return None
    steps = ftfy.fix_encoding_and_explain(text).explanation or []
    last = next((number for number, step in enumerate(steps) if step in _READ_AS_UTF_8), None)
    if last is None or steps[0].parameter not in _READ_AS_WINDOWS_1252:
        return None
    right = ftfy.apply_plan(text, steps[: last + 1])  # only what the message says: ftfy goes on for as long as it can
    words = zip(text.split(" "), right.split(" "))
    return next(((shortened(word, 40), shortened(meant, 40)) for word, meant in words if word != meant), None)


def _words(text: str) -> str:
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "


def answer_in_question(question: str, answer: str) -> bool:
    """Whether a question says its answer, word for word.

    Args:
        question: The question.
        answer: Its answer. Yes, no and choices ("red or blue?") don't count.
    """
    asked, said = _words(question), _words(answer)
    return bool(said.strip()) and said.strip() not in ("yes", "no") and " or " not in asked and said in asked


def _text_of(content: list[dict]) -> str:
    return " ".join(item["text"] or "" for item in content if item["type"] == "text").strip()


def turns_of(record: dict) -> list[tuple[str, str]]:
    """Questions and answers of a record.

    Args:
        record: The record. A caption or a document is an answer to an empty question.

    Returns:
        `(question, answer)` of every turn.
    """
    if kind_of(record) != "messages":
        text = _text_of(items_of(record))
        return [("", text)] if text else []
    turns, asked = [], ""
    for message in record["messages"]:
        if message["role"] == "user":
            asked = _text_of(message["content"])
        elif message["role"] == "assistant":
            turns.append((asked, _text_of(message["content"])))
    return turns


def shortened(text: str, length: int) -> str:
    """A text in one line of at most `length` characters."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


__all__ = ["answer_in_question", "shortened", "suspicious_encoding", "turns_of"]
