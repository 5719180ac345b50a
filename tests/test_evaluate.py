"""evaluate.py: attacks against known answers, independence of the batch, resume after a kill, masking, foreign weights."""
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import evaluate
import train_lma_at
from evaluate import AA, ATTACKS, Draws

EPSILON = 8 / 255
PROGRAM = Path(evaluate.__file__)


def attack(name, model, x, y, epsilon=EPSILON, seed=0, index=None, **options):
    """Adversarial images and which of them the model still classifies as y; the box is checked on the way."""
    index = torch.arange(len(x)) if index is None else index
    x_adv = partial(ATTACKS[name][0], **options)(model, x, y, epsilon, Draws(seed, name, index))
    return x_adv, evaluate.verdict(model, x, x_adv, epsilon) == y


class Flat(nn.Sequential):
    """A linear classifier of 3 x 8 x 8 images."""

    def __init__(self, classes):
        super().__init__(nn.Flatten(), nn.Linear(192, classes))
        torch.manual_seed(1)
        nn.init.normal_(self[1].weight, std=0.3)
        nn.init.zeros_(self[1].bias)
        self.requires_grad_(False)


def correct(model, x):
    """The images with the model's own predictions as labels: all classified correctly."""
    return x, model(x).argmax(1)


def exact_robust(model, x, y, epsilon):
    """A linear model errs as class t somewhere in the box iff it does at the corner that is best for t."""
    low, high = evaluate.box(x, epsilon)
    robust = torch.ones_like(y, dtype=torch.bool)
    for t in range(model[1].out_features):
        w = (model[1].weight[t] - model[1].weight[y]).view_as(x)
        logits = model(torch.where(w > 0, high, low))
        robust &= (logits[:, t] <= logits.gather(1, y[:, None])[:, 0]) | (y == t)
    return robust


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return torch.rand(100, 3, 8, 8)


@pytest.fixture(scope="module")
def patterns():
    """Ten coarse patterns of varying contrast in noise, 16 x 16 in [0, 1]: (x_train, y_train, x_test, y_test)."""
    torch.manual_seed(0)
    y, contrast = torch.arange(900) % 10, torch.rand(900, 1, 1, 1) * 0.12 + 0.02
    pattern = F.interpolate(torch.randn(10, 3, 4, 4).sign(), scale_factor=4)
    x = (0.5 + contrast * pattern[y] + 0.1 * torch.randn(900, 3, 16, 16)).clamp(0, 1)
    return x[:600], y[:600], x[600:], y[600:]


@pytest.fixture(scope="module")
def robust_net(patterns):
    """A small convolutional network after a few seconds of adversarial training."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 12, 5, 2, 2), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(), nn.Flatten(),
                        nn.Linear(24 * 16, 10))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(20):
        for batch in torch.randperm(600).split(100):
            x, y = patterns[0][batch], patterns[1][batch]
            x_adv = common.pgd(net, x, lambda logits: F.cross_entropy(logits, y), 4 / 255, 2 / 255, 3)
            optimizer.zero_grad()
            F.cross_entropy(net(x_adv), y).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def right(robust_net, patterns):
    """The first 30 test images that it classifies correctly."""
    x, y = patterns[2:]
    keep = (robust_net(x).argmax(1) == y).nonzero()[:30, 0]
    assert len(keep) == 30
    return x[keep], y[keep]


# ------------------------------------------------------------------------------------------------------- known answers

@pytest.mark.parametrize("name", ["FGSM", "PGD-20", "PGD-100", "CW", "APGD-CE", "APGD-T", "FAB-T"])
def test_two_class_linear_model(name, images):
    """On a linear model with two classes each gradient attack and FAB reach the exact robust accuracy, image by image.

    PGD's 20 steps of 1/255 cross the box of radius 2/255; FAB stops within half a percent of the boundary.
    """
    model = Flat(2)
    x, y = correct(model, images)
    exact = exact_robust(model, x, y, 2 / 255)
    assert 20 < exact.sum() < 80
    near = exact_robust(model, x, y, 1.99 / 255) != exact if name == "FAB-T" else torch.zeros_like(exact)
    assert near.sum() <= 2
    _, robust = attack(name, model, x, y, 2 / 255)
    assert torch.equal(robust[~near], exact[~near])


@pytest.mark.parametrize("name", ["CW", "APGD-T", "FAB-T"])
def test_ten_class_linear_model(name, images):
    """With ten classes the attacks that aim at a class or at the margin reach the exact robust accuracy."""
    model = Flat(10)
    x, y = correct(model, images)
    exact, nearly = (exact_robust(model, x, y, e / 255) for e in (4, 3.96))
    assert 20 < exact.sum() < 80 and (exact != nearly).sum() <= 3
    _, robust = attack(name, model, x, y, 4 / 255)
    sure = exact == nearly if name == "FAB-T" else torch.ones_like(exact)
    assert torch.equal(robust[sure], exact[sure])


def test_black_box_attacks_on_a_linear_model(images):
    """Square and SPSA break no image that is certifiably robust and most of those that are not by a wide margin."""
    model = Flat(2)
    x, y = correct(model, images)
    exact, easy = exact_robust(model, x, y, 2 / 255), ~exact_robust(model, x, y, 0.7 / 255)
    for name, options in (("SQUARE", {"queries": 1500}), ("SPSA", {})):
        _, robust = attack(name, model, x, y, 2 / 255, **options)
        assert robust[exact].all() and robust[easy].float().mean() < 0.1, name


def test_projection_on_a_hyperplane():
    """to_hyperplane is the smallest L-infinity move inside [0, 1] (bisection agrees), or the farthest if none arrives."""
    torch.manual_seed(0)
    x, w = torch.rand(50, 3, 4, 4), torch.randn(50, 3, 4, 4)
    gap = torch.linspace(-25, 25, 50).view(-1, 1, 1, 1)
    d = evaluate.to_hyperplane(x, w, gap)
    assert (x + d).min() >= 0 and (x + d).max() <= 1
    moved, reachable = (w * d).sum((1, 2, 3)), 0
    for i in range(50):
        sign = w[i].sign() * gap[i].sign()
        room = torch.where(sign > 0, 1 - x[i], x[i])
        if (w[i].abs() * room).sum() < gap[i].abs():
            assert torch.allclose(d[i], sign * room)
            continue
        low, high, reachable = 0.0, 1.0, reachable + 1
        for _ in range(60):
            t = (low + high) / 2
            low, high = (t, high) if (w[i].abs() * room.clamp(max=t)).sum() < gap[i].abs() else (low, t)
        assert abs(d[i].abs().max().item() - high) < 1e-5 and abs(moved[i] - gap[i]) < 1e-4
    assert 10 < reachable < 50


def test_projection_ends_where_the_hyperplane_is_barely_in_reach():
    """Rounding must not make Newton's steps go to and fro for ever: 64 gaps of 98.5 to 100 % of what all pixels can do."""
    def too_long(*_):
        raise TimeoutError
    torch.manual_seed(0)
    x, w = torch.rand(64, 3, 32, 32), torch.randn(64, 3, 32, 32)
    farthest = (w.abs() * torch.where(w > 0, 1 - x, x)).sum((1, 2, 3), keepdim=True)
    gap = farthest * (1 - 0.015 * torch.rand(64, 1, 1, 1))
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    d = evaluate.to_hyperplane(x, w, gap)
    signal.alarm(0)
    assert torch.allclose((w * d).sum((1, 2, 3), keepdim=True), gap, rtol=1e-5)


def test_apgd_checkpoints():
    """The step size is looked at after iterations 22, 41, 57, 70, 80, 87, 93 and 99 of 100."""
    ends = evaluate.apgd_checkpoints(100)
    assert list(ends) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(ends.values()) == [22, 19, 16, 13, 10, 7, 6, 6]


def test_square_sides():
    """On 32 x 32 images the squares shrink 29, 20, 14, 10, 7, 5, 4, 3 after 10, 50, 200, 500, 1000, 2000, 4000 queries."""
    starts = (0, 11, 51, 201, 501, 1001, 2001, 4001)
    assert [evaluate.square_side(k, 32, 32) for k in starts] == [29, 20, 14, 10, 7, 5, 4, 3]
    assert [evaluate.square_side(k - 1, 32, 32) for k in starts[1:]] == [29, 20, 14, 10, 7, 5, 4]


def test_losses_by_hand():
    """Targeted DLR, CW with confidence 50 and the margin, against numbers worked out by hand."""
    logits, y, t = torch.tensor([[4.0, 1, 3, 0, 2], [1, 5, 2, 4, 3]]), torch.tensor([0, 3]), torch.tensor([2, 1])
    # sorted 4 3 2 1 0: -(4 - 3) / (4 - (2 + 1) / 2) = -0.4;  5 4 3 2 1: -(4 - 5) / (5 - (3 + 2) / 2) = 0.4
    assert torch.allclose(evaluate.dlr_targeted(logits, y, t), torch.tensor([-0.4, 0.4]))
    assert torch.allclose(evaluate.dlr_targeted(7 * logits, y, t), torch.tensor([-0.4, 0.4]))
    assert evaluate.lead(logits, y).tolist() == [1, -1]
    assert evaluate.cw_loss(torch.tensor([[3.0, 1], [-70, 0]]), torch.tensor([0, 0])).tolist() == [-52, 0]
    three = torch.tensor([[2.0, 1, 0]])  # no fourth logit: z_t - z_y instead
    assert evaluate.dlr_targeted(three, torch.tensor([0]), torch.tensor([2])).item() == -2


def test_targets_by_hand():
    """Targets are the wrong classes in the order of the clean logits, nine of them or all there are."""
    seen = []

    def harmless(model, x, y, epsilon, draws, target, r):
        seen.append(target.tolist())
        return x

    for classes in (12, 3):
        model = Flat(classes)
        model[1].weight.zero_()
        model[1].bias.copy_(torch.arange(classes) * torch.tensor([-1.0]))  # logits 0, -1, -2, ...
        seen.clear()
        evaluate.each_target(harmless, model, torch.rand(1, 3, 8, 8), torch.tensor([0]), 0.1, Draws(0, "", torch.arange(1)))
        assert seen == [[t] for t in range(1, min(10, classes))]


def test_few_classes(images):
    """Two and three classes: APGD-T and FAB-T take the targets there are and reach the exact robust accuracy."""
    model = Flat(3)
    x, y = correct(model, images)
    exact = exact_robust(model, x, y, 1.5 / 255)
    assert 10 < exact.sum() < 90
    _, robust = attack("APGD-T", model, x, y, 1.5 / 255)
    assert torch.equal(robust, exact)


def test_draws():
    """Draws are uniform, independent over images, draws and attacks, and an image's do not depend on its neighbours."""
    draws = Draws(0, "PGD-20", torch.arange(400))
    u = draws.uniform(0, 50)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002
    others = draws.uniform(1, 50), Draws(1, "PGD-20", torch.arange(400)).uniform(0, 50), u.roll(1, 0), u.roll(1, 1), \
        Draws(0, "CW", torch.arange(400)).uniform(0, 50)
    for other in others:
        assert abs(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1]) < 0.03
    signs = draws.signs(3, 10, 7)
    assert set(signs.unique().tolist()) == {-1, 1} and signs.shape == (400, 10, 7)
    products = torch.stack([signs.mean(), (signs * signs.roll(1, 0)).mean(), (signs * signs.roll(1, 2)).mean()])
    assert products.abs().max() < 0.02 and (signs.mean(0)).abs().max() < 0.25
    rows = torch.tensor([7, 300])
    assert torch.equal(draws.select(rows).uniform(0, 50), u[rows])
    assert torch.equal(Draws(0, "PGD-20", rows).signs(3, 10, 7), signs[rows])


# --------------------------------------------------------------------------------------------- on a small trained model

@pytest.fixture(scope="module")
def stands(robust_net, right):
    """{attack: [30] bool} at 8/255, Square with 500 queries."""
    short = {"SQUARE": {"queries": 500}}
    return {name: attack(name, robust_net, *right, **short.get(name, {}))[1] for name in ATTACKS}


def test_order_of_strength(stands):
    """More work finds more on a fixed robust model: FGSM, PGD-20, PGD-100, APGD-T leave ever fewer, queries no fewer."""
    left = {name: int(s.sum()) for name, s in stands.items()}
    assert left["Clean"] == 30 and 4 < left["APGD-T"] < 26, left
    assert left["FGSM"] >= left["PGD-20"] >= left["PGD-100"] >= left["APGD-T"], left
    assert left["PGD-20"] >= left["APGD-CE"] >= left["APGD-T"] and left["FGSM"] >= left["FAB-T"], left
    assert all(30 > left[name] >= left["APGD-T"] for name in ("CW", "SPSA", "SQUARE")), left


def test_zero_epsilon(robust_net, right):
    """With epsilon 0 every attack returns the image it was given."""
    x, y = right[0][:2], right[1][:2]
    for name in ATTACKS:
        x_adv, robust = attack(name, robust_net, x, y, 0.0, **({"queries": 20} if name == "SQUARE" else {}))
        assert robust.all() and torch.allclose(x_adv, x, atol=1e-7), name


@pytest.mark.parametrize("name, options", [("PGD-20", {}), ("APGD-CE", {}), ("APGD-T", {}), ("FAB-T", {}), ("SPSA", {}),
                                           ("SQUARE", {"queries": 300})])
def test_independent_of_batch_and_order(name, options, robust_net, right):
    """What happens to an image does not depend on batch size, order or neighbours: alone, reversed, in odd batches."""
    x, y, n = right[0][:6], right[1][:6], 6
    together = attack(name, robust_net, x, y, **options)[0]
    rows = torch.arange(n).flip(0)
    for batch in (rows[:2], rows[2:3], rows[3:]):
        apart = attack(name, robust_net, x[batch], y[batch], index=batch, **options)[0]
        same = (apart - together[batch]).abs().amax((1, 2, 3)) < 1e-3
        assert same.float().mean() >= 0.8, name  # rounding may turn the sign of a vanishing gradient
    other_seed = attack(name, robust_net, x, y, seed=1, **options)[0]
    assert name == "FAB-T" or not torch.allclose(other_seed, together, atol=1e-3)


def test_no_pass_is_spent_on_fooled_images(robust_net, right, stands):
    """PGD-100 costs 100 passes for each image that survives and far fewer for the others."""
    before = evaluate.METER.backward
    _, robust = attack("PGD-100", robust_net, *right)
    spent = evaluate.METER.backward - before
    assert 100 * robust.sum() < spent < 100 * robust.sum() + 40 * (~robust).sum()


def test_worst_iterate_counts(robust_net, right):
    """An image is lost once any iterate is misclassified: a longer attack from the same start never loses fewer."""
    x, y = right
    short, long = (attack("PGD-20", robust_net, x, y, steps=steps)[1] for steps in (3, 20))
    assert (short | ~long).all() and short.sum() > long.sum()


# ------------------------------------------------------------------------------------------------------ gradient masking

class Staircase(nn.Module):
    """Hides the gradient of a network: its input is rounded to 64 levels."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x * 64).round() / 64)


class Loud(nn.Module):
    """Saturates the softmax: the cross-entropy of a correct image is exactly 0, and so is its gradient."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return 1e4 * self.net(x)


def doubts(net, patterns, columns, tmp_path, wrap=lambda net: net):
    """The sceptic's lines that say SUSPECT, for columns measured on 60 images."""
    class Args:
        epsilon, seed, batch_size = EPSILON, 0, 60
    net = wrap(net)
    images, label = (patterns[2][:60] * 255).byte(), patterns[3][:60]
    results = evaluate.Results(tmp_path / "r.json", {}, torch.arange(60), label)
    for name in ("Clean", *columns):
        before = ("Clean",) if name != "Clean" else ()
        evaluate.run_attack(name, before, name, net, net, images, results, Args, torch.device("cpu"))
    points = {c: 100 * results.robust(c).float().mean().item() for c in columns}
    lines = evaluate.sceptic(net, net, images, results, points, Args, torch.device("cpu"))
    assert len(lines) >= 5
    return [line for line in lines if line.startswith("SUSPECT")]


def test_masked_gradients_are_caught(robust_net, patterns, tmp_path, monkeypatch):
    """A model that looks robust to gradients (staircase, saturated softmax) is named; the honest one is not."""
    monkeypatch.setitem(ATTACKS, "SQUARE", (partial(evaluate.square, queries=500), 501))
    assert doubts(robust_net, patterns, ["PGD-20", "PGD-100", "SQUARE"], tmp_path / ".") == []
    (tmp_path / "r.json").unlink()
    stairs = doubts(robust_net, patterns, ["PGD-20", "CW", "SQUARE"], tmp_path, Staircase)
    assert any("black box" in line for line in stairs) and any("gradient" in line for line in stairs)
    assert any("64/255" in line for line in stairs)
    (tmp_path / "r.json").unlink()
    assert any("gradient" in line for line in doubts(robust_net, patterns, ["PGD-20"], tmp_path, Loud))
    (tmp_path / "r.json").unlink()
    soft = doubts(robust_net, patterns, ["PGD-20"], tmp_path, lambda net: nn.Sequential(net, nn.Softmax(1)))
    assert any("probabilities" in line for line in soft)


# ------------------------------------------------------------------------------------------------------------ the command

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """best.pt of a tiny WideResNet, briefly trained on shapes and written as the training scripts do."""
    torch.manual_seed(0)
    data = common.load_data("shapes", "data")
    model = common.make_model("wrn-10-1", 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for batch in torch.randperm(3000).split(100):
        optimizer.zero_grad()
        F.cross_entropy(model(common.to_float(data.x_train[batch])), data.y_train[batch]).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("run") / "best.pt"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_lma_at.py", "--dataset", "shapes", "--arch", "wrn-10-1"])
        args = vars(train_lma_at.parse_args())
        torch.save({"model": model.state_dict(), "num_classes": 10, "epoch": 1, "args": args}, path)
        patch.setattr(common, "load_data", lambda *a: data)  # drawn once for all the tests below
        yield path


def start(monkeypatch, capsys, *argv):
    """evaluate.main() in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    status = 0
    try:
        evaluate.main()
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def test_the_table(checkpoint, monkeypatch, capsys):
    """Columns in the paper's order with +-; AA is at most each of its parts; the file has the record of every image."""
    for name, steps in (("APGD-T", 5), ("FAB-T", 3)):  # shorter, only the book-keeping is looked at
        each, passes = ATTACKS[name]
        monkeypatch.setitem(ATTACKS, name, (partial(evaluate.each_target, partial(each.args[0], steps=steps)), passes))
    monkeypatch.setitem(ATTACKS, "SQUARE", (partial(evaluate.square, queries=30), 31))
    out = checkpoint.with_name("table.json")
    status, text, _ = start(monkeypatch, capsys, checkpoint, "--n", 12, "--out", out, "--epsilon", "1/255",
                            "--attacks", "SQUARE", "AA", "FGSM")
    assert status == 0 and "| Method | Clean | FGSM | AA | SQUARE |" in text and "LMA-AT(Ours)" in text
    assert "paper" not in text.split("| Method")[1]  # another epsilon and data set: no row to compare with
    found = json.loads(out.read_text())
    robust = {k: [p == y for p, y in zip(v, found["label"])] for k, v in found["prediction"].items()}
    aa = [all(robust[name][i] for name in AA) for i in range(12)]
    assert found["accuracy"]["AA"] == pytest.approx(100 * sum(aa) / 12)
    for name in (*AA, "Clean", "SQUARE"):
        assert all(a <= r or found["prediction"][name][i] == -1 for i, (a, r) in enumerate(zip(aa, robust[name])))
    assert found["accuracy"]["AA"] <= min(found["accuracy"].values())
    for by, a, clean in zip(found["AA_broken_by"], aa, robust["Clean"]):
        assert (by is None) == a and (by == "Clean") == (not clean)
    assert found["cost"]["FGSM"]["forward"] == 2 * sum(robust["Clean"]) and found["cost"]["FGSM"]["backward"] > 0


def test_several_seeds_and_the_papers_row(checkpoint, monkeypatch, capsys):
    """Two seeds give their mean and Student's interval; the paper's row and the difference stand below."""
    rows = [(("cifar10", "resnet18", "TRADES"), f"{k}.pt", {"Clean": (v, 1.0), "AA": (49.0, 1.0)})
            for k, v in enumerate((82.0, 84.0))]
    text = evaluate.table(rows, ["Clean", "AA"], evaluate.paper_rows())
    assert "| TRADES, mean of 2 | 83.00 ± 12.71 | 49.00 ± 0.00 |" in text  # t = 12.706, standard error 1
    assert "| paper, TRADES | 82.46 | 49.08 |" in text and "| difference | +0.54 | -0.08 |" in text
    rows = evaluate.paper_rows()
    assert rows["cifar10", "wrn-34-10", "LMA-AT(Ours)"]["SPSA"] == 64.19 and len(rows) == 43
    assert rows["cifar100", "resnet18", "LMA-AT, tau 0.7"] == {"Clean": 53.98, "PGD-20": 33.48, "PGD-100": 32.83,
                                                               "CW": 29.31, "SPSA": 32.78, "AA": 26.84}
    assert rows["tinyimagenet", "resnet18", "MART"] == {"Clean": 45.94, "PGD-20": 26.02, "CW": 21.87, "AA": 19.2}
    lma = torch.load(checkpoint, weights_only=True)["args"]
    assert evaluate.paper_method(lma) == "LMA-AT(Ours)"
    cifar100 = lma | {"dataset": "cifar100", "arch": "resnet18", "alpha": 5.345, "beta": 96}
    assert ("cifar100", "resnet18", evaluate.paper_method(cifar100 | {"tau": 0.9})) in rows
    for other in ({"epsilon": 0}, {"epsilon": 4 / 255}, {"beta": 1}, {"delta": 0.1}, {"alpha": 1}, {"margin_reduction": "sum"}):
        assert evaluate.paper_method(lma | other) is None
    plain = lma | {"method": "trades_ours", "attack_loss": "kl", "margin_weight": 0, "beta": 0, "inv_lambda": 6}
    assert evaluate.paper_method(plain) == "TRADES" and evaluate.paper_method(plain | {"inv_lambda": 1}) is None
    assert evaluate.paper_method(plain | {"attack_loss": "ce"}) is None


def test_only_seeds_of_one_setting_on_one_data_set_are_averaged(checkpoint, tmp_path, monkeypatch, capsys):
    """Each checkpoint is tested on its own data set; a mean is taken of those that differ in the seed alone."""
    saved, shapes = torch.load(checkpoint, weights_only=True), common.load_data("shapes", "data")
    light, dark = (shapes._replace(x_test=x) for x in (shapes.x_test, shapes.x_test // 4))
    monkeypatch.setattr(common, "load_data", lambda name, folder: dark if folder == "dark" else light)
    runs = {"seed0": {}, "seed1": {"seed": 1}, "beta1": {"beta": 1}, "dark": {"data_dir": "dark"}}
    for name, other in runs.items():
        (tmp_path / name).mkdir()
        torch.save(saved | {"args": saved["args"] | other}, tmp_path / name / "best.pt")
    torch.save(saved["model"], tmp_path / "foreign.pt")
    paths = [*(tmp_path / name / "best.pt" for name in runs), tmp_path / "foreign.pt"]
    _, text, _ = start(monkeypatch, capsys, *paths, "--attacks", "FGSM", "--n", 30, "--dataset", "shapes", "--arch", "wrn-10-1")
    assert text.count("mean of") == 1 and "| LMA-AT(Ours), mean of 2 |" in text and "| ? (" in text and "| lma_at (" in text
    found = [json.loads(Path(f"{path}.eval.json").read_text())["accuracy"]["Clean"] for path in paths]
    assert found[0] == found[1] == found[2] == found[4] != found[3]


def test_resume_after_kill(checkpoint, tmp_path, monkeypatch, capsys):
    """After kill -9 in the middle of an attack the same command goes on there and ends with the same predictions."""
    command = [checkpoint, "--n", 60, "--attacks", "PGD-20", "CW", "--batch-size", 4, "--epsilon", "1/255"]
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    assert start(monkeypatch, capsys, *command, "--out", whole)[0] == 0
    whole = json.loads(whole.read_text())

    def done():
        found = json.loads(cut.read_text())["prediction"].get("PGD-20", []) if cut.exists() else []
        return sum(p >= 0 for p in found)
    process = subprocess.Popen([sys.executable, PROGRAM, *map(str, command), "--out", str(cut)], stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while done() < 4 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done()
    clean = sum(p == y for p, y in zip(whole["prediction"]["Clean"], whole["label"]))
    assert 4 <= before < clean and "CW" not in json.loads(cut.read_text())["prediction"]
    assert start(monkeypatch, capsys, *command, "--out", cut)[0] == 0
    assert json.loads(cut.read_text())["prediction"] == whole["prediction"]
    cost = json.loads(cut.read_text())["cost"]["PGD-20"]
    assert cost["forward"] == whole["cost"]["PGD-20"]["forward"]  # nothing that was done was done again


def test_results_of_another_setting_are_set_aside(checkpoint, tmp_path, monkeypatch, capsys):
    """Another epsilon starts afresh, says so, and keeps the old file under another name."""
    out, command = tmp_path / "r.json", [checkpoint, "--n", 10, "--attacks", "FGSM", "--out", tmp_path / "r.json"]
    start(monkeypatch, capsys, *command)
    old = json.loads(out.read_text())
    status, text, _ = start(monkeypatch, capsys, *command, "--epsilon", "1/255")
    assert status == 0 and "was made with other epsilon" in text
    kept = [json.loads(p.read_text()) for p in tmp_path.glob("r.json.*")]
    assert kept == [old] and json.loads(out.read_text())["settings"]["epsilon"] == pytest.approx(1 / 255)


def test_figure1(checkpoint, tmp_path, monkeypatch, capsys):
    """For every image turned over, the rank of its wrong class among the natural model's wrong ones is counted and drawn."""
    status, text, _ = start(monkeypatch, capsys, checkpoint, "--n", 60, "--attacks", "PGD-20", "CW",
                            "--out", tmp_path / "r.json", "--figure1", checkpoint, tmp_path / "f.png")
    counts = {line.split("|")[1].strip(): list(map(int, line.split("|")[2:-1]))
              for line in text.splitlines() if line.startswith(("| PGD-20 |", "| CW |"))}
    found = json.loads((tmp_path / "r.json").read_text())
    natural, data = evaluate.load_checkpoint(checkpoint, None)[0], common.load_data("shapes", "data")
    logits = natural(common.to_float(data.x_test[found["index"]]))
    assert counts.keys() == {"PGD-20", "CW"}
    for name, row in counts.items():
        expected = [0] * 9
        for z, wrong, y in zip(logits, found["prediction"][name], found["label"]):
            if wrong not in (y, -1):
                expected[[c for c in z.argsort(descending=True).tolist() if c != y].index(wrong)] += 1
        assert row == expected and sum(row) > 0
    assert status == 0 and (tmp_path / "f.png").stat().st_size > 5000


# --------------------------------------------------------------------------------------------------- foreign checkpoints

def as_others_do(state, arch, style):
    """A state_dict as TRADES, MART and RobustBench save them."""
    if arch == "resnet18":
        state = {k.replace("downsample", "shortcut").replace("fc.", "linear."): v for k, v in state.items()}
    else:
        state = state | {k.replace("block1", "sub_block1"): v for k, v in state.items() if k.startswith("block1")}
    state = {("module." if "module" in style else "") + k: v for k, v in state.items()}
    return {style.split()[0]: state, "epoch": 7} if style.split()[0] != "bare" else state


@pytest.mark.parametrize("arch", ["wrn-10-1", "resnet18"])
@pytest.mark.parametrize("style", ["bare", "bare module", "state_dict module", "net", "model_state_dict"])
def test_foreign_names(arch, style, tmp_path):
    """Wrapped, prefixed and differently named weights give the network they came from."""
    torch.manual_seed(0)
    model = common.make_model(arch, 7).eval()
    torch.save(as_others_do(model.state_dict(), arch, style), tmp_path / "f.pt")
    loaded, classes, trained = evaluate.load_checkpoint(tmp_path / "f.pt", arch)
    x = torch.rand(2, 3, 16, 16)
    assert classes == 7 and trained == {} and torch.equal(loaded(x), model(x)) and not loaded.training


class Trap:
    """What a checkpoint can do to whoever unpickles it."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_nothing_else_is_unpickled(tmp_path, monkeypatch, capsys):
    """A pickled object is refused in one line, and not executed."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Trap()}, "t.pt")
    status, _, err = start(monkeypatch, capsys, "t.pt", "--dataset", "shapes", "--arch", "resnet18")
    assert status == 2 and err.count("\n") == 1 and "t.pt" in err and not Path("trapped").exists()


def test_bad_input(checkpoint, tmp_path, monkeypatch, capsys):
    """Every mistake ends in one line that names it and the remedy, with exit status 2 and no results file."""
    saved = torch.load(checkpoint, weights_only=True)
    state, bad = saved["model"], tmp_path / "bad.pt"

    def refused(content, *argv):
        if content is not None:
            torch.save(content, bad)
        status, _, err = start(monkeypatch, capsys, bad if content is not None else checkpoint, *argv)
        assert status == 2 and err.count("\n") == 1 and err.startswith("error: "), err
        return err

    foreign = ("--dataset", "shapes", "--arch", "wrn-10-1")
    renamed = {k.replace("conv1", "first"): v for k, v in state.items()}
    assert "missing: block1.layer.0.conv1.weight" in refused(renamed, *foreign)
    assert "of another shape" in refused(state, "--dataset", "shapes", "--arch", "wrn-10-2")
    assert "not finite" in refused(state | {"fc.bias": torch.full((10,), torch.nan)}, *foreign)
    assert "state_dict" in refused({"epoch": 3}, *foreign) and "--arch" in refused(state, "--dataset", "shapes")
    assert "--dataset" in refused(state, "--arch", "wrn-10-1") and "--arch nn" in refused(state, "--arch", "nn")
    small = state | {"fc.weight": state["fc.weight"][:5], "fc.bias": state["fc.bias"][:5]}
    assert "5 classes" in refused(small, *foreign)
    natural = tmp_path / "natural.pt"
    torch.save(saved | {"model": small}, natural)
    assert "natural.pt: has 5 classes" in refused(None, "--attacks", "PGD-20", "CW", "--figure1", natural, tmp_path / "f.png")
    assert "PGD20" in refused(None, "--attacks", "PGD20") and "SPSA" in refused(None, "--attacks", "PGD20")
    assert "1000 test images" in refused(None, "--n", "2000") and "8/255" in refused(None, "--epsilon", "8")
    assert "--figure1" in refused(None, "--attacks", "FGSM", "--figure1", checkpoint, "f.png")
    (tmp_path / "notes.json").write_text("[1, 2]")
    assert "notes.json" in refused(None, "--attacks", "FGSM", "--out", tmp_path / "notes.json")
    bad.write_bytes(b"no checkpoint")
    assert "bad.pt" in refused(None, bad) and "absent.pt" in refused(None, tmp_path / "absent.pt")
    assert not list(tmp_path.glob("*.eval.json")) and (tmp_path / "notes.json").read_text() == "[1, 2]"


def test_torchrun_gives_the_same(checkpoint, tmp_path, monkeypatch, capsys):
    """Two processes, each with half of the images, write the file that one process writes."""
    command = [checkpoint, "--n", 31, "--attacks", "PGD-20", "CW", "--epsilon", "1/255", "--batch-size", 8]
    assert start(monkeypatch, capsys, *command, "--out", tmp_path / "one.json")[0] == 0
    two = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone",
                          "--", PROGRAM, *map(str, command), "--out", str(tmp_path / "two.json")], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)
    assert two.returncode == 0, two.stderr
    one, two = (json.loads((tmp_path / f).read_text()) for f in ("one.json", "two.json"))
    assert one["prediction"] == two["prediction"] and one["accuracy"] == two["accuracy"]
    assert not list(tmp_path.glob("*.rank*"))
