"""Write the tables of README.md (and the plots) from ``results/*.json``.

``python benchmarks/render.py`` writes; ``--check`` only says whether the tables are in step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gpu_table

from pycdgkd.bench import plots, records, table

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def rendered(folder: Path) -> str:
    """README.md with the tables of every stored record between its two marks."""
    readme = (folder / "README.md").read_text(encoding="utf-8")
    head, _, rest = readme.partition(BEGIN)
    _, _, tail = rest.partition(END)
    parts = [_section(folder, path) for path in sorted((folder / "results").glob("*.json"))]
    body = "\n".join(parts) or "No results are stored yet.\n"
    return f"{head}{BEGIN}\n\n{body}\n{END}{tail}"


def _section(folder: Path, path: Path) -> str:
    pictures = sorted(path.parent.glob(f"{path.stem}-*.svg"))
    links = [f"![{picture.stem}]({picture.relative_to(folder)})" for picture in pictures]
    stored = json.loads(path.read_text(encoding="utf-8"))
    if gpu_table.is_gpu_record(stored):
        return "\n".join([f"## {path.stem}", "", gpu_table.report(stored)])
    run = records.load(path)
    return "\n".join([f"## {path.stem}", "", *links, "", table.report(run, markdown=True)])


def main(arguments: list[str]) -> int:
    readme = HERE / "README.md"
    if arguments == ["--check"]:
        if readme.read_text(encoding="utf-8") == rendered(HERE):
            return 0
        print("benchmarks/README.md is not what results/*.json say; run: make bench-table")
        return 1
    for path in sorted((HERE / "results").glob("*.json")):
        if gpu_table.is_gpu_record(json.loads(path.read_text(encoding="utf-8"))):
            continue  # its ratios are all in the table
        plots.draw(records.load(path), path.with_suffix(""))
    readme.write_text(rendered(HERE), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
