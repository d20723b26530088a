"""An everyday word for each of ImageNet's 1,000 classes, from WordNet: "Egyptian cat" and "tabby" become "cat".

    python examples/everyday_words.py --wordnet /usr/share/wordnet --output modeling/everyday_words.json

A class keeps its own name if the language model's tokenizer keeps it whole; otherwise it gets the first such word on
the way up to more general things, or, if there is none, the first that WordNet's editors met in running text (the
counts of `cntlist.rev`). The way ends at words that are so general that they say nothing. All breeds are dogs or cats.
`--wordnet` is the folder of WordNet 3.0's own files; Debian's package wordnet-base has them.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoModelForImageClassification, AutoTokenizer

from vlbridge import demo
from vlbridge.files import write_text


# Too general to tell anyone anything, or not what people call the things below them
VAGUE = set(
    """entity object thing matter substance artifact article artefact whole unit structure construction instrument
    instrumentality device equipment implement container covering animal organism being vertebrate mammal mammalian
    invertebrate plant natural_object geological_formation formation facility place area way system mechanism apparatus
    material commodity consumer_goods product creation work representation signal sign food foodstuff nutrient beverage
    drink produce vehicle craft conveyance transport machine tool utensil furnishing furniture clothing garment wear
    protection cover support supporter obstruction barrier building room establishment institution body part person
    individual worker expert performer contestant male female young offspring carnivore ungulate placental rodent trap
     restraint weapon electronic_equipment home_appliance appliance durables communication writing paper sheet
    shelter housing dwelling fabric cloth textile accessory attire apparel adornment decoration top cap lid stopper
    fastener fastening lock plate strip band line measure scale dial medium screen display control power source light
    game sphere ring bed seat stick rod bar""".split()
)
KINDS = {"domestic_dog": "dog", "true_cat": "cat"}  # of which people name no breeds
HEIGHT = 8  # steps up at most
FILES = {5, 6, 13, 17, 20}  # of WordNet's nouns: animals, artifacts, food, natural objects, plants


def read_wordnet(folder: Path) -> tuple[dict[int, tuple[list[str], list[int]]], dict[tuple[str, int], int]]:
    """Noun synsets, `{offset: (words, more general offsets)}`, and how often a word was met in a sense.

    Args:
        folder: WordNet's files `data.noun` and `cntlist.rev`, as wndb(5WN) and senseidx(5WN) describe them.
    """
    synsets: dict[int, tuple[list[str], list[int]]] = {}
    senses: dict[tuple[str, int, int], int] = {}
    for line in (folder / "data.noun").read_text(encoding="ascii").splitlines():
        if line.startswith(" "):
            continue
        fields = line.split(" | ")[0].split()
        offset, file, count = int(fields[0]), int(fields[1]), int(fields[3], 16)
        words = fields[4 : 4 + 2 * count : 2]
        rest = fields[4 + 2 * count :]
        pointers = [rest[1 + 4 * k : 5 + 4 * k] for k in range(int(rest[0]))]
        if file not in FILES:
            continue
        synsets[offset] = (words, [int(where) for kind, where, _, _ in pointers if kind in ("@", "@i")])
        for number, word in enumerate(words):
            senses.setdefault((word.lower(), file, int(fields[5 + 2 * number], 16)), offset)
    counts: dict[tuple[str, int], int] = {}
    for line in (folder / "cntlist.rev").read_text(encoding="ascii").splitlines():
        key, _, count = line.split()
        word, _, sense = key.partition("%")
        kind, file, lexical = sense.split(":")[:3]
        offset = senses.get((word, int(file), int(lexical)))
        if kind == "1" and offset is not None:
            counts[word, offset] = int(count)
    return synsets, counts


def everyday(label: str, synsets: dict, counts: dict, by_words: dict[frozenset, list[int]], whole: set[str]) -> str:
    """The word for a class whose names are `label`, such as `"tench, Tinca tinca"`."""
    names = [name.strip().replace(" ", "_") for name in label.split(",")]
    own = names[0].replace("_", " ")
    level = by_words.get(frozenset(name.lower() for name in names), [])
    if len(level) != 1:
        return own
    found = met = None
    for _ in range(HEIGHT):
        words = [(word, counts.get((word.lower(), offset), 0)) for offset in level for word in synsets[offset][0]]
        if breeds := [KINDS[word] for word, _ in words if word in KINDS]:
            return breeds[0]
        # a language model repeats best what it reads as one token; a synonym may be such a word for something else
        firsts = {synsets[offset][0][0] for offset in level}
        names = [(word, count) for word, count in words if _is_name(word) and (count or word in firsts)]
        found = found or next((word for word, _ in names if word in whole), None)
        met = met or next((word for word, count in names if count), None)
        if any(word.lower() in VAGUE for word, _ in words):
            break
        level = [above for offset in level for above in synsets[offset][1] if above in synsets]
    return (found or met or own).replace("_", " ")


def _is_name(word: str) -> bool:
    return word.lower() not in VAGUE and bool(re.fullmatch(r"[a-z_]+", word))


def main(
    wordnet: Annotated[Path, typer.Option(help="Folder of WordNet 3.0's files.")],
    output: Annotated[
        Path, typer.Option(help="JSON file to write: each class's first name and word, in the order of the classes.")
    ],
) -> None:
    """Write the table."""
    synsets, counts = read_wordnet(wordnet)
    by_words: dict[frozenset, list[int]] = {}
    for offset, (words, _) in synsets.items():
        by_words.setdefault(frozenset(word.lower() for word in words), []).append(offset)
    model = AutoModelForImageClassification.from_pretrained(demo.resolve(demo.VISION))
    labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
    tokens = AutoTokenizer.from_pretrained(demo.resolve(demo.LANGUAGE)).convert_ids_to_tokens(range(49_152))
    whole = {token[1:] for token in tokens if token.startswith("Ġ") and len(token) > 3}
    words = [everyday(label, synsets, counts, by_words, whole) for label in labels]
    pairs = [json.dumps([label.split(",")[0], word]) for label, word in zip(labels, words)]
    write_text(output, "[\n" + ",\n".join(pairs) + "\n]\n")
    print(f"{len(set(words))} words for {len(words)} classes")


if __name__ == "__main__":
    typer.run(main)
