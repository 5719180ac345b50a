"""The README's programs and commands do what it says."""

import itertools
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import common
import evaluate
import train_at_ours
import train_lma_at
import train_mart_ours
import train_trades_ours

README = (Path(__file__).parents[1] / "README.md").read_text()
SCRIPTS = (train_lma_at, train_at_ours, train_trades_ours, train_mart_ours)
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"python (\w+\.py)((?: .*\\\n)*.*)", README)
TRAININGS = [(name, options) for name, options in COMMANDS if name != "evaluate.py"]


def parse(monkeypatch, name, options):
    """The arguments that a script or evaluate.py makes of a command line."""
    program = next(m for m in (*SCRIPTS, evaluate) if Path(m.__file__).name == name)
    words = shlex.split(options.replace("\\\n", " ").split("`")[0])
    words = [word for word in itertools.takewhile(lambda word: word != ";", words)]
    monkeypatch.setattr(
        sys, "argv", [name, *(word.rstrip(";") for word in words if word != "done")]
    )
    return program.parse_args()


def cells(line):
    """The cells of a row of a Markdown table, without the marks of code."""
    return [cell.strip().replace("`", "") for cell in line.strip().strip("|").split("|")]


def test_the_loop_is_train_epoch():
    """The README's loop, run as it is printed, gives the weights that train_epoch gives."""
    torch.manual_seed(0)
    x, y = torch.rand(3, 6, 3, 8, 8), torch.arange(18).view(3, 6) % 4
    weights = []
    for loop in (True, False):
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.ReLU(), torch.nn.Flatten()
        )
        model.append(torch.nn.Linear(5 * 6 * 6, 4))
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
        torch.manual_seed(2)
        if loop:
            names = {"model": model, "optimizer": optimizer, "batches": list(zip(x, y))}
            names |= {"batch_size": 6, "num_classes": 4, "device": "cpu"}
            exec(PROGRAMS[0], names)
        else:
            sys_argv, sys.argv = sys.argv, ["train_lma_at.py"]
            args = train_lma_at.parse_args()
            sys.argv = sys_argv
            batches = [(*pair, torch.arange(6)) for pair in zip(x, y)]
            past_adv, past_nat = torch.zeros(2, 6, 4)
            train_lma_at.train_epoch(model, optimizer, batches, past_adv, past_nat, args)
        weights.append(torch.cat([value.flatten() for value in model.state_dict().values()]))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_the_second_program_attacks_and_predicts(tmp_path, monkeypatch):
    """The README's program loads a best.pt, attacks with AutoAttack and names the classes."""
    torch.manual_seed(0)
    model = common.make_model("wrn-10-1", 3)
    args = {"arch": "wrn-10-1", "classes": ["cat", "dog", "ship"]}
    torch.save({"model": model.state_dict(), "args": args, "epoch": 1}, tmp_path / "best.pt")
    monkeypatch.chdir(tmp_path)
    x = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        label = model.eval()(x).argmax(1)
    names = {"x": x, "y": label}
    exec(PROGRAMS[1], names)
    assert names["names"] == [args["classes"][k] for k in label]
    assert (names["x_adv"] - x).abs().max() <= 8 / 255 + 1e-6
    assert 0 <= names["robust"] <= 1


@pytest.mark.parametrize("name, options", COMMANDS)
def test_every_command_is_understood(name, options, monkeypatch):
    """Every command of the README is one that its script's arguments allow."""
    options = options.replace("$s", "0").replace("runs/cifar10-resnet18-lma_at-seed*", "x")
    parse(monkeypatch, name, options)


def test_the_folders_in_the_commands_are_those_of_the_runs(monkeypatch):
    """A folder in runs/ that the README evaluates is the default of a command above."""
    made = {parse(monkeypatch, name, o.replace("$s", "0")).run_dir for name, o in TRAININGS}
    used = re.findall(r"runs/[\w.=-]+", README)
    assert used
    assert {folder.rstrip(".") for folder in used} <= made | {"runs/cifar10-resnet18-lma_at-seed"}


def rows_of_the_tables():
    """(row of the paper, script, options, data set, network) from the README's two tables."""
    lines = README.split("## The paper's rows")[1].split("\n## ")[0].splitlines()
    tables = [cells(line) for line in lines if line.startswith("|")]
    of_rows = [row for row in tables if row[1].endswith(".py")]
    numbers, options = (
        next(row for row in tables if row[0] == name) for name in ("tables", "options")
    )
    of_tables = {int(n): o for ns, o in zip(numbers[1:], options[1:]) for n in ns.split(",")}
    for row, script, choice in of_rows:
        for one in choice.split(", "):
            yield row, script, one, of_tables


def test_the_tables_of_rows_are_the_papers(monkeypatch):
    """Each row with each table's options finds its numbers in the paper's tables, and none lacks."""
    found = set()
    four = "the four scripts"
    for row, script, choice, of_tables in rows_of_the_tables():
        assert script != four
        tables = [int(n) for n in re.findall(r"\d+", row)] if row.startswith("Table") else of_tables
        for number in [n for n in tables if n in of_tables]:
            args = parse(monkeypatch, script, f"{choice} {of_tables[number]}")
            label = " ".join([args.method, *common.pairs(args.changed)])
            found.add((args.dataset, args.arch, evaluate.METHODS.get(label, label)))
    for name in sorted(Path(m.__file__).name for m in SCRIPTS):
        for options in set(of_tables.values()):
            args = parse(monkeypatch, name, options)
            found.add((args.dataset, args.arch, evaluate.METHODS[args.method]))
    others = {"PMHR-AT", "MMA", "WAT", "MAIL", "GAIRAT"}  # for which the README has no row
    assert {row for row in evaluate.ROWS if row[2] not in others} <= found
