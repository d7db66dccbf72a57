"""README's GPU table, from the newest files in results/.

python bench/readme_table.py DIR         # keeps what bench/gpu.py --out DIR has measured, then writes the table
python bench/readme_table.py             # writes it into README.md, between its two marks
python bench/readme_table.py --check     # exit status 1 if README.md says something else
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from gpu_sections.goals import verdicts
from gpu_sections.section import Figures
from gpu_sections.stages import STAGES

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- gpu table: bench/readme_table.py -->", "<!-- end of gpu table -->"
UNVERIFIED = "**Not verified on a GPU**: no speed on a GPU is claimed anywhere here."


def conditions(path: Path) -> dict:
    """Returns the machine of a file of figures, or ends with what is wrong with the file."""
    where = Figures(path).read().get("conditions", {}).get("machine", {})
    if lacking := {"device", "driver", "torch", "triton", "date"} - where.keys():
        sys.exit(f"{path}: no figures of bench/gpu.py: its conditions lack {', '.join(sorted(lacking))}")
    return where


def newest(results: Path) -> dict[int, Path]:
    """Stage → the results file with the latest date."""
    found = {}
    for stage in STAGES:
        dated = [(conditions(path)["date"], path.name, path) for path in results.glob(f"*-stage{stage}.jsonl")]
        if dated:
            found[stage] = max(dated)[2]
    return found


def take(folder: Path, results: Path) -> None:
    """Copies the figures and pictures of a run's folder to the results, under the device's name and the date."""
    taken = [path for stage in STAGES if (path := folder / f"stage{stage}.jsonl").exists()]
    if not taken:
        sys.exit(f"{folder}: no stage1.jsonl or stage2.jsonl, which bench/gpu.py --out {folder} writes")
    for path in taken:
        if conditions(path)["device"] == "cpu":
            sys.exit(f"{path}: measured on no GPU")
    results.mkdir(parents=True, exist_ok=True)
    for path in taken:
        where = conditions(path)
        device = re.sub(r"[^A-Za-z0-9]+", "-", where["device"]).strip("-").lower()
        for file in (path, path.with_suffix(".png")):
            if file.exists():
                shutil.copyfile(file, results / f"{device}-{where['date']}-{file.name}")


def table(results: Path) -> str:
    """Markdown: goal, measured and verdict of the newest run of each stage, or that there is none."""
    found = newest(results)
    if not found:
        return UNVERIFIED
    lines, sources, verified = ["| figure | goal | measured | verdict |", "|---|---|---|---|"], [], False
    for stage, path in found.items():
        rows = verdicts(Figures(path).read(), STAGES[stage].sections)
        verified |= stage == 1 and any(row.verdict != "not measured" for row in rows)
        lines += [f"| {' | '.join(row)} |" for row in rows]
        where = conditions(path)
        told = f"{where['device']}, driver {where['driver']}, torch {where['torch']}, Triton {where['triton']}"
        sources.append(f"Stage {stage}: {told}, {where['date']}: `bench/results/{path.name}`.")
    return "\n".join([*([] if verified else [UNVERIFIED, ""]), *lines, "", *sources])


def with_table(readme: str, results: Path) -> str:
    """README's text with the table between its marks."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="what bench/gpu.py --out has written")
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args()
    if options.folder and options.check:
        parser.error("--check writes nothing, so it takes no folder")
    if options.folder:
        take(options.folder, HERE / "results")
    path = HERE.parent / "README.md"
    now = path.read_text(encoding="utf-8")
    wanted = with_table(now, HERE / "results")
    if options.check:
        sys.exit("README.md: its GPU table is not that of the newest results" if wanted != now else 0)
    path.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
