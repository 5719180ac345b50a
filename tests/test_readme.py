"""The README's programs and commands do what it says, its tables are those of results.csv."""

import re
import shlex
import subprocess
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

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCRIPTS = (train_lma_at, train_at_ours, train_trades_ours, train_mart_ours)
LOOP, PREDICTION = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(r"python (\w+\.py)((?:\\\n|[^`\n;|])*)", README)


def parse(monkeypatch, name, options):
    """The arguments that a script or evaluate.py makes of the options of a command."""
    program = next(m for m in (*SCRIPTS, evaluate) if Path(m.__file__).name == name)
    options = options.replace("\\\n", " ").replace("$s", "0").replace("*", "0")
    monkeypatch.setattr(sys, "argv", [name, *shlex.split(options)])
    return program.parse_args()


def rows():
    """(script, options) of each row in each table of the paper, from the README's two tables."""
    section = README.split("## The paper's rows")[1].split("\n## ")[0]
    lines = [line for line in section.replace("`", "").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    numbers, options = (
        [row for row in cells if row[0] == name][0] for name in ("tables", "options")
    )
    of_table = {n: o for ns, o in zip(numbers[1:], options[1:]) for n in ns.split(", ")}
    for row, script, choices in [row for row in cells if len(row) == 3]:
        if row.startswith("Table"):  # "Tables 2 and 3, ..." or "Table 10 A"
            tables = re.findall(r"\d+", row.split(",")[0])
        else:
            tables = list(of_table)
        scripts = [script]
        if script == "the four scripts":
            scripts = [Path(m.__file__).name for m in SCRIPTS]
        for name in scripts if script.endswith(("py", "scripts")) else ():
            for choice in choices.split(", "):
                yield from ((name, f"{choice} {of_table[table]}") for table in tables)


def test_the_loop_is_train_epoch(monkeypatch):
    """The README's loop, run as it is printed, gives the weights that train_epoch gives.

    Three batches in float64: a swapped tau, a missing beta or another order of the two forward
    passes would show.
    """
    x, y = torch.rand(3, 8, 3, 16, 16, dtype=torch.float64), torch.arange(24).view(3, 8) % 10
    args = parse(monkeypatch, "train_lma_at.py", "--beta 8.6")

    def train(loop):
        torch.manual_seed(0)
        model = common.make_model("wrn-10-1", 10).double()
        loop(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
        return model.state_dict()

    def readmes(model, optimizer):
        given = {"model": model, "optimizer": optimizer, "batches": list(zip(x, y))}
        exec(LOOP, given | {"batch_size": 8, "num_classes": 10, "device": "cpu"})

    def ours(model, optimizer):
        past = torch.zeros(2, 8, 10, dtype=torch.float64)
        batches = [(images, labels, torch.arange(8)) for images, labels in zip(x, y)]
        train_lma_at.train_epoch(model, optimizer, batches, *past, args)

    found, expected = train(readmes), train(ours)
    assert all(torch.allclose(found[k], expected[k], rtol=0, atol=1e-9) for k in expected)


def test_the_second_program_attacks(tmp_path, monkeypatch, capsys):
    """The README's program loads a best.pt and prints its accuracy under AutoAttack."""
    torch.manual_seed(0)
    model, x = common.make_model("wrn-10-1", 3), torch.rand(3, 3, 8, 8)
    args = {"arch": "wrn-10-1", "classes": ["cat", "dog", "ship"]}
    torch.save({"model": model.state_dict(), "args": args, "epoch": 1}, tmp_path / "best.pt")
    with torch.no_grad():
        y = model.eval()(x).argmax(1)
    monkeypatch.chdir(tmp_path)
    exec(PREDICTION, names := {"x": x, "y": y})
    x_adv = evaluate.autoattack(model, x, y)
    assert torch.equal(names["x_adv"], x_adv) and not torch.equal(x_adv, x)
    with torch.no_grad():
        right = 100 * (model(x_adv).argmax(1) == y).double().mean()
    assert f" {right:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("name, options", COMMANDS)
def test_every_command_is_understood(name, options, monkeypatch):
    """The arguments of the programs allow every command of the README."""
    parse(monkeypatch, name, options)


def test_every_folder_is_that_of_a_run(monkeypatch):
    """Each folder in runs/ that the README evaluates is the default of one of its trainings."""
    trainings = [(name, options) for name, options in COMMANDS if name != "evaluate.py"]
    made = {parse(monkeypatch, *command).run_dir for command in [*trainings, *rows()]}
    used = re.findall(r"runs/[\w.=*-]*\w\*?", README)
    assert len(used) >= 4 and {folder.replace("*", "0") for folder in used} <= made


def test_the_rows_are_the_papers(monkeypatch):
    """The README's two tables make every row of the paper's tables that evaluate.py knows."""
    made = (parse(monkeypatch, *command) for command in rows())
    assert set(evaluate.ROWS) <= {(args.dataset, args.arch, args.name) for args in made}


def test_the_tables_are_those_of_the_csv():
    """Every table of accuracies in README.md and RESULTS.md, and every "a ± b", follows from it."""
    command = [sys.executable, ROOT / ".github/results.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
