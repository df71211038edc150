"""docs/experiments.md: the paper's numbers; differences, intervals and what is called reproduced, from its own APs."""

import math
import re
import statistics
from pathlib import Path

import pytest

from retinanet_keras.experiments import paper

PAGE = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8").split("## Results")[1]
T_8, T_2 = 2.306, 4.303  # Student's t of 97.5% at 8 and at 2 degrees of freedom
TABLES = ("1a", "1b", "1c", "1d", "3")
SAME = {"fl": "gamma_2", "scales_3_ratios_3": "gamma_2", "ce": "gamma_0"}  # settings; these have three seeds


def tables_of(page):
    """[[cells]] of each table of rows, the line of its heads first."""
    for block in re.findall(r"(?:^\|.*\n)+", page, re.M):
        heads, _, *lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        if heads[0] in ("row", "rows"):
            yield [heads, *lines]


ROWS = [line for heads, *lines in tables_of(PAGE) if heads[0] == "row" for line in lines]
PAIRS = [line for heads, *lines in tables_of(PAGE) if heads[0] == "rows" for line in lines]
SEEDS = {row[0].strip("`"): [float(ap) for ap in re.findall(r"\d+\.\d", row[1].split("seeds:")[1])]
         for row in ROWS if "seeds:" in row[1]}  # fmt: skip
AP = {row[0].strip("`"): float(row[1].split()[0]) for row in ROWS if row[1] != "not run"}
S = math.sqrt(statistics.fmean(statistics.variance(seeds) for seeds in SEEDS.values()))


def half_interval(*rows):
    """Half of the 95% interval of a difference between two rows."""
    return T_8 * S * math.sqrt(sum(1 / len(SEEDS.get(row, [0])) for row in rows))


def check(rows, trained, difference, printed, sign):
    """A difference, its interval and what is said of its sign; the paper's is of the table that has both rows.

    Args:
        trained: the rows whose APs ours is of.
    """
    (theirs,) = (of[rows[0]]["AP"] - of[rows[1]]["AP"] for of in map(paper.rows, TABLES) if set(rows) <= set(of))
    value, half = (float(text) for text in difference.split(" ± "))
    assert value == pytest.approx(AP[trained[0]] - AP[trained[1]], abs=0.11)  # the tool's are taken before rounding
    assert half == round(half_interval(*trained), 1)
    assert float(printed) == pytest.approx(theirs, abs=0.01)
    told = "inconclusive" if abs(value) <= half else "reproduced" if value * theirs > 0 else "not reproduced"
    assert sign == told


def test_the_spread_is_that_of_the_seeds():
    assert len(SEEDS) == 4 and all(len(seeds) == 3 for seeds in SEEDS.values())
    for name, seeds in SEEDS.items():
        assert AP[name] == pytest.approx(statistics.fmean(seeds), abs=0.1)
        assert f"{statistics.stdev(seeds):.2f}" in PAGE and f"± {statistics.stdev(seeds):.1f} (seeds" in PAGE
    intervals = [half_interval(*rows) for rows in (("", ""), ("", "gamma_0"), ("gamma_2", "gamma_0"))]
    said = "± {:.1f} for one seed each, ± {:.1f} for one and three, ± {:.1f} for three each".format(*intervals)
    assert said in PAGE.replace("\n", " ") and f"s = {S:.2f}" in PAGE and f"t = {T_8}" in PAGE


def test_signs_of_a_tables_differences():
    for heads, *lines in tables_of(PAGE):
        if heads[-1] == "sign" and heads[0] == "row":
            (baseline,) = (line[0].strip("`") for line in lines if line[3] == "+0.0")
            for name, _, _, difference, _, printed, sign in lines:
                if difference != "+0.0":
                    rows = name.strip("`"), baseline
                    check(rows, rows, difference, printed, sign)


def test_signs_of_pairs():
    for text, difference, printed, sign in PAIRS:
        rows = re.fullmatch("`([^`]+)` less `([^`]+)`", text).groups()
        check(rows, [SAME.get(row, row) for row in rows], difference, printed, sign)


def test_the_papers_aps():
    for heads, *lines in tables_of(PAGE):
        if "paper: AP" in heads:
            names = [line[0].strip("`") for line in lines]
            (table,) = (table for table in TABLES if list(paper.rows(table)) == names)
            column = [float(line[heads.index("paper: AP")]) for line in lines]
            assert column == [row["AP"] for row in paper.rows(table).values()]


def test_all_differences_are_counted_and_nothing_else_is_called_reproduced():
    told = re.findall(r"\| (reproduced|not reproduced|inconclusive) \|", PAGE)
    assert f"of the {len(told)} differences" in PAGE and set(told) == {"reproduced", "not reproduced", "inconclusive"}
    assert not re.search(r"^#.*reproduced", PAGE, re.M)
    prose = [line for line in PAGE.splitlines() if "reproduced" in line and not line.startswith("|")]
    assert len(prose) == 3  # what the words mean, and the first losses, which are below


def test_the_ratio_of_the_first_losses():
    """Given the lowest and the highest of three: means as close and deviations as large as they can be."""
    found = re.search(r"begins at ([\d,]+) to\s([\d,]+).*?begins at (\d+) to (\d+)", PAGE, re.S).groups()
    low, high, lower, higher = (math.log(float(text.replace(",", ""))) for text in found)
    ranges = high - low, higher - lower
    apart = (2 * low + high) / 3 - (2 * higher + lower) / 3
    half = T_2 * math.sqrt(sum(r**2 / 3 for r in ranges) / 3)
    assert f"factor of {math.exp(low - higher):.0f} apart" in PAGE
    assert f"lies above {math.floor(math.exp(apart - half))}." in PAGE
