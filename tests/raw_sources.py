"""Source folders in every layout, with any wrong line a test wants, and a tokenizer that knows their words."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["red", "green", "blue", "stone", "river", "night", "paper", "music", "glass", "field"]
Texts = list[tuple[str, str, list[int]]]  # uid, text, labels


def make_texts(count: int, labels: int, prefix: str = "t") -> Texts:
    """Texts of 1 to 7 words with 0 to 3 labels each; the first has the labels 0 and labels - 1."""
    texts = []
    for i in range(count):
        words = [WORDS[(i * 7 + 3 * j) % len(WORDS)] for j in range(1 + i % 7)]
        texts.append(
            (f"{prefix}{i}", " ".join(words), sorted({0, labels - 1} if i == 0 else {(i * k) % labels for k in range(1, 1 + i % 4)}))
        )
    return texts


def make_wordpiece(folder: Path) -> Path:
    """A small WordPiece tokenizer with [CLS] and [SEP], saved to ``folder`` with padding and truncation left on, as some are."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"), *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.enable_padding(pad_id=0, length=32)
    tokenizer.enable_truncation(32)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    fast.save_pretrained(folder)
    return folder


def write_lines(path: Path, lines: list[bytes]) -> Path:
    """A file of these lines, gzipped if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def json_lines(texts: Texts) -> list[bytes]:
    return [json.dumps({"uid": uid, "title": text, "content": "", "target_ind": labels}).encode() for uid, text, labels in texts]


def label_lines(count: int) -> list[bytes]:
    return [json.dumps({"uid": f"l{i}", "title": f"label {i}"}).encode() for i in range(count)]


def write_source(folder: Path, layout: str, train: Texts, test: Texts, labels: int | None) -> Path:
    """A source folder in ``layout`` (jsonl, jsonl.gz, text, text.gz, parquet, arrow), with a label file unless ``labels`` is None."""
    format, _, gz = layout.partition(".")
    end = f".{gz}" if gz else ""
    for split, texts in (("train", train), ("test", test)):
        if format == "jsonl":
            write_lines(folder / f"{'trn' if split == 'train' else 'tst'}.json{end}", json_lines(texts))
        elif format == "text":
            write_lines(folder / f"{split}_raw_texts.txt{end}", [text.encode() for _, text, _ in texts])
            forms = ("%d", "%d", "%d:1.0")
            rows = [(", " if i % 2 else " ").join(forms[i % 3] % label for label in labels) for i, (_, _, labels) in enumerate(texts)]
            write_lines(folder / f"{split}_labels.txt{end}", [row.encode() for row in rows])
        else:
            columns = {
                "uid": [t[0] for t in texts],
                "text": [t[1] for t in texts],
                "labels": pa.array([t[2] for t in texts], pa.list_(pa.int64())),
            }
            write_table(folder / f"{split}.{format}", columns)
    if labels is not None:
        titles = [f"label {i}" for i in range(labels)]
        if format == "jsonl":
            write_lines(folder / f"lbl.json{end}", label_lines(labels))
        elif format == "text":
            write_lines(folder / f"label_raw_texts.txt{end}", [title.encode() for title in titles])
        else:
            write_table(folder / f"labels.{format}", {"text": titles})
    return folder


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    return path
