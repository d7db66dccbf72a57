"""Writes README's GPU table from the newest files in results/.

python bench/readme_table.py DIR         # copies the results of bench/gpu.py --out DIR, then writes the table
python bench/readme_table.py             # writes the table into README.md, between its two marks
python bench/readme_table.py --check     # exit status 1 if the table in README.md is not the one it would write
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
    """Returns the conditions in a file of figures, or exits with the reason why it is none."""
    where = Figures(path).read().get("conditions", {}).get("machine", {})
    if lacking := {"device", "driver", "torch", "triton", "date"} - where.keys():
        sys.exit(f"{path}: expected figures of bench/gpu.py, but its conditions lack {', '.join(sorted(lacking))}")
    return where


def newest(results: Path) -> dict[int, Path]:
    """Returns stage → the results file with the latest date."""
    files = {}
    for stage in STAGES:
        dated = [(conditions(path)["date"], path.name, path) for path in results.glob(f"*-stage{stage}.jsonl")]
        if dated:
            files[stage] = max(dated)[2]
    return files


def take(folder: Path, results: Path) -> None:
    """Copies the figures and pictures of a run's folder to the results, under the device's name and the date."""
    taken = [path for stage in STAGES if (path := folder / f"stage{stage}.jsonl").exists()]
    if not taken:
        sys.exit(f"{folder}: expected stage1.jsonl or stage2.jsonl, which bench/gpu.py --out {folder} writes")
    for path in taken:
        if conditions(path)["device"] == "cpu":
            sys.exit(f"{path}: expected figures of a GPU, got those of a CPU")
    results.mkdir(parents=True, exist_ok=True)
    for path in taken:
        where = conditions(path)
        device = re.sub(r"[^A-Za-z0-9]+", "-", where["device"]).strip("-").lower()
        for file in (path, path.with_suffix(".png")):
            if file.exists():
                shutil.copyfile(file, results / f"{device}-{where['date']}-{file.name}")


def table(results: Path) -> str:
    """Returns a Markdown table of goal, measured value and verdict of the newest run of each stage.

    Without stage 1 the text states that nothing is verified on a GPU.
    """
    files = newest(results)
    if not files:
        return UNVERIFIED
    lines, sources, verified = ["| figure | goal | measured | verdict |", "|---|---|---|---|"], [], False
    for stage, path in files.items():
        rows = verdicts(Figures(path).read(), STAGES[stage].sections)
        verified |= stage == 1 and any(row.verdict != "not measured" for row in rows)
        lines += [f"| {' | '.join(row)} |" for row in rows]
        where = conditions(path)
        machine = f"{where['device']}, driver {where['driver']}, torch {where['torch']}, Triton {where['triton']}"
        sources.append(f"Stage {stage}: {machine}, {where['date']}: `bench/results/{path.name}`.")
    return "\n".join([*([] if verified else [UNVERIFIED, ""]), *lines, "", *sources])


def with_table(readme: str, results: Path) -> str:
    """Returns README's text with the table between its marks."""
    before, _, remainder = readme.partition(BEGIN)
    after = remainder.split(END)[1]
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="DIR", help="the folder that bench/gpu.py --out has written"
    )
    parser.add_argument("--check", action="store_true", help="compare with README.md and write nothing")
    options = parser.parse_args()
    if options.folder and options.check:
        parser.error("--check: expected no folder, since it writes nothing")
    if options.folder:
        take(options.folder, HERE / "results")
    path = HERE.parent / "README.md"
    now = path.read_text(encoding="utf-8")
    wanted = with_table(now, HERE / "results")
    if options.check:
        sys.exit("README.md: the GPU table is not that of the newest results" if wanted != now else 0)
    path.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
