"""evaluate.py: attacks on networks whose answer is known, independence of the batch, checkpoints of
other people, results that are continued after a kill, the table, the checks, Figure 1.

tests/test_attacks.py compares the attacks with other implementations.
"""

import argparse
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import Normalize

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


@pytest.fixture(autouse=True)
def put_back(monkeypatch):
    """What evaluate.main() sets is put back, so that no test depends on those before it."""
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 64)
    for name in ("benchmark", "allow_tf32"):
        monkeypatch.setattr(torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))


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
    """Ten coarse patterns of varying contrast in noise, 16 x 16, as train and test split."""
    torch.manual_seed(0)
    y, contrast = torch.arange(900) % 10, torch.rand(900, 1, 1, 1) * 0.12 + 0.02
    pattern = F.interpolate(torch.randn(10, 3, 4, 4).sign(), scale_factor=4)
    x = (0.5 + contrast * pattern[y] + 0.1 * torch.randn(900, 3, 16, 16)).clamp(0, 1)
    x = (255 * x).round().byte()
    classes = [str(c) for c in range(10)]
    return [common.Data(x[part], y[part], classes) for part in (slice(600), slice(600, None))]


@pytest.fixture(scope="module")
def robust_net(patterns):
    """A small convolutional network after a few seconds of adversarial training."""
    torch.manual_seed(0)
    train, _ = patterns
    net = nn.Sequential(
        nn.Conv2d(3, 12, 5, 2, 2),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 16, 10),
    )
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(10):
        for batch in torch.randperm(600).split(100):
            x, y = common.to_float(train.x[batch]), train.y[batch]
            x_adv = common.pgd(net, x, partial(F.cross_entropy, target=y), 4 / 255, 2 / 255, 3)
            optimizer.zero_grad()
            F.cross_entropy(net(x_adv), y).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def right(robust_net, patterns):
    """The first 30 test images that it classifies correctly."""
    x, y = common.to_float(patterns[1].x), patterns[1].y
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
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        d = evaluate.to_hyperplane(x, w, gap)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
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


def test_random_numbers():
    """Uniform, independent over images, draws, attacks and seeds; the same in any batch, and the
    same in every version (numpy documents SeedSequence's values)."""

    def draw(own):
        return evaluate.uniform(torch.empty(0), own, 50)

    own = generators(400, 0, "PGD-20")
    u, again = draw(own), draw(own)
    assert u.shape == (400, 50) and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002
    others = [again, draw(generators(400, 0, "CW")), u.roll(1, 0), u.roll(1, 1)]
    for other in (*others, draw(generators(400, 1, "PGD-20"))):
        assert abs(np.corrcoef(u.flatten(), other.flatten())[0, 1]) < 0.03
    rows = torch.tensor([7, 300])
    assert torch.equal(draw(evaluate.generators_of(0, "PGD-20", rows, "cpu")), u[rows])
    assert own[7].initial_seed() == 2476146383030287998


def shorten(monkeypatch, steps):
    """APGD-T and FAB-T take fewer steps towards each target."""
    dlr = partial(evaluate.apgd, loss=evaluate.dlr_targeted)
    for name, inner in (("APGD-T", dlr), ("FAB-T", evaluate.fab)):
        short = partial(evaluate.each_target, partial(inner, steps=steps))
        monkeypatch.setitem(ATTACKS, name, short)


@pytest.mark.parametrize("name", [*ATTACKS, "AA"])
def test_attacks_as_copied_functions(name, images):
    """They take any function of images, are the same inside no_grad, leave nothing behind in
    weights that need gradients, and take a batch of no images. What they return is a constant."""
    model = Flat(3).requires_grad_()
    x, y = correct(model, images[:4])

    def call(n):
        if name == "AA":
            return evaluate.autoattack(lambda x: model(x), x[:n], y[:n])
        return ATTACKS[name](lambda x: model(x), x[:n], y[:n], EPSILON, generators(n))

    with torch.no_grad():
        inside = call(4)
    outside = call(4)
    assert torch.equal(inside, outside) and not (inside.requires_grad or outside.requires_grad)
    assert name == "Clean" or (inside != x).any()
    assert call(0).shape == x[:0].shape
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_autoattack(tmp_path, monkeypatch):
    """AA is APGD-CE, APGD-T, FAB-T and SQUARE in this order, each on what the ones before left.
    The function autoattack() and the command, whatever its --batch-size, give each attack the same
    images, radius and random numbers, by default too, and so come to the same verdicts.

    Here the random numbers alone decide whether an attack breaks an image.
    """
    assert AA == ("APGD-CE", "APGD-T", "FAB-T", "SQUARE")
    bright = (torch.arange(300) % 7 == 0).byte()  # these are wrong before the attack
    x = torch.full((300, 3, 8, 8), 100, dtype=torch.uint8)
    x[:, 0, 0, 0] += 20 * bright
    x[:, 0, 0, 1] = (torch.arange(300) % 256).byte()
    x[:, 0, 0, 2] = (torch.arange(300) // 256).byte()
    y, calls = torch.zeros(300, dtype=torch.long), []

    def model(x):
        return F.one_hot((x[:, 0, 0, 0] > 0.41).long(), 2).float()

    def by_chance(name):
        def fake(network, x, y, epsilon, generators):
            images = (x[:, 0, 0, 1] + 256 * x[:, 0, 0, 2]).mul(255).round().long().tolist()
            seeds = [g.initial_seed() for g in generators]
            calls.append([(name, epsilon, *pair) for pair in zip(images, seeds)])
            x_adv = x.clone()
            x_adv[:, 0, 0, 0] += epsilon * (evaluate.uniform(x, generators, 1)[:, 0] < 0.3)
            return x_adv

        return fake

    for name in AA:
        monkeypatch.setitem(ATTACKS, name, by_chance(name))
    outcomes = []
    for options, given in (((), ()), (("--epsilon", "10/255", "--seed", 3), (10 / 255, 3))):
        x_adv = evaluate.autoattack(model, common.to_float(x), y, *given)
        alone = sum(calls, [])
        calls.clear()
        args = arguments(monkeypatch, "x.pt", *options)
        e = evaluation(model, x, y, tmp_path / f"{len(given)}.json", args.epsilon, args.seed)
        monkeypatch.setattr(evaluate, "BATCH_SIZE", 7)
        e.run("Clean")
        e.run("AA")
        assert sum(calls, []) == alone and len(calls) > 12
        calls.clear()
        verdict = e.robust("Clean", *AA)
        assert torch.equal(model(x_adv).argmax(1) == y, verdict)
        assert e.accuracies() == {"Clean": 100 * 257 / 300, "AA": 100 * int(verdict.sum()) / 300}
        sizes = [sum(name == call[0] for call in alone) for name in AA]
        assert sizes[0] == 257 and sizes[0] > sizes[1] > sizes[2] > sizes[3] > verdict.sum() > 30
        outcomes.append(verdict)
    assert not torch.equal(*outcomes)


def test_no_image_beyond_the_box_counts(tmp_path, monkeypatch):
    """An attack that leaves the box of epsilon, or the range from 0 to 1, ends in an error."""
    x, y = torch.full((2, 3, 8, 8), 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.long)
    model = Flat(3)
    for shift, allowed in ((8, True), (8.1, False), (-3, True), (-3.1, False)):
        monkeypatch.setitem(ATTACKS, "FGSM", lambda model, x, *others: x + shift / 255)
        e = evaluation(model, x, y, tmp_path / f"{shift}.json")
        e.prediction["Clean"] = y
        with nullcontext() if allowed else pytest.raises(AssertionError):
            e.run("FGSM")


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
def test_independent_of_batch_and_order(name, options, robust_net, right, monkeypatch):
    """What happens to an image does not depend on batch, order or neighbours."""
    shorten(monkeypatch, 25)
    x, y, n = right[0][:6], right[1][:6], 6
    together = attack(name, robust_net, x, y, **options)[0]
    rows = torch.arange(n).flip(0)
    for batch in (rows[:2], rows[2:3], rows[3:]):
        apart = attack(name, robust_net, x[batch], y[batch], index=batch, **options)[0]
        same = (apart - together[batch]).abs().amax((1, 2, 3)) < 1e-3
        assert same.float().mean() >= 0.8, name  # rounding may turn a vanishing gradient's sign
    other_seed = attack(name, robust_net, x, y, seed=1, **options)[0]
    assert name == "FAB-T" or not torch.allclose(other_seed, together, atol=1e-3)


# --------------------------------------------------------------------------------- the whole thing
@pytest.fixture(scope="module")
def shapes():
    """Its two splits, drawn once for all the tests below."""
    return {split: common.drawn_shapes(None, split, False) for split in ("train", "test")}


@pytest.fixture
def read(shapes, monkeypatch):
    """folders: {name of a folder: data set} of which "shapes" is read, elsewhere it is as drawn.
    calls: a list of what was read, (folder, split, may it be downloaded)."""
    read = SimpleNamespace(calls=[], folders={})

    def reader(root, split, download):
        read.calls.append((str(root), split, bool(download)))
        return read.folders.get(root.name, shapes[split])

    monkeypatch.setitem(common.DATASETS, "shapes", reader)
    return read


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes):
    """best.pt of a tiny WideResNet, briefly trained on shapes and written as the scripts do."""
    torch.manual_seed(0)
    model = common.make_model("wrn-10-1", 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9)
    train = shapes["train"]
    for batch in torch.randperm(2000).split(50):
        optimizer.zero_grad()
        F.cross_entropy(model(common.to_float(train.x[batch])), train.y[batch]).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("run") / "best.pt"
    args = trained_by(train_lma_at, "--dataset", "shapes")
    args |= {"classes": train.classes, "data": common.fingerprint(train.x, train.y)}
    torch.save({"model": model.state_dict(), "epoch": 1, "done": 3, "args": args}, path)
    return path


@pytest.fixture
def checkpoint(trained, read, tmp_path):
    """A copy of it in a folder of its own."""
    path = tmp_path / "run" / "best.pt"
    path.parent.mkdir()
    path.write_bytes(trained.read_bytes())
    return path


@pytest.fixture
def saved(trained):
    """What it holds."""
    return torch.load(trained, weights_only=True)


def trained_by(script, *options):
    """The arguments that a training script saves for these options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, options)])
        return vars(script.parse_args())


def perturbed(saved, seed, scale=1e-4, **args):
    """The same checkpoint after training with another seed: its weights differ a little."""
    g = torch.Generator().manual_seed(seed)
    state = {k: v for k, v in saved["model"].items() if v.dim()}
    state = {k: v * (1 + scale * torch.randn(v.shape, generator=g)) for k, v in state.items()}
    return saved | {"model": saved["model"] | state, "args": saved["args"] | {"seed": seed} | args}


def arguments(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    return evaluate.parse_args()


def subject(path, monkeypatch, *argv):
    """An Evaluation in this process."""
    args = arguments(monkeypatch, path, *argv)
    checkpoint = evaluate.read_checkpoint(path, args)
    return evaluate.Evaluation(checkpoint, args, torch.device("cpu"))


def evaluation(model, x, y, out=None, epsilon=EPSILON, seed=0):
    """An Evaluation of any function on any images (uint8), of which no image has been tried."""
    e = evaluate.Evaluation.__new__(evaluate.Evaluation)
    e.model, e.images, e.label, e.out = model, x, y, out
    e.index, e.device = torch.arange(len(x)), torch.device("cpu")
    e.settings = {"epsilon": epsilon, "seed": seed}
    e.prediction = {name: torch.full_like(y, -1) for name in ATTACKS}
    return e


def start(monkeypatch, capsys, *argv):
    """evaluate.main() in this process: (exit status, stdout, stderr)."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    status = 0
    try:
        common.run(evaluate.main, "as it is")
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def results(folder):
    """What the only file of results in a folder holds."""
    (path,) = folder.glob("*.eval.json")
    return json.loads(path.read_text())


def test_the_table(checkpoint, monkeypatch, capsys):
    """Columns in the paper's order with Wilson's interval. AA is at most each of its parts. The
    file has the prediction for every image and what the table says, to the last digit."""
    monkeypatch.setitem(ATTACKS, "APGD-CE", partial(evaluate.apgd, steps=5))
    shorten(monkeypatch, 3)
    monkeypatch.setitem(ATTACKS, "SQUARE", partial(evaluate.square, queries=30))
    command = (checkpoint, "--n", 20, "--epsilon", "1/255", "--attacks", "SQUARE", "AA", "FGSM")
    status, text, _ = start(monkeypatch, capsys, *command)
    assert status == 0 and "| Method | Clean | FGSM | AA | SQUARE |" in text
    file = results(checkpoint.parent)
    robust = {
        name: [p == y for p, y in zip(predictions, file["label"], strict=True)]
        for name, predictions in file["prediction"].items()
    }
    aa = [all(robust[name][i] for name in AA) for i in range(20)]
    accuracy = {name: 100 * sum(robust[name]) / 20 for name in ("Clean", "FGSM", "SQUARE")}
    accuracy["AA"] = 100 * sum(aa) / 20
    assert file["accuracy"] == accuracy and accuracy["AA"] == min(accuracy.values())
    cells = [wilson(round(accuracy[c] / 5), 20) for c in ("Clean", "FGSM", "AA", "SQUARE")]
    assert f"| lma_at ({checkpoint}) | {' | '.join(cells)} |" in text
    assert file.keys() == {"settings", "accuracy", "index", "label", "prediction"}
    assert file["prediction"].keys() == ATTACKS.keys()


def test_the_file_holds_all_calls(checkpoint, monkeypatch, capsys):
    """A second call with other attacks keeps the predictions and accuracies of the first, and what
    is only half done has no accuracy."""
    command = (checkpoint, "--n", 20, "--attacks")
    start(monkeypatch, capsys, *command, "FGSM")
    first = results(checkpoint.parent)
    e = subject(checkpoint, monkeypatch, "--n", 20)
    e.save()
    assert results(checkpoint.parent) == first
    e.prediction["SPSA"][3] = 0
    e.prediction["APGD-CE"] = e.label.clone()
    e.save()
    assert start(monkeypatch, capsys, *command, "PGD-20")[0] == 0
    both = results(checkpoint.parent)
    assert list(both["accuracy"]) == ["Clean", "FGSM", "PGD-20"]
    assert both["accuracy"].items() > first["accuracy"].items()
    assert both["prediction"]["FGSM"] == first["prediction"]["FGSM"]
    assert both["prediction"]["SPSA"] == [-1, -1, -1, 0, *[-1] * 16]
    assert both["prediction"]["APGD-CE"] == both["label"]


def test_two_evaluations_at_once(checkpoint, monkeypatch):
    """Each keeps what the other has written meanwhile, and does not do it again."""
    one, two = (subject(checkpoint, monkeypatch, "--n", 10) for _ in range(2))
    for e, columns in ((one, ["Clean", "FGSM"]), (two, ["Clean", "PGD-20"]), (one, ["CW"])):
        for column in columns:
            e.run(column)
    assert list(results(checkpoint.parent)["accuracy"]) == ["Clean", "FGSM", "PGD-20", "CW"]
    assert not one.to_do("PGD-20").any()


def test_resume_after_kill(checkpoint, tmp_path, monkeypatch, capsys):
    """Killed in the middle of an attack, the same command goes on there and ends with the same
    predictions."""
    command = [checkpoint, "--n", 30, "--attacks", "PGD-20", "CW", "--batch-size", 1]
    command += ["--epsilon", "1/255"]
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    assert start(monkeypatch, capsys, *command, "--out", whole)[0] == 0
    whole = json.loads(whole.read_text())

    def done(name):
        content = json.loads(cut.read_text()) if cut.exists() else {"prediction": {name: []}}
        return sum(p >= 0 for p in content["prediction"][name])

    process = subprocess.Popen(
        [sys.executable, PROGRAM, *map(str, command), "--out", str(cut)],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=ONE_THREAD,
    )
    while done("PGD-20") < 4 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = done("PGD-20")
    pairs = zip(whole["prediction"]["Clean"], whole["label"], strict=True)
    right = sum(p == y for p, y in pairs)
    assert 4 <= before < right and done("CW") == 0

    attacked = []
    pgd = evaluate.pgd_attack
    monkeypatch.setitem(
        ATTACKS, "PGD-20", lambda *args: attacked.append(len(args[1])) or pgd(*args)
    )
    assert start(monkeypatch, capsys, *command, "--out", cut)[0] == 0
    assert json.loads(cut.read_text()) == whole and sum(attacked) == right - before


def test_torchrun_gives_the_same(checkpoint, tmp_path, monkeypatch, capsys):
    """Two processes, each with half of the images, write the file that one process writes."""
    command = [checkpoint, "--n", 31, "--attacks", "PGD-20", "CW", "--epsilon", "1/255"]
    command += ["--device", "cpu"]  # a machine with one GPU has none for the second process
    assert start(monkeypatch, capsys, *command, "--out", tmp_path / "one.json")[0] == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*torchrun, "--", PROGRAM, *map(str, command), "--out", tmp_path / "two.json"]
    two = subprocess.run(command, capture_output=True, text=True, timeout=600, env=ONE_THREAD)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("| Method |") == 1 and "SUSPECT no image" not in two.stdout
    one, two = (json.loads((tmp_path / f).read_text()) for f in ("one.json", "two.json"))
    assert one == two
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one.json", "run", "two.json"]


def test_a_line_that_moves(tmp_path, monkeypatch):
    """A terminal sees within an attack how many images are done and how many the network saw."""
    shown, now = [], [0.0]
    monkeypatch.setattr(common, "live", shown.append)
    monkeypatch.setattr(evaluate, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 2)

    def second(x):
        now[0] += 1
        return x

    model = Wrapped(Flat(3), before=second)
    x, y = torch.zeros(12, 3, 8, 8, dtype=torch.uint8), torch.zeros(12, dtype=torch.long)
    e = evaluation(model, x, y, tmp_path / "r.json")
    e.run("Clean")
    shown.clear()
    e.run("FGSM")
    assert "FGSM: 0 of 12 images done, the network has seen 6" in shown
    assert "FGSM: 8 of 12 images done, the network has seen 24" in shown and shown[-1] == ""


# ------------------------------------------------------------------- which images, which settings
def test_the_images_are_drawn_among_all(checkpoint, shapes, monkeypatch):
    """The n images of --n are spread over the test set, as the first n of a folder would be of its
    first class; they are the same in every call, and among those of a larger n. Random numbers
    follow from their place in the test set. Without --n, or where there are fewer, it is all."""
    test = shapes["test"]
    few, more = (subject(checkpoint, monkeypatch, "--n", n) for n in (50, 200))
    same = subject(checkpoint, monkeypatch, "--n", 50, "--seed", 1)
    assert torch.equal(few.index, same.index) and len(few.index.unique()) == 50
    assert len(set((few.index // 100).tolist())) > 8
    assert set(few.index.tolist()) < set(more.index.tolist())
    assert len(more.index.unique()) == 200
    for e in (few, more):
        assert torch.equal(e.batch(torch.tensor([7, 3]))[2], e.index[[7, 3]])
        assert torch.equal(e.images, test.x[e.index]) and torch.equal(e.label, test.y[e.index])
    for options in ((), ("--n", 2000)):
        e = subject(checkpoint, monkeypatch, *options)
        assert torch.equal(e.index, torch.arange(1000)) and torch.equal(e.images, test.x)


@pytest.mark.parametrize("ours", [True, False])
def test_where_the_images_are_read(ours, saved, read, shapes, tmp_path, monkeypatch):
    """--data-dir wins over the place that the checkpoint names. The test split alone is read. To a
    place on the machine of the training nothing is downloaded."""
    saved["args"]["data_dir"] = "/there/data"
    path, options = tmp_path / "c.pt", () if ours else FOREIGN
    torch.save(saved if ours else saved["model"], path)
    dark = read.folders["dark"] = shapes["test"]._replace(x=shapes["test"].x // 4)
    e = subject(path, monkeypatch, *options)
    first = ("/there/data", "test", False) if ours else ("data", "test", True)
    assert read.calls == [first] and torch.equal(e.images, shapes["test"].x)
    e = subject(path, monkeypatch, *options, "--data-dir", "here/dark")
    assert read.calls == [first, ("here/dark", "test", True)] and torch.equal(e.images, dark.x)


def test_the_place_of_the_data_is_on_another_machine(refused, saved, tmp_path):
    """One line says where the images are not, and names --data-dir. No folder is made there."""
    saved["args"] |= {"dataset": "cifar10", "data_dir": str(tmp_path / "there" / "data")}
    err = refused(saved)
    assert f"{tmp_path}/there/data" in err and "--data-dir" in err
    assert not (tmp_path / "there").exists()


HALF, FIFTH = ("--mean", 0.5, 0.5, 0.5), ("--std", 0.2, 0.2, 0.2)
CHANGES = {
    "epsilon": ("--epsilon", "7/255"),
    "seed": ("--seed", 1),
    "n": ("--n", 8),
    "mean and std": (*HALF, *FIFTH),
    "mean": ("--mean", 0.5, 0.5, 0.4, *FIFTH),
    "std": (*HALF, "--std", 0.2, 0.2, 0.3),
    "pixel": ("--data-dir", "pixel"),
    "label": ("--data-dir", "label"),
    "order": ("--data-dir", "order"),
    "weights": (),
    "statistics": (),
    "version": (),
}


def test_results_belong_to_their_settings(saved, read, shapes, tmp_path, monkeypatch, refused):
    """The same settings continue the same file. Whatever decides predictions gives another one: an
    option, a weight, batch norm's statistics, the version, a pixel, a label, the order of the
    images. A file that is named by --out and is of other settings is refused, and kept."""
    nine = shapes["test"]._replace(x=shapes["test"].x[:9], y=shapes["test"].y[:9])
    pixel, label = nine.x.clone(), nine.y.clone()
    pixel[4, 2, 31, 31] ^= 1
    label[4] = (label[4] + 1) % 10
    order = nine._replace(x=nine.x.flip(0), y=nine.y.flip(0))
    changed = {"pixel": nine._replace(x=pixel), "label": nine._replace(y=label), "order": order}
    read.folders |= changed | {"data": nine}
    path, out = tmp_path / "best.pt", tmp_path / "r.json"
    torch.save(saved["model"], path)
    for change, name in {"weights": "fc.bias", "statistics": "bn1.running_var"}.items():
        torch.save(saved["model"] | {name: saved["model"][name] + 1e-6}, tmp_path / f"{change}.pt")
    e = subject(path, monkeypatch, *FOREIGN, "--out", out)
    e.save()
    before, own = out.read_bytes(), subject(path, monkeypatch, *FOREIGN).out
    harmless = ("--n", 99, "--attacks", "FGSM", "--batch-size", 7, "--method", "TRADES")
    assert own == subject(path, monkeypatch, *FOREIGN, *harmless).out
    assert own.parent == tmp_path and re.fullmatch(r"best\.[0-9a-f]{8}\.eval\.json", own.name)
    suffixes = {own.name[-18:]}
    for change, options in CHANGES.items():
        if change == "version":
            monkeypatch.setattr(evaluate, "RESULTS_VERSION", evaluate.RESULTS_VERSION + 1)
        other = tmp_path / f"{change}.pt"
        source = other if other.exists() else path
        suffixes.add(subject(source, monkeypatch, *FOREIGN, *options).out.name[-18:])
        err = refused(source, *FOREIGN, "--n", 99, *options, "--out", out)
        assert f"{out} is of other weights" in err and out.read_bytes() == before, change
    assert len(suffixes) == 1 + len(CHANGES)


def test_out_that_is_none_of_ours(refused, tmp_path):
    """A file that is damaged, or something else, is refused and kept."""
    out = tmp_path / "r.json"
    for content in (
        b"",
        b'{"settings": {"vers',
        b"notes",
        b"\x89PNG\r\n",
        b"{}",
        b'{"settings": {}}',
    ):
        out.write_bytes(content)
        assert f"{out} is " in refused(None, "--out", out) and out.read_bytes() == content


def test_the_place_of_the_results_is_tried_first(refused, checkpoint, tmp_path, monkeypatch):
    """What will be written is tried before work begins, and --out is named where it cannot be."""
    monkeypatch.setattr(evaluate.Evaluation, "run", lambda *_: 1 / 0)
    for out in (tmp_path / "absent" / "r.json", Path("/proc/r.json")):
        err = refused(None, "--out", out)
        assert str(out) in err and "another place by --out" in err
    assert str(tmp_path) in refused(None, "--out", tmp_path)


def test_one_batch_size_for_one_command(checkpoint, monkeypatch, capsys):
    """--batch-size holds for its own call of main(): the next call without it has 64 on a CPU."""
    command = (checkpoint, "--attacks", "FGSM", "--n", 3, "--device", "cpu")
    for options, size in ((("--batch-size", 1), 1), ((), 64)):
        assert start(monkeypatch, capsys, *command, *options)[0] == 0
        assert evaluate.BATCH_SIZE == size


def test_no_pass_is_larger_than_the_batch(checkpoint, monkeypatch, capsys):
    """--batch-size bounds every pass through the network: attacks, SPSA's queries, the checks,
    Figure 1."""
    rows, forward = [], common.WideResNet.forward
    monkeypatch.setattr(
        common.WideResNet, "forward", lambda model, x: rows.append(len(x)) or forward(model, x)
    )
    monkeypatch.setitem(ATTACKS, "SPSA", partial(evaluate.spsa, steps=1))
    command = (checkpoint, "--n", 24, "--batch-size", 7, "--attacks", "SPSA", "--epsilon", "1/255")
    status, _, _ = start(monkeypatch, capsys, *command, "--figure1", checkpoint)
    assert status == 0 and max(rows) == 7


def test_tf32_and_the_choice_of_kernels_are_off(checkpoint, monkeypatch, capsys):
    """Both would make the result of an image depend on the other images of its batch."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    assert start(monkeypatch, capsys, checkpoint, "--attacks", "FGSM", "--n", 1)[0] == 0
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cudnn.benchmark


# --------------------------------------------------------------------- the table, the paper's rows
class Run(SimpleNamespace):
    """An evaluation of n images, as far as the table looks at it."""

    cell = evaluate.Evaluation.cell

    def accuracies(self):
        return self.percent


def run(path, seed, method="TRADES", n=100, **percent):
    trained = {"seed": seed, "dataset": "cifar10", "arch": "resnet18", "data": "same"}
    label, settings = range(n), {"epsilon": EPSILON}
    return Run(
        path=path,
        name="at",
        paper_row=method,
        trained=trained,
        percent=percent,
        label=label,
        settings=settings,
    )


def wilson(k, n):
    """k of n images in percent and Wilson's interval: the p for which k is 1.96 deviations off."""
    low, high = sorted(np.roots([n + 1.96**2, -(2 * k + 1.96**2), k**2 / n]))
    return f"{100 * k / n:.2f} [{abs(100 * low):.1f}, {100 * high:.1f}]"


def test_wilson():
    """36 of 40 give 76.9 to 96.0; other cells by the roots of the interval's equation."""
    assert wilson(36, 40) == "90.00 [76.9, 96.0]"
    for k, n in ((0, 10), (10, 10), (1, 7), (36, 40), (50, 100), (9800, 10000)):
        assert run("a.pt", 0, n=n, AA=100 * k / n).cell("AA") == wilson(k, n)


@pytest.mark.parametrize("n", range(2, 11))
def test_student(n):
    """2.5 % of Student's distribution with n - 1 degrees of freedom, integrated numerically, lie
    above the constant."""
    angle = np.linspace(0, np.pi / 2, 1_000_001)  # t = sqrt(n - 1) tan(angle)
    density = np.cos(angle) ** (n - 2)
    t = evaluate.STUDENT_T[n - 2]
    above = density[angle > np.arctan(t / np.sqrt(n - 1))].sum() / density.sum() / 2
    assert above == pytest.approx(0.025, abs=2e-5) and len(evaluate.STUDENT_T) == 9


@pytest.mark.parametrize("n, t", [(2, 12.706), (3, 4.303), (4, 3.182), (10, 2.262), (12, 2.262)])
def test_a_mean_over_seeds(n, t):
    """The mean of all seeds with half of Student's 95 % interval, and the paper's row with the
    differences of the means. More runs than the table has take its last constant."""
    clean = [80.0, 83, 81, 88, 90, 71, 75, 60, 92, 85, 44, 52][:n]
    runs = [run(f"{k}.pt", k, Clean=c, AA=49.0) for k, c in enumerate(clean)]
    half = t * np.sqrt(sum((c - sum(clean) / n) ** 2 for c in clean) / (n - 1) / n)
    mean = sum(clean) / n
    text = evaluate.table(runs, ["Clean", "AA"])
    assert text.startswith("| Method | Clean | AA |\n| --- | --- | --- |\n| at (0.pt) |")
    assert f"| at (0.pt) | {wilson(80, 100)} | {wilson(49, 100)} |" in text
    assert f"| at, mean of {n} | {mean:.2f} ± {half:.2f} | 49.00 ± 0.00 |" in text
    paper = f"82.46 ({mean - 82.46:+.2f}) | 49.08 (-0.08) |"
    assert text.endswith(f"| paper, TRADES (difference) | {paper}") and text.count("paper") == 1


def test_two_runs_of_one_seed_count_as_one():
    """The first of them counts; each has a row. One run alone has no mean."""
    runs = [run("a.pt", 0, Clean=82.0), run("b.pt", 1, Clean=84.0), run("c.pt", 1, Clean=90.0)]
    text = evaluate.table(runs, ["Clean"])
    assert "| at, mean of 2 | 83.00 ± 12.71 |" in text and "| at (c.pt) | 90.00 " in text
    assert "mean of" not in evaluate.table(runs[1:], ["Clean"])


def test_columns_that_the_paper_has_not():
    """Table 2 has no FGSM: a dash stands there."""
    text = evaluate.table(
        [run("a.pt", 0, "lma_at tau=0", Clean=80.0, FGSM=60.0)], ["Clean", "FGSM"]
    )
    assert text.endswith("| paper, lma_at tau=0 (difference) | 79.33 (+0.67) | - |")


def test_which_runs_make_a_mean(saved, read, tmp_path, monkeypatch, capsys):
    """A mean is of the runs that differ in the seed alone: in no option of the training, be it in
    the paper or not, nor in network, training images or the number of processes,
    on which batch norm depends."""
    kinds = {
        "lma_at": {},
        "lma_at tau=0.9": {"changed": {"tau": 0.9}},
        "lma_at beta=1": {"changed": {"beta": 1.0}},
        "lma_at beta=2": {"changed": {"beta": 2.0}},
        "lma_at amp=True": {"changed": {"amp": True}},
        "at_ours": {"method": "at_ours"},
        "other images": {"data": "5000 images of 32x32, checksum 0"},
        "other data set": {"dataset": "folder"},
        "other arch": {"arch": "wrn-16-1"},
        "other processes": {"processes": 2},
    }
    paths, seed, expected = [], 0, []
    wide = common.make_model("wrn-16-1", 10).state_dict()
    monkeypatch.setitem(common.DATASETS, "folder", common.DATASETS["shapes"])
    for n, (kind, args) in zip((3, 2, 1, 2, 1, 2, 1, 1, 1, 1), kinds.items(), strict=True):
        for _ in range(n):
            content = perturbed(saved, seed, 0.1, **args)
            paths.append(tmp_path / f"{seed}.pt")
            torch.save(content | {"model": wide} if "arch" in args else content, paths[-1])
            seed += 1
        expected += [f"{kind}, mean of {n}"] if n > 1 else []
    first = paths[:3]
    paths = paths[::2] + paths[1::2]
    status, text, _ = start(monkeypatch, capsys, *paths, "--attacks", "FGSM", "--n", 60)
    assert status == 0
    assert sorted(re.findall(r"[^|]+, mean of \d", text)) == sorted(f" {line}" for line in expected)
    clean = []
    for path in first:
        (out,) = tmp_path.glob(f"{path.stem}.*.eval.json")
        clean.append(json.loads(out.read_text())["accuracy"]["Clean"])
    assert f"| lma_at, mean of 3 | {np.mean(clean):.2f} ± " in text


def test_an_unfinished_run_says_so(saved, read, tmp_path, monkeypatch, capsys):
    """It is no part of a mean of finished runs, and is not compared with the paper's row."""
    row = ("shapes", "wrn-10-1", "LMA-AT(Ours)")
    monkeypatch.setitem(evaluate.ROWS, row, {"Clean": 12.5, "FGSM": 10.0})
    for seed, done in ((0, 3), (1, 2), (2, 3)):
        torch.save(perturbed(saved, seed) | {"done": done}, tmp_path / f"{seed}.pt")
    command = (*sorted(tmp_path.iterdir()), "--attacks", "FGSM", "--n", 5)
    status, text, _ = start(monkeypatch, capsys, *command)
    assert status == 0 and text.count("(difference)") == 1
    assert "| lma_at, mean of 2 |" in text and "| lma_at after 2 of 3 epochs (" in text


@pytest.mark.parametrize(
    "options, means", [(("--method", "TRADES"), ["TRADES, mean of 3"]), ((), [])]
)
def test_which_foreign_weights_make_a_mean(
    options, means, saved, read, tmp_path, monkeypatch, capsys
):
    """Those of which --method says that they are one, whatever their files are called."""
    for seed in range(3):
        torch.save(perturbed(saved, seed)["model"], tmp_path / f"seed{seed}.pt")
    paths = sorted(tmp_path.iterdir())
    command = (*paths, *FOREIGN, *options, "--attacks", "FGSM", "--n", 5)
    status, text, _ = start(monkeypatch, capsys, *command)
    assert status == 0 and re.findall(r"\w+, mean of \d", text) == means


def test_a_file_that_is_named_twice(checkpoint, monkeypatch, capsys):
    """It has one row."""
    command = (checkpoint, checkpoint, "--attacks", "FGSM", "--n", 3)
    assert start(monkeypatch, capsys, *command)[1].count("| lma_at (") == 1


# Column sums of Tables 2 to 8 and 10, in hundredths of a percent, the numbers of the first row
# counted once, of the second twice, and so on: from the digits printed in the paper.
BASELINES = ["vanillaAT", "TRADES", "MART"]
OURS = ["vanillaAT + Ours", "TRADES + Ours", "MART + Ours", "LMA-AT(Ours)"]
TAUS = ["lma_at tau=0", "lma_at tau=0.1", "LMA-AT(Ours)", "lma_at tau=0.7", "lma_at tau=0.9"]
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
        ["at_ours attack_loss=ce", "lma_at margin_weight=0", "LMA-AT(Ours)"],
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
BASELINE = "--margin-weight 0 --beta 0"
COMMANDS = [
    (train_lma_at, "", "LMA-AT(Ours)"),
    (train_at_ours, "", "vanillaAT + Ours"),
    (train_mart_ours, "", "MART + Ours"),
    (train_trades_ours, "", "TRADES + Ours"),
    (train_at_ours, f"--attack-loss ce {BASELINE}", "vanillaAT"),
    (train_trades_ours, f"--attack-loss kl {BASELINE}", "TRADES"),
    (train_mart_ours, f"--attack-loss ce {BASELINE}", "MART"),
    (train_at_ours, "--attack-loss ce", "at_ours attack_loss=ce"),
    (train_lma_at, "--margin-weight 0", "lma_at margin_weight=0"),
    *((train_lma_at, f"--tau {tau}", f"lma_at tau={tau}") for tau in ("0", "0.1", "0.7", "0.9")),
]
OF_OTHERS = {"PMHR-AT", "MMA", "WAT", "MAIL", "GAIRAT"}


@pytest.fixture
def row_of(read, shapes, tmp_path, monkeypatch):
    """row_of(script, options, *argv): an Evaluation of what they train, with a tiny network."""
    tiny = Wrapped(Flat(10), before=lambda x: x[:, :, :8, :8])
    monkeypatch.setattr(common, "make_model", lambda arch, classes: tiny)
    for dataset in common.DATASETS:
        monkeypatch.setitem(common.DATASETS, dataset, lambda *_: shapes["test"])

    def row_of(script, options, *argv):
        args = trained_by(script, *options.split()) | {"classes": shapes["test"].classes}
        content = {"model": tiny.state_dict(), "args": args, "done": args["epochs"]}
        torch.save(content, tmp_path / "best.pt")
        return subject(tmp_path / "best.pt", monkeypatch, "--n", 2, *argv)

    return row_of


def papers_row(e):
    """The last row of the table, if it is the paper's."""
    last = evaluate.paper_rows(e, {"Clean": 0.0, "AA": 0.0})
    return last and last[0]


@pytest.mark.parametrize("script, options, method", COMMANDS)
def test_commands_of_the_papers_rows(script, options, method, row_of):
    """What a training script saves for a command finds the paper's row, on every data set and
    network of the paper. Options that are typed but are the default change nothing, and neither
    do --amp and --val-size."""
    sources = (
        "cifar10 resnet18",
        "cifar10 wrn-34-10",
        "cifar100 resnet18",
        "tinyimagenet resnet18",
    )
    for source in sources:
        dataset, arch = source.split()
        command = f"--dataset {dataset} --arch {arch} {options}"
        for more in ("", "--amp --val-size 0", "--lr 0.01 --delta 0.9 --steps 10"):
            e = row_of(script, f"{command} {more}")
            assert e.paper_row == method
        paper = evaluate.ROWS.get((dataset, arch, method), {})
        row = papers_row(e)
        assert bool(row) == bool(paper)
        if row:
            assert row[:2] == [
                f"paper, {method} (difference)",
                f"{paper['Clean']:.2f} ({-paper['Clean']:+.2f})",
            ]
    assert ("cifar10", "resnet18", method) in evaluate.ROWS


def test_every_row_of_the_paper_has_a_command():
    """Every key of METHODS and every row of PAPER but those of other papers is one of these."""
    assert {method for _, _, method in evaluate.ROWS} - OF_OTHERS == {m for *_, m in COMMANDS}
    assert set(evaluate.METHODS.values()) == {m for *_, m in COMMANDS[:7]}
    assert len(evaluate.METHODS) == 7


def test_other_options_hide_the_papers_row(row_of):
    """A run that differs from the paper's in another option says in which, and has no row."""
    for script, options, label in (
        (train_lma_at, "--beta 96", "lma_at beta=96"),
        (train_lma_at, "--epsilon 4/255", "lma_at epsilon=0.0156863"),
        (train_lma_at, "--epochs 1 --amp", "lma_at epochs=1 amp=True"),
        (train_lma_at, "--tau 0.9 --ema image", "lma_at tau=0.9 ema=image"),
        (train_trades_ours, "--attack-loss kl --margin-weight 0", None),
        (train_trades_ours, f"--attack-loss kl {BASELINE} --inv-lambda 1", None),
        (train_mart_ours, f"--attack-loss ce {BASELINE} --lam 6", None),
    ):
        e = row_of(script, options)
        assert papers_row(e) == [] and label in (None, e.name), options


def test_method_names_a_row_for_any_checkpoint(row_of):
    """--method compares a run of ours with another row of the paper; its name stays."""
    e = row_of(train_lma_at, "--tau 0.9", "--method", "GAIRAT")
    assert e.paper_row == "GAIRAT" and e.name == "lma_at tau=0.9"


@pytest.mark.parametrize("epsilon, shown", [("8/255", True), ("0.0313725", True), ("7/255", False)])
def test_the_papers_row_is_shown_at_its_epsilon(
    epsilon, shown, saved, read, tmp_path, monkeypatch, capsys
):
    """Below the accuracies of a method of the paper stand the paper's and the difference."""
    row = ("shapes", "wrn-10-1", "TRADES")
    monkeypatch.setitem(evaluate.ROWS, row, {"Clean": 12.5, "FGSM": 10.0})
    torch.save(saved["model"], tmp_path / "foreign.pt")
    command = (tmp_path / "foreign.pt", *FOREIGN, "--method", "TRADES", "--epsilon", epsilon)
    _, text, _ = start(monkeypatch, capsys, *command, "--attacks", "FGSM", "--n", 2)
    assert ("| paper, TRADES (difference) | 12.50 (" in text) == shown


# --------------------------------------------------------------------------------------- Figure 1
def test_figure1(checkpoint, saved, shapes, tmp_path, monkeypatch, capsys):
    """For every misclassified x' of the first checkpoint, those wrong before the attack among them,
    the rank of its class among the natural model's wrong ones is counted. PGD-20 and CW need not be
    asked for. The table of accuracies is printed first."""
    other, natural = tmp_path / "other.pt", tmp_path / "natural.pt"
    torch.save(perturbed(saved, 1, 0.1), other)
    torch.save(perturbed(saved, 2, 0.1), natural)
    command = (checkpoint, other, "--n", 60, "--attacks", "FGSM", "--figure1", natural)
    status, text, _ = start(monkeypatch, capsys, *command)
    assert status == 0 and "| Method | Clean | FGSM | PGD-20 | CW |" in text
    table, figure = text.split("| rank |")
    lines = [re.findall(r"[^| ]+", line) for line in figure.splitlines()]
    assert "SUSPECT" in table or "pass" in table
    assert lines[0] == [*map(str, range(2, 11)), "all"] and len(lines) == 4
    network = loaded(natural, shapes["test"].classes)
    file = results(checkpoint.parent)
    logits = network(common.to_float(shapes["test"].x[file["index"]]))
    for name, line in zip(("PGD-20", "CW"), lines[2:], strict=True):
        expected = [0] * 9
        clean, y = file["prediction"]["Clean"], file["label"]
        for i, after in enumerate(file["prediction"][name]):
            wrong = after if clean[i] == y[i] else clean[i]
            if wrong != y[i]:
                order = [c for c in logits[i].argsort(descending=True).tolist() if c != y[i]]
                expected[order.index(wrong)] += 1
        assert line == [name, *map(str, expected), str(sum(expected))]
        assert sum(expected) > sum(p != t for p, t in zip(clean, y, strict=True)) > 0


@pytest.mark.parametrize("classes, counts", [(12, "1 1 0 0 0 0 0 0 0 3"), (3, "1 2 3")])
def test_ranks_by_hand(classes, counts):
    """With natural logits 0, -1, -2, ... three images are taken for the second class, the last, and
    for one behind their own, which has no rank. Ranks beyond the tenth count among all."""
    natural = Flat(classes)
    natural[1].weight.zero_()
    natural[1].bias.copy_(-torch.arange(classes))
    y = torch.tensor([0, 0, 1, 0])
    e = evaluation(natural, torch.zeros(4, 3, 8, 8, dtype=torch.uint8), y)
    e.classes = ["a"] * classes
    e.prediction["Clean"] = y
    e.prediction["PGD-20"] = e.prediction["CW"] = torch.tensor([1, classes - 1, 2, 0])
    text = evaluate.figure1(natural, e)
    assert text.count("\n") == 3 and f"| CW | {' | '.join(counts.split())} |" in text
    e.prediction["PGD-20"] = y
    nothing = " | ".join("0" for _ in counts.split())
    assert f"| PGD-20 | {nothing} |" in evaluate.figure1(natural, e)


def test_figure1s_network_has_all_checks(refused, saved, tmp_path, monkeypatch):
    """The natural network goes through the same door as every checkpoint, before the attacks, and
    must have the classes of the first one."""
    monkeypatch.setattr(evaluate.Evaluation, "run", lambda *_: 1 / 0)
    state, natural = saved["model"], tmp_path / "natural.pt"
    other = ["zebra", *saved["args"]["classes"][1:]]
    small = state | {"fc.weight": state["fc.weight"][:5], "fc.bias": state["fc.bias"][:5]}
    for content, word in (
        (saved | {"model": small}, "size mismatch for fc.weight"),
        (saved | {"args": saved["args"] | {"classes": other}}, "other classes"),
        (saved | {"args": saved["args"] | {"classes": other[::-1]}}, "other classes"),
        (saved | {"model": state | {"fc.bias": state["fc.bias"] * torch.nan}}, "not finite"),
        (state, "--dataset"),
        (argparse.Namespace(), "more than tensors"),
    ):
        torch.save(content, natural)
        err = refused(None, "--figure1", natural, "--out", tmp_path / "r.json")
        assert word in err and "natural.pt" in err, err


def test_figure1s_network_sees_the_first_checkpoints_images(
    checkpoint, saved, read, tmp_path, monkeypatch, capsys
):
    """The data set of the natural network, which may be gone, is not read. Its own --arch is."""
    natural = common.make_model("wrn-16-1", 10)
    args = saved["args"] | {"arch": "wrn-16-1", "data_dir": "/gone"}
    torch.save(saved | {"model": natural.state_dict(), "args": args}, tmp_path / "natural.pt")
    drawn = []
    monkeypatch.setattr(evaluate, "figure1", lambda network, e: drawn.append((network, e)))
    command = (checkpoint, "--n", 3, "--attacks", "FGSM", "--figure1", tmp_path / "natural.pt")
    assert start(monkeypatch, capsys, *command)[0] == 0
    ((network, e),) = drawn
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(network(x), natural.eval()(x)) and e.path == checkpoint
    assert read.calls == [("data", "test", False)]


def test_the_table_is_printed_whatever_the_checks_do(checkpoint, monkeypatch, capsys):
    """It is printed before the checks of the networks and Figure 1."""
    monkeypatch.setattr(evaluate, "network_checks", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(monkeypatch, capsys, checkpoint, "--n", 3, "--attacks", "FGSM")
    assert "| Method | Clean | FGSM |" in capsys.readouterr().out


# ------------------------------------------------------------------------------ masked gradients
def scored(n, **broken):
    """An evaluation of n images. broken[name] is how many of them, or which, an attack breaks."""
    y = torch.zeros(n, dtype=torch.long)
    e = evaluation(None, torch.zeros(n, 3, 1, 1, dtype=torch.uint8), y)
    e.prediction["Clean"] = y.clone()
    for name, images in broken.items():
        name = name.replace("_", "-")
        images = slice(images) if isinstance(images, int) else images
        e.prediction[name] = y.clone()
        e.prediction[name][images] = 1
    return e


SAME = {"APGD_CE": 550, "APGD_T": 550, "FAB_T": 550, "SQUARE": 550}


@pytest.mark.parametrize(
    "broken, lines",
    [
        (
            {"PGD_20": 500, "SQUARE": 502},
            ["pass    PGD-20, 50.00 %, .* than SQUARE, 49.80 %"],
        ),
        (
            {"PGD_20": 500, "SQUARE": 503},
            ["SUSPECT PGD-20, 50.00 %, .* than SQUARE, 49.70 %"],
        ),
        ({"CW": 500, "SPSA": 502}, ["pass    CW, .* than SPSA"]),
        ({"CW": 500, "SPSA": 503, "SQUARE": 9}, ["SUSPECT CW, .* than SPSA"]),
        (
            {"PGD_20": 502, "CW": 9, "PGD_100": 500},
            ["pass    PGD-100, 50.00 %, .* than PGD-20, 49.80 %"],
        ),
        (
            {"PGD_20": 503, "PGD_100": 500, "SPSA": 9},
            ["pass    PGD-20, .* than SPSA", "SUSPECT PGD-100, .* than PGD-20"],
        ),
        (
            {"CW": 500, "SQUARE": 9, "PGD_20": 503, "PGD_100": 503},
            ["pass    PGD-20.* than SQUARE", "pass    PGD-100, .* than PGD-20"],
        ),
        (SAME | {"PGD_20": 500}, ["pass    APGD and FAB, .* than SQUARE"]),
        (SAME | {"SQUARE": 552}, ["pass    APGD and FAB, 45.00 %, .*, 44.80 %"]),
        (SAME | {"SQUARE": 553}, ["SUSPECT APGD and FAB, 45.00 %, .*, 44.70 %"]),
        (
            SAME | {"FAB_T": range(545, 560)},
            ["pass    APGD and FAB, 44.00 %, .* than AA, 44.00"],
        ),
        (SAME | {"APGD_T": 560}, ["pass    APGD and FAB, 44.00 %, .* than AA, 44.00"]),
        (SAME | {"APGD_CE": 560}, ["pass    APGD and FAB, 44.00 %, .* than AA, 44.00"]),
        ({"FGSM": 100, "PGD_20": 200}, []),
        ({"SQUARE": 200, "SPSA": 300}, []),
    ],
)
def test_checks_of_columns(broken, lines):
    """The strongest white-box attack, among them APGD and FAB together, may leave 0.2 points more
    than the strongest black-box attack or all of AutoAttack, and PGD-100 than PGD-20. Here are
    1,000 images: two may differ."""
    found = evaluate.column_checks(scored(1000, **broken))
    assert len(found) == len(lines), found
    for line, expected in zip(found, lines):
        assert re.match(expected, line), line


def test_checks_of_columns_on_few_images():
    """Among few images one may differ."""
    one, two = (evaluate.column_checks(scored(20, PGD_20=5, SQUARE=k)) for k in (6, 7))
    assert one == ["pass    PGD-20, 75.00 %, is not weaker than SQUARE, 70.00 %"]
    assert two == ["SUSPECT PGD-20, 75.00 %, is not weaker than SQUARE, 65.00 %"]


def checks_of(model, x, y, epsilon=EPSILON):
    """{first words of a line: did the network pass?} of the checks on these images (uint8)."""
    e = evaluation(model, x, y, epsilon=epsilon)
    e.prediction["Clean"] = y
    lines = [line.partition(" ") for line in evaluate.network_checks(e)]
    assert len(lines) == 5 and {first for first, _, _ in lines} <= {"pass", "SUSPECT"}
    names = ("64/255", "noise", "zero", "calls", "probabilities")
    words = ("64/255 breaks", "uniform noise", "gradient is not zero", "two calls", "probabilities")
    for (_, _, text), word in zip(lines, words):
        assert word in text
    return {name: first == "pass" for name, (first, _, _) in zip(names, lines)}


def test_checks_of_a_network(robust_net, right):
    """The honest network passes, and networks made for it fail."""
    x, y = (255 * right[0]).round().byte(), right[1]

    def failed(after=lambda z: z, before=lambda x: x):
        found = checks_of(Wrapped(robust_net, before, after), x, y)
        return {name for name, passed in found.items() if not passed}

    assert failed() == set()
    assert {"zero", "64/255"} <= failed(before=lambda x: (x * 64).round() / 64)
    assert "zero" in failed(after=lambda z: 1e4 * z)
    assert "probabilities" in failed(after=lambda z: z.softmax(1))
    g = torch.Generator().manual_seed(0)
    noise = partial(torch.randn, len(y), 10, generator=g)
    assert "calls" in failed(after=lambda z: z + 1e-3 * noise()[: len(z)])
    e = evaluation(robust_net, x, y)  # none is known to be right
    assert evaluate.network_checks(e) == ["SUSPECT no image is classified correctly"]


class Fragile(nn.Module):
    """It knows the images (uint8) within a radius, and errs on everything else.

    What is nearest to one of the first `sturdy` images is always classified as that image.
    """

    def __init__(self, x, y, sturdy=0, radius=0.0):
        super().__init__()
        self.x, self.y, self.sturdy, self.radius = common.to_float(x), y, sturdy, radius

    def forward(self, x):
        distance = (x.flatten(1)[:, None] - self.x.flatten(1)).abs().amax(2)
        nearest = distance.argmin(1)
        beyond = (distance.amin(1, keepdim=True) - self.radius).clamp(min=0)
        penalty = 1e4 * beyond * (nearest >= self.sturdy)[:, None]
        return F.one_hot(self.y[nearest], 10) * (1 - penalty) - 0.5


@pytest.fixture(scope="module")
def pixels(images):
    """The 100 images as uint8, and labels for them."""
    return (255 * images).byte(), torch.arange(100) % 10


@pytest.mark.parametrize(
    "check, sturdy, passed",
    [("64/255", 5, True), ("64/255", 6, False), ("noise", 90, True), ("noise", 89, False)],
)
def test_limits_in_percent(check, sturdy, passed, pixels):
    """Of 100 images at most 5 may stand at 64/255, and at least 90 must stand in noise."""
    assert checks_of(Fragile(*pixels, sturdy), *pixels)[check] == passed


@pytest.mark.parametrize("epsilon", [8 / 255, 4 / 255])
@pytest.mark.parametrize("radius, passed", [(1.001, True), (0.9, False)])
def test_the_noise_fills_the_box_of_epsilon(epsilon, radius, passed, pixels):
    """A network that errs just beyond epsilon passes, and one that errs just within it fails."""
    model = Fragile(*pixels, radius=radius * epsilon)
    assert checks_of(model, *pixels, epsilon)["noise"] == passed


def grey(score):
    """A network of two classes and 20 grey images of 128/255. It errs where score(d) [N] is
    positive, of the difference d [N, 3, 8, 8] from grey in units of 1/255."""
    x, y = torch.full((20, 3, 8, 8), 128, dtype=torch.uint8), torch.zeros(20, dtype=torch.long)
    return lambda x: F.pad(score(255 * x - 128)[:, None] / 10, (1, 0)), x, y


def test_the_noise_is_uniform():
    """The network errs where mean and variance are not a uniform distribution's, 0 and 64/3."""

    def score(d):
        mean, square = d.mean((1, 2, 3)), d.square().mean((1, 2, 3))
        return 4 * mean.abs() + (square - 64 / 3).abs() - 6

    assert checks_of(*grey(score))["noise"]


@pytest.mark.parametrize("brink, passed", [(63.5, True), (64.5, False)])
def test_the_radius_of_64(brink, passed):
    """PGD reaches a mean of 64/255, from every point of the box, and no more: it takes 20 steps of
    64/10 or more, and none leaves the box."""
    network = grey(lambda d: d.mean((1, 2, 3)) - brink)
    assert checks_of(*network)["64/255"] == passed


@pytest.mark.parametrize("width, passed", [(4.3, True), (3.0, False)])
def test_the_step_at_64(width, passed):
    """Around a shift of 40/255, which 20 steps reach, pixels go to and fro by the step. With 8/255
    their mean distance from it is never above 4/255 twice in a row, and never much below."""
    network = grey(lambda d: width - (d - 40).abs().mean((1, 2, 3)))
    assert checks_of(*network)["64/255"] == passed


def test_no_gradient_may_be_zero(pixels):
    """On one black image in 100 the network is constant."""
    x, y = pixels
    bright = Wrapped(Flat(10), before=lambda x: x * (x.amax((1, 2, 3), keepdim=True) > 0.1))
    one_black = x.clone()
    one_black[7] = 0
    assert checks_of(bright, x, y)["zero"] and not checks_of(bright, one_black, y)["zero"]


@pytest.mark.parametrize("difference, passed", [(0.9e-4, True), (1.2e-4, False)])
def test_two_calls_may_differ_by_rounding(difference, passed, pixels):
    """By less than 1e-4 of the largest logit."""
    calls = itertools.count()
    drifting = Wrapped(Flat(10), after=lambda z: z * (1 + next(calls) % 2 * difference))
    assert checks_of(drifting, *(t[:50] for t in pixels))["calls"] == passed


@pytest.mark.parametrize(
    "after, passed",
    [
        (lambda z: z.softmax(1), False),
        (lambda z: 1.00005 * z.softmax(1), False),
        (lambda z: 1.0002 * z.softmax(1), True),
        (lambda z: z.softmax(1) - 1e-3 * torch.tensor([1.0, -1] * 5), True),
        (lambda z: z - z.amin() + 1, True),
    ],
)
def test_probabilities_are_no_logits(after, passed, pixels):
    """Probabilities are not below 0 and sum to 1 within 1e-4."""
    assert checks_of(Wrapped(Flat(10), after=after), *pixels)["probabilities"] == passed


@pytest.mark.parametrize("n", [1, 200, 399, 1000])
def test_the_checks_images_are_of_all_classes(n, monkeypatch):
    """At most 200 of the correct images, from the first to the last: folders lie class by class."""
    e, seen = scored(n), []
    e.prediction["Clean"][0] = int(n > 1)  # the first is wrong
    monkeypatch.setattr(e, "batch", lambda rows: seen.append(rows.tolist()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.network_checks(e)
    (rows,) = seen
    first = int(n > 1)
    assert min(n - first, 100) <= len(rows) <= 200
    assert rows[0] == first and rows[-1] >= n - 1 - n // len(rows)


def test_the_report_of_a_command(checkpoint, monkeypatch, capsys):
    """Below the table stand the checks of each checkpoint, on the columns in its file, be they of
    this call or not."""
    command = (checkpoint, "--n", 9, "--attacks")
    start(monkeypatch, capsys, *command, "PGD-20")
    text = start(monkeypatch, capsys, *command, "PGD-100")[1].split(f"\n\n{checkpoint}\n")[1]
    lines = text.splitlines()
    assert len(lines) == 6 and "PGD-100, 0.00 %, is not weaker than PGD-20" in lines[0]
    assert all(line[:8] in ("pass    ", "SUSPECT ") for line in lines)


# ------------------------------------------------------------- other people's checkpoints and data
FOREIGN = ("--dataset", "shapes", "--arch", "wrn-10-1")
STANDARDISE = ("--mean", "0.5", "0.4", "0.3", "--std", "0.2", "0.25", "0.3")


def loaded(path, classes, *argv):
    """The network of a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        args = arguments(patch, path, *argv)
    return evaluate.load_network(evaluate.read_checkpoint(path, args), list(classes))


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
    "says that it does not standardise": lambda s: {"net": s, "normalize": False, "mean": None},
}


@pytest.mark.parametrize(
    "arch, styles", [("wrn-10-1", list(WRAPPED)), ("resnet18", ["bare", "nested", "ema"])]
)
def test_foreign_names(arch, styles, tmp_path):
    """Wrapped, prefixed and differently named weights give the network they came from."""
    torch.manual_seed(0)
    model, x = common.make_model(arch, 3).eval(), torch.rand(2, 3, 16, 16)
    expected = model(x)
    for style in styles:
        torch.save(WRAPPED[style](as_others_do(model.state_dict(), arch)), tmp_path / "f.pt")
        network = loaded(tmp_path / "f.pt", "abc", "--dataset", "folder", "--arch", arch)
        assert torch.equal(network(x), expected) and not network.training, style
        assert not any(weight.requires_grad for weight in network.parameters())


def test_standardised_images(tmp_path):
    """With --mean and --std the network gets (x - mean) / std of each channel."""
    torch.manual_seed(0)
    model, x = common.make_model("wrn-10-1", 4).eval(), torch.rand(2, 3, 16, 16)
    torch.save({"0.mean": torch.ones(3), **prefixed(model.state_dict(), "1.")}, tmp_path / "f.pt")
    network = loaded(tmp_path / "f.pt", "abcd", *FOREIGN, *STANDARDISE)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
    assert torch.allclose(network(x), model((x - mean) / std), atol=1e-6)


class Own(nn.Module):
    """A network that somebody adds to make_model, with names that mean something in other people's
    files: a Normalize inside, an integer buffer, a prefix, TRADES' and kuangliu's names."""

    def __init__(self):
        super().__init__()
        self.normalize = Normalize([0.5] * 3, [0.2] * 3)
        self.module = nn.Conv2d(3, 4, 3)
        self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.linear, self.fc = nn.Linear(4, 10), nn.Linear(10, 10)
        self.register_buffer("mean", torch.ones(3))
        self.register_buffer("steps", torch.tensor([7]))

    def forward(self, x):
        x = self.shortcut(self.module(self.normalize(x))).mean((2, 3))
        return self.fc(self.linear(x)) * self.steps + self.mean[0]


def test_a_network_of_our_own(saved, refused, tmp_path, monkeypatch):
    """A checkpoint of ours is loaded strictly and as it is, whatever its weights are called and
    whatever options its script has."""
    torch.manual_seed(0)
    monkeypatch.setattr(common, "make_model", lambda arch, classes: Own())
    own, x = Own().eval(), torch.rand(2, 3, 8, 8)
    args = saved["args"] | {"arch": "own", "changed": {"widths": [1, 2]}, "widths": [1, 2]}
    content = {"model": own.state_dict(), "args": args, "done": args["epochs"]}
    torch.save(content, tmp_path / "own.pt")
    assert torch.equal(loaded(tmp_path / "own.pt", "ABCDEFGHIJ")(x), own(x))
    assert subject(tmp_path / "own.pt", monkeypatch).name == "lma_at widths=[1, 2]"
    for key in ("steps", "linear.bias", "shortcut.1.running_var"):
        fewer = {k: v for k, v in content["model"].items() if k != key}
        assert f'Missing key(s) in state_dict: "{key}"' in refused(content | {"model": fewer})
    assert "Missing key(s)" in refused(content | {"model": prefixed(content["model"], "module.")})
    more = content["model"] | {"n_averaged": torch.tensor(1)}
    assert "Unexpected key(s)" in refused(content | {"model": more})


def test_a_folder_means_its_best(saved, read, tmp_path, monkeypatch):
    """The folder of a run stands for its best.pt, or its last.pt if there is no other."""
    for name, there in (("last.pt", "last.pt"), ("best.pt", "best.pt")):
        torch.save(saved | {"name": name}, tmp_path / name)
        checkpoint = evaluate.read_checkpoint(tmp_path, arguments(monkeypatch, tmp_path))
        assert checkpoint.path == tmp_path / there and checkpoint.saved["name"] == there


class Trap:
    """What a checkpoint can do to whoever unpickles it."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


@pytest.fixture
def refused(refused, checkpoint, tmp_path, monkeypatch):
    """refused(content of a checkpoint, or a path, or None: the good one; *argv): the one line.

    Nothing but --out is written. Should nothing be refused, only FGSM on one image is run.
    """

    def run(content, *argv):
        path = checkpoint if content is None else content
        if not isinstance(path, Path):
            path = tmp_path / "bad.pt"
            torch.save(content, path)
        few = [] if "--n" in argv else ["--n", 1]
        few += [] if "--attacks" in argv else ["--attacks", "FGSM"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, (path, *argv, *few))])
        err = refused(common.run, evaluate.main, "as it is")
        assert not list(tmp_path.rglob("*.eval.json")) and not list(tmp_path.rglob("*.tmp"))
        return err

    return run


def test_no_object_is_unpickled(refused, saved, tmp_path, monkeypatch):
    """A pickled object is refused in one line, and not executed, however harmless it is."""
    monkeypatch.chdir(tmp_path)
    for other in (Trap(), argparse.Namespace(lr=0.1), np.float64(83.1), nn.Linear(2, 2)):
        err = refused({"state_dict": saved["model"], "other": other}, *FOREIGN)
        assert "bad.pt is not there, damaged, or holds more than tensors" in err
    assert not Path("trapped").exists()


def test_files_that_are_no_checkpoint(refused, trained, tmp_path):
    """What cannot be read is one line of ours."""
    bad = tmp_path / "broken.pt"
    for content in (b"no checkpoint", b"", trained.read_bytes()[:5000]):
        bad.write_bytes(content)
        assert "broken.pt is not there, damaged" in refused(bad)
    assert "absent.pt is not there" in refused(tmp_path / "absent.pt")
    (tmp_path / "empty").mkdir()
    assert "empty/last.pt is not there" in refused(tmp_path / "empty")


def test_bad_arguments(refused, saved, checkpoint, tmp_path):
    """Mistakes in the command end in one line that names them, and write nothing."""
    state = saved["model"]
    assert "--arch" in refused(state, "--dataset", "shapes")
    assert "--dataset" in refused(state, "--arch", "wrn-10-1")
    assert "--arch nn" in refused(state, "--arch", "nn", "--dataset", "shapes")
    assert "SPSA" in refused(None, "--attacks", "PGD20")
    for mean_or_std in (STANDARDISE[:4], STANDARDISE[4:]):
        assert "give both" in refused(state, *FOREIGN, *mean_or_std)
    for option in (
        ("--epsilon", "8"),
        ("--epsilon", "1"),
        ("--epsilon", "nan"),
        ("--epsilon", "1/0"),
        ("--n", 10**12),
        ("--n", 0),
        ("--seed", 1e39),
        ("--batch-size", 10**12),
        ("--mean", 0, 128, 1),
        ("--std", 0, 1, -1),
        ("--method", "TRADE"),
        ("--dataset", "mnist"),
    ):
        assert option[0] in refused(None, *option)


def test_options_that_contradict_a_checkpoint_of_ours(refused, saved, tmp_path, monkeypatch):
    """What a checkpoint of ours says of itself is neither overruled nor ignored, beside foreign
    weights too. What agrees with it is no contradiction."""
    foreign, ours, out = (
        tmp_path / "foreign.pt",
        tmp_path / "ours.pt",
        ("--out", tmp_path / "r.json"),
    )
    torch.save(saved["model"], foreign)
    torch.save(saved, ours)
    assert "--mean: " in refused(None, *STANDARDISE)
    assert f"--arch: {ours} was trained here" in refused(ours, "--arch", "wrn-16-1")
    assert "--dataset: " in refused(None, "--dataset", "cifar10")
    assert f"--mean: {ours}" in refused(foreign, ours, *FOREIGN, *STANDARDISE, *out)
    assert subject(ours, monkeypatch, *FOREIGN).name == "lma_at"


def test_classes_of_the_checkpoint(refused, saved):
    """A checkpoint is tested on its own classes only, in their order."""
    classes = saved["args"]["classes"]
    for other in (["zebra", *classes[1:]], classes[::-1], classes[:9]):
        err = refused(saved | {"args": saved["args"] | {"classes": other}})
        assert "other classes" in err and "--data-dir" in err


def test_other_networks_weights(refused, saved):
    """Weights that do not fit, mean two things, or are of a network that standardises its images
    are refused with the key in question."""
    state = saved["model"]
    weight, bias = state["fc.weight"], state["fc.bias"]
    err = refused({k.replace("conv1", "first"): v for k, v in state.items()}, *FOREIGN)
    assert 'Missing key(s) in state_dict: "conv1.weight", "block1.layer.0.conv1.weight"' in err
    unexpected = {k: v for k, v in state.items() if k != "fc.bias"} | {"fc.more": bias}
    err = refused(unexpected, *FOREIGN)
    assert 'Missing key(s) in state_dict: "fc.bias"' in err
    assert 'Unexpected key(s) in state_dict: "fc.more"' in err
    assert "size mismatch for block1" in refused(state, *FOREIGN[:3], "wrn-10-2")
    small = state | {"fc.weight": weight[:5], "fc.bias": bias[:5]}
    assert "size mismatch for fc.weight" in refused(small, *FOREIGN)
    for value in (torch.nan, torch.inf):
        err = refused(state | {"fc.bias": bias * value}, *FOREIGN)
        assert "weights that are not finite" in err
    for nothing in ({"epoch": 3}, [1, 2], torch.ones(3), {1: torch.ones(1), (1, 2): 3}):
        assert "0 dicts in it fit the network" in refused(nothing, *FOREIGN)
    endless = {}
    endless["model"] = endless
    assert "0 dicts in it fit" in refused(endless, *FOREIGN)
    for several in ({"model": state, "ema": state}, {"model": state, "best": {"net": state}}):
        assert "2 dicts in it fit" in refused(several, *FOREIGN)
    double = state | {"linear.weight": weight * 0, "linear.bias": bias * 0}
    assert "two weights of one name" in refused(double, *FOREIGN)
    assert "two weights of one name" in refused(state | prefixed(state, "module."), *FOREIGN)
    own = {
        "mu": state | {"mu": torch.ones(3)},
        "normalize_input": {"net": state, "normalize_input": True},
        "0.mean": {"0.mean": torch.ones(3), **prefixed(state, "1.")},
        "module.normalise.std": state | {"module.normalise.std": torch.ones(3)},
    }
    for key, content in own.items():
        err = refused(content, *FOREIGN)
        assert f"{key} says that it standardises" in err and "--mean and --std" in err
    for odd in (torch.tensor(1.0), [1], torch.zeros(1).expand(10**9, 64)):
        assert "fc.weight" in refused(state | {"fc.weight": odd}, *FOREIGN)


# ------------------------------------------------------------------ values that are not finite
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


def test_logits_that_are_not_finite(saved, read, tmp_path, monkeypatch, capsys):
    """A network whose logits are not finite is not scored."""
    state, path = saved["model"], tmp_path / "bad.pt"
    for key, value in (
        ("bn1.running_var", -state["bn1.running_var"]),
        ("fc.weight", 3e38 * state["fc.weight"].sign()),
    ):
        torch.save(saved | {"model": state | {key: value}}, path)
        with pytest.raises(FloatingPointError, match="logits of a network are not finite"):
            start(monkeypatch, capsys, path, "--attacks", "PGD-20", "--n", 20)

    class Brink(Flat):  # finite on the image itself, not on an attack's way
        def forward(self, x):
            return super().forward(x) + 0 / ((x - 0.5).abs().amax() < 1e-3)

    brink = Brink(3)
    x, y = correct(brink, torch.full((1, 3, 8, 8), 0.5))
    for name in ("FGSM", "PGD-20", "CW", "APGD-CE", "APGD-T", "FAB-T", "SQUARE", "SPSA"):
        with pytest.raises(FloatingPointError):
            evaluate.logits_of(brink, ATTACKS[name](brink, x, y, 0.1, generators(1)))
