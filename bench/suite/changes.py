"""Compares two runs of the suite: which rows changed beyond noise.

The p20–p80 interval of a row is taken as its noise: a change is marked where the intervals of the two runs do not
overlap. Rows are compared by the ratio to the first provider of the same round, in which a faster or busier machine
cancels. The first provider itself is compared by its time, unless the runs come from two devices.
"""

from typing import NamedTuple

from suite.cases import from_dict


class Change(NamedTuple):
    """A compared row. ``times``: new speed over old. ``beyond_noise``: the intervals do not overlap."""

    case: str
    provider: str
    mode: str
    old: tuple[float, float, float]
    new: tuple[float, float, float]
    times: float
    beyond_noise: bool


def compare(old: dict, new: dict) -> list[Change]:
    """Returns a change for every row that both runs measured, the largest first."""
    before = {key(row): row for row in old["rows"] if not row["unavailable"]}
    same_device = old["environment"]["device"] == new["environment"]["device"]
    changes = []
    for row in new["rows"]:
        other = before.get(key(row))
        if row["unavailable"] or other is None:
            continue
        if tuple(row["ratio"]) != (1.0, 1.0, 1.0):
            then, now = tuple(other["ratio"]), tuple(row["ratio"])
        elif same_device:  # the first provider, by its speed: larger is faster, as for ratios
            then, now = ((1e6 / r["p80"], 1e6 / r["p50"], 1e6 / r["p20"]) for r in (other, row))
        else:
            continue
        beyond = now[0] > then[2] or now[2] < then[0]
        case = from_dict(row["case"])
        times = now[1] / then[1]
        changes.append(Change(f"{case.op}: {case.name}", row["provider"], row["mode"], then, now, times, beyond))
    return sorted(changes, key=lambda change: -max(change.times, 1 / change.times))


def key(row: dict) -> tuple:
    return from_dict(row["case"]), row["provider"], row["mode"]
