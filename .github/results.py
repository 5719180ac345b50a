"""The tables of README.md and RESULTS.md, computed from results.csv, and the pictures beside them.

    python .github/results.py          # prints the tables, refreshes both files, draws the pictures
    python .github/results.py --check  # changes nothing, and fails if a file differs

Only the pictures need matplotlib. A table stands between "<!-- table: NAME -->" and
"<!-- end -->". The check also fails if a sentence says "a ± b" and no table has these numbers.

Each row of results.csv is a training run. `setting` is the experiment (RESULTS.md has its options),
`method` the script without "train_" and ".py", `options` what the command adds to the setting but
for the seed. Accuracies are in percent, AA on 500 images. `val PGD-10` is that of the best epoch on
the validation images. Whatever was not measured is empty. Some rows are no run:

- Where the numbers by seed are gone, a row is the mean of the runs whose seeds stand in `seed`
  ("0 1 2"), and the columns ± hold half of its 95 % interval.
- If `minus` names a method and its options too, the row is the mean difference between the runs of
  the row and those of `minus`, where runs of the same seed were paired.
- The paper's numbers are the rows of the setting "paper".

`code` is "today" for code that trains as today's does, but for the rounding of L'. "earlier" is a
code that folded batch norm into the convolutions, which rounds otherwise, and whose attacks
searched in bfloat16. "larger" is a code that on a CPU trains as today's does, used on the GPU.
"""

import csv
import re
import sys
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FILES = (HERE.parent / "README.md", HERE / "RESULTS.md")
with open(HERE / "results.csv", newline="") as file:
    ROWS = list(csv.DictReader(file))
for row in ROWS:
    row["key"] = f"{row['method']} {row['options']}".strip()

COLUMNS = ("Clean", "FGSM", "PGD-20", "PGD-100", "CW", "AA")
FOUR = ("Clean", "PGD-20", "CW", "AA")
CODES = ("today", "earlier")
SEEDS = 3  # fewer runs make no mean
SCRIPTS = {"at_ours": "vanilla AT", "trades_ours": "TRADES", "mart_ours": "MART"}
SCRIPTS["lma_at"] = "LMA-AT"

# The 2x2: without or with L', without or with mHuber.
CELLS = {}
for method in SCRIPTS:
    plain = f"{method} --attack-loss {'kl' if method == 'trades_ours' else 'ce'} --margin-weight 0"
    CELLS[method] = {
        "neither": f"{plain} --beta 0",
        "L'": f"{method} --beta 0",
        "mHuber": f"{plain} --beta 8.6",
        "both": f"{method} --beta 8.6",
    }
VANILLA, TRADES, MART = (CELLS[m]["neither"] for m in ("at_ours", "trades_ours", "mart_ours"))
EFFECTS = {
    "L' alone": {"L'": 1, "neither": -1},
    "mHuber alone": {"mHuber": 1, "neither": -1},
    "mHuber, where L' is there": {"both": 1, "L'": -1},
    "L', where mHuber is there": {"both": 1, "mHuber": -1},
    "both": {"both": 1, "neither": -1},
    "both, beyond the sum of each alone": {"both": 1, "L'": -1, "mHuber": -1, "neither": 1},
}
DIFFERENCES = (  # "a minus b"
    ("lma_at", VANILLA),
    ("lma_at", TRADES),
    ("at_ours", VANILLA),
    ("trades_ours", TRADES),
    ("mart_ours", MART),
    ("lma_at", "lma_at --tau 0"),
    ("lma_at", "lma_at --tau 0.9"),
    ("lma_at", "lma_at --margin-weight 0"),
    ("at_ours", "at_ours --attack-loss ce"),
    ("lma_at --beta 0", VANILLA),
    ("lma_at --beta 8.6", VANILLA),
    ("trades_ours --beta 0", TRADES),
    ("trades_ours --beta 8.6", TRADES),
    ("lma_at --beta 8.6", "lma_at"),
    ("lma_at --beta 1.34", "lma_at --beta 0"),
    ("lma_at --beta 1.34", "lma_at --tau 0.9"),
    ("lma_at --tau 0 --beta 0.86", "lma_at --tau 0.9"),
    ("lma_at --tau 0 --beta 0.86", "lma_at --beta 1.34"),
    ("lma_at --margin-weight 0 --beta 8.6", "lma_at --beta 8.6"),
)
SUMMARY = (
    *(
        cell
        for method in ("at_ours", "trades_ours", "mart_ours")
        for cell in CELLS[method].values()
    ),
    *("lma_at --beta 0", "lma_at --beta 8.6", "lma_at"),
)


# -------------------------------------------------------------------- means, differences, intervals
@cache
def student(df):
    """The 97.5 % point of Student's t, from its density in the angle arctan(t / sqrt(df))."""
    angle = np.linspace(-np.pi / 2, np.pi / 2, 200_001)
    share = np.cumsum(np.cos(angle) ** (df - 1))
    return np.sqrt(df) * np.tan(np.interp(0.975, share / share[-1], angle))


def mean_of(values):
    """Mean, half of its 95 % interval, and the number of values."""
    n = len(values)
    return np.mean(values), student(n - 1) * np.std(values, ddof=1) / n**0.5, n


def find(key, code, minus="", setting="wrn-10-1"):
    """The rows of a method with options."""
    wanted = {"key": key, "code": code, "minus": minus, "setting": setting}
    return [row for row in ROWS if all((row[k] or "") == v for k, v in wanted.items())]


def recorded(rows, column):
    """The first recorded mean in these rows, as mean_of gives it, or None."""
    for row in rows:
        if len(row["seed"].split()) > 1 and row[column]:
            return float(row[column]), float(row[column + " ±"]), len(row["seed"].split())
    return None


def by_seed(key, code, column):
    """{seed: accuracy} of the runs that are known by seed."""
    rows = [row for row in find(key, code) if len(row["seed"].split()) == 1 and row[column]]
    return {row["seed"]: float(row[column]) for row in rows}


def mean(key, code, column):
    """Mean, half-interval and number of the runs of a code, or None."""
    values = list(by_seed(key, code, column).values())
    return recorded(find(key, code), column) or (mean_of(values) if len(values) >= SEEDS else None)


def newest(key):
    """The newest code that has a mean, or None."""
    return next((code for code in CODES if mean(key, code, "Clean")), None)


def pairs(weights, column):
    """The code and the mean of a weighted sum {key: weight} of runs of the same seed, or None."""
    for code in CODES:
        runs = {key: by_seed(key, code, column) for key in weights}
        seeds = set.intersection(*map(set, runs.values()))
        if len(seeds) >= SEEDS:
            terms = [[w * runs[key][s] for key, w in weights.items()] for s in sorted(seeds)]
            return code, mean_of(np.sum(terms, 1))
        key, minus = list(weights)[:2]
        value = recorded(find(key, code, minus), column) if len(weights) == 2 else None
        if value:
            return code, value
    return None


def welch(a, b, column):
    """The difference of two means with Welch's interval, of the same code if possible, or None."""
    for one, other in sorted(product(CODES, CODES), key=lambda codes: len(set(codes))):
        found = mean(a, one, column), mean(b, other, column)
        if None not in found:
            (x, half_x, n), (y, half_y, m) = found
            u, v = (half_x / student(n - 1)) ** 2, (half_y / student(m - 1)) ** 2
            df = (u + v) ** 2 / (u**2 / (n - 1) + v**2 / (m - 1))
            return x - y, student(df) * (u + v) ** 0.5
    return None


# --------------------------------------------------------------------------------------- the tables
def label(key):
    """What a method with options is called in the tables."""
    name, *words = key.split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    if key in (VANILLA, TRADES, MART):
        return SCRIPTS[name]
    parts = [SCRIPTS[name] + (" + Ours" if name != "lma_at" else "")]
    parts += [f"β = {options.get('--beta', 86)}"]
    parts += [f"τ = {options['--tau']}"] if "--tau" in options else []
    parts += ["`--ema image`"] if "--ema" in options else []
    parts += ["no L' in the loss"] if options.get("--margin-weight") == "0" else []
    parts += ["no L' in the search"] if "--attack-loss" in options else []
    return ", ".join(parts)


def markdown(header, *rows):
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def interval(value, half, signed=False):
    """A mean and its interval. A difference has a sign, and is bold if it exceeds its interval."""
    text = f"{value:{'+' if signed else ''}.2f} ± {half:.2f}".replace("-", "−")
    return f"**{text}**" if signed and abs(value) > half else text


def mean_cells(key, code, columns):
    """A row's cells, and the star of a code that is not today's."""
    found = [mean(key, code, column) for column in columns]
    return [interval(*f[:2]) if f else "–" for f in found], "\\*" if code == "earlier" else ""


def difference(a, b, column):
    """A cell: the difference in pairs, or else of the means, which has a dagger."""
    if paired := pairs({a: 1, b: -1}, column):
        return interval(*paired[1][:2], signed=True)
    values = welch(a, b, column)
    return interval(*values, signed=True) + " †" if values else "–"


def papers_difference(a, b, column):
    """ " (x)", where x is the difference of the paper's means, or nothing."""
    rows = [row for k in (a, b) for row in find(k, "paper", setting="paper") if row[column]]
    if len(rows) < 2:
        return ""
    return f" ({float(rows[0][column]) - float(rows[1][column]):+.2f})".replace("-", "−")


def gpu_table():
    """The runs on a GPU and the paper's rows of the same methods."""
    runs = [row for row in ROWS if row["setting"] == "resnet18"]
    papers = [row for run in runs for row in find(run["key"], "paper", setting="paper")]
    rows = [[label(row["key"]), *(row[c] or "–" for c in COLUMNS)] for row in runs + papers]
    for cells in rows[len(runs) :]:
        cells[0] = f"the paper's {cells[0]} (all images, 130 epochs)"
    return [["ResNet-18, accuracy in %", *COLUMNS], *rows]


def cells_table():
    """The means of the 2x2, each of the newest code that has it."""
    rows = []
    for method, cell in product(SCRIPTS, CELLS["lma_at"]):
        key = CELLS[method][cell]
        values, star = mean_cells(key, newest(key), COLUMNS)
        rows.append([SCRIPTS[method], cell + star, *values])
    return [["method", "with", *COLUMNS], *rows]


def effects_table():
    """What L' and mHuber do, in pairs, wherever there are runs for it."""
    rows = []
    for method, (effect, weights) in product(SCRIPTS, EFFECTS.items()):
        terms = {CELLS[method][cell]: weight for cell, weight in weights.items()}
        found = [pairs(terms, column) for column in FOUR]
        if any(found):
            star = "\\*" if "earlier" in [f[0] for f in found if f] else ""
            cells = [interval(*f[1][:2], signed=True) if f else "–" for f in found]
            rows.append([SCRIPTS[method], effect + star, *cells])
    return [["method", "effect of", *FOUR], *rows]


def means_table():
    """The means of every row of the experiment that the table of the 2x2 does not show."""
    shown = {(k, newest(k)) for cells in CELLS.values() for k in cells.values()}
    runs = [row for row in ROWS if row["setting"] == "wrn-10-1" and not row["minus"]]
    rows = []
    for key, code in dict.fromkeys((row["key"], row["code"]) for row in runs):
        if (key, code) not in shown and mean(key, code, "Clean"):
            values, star = mean_cells(key, code, COLUMNS)
            rows.append([label(key) + star, *values])
    return [["mean of three seeds", *COLUMNS], *rows]


def differences_table():
    """Chosen differences, with the paper's in brackets, but for those that effects_table shows."""
    shown = [(cells["both"], cells["neither"]) for cells in CELLS.values()]
    rows = []
    for a, b in DIFFERENCES:
        if (a, b) in shown and pairs({a: 1, b: -1}, "Clean"):
            continue
        cells = [difference(a, b, column) + papers_difference(a, b, column) for column in FOUR]
        rows.append([f"{label(a)} minus {label(b)}", *cells])
    return [["difference", *FOUR], *rows]


def summary_table():
    """What the README shows: a selection of the means, and the runs on a GPU."""
    rows = []
    for key, code in product(SUMMARY, CODES):
        if mean(key, code, "Clean"):
            values, star = mean_cells(key, code, FOUR)
            rows.append([label(key) + star, *values])
    header, *gpu = gpu_table()
    gpu = [[row[0], *(row[header.index(column)] for column in FOUR)] for row in gpu]
    rows[0][0], gpu[0][0] = f"WRN-10-1: {rows[0][0]}", f"ResNet-18: {gpu[0][0]}"
    return [["accuracy in %", "Clean", "PGD-20", "CW", "AA (500 images)"], *rows, *gpu]


TABLES = {
    "summary": summary_table,
    "gpu": gpu_table,
    "cells": cells_table,
    "effects": effects_table,
    "means": means_table,
    "differences": differences_table,
}


# ------------------------------------------------------------------------------------- the pictures
BLUE, VERMILION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#555555"  # for the colour-blind


def draw_cells(plt):
    """The 2x2: a line for each cell, a panel for each column. Hollow means are of earlier code."""
    styles = ((GREY, "o"), (BLUE, "s"), (VERMILION, "^"), (GREEN, "D"))
    looks = dict(zip(CELLS["lma_at"], styles, strict=True))
    lines = {(m, cell): 5 * i + j for i, m in enumerate(CELLS) for j, cell in enumerate(CELLS[m])}
    figure, panels = plt.subplots(1, 4, figsize=(8.38, 4), sharey=True)
    for panel, column in zip(panels, FOUR, strict=True):
        for (method, cell), line in lines.items():
            key, (colour, marker) = CELLS[method][cell], looks[cell]
            if found := mean(key, newest(key), column):
                face = colour if newest(key) == "today" else "white"
                panel.errorbar(found[0], line, None, found[1], marker, c=colour, mfc=face, ms=5)
        panel.set_title(column)
        panel.grid(axis="x", color="#dddddd")
        panel.locator_params(axis="x", nbins=5, integer=True)
    panels[0].set_yticks(list(lines.values()), [cell for _, cell in lines])
    panels[0].invert_yaxis()
    for i, method in enumerate(CELLS):
        at = {"x": -0.46, "y": 5 * i + 1.5, "transform": panels[0].get_yaxis_transform()}
        panels[0].text(s=SCRIPTS[method], ha="right", va="center", weight="bold", **at)
    text = "accuracy in %, 95 % interval over seeds; hollow: earlier code; empty line: not measured"
    figure.supxlabel(text, fontsize=9)
    return figure


def draw_losses(plt):
    """L' beside cross-entropy, and mHuber beside half the square."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.38, 3))
    m, d = np.linspace(-2, 4, 121), np.linspace(-12, 12, 241)
    left.plot(m, np.maximum(0, 0.9 - m) ** 2 / 2, c=BLUE, label="L' with δ = 0.9")
    left.plot(m, np.log1p(np.exp(-m)), c=VERMILION, ls="--", label="cross-entropy")
    left.set(xlabel="margin $f_y - f_j$ (two classes)", ylabel="loss", ylim=(0, 3))
    right.plot(d, d**2 / 2, c=GREY, ls=":", label="d²/2")
    for alpha, colour, style in ((5.345, BLUE, "-"), (2.345, VERMILION, "--")):
        square = alpha**2 * (1 - np.cos(d / alpha))
        linear = alpha * abs(d) + (1 - np.pi / 2) * alpha**2
        value = np.where(abs(d) <= alpha * np.pi / 2, square, linear)
        right.plot(d, value, c=colour, ls=style, label=f"mHuber, α = {alpha}")
    right.set(xlabel="difference d of two logits", ylim=(0, 50))
    for panel in (left, right):
        panel.grid(color="#dddddd")
        panel.legend()
    return figure


def draw():
    """Write the pictures, on white, with letters that are readable at 838 pixels."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 9, "svg.hashsalt": "lma", "savefig.facecolor": "white"}
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
    for name, picture in (("cells", draw_cells), ("losses", draw_losses)):
        figure = picture(plt)
        figure.tight_layout()
        figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})


# ---------------------------------------------------------------------------------------- the files
def refreshed(text, tables):
    """A file's text with the tables that it names, and the "a ± b" in it that no table has."""
    marked = re.compile(r"(<!-- table: (.*?) -->\n).*?(?=<!-- end -->)", re.DOTALL)
    number = re.compile(r"(\d+\.\d\d)\s+±\s+(\d+\.\d\d)")
    known = number.findall("".join(tables.values()))
    unknown = [pair for pair in number.findall(marked.sub("", text)) if pair not in known]
    return marked.sub(lambda found: found[1] + tables[found[2]], text), unknown


def main(check):
    """Returns the exit status: 1 if a sentence has an unknown number or a checked file differs."""
    tables = {name: markdown(*make()) for name, make in TABLES.items()}
    status = 0
    for path in FILES:
        old = path.read_text()
        new, unknown = refreshed(old, tables)
        for pair in unknown:
            print(f"{path.name}: no table has {' ± '.join(pair)}", file=sys.stderr)
        if check and new != old:
            print(f"{path.name}: its tables are not those of results.csv", file=sys.stderr)
        elif new != old:
            path.write_text(new)
        status |= bool(unknown or check and new != old)
    if not check:
        print("\n".join(f"{name}\n\n{table}" for name, table in tables.items()))
        draw()
    return status


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
