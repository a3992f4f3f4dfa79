"""Tables of studies in a document, made from the records.

    python benchmarks/tables.py docs/accuracy.md           # writes them anew
    python benchmarks/tables.py docs/accuracy.md --check   # exit status 1 if one differs

A table stands between `<!-- table: TOPIC STUDY SPLIT -->` and `<!-- end -->`: a row a case of benchmarks/studies/STUDY.yaml that has
records in benchmarks/records/TOPIC.jsonl, in percent, the mean over its seeds with half of its 95% interval (Student's t) from three
seeds on; then the layer's memory in training, and how many times less it is than that of a dense layer on the encoder's whole embedding
under Adam in float32. Of a case and seed that was run several times the last record counts.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from haste_dist.intervals import over_seeds
from haste_dist.trials import read_study_page

HERE = Path(__file__).resolve().parent
BLOCK = re.compile(r"(<!-- table: (\S+) (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
ADAM_BYTES = 12  # a weight of a dense layer in float32, and Adam's two moments
COLUMNS = {
    **{f"{name.upper()}@{k}": f"{name}_at_{k}" for name, k in (("p", 1), ("p", 3), ("p", 5), ("psp", 1), ("psp", 5))},
    "R@5 seen 1": "r_at_5_freq_1",
    **{name.replace("_", " to "): f"r_at_5_freq_{name}" for name in ("2_5", "6_20", "21_100")},
    "over 100": "r_at_5_freq_over_100",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("document", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--records", type=Path, default=HERE / "records")
    args = parser.parse_args()
    old = args.document.read_text(encoding="utf-8")
    new = BLOCK.sub(lambda found: f"{found[1]}{table(found[2], found[3], found[4], args.records)}\n{found[5]}", old)
    if args.check:
        sys.exit(f"{args.document}: a table is not what the records say; run without --check" if new != old else 0)
    args.document.write_text(new, encoding="utf-8")


def table(topic: str, study: str, split: str, records: Path) -> str:
    """A study's Markdown table; ends the program if there is no record."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    lines = [json.loads(line) for line in (records / f"{topic}.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in sorted(lines, key=lambda line: line["date"]):
        if (line.get("study"), line.get("split")) == (study, split):
            runs.setdefault(line["case"], {})[line["seed"]] = line
    cases = [case for case in read_study_page(HERE / "studies" / f"{study}.yaml").all_cases if case in runs]
    if not cases:
        sys.exit(f"{records}/{topic}.jsonl: holds no run of study {study} on the {split} split")
    head = ["case", "seeds", *COLUMNS, "layer, MB (times less)"]
    rows = [head, ["---"] * len(head)]
    shapes = [run["shape"] for found in runs.values() for run in found.values()]
    adam = (
        ADAM_BYTES * max(shape["L"] for shape in shapes) * max(shape["D"] for shape in shapes)
    )  # a bottleneck is narrower than the encoder
    for case in cases:
        found = list(runs[case].values())
        size = found[0]["output_bytes"]
        megabytes = f"{size / 1e6:.1f} ({adam / size:.0f})"
        rows.append([case, str(len(found)), *(cell([run[name] for run in found]) for name in COLUMNS.values()), megabytes])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cell(values: list[float]) -> str:
    seen = over_seeds([100 * value for value in values])
    return f"{seen.value:.2f}" + (f" ± {seen.half:.2f}" if len(values) > 2 else "")


if __name__ == "__main__":
    main()
