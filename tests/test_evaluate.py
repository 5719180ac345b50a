"""evaluate.py around its attacks: which checkpoint is read and as what, results that are continued,
the table, the paper's rows, the checks, Figure 1, the command.

tests/test_attacks.py compares the attacks with other implementations.
"""

import json
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

import common
import evaluate
import train_at_ours
import train_lma_at
import train_mart_ours
import train_trades_ours
from evaluate import AA, ATTACKS

CPU = ("--device", "cpu")
CLASSES = ["ant", "bee", "cat", "dog"]


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    """What main() sets is put back, so that no test depends on those before it."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)


def command(function, *argv):
    """function() as if the script had been started with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, argv)])
        return function()


def start(*argv):
    """python evaluate.py ..."""
    command(partial(common.run, evaluate.main, ""), *argv, *CPU)


def options(*argv):
    return command(evaluate.parse_args, "x.pt", *argv)


def subject(path, *argv):
    return evaluate.Evaluation(path, options(*argv), torch.device("cpu"))


def network(path, *argv, classes=CLASSES):
    return evaluate.load_network(*evaluate.read_checkpoint(path, options(*argv)), classes)


def predicted(out):
    """{attack: classes of all images, -1 where unknown} of a file of results."""
    return json.loads(Path(out).read_text())["prediction"]


def run(e, *columns):
    for column in columns:
        e.run(column, 4)


def numbers(text):
    return [float(n) for n in re.findall(r"[-+]?\d+(?:\.\d+)?", text)]


def rows_of(text):
    """[cells of a row] of a Markdown table below its two lines of header."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return lines[2:]


# ------------------------------------------------------------------------ a run, and stand-ins
def patterns(n, seed):
    """n noisy 8 x 8 images of four classes, whose pattern is strong in some and weak in others."""
    same, g = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    pattern = F.interpolate(torch.randn(4, 3, 4, 4, generator=same).sign(), scale_factor=2)
    y = torch.arange(n) % 4
    contrast = 0.02 + 0.2 * torch.rand(n, 1, 1, 1, generator=g)
    x = 0.5 + contrast * pattern[y] + 0.05 * torch.randn(n, 3, 8, 8, generator=g)
    return (255 * x.clamp(0, 1)).round().byte(), y


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """train and test of a data set of PNG files."""
    root = tmp_path_factory.mktemp("data")
    for split, n in (("train", 320), ("test", 60)):
        for i, (image, label) in enumerate(zip(*patterns(n, n))):
            folder = root / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return root


@pytest.fixture(scope="session")
def runs(data_dir, tmp_path_factory):
    """Folders of one run: interrupted in its fourth and last epoch, and finished afterwards.

    Of its validation accuracies, which are made up, that of the second epoch is the best.
    """
    folder = tmp_path_factory.mktemp("runs")
    argv = ["--dataset", "folder", "--data-dir", data_dir, "--arch", "wrn-10-1", *CPU]
    argv += ["--batch-size", 20, "--lr", 0.05, "--epochs", 4, "--steps", 2, "--val-size", 20]
    argv += ["--run-dir", folder / "finished", "--resume"]
    made_up = [[90, 40], [90, 60], [90, 50], KeyboardInterrupt, [90, 30], [90, 30]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "accuracy", Mock(side_effect=made_up))
        with pytest.raises(KeyboardInterrupt):
            command(train_lma_at.main, *argv)
        shutil.copytree(folder / "finished", folder / "unfinished")
        command(train_lma_at.main, *argv)
    return folder


@pytest.fixture
def finished(runs, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(runs / "finished", tmp_path / "run"))


@pytest.fixture
def saved(runs):
    """What best.pt of the run holds."""
    return torch.load(runs / "finished" / "best.pt", weights_only=True)


@pytest.fixture
def put(tmp_path):
    """put(content): a file that holds it."""

    def put(content, name="file.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return put


@pytest.fixture
def evaluation(tmp_path, monkeypatch):
    """evaluation(x, y, *argv): an Evaluation on these images (uint8) of a network for them.

    model is put in the place of this network. Other keywords are arguments of its training, or
    `done` and `best` of its file.
    """
    standard = vars(command(train_lma_at.parse_args, "--dataset", "folder", "--arch", "wrn-10-1"))

    def evaluation(x, y, *argv, model=None, file="best.pt", done=True, best=None, **args):
        data = common.Data(x, y, args.get("classes", CLASSES))
        args = standard | {"classes": data.classes, "data": "9 images of 8x8, checksum 9"} | args
        monkeypatch.setitem(common.DATASETS, args["dataset"], lambda *_, **__: data)
        weights = common.make_model(args["arch"], len(data.classes)).state_dict()
        content = {"model": weights, "args": args, "epoch": 3, "done": done}
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        torch.save(content | ({"best": content} if best else {}), folder / file)
        e = subject(folder / file, *argv)
        e.model = model or e.model
        return e

    return evaluation


def blank(n):
    """n grey images with labels 0, 1, 2, 3, 0, 1, 2, 3, ..."""
    return torch.full((n, 3, 8, 8), 100, dtype=torch.uint8), torch.arange(n) % 4


def score(e, **right):
    """Predictions such that right[name], a number of the first images or which, are correct."""
    for name, images in right.items():
        images = range(images) if isinstance(images, int) else images
        wrong = (e.label + 1) % len(e.classes)
        wrong[list(images)] = e.label[list(images)]
        e.prediction[name.replace("_", "-")] = wrong
    return e


# ------------------------------------------------------------------------ which weights, whose name
def test_weights_and_name_of_a_run(runs, saved, put):
    """A folder is its best.pt, that of an unfinished run the best epoch so far; last.pt is the last
    epoch. The name says of an unfinished run and of a last epoch what it is."""
    name = json.loads((runs / "finished" / "args.json").read_text())["name"]
    last, third = (
        torch.load(runs / run / "last.pt", weights_only=True) for run in ("finished", "unfinished")
    )
    assert [state["epoch"] for state in (saved, last, third)] == [2, 4, 3]
    older = put({key: value for key, value in saved.items() if key != "done"})
    cases = (
        (runs / "finished", "best.pt", saved, False, []),
        (runs / "finished" / "best.pt", "best.pt", saved, False, []),
        (runs / "finished" / "last.pt", "last.pt", last, True, []),
        (runs / "unfinished", "last.pt", saved, False, [3, 4]),
        (runs / "unfinished" / "last.pt", "last.pt", third, True, [3, 4]),
        (older, older.name, saved, False, [2, 4]),
    )
    for path, file, expected, is_last, epochs in cases:
        weights, training = evaluate.read_checkpoint(path, options())
        assert training["path"].name == file and training["seed"] == 0
        assert weights.keys() == expected["model"].keys()
        assert all(torch.equal(weights[key], expected["model"][key]) for key in weights), path
        assert training["name"].startswith(name)
        more = training["name"].removeprefix(name)
        assert ("last" in more, numbers(more)) == (is_last, epochs)


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def as_others_do(state):
    """The names in the files of TRADES, MART and RobustBench."""
    twice = {k.replace("block1", "sub_block1"): v for k, v in state.items() if "block1" in k}
    if "layer1.0.conv1.weight" in state:
        names = {k: k.replace("downsample", "shortcut").replace("fc.", "linear.") for k in state}
        return {names[k]: v for k, v in state.items()}
    return state | twice


@pytest.mark.parametrize("arch", ["wrn-10-1", "resnet18"])
def test_foreign_weights(arch, put):
    """Weights that are wrapped, prefixed, or named differently give the network they are from."""
    torch.manual_seed(0)
    model, x = common.make_model(arch, 4).eval(), torch.rand(2, 3, 8, 8)
    state = as_others_do(model.state_dict())
    contents = [state]
    if arch == "wrn-10-1":  # else it takes long
        contents += [{key: state, "epoch": 7} for key in ("state_dict", "model", "net")]
        contents += [prefixed(state, "module."), {"net": prefixed(state, "_orig_mod.module.")}]
        contents += [{"model": prefixed(state, "module._orig_mod."), "args": {"lr": 0.1}}]
    for content in contents:
        loaded = network(put(content), "--dataset", "folder", "--arch", arch)
        assert torch.equal(loaded(x), model(x)) and not loaded.training
        assert not any(weight.requires_grad for weight in loaded.parameters())


FOREIGN = ("--dataset", "folder", "--arch", "wrn-10-1")


def test_loading_is_strict(saved, put, refused):
    """A weight too few, too many, or of another size is named, in our files and in others."""
    state, bias = saved["model"], saved["model"]["fc.bias"]
    fewer = {key: value for key, value in state.items() if key != "fc.bias"}
    for weights in (fewer, state | {"fc.bias_2": bias}, state | {"fc.bias": bias[:3]}):
        for content, argv in ((weights, FOREIGN), (saved | {"model": weights}, ())):
            assert "fc.bias" in refused(network, put(content), *argv)
    assert network(put(state), *FOREIGN) and network(put(saved))


class Trap:
    """What a file can do to whoever unpickles it."""

    def __reduce__(self):
        return Path.mkdir, (Path("trapped"),)


def test_no_object_is_unpickled(saved, put, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match="weights_only"):
        network(put(saved | {"other": Trap()}))
    assert not Path("trapped").exists()


def test_classes_in_another_order_are_refused(saved, put, refused):
    """Be they the classes of our file, or a list, tuple or class_to_idx of another one's."""
    for classes, good in ((CLASSES, True), (CLASSES[::-1], False), (CLASSES[:3], False)):
        ours = {"args": saved["args"] | {"classes": classes}, "epoch": 3}
        numbered = {
            name: classes.index(name) for name in sorted(classes, key="bee dog ant cat".find)
        }
        contents = [ours, {"class_to_idx": numbered}]
        contents += [{"classes": kind(classes)} for kind in (list, tuple)]
        for content in contents:
            path = put({"model": saved["model"]} | content)
            if good:
                network(path, *FOREIGN)
            else:
                assert path.name in refused(network, path, *FOREIGN)


def test_mean_and_std_standardise_the_images(put):
    """With --mean and --std foreign weights get (x - mean) / std of each channel."""
    torch.manual_seed(0)
    model, x = common.make_model("wrn-10-1", 4).eval(), torch.rand(2, 3, 8, 8)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
    loaded = network(put(model.state_dict()), *FOREIGN, "--mean", *mean, "--std", *std)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    assert torch.allclose(loaded(x), model((x - mean) / std), atol=1e-5)


def test_refused_commands(saved, data_dir, put, tmp_path, refused, monkeypatch):
    """Status 2, the option or file in question, and no attack has begun."""
    ours, state = saved["args"], saved["model"]
    odd = ours["data"].replace("8x8", "8x80")
    unnamed = {key: value for key, value in ours.items() if key != "name"}
    monkeypatch.setattr(evaluate, "perturb", lambda *_, **__: 1 / 0)
    (tmp_path / "empty").mkdir()
    foreign, mine = put(state, "foreign.pt"), put(saved, "mine.pt")
    where = ("--data-dir", data_dir)
    cases = (
        (("foreign.pt", "--arch"), foreign, *where, "--dataset", "folder"),
        (("foreign.pt", "--dataset"), foreign, *where, "--arch", "wrn-10-1"),
        (("--arch", "nn"), foreign, *where, "--dataset", "folder", "--arch", "nn"),
        (("absent.pt",), tmp_path / "absent.pt"),
        (("empty",), tmp_path / "empty"),
        (("elsewhere", "--data-dir"), mine, "--data-dir", tmp_path / "elsewhere"),
        (("8x80", "8x8"), put(saved | {"args": ours | {"data": odd}}, "odd.pt")),
        (("unnamed.pt", "--arch"), put(saved | {"args": unnamed}, "unnamed.pt")),
        (("foreign.pt",), mine, "--figure1", foreign),
    )
    for words, *argv in cases:
        error = refused(start, *argv, "--attacks", "FGSM", "--n", 1)
        assert all(word in error for word in words), error
    assert not list(tmp_path.glob("*.tmp"))


def test_a_place_that_is_not_writable_is_found_before_the_attacks(finished, refused, monkeypatch):
    out = subject(finished).out
    out.unlink()
    out.mkdir()
    monkeypatch.setitem(ATTACKS, "FGSM", lambda *_, **__: 1 / 0)
    assert out.name in refused(start, finished)


# ------------------------------------------------------------------------ which images
def test_n_chooses_the_same_images_of_all_classes(evaluation):
    """The first files are all of one class."""
    x, _ = patterns(60, 1)
    y = torch.arange(60) // 15
    ten, again, few, every, more = (
        evaluation(x, y, *argv) for argv in (["--n", 10], ["--n", 10], ["--n", 4], [], ["--n", 99])
    )
    for e in (ten, few, every):
        assert torch.equal(e.images, x[e.index]) and torch.equal(e.label, y[e.index])
        assert e.index.tolist() == sorted(e.index.tolist())
    assert torch.equal(ten.index, again.index) and len(ten.index) == 10
    assert {*few.index.tolist()} < {*ten.index.tolist()} and {*ten.label.tolist()} == {0, 1, 2, 3}
    assert every.index.tolist() == more.index.tolist() == list(range(60))


def test_where_the_data_set_is(saved, put, monkeypatch):
    """--data-dir, or else the folder of the training, of foreign weights `data`; the test split."""
    asked = []

    def reader(root, split, **_):
        asked.append((str(root), split))
        return common.Data(*patterns(8, 1), CLASSES)

    monkeypatch.setitem(common.DATASETS, "folder", reader)
    ours, foreign = put(saved, "ours.pt"), put(saved["model"], "foreign.pt")
    for path, argv in ((ours, ()), (foreign, FOREIGN)):
        subject(path, *argv)
        subject(path, *argv, "--data-dir", "there")
    roots = [saved["args"]["data_dir"], "there", "data", "there"]
    assert asked == [(str(root), "test") for root in roots]


# ------------------------------------------------------------------------ the file of results
def test_results_belong_to_weights_network_images_and_settings(saved, put, monkeypatch):
    """Each of them has a file of its own, so that no result is taken for another's."""
    x, y = patterns(12, 1)
    plain = common.make_model
    monkeypatch.setattr(common, "make_model", lambda arch, classes: plain("wrn-10-1", classes))
    state = saved["model"]
    moved = state | {"bn1.running_mean": state["bn1.running_mean"] + 1}
    pixel, label = x.clone(), y.clone()
    pixel[-1, 2, 7, 7] ^= 1
    label[-1] ^= 1

    def out(weights=state, x=x, y=y, *more):
        data = common.Data(x, y, CLASSES)
        monkeypatch.setitem(common.DATASETS, "folder", lambda *_, **__: data)
        return subject(put(weights), *FOREIGN, *more).out

    files = [out(), out(moved), out(state, pixel), out(state, x, label)]
    for more in ("--arch wrn-16-1", "--epsilon 4/255", "--seed 1"):
        files.append(out(state, x, y, *more.split()))
    for mean, std in ((0.5, 0.5), (0.3, 0.5), (0.5, 0.3)):
        files.append(out(state, x, y, "--mean", *[mean] * 3, "--std", *[std] * 3))
    assert len({*files}) == len(files)
    assert files[0] == out() == out(state, x, y, "--batch-size", 2, "--attacks", "CW")


BROKEN = {"Clean": [0, 1], "APGD-CE": [2, 3], "APGD-T": [2, 4], "FAB-T": [5], "SQUARE": [6, 7, 4]}


@pytest.fixture
def scripted(evaluation, monkeypatch):
    """scripted(): an Evaluation of 12 of 20 images, of which each attack of AutoAttack breaks
    those in BROKEN. calls: [attack, places of its images, epsilon, their generators' seeds]."""
    calls = []
    index = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:12].sort().values
    x = torch.full((20, 3, 8, 8), 100, dtype=torch.uint8)
    x[:, 0, 0, 1] = torch.arange(20)
    x[index[BROKEN["Clean"]], 0, 0, 0] = 120

    def model(x):
        return F.one_hot((x[:, 0, 0, 0] > 0.41).long(), 4).float()

    def attack(name, model, x, y, epsilon, generators, **_):
        if len(calls) == make.stop:
            raise KeyboardInterrupt
        places = torch.searchsorted(index, (255 * x[:, 0, 0, 1]).round().long())
        if len(x):
            calls.append((name, places.tolist(), epsilon, [g.initial_seed() for g in generators]))
        x_adv = x.clone()
        x_adv[:, 0, 0, 0] += torch.isin(places, torch.tensor(BROKEN[name])) * epsilon
        return x_adv

    for name in AA:
        monkeypatch.setitem(ATTACKS, name, partial(attack, name))

    def make(*argv):
        y = torch.zeros(20, dtype=torch.long)
        e = evaluation(x, y, "--n", 12, *argv, model=model)
        e.out = e.out.parent.parent / "results.json"
        return e

    make.calls, make.stop, make.index = calls, None, index
    return make


def test_each_part_of_autoattack_gets_what_those_before_it_left(scripted):
    """In the order of AA, in parts of the batch size, with --epsilon, and for each image the random
    numbers of its place in the data set. An image that is wrong before is not attacked."""
    assert AA == ["APGD-CE", "APGD-T", "FAB-T", "SQUARE"]
    e = scripted("--epsilon", "10/255", "--seed", 3)
    run(e, "Clean", "AA")
    left, expected = [*range(2, 12)], []
    for name in AA:
        for part in torch.tensor(left).split(4):
            own = evaluate.generators_of(3, name, scripted.index[part], "cpu")
            expected.append((name, part.tolist(), 10 / 255, [g.initial_seed() for g in own]))
        left = [i for i in left if i not in BROKEN[name]]
    assert scripted.calls == expected and left == [8, 9, 10, 11]
    assert e.robust("Clean", *AA).nonzero()[:, 0].tolist() == left
    assert e.accuracies() == {"Clean": 1000 / 12, "AA": 400 / 12}
    known = [p >= 0 for p in predicted(e.out)["SQUARE"]]
    assert known == [i > 5 for i in range(12)]

    scripted.calls.clear()  # what AA has done of SQUARE is not done again
    run(e, "SQUARE")
    assert [call[:2] for call in scripted.calls] == [("SQUARE", [2, 3, 4, 5])]
    assert e.accuracies()["SQUARE"] == 700 / 12


def test_an_interrupted_autoattack_continues(scripted):
    """Wherever it stops, the next evaluation does the rest and nothing twice. Only a complete
    AutoAttack has an accuracy."""
    whole = scripted()
    run(whole, "Clean", "AA")
    expected, calls = predicted(whole.out), [*scripted.calls]
    assert len(calls) == 9
    for stop in range(len(calls)):
        scripted.calls.clear()
        whole.out.unlink()
        first = scripted()
        run(first, "Clean")
        scripted.stop = stop
        with pytest.raises(KeyboardInterrupt):
            run(first, "AA")
        scripted.stop = None
        second = scripted()
        second.save()
        assert second.accuracies().keys() == {"Clean"}
        run(second, "Clean", "AA")
        assert scripted.calls == calls and predicted(second.out) == expected
        assert second.accuracies() == whole.accuracies()


def test_two_evaluations_write_one_file(scripted):
    """Each keeps what the other has written meanwhile, and does not do it again."""
    one, two = scripted(), scripted()
    run(one, "Clean")
    run(two, "Clean")
    run(one, "FGSM")
    run(two, "PGD-20")
    run(one, "CW")
    two.save()
    assert one.accuracies().keys() == {"Clean", "FGSM", "PGD-20", "CW"}
    assert two.accuracies() == one.accuracies()
    found = predicted(one.out)
    assert all(two.prediction[name].tolist() == found[name] for name in ATTACKS)
    run(two, "AA")
    one.save()
    scripted.calls.clear()
    run(one, "AA")
    assert scripted.calls == []
    one.prediction["SPSA"][:2], two.prediction["SPSA"][1:3] = 0, 1  # parts of one attack
    one.save()
    two.save()
    assert predicted(one.out)["SPSA"][:4] == [0, 1, 1, -1]


def test_what_is_complete_and_what_is_to_do(evaluation):
    """AutoAttack has an accuracy when no image is left that one of its parts has not tried."""
    e = evaluation(*blank(6))
    assert e.to_do("Clean").all() and e.accuracies() == {}
    score(e, FGSM=3)
    assert e.accuracies() == {}  # without Clean nothing is known
    score(e, Clean=4)
    assert e.accuracies() == {"Clean": 400 / 6, "FGSM": 300 / 6}
    assert e.to_do("CW").tolist() == [True] * 4 + [False] * 2
    score(e, APGD_CE=2, APGD_T=3)
    assert e.to_do("FAB-T", AA[:2]).tolist() == [True] * 2 + [False] * 4
    score(e, FAB_T=[1], SQUARE=[1, 5])
    e.prediction["SQUARE"][0] = -1  # FAB-T has broken it
    accuracy = e.accuracies()
    assert accuracy["AA"] == 100 / 6 and "SQUARE" not in accuracy
    for part in AA:
        before = e.prediction[part]
        e.prediction[part] = before.clone()
        e.prediction[part][1] = -1
        assert "AA" not in e.accuracies(), part
        e.prediction[part] = before
    wrong = score(evaluation(*blank(6)), Clean=0)
    assert wrong.accuracies() == dict.fromkeys(evaluate.COLUMNS, 0.0)


# ------------------------------------------------------------------------ the table
def test_a_cell_is_the_accuracy_with_wilsons_interval(evaluation):
    """The interval ends at the p from which k of n is 1.96 standard deviations away."""
    for k, n in ((0, 10), (10, 10), (1, 7), (36, 40), (50, 100), (1970, 2000)):
        e = score(evaluation(*blank(n)), Clean=n, CW=k)
        ends = np.roots([n + 1.96**2, -(2 * k + 1.96**2), k**2 / n]).real * 100
        found = numbers(e.cell("CW"))
        assert np.allclose(found, [100 * k / n, *sorted(ends)], rtol=0, atol=0.051), (k, n)


def means_of(evaluations, *columns):
    """[[mean, half of the interval] of the columns] of the rows that are means over seeds."""
    rows = rows_of(evaluate.table(evaluations, ["Clean", *columns]))
    return [[numbers(cell) for cell in row[1:]] for row in rows if "±" in row[1]]


@pytest.mark.parametrize("n", range(2, 11))
def test_students_t(n):
    """2.5 % of Student's distribution with n - 1 degrees of freedom, integrated numerically, lie
    above the constant."""
    angle = np.linspace(0, np.pi / 2, 1_000_001)  # t = sqrt(n - 1) tan(angle)
    density = np.cos(angle) ** (n - 2)
    t = evaluate.STUDENT_T[n - 2]
    above = density[angle > np.arctan(t / np.sqrt(n - 1))].sum() / density.sum() / 2
    assert above == pytest.approx(0.025, abs=2e-5) and len(evaluate.STUDENT_T) == 9


@pytest.mark.parametrize("n, t", [(1, None), (2, 12.706), (3, 4.303), (10, 2.262), (12, 2.262)])
def test_a_mean_over_seeds(n, t, evaluation):
    """It has half of Student's 95 % interval. Each run has a row, one run alone has no mean."""
    right = [80, 83, 81, 88, 90, 71, 75, 60, 92, 85, 44, 52][:n]
    e = [score(evaluation(*blank(100), seed=i), Clean=k, CW=40) for i, k in enumerate(right)]
    rows = rows_of(evaluate.table(e, ["Clean", "CW"]))
    assert [numbers(row[1])[0] for row in rows[:n]] == right and len(rows) == n + (n > 1)
    if n > 1:
        half = t * np.std(right, ddof=1) / np.sqrt(n)
        ((clean, cw),) = means_of(e, "CW")
        assert np.allclose(clean, [np.mean(right), half], rtol=0, atol=0.0051) and cw == [40, 0]


def test_a_mean_is_of_runs_that_differ_in_the_seed_alone(evaluation):
    """One seed counts once, the first of its runs. Neither another name, network, data set,
    training data, number of processes, test images, nor an unfinished run or a last epoch joins."""
    x, y = blank(20)
    first, second, once_more = (
        score(evaluation(x, y, seed=seed), Clean=k) for seed, k in ((0, 10), (1, 12), (1, 20))
    )
    two = means_of([first, second])
    assert two[0][0][0] == 55 and len(two) == 1
    assert means_of([first, second, once_more]) == two and means_of([second, once_more]) == []
    assert means_of([first, once_more, second])[0][0][0] == 75
    others = [{"name": "lma_at beta=1"}, {"arch": "wrn-16-1"}, {"dataset": "shapes"}]
    others += [{"data": "8 images of 8x8, checksum 9"}, {"processes": 2}]
    others += [{"done": False}, {"best": True}]
    third = score(evaluation(x, y, seed=2), Clean=20)
    assert means_of([first, third, second])[0][0][0] == 70
    for other in others:
        e = score(evaluation(x, y, seed=2, file="last.pt", **other), Clean=20)
        assert means_of([first, e, second]) == two, other
    e = score(evaluation(x, y.flip(0), seed=2), Clean=20)
    assert means_of([first, e, second]) == two
    pair = [score(evaluation(x, y, seed=s, processes=2), Clean=20) for s in (0, 1)]
    assert means_of([first, pair[0], second, pair[1]]) == [*two, [[100, 0]]]


# ------------------------------------------------------------------------ the paper's rows
# Sums of the columns in hundredths of a percent, the numbers of the first row (in the order of the
# alphabet) counted once, of the second twice, and so on: from the digits printed in the paper.
SUMS = {
    ("cifar10", "resnet18"): "13 750344 361820 511576 498391 473063 443815 348695 534480",
    ("cifar10", "wrn-34-10"): "7 238140 174670 164996 160942 154613 146106 165790 173895",
    ("cifar100", "resnet18"): "11 369615 146006 210632 205621 183471 169845 137804 216774",
    ("tinyimagenet", "resnet18"): "5 73020 0 37193 0 31279 27209 0 0",
}


def test_the_papers_numbers():
    """Every number of the tables, and no row beside them."""
    for source, line in SUMS.items():
        rows = [row for key, row in sorted(evaluate.ROWS.items()) if key[:2] == source]
        sums = [
            sum(k * round(100 * row[column]) for k, row in enumerate(rows, 1) if column in row)
            for column in evaluate.COLUMNS
        ]
        assert [len(rows), *sums] == [*map(int, line.split())], source
    assert {key[:2] for key in evaluate.ROWS} == SUMS.keys()


@pytest.fixture
def paper_of(evaluation, monkeypatch):
    """paper_of(script, options, *argv of evaluate.py): the row of the paper for what they train."""
    plain = common.make_model
    monkeypatch.setattr(common, "make_model", lambda arch, classes: plain("wrn-10-1", classes))

    def paper_of(script, options, *argv, **means):
        args = vars(command(script.parse_args, *options.split()))
        e = evaluation(*blank(4), *argv, **args)
        return evaluate.paper_rows(e, means or {"Clean": 0.0})

    return paper_of


BASELINE = "--attack-loss ce --margin-weight 0 --beta 0"
OF_KL = BASELINE.replace("ce", "kl")
COMMANDS = (  # README, The paper's rows; Clean of Tables 4, 2, 10, then 5, 6 and 7
    (train_at_ours, BASELINE, 85.80),
    (train_trades_ours, OF_KL, 82.46),
    (train_mart_ours, BASELINE, 81.30),
    (train_at_ours, "", 82.82),
    (train_trades_ours, "", 83.93),
    (train_mart_ours, "", 83.33),
    (train_lma_at, "", 83.56),
    (train_lma_at, "--tau 0", 79.33),
    (train_lma_at, "--tau 0.1", 84.11),
    (train_lma_at, "--tau 0.7", 81.72),
    (train_lma_at, "--tau 0.9", 80.33),
    (train_at_ours, "--attack-loss ce", 83.88),
    (train_lma_at, "--margin-weight 0", 82.60),
    (train_at_ours, f"--arch wrn-34-10 {BASELINE}", 86.46),
    (train_lma_at, "--arch wrn-34-10", 85.39),
    (train_mart_ours, f"--dataset cifar100 {BASELINE}", 54.02),
    (train_lma_at, "--dataset cifar100", 58.86),
    (train_lma_at, "--dataset cifar100 --tau 0.7", 53.98),
    (train_trades_ours, f"--dataset tinyimagenet {OF_KL}", 49.56),
    (train_lma_at, "--dataset tinyimagenet", 49.10),
)


@pytest.mark.parametrize("script, line, clean", COMMANDS)
def test_commands_find_the_papers_row(script, line, clean, paper_of):
    """Options that are typed but are the defaults change nothing, nor do --amp, --val-size, and
    what leaves the result alone."""
    for more in ("", "--amp --val-size 0 --seed 3", "--val-size 5 --lr 0.01 --delta 0.9 --compile"):
        ((_, cell),) = paper_of(script, f"{line} {more}")
        assert numbers(cell) == [clean, -clean]


def test_other_runs_have_no_row_of_the_paper(paper_of):
    for script, line, *argv in (
        (train_lma_at, "--beta 96"),
        (train_lma_at, "--dataset cifar100 --beta 86"),
        (train_lma_at, "--tau 0.9 --ema image"),
        (train_lma_at, "--epochs 1 --amp"),
        (train_lma_at, "--arch wrn-28-10"),
        (train_lma_at, "--dataset shapes"),
        (train_trades_ours, "--attack-loss kl --margin-weight 0"),
        (train_mart_ours, f"{BASELINE} --lam 6"),
        (train_lma_at, "", "--epsilon", "7/255"),
    ):
        assert paper_of(script, line, *argv) == [], line
    assert paper_of(train_lma_at, "", "--epsilon", 8 / 255)


def test_the_row_compares_the_paper_with_the_means(evaluation, paper_of):
    """Below its group, with a dash where the paper has no number; not for a last epoch or an
    unfinished run."""
    ((_, *cells),) = paper_of(train_lma_at, "--tau 0", Clean=80.0, FGSM=60.0, CW=50.0)
    assert [numbers(cell) for cell in cells] == [[79.33, 0.67], [], [51.97, -1.97]]
    args = vars(command(train_lma_at.parse_args))
    e = [score(evaluation(*blank(100), **args | {"seed": k}), Clean=k) for k in (80, 90)]
    rows = rows_of(evaluate.table(e, ["Clean"]))
    assert len(rows) == 4 and numbers(rows[3][1]) == [83.56, 1.44]
    for other in ({"done": False}, {"best": True}):
        e = score(evaluation(*blank(100), file="last.pt", **args, **other), Clean=80)
        assert len(rows_of(evaluate.table([e], ["Clean"]))) == 1


# ------------------------------------------------------------------------ masked gradients
FOUR = {"APGD_CE": 450, "APGD_T": 450, "FAB_T": 450, "SQUARE": 450}
FEWER = range(9, 450)
ALL = {"FGSM": 700, "PGD_20": 500, "PGD_100": 502, "CW": 500}
PAIRS = ["PGD-100 PGD-20", "PGD-20 FGSM", "PGD-100 FGSM", "CW FGSM"]


@pytest.mark.parametrize(
    "right, passed, suspect",
    [
        ({"PGD_20": 500, "SQUARE": 498}, ["PGD-20 SQUARE"], []),
        ({"PGD_20": 500, "SQUARE": 497}, [], ["PGD-20 SQUARE"]),
        ({"CW": 500, "SPSA": 497, "SQUARE": 999}, [], ["CW SPSA"]),
        ({"PGD_20": 500, "CW": 900, "SPSA": 498}, ["PGD-20 SPSA"], []),
        ({"PGD_20": 900, "CW": 500, "SPSA": 498}, ["CW SPSA"], []),
        ({"PGD_20": 498, "PGD_100": 500}, PAIRS[:1], []),
        ({"PGD_20": 497, "PGD_100": 500}, [], PAIRS[:1]),
        (ALL, PAIRS, []),
        (ALL | {"FGSM": 499}, [*PAIRS[:2], PAIRS[3]], PAIRS[2:3]),
        ({"FGSM": 497, "CW": 500}, [], PAIRS[3:]),
        ({"FGSM": 497, "PGD_20": 500}, [], PAIRS[1:2]),
        (FOUR | {"PGD_20": 500, "SQUARE": 999}, ["APGD and FAB AA"], []),
        (FOUR | {"SQUARE": 448}, ["APGD and FAB SQUARE"], []),
        (FOUR | {"SQUARE": 447}, [], ["APGD and FAB SQUARE"]),
        (FOUR | {"APGD_CE": FEWER, "SQUARE": 999}, ["APGD and FAB AA"], []),
        (FOUR | {"APGD_T": FEWER, "SQUARE": 999}, ["APGD and FAB AA"], []),
        (FOUR | {"FAB_T": FEWER, "SQUARE": 999}, ["APGD and FAB AA"], []),
        ({"SQUARE": 1, "SPSA": 2}, [], []),
    ],
)
def test_columns_that_disagree(right, passed, suspect, evaluation):
    """Of 1,000 images PGD-100 may leave two more than PGD-20, PGD and CW than FGSM, and the
    strongest white-box attack, among them APGD and FAB together, than the strongest black-box one
    or all of AutoAttack. The text tells both accuracies."""
    e = score(evaluation(*blank(1000)), Clean=1000, **right)
    checks = evaluate.column_checks(e)
    expected = dict.fromkeys(passed, True) | dict.fromkeys(suspect, False)
    assert {" ".join(pair): check for pair, (check, _) in checks.items()} == expected
    for pair, (_, text) in checks.items():
        names = [name for name in pair if name in e.accuracies()]
        assert {e.accuracies()[name] for name in names} <= {*numbers(text)}


def test_columns_on_few_images(evaluation):
    """Among few images one may differ, and not two."""
    for square, passed in ((14, True), (13, False)):
        e = score(evaluation(*blank(20)), Clean=20, PGD_20=15, SQUARE=square)
        assert evaluate.column_checks(e)["PGD-20", "SQUARE"][0] == passed


class Linear(nn.Module):
    """A linear network that does not see the first pixel of images, by which tests mark some.

    before(x) maps its images, after(logits, x) its logits.
    """

    def __init__(self, before=lambda x: x, after=lambda z, x: z):
        super().__init__()
        self.weight = torch.randn(4, 192, generator=torch.Generator().manual_seed(0))
        self.weight[:, 0] = 0
        self.before, self.after = before, after

    def forward(self, x):
        return self.after((self.before(x) - 0.5).flatten(1) @ self.weight.T, x)


@pytest.fixture(scope="module")
def pixels():
    """100 images of random pixels that are far from the boundaries of the linear network."""
    x = torch.randint(256, (2000, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    two = Linear()(x / 255).topk(2).values
    x = x[(two[:, 0] - two[:, 1] > 1.5).nonzero()[:100, 0]].byte()
    x[:, 0, 0, 0] = 0
    return x


@pytest.fixture
def failed(evaluation):
    """failed(model, x): the checks of a network that it does not pass on images it has right."""

    def failed(model, x, *argv):
        e = evaluation(x, model(common.to_float(x)).argmax(1), *argv, model=model)
        e.prediction["Clean"] = e.label
        checks = evaluate.network_checks(e)
        assert checks.keys() == {"far", "noise", "gradient", "alone", "logits"}
        return {name for name, (passed, _) in checks.items() if not passed}

    return failed


def together(x):
    return float(len(x) > 1)


def seen(x):  # no gradient flows through a mark
    return (x.amax((1, 2, 3), keepdim=True) > 0).float()


NETWORKS = {
    "is sound": ({}, set()),
    "rounds its images": ({"before": lambda x: (x * 16).round() / 16}, {"far", "gradient"}),
    "saturates": ({"after": lambda z, x: 1e5 * z}, {"far", "gradient"}),
    "is constant on a black image": ({"after": lambda z, x: z * seen(x)[:, 0, 0]}, {"gradient"}),
    "depends on the batch": ({"after": lambda z, x: z * (1 + 2e-4 * together(x))}, {"alone"}),
    "differs by rounding": ({"after": lambda z, x: z * (1 + 5e-5 * together(x))}, set()),
    "chooses at random": ({"after": lambda z, x: z + 0.1 * torch.rand_like(z)}, {"alone"}),
    "has probabilities by softmax": ({"after": lambda z, x: z.softmax(1)}, {"logits"}),
    "has probabilities by sigmoid": ({"after": lambda z, x: z.sigmoid()}, {"logits"}),
    "has positive logits": ({"after": lambda z, x: z + 50}, set()),
    "has small logits": ({"after": lambda z, x: z.softmax(1) - 0.5}, set()),
}


@pytest.mark.parametrize("what", NETWORKS)
def test_checks_of_a_network_that(what, failed, pixels):
    """Each broken network fails the checks that are about it and passes the others."""
    torch.manual_seed(0)
    x, (broken, expected) = pixels.clone(), NETWORKS[what]
    if "black" in what:
        x[7] = 0
    assert failed(Linear(**broken), x) == expected


def immovable(z, x):
    """Marked images are of the first class, whatever the other pixels are."""
    first = torch.tensor([5.0, 0, 0, 0])
    return torch.where(x[:, 0, 0, :1] > 0.5, first + z / 100, z)


def off_grid(z, x):
    """Marked images are right where all pixels are multiples of 1/255."""
    away = (255 * x - (255 * x).round()).abs().amax((1, 2, 3)) > 1e-3
    return z * (1 - 2 * (away & (x[:, 0, 0, 0] > 0.5)).float()[:, None])


@pytest.mark.parametrize("check, after, allowed", [("far", immovable, 5), ("noise", off_grid, 10)])
def test_limits_in_percent(check, after, allowed, failed, pixels):
    """Of 100 images 5 may stand where no epsilon binds PGD, and 10 may fall in noise."""
    x = pixels.clone()
    for marked, expected in ((allowed, set()), (allowed + 1, {check})):
        x[:marked, 0, 0, 0] = 255
        assert failed(Linear(after=after), x) == expected


@pytest.mark.parametrize("epsilon", [4, 8])
def test_the_noise_fills_the_box_of_epsilon(epsilon, failed):
    """Who errs just beyond epsilon passes, and who errs just within it fails."""
    for part, fails in ((1.001, False), (0.9, True)):

        def model(x):
            near = (255 * x - 100).abs().amax((1, 2, 3)) <= part * epsilon
            return torch.stack([near, ~near, ~near, ~near], 1).float()

        assert ("noise" in failed(model, blank(20)[0], "--epsilon", f"{epsilon}/255")) == fails


@pytest.mark.parametrize("right", [[3], range(1, 200), range(1, 201), range(1, 401), range(1000)])
def test_the_checked_images_are_right_and_of_all_classes(right, evaluation, monkeypatch):
    """At most 200, from the first to the last: a folder lies class by class."""
    e = score(evaluation(*blank(1000), model=Linear()), Clean=right)
    asked, batch = [], e.batch
    monkeypatch.setattr(e, "batch", lambda rows: asked.append(rows.tolist()) or batch(rows))
    assert len(evaluate.network_checks(e)) == 5
    (rows,) = asked
    assert {*rows} <= {*right} and min(len(right), 100) <= len(rows) <= 200
    assert rows[0] == right[0] and rows[-1] > right[-1] - len(right) / len(rows)


def test_a_network_that_is_always_wrong_is_suspect(evaluation):
    e = score(evaluation(*blank(8)), Clean=0)
    assert not any(passed for passed, _ in evaluate.network_checks(e).values())


# ------------------------------------------------------------------------ Figure 1
@pytest.mark.parametrize("classes", [12, 3])
def test_figure1_counts_the_ranks_of_the_wrong_classes(classes, evaluation):
    """Of none, one, and all images misclassified, some of them before the attack; ranks beyond the
    tenth count among all. The natural network looks at the clean image."""
    x, y = torch.zeros(30, 3, 8, 8, dtype=torch.uint8), torch.arange(30) % classes
    x[:, 0, 0, 0] = torch.arange(30)

    def natural(x):  # class i is the first on image i, then come i + 1, i + 2, ...
        first = (255 * x[:, 0, 0, :1]).round().long()
        return -((torch.arange(classes) - first) % classes).float()

    e = evaluation(x, y, classes=[f"class {i}" for i in range(classes)])
    other = (y + 1 + torch.arange(30) // 3 % (classes - 1)) % classes
    no, one, two = (torch.isin(torch.arange(30), torch.tensor(i)) for i in ([], [4], [4, 7]))
    some = torch.arange(30) % 4 > 0
    for before, pgd, cw in ((no, no, one), (one, one, two), (two, some | two, ~no), (~no,) * 3):
        e.prediction["Clean"] = torch.where(before, other, y)
        unknown = torch.full_like(y, -1)  # what is wrong before is not attacked
        for name, wrong in (("PGD-20", pgd), ("CW", cw)):
            e.prediction[name] = torch.where(before, unknown, torch.where(wrong, other, y))
        rows = rows_of(evaluate.figure1(natural, e))
        assert [row[0] for row in rows] == ["PGD-20", "CW"]
        for row, wrong in zip(rows, (pgd, cw)):
            ranks = []
            for i in wrong.nonzero()[:, 0].tolist():
                order = [(i + k) % classes for k in range(classes)]
                order.remove(y[i])
                ranks.append(order.index(other[i]) + 2)
            counts = [ranks.count(rank) for rank in range(2, min(10, classes) + 1)]
            assert [*map(int, row[1:])] == [*counts, len(ranks)]


# ------------------------------------------------------------------------ the command
@pytest.fixture
def short(monkeypatch):
    """The parts of AutoAttack with fewer steps. attacked: {name: number of images, in all}."""
    fewer = {
        "APGD-CE": partial(evaluate.apgd, steps=5),
        "SQUARE": partial(evaluate.square, queries=9),
    }
    dlr = partial(evaluate.apgd, loss=evaluate.dlr_targeted, steps=3)
    fewer["APGD-T"] = partial(evaluate.each_target, dlr)
    fewer["FAB-T"] = partial(evaluate.each_target, partial(evaluate.fab, steps=3))
    attacked = dict.fromkeys(ATTACKS, 0)

    def counted(name, attack, model, x, *others):
        attacked[name] += len(x)
        return attack(model, x, *others)

    for name, attack in (ATTACKS | fewer).items():
        monkeypatch.setitem(ATTACKS, name, partial(counted, name, attack))
    return attacked


def sections(text, *paths):
    """[[did it pass?] of the checks of a checkpoint] for each of them."""
    below = text.split("\n\n")
    found = [[part for part in below if part.startswith(f"{path}\n")] for path in paths]
    return [[line.startswith("pass") for line in part.splitlines()[1:]] for (part,) in found]


def test_the_command_on_a_run(finished, saved, capsys, short):
    """The table and the file tell the same, and of the right network. Called again with another
    attack it continues."""
    start(finished, "--n", 24, "--epsilon", "4/255", "--attacks", "AA", "FGSM", "PGD-20")
    text = capsys.readouterr().out
    assert not torch.backends.cudnn.allow_tf32
    (out,) = finished.glob("*.eval.json")
    found, e = predicted(out), subject(finished, "--n", 24, "--epsilon", "4/255")
    assert out == e.out and out.name.startswith("best.") and found.keys() == ATTACKS.keys()
    model = common.make_model("wrn-10-1", 4).eval()
    model.load_state_dict(saved["model"])
    assert found["Clean"] == model(e.images / 255).argmax(1).tolist()

    robust = {name: np.array(found[name]) == e.label.numpy() for name in ATTACKS}
    robust["AA"] = np.all([robust[name] for name in AA], 0)
    columns = ["Clean", "FGSM", "PGD-20", "AA"]
    header = next(line for line in text.splitlines() if line.startswith("| "))
    assert header.strip("| ").split(" | ")[1:] == columns
    ((first, *cells),) = rows_of(text)
    assert e.name in first and str(finished / "best.pt") in first
    for column, cell in zip(columns, cells):
        assert numbers(cell)[0] == pytest.approx(100 * robust[column].mean(), abs=0.0051)
    assert robust["Clean"].sum() > robust["AA"].sum()
    e.save()
    checks = [*evaluate.column_checks(e).values(), *evaluate.network_checks(e).values()]
    assert sections(text, finished / "best.pt") == [[passed for passed, _ in checks]]
    assert len(checks) == 7

    before = dict(short)
    start(finished, "--n", 24, "--epsilon", "4/255", "--attacks", "CW", "AA", "FGSM", "PGD-20")
    ((_, *again),) = rows_of(capsys.readouterr().out)
    assert again[:3] + again[4:] == cells
    assert predicted(out) == found | {"CW": predicted(out)["CW"]}
    more = {name: short[name] - before[name] for name in ATTACKS if name != "Clean"}
    assert more == dict.fromkeys(more, 0) | {"CW": robust["Clean"].sum()}


def test_the_command_on_foreign_weights_beside_a_run(finished, saved, data_dir, put, capsys):
    """A row for each, SUSPECT for the one that saturates, Figure 1 of the first by a third."""
    state, last = saved["model"], saved["model"]["fc.weight"]
    big = put(state | {"fc.weight": 1e7 * last}, "big.pt")
    natural = put(state | {"fc.weight": -last}, "natural.pt")
    argv = (*FOREIGN, "--data-dir", data_dir, "--n", 24, "--attacks", "FGSM", "--figure1", natural)
    start(finished, big, *argv)
    text = capsys.readouterr().out
    rows = rows_of(text.split("rank")[0].rpartition("\n")[0])
    assert [str(path) in row[0] for path, row in zip((finished, big), rows)] == [True, True]
    assert [len(row) for row in rows] == [5, 5]  # name, Clean, FGSM, PGD-20, CW
    e = subject(finished, *argv)
    e.save()
    assert evaluate.figure1(network(natural, *FOREIGN), e) in text
    sound, broken = sections(text, finished / "best.pt", big)
    names = [*evaluate.network_checks(e)]
    assert [dict(zip(names, part[-5:]))["gradient"] for part in (sound, broken)] == [True, False]
    assert len([*finished.glob("*.eval.json"), *big.parent.glob("big.*.eval.json")]) == 2


def test_an_interrupted_command_keeps_its_results(finished, refused, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setitem(ATTACKS, "PGD-20", stop)
    refused(start, finished, "--n", 9, "--attacks", "FGSM", "PGD-20", status=130)
    found = predicted(subject(finished, "--n", 9).out)
    assert min(found["Clean"]) >= 0 and max(found["FGSM"]) >= 0 and {*found["PGD-20"]} == {-1}


def test_a_network_of_nan_is_not_scored(saved, put):
    nan = saved["model"]["fc.bias"] * torch.nan
    path = put(saved | {"model": saved["model"] | {"fc.bias": nan}})
    with pytest.raises(FloatingPointError):
        start(path, "--n", 3, "--attacks", "FGSM")
