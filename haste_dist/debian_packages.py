"""Debian's packages as a data set: what a package says of itself -> the packages that it asks for.

A text is a description: its first line the title, the rest the content. Its labels are the packages named by Pre-Depends, Depends,
Recommends and Suggests, every alternative of them, the package itself aside. Packages that describe themselves with the same words are
one text with the labels of all. Those of one source package are much alike, and stay on one side of the split.

The indices are those of Debian 12 (bookworm), main, amd64; the tables of docs/accuracy.md are made of those of its release 12.15.
"""

import gzip
import hashlib
import http.client
import lzma
import re
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from haste_dist.datasets import Text, text_key
from haste_dist.errors import DataError
from haste_dist.manifest import first_line

MIRROR = "https://deb.debian.org/debian"
PATHS = {"Packages": "dists/bookworm/main/binary-amd64/Packages.xz", "Translation-en": "dists/bookworm/main/i18n/Translation-en.xz"}
OF_12_15 = {  # sha256 of what is unpacked from them
    "Packages": "515e692f2c4121c6fcec444ef100cc18f79a991910615f3a88c8b7becfc94d2f",
    "Translation-en": "62f59c3cdca9786e4f7adf9002f9f5729a684adcb4667e58e448dec9b5a46c7f",
}
RELATIONS = ("Pre-Depends", "Depends", "Recommends", "Suggests")
UNPACK: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.decompress, ".gz": gzip.decompress, "": bytes}
SECONDS = 60
LICENCE = b"""Names, descriptions and relations are taken from the package indices of Debian 12 (bookworm), section main.
A description is a part of its package and under that package's licence: https://metadata.ftp-master.debian.org/changelogs has the
copyright file of each. All of main is free software by the Debian Free Software Guidelines.
"""

Stanza = dict[str, str]


def debian_texts(source: str | Path | None) -> tuple[dict[str, Text], dict[str, str], bytes, str]:
    """Texts by text_key, the name of each label, the licence, and of which release the indices are.

    ``source``: a mirror's address, or a folder with Packages and Translation-en (plain, .gz or .xz); by default Debian's own address.
    Raises DataError where they cannot be had or read.
    """
    found = {name: _index(name, source) for name in PATHS}
    is_12_15 = all(hashlib.sha256(found[name]).hexdigest() == OF_12_15[name] for name in PATHS)
    described = {
        (stanza["Package"], stanza.get("Description-md5", "")): stanza.get("Description-en", "")
        for stanza in _stanzas("Translation-en", found["Translation-en"])
    }
    texts: dict[str, Text] = {}
    for stanza in _stanzas("Packages", found["Packages"]):
        package = stanza["Package"]
        labels = {name for relation in RELATIONS for name in _names(stanza.get(relation, ""))} - {package}
        description = described.get((package, stanza.get("Description-md5", "")), stanza.get("Description", ""))
        title, _, rest = description.partition("\n")
        if labels and title:
            content = " ".join(re.sub(r"^ \.$", "", rest, flags=re.MULTILINE).split())  # a lone point stands for an empty line
            source_package = stanza.get("Source", package).split(" ")[0]
            made = Text(package, content, set(), title=title, group=source_package)
            texts.setdefault(text_key(f"{title} {content}"), made).labels.update(labels)
    if not texts:
        raise DataError("debian: no package with a description and a relation; are these the indices Packages and Translation-en?")
    return (
        texts,
        {label: label for text in texts.values() for label in text.labels},
        LICENCE,
        "Debian 12.15" if is_12_15 else "other indices than Debian 12.15's",
    )


def _names(relation: str) -> Iterator[str]:
    """Package names of a relation such as ``a (>= 1), b:any | c``, without versions and architectures."""
    for one in re.split(r"[,|]", relation):
        if one.strip():
            yield re.split(r"[\s(:\[<]", one.strip())[0]


def _index(name: str, source: str | Path | None) -> bytes:
    """The bytes of an index, unpacked."""
    where = str(source or MIRROR)
    try:
        if re.match("https?://", where):
            where = f"{where.rstrip('/')}/{PATHS[name]}"
            with urllib.request.urlopen(where, timeout=SECONDS) as answer:  # http or https, as matched
                return lzma.decompress(answer.read())
        for ending, unpack in UNPACK.items():
            path = Path(where) / (name + ending)
            if path.is_file():
                where = str(path)
                return unpack(path.read_bytes())
    except (http.client.HTTPException, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "reason", None) or first_line(error)
        raise DataError(
            f"{where}: {reason}; try again, or pass --source: a mirror's address, or a folder with {' and '.join(PATHS)}"
        ) from None
    raise DataError(
        f"{where}: no {name}, {name}.gz or {name}.xz here; --source is a mirror's address or a folder with {' and '.join(PATHS)}"
    )


def _stanzas(name: str, index: bytes) -> Iterator[Stanza]:
    """Paragraphs of ``Field: value`` lines; a line that starts with a space goes on with the value before it."""
    stanza: Stanza = {}
    field = ""
    for number, line in enumerate(index.decode("utf-8", "replace").split("\n"), 1):
        if line[:1] in (" ", "\t") and field:
            stanza[field] += "\n" + line
        elif line.strip():
            field, colon, value = line.partition(":")
            if not colon or line[0] in " \t":
                raise DataError(f"{name}:{number}: not a line of a Debian package index")
            stanza[field] = value.strip()
        elif stanza:
            yield _whole(stanza, name, number)
            stanza, field = {}, ""
    if stanza:
        yield _whole(stanza, name, number)


def _whole(stanza: Stanza, name: str, number: int) -> Stanza:
    if "Package" not in stanza:
        raise DataError(f"{name}:{number}: a paragraph without Package ends here; is this a Debian package index?")
    return stanza
