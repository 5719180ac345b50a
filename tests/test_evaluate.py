"""evaluate.py: attacks against known answers and their constants, independence of the batch,
resume after a kill, masking, foreign weights."""
import argparse
import json
import os
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

import common
import evaluate
import train_lma_at
from evaluate import AA, ATTACKS, PASSES

EPSILON = 8 / 255
PROGRAM = Path(evaluate.__file__)


def generators(n, seed=0, name="test"):
    return evaluate.generators_of(seed, name, torch.arange(n), "cpu")


def attack(name, model, x, y, epsilon=EPSILON, seed=0, index=None, **options):
    """Adversarial images and which of them the model still classifies as y; they are in the box."""
    index = torch.arange(len(x)) if index is None else index
    own = evaluate.generators_of(seed, name, index, "cpu")
    x_adv = partial(ATTACKS[name][0], **options)(model, x, y, epsilon, own)
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
    net = nn.Sequential(nn.Conv2d(3, 12, 5, 2, 2), nn.ReLU(), nn.Conv2d(12, 24, 3, 2, 1), nn.ReLU(),
                        nn.Flatten(), nn.Linear(24 * 16, 10))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(20):
        for batch in torch.randperm(600).split(100):
            x, y = common.to_float(patterns.x_train[batch]), patterns.y_train[batch]
            x_adv = common.pgd(net, x, lambda z: F.cross_entropy(z, y), 4 / 255, 2 / 255, 3)
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


# ----------------------------------------------------------------------------------- known answers

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


def test_projection_on_a_hyperplane():
    """to_hyperplane is the smallest move inside [0, 1] (bisection agrees), else the farthest."""
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
            short = (w[i].abs() * room.clamp(max=t)).sum() < gap[i].abs()
            low, high = (t, high) if short else (low, t)
        assert abs(d[i].abs().max().item() - high) < 1e-5 and abs(moved[i] - gap[i]) < 1e-4
    assert 10 < reachable < 50


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
        evaluate.each_target(harmless, model, torch.rand(1, 3, 8, 8), torch.tensor([0]), 0.1,
                             generators(1))
        assert seen == [[t] for t in range(1, min(10, classes))]


def test_few_classes(images):
    """With three classes APGD-T takes the targets there are: the exact robust accuracy."""
    model = Flat(3)
    x, y = correct(model, images)
    exact = exact_robust(model, x, y, 1.5 / 255)
    assert 10 < exact.sum() < 90
    _, robust = attack("APGD-T", model, x, y, 1.5 / 255)
    assert torch.equal(robust, exact)


def test_random_numbers():
    """Uniform, independent over images, draws, attacks and seeds; the same in any batch, and the
    same in every version (numpy documents SeedSequence's values)."""
    own = evaluate.generators_of(0, "PGD-20", torch.arange(400), "cpu")
    u, again = evaluate.uniform(own, 50), evaluate.uniform(own, 50)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01 and abs(u.var() - 1 / 12) < 0.002
    others = [again, evaluate.uniform(generators(400, 0, "CW"), 50), u.roll(1, 0), u.roll(1, 1),
              evaluate.uniform(generators(400, 1, "PGD-20"), 50)]
    for other in others:
        assert abs(np.corrcoef(u.flatten(), other.flatten())[0, 1]) < 0.03
    rows = torch.tensor([7, 300])
    assert torch.equal(evaluate.uniform(evaluate.generators_of(0, "PGD-20", rows, "cpu"), 50),
                       u[rows])
    assert own[7].initial_seed() == 2476146383030287998
    assert evaluate.generators_of(0, "PGD-20", rows, "cpu")[1].initial_seed() == \
        own[300].initial_seed()


# ----------------------------------------------------- the constants of section 5.2 and AutoAttack

@pytest.mark.parametrize("name", ATTACKS)
def test_passes(name):
    """An image that survives costs the passes of the table: 20 and 100 steps of PGD, CW as PGD-20,
    100 iterations of APGD and FAB and 9 targets, 5,000 queries of Square (and its start), 20
    iterations of SPSA with 2 x 100 queries and a look at the iterate."""
    forward = {"Clean": 0, "FGSM": 1, "PGD-20": 20, "PGD-100": 100, "CW": 20, "APGD-CE": 101,
               "APGD-T": 1 + 9 * 102, "FAB-T": 1 + 9 * 201, "SQUARE": 5001, "SPSA": 20 * 201}[name]
    backward = {"FGSM": 1, "PGD-20": 20, "PGD-100": 100, "CW": 20, "APGD-CE": 100,
                "APGD-T": 900, "FAB-T": 900}.get(name, 0)
    before = PASSES.forward, PASSES.backward
    _, robust = attack(name, sure(), torch.rand(1, 3, 8, 8), torch.tensor([0]))
    assert robust.all()
    assert (PASSES.forward - before[0], PASSES.backward - before[1]) == (forward, backward)
    assert name == "Clean" or ATTACKS[name][1] == forward + backward


@pytest.mark.parametrize("name", ["APGD-T", "FAB-T", "SQUARE"])
def test_fab_and_square_stay_in_float32_with_amp(name, robust_net, right, monkeypatch):
    """They compare what bfloat16 rounds away: with --amp they return the same images bit for bit,
    which APGD does not."""
    options = {"queries": 50} if name == "SQUARE" else {}
    x, y = (t[:3] for t in right)
    without, _ = attack(name, robust_net, x, y, **options)
    monkeypatch.setattr(PASSES, "amp", True)
    found, _ = attack(name, robust_net, x, y, **options)
    assert torch.equal(found, without) == (name != "APGD-T")


@pytest.mark.parametrize("name, steps", [("PGD-20", 20), ("PGD-100", 100), ("CW", 20)])
def test_pgd_steps(name, steps, monkeypatch):
    """From x, in a box without walls, PGD goes its 20 or 100 steps of 1/255 in one direction: that
    of cross-entropy, CW's towards the nearest class alone."""
    monkeypatch.setattr(evaluate, "uniform", lambda own, *shape: torch.full((1, *shape), 0.5))
    model, x, y = sure(3), torch.full((1, 3, 8, 8), 0.5), torch.tensor([0])
    w, z = model[1].weight, model(x)[0]
    nearest = 1 if z[1] > z[2] else 2
    push = w[nearest] - w[0]
    if name != "CW":
        push = z.softmax(0)[1:] @ (w[1:] - w[0])
    x_adv, _ = attack(name, model, x, y, 0.5)
    assert torch.allclose(x_adv - x, steps / 255 * push.sign().view_as(x), atol=1e-5)
    apart = (z.softmax(0)[1:] @ (w[1:] - w[0])).sign() != (w[nearest] - w[0]).sign()
    assert 10 < apart.sum() < 100  # the two directions can be told apart


def test_pgd_start(images):
    """PGD starts uniformly in the whole box, clipped to [0, 1]."""
    x_adv, _ = attack("PGD-20", sure(), images, torch.zeros(100, dtype=torch.long), steps=0)
    u = ((x_adv - images) / EPSILON)[(images > EPSILON) & (images < 1 - EPSILON)]
    assert u.min() < -0.99 and u.max() > 0.99 and abs(u.mean()) < 0.02
    assert abs(u.var() - 1 / 3) < 0.01


def test_fgsm(images):
    """x + epsilon sign(grad CE), clipped, from x itself."""
    model = Flat(10)
    x, y = correct(model, images)
    x.requires_grad_()
    grad, = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    x = x.detach()
    assert torch.equal(attack("FGSM", model, x, y)[0],
                       (x + EPSILON * grad.sign()).clamp(x - EPSILON, x + EPSILON).clamp(0, 1))


def test_spsa_constants():
    """SPSA asks at x +- 0.001 v with 100 sign vectors v, and Adam's first step is 0.01 in every
    pixel, down the margin."""
    asked, model = [], sure(2)
    spy = Wrapped(model, before=lambda x: asked.append(x.clone()) or x)
    x = torch.full((1, 3, 8, 8), 0.5)
    x_adv, _ = attack("SPSA", spy, x, torch.tensor([0]), 0.2, steps=1)
    queries = torch.cat(asked[:-2])
    assert len(queries) == 200 and torch.allclose((queries - x).abs(), torch.tensor(0.001))
    assert torch.allclose(queries[:100] + queries[100:], 2 * x)
    assert (queries[:100].mean(0) - 0.5).abs().max() < 0.0006  # mean of 100 signs
    assert torch.allclose((x_adv - x).abs(), torch.tensor(0.01), rtol=0.01)
    down = (model[1].weight[1] - model[1].weight[0]).view_as(x)
    assert ((x_adv - x).sign() == down.sign())[down.abs() > down.abs().mean()].float().mean() > 0.6


def test_square_sides():
    """On 32 x 32 images the squares shrink 29, 20, 14, 10, 7, 5, 4, 3 after 10, 50, 200, 500, 1000,
    2000, 4000 queries; they fit into images that are not square."""
    starts = (0, 11, 51, 201, 501, 1001, 2001, 4001)
    assert [evaluate.square_side(k, 32, 32) for k in starts] == [29, 20, 14, 10, 7, 5, 4, 3]
    assert [evaluate.square_side(k - 1, 32, 32) for k in starts[1:]] == [29, 20, 14, 10, 7, 5, 4]
    assert evaluate.square_side(0, 48, 32) == 32 and evaluate.square_side(0, 8, 40) == 8
    x = torch.rand(4, 3, 24, 8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(576, 3)).requires_grad_(False)
    attack("SQUARE", model, *correct(model, x), queries=60)


def test_square_proposals():
    """Square starts with vertical stripes of +-epsilon; a query changes one square, each channel to
    one of the box's two sides; what does not lower the margin is not kept."""
    asked, model = [], sure(2)
    spy = Wrapped(model, before=lambda x: asked.append(x.clone()) or x)
    x = torch.full((1, 3, 8, 8), 0.5)
    attack("SQUARE", spy, x, torch.tensor([0]), queries=60)
    d = [(q - x)[0] / EPSILON for q in asked[:-1]]
    assert all(torch.allclose(q.abs(), torch.tensor(1.0), atol=1e-4) for q in d)
    assert torch.equal(d[0], d[0][:, :1].expand_as(d[0]))
    current, value = asked[0], evaluate.margin(model(asked[0]), torch.tensor([0]))
    for k, query in enumerate(asked[1:-1]):
        changed = (query != current)[0].any(0).nonzero()
        side = evaluate.square_side(k, 8, 8)
        if len(changed):
            assert (changed.amax(0) - changed.amin(0) < side).all()
        z = evaluate.margin(model(query), torch.tensor([0]))
        if z < value:
            current, value = query, z
    assert value < evaluate.margin(model(asked[0]), torch.tensor([0]))


def numpy_apgd(logits_and_jacobian, x, y, epsilon, start, steps=100):
    """Auto-PGD on the cross-entropy of one image as in Croce & Hein's Algorithm 1 and appendix, in
    float64: the points where it looks at the loss."""
    def look(z, k):
        logits, jacobian = logits_and_jacobian(z, k)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        return -np.log(p[y]), (p - np.eye(len(p))[y]) @ jacobian

    low, high = np.maximum(x - epsilon, 0), np.minimum(x + epsilon, 1)
    checkpoints, fractions = [0], [0, 0.22]
    while fractions[-1] < 1:
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06))
    checkpoints = [round(p * steps - 1e-9) for p in fractions if p <= 1]
    step, z, z_prev = 2 * epsilon, start, start
    losses, best, best_loss, best_grad = [], start, -np.inf, None
    halved, at_check, points = True, -np.inf, []
    for k in range(steps):
        loss, grad = look(z, k)
        points.append(z)
        losses.append(loss)
        if loss > best_loss:
            best, best_loss, best_grad = z, loss, grad
        if k in checkpoints[1:]:
            since = checkpoints[checkpoints.index(k) - 1]
            rises = sum(losses[i + 1] > losses[i] for i in range(since, k))
            stuck = rises <= 0.75 * (k - since) or (not halved and best_loss == at_check)
            halved, at_check = stuck, best_loss
            if stuck:
                step, z, grad = step / 2, best, best_grad
        ahead = np.clip(z + step * np.sign(grad), low, high)
        alpha = 0.75 if k else 1
        z, z_prev = np.clip(z + alpha * (ahead - z) + (1 - alpha) * (z - z_prev), low, high), z
    return points + [z]


@pytest.mark.parametrize("drift", [0, 0.3])
def test_apgd_against_numpy(drift):
    """Every iterate of APGD-CE is that of an independent float64 APGD: start on the box's edge,
    step 2 epsilon, momentum 0.75, checkpoints 22, 41, 57, 70, 80, 87, 93, 99 and restarts from the
    best point. The logits are quadratic in the image: the maximum lies inside the box. With a
    drift the loss rises in nine of ten iterations and still gains nothing in the end."""
    rng, n, pixels = np.random.default_rng(0), 4, 48
    x = rng.uniform(0.1, 0.9, (n, pixels))
    centres, scales = rng.uniform(0.2, 0.8, (3, pixels)), rng.uniform(0.5, 0.9, (3, pixels))
    centres[1:] = x[:2] + rng.uniform(-0.05, 0.05, (2, pixels))
    first, offset = np.array([1.0, 0, 0]), np.array([12.0, 0, 0])  # always classified as 0

    def logits_and_jacobian(z, k):
        d = z - centres
        return offset - drift * (k % 10) * first - (scales * d ** 2).sum(1), -2 * scales * d

    class Quadratic(nn.Module):
        def forward(self, z):
            now = torch.tensor(offset - drift * (len(points) % 10) * first)
            points.append(z.detach().flatten(1).numpy())
            d = z.flatten(1)[:, None] - torch.tensor(centres)
            return now - (torch.tensor(scales) * d ** 2).sum(2)

    points, images = [], torch.tensor(x).view(n, 3, 4, 4)
    y = torch.zeros(n, dtype=torch.long)
    t = 2 * evaluate.uniform(generators(n, 0, "APGD-CE"), 3, 4, 4).flatten(1).double().numpy() - 1
    ATTACKS["APGD-CE"][0](Quadratic(), images, y, 0.1, generators(n, 0, "APGD-CE"))
    assert len(points) == 101 and all(len(p) == n for p in points)
    halvings = 0
    for i in range(n):
        start = np.clip(x[i] + 0.1 * t[i] / np.abs(t[i]).max(), x[i] - 0.1, x[i] + 0.1)
        expected = numpy_apgd(logits_and_jacobian, x[i], 0, 0.1, np.clip(start, 0, 1))
        found = np.stack([p[i] for p in points])
        assert np.abs(found - np.stack(expected)).max() < 1e-6
        moves = np.abs(np.diff(found, axis=0)).max(1)
        halvings += int((moves[90:].max() < 0.25 * moves[1:20].max()))
    assert halvings == n or drift and halvings > 0  # the step was halved: the maximum is inside


def test_autoattack_parts(checkpoint, monkeypatch):
    """AA is APGD-CE, APGD-T, FAB-T and SQUARE in this order, each on what the ones before left."""
    assert AA == ("APGD-CE", "APGD-T", "FAB-T", "SQUARE")
    seen = []

    def breaks_first(name):
        def fake(model, x, y, epsilon, generators):
            seen.append((name, len(x)))
            z = x.clone()
            z[0] = 1 - z[0]
            return z
        return fake
    for name in AA:
        monkeypatch.setitem(ATTACKS, name, (breaks_first(name), 1))
    e = subject(checkpoint, monkeypatch, "--n", 9, "--epsilon", 1)
    e.model = Wrapped(nn.Flatten(), after=lambda z: torch.stack([z[:, 0] - z[:, 0], z[:, 0]], 1))
    e.images = torch.zeros_like(e.images)
    e.label.zero_()
    e.column("Clean")
    left, _ = e.column("AA")
    assert seen == [("APGD-CE", 9), ("APGD-T", 8), ("FAB-T", 7), ("SQUARE", 6)]
    assert left == pytest.approx(100 * 5 / 9)
    assert json.loads(e.out.read_text())["AA_broken_by"] == [*AA, None, None, None, None, None]


# ------------------------------------------------------------------------ on a small trained model

@pytest.fixture(scope="module")
def stands(robust_net, right):
    """{attack: [30] bool} at 8/255, Square with 500 queries."""
    short = {"SQUARE": {"queries": 500}}
    return {n: attack(n, robust_net, *right, **short.get(n, {}))[1] for n in ATTACKS}


def test_order_of_strength(stands):
    """More work finds more: FGSM, PGD-20, PGD-100, APGD-T leave ever fewer, queries no fewer."""
    left = {name: int(s.sum()) for name, s in stands.items()}
    assert left["Clean"] == 30 and 4 < left["APGD-T"] < 26, left
    assert left["FGSM"] >= left["PGD-20"] >= left["PGD-100"] >= left["APGD-T"], left
    assert left["PGD-20"] >= left["APGD-CE"] >= left["APGD-T"] and left["FGSM"] >= left["FAB-T"]
    assert all(30 > left[name] >= left["APGD-T"] for name in ("CW", "SPSA", "SQUARE")), left


def test_zero_epsilon(robust_net, right):
    """With epsilon 0 every attack returns the image it was given."""
    x, y = right[0][:2], right[1][:2]
    for name in ATTACKS:
        options = {"queries": 20} if name == "SQUARE" else {}
        x_adv, robust = attack(name, robust_net, x, y, 0.0, **options)
        assert robust.all() and torch.allclose(x_adv, x, atol=1e-7), name


@pytest.mark.parametrize("name, options", [
    ("PGD-20", {}), ("APGD-CE", {}), ("APGD-T", {}), ("FAB-T", {}), ("SPSA", {"samples": 20}),
    ("SQUARE", {"queries": 300})])
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


def test_no_pass_is_spent_on_fooled_images(robust_net, right):
    """PGD-100 costs 100 passes for each image that survives and far fewer for the others."""
    before = PASSES.backward
    _, robust = attack("PGD-100", robust_net, *right)
    spent = PASSES.backward - before
    assert 100 * robust.sum() < spent < 100 * robust.sum() + 40 * (~robust).sum()


def test_worst_iterate_counts(robust_net, right):
    """An image is lost once any iterate is misclassified: more steps from the same start never
    lose fewer."""
    short, long = (attack("PGD-20", robust_net, *right, steps=steps)[1] for steps in (3, 20))
    assert (short | ~long).all() and short.sum() > long.sum()


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
        patch.setattr(sys, "argv", ["train_lma_at.py", "--dataset", "shapes"])
        args = vars(train_lma_at.parse_args())
        args |= {"classes": list(shapes.classes),
                 "data": common.fingerprint(shapes.x_train, shapes.y_train)}
        torch.save({"model": model.state_dict(), "epoch": 1, "args": args}, path)
        patch.setattr(common, "load_data", lambda *a: shapes)  # drawn once for all the tests below
        yield path


def arguments(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, argv)])
    return evaluate.parse_args()


def subject(path, monkeypatch, *argv):
    """An Evaluation in this process."""
    e = evaluate.Evaluation(str(path), arguments(monkeypatch, path, *argv), common.load_data,
                            torch.device("cpu"))
    e.open()
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
    args = SimpleNamespace(mean=mean, std=std)
    return evaluate.load_network(path, evaluate.read_checkpoint(path)[0], arch, args, classes)


def doubts(net, patterns, columns, tmp_path, monkeypatch):
    """The sceptic's lines that say SUSPECT, for columns measured on 60 images."""
    monkeypatch.setattr(common, "load_data", lambda *_: patterns)
    monkeypatch.setattr(evaluate, "read_checkpoint", lambda _: ({}, {}))
    monkeypatch.setattr(evaluate, "load_network", lambda *_: net)
    e = subject(tmp_path / "net.pt", monkeypatch, "--dataset", "folder", "--arch", "net", "--n", 60)
    points = {column: e.column(column)[0] for column in ("Clean", *columns)}
    lines = evaluate.sceptic(e, points)
    e.out.unlink()
    assert len(lines) >= 5
    return [line for line in lines if line.startswith("SUSPECT")]


def test_masked_gradients_are_caught(robust_net, patterns, tmp_path, monkeypatch):
    """What looks robust to gradients (staircase, saturated softmax) is named; the honest is not."""
    monkeypatch.setitem(ATTACKS, "SQUARE", (partial(evaluate.square, queries=500), 501))
    look = partial(doubts, patterns=patterns, tmp_path=tmp_path, monkeypatch=monkeypatch)
    assert look(robust_net, columns=["PGD-20", "PGD-100", "SQUARE"]) == []
    stairs = Wrapped(robust_net, before=lambda x: (x * 64).round() / 64)
    found = look(stairs, columns=["PGD-20", "CW", "SQUARE"])
    assert all(any(word in line for line in found) for word in ("black box", "gradient", "64/255"))
    loud = Wrapped(robust_net, after=lambda z: 1e4 * z)
    assert any("gradient" in line for line in look(loud, columns=["PGD-20"]))
    soft = nn.Sequential(robust_net, nn.Softmax(1))
    assert any("probabilities" in line for line in look(soft, columns=["PGD-20"]))


@pytest.mark.parametrize("n", [1, 200, 399, 1000])
def test_the_sceptics_images_are_of_all_classes(n):
    """At most 200 of the correct images, from the first to the last: folders lie class by class."""
    class Seen(Exception):
        pass

    class Correct:
        def robust(self, name):
            return torch.ones(n, dtype=torch.bool)

        def batch(self, rows, purpose):
            raise Seen(rows.tolist())
    with pytest.raises(Seen) as seen:
        evaluate.sceptic(Correct(), {})
    rows, = seen.value.args
    assert min(n, 100) <= len(rows) <= 200 and rows[0] == 0 and rows[-1] >= n - n // len(rows) - 1


def test_the_table(checkpoint, monkeypatch, capsys):
    """Columns in the paper's order with +-; AA is at most each of its parts; the file has the
    record of every image."""
    for name, steps in (("APGD-T", 5), ("FAB-T", 3)):  # shorter: only the book-keeping is looked at
        each, passes = ATTACKS[name]
        short = partial(evaluate.each_target, partial(each.args[0], steps=steps))
        monkeypatch.setitem(ATTACKS, name, (short, passes))
    monkeypatch.setitem(ATTACKS, "SQUARE", (partial(evaluate.square, queries=30), 31))
    status, text, _ = start(monkeypatch, capsys, checkpoint, "--n", 12, "--epsilon", "1/255",
                            "--attacks", "SQUARE", "AA", "FGSM")
    assert status == 0 and "| Method | Clean | FGSM | AA | SQUARE |" in text
    assert "LMA-AT(Ours)" in text and "paper" not in text.split("| Method")[1]  # another epsilon
    found = json.loads(checkpoint.with_name("best.n12.eps1.eval.json").read_text())
    robust = {name: [p == y for p, y in zip(predictions, found["label"])]
              for name, predictions in found["prediction"].items()}
    aa = [all(robust[name][i] for name in AA) for i in range(12)]
    assert found["accuracy"]["AA"] == pytest.approx(100 * sum(aa) / 12)
    for name in (*AA, "Clean", "SQUARE"):
        missing = [p == -1 for p in found["prediction"][name]]
        assert all(a <= r or m for a, r, m in zip(aa, robust[name], missing))
    assert found["accuracy"]["AA"] <= min(found["accuracy"].values())
    for by, a, clean in zip(found["AA_broken_by"], aa, robust["Clean"]):
        assert (by is None) == a and (by == "Clean") == (not clean)
    cost = found["cost"]["FGSM"]
    assert cost["forward"] == 2 * sum(robust["Clean"]) and cost["backward"] > 0


def test_several_seeds_and_the_papers_row():
    """Two seeds give their mean and Student's interval; the paper's row and the difference stand
    below; the paper's numbers are those printed."""
    rows = evaluate.ROWS
    paper = rows["cifar10", "resnet18", "TRADES"]
    two = [SimpleNamespace(path=f"{v}.pt", method="TRADES", paper=paper, alike="same",
                           cells={"Clean": (v, 1.0), "AA": (49.0, 1.0)}) for v in (82.0, 84.0)]
    text = evaluate.table(two, ["Clean", "AA"])
    assert "| TRADES (82.0.pt) | 82.00 ± 1.00 | 49.00 ± 1.00 |" in text
    assert "| TRADES, mean of 2 | 83.00 ± 12.71 | 49.00 ± 0.00 |" in text  # t = 12.71, s. e. 1
    assert "| paper, TRADES | 82.46 | 49.08 |" in text and "| difference | +0.54 | -0.08 |" in text
    assert rows["cifar10", "wrn-34-10", "LMA-AT(Ours)"]["SPSA"] == 64.19 and len(rows) == 43
    assert rows["cifar100", "resnet18", "LMA-AT, tau 0.7"] == {
        "Clean": 53.98, "PGD-20": 33.48, "PGD-100": 32.83, "CW": 29.31, "SPSA": 32.78, "AA": 26.84}
    assert rows["tinyimagenet", "resnet18", "MART"] == {
        "Clean": 45.94, "PGD-20": 26.02, "CW": 21.87, "AA": 19.2}


def test_paper_method(checkpoint):
    """A checkpoint is compared with the paper's row if its settings are those of section 5.1; else
    its name says which differ."""
    shapes = torch.load(checkpoint, weights_only=True)["args"]
    assert evaluate.paper_method(shapes) == ("LMA-AT(Ours), settings differ: epochs 3 (130), "
                                             "lr 0.05 (0.01), batch_size 50 (100)")
    lma = shapes | {"epochs": 130, "lr": 0.01, "batch_size": 100, "val_size": 1000}
    rows = evaluate.ROWS
    for dataset, arch, alpha, beta, tau in (
            ("cifar10", "resnet18", 5.345, 86, 0.2), ("cifar10", "wrn-34-10", 2.345, 86, 0.2),
            ("cifar100", "resnet18", 5.345, 96, 0.9), ("tinyimagenet", "resnet18", 6.345, 96, 0.2)):
        args = {"dataset": dataset, "arch": arch, "alpha": alpha, "beta": beta, "tau": tau}
        assert (dataset, arch, evaluate.paper_method(lma | args)) in rows
        method = evaluate.paper_method(lma | args | {"alpha": 1})
        assert (dataset, arch, method) not in rows
    for other in ({"epsilon": 0}, {"epsilon": 4 / 255}, {"step_size": 0.1}, {"steps": 7},
                  {"beta": 1}, {"delta": 0.1}, {"alpha": 1}, {"margin_reduction": "sum"},
                  {"epochs": 1}, {"lr": 0.5}, {"weight_decay": 0}, {"batch_size": 500},
                  {"amp": True}, {"val_size": 5000}, {"ema": "image"}):
        method = evaluate.paper_method(lma | other)
        assert method.startswith(f"LMA-AT(Ours), settings differ: {list(other)[0]} "), other
        assert method.count("(") == 2 and ("cifar10", "resnet18", method) not in rows
    for held_out in ({"val_size": 0}, {"val_size": 1000}):
        assert evaluate.paper_method(lma | held_out) == "LMA-AT(Ours)"
    plain = {"method": "trades_ours", "attack_loss": "kl", "margin_weight": 0, "beta": 0}
    plain = lma | plain | {"inv_lambda": 6}
    assert evaluate.paper_method(plain) == "TRADES"
    assert "inv_lambda 1 (6)" in evaluate.paper_method(plain | {"inv_lambda": 1})
    assert evaluate.paper_method(plain | {"attack_loss": "ce"}) is None


def test_only_seeds_of_one_setting_on_one_data_set_are_averaged(checkpoint, shapes, tmp_path,
                                                                monkeypatch, capsys):
    """Each checkpoint is tested on its own data; a mean is of those that differ in the seed alone.
    """
    saved = torch.load(checkpoint, weights_only=True)
    dark = shapes._replace(x_test=shapes.x_test // 4)
    monkeypatch.setattr(common, "load_data", lambda _, place: dark if place == "dark" else shapes)
    runs = {"seed0": {}, "seed1": {"seed": 1}, "beta1": {"beta": 1}, "dark": {"data_dir": "dark"}}
    for name, other in runs.items():
        (tmp_path / name).mkdir()
        torch.save(saved | {"args": saved["args"] | other}, tmp_path / name / "best.pt")
    torch.save(saved["model"], tmp_path / "foreign.pt")
    paths = [*(tmp_path / name / "best.pt" for name in runs), tmp_path / "foreign.pt"]
    _, text, _ = start(monkeypatch, capsys, *paths, "--attacks", "FGSM", "--n", 30,
                       "--dataset", "shapes", "--arch", "wrn-10-1")
    assert text.count("mean of") == 1
    assert "| LMA-AT(Ours), settings differ: epochs 3 (130), " in text.split(", mean of 2 |")[0]
    assert "| no row of the paper (" in text and "beta 1 (86) (" in text
    files = [path.with_name(f"{path.stem}.shapes.n30.eval.json") for path in paths]
    found = [json.loads(file.read_text())["accuracy"]["Clean"] for file in files]
    assert found[0] == found[1] == found[2] == found[4] != found[3]


def test_resume_after_kill(checkpoint, tmp_path, monkeypatch, capsys):
    """After kill -9 in the middle of an attack the same command goes on there and ends with the
    same predictions."""
    command = [checkpoint, "--n", 60, "--attacks", "PGD-20", "CW", "--batch-size", 1]
    command += ["--epsilon", "1/255"]
    whole, cut = tmp_path / "whole.json", tmp_path / "cut.json"
    assert start(monkeypatch, capsys, *command, "--out", whole)[0] == 0
    whole = json.loads(whole.read_text())

    def done():
        content = json.loads(cut.read_text()) if cut.exists() else {"prediction": {}}
        return sum(p >= 0 for p in content["prediction"].get("PGD-20", []))
    process = subprocess.Popen([sys.executable, PROGRAM, *map(str, command), "--out", str(cut)],
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
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
    assert cost["forward"] == whole["cost"]["PGD-20"]["forward"]  # nothing was done twice


def test_settings_never_meet(checkpoint, tmp_path, monkeypatch, capsys):
    """What differs from the default stands in the name of the file; a file of another setting is
    refused, not touched."""
    other = ("--epsilon", "4/255", "--seed", 1)
    for more, name in (((), "best.n9"), (other, "best.n9.seed1.eps4")):
        assert start(monkeypatch, capsys, checkpoint, "--n", 9, "--attacks", "FGSM", *more)[0] == 0
        assert checkpoint.with_name(f"{name}.eval.json").exists()
    out = tmp_path / "r.json"
    command = [checkpoint, "--n", 9, "--attacks", "FGSM", "--out", out]
    start(monkeypatch, capsys, *command)
    old = out.read_text()
    for other, what in ((("--epsilon", "1/255"), "epsilon"), (("--seed", 3), "seed"),
                        (("--n", 8), "images")):
        status, _, err = start(monkeypatch, capsys, *command, *other)
        assert status == 2 and err.count("\n") == 1 and f"of other {what}; move" in err
        assert out.read_text() == old


def test_figure1(checkpoint, shapes, tmp_path, monkeypatch, capsys):
    """For every misclassified x', those wrong before the attack among them, the rank of its class
    among the natural model's wrong ones is counted and drawn."""
    out = tmp_path / "r.json"
    status, text, _ = start(monkeypatch, capsys, checkpoint, "--n", 60, "--attacks", "PGD-20", "CW",
                            "--out", out, "--figure1", checkpoint, tmp_path / "f.png")
    counts = {name: eval(rest) for name, rest in
              (line.split(", rank of the wrong class: ") for line in text.splitlines()
               if ", rank of the wrong class: " in line)}
    found = json.loads(out.read_text())
    natural = loaded(checkpoint, "wrn-10-1", 10)
    logits = natural(common.to_float(shapes.x_test[found["index"]]))
    assert counts.keys() == {"PGD-20", "CW"}
    for name, row in counts.items():
        expected = [0] * 9
        clean = found["prediction"]["Clean"]
        for z, x_adv, x, y in zip(logits, found["prediction"][name], clean, found["label"]):
            wrong = x_adv if x == y else x
            if wrong != y:
                order = [c for c in z.argsort(descending=True).tolist() if c != y]
                expected[order.index(wrong)] += 1
        assert list(row.values()) == expected
        assert sum(expected) > sum(x != y for x, y in zip(clean, found["label"])) > 0
        assert list(row)[:3] == ["2nd", "3rd", "4th"]
    assert status == 0 and (tmp_path / "f.png").stat().st_size > 5000


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
    "bare": lambda s: s, "module": lambda s: prefixed(s, "module."),
    "state_dict module": lambda s: {"state_dict": prefixed(s, "module."), "epoch": 7},
    "net": lambda s: {"net": s, "acc": np.float64(83.1)},
    "model_state_dict": lambda s: {"model_state_dict": s, "args": argparse.Namespace(lr=0.1)},
    "compiled DDP": lambda s: prefixed(s, "_orig_mod.module."),
    "DDP of a compiled": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "hparams_name": "x"},
    "ema": lambda s: prefixed(s, "ema."), "basic_net": lambda s: {"net": prefixed(s, "basic_net.")},
    "AveragedModel": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "nested": lambda s: {"model": {"state_dict": s}, "optimizer": {"state": {0: torch.ones(3)}}},
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


def test_nothing_else_is_unpickled(tmp_path, monkeypatch, capsys):
    """A pickled object is refused in one line, and not executed."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Trap()}, "t.pt")
    status, _, err = start(monkeypatch, capsys, "t.pt", "--dataset", "shapes", "--arch", "resnet18")
    assert status == 2 and err.count("\n") == 1 and "t.pt" in err and not Path("trapped").exists()


@pytest.fixture
def refused(checkpoint, tmp_path, monkeypatch, capsys):
    """refused(content of a checkpoint, or a path, or None: the good one; *argv): the one line."""
    def run(content, *argv):
        path = checkpoint if content is None else content
        if not isinstance(path, Path):
            path = tmp_path / "bad.pt"
            torch.save(content, path)
        status, _, err = start(monkeypatch, capsys, path, *argv)
        assert status == 2 and err.count("\n") == 1 and err.startswith("error: "), err
        assert "\033" not in err and "Traceback" not in err
        return err
    before = sorted(checkpoint.parent.iterdir())
    yield run
    assert sorted(checkpoint.parent.iterdir()) == before and not list(tmp_path.glob("*.eval.json"))


FOREIGN = ("--dataset", "shapes", "--arch", "wrn-10-1")


def test_bad_arguments(refused, checkpoint, tmp_path):
    """Mistakes in the command end in one line that names them and the remedy, and write nothing."""
    state = torch.load(checkpoint, weights_only=True)["model"]
    assert "--arch" in refused(state, "--dataset", "shapes")
    assert "--dataset" in refused(state, "--arch", "wrn-10-1")
    assert "--arch nn" in refused(state, "--arch", "nn", "--dataset", "shapes")
    assert "--arch wrn-100000-1000" in refused(state, *FOREIGN[:3], "wrn-100000-1000")
    assert "SPSA" in refused(None, "--attacks", "PGD20")
    assert "8/255" in refused(None, "--epsilon", "8")
    assert "give both" in refused(state, *FOREIGN, "--mean", ".5", ".5", ".5")
    for number in (("--epsilon", "nan"), ("--n", 10 ** 12), ("--seed", 1e39), ("--n", 0),
                   ("--batch-size", 10 ** 12), ("--std", 0, 1, 1), ("--epsilon", "1/0")):
        assert number[0] in refused(None, *number)
    assert "one checkpoint" in refused(None, checkpoint, "--out", tmp_path / "two.json")
    figure = ("--attacks", "PGD-20", "CW", "--figure1", checkpoint)
    assert "PGD-20" in refused(None, "--attacks", "FGSM", *figure[3:], "f.png")
    assert "figure1" in refused(None, *figure, tmp_path)
    assert "figure1" in refused(None, *figure, tmp_path / "absent" / "f.png")


def test_other_networks_weights(refused, checkpoint, tmp_path):
    """Weights that do not fit, mean two things, or are of a network that standardises its images
    are refused with the key in question; shapes are compared before any memory is taken."""
    saved = torch.load(checkpoint, weights_only=True)
    state = saved["model"]
    weight, bias = state["fc.weight"], state["fc.bias"]
    renamed = {k.replace("conv1", "first"): v for k, v in state.items()}
    assert "block1.layer.0.conv1.weight is missing" in refused(renamed, *FOREIGN)
    assert "[16] instead of [32]" in refused(state, *FOREIGN[:3], "wrn-10-2")
    assert "not finite" in refused(state | {"fc.bias": bias * torch.nan}, *FOREIGN)
    small = state | {"fc.weight": weight[:5], "fc.bias": bias[:5]}
    assert "fc.bias is [5] instead of [10]" in refused(small, *FOREIGN)
    natural = tmp_path / "natural.pt"
    torch.save(saved | {"model": small}, natural)
    assert "natural.pt does not fit" in refused(
        None, "--attacks", "PGD-20", "CW", "--figure1", natural, tmp_path / "f.png")
    for nothing in ({"epoch": 3}, [1, 2], torch.ones(3), {1: torch.ones(1), (1, 2): 3}):
        assert "holds 0 state_dicts" in refused(nothing, *FOREIGN)
    endless = {}
    endless["model"] = endless
    assert "holds 0 state_dicts" in refused(endless, *FOREIGN)
    double = state | {"linear.weight": weight * 0, "linear.bias": bias * 0}
    assert "linear.weight" in refused(double, *FOREIGN)
    several = [state | prefixed(state, "module."), {"model": state, "ema": state}]
    assert all("holds 2 state_dicts" in refused(content, *FOREIGN) for content in several)
    own = {"mu": state | {"mu": torch.ones(3)}, "normalize_input": {"net": state,
           "normalize_input": True}, "0.mean": {"0.mean": torch.ones(3), **prefixed(state, "1.")}}
    for key, content in own.items():
        err = refused(content, *FOREIGN)
        assert key in err and "--mean and --std" in err
    ints = {1: torch.ones(2), **state}
    assert "1 is [2] instead of absent" in refused(ints, *FOREIGN)
    for odd in (weight.to_sparse(), torch.empty(10, 64, device="meta"), torch.tensor(1.0), [1],
                weight.long(), torch.zeros(1).expand(10 ** 9, 64)):
        assert "fc.weight is " in refused(state | {"fc.weight": odd}, *FOREIGN)


def test_odd_files(refused, checkpoint, tmp_path):
    """Whatever else a file holds is one line of ours; arguments are not believed blindly."""
    saved = torch.load(checkpoint, weights_only=True)
    bad = tmp_path / "broken.pt"
    for content in (b"no checkpoint", b"", checkpoint.read_bytes()[:5000]):
        bad.write_bytes(content)
        assert "broken.pt: is no file of torch.save, or damaged" in refused(bad)
    assert "absent.pt: No such file" in refused(tmp_path / "absent.pt")
    assert "holds torch.nn.modules.linear.Linear" in refused(nn.Linear(2, 2), *FOREIGN)
    for args, word in (({"arch": ["wrn-10-1"]}, "args.arch"), ({"dataset": ["x"]}, "args.dataset"),
                       ({"data_dir": torch.ones(2)}, "args.data_dir"), ({"tau": {}}, "args.tau"),
                       ({"dataset": "mnist"}, "--dataset"), ({"classes": [1, {}]}, "args.classes"),
                       ({"arch": "nn"}, "--arch nn")):
        assert word in refused(saved | {"args": saved["args"] | args})


def test_data_of_the_checkpoint(refused, checkpoint, tmp_path, monkeypatch, capsys):
    """A checkpoint is tested on its own classes only; other training images are pointed out."""
    saved = torch.load(checkpoint, weights_only=True)
    classes = saved["args"]["classes"]
    renamed = saved["args"] | {"classes": ["zebra", *classes[1:]]}
    err = refused(saved | {"args": renamed})
    assert "zebra" in err and classes[0] in err and "--data-dir" in err
    swapped = saved["args"] | {"classes": classes[::-1]}
    assert "in another order" in refused(saved | {"args": swapped})
    other, command = tmp_path / "other.pt", ("--n", 5, "--attacks", "FGSM")
    torch.save(saved | {"args": saved["args"] | {"data": "4999 images"}}, other)
    out = ("--out", tmp_path / "o.json")
    assert "trained on other images" in start(monkeypatch, capsys, other, *command, *out)[1]
    assert "other images" not in start(monkeypatch, capsys, checkpoint, *command)[1]
    checkpoint.with_name("best.n5.eval.json").unlink()


def test_results_are_not_believed_blindly(refused, checkpoint, tmp_path, monkeypatch, capsys):
    """A file of results is used only with all settings equal and predictions that can be."""
    out = tmp_path / "r.json"
    command = ("--n", 9, "--attacks", "FGSM", "--out", out)
    start(monkeypatch, capsys, checkpoint, *command)
    good = json.loads(out.read_text())
    found = good["prediction"]["FGSM"]

    def with_predictions(*values):
        return good | {"prediction": good["prediction"] | {"FGSM": [*values]}}
    no_seed = {k: v for k, v in good["settings"].items() if k != "seed"}
    bad = [[1, 2], {}, good | {"settings": {}}, good | {"settings": no_seed},
           good | {"settings": good["settings"] | {"more": 1}}, good | {"cost": None},
           with_predictions(), with_predictions(*found[1:]), with_predictions(999, *found[1:]),
           with_predictions(float("nan"), *found[1:]), with_predictions(-2, *found[1:]),
           with_predictions(True, *found[1:]), with_predictions("1", *found[1:])]
    for content in bad:
        out.write_text(json.dumps(content))
        assert "r.json is " in refused(None, *command)
        assert json.dumps(json.loads(out.read_text())) == json.dumps(content)
    out.write_text(json.dumps(good))
    assert start(monkeypatch, capsys, checkpoint, *command)[0] == 0


def test_the_file_of_results_is_tried_first(refused, checkpoint, tmp_path, monkeypatch):
    """What will be written is tried before work begins."""
    monkeypatch.setattr(evaluate.Evaluation, "run", lambda *_: 1 / 0)
    for out in (tmp_path, Path("/dev/full"), tmp_path / "absent" / "r.json"):
        assert str(out) in refused(None, "--out", out)


def test_logits_that_are_not_finite(refused, checkpoint, tmp_path):
    """A network whose logits are not finite is not scored."""
    saved = torch.load(checkpoint, weights_only=True)
    state = saved["model"]
    for key, value in (("bn1.running_var", -state["bn1.running_var"]),
                       ("fc.weight", 3e38 * state["fc.weight"].sign())):
        out = ("--attacks", "PGD-20", "--n", 20, "--out", tmp_path / f"{key}.json")
        assert "logits are not finite" in refused(saved | {"model": state | {key: value}}, *out)
    class Brink(Flat):  # finite on the image itself, not on an attack's way
        def forward(self, x):
            return super().forward(x) + 0 / ((x - 0.5).abs().amax() < 1e-3)
    brink = Brink(3)
    x, y = correct(brink, torch.full((1, 3, 8, 8), 0.5))
    for name in ("FGSM", "PGD-20", "CW", "APGD-CE", "APGD-T", "FAB-T", "SQUARE", "SPSA"):
        with pytest.raises(SystemExit):
            own = generators(1)
            evaluate.logits_of(brink, ATTACKS[name][0](brink, x, y, 0.1, own))


def test_no_pass_is_larger_than_the_batch(checkpoint, monkeypatch, capsys, tmp_path):
    """--batch-size bounds every pass through the network: attacks, SPSA's queries, the sceptic's
    checks, Figure 1."""
    rows, forward = [], type(common.make_model("wrn-10-1", 10)).forward

    def spy(model, x):
        rows.append(len(x))
        return forward(model, x)
    monkeypatch.setattr(type(common.make_model("wrn-10-1", 10)), "forward", spy)
    monkeypatch.setitem(ATTACKS, "SPSA", (partial(evaluate.spsa, steps=1), 201))
    status, _, _ = start(monkeypatch, capsys, checkpoint, "--n", 24, "--batch-size", 7,
                         "--attacks", "PGD-20", "CW", "SPSA", "--epsilon", "1/255",
                         "--figure1", checkpoint, tmp_path / "f.png", "--out", tmp_path / "r.json")
    assert status == 0 and max(rows) == 7


def test_torchrun_gives_the_same(checkpoint, tmp_path, monkeypatch, capsys):
    """Two processes, each with half of the images, write the file that one process writes."""
    command = [checkpoint, "--n", 31, "--attacks", "PGD-20", "CW", "--epsilon", "1/255"]
    assert start(monkeypatch, capsys, *command, "--out", tmp_path / "one.json")[0] == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command = [*torchrun, "--", PROGRAM, *map(str, command), "--out", tmp_path / "two.json"]
    two = subprocess.run(command, capture_output=True, text=True, timeout=120,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert two.returncode == 0, two.stderr
    one, two = (json.loads((tmp_path / f).read_text()) for f in ("one.json", "two.json"))
    assert one["prediction"] == two["prediction"] and one["accuracy"] == two["accuracy"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one.json", "two.json"]
