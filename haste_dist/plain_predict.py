"""Ranks labels for texts with plain torch: python predict.py "a text" ... Needs torch, transformers, safetensors and pyarrow."""

import hashlib
import json
import sys
from argparse import ArgumentParser
from pathlib import Path

READ = ("encoder/", "model.json", "output.safetensors", "label_basis.safetensors", "calibration.json", "labels.arrow")


def main(folder: Path, texts: list[str], k: int = 5) -> None:
    import pyarrow as pa  # here, so that words that are wrong are told at once
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer, logging

    torch.set_grad_enabled(False)
    page = json.loads((folder / "model.json").read_text(encoding="utf-8"))
    logging.set_verbosity_error()  # the folder has no pooler, and nothing here reads one
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder / "encoder", trust_remote_code=False)
    encoder = AutoModel.from_pretrained(folder / "encoder", trust_remote_code=False, use_safetensors=True).eval()
    tokens = tokenizer(texts, truncation=True, max_length=page["max_length"], padding=True, return_tensors="pt")
    mask = tokens["attention_mask"]
    hidden = encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
    x = hidden[:, 0] if page["pooling"] == "cls" else (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    if page.get("project"):
        x = x @ load_file(folder / "encoder" / "projection.safetensors")["weight"].T
    x = torch.nn.functional.normalize(x, dim=-1) if page["normalize"] else x

    part = {name: tensor if name == "tail.index" else tensor.float() for name, tensor in load_file(folder / "output.safetensors").items()}
    head = x[:, slice(*page["head_features"])] @ part["head.weight"].T + part.get("head.bias", 0.0)  # dense rows
    x = x[:, slice(*page["tail_features"])]
    if page.get("basis") == "labels":
        x = x @ load_file(folder / "label_basis.safetensors")["basis"].float().view(x.shape[1], -1)  # (features, features)
    read = x[:, part["tail.index"].long()]  # (texts, groups, fan-in): what each group of labels reads
    tail = torch.einsum("ntf,tgf->ntg", read, part["tail.weight"]) + part.get("tail.bias", 0.0)
    logits = torch.cat([head, tail.flatten(1)], dim=1)[:, : page["labels"]]  # behind the labels is padding
    best, rows = logits.topk(min(k, page["labels"]))
    file = folder / "calibration.json"  # what haste evaluate --calibrate fitted, where it did; order is kept
    fitted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"scale": 1.0, "offset": 0.0}
    scores = (fitted["scale"] * best.double() + fitted["offset"]).sigmoid()
    names = pa.ipc.open_file(str(folder / "labels.arrow")).read_all()
    for i, text in enumerate(texts):
        print(text)
        for score, row in zip(scores[i].tolist(), rows[i].tolist(), strict=True):
            print(f"  {score:.6f}  {names['label'][row]}  {names['text'][row]}")


def damaged(folder: Path) -> str | None:
    """The first file read here that is not as checksums.json has it, for when something went wrong; None: that is not why."""
    try:
        records = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, LookupError):
        return None
    for name, record in records.items():
        if not name.startswith(READ):
            continue
        try:
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != record["sha256"]:
                    return str(name)
        except OSError:
            return str(name)
    return None


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a text to rank labels for; behind -- where it starts with a dash")
    parser.add_argument("-k", type=int, default=5, metavar="K", help="labels a text (default 5)")
    args = parser.parse_args()
    if args.k < 1:
        parser.error(f"argument -k: {args.k} is not at least 1")
    if not all(text.strip() for text in args.texts):
        parser.error("a text is empty; give it some words")
    here = Path(__file__).resolve().parent
    try:
        main(here, args.texts, args.k)
    except Exception:  # whatever the libraries make of half a file
        bad = damaged(here)
        if bad is None:
            raise
        sys.exit(f"{here / bad}: missing or damaged; copy the exported folder again")
