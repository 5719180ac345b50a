"""evaluate.py: attacks on networks whose answer is known, independence of the batch, checkpoints of
other people, results that are continued after a kill, the table, the checks, Figure 1.

tests/test_attacks.py compares the attacks with other implementations.
"""

import argparse
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

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

EPSILON = 8 / 255
PROGRAM = Path(evaluate.__file__)
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def generators(n, seed=0, name="test"):
    return evaluate.generators_of(seed, name, torch.arange(n), "cpu")


def attack(name, model, x, y, epsilon=EPSILON, seed=0, index=None, **options):
    """Adversarial images and which of them the model still classifies as y; they are in the box."""
    index = torch.arange(len(x)) if index is None else index
    own = evaluate.generators_of(seed, name, index, "cpu")
    x_adv = ATTACKS[name](model, x, y, epsilon, own, **options)
    assert (x_adv - x).abs().max() <= epsilon + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    return x_adv, model(x_adv).argmax(1) == y


class Flat(nn.Sequential):
    """A linear classifier of 3 x 8 x 8 images."""

    def __init__(self, classes):
        super().__init__(nn.Flatten(), nn.Linear(192, classes))
        torch.manual_seed(1)
        nn.init.normal_(self[1].weight, std=0.3)
        nn.init.zeros_(self[1].bias)
        self.requires_grad_(False)


class Wrapped(nn.Module):
    """A network and a function of its input, or of its logits."""

    def __init__(self, net, before=lambda x: x, after=lambda logits: logits):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def sure(classes=12):
    """A linear model that is so sure of class 0 that nothing in the box changes it, and whose
    cross-entropy still has a gradient."""
    model = Flat(classes)
    model[1].weight.mul_(0.01)
    model[1].bias[0] = 5
    return model


def counted(model):
    """The network, and a list of the sizes of all passes through it."""
    passes = []
    return Wrapped(model, before=lambda x: passes.append(len(x)) or x), passes


def correct(model, x):
    """The images with the model's own predictions as labels: all classified correctly."""
    return x, model(x).argmax(1)


def exact_robust(model, x, y, epsilon):
    """A linear model errs as class t somewhere in the box iff it does at the best corner for t."""
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
    """Ten coarse patterns of varying contrast in noise, 16 x 16, as a data set of uint8."""
    torch.manual_seed(0)
    y, contrast = torch.arange(900) % 10, torch.rand(900, 1, 1, 1) * 0.12 + 0.02
    pattern = F.interpolate(torch.randn(10, 3, 4, 4).sign(), scale_factor=4)
    x = (0.5 + contrast * pattern[y] + 0.1 * torch.randn(900, 3, 16, 16)).clamp(0, 1)
    x = (255 * x).round().byte()
    return common.Data(x[:600], y[:600], x[600:], y[600:], [str(c) for c in range(10)])


@pytest.fixture(scope="module")
def robust_net(patterns):
    """A small convolutional network after a few seconds of adversarial training."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(20):
        for batch in torch.randperm(600).split(100):
            x, y = common.to_float(patterns.x_train[batch]), patterns.y_train[batch]
            x_adv = common.pgd(net, x, partial(F.cross_entropy, target=y), 4 / 255, 2 / 255, 3)
            optimizer.zero_grad()
            F.cross_entropy(net(x_adv), y).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def right(robust_net, patterns):
    """The first 30 test images that it classifies correctly."""
    x, y = common.to_float(patterns.x_test), patterns.y_test
    keep = (robust_net(x).argmax(1) == y).nonzero()[:30, 0]
    assert len(keep) == 30
    return x[keep], y[keep]


# --------------------------------------------------------------------------------- known answers
@pytest.mark.parametrize("name", ["FGSM", "PGD-20", "PGD-100", "CW", "APGD-CE", "APGD-T", "FAB-T"])
def test_two_class_linear_model(name, images):
    """On a linear model of two classes each gradient attack reaches the exact robust accuracy.

    PGD's 20 steps of 1/255 cross the box of 2/255; FAB stops within half a percent of the boundary.
    """
    model = Flat(2)
    x, y = correct(model, images)
    exact = exact_robust(model, x, y, 2 / 255)
    assert 20 < exact.sum() < 80
    near = torch.zeros_like(exact)
    if name == "FAB-T":
        near = exact_robust(model, x, y, 1.99 / 255) != exact
    assert near.sum() <= 2
    _, robust = attack(name, model, x, y, 2 / 255)
    assert torch.equal(robust[~near], exact[~near])


@pytest.mark.parametrize("name", ["CW", "APGD-T", "FAB-T"])
def test_ten_class_linear_model(name, images):
    """With ten classes what aims at a class or the margin reaches the exact robust accuracy."""
    model = Flat(10)
    x, y = correct(model, images)
    exact, nearly = (exact_robust(model, x, y, e / 255) for e in (4, 3.96))
    assert 20 < exact.sum() < 80 and (exact != nearly).sum() <= 3
    _, robust = attack(name, model, x, y, 4 / 255)
    settled = torch.ones_like(exact)
    if name == "FAB-T":
        settled = exact == nearly
    assert torch.equal(robust[settled], exact[settled])


def test_apgd_t_does_not_mind_loud_logits(images):
    """APGD-T maximises DLR: logits times 10,000, where the cross-entropy's gradient is 0, change
    nothing for it, and stop APGD-CE."""
    model = Flat(10)
    x, y = correct(model, images)
    exact, loud = exact_robust(model, x, y, 4 / 255), Wrapped(model, after=lambda z: 1e4 * z)
    assert torch.equal(attack("APGD-T", loud, x, y, 4 / 255)[1], exact)
    assert attack("APGD-CE", loud, x, y, 4 / 255)[1].sum() > exact.sum() + 5


def test_black_box_attacks_on_a_linear_model(images):
    """Square and SPSA break no image that is certifiably robust and most that are far from it."""
    model = Flat(2)
    x, y = correct(model, images)
    exact, easy = exact_robust(model, x, y, 2 / 255), ~exact_robust(model, x, y, 0.7 / 255)
    for name, options in (("SQUARE", {"queries": 1500}), ("SPSA", {})):
        _, robust = attack(name, model, x, y, 2 / 255, **options)
        assert robust[exact].all() and robust[easy].float().mean() < 0.1, name


def test_projection_ends_where_the_hyperplane_is_barely_in_reach():
    """Rounding must not make Newton's steps go to and fro for ever, nor must NaN: 64 gaps of 98.5
    to 100 % of what all pixels can do, the last of them NaN."""

    def too_long(*_):
        raise TimeoutError

    torch.manual_seed(0)
    x, w = torch.rand(64, 3, 32, 32), torch.randn(64, 3, 32, 32)
    farthest = (w.abs() * torch.where(w > 0, 1 - x, x)).sum((1, 2, 3), keepdim=True)
    gap = farthest * (1 - 0.015 * torch.rand(64, 1, 1, 1))
    gap[-1] = torch.nan
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    d = evaluate.to_hyperplane(x, w, gap)
    signal.alarm(0)
    assert torch.allclose((w * d).sum((1, 2, 3), keepdim=True)[:-1], gap[:-1], rtol=1e-5)


def test_losses_by_hand():
    """Targeted DLR, CW with confidence 50 and the margin, against numbers worked out by hand."""
    logits = torch.tensor([[4.0, 1, 3, 0, 2], [1, 5, 2, 4, 3]])
    y, t = torch.tensor([0, 3]), torch.tensor([2, 1])
    # sorted 4 3 2 1 0: -(4 - 3) / (4 - (2 + 1) / 2) = -0.4
    # 5 4 3 2 1: -(4 - 5) / (5 - (3 + 2) / 2) = 0.4
    assert torch.allclose(evaluate.dlr_targeted(logits, y, t), torch.tensor([-0.4, 0.4]))
    assert torch.allclose(evaluate.dlr_targeted(7 * logits, y, t), torch.tensor([-0.4, 0.4]))
    assert evaluate.margin(logits, y).tolist() == [1, -1]
    assert evaluate.cw_loss(torch.tensor([[3.0, 1], [-70, 0]]), 0 * y).tolist() == [-52, 0]
    three = torch.tensor([[2.0, 1, 0]])  # no fourth logit: z_t - z_y instead
    assert evaluate.dlr_targeted(three, torch.tensor([0]), torch.tensor([2])).item() == -2


def test_targets_by_hand():
    """Targets are the wrong classes in the order of the clean logits, nine or all there are."""
    seen = []

    def harmless(model, x, y, epsilon, generators, target):
        seen.append(target.tolist())
        return x

    for classes in (12, 3):
        model = Flat(classes)
        model[1].weight.zero_()
        model[1].bias.copy_(-torch.arange(classes))  # logits 0, -1, -2, ...
        seen.clear()
        evaluate.each_target(
            harmless, model, torch.rand(1, 3, 8, 8), torch.tensor([0]), 0.1, generators(1)
        )
        assert seen == [[t] for t in range(1, min(10, classes))]


def test_random_numbers():
    """Uniform, independent over images, draws, attacks and seeds; the same in any batch, and the
    same in every version (numpy documents SeedSequence's values)."""
    own = evaluate.generators_of(0, "PGD-20", torch.arange(400), "cpu")
    u, again = evaluate.uniform(own, 50), evaluate.uniform(own, 50)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002
    others = [
        again,
        evaluate.uniform(generators(400, 0, "CW"), 50),
        u.roll(1, 0),
        u.roll(1, 1),
        evaluate.uniform(generators(400, 1, "PGD-20"), 50),
    ]
    for other in others:
        assert abs(np.corrcoef(u.flatten(), other.flatten())[0, 1]) < 0.03
    rows = torch.tensor([7, 300])
    assert torch.equal(
        evaluate.uniform(evaluate.generators_of(0, "PGD-20", rows, "cpu"), 50), u[rows]
    )
    assert own[7].initial_seed() == 2476146383030287998
    assert (
        evaluate.generators_of(0, "PGD-20", rows, "cpu")[1].initial_seed()
        == own[300].initial_seed()
    )


def test_pgd_start(images):
    """PGD starts uniformly in the whole box, clipped to [0, 1]."""
    x_adv, _ = attack("PGD-20", sure(), images, torch.zeros(100, dtype=torch.long), steps=0)
    u = ((x_adv - images) / EPSILON)[(images > EPSILON) & (images < 1 - EPSILON)]
    assert u.min() < -0.99 and u.max() > 0.99 and abs(u.mean()) < 0.02
    assert abs(u.var() - 1 / 3) < 0.01


def test_a_copied_attack_leaves_the_network_as_it_was(images):
    """The call of the docstring: weights that need gradients, and a batch norm in train mode."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 10))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with common.frozen(network):
        x, y = correct(network, images[:4])
        x_adv = evaluate.apgd(network, x, y, EPSILON, generators(4), steps=3)
    assert (x_adv != x).any() and not x_adv.requires_grad
    assert network.training and all(w.requires_grad for w in network.parameters())
    assert all(w.grad is None for w in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", ATTACKS)
def test_passes(name):
    """An image that survives is seen as often as the time left supposes: 20 and 100 steps of PGD,
    CW as PGD-20, 100 iterations of APGD and FAB, 9 targets, 5,000 queries of Square and its start,
    20 iterations of SPSA with 2 x 100 queries and a look at the iterate, and a last look."""
    model, passes = counted(sure())
    _, robust = attack(name, model, torch.rand(1, 3, 8, 8), torch.tensor([0]))
    assert robust.all() and sum(passes) == evaluate.TIMES_SEEN[name]


def test_apgd_checkpoints():
    """Those of AutoAttack for 100 steps (Croce & Hein 2020b); other steps in proportion."""
    assert evaluate.apgd_checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert evaluate.apgd_checkpoints(50) == [11, 21, 29, 35, 40, 44, 47, 50]
    assert evaluate.apgd_checkpoints(1000) == [220, 410, 570, 700, 800, 870, 930, 990]


def test_autoattack_parts(checkpoint, monkeypatch):
    """AA is APGD-CE, APGD-T, FAB-T and SQUARE in this order, each on what the ones before left."""
    assert AA == ("APGD-CE", "APGD-T", "FAB-T", "SQUARE")
    seen = []

    def breaks_first(name):
        def fake(model, x, y, epsilon, generators):
            seen.append((name, len(x)))
            x_adv = x.clone()
            x_adv[0] = 1 - x_adv[0]
            return x_adv

        return fake

    for name in AA:
        monkeypatch.setitem(ATTACKS, name, breaks_first(name))
    e = subject(checkpoint, monkeypatch, "--n", 9, "--epsilon", 1)
    e.model = Wrapped(nn.Flatten(), after=lambda z: torch.stack([0 * z[:, 0], z[:, 0]], 1))
    e.images = torch.zeros_like(e.images)
    e.label.zero_()
    evaluate.run_column(e, "Clean")
    evaluate.run_column(e, "AA")
    assert seen == [("APGD-CE", 9), ("APGD-T", 8), ("FAB-T", 7), ("SQUARE", 6)]
    assert e.accuracies() == {"Clean": 100, "AA": 100 * 5 / 9}
    e.out.unlink()


# ------------------------------------------------------------------------ on a small trained model
@pytest.mark.parametrize(
    "name, options",
    [
        ("PGD-20", {}),
        ("APGD-CE", {}),
        ("APGD-T", {}),
        ("FAB-T", {}),
        ("SPSA", {"samples": 20}),
        ("SQUARE", {"queries": 300}),
    ],
)
def test_independent_of_batch_and_order(name, options, robust_net, right):
    """What happens to an image does not depend on batch, order or neighbours."""
    x, y, n = right[0][:6], right[1][:6], 6
    together = attack(name, robust_net, x, y, **options)[0]
    rows = torch.arange(n).flip(0)
    for batch in (rows[:2], rows[2:3], rows[3:]):
        apart = attack(name, robust_net, x[batch], y[batch], index=batch, **options)[0]
        same = (apart - together[batch]).abs().amax((1, 2, 3)) < 1e-3
        assert same.float().mean() >= 0.8, name  # rounding may turn a vanishing gradient's sign
    other_seed = attack(name, robust_net, x, y, seed=1, **options)[0]
    assert name == "FAB-T" or not torch.allclose(other_seed, together, atol=1e-3)


def test_worst_iterate_counts(robust_net, right):
    """An image is lost once any iterate is misclassified: more steps from the same start never
    lose fewer."""
    short, long = (attack("PGD-20", robust_net, *right, steps=steps)[1] for steps in (3, 20))
    assert (short | ~long).all() and short.sum() > long.sum()


def test_no_pass_is_spent_on_fooled_images(robust_net, right):
    """PGD-100 costs 100 passes for each image that survives and far fewer for the others."""
    model, passes = counted(robust_net)
    _, robust = attack("PGD-100", model, *right)
    spent = sum(passes) - len(right[0])  # attack() looks once more
    assert 100 * robust.sum() < spent < 100 * robust.sum() + 40 * (~robust).sum()


# --------------------------------------------------------------------------------- the whole thing
@pytest.fixture(scope="module")
def shapes():
    return common.load_data("shapes", "data")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, shapes):
    """best.pt of a tiny WideResNet, briefly trained on shapes and written as the scripts do."""
    torch.manual_seed(0)
    model = common.make_model("wrn-10-1", 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    for batch in torch.randperm(3000).split(100):
        optimizer.zero_grad()
        x, y = common.to_float(shapes.x_train[batch]), shapes.y_train[batch]
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("run") / "best.pt"
    with pytest.MonkeyPatch.context() as patch:
        args = trained_by(train_lma_at, "--dataset", "shapes")
        args["classes"] = list(shapes.classes)
        args["data"] = common.fingerprint(shapes.x_train, shapes.y_train)
        torch.save({"model": model.state_dict(), "epoch": 1, "args": args}, path)
        patch.setattr(common, "load_data", lambda *a: shapes)  # drawn once for all the tests below
        yield path


@pytest.fixture(scope="module")
def saved(checkpoint):
    """What it holds."""
    return torch.load(checkpoint, weights_only=True)


def trained_by(script, *options):
    """The arguments that a training script saves for these options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, options)])
        return vars(script.parse_args())


def perturbed(saved, seed):
    """The same checkpoint after training with another seed: its weights differ a little."""
    torch.manual_seed(seed)
    model = {k: v + 1e-4 * torch.randn(v.shape) for k, v in saved["model"].items() if v.dim()}
    return saved | {"model": saved["model"] | model, "args": saved["args"] | {"seed": seed}}


def arguments(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    return evaluate.parse_args()


def subject(path, monkeypatch, *argv):
    """An Evaluation in this process."""
    args = arguments(monkeypatch, path, *argv)
    found = evaluate.load_checkpoint(str(path), args, common.load_data)
    e = evaluate.Evaluation(found, args, torch.device("cpu"))
    e.save()
    return e


def start(monkeypatch, capsys, *argv):
    """evaluate.main() in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    status = 0
    try:
        common.run(evaluate.main, "as it is")
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def loaded(path, arch, classes, mean=None, std=None):
    """The network of a checkpoint."""
    content, _ = evaluate.read_checkpoint(path)
    return evaluate.load_network(path, content, arch, classes, mean, std)


def test_the_table(checkpoint, monkeypatch, capsys):
    """Columns in the paper's order with Wilson's interval. AA is at most each of its parts. The
    file has the prediction for every image and what the table says, to the last digit."""
    monkeypatch.setattr(evaluate, "apgd", partial(evaluate.apgd, steps=5))
    monkeypatch.setattr(evaluate, "fab", partial(evaluate.fab, steps=3))
    monkeypatch.setitem(ATTACKS, "SQUARE", partial(evaluate.square, queries=30))
    command = (checkpoint, "--n", 20, "--epsilon", "1/255", "--attacks", "SQUARE", "AA", "FGSM")
    status, text, _ = start(monkeypatch, capsys, *command)
    assert status == 0 and "| Method | Clean | FGSM | AA | SQUARE |" in text
    assert "LMA-AT(Ours)" in text and "paper" not in text.split("| Method")[1]  # another epsilon
    found = json.loads(checkpoint.with_name("best.n20.eps1.eval.json").read_text())
    robust = {
        name: [p == y for p, y in zip(predictions, found["label"], strict=True)]
        for name, predictions in found["prediction"].items()
    }
    aa = [all(robust[name][i] for name in AA) for i in range(20)]
    accuracy = {name: 100 * sum(robust[name]) / 20 for name in ("Clean", "FGSM", "SQUARE")}
    assert found["accuracy"] == accuracy | {"AA": 100 * sum(aa) / 20}
    assert found["accuracy"]["AA"] == min(found["accuracy"].values())
    low, high = evaluate.wilson(sum(aa), 20)
    assert f"| {100 * sum(aa) / 20:.2f} [{low:.1f}, {high:.1f}] |" in text
    keys = {"settings", "accuracy", "checks", "index", "label", "prediction"}
    assert found.keys() == keys and "\n".join(found["checks"]) in text
    checkpoint.with_name("best.n20.eps1.eval.json").unlink()


def test_the_file_holds_all_calls(checkpoint, tmp_path, monkeypatch, capsys):
    """A second call with other attacks keeps the predictions and accuracies of the first, and what
    is only half done has no accuracy."""
    out = tmp_path / "r.json"
    command = (checkpoint, "--n", 20, "--out", out, "--attacks")
    start(monkeypatch, capsys, *command, "FGSM")
    first = json.loads(out.read_text())
    e = subject(checkpoint, monkeypatch, "--n", 20, "--out", out)
    assert json.loads(out.read_text()) == first  # the checks too
    e.prediction["SPSA"][3] = 0
    e.prediction["APGD-CE"] = e.label.clone()
    e.save()
    assert start(monkeypatch, capsys, *command, "PGD-20")[0] == 0
    both = json.loads(out.read_text())
    assert list(both["accuracy"]) == ["Clean", "FGSM", "PGD-20"]
    assert both["accuracy"].items() > first["accuracy"].items()
    assert both["prediction"].items() > first["prediction"].items()
    assert both["prediction"]["SPSA"][3] == 0


def test_two_evaluations_at_once(checkpoint, tmp_path, monkeypatch):
    """Each keeps what the other has written meanwhile, and does not do it again."""
    command = (checkpoint, monkeypatch, "--n", 10, "--out", tmp_path / "r.json")
    one, two = subject(*command), subject(*command)
    for e, columns in ((one, ["Clean", "FGSM"]), (two, ["Clean", "PGD-20"]), (one, ["CW"])):
        for column in columns:
            evaluate.run_column(e, column)
    found = json.loads((tmp_path / "r.json").read_text())
    assert list(found["accuracy"]) == ["Clean", "FGSM", "PGD-20", "CW"]
    assert not one.to_do("PGD-20").any()


def test_wilson():
    """36 of 40 give 76.9 to 96.0. The ends are the p for which k is 1.96 deviations from n p."""
    assert [round(end, 1) for end in evaluate.wilson(36, 40)] == [76.9, 96.0]
    for k, n in ((0, 10), (1, 7), (36, 40), (50, 100), (9800, 10000)):
        for end in evaluate.wilson(k, n):
            p = end / 100
            assert (k / n - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / n, abs=1e-12)
    assert evaluate.wilson(0, 10)[0] == pytest.approx(0) and evaluate.wilson(0, 10)[1] > 20
    assert evaluate.wilson(10, 10)[1] == pytest.approx(100) and evaluate.wilson(10, 10)[0] < 80


@pytest.mark.parametrize("n", range(2, 11))
def test_student(n):
    """2.5 % of Student's distribution with n - 1 degrees of freedom, integrated numerically, lie
    above the constant."""
    mean, half = evaluate.mean_and_half([1.0] + [0.0] * (n - 1))
    assert mean == pytest.approx(1 / n)
    standard_error = np.sqrt((1 - 1 / n) / (n - 1) / n)
    t, degrees = half / standard_error, n - 1
    angle = np.linspace(0, np.pi / 2, 1_000_001)  # t = sqrt(degrees) tan(angle)
    density = np.cos(angle) ** (degrees - 1)
    above = density[angle > np.arctan(t / np.sqrt(degrees))].sum() / density.sum() / 2
    assert above == pytest.approx(0.025, abs=2e-5)


def test_more_runs_than_the_table_has():
    assert evaluate.mean_and_half([0.0, 1.0] * 10)[1] == pytest.approx(2.262 * 0.11471, rel=1e-3)


def test_several_seeds_and_the_papers_row():
    """Two seeds give their mean and Student's interval; the paper's row and the difference stand
    below. Two runs of one seed count as one."""
    paper = evaluate.ROWS["cifar10", "resnet18", "TRADES"]

    def run(path, seed, clean, aa):
        return SimpleNamespace(
            path=path,
            method="TRADES",
            paper=paper,
            kind="same",
            label=range(100),
            checkpoint=SimpleNamespace(trained={"seed": seed}),
            correct=lambda column: {"Clean": clean, "AA": aa}[column],
            accuracies=lambda: {"Clean": float(clean), "AA": float(aa)},
        )

    two = [run("a.pt", 0, 82, 49), run("b.pt", 1, 84, 49)]
    text = evaluate.table(two, ["Clean", "AA"])
    assert text.startswith("| Method | Clean | AA |\n| --- | --- | --- |\n| TRADES (a.pt) |")
    assert "| TRADES (a.pt) | 82.00 [73.3, 88.3] | 49.00 [39.4, 58.7] |" in text
    assert "| TRADES, mean of 2 | 83.00 ± 12.71 | 49.00 ± 0.00 |" in text  # t = 12.71, s. e. 1
    assert "| paper, TRADES | 82.46 | 49.08 |" in text and "| difference | +0.54 | -0.08 |" in text
    text = evaluate.table([*two, two[1]], ["Clean"])
    assert "| TRADES, mean of 2, one of each seed | 83.00 ± 12.71 |" in text
    assert "mean of" not in evaluate.table([two[0], two[0]], ["Clean"])


# Column sums of Tables 2 to 8 and 10, in hundredths of a percent, the numbers of the first row
# counted once, of the second twice, and so on: from the digits printed in the paper.
BASELINES = ["vanillaAT", "TRADES", "MART"]
OURS = ["vanillaAT + Ours", "TRADES + Ours", "MART + Ours", "LMA-AT(Ours)"]
TAUS = ["LMA-AT, tau 0", "LMA-AT, tau 0.1", "LMA-AT(Ours)", "LMA-AT, tau 0.7", "LMA-AT, tau 0.9"]
ALL = "Clean FGSM PGD-20 PGD-100 CW AA SQUARE SPSA"
MOST = [*BASELINES, "PMHR-AT", *OURS]
TAU_COLUMNS = "Clean PGD-20 PGD-100 CW SPSA AA"
SUMS = {
    "Table 2": (TAUS, TAU_COLUMNS, "122676 85933 83862 78547 89266 73498"),
    "Table 3": (TAUS, TAU_COLUMNS, "82446 49470 48479 43656 49440 39766"),
    "Table 4": (MOST, ALL, "299657 216091 202905 197364 186994 175593 208252 213215"),
    "Table 5": (MOST, ALL, "306830 227352 214993 210045 200240 189035 214207 226184"),
    "Table 6": (MOST, ALL, "208061 122371 114735 111660 101342 92495 115422 120295"),
    "Table 7": ([*BASELINES[1:], *OURS[1:]], "Clean PGD-20 CW AA", "72575 38863 32540 28054"),
    "Table 8": (
        ["MMA", "WAT", "MAIL", "GAIRAT", *OURS],
        "Clean PGD-20 CW AA SPSA",
        "307900 215990 194725 182059 222307",
    ),
    "Table 10": (
        ["Table 10 A", "Table 10 B", "LMA-AT(Ours)"],
        ALL,
        "49976 36507 34137 33187 31315 29321 35083 36289",
    ),
}
SOURCES = {
    "Table 3": ("cifar100", "resnet18"),
    "Table 5": ("cifar10", "wrn-34-10"),
    "Table 6": ("cifar100", "resnet18"),
    "Table 7": ("tinyimagenet", "resnet18"),
    "Table 8": ("cifar10", "wrn-34-10"),
}


def test_the_papers_numbers():
    """Tables 2 to 8 and 10: every number, by sums of the columns; and no row beside them."""
    seen = set()
    for name, (methods, columns, sums) in SUMS.items():
        source = SOURCES.get(name, ("cifar10", "resnet18"))
        rows = [evaluate.ROWS[*source, method] for method in methods]
        seen |= {(*source, method) for method in methods}
        for column, expected in zip(columns.split(), sums.split(), strict=True):
            found = sum(k * round(100 * row[column]) for k, row in enumerate(rows, 1))
            assert found == int(expected), (name, column)
        for method, row in zip(methods, rows, strict=True):  # those with "Ours" are in two tables
            assert "Ours" in method or row.keys() == set(columns.split()), (name, method)
    assert seen == set(evaluate.ROWS)


# README, "The paper's experiments"
COMMANDS = [
    (train_lma_at, "", "LMA-AT(Ours)"),
    (train_at_ours, "", "vanillaAT + Ours"),
    (train_mart_ours, "", "MART + Ours"),
    (train_trades_ours, "", "TRADES + Ours"),
    (train_at_ours, "--attack-loss ce --margin-weight 0 --beta 0", "vanillaAT"),
    (train_trades_ours, "--attack-loss kl --margin-weight 0 --beta 0", "TRADES"),
    (train_mart_ours, "--attack-loss ce --margin-weight 0 --beta 0", "MART"),
    (train_at_ours, "--attack-loss ce", "Table 10 A"),
    (train_lma_at, "--margin-weight 0", "Table 10 B"),
    *((train_lma_at, f"--tau {tau}", f"LMA-AT, tau {tau}") for tau in ("0", "0.1", "0.7", "0.9")),
    (train_lma_at, "--tau 0.2", "LMA-AT(Ours)"),
]


@pytest.mark.parametrize("script, options, method", COMMANDS)
def test_the_readmes_commands_are_the_papers_rows(script, options, method):
    """Each method is recognised from its command, on every data set and network of the paper."""
    readme = PROGRAM.with_name("README.md").read_text()
    command = f"python {Path(script.__file__).name} {options}".strip()
    assert "tau" in options or not options or command in readme
    for source in ("cifar10 resnet18", "cifar10 wrn-34-10", "cifar100 resnet18"):
        dataset, arch = source.split()
        args = trained_by(script, "--dataset", dataset, "--arch", arch, *options.split())
        assert evaluate.paper_method(args) == method
    assert ("cifar10", "resnet18", method) in evaluate.ROWS
    tiny = trained_by(script, "--dataset", "tinyimagenet", *options.split())
    assert evaluate.paper_method(tiny) == method


def test_paper_method(saved):
    """Settings other than those of section 5.1 are named, and then the paper has no row."""
    assert evaluate.paper_method(saved["args"]) == (
        "LMA-AT(Ours), settings differ: epochs 3 (130), lr 0.05 (0.01), batch_size 50 (100)"
    )
    lma = trained_by(train_lma_at)
    for other in (
        {"epsilon": 0},
        {"epsilon": 4 / 255},
        {"step_size": 0.1},
        {"steps": 7},
        {"beta": 1},
        {"delta": 0.1},
        {"alpha": 1},
        {"margin_reduction": "sum"},
        {"epochs": 1},
        {"lr": 0.5},
        {"weight_decay": 0},
        {"batch_size": 500},
        {"amp": True},
        {"val_size": 5000},
        {"ema": "image"},
    ):
        method = evaluate.paper_method(lma | other)
        assert method.startswith(f"LMA-AT(Ours), settings differ: {list(other)[0]} "), other
        assert method.count("(") == 2 and ("cifar10", "resnet18", method) not in evaluate.ROWS
    for held_out in ({"val_size": 0}, {"val_size": 1000}):
        assert evaluate.paper_method(lma | held_out) == "LMA-AT(Ours)"
    trades = trained_by(train_trades_ours, *COMMANDS[5][1].split())
    assert evaluate.paper_method(trades | {"inv_lambda": 1.0}).endswith(": inv_lambda 1 (6)")
    assert evaluate.paper_method(trades | {"attack_loss": "ce"}) is None
    mart = trained_by(train_mart_ours, *COMMANDS[6][1].split())
    assert evaluate.paper_method(mart | {"lam": 6.0}).endswith(": lam 6 (5)")


@pytest.mark.parametrize("epsilon, shown", [("8/255", True), ("0.0313725", True), ("7/255", False)])
def test_the_papers_row_is_shown_at_its_epsilon(
    epsilon, shown, saved, tmp_path, monkeypatch, capsys
):
    """Below the accuracies of a method of the paper stand the paper's and the difference."""
    row = ("shapes", "wrn-10-1", "TRADES")
    monkeypatch.setitem(evaluate.ROWS, row, {"Clean": 12.5, "FGSM": 10.0})
    torch.save(saved["model"], tmp_path / "foreign.pt")
    command = (tmp_path / "foreign.pt", *FOREIGN, "--method", "TRADES", "--epsilon", epsilon)
    _, text, _ = start(monkeypatch, capsys, *command, "--attacks", "FGSM", "--n", 2)
    assert ("| paper, TRADES | 12.50 | 10.00 |\n| difference | " in text) == shown


def test_tf32_and_the_choice_of_kernels_are_off(checkpoint, tmp_path, monkeypatch, capsys):
    """Both would make the result of an image depend on the other images of its batch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    command = (checkpoint, "--attacks", "FGSM", "--n", 1, "--out", tmp_path / "r.json")
    assert start(monkeypatch, capsys, *command)[0] == 0
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.benchmark


def test_only_seeds_of_one_setting_on_one_data_set_are_averaged(
    saved, shapes, tmp_path, monkeypatch, capsys
):
    """Each checkpoint is tested on its own data; a mean is of those that differ in the seed alone.
    A copy and a link count once."""
    dark = shapes._replace(x_test=shapes.x_test // 4)
    monkeypatch.setattr(common, "load_data", lambda _, place: dark if place == "dark" else shapes)
    other = perturbed(saved, 1)
    runs = {
        "seed0": saved,
        "seed1": other,
        "beta1": perturbed(saved, 2) | {"args": saved["args"] | {"beta": 1}},
        "dark": saved | {"args": saved["args"] | {"data_dir": "dark"}},
        "copy": saved,
    }
    for name, content in runs.items():
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "best.pt")
    (tmp_path / "link").symlink_to(tmp_path / "seed1")
    torch.save(perturbed(saved, 3)["model"], tmp_path / "foreign.pt")
    paths = [*(tmp_path / name / "best.pt" for name in (*runs, "link")), tmp_path / "foreign.pt"]
    command = (*paths, "--attacks", "FGSM", "--n", 30, "--dataset", "shapes", "--arch", "wrn-10-1")
    status, text, _ = start(monkeypatch, capsys, *command)
    assert status == 0 and text.count("mean of") == 1
    assert "| LMA-AT(Ours), settings differ: epochs 3 (130), " in text.split(", mean of 2 |")[0]
    assert "| no row of the paper (" in text and "beta 1 (86) (" in text
    for name, first in (("copy", "seed0"), ("link", "seed1")):
        note = f"note: {tmp_path}/{name}/best.pt has the weights of {tmp_path}/{first}/best.pt"
        assert note in text and f"| LMA-AT(Ours) ({tmp_path}/{name}" not in text
    found = {}
    for name in ("seed0", "seed1", "beta1", "dark"):
        file = tmp_path / name / "best.n30.eval.json"
        found[name] = json.loads(file.read_text())["accuracy"]["Clean"]
    assert found["seed0"] == found["seed1"] == found["beta1"] != found["dark"]
    assert not list(tmp_path.glob("copy/*.json"))


def test_resume_after_kill(checkpoint, tmp_path, monkeypatch, capsys):
    """Killed in the middle of an attack, the same command goes on there and ends with the same
    predictions."""
    command = [checkpoint, "--n", 60, "--attacks", "PGD-20", "CW", "--batch-size", 1]
    command += ["--epsilon", "1/255"]
    whole, cut = checkpoint.with_name("whole.json"), tmp_path / "cut.json"
    assert start(monkeypatch, capsys, *command, "--out", whole)[0] == 0
    whole = json.loads(whole.read_text())

    def done():
        content = json.loads(cut.read_text()) if cut.exists() else {"prediction": {}}
        return sum(p >= 0 for p in content["prediction"].get("PGD-20", []))

    process = subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, command), "--out", str(cut)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=ONE_THREAD,
    )
    while done() < 4 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done()
    clean = whole["prediction"]["Clean"]
    right = sum(p == y for p, y in zip(clean, whole["label"], strict=True))
    assert 4 <= before < right and "CW" not in json.loads(cut.read_text())["prediction"]

    attacked = []
    pgd = evaluate.pgd_attack
    monkeypatch.setitem(
        ATTACKS, "PGD-20", lambda *args: attacked.append(len(args[1])) or pgd(*args)
    )
    assert start(monkeypatch, capsys, *command, "--out", cut)[0] == 0
    assert json.loads(cut.read_text()) == whole and sum(attacked) == right - before


def test_the_name_of_the_file(checkpoint, tmp_path, monkeypatch, capsys):
    """What differs from the default stands in the name, and the data set of foreign weights."""
    foreign = tmp_path / "best.pt"
    torch.save(torch.load(checkpoint, weights_only=True)["model"], foreign)
    for path, more, name in (
        (checkpoint, (), "best.n9"),
        (checkpoint, ("--epsilon", "4/255", "--seed", 1), "best.n9.seed1.eps4"),
        (checkpoint, ("--dataset", "shapes", "--n", 1), "best.n1"),
        (foreign, FOREIGN, "best.shapes.n9"),
    ):
        assert start(monkeypatch, capsys, path, "--n", 9, "--attacks", "FGSM", *more)[0] == 0
        path.with_name(f"{name}.eval.json").unlink()


def test_figure1(checkpoint, shapes, tmp_path, monkeypatch, capsys):
    """For every misclassified x', those wrong before the attack among them, the rank of its class
    among the natural model's wrong ones is counted and drawn."""
    out = tmp_path / "r.json"
    command = (checkpoint, "--n", 60, "--attacks", "PGD-20", "CW", "--out", out)
    figure = ("--figure1", checkpoint, tmp_path / "f.png")
    (tmp_path / "f.png").write_bytes(b"\x89PNG of the last time")
    status, text, _ = start(monkeypatch, capsys, *command, *figure)
    lines = re.findall(r"(.*), rank of the wrong class: (.*)", text)
    counts = {name: json.loads(rest.replace("'", '"')) for name, rest in lines}
    found = json.loads(out.read_text())
    natural = loaded(checkpoint, "wrn-10-1", 10)
    logits = natural(common.to_float(shapes.x_test[found["index"]]))
    assert counts.keys() == {"PGD-20", "CW"}
    for name, row in counts.items():
        expected = [0] * 9
        clean, y = found["prediction"]["Clean"], found["label"]
        after = found["prediction"][name]
        for i in range(60):
            wrong = after[i] if clean[i] == y[i] else clean[i]
            if wrong != y[i]:
                order = [c for c in logits[i].argsort(descending=True).tolist() if c != y[i]]
                expected[order.index(wrong)] += 1
        assert list(row.values()) == expected
        assert sum(expected) > sum(p != t for p, t in zip(clean, y, strict=True)) > 0
        assert list(row)[:3] == ["2nd", "3rd", "4th"]
    assert status == 0 and Image.open(tmp_path / "f.png").size == (920, 480)


def test_figure1_with_nothing_misclassified(checkpoint, tmp_path, monkeypatch, capsys):
    e = subject(checkpoint, monkeypatch, "--n", 5, "--out", tmp_path / "r.json")
    for name in ("Clean", "PGD-20", "CW"):
        e.prediction[name] = e.label.clone()
    evaluate.figure1(tmp_path / "f.png", e.model, e)
    text = capsys.readouterr().out
    assert "'2nd': 0" in text and (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


def test_the_bars_of_figure1(checkpoint, tmp_path, monkeypatch):
    """The highest bar of both attacks is 350 pixels high, the others are in proportion. Above each
    stands its number."""
    drawn = {"PGD-20": [1, 0, 0, 0], "CW": [0, 1, 0, 0]}
    e = subject(checkpoint, monkeypatch, "--n", 5, "--out", tmp_path / "r.json")
    monkeypatch.setattr(evaluate, "wrong_class_ranks", lambda natural, e, name: drawn[name])
    for counts in ([1, 0, 0, 0], [8, 4, 2, 1]):
        drawn["PGD-20"] = counts
        evaluate.figure1(tmp_path / "f.png", e.model, e)
        pixels = np.asarray(Image.open(tmp_path / "f.png").convert("RGB"))[70:]
        for name, colour in (("PGD-20", (31, 95, 168)), ("CW", (224, 138, 30))):
            heights = (pixels == colour).all(2).sum(0)
            found = [heights[30 + 215 * k : 245 + 215 * k].max() - 1 for k in range(4)]
            expected = [350 * count / max(counts) for count in drawn[name]]
            assert found == pytest.approx(expected, abs=1), name
            for k, height in enumerate(found):
                right = 30 + 215 * k + 107 + 107 * (name == "CW")
                above = pixels[350 - int(height) : 368 - int(height), right - 80 : right - 10]
                assert (above < 100).all(2).any(), (name, k)


def test_figure1s_network_says_what_it_is(saved, checkpoint, tmp_path, monkeypatch, capsys):
    """Options for foreign weights are not forced on a natural network of ours: its own --arch, and
    images as they are."""
    torch.manual_seed(0)
    model = common.make_model("wrn-16-1", 10)
    natural, foreign = tmp_path / "natural.pt", tmp_path / "foreign.pt"
    args = saved["args"] | {"arch": "wrn-16-1"}
    torch.save(saved | {"model": model.state_dict(), "args": args}, natural)
    torch.save(saved["model"], foreign)
    drawn = []
    monkeypatch.setattr(evaluate, "figure1", lambda path, network, e: drawn.append(network))
    command = (foreign, *FOREIGN, "--n", 3, "--attacks", "PGD-20", "CW", "--device", "cpu")
    command += ("--mean", 0.5, 0.5, 0.5, "--std", 0.2, 0.2, 0.2)
    figure = ("--figure1", natural, tmp_path / "f.png")
    status, _, _ = start(monkeypatch, capsys, *command, *figure)
    assert status == 0
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(drawn[0](x), model.eval()(x))


def test_the_table_is_printed_whatever_the_extras_do(
    saved, checkpoint, tmp_path, monkeypatch, capsys
):
    """Checks, Figure 1, a terminal that cannot write the sign for plus and minus."""
    command = (checkpoint, "--n", 3, "--attacks", "PGD-20", "CW", "--out", tmp_path / "r.json")
    natural = saved["model"] | {"fc.weight": 3e38 * saved["model"]["fc.weight"].sign()}
    torch.save(saved | {"model": natural}, tmp_path / "natural.pt")
    figure = ("--figure1", tmp_path / "natural.pt", tmp_path / "f.png")
    monkeypatch.setattr(evaluate, "wrong_class_ranks", lambda natural, e, name: [1 / 0])
    with pytest.raises(ZeroDivisionError):
        start(monkeypatch, capsys, *command, *figure)
    assert "| Method | Clean | PGD-20 | CW |" in capsys.readouterr().out
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(evaluate, "network_checks", lambda *_: 1 / 0)
        start(patch, capsys, *command)
    assert "| Method | Clean | PGD-20 | CW |" in capsys.readouterr().out
    ascii_only = io.TextIOWrapper(io.BytesIO(), "ascii")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", ascii_only)
        patch.setattr(sys, "argv", ["evaluate.py", *map(str, command)])
        common.run(evaluate.main, "as it is")
    ascii_only.flush()
    assert b"| Method | Clean | PGD-20 | CW |" in ascii_only.buffer.getvalue()


def test_time_left(checkpoint, tmp_path, monkeypatch):
    """A terminal sees within an attack how far it is: what all images that stand may still cost."""
    shown, now = [], [0.0]
    monkeypatch.setattr(common, "live", shown.append)
    monkeypatch.setattr(evaluate.time, "time", lambda: now[0])
    e = subject(checkpoint, monkeypatch, "--n", 4, "--out", tmp_path / "r.json")
    e.images, e.label = torch.zeros_like(e.images), torch.zeros_like(e.label)

    def second(x):
        now[0] += len(x)
        return x

    e.model = Wrapped(nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), sure()), before=second)
    for column in ("Clean", "PGD-20"):
        evaluate.run_column(e, column)
    lines = [line for line in shown if line.startswith("PGD-20: 0/4 images done, at most ")]
    assert len(lines) == 21 and lines[0].endswith("0:01:20 left") and "0:00:00" in lines[-1]


# ------------------------------------------------------------------------------ masked gradients
GOOD = {"PGD-20": 50.0, "PGD-100": 49.0, "CW": 48.0, "SQUARE": 55.0, "SPSA": 60.0, "AA": 45.0}
GOOD["APGD and FAB"] = 45.0


@pytest.mark.parametrize(
    "change, word",
    [
        ({"SQUARE": 47.8}, None),
        ({"SQUARE": 44.7}, "black box"),
        ({"SPSA": 30.0}, "SPSA leaves 30.00 %"),
        ({"AA": 44.7}, "AA leaves 44.70 %, APGD and FAB 45.00 %"),
        ({"PGD-100": 50.2}, None),
        ({"PGD-100": 50.3}, "50.00 % after 20 steps, 50.30 % after 100"),
    ],
)
def test_checks_of_columns(change, word):
    """Black-box attacks and more steps may contradict the white-box accuracies by 0.2 points."""
    checks = evaluate.column_checks(GOOD | change, 0.2 + 1e-9)
    failed = [text for passed, text in checks if not passed]
    assert len(checks) == 2 and len(failed) == (word is not None)
    assert word is None or word in failed[0]
    assert evaluate.column_checks({"Clean": 90.0, "FGSM": 60.0, "AA": 50.0}, 0.2) == []


def failed_checks(model, x, y):
    checks = evaluate.network_checks(model, x, y, EPSILON, generators(len(x)))
    assert len(checks) == 5
    return [text for passed, text in checks if not passed]


def test_checks_of_a_network(robust_net, right):
    """The honest network passes, and each check is failed by a network made for it."""
    assert failed_checks(robust_net, *right) == []

    def fails(after=lambda z: z, before=lambda x: x):
        return " ".join(failed_checks(Wrapped(robust_net, before, after), *right))

    stairs = fails(before=lambda x: (x * 64).round() / 64)
    assert "gradient is not zero: it is for 30 of 30" in stairs and "64/255 breaks" in stairs
    assert "gradient is not zero" in fails(after=lambda z: 1e4 * z)
    assert "probabilities" in fails(after=lambda z: z.softmax(1))
    torch.manual_seed(0)
    assert "two calls agree" in fails(after=lambda z: z + 1e-3 * torch.randn_like(z))
    assert "uniform noise" in " ".join(failed_checks(Fragile(*right), *right))


class Fragile(nn.Module):
    """It knows the images exactly as they are, and errs on everything else.

    What is nearest to one of the first `sturdy` images is always classified as that image.
    """

    def __init__(self, x, y, sturdy=0):
        super().__init__()
        self.x, self.y, self.sturdy = x, y, sturdy

    def forward(self, x):
        distance = (x.flatten(1)[:, None] - self.x.flatten(1)).abs().amax(2)
        nearest = distance.argmin(1)
        penalty = 1e3 * distance.amin(1, keepdim=True) * (nearest >= self.sturdy)[:, None]
        return F.one_hot(self.y[nearest], 10) * (1 - penalty) - 0.5


def test_the_limits_of_the_checks(images):
    """At most 5 % may stand at 64/255, at least 90 % must stand in noise, no gradient may be zero,
    two calls may differ by 1e-4 of the largest logit, and probabilities are not below 0 and sum to
    1. Each limit is tried from both sides."""
    y = torch.arange(100) % 10

    def passes(check, model, x=images, y=y):
        (passed,) = [
            passed
            for passed, text in evaluate.network_checks(model, x, y, EPSILON, generators(len(x)))
            if check in text
        ]
        return passed

    for check, sturdy, wanted in (
        ("64/255 breaks", 5, True),
        ("64/255 breaks", 6, False),
        ("uniform noise", 90, True),
        ("uniform noise", 89, False),
    ):
        assert passes(check, Fragile(images, y, sturdy)) == wanted, (check, sturdy)

    model = Flat(10)
    bright = Wrapped(model, before=lambda x: x * (x.amax((1, 2, 3), keepdim=True) > 0.1))
    one_black = images.clone()
    one_black[7] = 0  # on it the network is constant
    assert passes("gradient is not zero", bright)
    assert not passes("gradient is not zero", bright, one_black)

    for difference, wanted in ((0.9e-4, True), (1.2e-4, False)):
        calls = itertools.count()
        drifting = Wrapped(model, after=lambda z: z * (1 + next(calls) % 2 * difference))
        assert passes("two calls agree", drifting, images[:50], y[:50]) == wanted, difference

    for after, wanted in (
        (lambda z: z.softmax(1), False),
        (lambda z: 1.0002 * z.softmax(1), True),
        (lambda z: z.softmax(1) - 1e-3 * torch.tensor([1.0, -1] * 5), True),
        (lambda z: z - z.amin() + 1, True),
    ):
        assert passes("probabilities", Wrapped(model, after=after)) == wanted


def test_masking_checks_of_an_evaluation(checkpoint, tmp_path, monkeypatch):
    """The accuracies are those of all columns in the file. Among few images, one may differ."""
    e = subject(checkpoint, monkeypatch, "--n", 20, "--out", tmp_path / "r.json")
    assert evaluate.masking_checks(e) == ["SUSPECT no image is classified correctly"]
    e.prediction["Clean"] = e.label.clone()
    for name, broken in (("PGD-20", 5), ("PGD-100", 4), ("SQUARE", 6)):
        e.prediction[name] = e.label.clone()
        e.prediction[name][:broken] = (e.label[:broken] + 1) % 10
    lines = evaluate.masking_checks(e)
    assert lines[0] == (
        "pass    black box not stronger than white box: SQUARE leaves 70.00 %, PGD-20 75.00 %"
    )
    assert lines[1] == "pass    PGD: 75.00 % after 20 steps, 80.00 % after 100"
    e.prediction["SQUARE"][6] = e.prediction["PGD-100"][3] = 99
    e.prediction["PGD-100"][3] = e.label[3]
    lines = evaluate.masking_checks(e)
    assert lines[0].startswith("SUSPECT black box") and lines[1].startswith("SUSPECT PGD: 75")
    for name, broken in zip(AA, (1, 2, 2, 4), strict=True):
        e.prediction[name] = e.label.clone()
        e.prediction[name][:broken] = (e.label[:broken] + 1) % 10
    e.prediction["PGD-20"][:] = e.prediction["PGD-100"][:] = e.prediction["SQUARE"][:2] = -1
    assert "AA leaves 80.00 %, APGD and FAB 90.00 %" in evaluate.masking_checks(e)[0]


@pytest.mark.parametrize("n", [1, 200, 399, 1000])
def test_the_checks_images_are_of_all_classes(n):
    """At most 200 of the correct images, from the first to the last: folders lie class by class."""

    class Seen(Exception):
        pass

    class Correct:
        label = range(n)

        def robust(self, name):
            return torch.ones(n, dtype=torch.bool)

        def accuracies(self):
            return {}

        def batch(self, rows, purpose):
            raise Seen(rows.tolist())

    with pytest.raises(Seen) as seen:
        evaluate.masking_checks(Correct())
    (rows,) = seen.value.args
    assert min(n, 100) <= len(rows) <= 200 and rows[0] == 0 and rows[-1] >= n - n // len(rows) - 1


# ------------------------------------------------------------- other people's checkpoints and data
def as_others_do(state, arch):
    """The names of TRADES, MART and RobustBench."""
    if arch == "resnet18":
        names = {k: k.replace("downsample", "shortcut").replace("fc.", "linear.") for k in state}
        return {names[k]: v for k, v in state.items()}
    blocks = {k: v for k, v in state.items() if k.startswith("block1")}
    return state | {k.replace("block1", "sub_block1"): v for k, v in blocks.items()}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


WRAPPED = {
    "bare": lambda s: s,
    "module": lambda s: prefixed(s, "module."),
    "state_dict module": lambda s: {"state_dict": prefixed(s, "module."), "epoch": 7},
    "net": lambda s: {"net": s, "acc": 83.1},
    "model_state_dict": lambda s: {"model_state_dict": s, "args": {"lr": 0.1}},
    "compiled DDP": lambda s: prefixed(s, "_orig_mod.module."),
    "DDP of a compiled": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "hparams_name": "x"},
    "ema": lambda s: prefixed(s, "ema."),
    "basic_net": lambda s: {"net": prefixed(s, "basic_net.")},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "nested": lambda s: {"model": {"state_dict": s}, "optimizer": {"state": {0: torch.ones(3)}}},
    "without counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("arch, classes", [("wrn-10-1", 7), ("resnet18", 3)])
def test_foreign_names(arch, classes, tmp_path):
    """Wrapped, prefixed and differently named weights give the network they came from."""
    torch.manual_seed(0)
    model, x = common.make_model(arch, classes).eval(), torch.rand(2, 3, 16, 16)
    for style, wrap in WRAPPED.items():
        torch.save(wrap(as_others_do(model.state_dict(), arch)), tmp_path / "f.pt")
        found = loaded(tmp_path / "f.pt", arch, classes)
        assert torch.equal(found(x), model(x)) and not found.training, style


def test_standardised_images(tmp_path):
    """With --mean and --std the network gets (x - mean) / std of each channel."""
    torch.manual_seed(0)
    model, x = common.make_model("wrn-10-1", 4).eval(), torch.rand(2, 3, 16, 16)
    torch.save({"0.mean": torch.ones(3), **prefixed(model.state_dict(), "1.")}, tmp_path / "f.pt")
    found = loaded(tmp_path / "f.pt", "wrn-10-1", 4, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
    assert torch.allclose(found(x), model((x - mean) / std), atol=1e-6)


class Trap:
    """What a checkpoint can do to whoever unpickles it."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


@pytest.fixture
def refused(checkpoint, tmp_path, monkeypatch, capsys):
    """refused(content of a checkpoint, or a path, or None: the good one; *argv): the one line.

    Should nothing be refused, only FGSM on one image is run, unless argv says something else.
    """

    def run(content, *argv):
        path = checkpoint if content is None else content
        if not isinstance(path, Path):
            path = tmp_path / "bad.pt"
            torch.save(content, path)
        few = [] if "--n" in argv else ["--n", 1]
        few += [] if "--attacks" in argv else ["--attacks", "FGSM"]
        status, _, err = start(monkeypatch, capsys, path, *argv, *few)
        assert status == 2 and err.count("\n") == 1 and err.startswith("error: "), err
        assert "\033" not in err and "Traceback" not in err
        return err

    before = sorted(checkpoint.parent.iterdir())
    yield run
    assert sorted(checkpoint.parent.iterdir()) == before and not list(tmp_path.glob("*.eval.json"))


FOREIGN = ("--dataset", "shapes", "--arch", "wrn-10-1")
PGD_AND_CW = ("--attacks", "PGD-20", "CW")


def test_no_object_is_unpickled(refused, saved, tmp_path, monkeypatch):
    """A pickled object is refused in one line, and not executed, however harmless it is. The line
    has a command that saves the weights alone."""
    monkeypatch.chdir(tmp_path)
    assert "If you trust the file" in refused({"state_dict": Trap()}, *FOREIGN)
    assert not Path("trapped").exists()
    for other in (argparse.Namespace(lr=0.1), np.float64(83.1), nn.Linear(2, 2)):
        err = refused({"state_dict": saved["model"], "other": other}, *FOREIGN)
        assert type(other).__name__ in err or "numpy" in err
    assert "holds a Python object (torch.nn.modules.linear.Linear)" in refused(nn.Linear(2, 2))
    torch.save({"state_dict": saved["model"], "args": argparse.Namespace()}, "it's.pt")
    err = refused(Path("it's.pt"), *FOREIGN)
    _, option, program = shlex.split(err[err.index("python -c") :])
    assert option == "-c"
    exec(program)
    assert torch.equal(loaded("weights.pt", "wrn-10-1", 10).fc.weight, saved["model"]["fc.weight"])


def test_bad_arguments(refused, saved, checkpoint, tmp_path):
    """Mistakes in the command end in one line that names them and the remedy, and write nothing."""
    state = saved["model"]
    assert "--arch" in refused(state, "--dataset", "shapes")
    assert "--dataset" in refused(state, "--arch", "wrn-10-1")
    assert "--arch nn" in refused(state, "--arch", "nn", "--dataset", "shapes")
    assert "--arch wrn-100000-1000" in refused(state, *FOREIGN[:3], "wrn-100000-1000")
    assert "SPSA" in refused(None, "--attacks", "PGD20")
    assert "8/255" in refused(None, "--epsilon", "8")
    assert "give both" in refused(state, *FOREIGN, "--mean", ".5", ".5", ".5")
    for option in (
        ("--epsilon", "nan"),
        ("--n", 10**12),
        ("--seed", 1e39),
        ("--n", 0),
        ("--batch-size", 10**12),
        ("--std", 0, 1, 1),
        ("--epsilon", "1/0"),
    ):
        assert option[0] in refused(None, *option)
    assert "one checkpoint" in refused(None, checkpoint, "--out", tmp_path / "two.json")
    assert "PGD-20" in refused(None, "--figure1", checkpoint, "f.png")


def test_the_place_of_figure1(refused, saved, checkpoint, tmp_path):
    """Nothing but a PNG image is overwritten, and the place is tried before the attacks."""
    figure = (*PGD_AND_CW, "--figure1", checkpoint)
    assert "no file that ends in .png" in refused(None, *figure, tmp_path)
    for name in ("one.pt", "one.PNG.pt", "figure1", "f.jpg"):
        torch.save(saved, tmp_path / name)
        content = (tmp_path / name).read_bytes()
        err = refused(None, *figure, tmp_path / name)
        assert "no file that ends in .png" in err
        assert (tmp_path / name).read_bytes() == content
    torch.save(saved, tmp_path / "really.png")
    assert "is no PNG image" in refused(None, *figure, tmp_path / "really.png")
    (tmp_path / "empty.png").touch()
    assert "is no PNG image" in refused(None, *figure, tmp_path / "empty.png")
    assert "not writable" in refused(None, *figure, tmp_path / "absent" / "f.png")
    assert "not writable" in refused(None, *figure, "/proc/f.png")


def test_options_that_contradict_a_checkpoint_of_ours(refused, saved, tmp_path):
    """What a checkpoint of ours says of itself wins, also beside foreign weights."""
    standardise = ("--mean", ".5", ".5", ".5", "--std", ".2", ".2", ".2")
    foreign, ours = tmp_path / "foreign.pt", tmp_path / "ours.pt"
    torch.save(saved["model"], foreign)
    torch.save(saved, ours)
    assert "--mean is for foreign weights" in refused(None, *standardise)
    assert "--mean is for foreign weights" in refused(foreign, ours, *FOREIGN, *standardise)
    assert "--arch is for foreign weights" in refused(None, "--arch", "wrn-16-1")
    assert "--dataset is for foreign weights" in refused(None, "--dataset", "cifar10")
    assert "--method is for foreign weights" in refused(None, "--method", "TRADES")


def test_figure1s_network_has_all_checks(refused, saved, shapes, tmp_path, monkeypatch):
    """The natural network goes through the same door as every checkpoint, and must have the classes
    of the first one."""
    moved = shapes._replace(classes="abcdefghij")
    monkeypatch.setattr(common, "load_data", lambda _, place: moved if place == "b" else shapes)
    state, natural = saved["model"], tmp_path / "natural.pt"
    other = ["zebra", *saved["args"]["classes"][1:]]
    small = state | {"fc.weight": state["fc.weight"][:5], "fc.bias": state["fc.bias"][:5]}
    for content, word in (
        (saved | {"model": small}, "natural.pt: Error(s) in loading"),
        (saved | {"args": saved["args"] | {"classes": other}}, "zebra"),
        (saved | {"args": saved["args"] | {"dataset": "mnist"}}, "give --dataset"),
        (saved | {"args": saved["args"] | {"classes": [*"abcdefghij"], "data_dir": "b"}}, "'a'"),
        (saved | {"model": state | {"fc.bias": state["fc.bias"] * torch.nan}}, "not finite"),
        (state, "give --dataset and --arch"),
        (argparse.Namespace(), "Python object"),
    ):
        torch.save(content, natural)
        err = refused(None, *PGD_AND_CW, "--figure1", natural, tmp_path / "f.png")
        assert word in err and "natural.pt" in err, err


def test_other_networks_weights(refused, saved):
    """Weights that do not fit, mean two things, or are of a network that standardises its images
    are refused with the key in question."""
    state = saved["model"]
    weight, bias = state["fc.weight"], state["fc.bias"]
    renamed = {k.replace("conv1", "first"): v for k, v in state.items()}
    err = refused(renamed, *FOREIGN)
    assert 'Missing key(s) in state_dict: "conv1.weight", "block1.layer.0.conv1.weight"' in err
    unexpected = {k: v for k, v in state.items() if k != "fc.bias"} | {"fc.more": bias}
    err = refused(unexpected, *FOREIGN)
    assert 'Missing key(s) in state_dict: "fc.bias"' in err
    assert 'Unexpected key(s) in state_dict: "fc.more"' in err
    assert "size mismatch for block1" in refused(state, *FOREIGN[:3], "wrn-10-2")
    assert "fc.bias has values that are not finite" in refused(
        state | {"fc.bias": bias * torch.nan}, *FOREIGN
    )
    small = state | {"fc.weight": weight[:5], "fc.bias": bias[:5]}
    assert "size mismatch for fc.weight" in refused(small, *FOREIGN)
    for nothing in ({"epoch": 3}, [1, 2], torch.ones(3), {1: torch.ones(1), (1, 2): 3}):
        assert "holds no weights of this --arch" in refused(nothing, *FOREIGN)
    endless = {}
    endless["model"] = endless
    assert "holds no weights of this --arch" in refused(endless, *FOREIGN)
    double = state | {"linear.weight": weight * 0, "linear.bias": bias * 0}
    assert "linear.weight and another key mean fc.weight" in refused(double, *FOREIGN)
    assert "another key mean conv1.weight" in refused(state | prefixed(state, "module."), *FOREIGN)
    for several in ({"model": state, "ema": state}, {"model": state, "best": {"net": state}}):
        assert "2 state_dicts fit (file.model" in refused(several, *FOREIGN)
    own = {
        "mu": state | {"mu": torch.ones(3)},
        "normalize_input": {"net": state, "normalize_input": True},
        "0.mean": {"0.mean": torch.ones(3), **prefixed(state, "1.")},
    }
    for key, content in own.items():
        err = refused(content, *FOREIGN)
        assert key in err and "--mean and --std" in err
    assert 'Unexpected key(s) in state_dict: "1"' in refused({1: torch.ones(2), **state}, *FOREIGN)
    for odd in (
        weight.to_sparse(),
        torch.empty(10, 64, device="meta"),
        torch.tensor(1.0),
        [1],
        weight.long(),
        torch.zeros(1).expand(10**9, 64),
    ):
        assert "fc.weight" in refused(state | {"fc.weight": odd}, *FOREIGN)


def test_odd_files(refused, saved, checkpoint, tmp_path):
    """Whatever else a file holds is one line of ours; arguments are not believed blindly."""
    bad = tmp_path / "broken.pt"
    for content in (b"no checkpoint", b"", checkpoint.read_bytes()[:5000]):
        bad.write_bytes(content)
        assert "broken.pt: is no file of torch.save, or damaged" in refused(bad)
    assert "absent.pt: No such file" in refused(tmp_path / "absent.pt")
    for args, word in (
        ({"arch": ["wrn-10-1"]}, "args.arch"),
        ({"dataset": ["x"]}, "args.dataset"),
        ({"data_dir": torch.ones(2)}, "args.data_dir"),
        ({"tau": {}}, "args.tau"),
        ({"dataset": "mnist"}, "--dataset"),
        ({"classes": "ABC"}, "args.classes"),
        ({"classes": [1, {}]}, "classes [1, {}"),
        ({"arch": "nn"}, "--arch nn"),
    ):
        assert word in refused(saved | {"args": saved["args"] | args})


def test_data_of_the_checkpoint(refused, saved, checkpoint, tmp_path, monkeypatch, capsys):
    """A checkpoint is tested on its own classes only; other training images are pointed out."""
    classes = saved["args"]["classes"]
    renamed = saved["args"] | {"classes": ["zebra", *classes[1:]]}
    err = refused(saved | {"args": renamed})
    assert "zebra" in err and classes[0] in err and "--data-dir" in err
    swapped = saved["args"] | {"classes": classes[::-1]}
    assert "reordered" in refused(saved | {"args": swapped})
    other, command = tmp_path / "other.pt", ("--n", 5, "--attacks", "FGSM")
    torch.save(saved | {"args": saved["args"] | {"data": "4999 images"}}, other)
    out = ("--out", tmp_path / "o.json")
    assert "trained on other images" in start(monkeypatch, capsys, other, *command, *out)[1]
    assert "other images" not in start(monkeypatch, capsys, checkpoint, *command)[1]
    checkpoint.with_name("best.n5.eval.json").unlink()


@pytest.fixture
def results(checkpoint, tmp_path, monkeypatch, capsys):
    """(options, the file of results that they continue)."""
    out = tmp_path / "r.json"
    options = ("--n", 9, "--attacks", "FGSM", "--out", out)
    assert start(monkeypatch, capsys, checkpoint, *options)[0] == 0
    return options, out


@pytest.mark.parametrize("key", ["version", "epsilon", "seed", "weights", "images", "mean", "std"])
def test_each_setting_is_compared(key, refused, results):
    """Results with another value of a setting, or without it, are refused by its name, and kept."""
    options, out = results
    good = json.loads(out.read_text())
    assert set(good["settings"]) == set(
        ["version", "epsilon", "seed", "weights", "images", "mean", "std"]
    )
    without = {k: v for k, v in good["settings"].items() if k != key}
    for settings in (without, good["settings"] | {key: "other"}):
        out.write_text(json.dumps(good | {"settings": settings}))
        assert f"is of other {key}; move" in refused(None, *options)
        assert json.loads(out.read_text()) == good | {"settings": settings}


def test_settings_follow_from_the_command(refused, saved, results, tmp_path, monkeypatch):
    """Every option that changes predictions is in the settings, as are weights and images."""
    options, out = results
    old = out.read_text()
    assert "is of other epsilon" in refused(None, *options, "--epsilon", "1/255")
    assert "is of other seed" in refused(None, *options, "--seed", 3)
    assert "is of other images" in refused(None, "--n", 8, *options[2:])
    assert "is of other weights" in refused(perturbed(saved, 5), *options)
    torch.save(saved["model"], tmp_path / "foreign.pt")
    standardised = ("--mean", 0.5, 0.5, 0.5, "--std", 0.2, 0.2, 0.2)
    assert "is of other mean" in refused(tmp_path / "foreign.pt", *options, *FOREIGN, *standardised)
    monkeypatch.setattr(evaluate, "RESULTS_VERSION", 2)
    assert "is of other version" in refused(None, *options)
    assert out.read_text() == old


def test_results_are_not_believed_blindly(refused, checkpoint, results, monkeypatch, capsys):
    """A file of results is used only with predictions that can be."""
    options, out = results
    good = json.loads(out.read_text())
    found = good["prediction"]["FGSM"]

    def with_predictions(*values, name="FGSM"):
        return good | {"prediction": good["prediction"] | {name: [*values]}}

    for content in (
        [1, 2],
        {},
        good | {"settings": {}},
        good | {"settings": good["settings"] | {"more": 1}},
        good | {"prediction": None},
        with_predictions(),
        with_predictions(*found[1:]),
        with_predictions(999, *found[1:]),
        with_predictions(float("nan"), *found[1:]),
        with_predictions(-2, *found[1:]),
        with_predictions("1", *found[1:]),
        with_predictions(*found, name="PGD-10"),
    ):
        out.write_text(json.dumps(content))
        assert "r.json is " in refused(None, *options)
        assert json.dumps(json.loads(out.read_text())) == json.dumps(content)
    out.write_text(json.dumps(good))
    assert start(monkeypatch, capsys, checkpoint, *options)[0] == 0


def test_the_file_of_results_is_tried_first(refused, tmp_path, monkeypatch):
    """What will be written is tried before work begins."""
    monkeypatch.setattr(evaluate, "run_attack", lambda *_: 1 / 0)
    for out in (tmp_path, Path("/dev/full"), tmp_path / "absent" / "r.json"):
        assert str(out) in refused(None, "--out", out)


class BrokenGradient(torch.autograd.Function):
    """The identity, whose gradient is not a number."""

    @staticmethod
    def forward(ctx, logits):
        return logits.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan


def test_gradients_that_are_not_finite_are_no_robustness(images):
    """The sign of NaN moves no pixel: an attack on such a network ends in an error."""
    model = Wrapped(Flat(5), after=BrokenGradient.apply)
    x, y = correct(model, images[:2])
    for name in ("FGSM", "PGD-20", "CW", "APGD-CE", "APGD-T", "FAB-T"):
        with pytest.raises(FloatingPointError):
            attack(name, model, x, y)


def test_apgd_takes_every_loss(images):
    """Losses of logits and labels alone, as those of PGD and CW, are maximised too."""
    model = Flat(5)
    x, y = correct(model, images[:20])
    for loss in (evaluate.cross_entropy, evaluate.cw_loss):
        _, robust = attack("APGD-CE", model, x, y, 4 / 255, loss=loss)
        assert robust.sum() <= exact_robust(model, x, y, 4 / 255).sum() + 3


def test_logits_that_are_not_finite(refused, saved, tmp_path):
    """A network whose logits are not finite is not scored."""
    state = saved["model"]
    for key, value in (
        ("bn1.running_var", -state["bn1.running_var"]),
        ("fc.weight", 3e38 * state["fc.weight"].sign()),
    ):
        options = ("--attacks", "PGD-20", "--n", 20, "--out", tmp_path / f"{key}.json")
        err = refused(saved | {"model": state | {key: value}}, *options)
        assert "logits of a network are not finite" in err and "--mean and --std" in err

    class Brink(Flat):  # finite on the image itself, not on an attack's way
        def forward(self, x):
            return super().forward(x) + 0 / ((x - 0.5).abs().amax() < 1e-3)

    brink = Brink(3)
    x, y = correct(brink, torch.full((1, 3, 8, 8), 0.5))
    for name in ("FGSM", "PGD-20", "CW", "APGD-CE", "APGD-T", "FAB-T", "SQUARE", "SPSA"):
        with pytest.raises(FloatingPointError):
            evaluate.logits_of(brink, ATTACKS[name](brink, x, y, 0.1, generators(1)))


def test_no_pass_is_larger_than_the_batch(checkpoint, monkeypatch, capsys, tmp_path):
    """--batch-size bounds every pass through the network: attacks, SPSA's queries, the checks,
    Figure 1."""
    rows, forward = [], type(common.make_model("wrn-10-1", 10)).forward

    def spy(model, x):
        rows.append(len(x))
        return forward(model, x)

    monkeypatch.setattr(type(common.make_model("wrn-10-1", 10)), "forward", spy)
    monkeypatch.setattr(evaluate, "BATCH_SIZE", evaluate.BATCH_SIZE)  # put back afterwards
    monkeypatch.setitem(ATTACKS, "SPSA", partial(evaluate.spsa, steps=1))
    command = (checkpoint, "--n", 24, "--batch-size", 7, "--attacks", "PGD-20", "CW", "SPSA")
    command += ("--epsilon", "1/255", "--out", tmp_path / "r.json")
    figure = ("--figure1", checkpoint, tmp_path / "f.png")
    status, _, _ = start(monkeypatch, capsys, *command, *figure)
    assert status == 0 and max(rows) == 7


def test_torchrun_gives_the_same(checkpoint, tmp_path, monkeypatch, capsys):
    """Two processes, each with half of the images, write the file that one process writes."""
    command = [checkpoint, "--n", 31, "--attacks", "PGD-20", "CW", "--epsilon", "1/255"]
    command += ["--device", "cpu"]  # a machine with one GPU has none for the second process
    assert start(monkeypatch, capsys, *command, "--out", tmp_path / "one.json")[0] == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*torchrun, "--", PROGRAM, *map(str, command), "--out", tmp_path / "two.json"]
    two = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ONE_THREAD)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("| Method |") == two.stdout.count("SUSPECT no") + 1 == 1
    one, two = (json.loads((tmp_path / f).read_text()) for f in ("one.json", "two.json"))
    assert one == two
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one.json", "two.json"]
