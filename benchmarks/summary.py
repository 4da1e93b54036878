"""The recorded results as tables: the latest of each, beside all that were measured before.

    python -m benchmarks.summary            # print them
    python -m benchmarks.summary --write    # to benchmarks/results/README.md

A ratio is the peer's seconds over ours: above 1 we are faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SETTINGS = {  # what tells one measurement from another of the same benchmark
    "against", "chains", "device", "draws", "dtype", "gigabytes", "graph", "limit", "megabytes",
    "metrics", "onednn", "parts", "peer", "restriction", "restrictions", "reuse_logits", "runs",
    "sequences", "shape", "size", "step_over_unit", "targets", "tensors", "tokens", "variant",
}  # fmt: skip
LEFT_OUT = {
    "benchmark", "machine", "versions", "measured_at", "rounds", "repeats", "threads", "passes",
    "parameters", "gpu",
}  # fmt: skip
HEAD = """# Results

The latest record of each measurement, made by `python -m benchmarks.summary --write` from the lines
beside it. A **ratio** is the peer's seconds over ours, with its quartiles: above 1 we are faster.
**Records** are all lines of that measurement, and the lowest and highest ratio in them, also from
before improvements, and on days when the machine was slower or faster. Versions are in the lines;
what is compared stands in the docstring at the head of each benchmark.
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--write", action="store_true", help="write results/README.md")
    text = summary(RESULTS)
    if options.parse_args().write:
        (RESULTS / "README.md").write_text(text)
    else:
        print(text)


def summary(results: Path) -> str:
    """Lay out all results of a directory as a page of Markdown."""
    tables = [table(path) for path in sorted(results.glob("*.jsonl"))]
    return "\n".join([HEAD, *tables])


def table(path: Path) -> str:
    """Lay out the results of one file: a line for each measurement, in the order of the file."""
    measured: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        name = record["benchmark"].removeprefix(path.stem).strip() or path.stem
        measured.setdefault((name, _settings(record), _machine(record)), []).append(record)
    lines = [
        f"## {path.stem}",
        "",
        "| measured | settings | ratio | records | other figures | machine, day |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for (name, settings, machine), records in measured.items():
        last = records[-1]
        day = f"{machine}, {last['measured_at'][:10]}"
        cells = [name, settings, _ratio(last), _records(records), _others(last), day]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _settings(record: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(record[key])}" for key in record if key in SETTINGS)


def _machine(record: dict[str, Any]) -> str:
    host = record["machine"]
    family = f" of family {host['cpu_family']}" if "cpu_family" in host else ""
    return str(record.get("gpu") or f"{host['cpu']}{family} ({host['cores']} cores)")


def _ratio(record: dict[str, Any]) -> str:
    if not _has_ratio(record):
        return ""
    return f"**{_shown(record['ratio'])}** ({_span(record['ratio_quartiles'])})"


def _has_ratio(record: dict[str, Any]) -> bool:
    """Whether it is one of seconds."""
    return "ratio" in record and "peer_s" in record


def _records(records: list[dict[str, Any]]) -> str:
    ratios = [record["ratio"] for record in records if _has_ratio(record)]
    if len(records) == 1 or not ratios:
        return str(len(records))
    return f"{len(records)}: {_span([min(ratios), max(ratios)])}"


def _others(record: dict[str, Any]) -> str:
    kept = [
        key
        for key in record
        if key not in LEFT_OUT | SETTINGS
        and not key.endswith(("_quartiles", "range"))
        and not (key == "ratio" and _has_ratio(record))
    ]
    return ", ".join(f"{key} {_shown(record[key])}" for key in kept)


def _span(ends: list[float]) -> str:
    return " to ".join(_shown(end) for end in (ends[0], ends[-1]))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, list):
        return " x ".join(map(_shown, value))
    if isinstance(value, dict):
        return "; ".join(f"{key}: {_shown(entry)}" for key, entry in value.items())
    return str(value)


if __name__ == "__main__":
    sys.exit(main())
