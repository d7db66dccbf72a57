"""README's GPU table, from the newest file in results/.

    python bench/readme_table.py             # writes it into README.md, between its two marks
    python bench/readme_table.py --check     # exit status 1 if README.md says something else
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- gpu table: bench/readme_table.py -->", "<!-- end of gpu table -->"
UNVERIFIED = (
    "**Not verified on a GPU**: no speed on a GPU is claimed anywhere here. `python bench/gpu.py` measures it in nine\n"
    "minutes on an H100 or H200 and writes `bench/results/`; `python bench/readme_table.py` then puts the table here."
)


def newest(results: Path) -> Path | None:
    """The results file with the latest date."""
    dated = [(json.loads(path.read_text())["conditions"]["date"], path.name, path) for path in results.glob("*.json")]
    return max(dated)[2] if dated else None


def table(results: Path) -> str:
    """Markdown: goal, measured and verdict of the newest run, or that there is none."""
    path = newest(results)
    if path is None:
        return UNVERIFIED
    found = json.loads(path.read_text())
    where = found["conditions"]
    lines = ["| figure | goal | measured | verdict |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row[name] for name in row)} |" for row in found["verdicts"]]
    told = f"{where['device']}, driver {where['driver']}, torch {where['torch']}, Triton {where['triton']}"
    return "\n".join([*lines, "", f"{told}, {where['date']}: `bench/results/{path.name}`, by `python bench/gpu.py`."])


def with_table(readme: str, results: Path) -> str:
    """README's text with the table between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    check = parser.parse_args().check
    path = HERE.parent / "README.md"
    now = path.read_text(encoding="utf-8")
    wanted = with_table(now, HERE / "results")
    if check:
        sys.exit("README.md: its GPU table is not that of the newest results" if wanted != now else 0)
    path.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
