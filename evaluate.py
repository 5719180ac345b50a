"""Robust accuracy of a checkpoint under the attacks of section 5.2: a row of Table 4.

    python evaluate.py runs/cifar10-resnet18-lma_at-seed* --attacks PGD-20 CW AA --n 1000
    python evaluate.py trades.pt --dataset cifar10 --arch wrn-34-10

The table (Markdown) and checks for masked gradients go to stdout, progress goes to stderr. The
predictions are kept in a file such as best.3fa81c02.eval.json, named with a checksum of weights,
images and settings. The same command continues from this file.

The attacks can be called on their own; model maps images [N, 3, H, W] in [0, 1] to logits [N, C]:

    x_adv = evaluate.autoattack(model, x, y)
    x_adv = evaluate.perturb("PGD-20", model, x, y)

Each image has its own random numbers: its result does not depend on the other images of the batch.
The first misclassified iterate within epsilon ends the attack on its image.
"""

import argparse
import json
import math
import re
import sys
import warnings
import zlib
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.transforms import Normalize

import common
from common import fail


# --------------------------------------------------------------------- passes through the network
@torch.no_grad()
def logits_of(model, x):
    """Logits [N, C] of images x. Raises FloatingPointError if one is not finite."""
    logits = model(x)
    if not logits.isfinite().all():
        raise FloatingPointError("the logits of a network are not finite")
    return logits


@torch.enable_grad()
def gradient(model, x, loss, y, *target):
    """misclassified [N], loss(logits, y, *target) [N, 1, 1, 1] and its gradient by x."""
    x = x.detach().requires_grad_()
    logits = model(x)
    value = loss(logits, y, *target)
    total = value.sum() + 0 * x.sum()  # gives 0 where the network has no gradient
    grad = torch.autograd.grad(total, x)[0]
    if not grad.isfinite().all():  # the sign of NaN is no attack
        raise FloatingPointError("gradients of a network are not finite")
    return logits.argmax(1) != y, value.detach().view(-1, 1, 1, 1), grad


class Survivors:
    """The images that are not misclassified so far, and what an attack knows of them.

    Every attribute has a row for each of them: x_adv is its iterate, row its place in the batch,
    and an attack adds tensors of its own.
    """

    def __init__(self, x_adv, **tensors):
        self.x_adv = x_adv
        self.row = torch.arange(len(x_adv), device=x_adv.device)
        vars(self).update(tensors)

    def drop(self, fooled, result):
        """Write fooled images into result, remove their rows. Returns whether none is left."""
        if fooled.any():
            result[self.row[fooled]] = self.x_adv[fooled]
            for name, tensor in vars(self).items():
                setattr(self, name, tensor[~fooled])
        return len(self.row) == 0


# --------------------------------------------------------------------- random numbers, box, losses
def generators_of(seed, attack, index, device):
    """A torch.Generator for each image, which follows from seed, name of the attack and index."""
    seeds = [zlib.crc32(f"{seed} {attack} {i}".encode()) for i in index.tolist()]
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def uniform(x, generators, *shape):
    """[N, *shape] uniform in [0, 1), row i from generator i, on the device of x."""
    draws = x.new_empty(len(generators), *shape)
    for draw, generator in zip(draws, generators, strict=True):
        draw.uniform_(generator=generator)
    return draws


def box(x, epsilon):
    """Lower and upper bound of the allowed images: within epsilon of x and in [0, 1]."""
    return (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)


def linf_norm(d):
    """The largest absolute value in each image of d, [N, 1, 1, 1]."""
    return d.abs().amax((1, 2, 3), keepdim=True)


cross_entropy = partial(F.cross_entropy, reduction="none")  # [N]


def margin(logits, y):
    """z_y - max_{j != y} z_j, [N], of logits z: negative where misclassified."""
    return logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def cw_loss(logits, y):
    """What CW maximises by PGD, with confidence 50 (section 5.2; Carlini & Wagner 2017)."""
    return -(margin(logits, y) + 50).clamp(min=0)


def target_margin(logits, y, target):
    """z_t - z_y, [N], of logits z and target class t."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def dlr_targeted(logits, y, target):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) (Croce & Hein 2020b), [N].

    z_(k) is the k-th largest logit. With fewer than four classes it is z_t - z_y.
    """
    if logits.shape[1] < 4:
        return target_margin(logits, y, target)
    first, _, third, fourth = logits.topk(4).values.T
    return target_margin(logits, y, target) / (first - (third + fourth) / 2 + 1e-12)


# ------------------------------------------------------------------------------------- the attacks
# All take images x [N, 3, H, W] with labels y [N], the radius epsilon and a generator for each
# image, and return x_adv, which is within epsilon of x and in [0, 1].
def fgsm(model, x, y, epsilon, generators):
    """Fast gradient sign method (Goodfellow et al. 2014): one step of size epsilon from x."""
    _, _, grad = gradient(model, x, cross_entropy, y)
    return (x + epsilon * grad.sign()).clamp(*box(x, epsilon))


def pgd_attack(model, x, y, epsilon, generators, steps=20, step_size=1 / 255, loss=cross_entropy):
    """PGD (eq. 2) from a uniform point of the box, with the step size of section 5.2."""
    low, high = box(x, epsilon)
    start = x + epsilon * (2 * uniform(x, generators, *x.shape[1:]) - 1)
    s, result = Survivors(start.clamp(low, high), y=y, low=low, high=high), x.clone()
    for _ in range(steps):
        fooled, _, s.grad = gradient(model, s.x_adv, loss, s.y)
        if s.drop(fooled, result):
            break
        s.x_adv = (s.x_adv + step_size * s.grad.sign()).clamp(s.low, s.high)
    result[s.row] = s.x_adv
    return result


def apgd(model, x, y, epsilon, generators, target=None, loss=cross_entropy, steps=100):
    """Auto-PGD (Croce & Hein 2020b, Algorithm 1): each image finds its own step size.

    It maximises loss(logits, y), or loss(logits, y, target) if target classes [N] are given.
    Returns the first misclassified iterate, or else that of largest loss before the last.
    """
    low, high = box(x, epsilon)
    t = 2 * uniform(x, generators, *x.shape[1:]) - 1
    start = (x + epsilon * t / linf_norm(t)).clamp(low, high)
    s, result = Survivors(start, y=y, low=low, high=high), x.clone()
    s.target = y if target is None else target  # without targets it is not used
    s.x_before = s.x_best = start
    s.grad_best = torch.zeros_like(x)
    s.step = torch.full_like(linf_norm(x), 2 * epsilon)
    s.value = torch.full_like(s.step, torch.inf)  # so that the start does not count as a rise
    s.value_best = s.value_at_checkpoint = -s.value
    s.rises = torch.zeros_like(s.step)  # since the last checkpoint
    s.halved = torch.ones_like(s.step, dtype=torch.bool)  # at the last checkpoint
    # windows of 22 % of the steps, then each 3 % shorter, down to 6 %
    checkpoints = [math.ceil(c * steps / 100) for c in (22, 41, 57, 70, 80, 87, 93, 99)]
    checkpoint = 0

    for k in range(steps):
        s.value_before = s.value
        targets = () if target is None else (s.target,)
        fooled, s.value, s.grad = gradient(model, s.x_adv, loss, s.y, *targets)
        if s.drop(fooled, result):
            return result
        s.rises = s.rises + (s.value > s.value_before)
        better = s.value > s.value_best
        s.x_best = torch.where(better, s.x_adv, s.x_best)
        s.grad_best = torch.where(better, s.grad, s.grad_best)
        s.value_best = torch.maximum(s.value, s.value_best)

        if k in checkpoints:  # where the loss is stuck: halve the step, go back to the best point
            few_rises = s.rises <= 0.75 * (k - checkpoint)
            no_gain = ~s.halved & (s.value_best <= s.value_at_checkpoint)
            s.halved = few_rises | no_gain
            s.step = torch.where(s.halved, s.step / 2, s.step)
            s.x_adv = torch.where(s.halved, s.x_best, s.x_adv)
            s.grad = torch.where(s.halved, s.grad_best, s.grad)
            s.rises, s.value_at_checkpoint = torch.zeros_like(s.rises), s.value_best
            checkpoint = k

        ahead = (s.x_adv + s.step * s.grad.sign()).clamp(s.low, s.high)
        a = 0.75 if k > 0 else 1.0  # 1 - a is the momentum
        x_next = s.x_adv + a * (ahead - s.x_adv) + (1 - a) * (s.x_adv - s.x_before)
        s.x_before, s.x_adv = s.x_adv, x_next.clamp(s.low, s.high)

    s.drop(logits_of(model, s.x_adv).argmax(1) != s.y, result)
    result[s.row] = s.x_best
    return result


def each_target(attack, model, x, y, epsilon, generators):
    """attack(..., target) towards each of the (at most 9) wrong classes of largest clean logit."""
    wrong = logits_of(model, x).scatter(1, y[:, None], -torch.inf)
    targets = wrong.argsort(1, descending=True)[:, :-1][:, :9]
    s, result = Survivors(x, x=x, y=y, targets=targets), x.clone()
    for rank in range(targets.shape[1]):
        of_rows = [generators[row] for row in s.row.tolist()]
        s.x_adv = attack(model, s.x, s.y, epsilon, of_rows, s.targets[:, rank])
        if s.drop(logits_of(model, s.x_adv).argmax(1) != s.y, result):
            break
    return result


def to_hyperplane(x, w, gap):
    """The smallest d (L-infinity) with w . d = gap [N, 1, 1, 1] and x + d in [0, 1].

    Where no d reaches the gap, the one that comes nearest (Croce & Hein 2020a, section 3). Pixels
    move by t, at most by their room to 0 or 1. What is covered of the gap, sum |w| min(t, room), is
    concave and piecewise linear in t, so Newton's steps from 0 end on the exact t.
    """
    direction, weight, gap = w.sign() * gap.sign(), w.abs(), gap.abs()
    room = torch.where(direction > 0, 1 - x, x)
    t = torch.zeros_like(gap)
    while True:
        covered = (weight * torch.minimum(room, t)).sum((1, 2, 3), keepdim=True)
        moving = (room - t).sign().relu()  # 1 where room > t, which a CPU does faster than a mask
        slope = (weight * moving).sum((1, 2, 3), keepdim=True)
        ahead = t + (gap - covered) / slope.clamp(min=1e-30)
        t_before = t
        t = torch.maximum(t, ahead.clamp(max=1))  # no room exceeds 1
        if not (t > t_before * (1 + 1e-6)).any():
            return direction * torch.minimum(room, t)


def fab(model, x, y, epsilon, generators, target, steps=100):
    """Fast adaptive boundary attack (Croce & Hein 2020a, Algorithm 1) towards a target [N].

    It walks along the boundary between y and target, and ends at the first misclassified point
    within epsilon. Where it finds none, it returns x.
    """
    s, result = Survivors(x, x=x, y=y, target=target), x.clone()
    for _ in range(steps):
        # the boundary is about w . (u - x_adv) + value = 0 in a point u near x_adv
        _, value, w = gradient(model, s.x_adv, target_margin, s.y, s.target)
        d_adv = to_hyperplane(s.x_adv, w, -value)
        d_x = to_hyperplane(s.x, w, (w * (s.x_adv - s.x)).sum((1, 2, 3), keepdim=True) - value)
        norm_adv, norm_x = linf_norm(d_adv).clamp(min=1e-8), linf_norm(d_x).clamp(min=1e-8)
        alpha = (norm_adv / (norm_adv + norm_x)).clamp(max=0.1)
        s.x_adv = (s.x_adv + 1.05 * d_adv) * (1 - alpha) + (s.x + 1.05 * d_x) * alpha
        s.x_adv = s.x_adv.clamp(0, 1)
        s.crossed = logits_of(model, s.x_adv).argmax(1) != s.y
        near = linf_norm(s.x_adv - s.x).flatten() <= epsilon
        if s.drop(s.crossed & near, result):
            break
        back = s.x + 0.9 * (s.x_adv - s.x)
        s.x_adv = torch.where(s.crossed.view(-1, 1, 1, 1), back, s.x_adv)
    return result


def square_side(k, h, w):
    """Side of the square of query k: 0.8 of the area of h x w pixels, halved after 10, 50, ..."""
    p = 0.8 / 2 ** sum(k > end for end in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
    return min(max(round(math.sqrt(p * h * w)), 1), h, w)


def square(model, x, y, epsilon, generators, queries=5000):
    """Square Attack (Andriushchenko et al. 2020, Algorithms 1 and 2), which needs no gradient.

    A random square, in each channel at the lower or the upper bound, is kept if it lowers
    z_y - max_{j != y} z_j.
    """
    (low, high), (c, h, w) = box(x, epsilon), x.shape[1:]
    stripes = uniform(x, generators, c, 1, w) < 0.5
    draws = uniform(x, generators, queries, 2 + c)  # for row, column and signs of each square
    s = Survivors(torch.where(stripes, low, high), y=y, low=low, high=high)
    s.margin, result = margin(logits_of(model, s.x_adv), y), x.clone()
    row, column = torch.arange(h, device=x.device)[:, None], torch.arange(w, device=x.device)
    for k in range(queries):
        if s.drop(s.margin < 0, result):
            break
        side = square_side(k, h, w)
        draw = draws[s.row, k, :, None, None]  # [n, 2 + c, 1, 1]
        top, left = (draw[:, :1] * (h - side + 1)).long(), (draw[:, 1:2] * (w - side + 1)).long()
        inside = (top <= row) & (row < top + side) & (left <= column) & (column < left + side)
        proposal = torch.where(inside, torch.where(draw[:, 2:] < 0.5, s.low, s.high), s.x_adv)
        value = margin(logits_of(model, proposal), s.y)
        better = value < s.margin
        s.x_adv[better] = proposal[better]
        s.margin = torch.minimum(value, s.margin)
    result[s.row] = s.x_adv
    return result


def spsa(model, x, y, epsilon, generators, steps=20, samples=100, delta=0.001, lr=0.01):
    """SPSA (Uesato et al. 2018, section 4; constants of section 5.2), which needs no gradient.

    Adam minimises f = z_y - max_{j != y} z_j. Its gradient is estimated by the mean of
    (f(x + delta v) - f(x - delta v)) / (2 delta) v over random sign vectors v.
    """
    low, high = box(x, epsilon)
    s, result = Survivors(x, y=y, low=low, high=high), x.clone()
    s.first_moment, s.second_moment = torch.zeros_like(x), torch.zeros_like(x)
    size = (samples, *x.shape[1:])
    for k in range(1, steps + 1):
        s.grad = torch.empty_like(s.x_adv)
        for i, row in enumerate(s.row.tolist()):
            g = generators[row]
            v = torch.randint(2, size, generator=g, device=x.device, dtype=x.dtype) * 2 - 1
            f = logits_of(model, torch.cat([s.x_adv[i] + delta * v, s.x_adv[i] - delta * v]))
            ahead, behind = margin(f, s.y[i].expand(2 * samples)).chunk(2)
            s.grad[i] = torch.einsum("s,schw->chw", (ahead - behind) / (2 * delta * samples), v)
        s.first_moment = 0.9 * s.first_moment + 0.1 * s.grad
        s.second_moment = 0.999 * s.second_moment + 0.001 * s.grad**2
        scale = (s.second_moment / (1 - 0.999**k)).sqrt() + 1e-8
        s.x_adv = s.x_adv - lr * (s.first_moment / (1 - 0.9**k) / scale)
        s.x_adv = s.x_adv.clamp(s.low, s.high)
        if s.drop(logits_of(model, s.x_adv).argmax(1) != s.y, result):
            break
    result[s.row] = s.x_adv
    return result


ATTACKS = {
    "Clean": lambda model, x, *others: x,
    "FGSM": fgsm,
    "PGD-20": pgd_attack,
    "PGD-100": partial(pgd_attack, steps=100),
    "CW": partial(pgd_attack, loss=cw_loss),
    "APGD-CE": apgd,
    "APGD-T": partial(each_target, partial(apgd, loss=dlr_targeted)),
    "FAB-T": partial(each_target, fab),
    "SQUARE": square,
    "SPSA": spsa,
}
AA = ["APGD-CE", "APGD-T", "FAB-T", "SQUARE"]  # AutoAttack's standard version, in its order
COLUMNS = ("Clean", "FGSM", "PGD-20", "PGD-100", "CW", "AA", "SQUARE", "SPSA")  # of Table 4


def check_images(x, epsilon):
    """Raise ValueError if x are no floats in [0, 1] or epsilon is no radius below 1."""
    common.check_attack(x, epsilon)
    if len(x) and not 0 <= x.min() <= x.max() <= 1:
        raise ValueError("images must be in [0, 1]: a Normalize belongs into the model")


@torch.no_grad()
def perturb(name, model, x, y, epsilon=8 / 255, seed=0, index=None, batch_size=64):
    """x_adv of the attack `name` of ATTACKS on images x [N, 3, H, W] in [0, 1], labels y [N].

    model is a network, meanwhile in eval mode, or any function from images to logits. An image's
    random numbers follow from seed, name and its number in index [N], by default its place.
    """
    check_images(x, epsilon)
    index, x_adv = torch.arange(len(x)) if index is None else index, []
    with common.frozen(model):
        for part in zip(*(t.split(batch_size) for t in (x, y, index)), strict=True):
            generators = generators_of(seed, name, part[2], x.device)
            x_adv.append(ATTACKS[name](model, *part[:2], epsilon, generators))
    return torch.cat(x_adv).clamp(*box(x, epsilon))


@torch.no_grad()
def autoattack(model, x, y, epsilon=8 / 255, seed=0, batch_size=64):
    """x_adv of AutoAttack's standard version (Croce & Hein 2020b), with arguments as in perturb.

    Each of its four attacks gets the images that are right so far. Warns of gradients that are 0.
    """
    check_images(x, epsilon)
    x_adv = x.clone()
    with common.frozen(model):
        if not gradient(model, x[:batch_size], cross_entropy, y[:batch_size])[2].any():
            warnings.warn("the gradient is zero: of AutoAttack SQUARE alone works", stacklevel=3)
        for rows in torch.arange(len(x), device=x.device).split(batch_size):
            for name in AA:
                rows = rows[logits_of(model, x_adv[rows]).argmax(1) == y[rows]]
                x_adv[rows] = perturb(
                    name, model, x[rows], y[rows], epsilon, seed, rows, batch_size
                )
    return x_adv


# ------------------------------------------------------------------------- the paper's numbers
# Tables 2 to 7 and 10 (A, B): the rows of the methods of this code, with columns as in COLUMNS.
PAPER = """
# cifar10 resnet18
at_ours attack_loss=ce margin_weight=0 beta=0     85.80 57.87 52.05 49.28 51.08 46.62 55.69 56.17
trades_ours attack_loss=kl margin_weight=0 beta=0 82.46 58.26 54.78 53.45 51.65 49.08 55.64 56.50
mart_ours attack_loss=ce margin_weight=0 beta=0   81.30 58.06 54.73 53.28 51.86 49.01 55.66 56.15
at_ours                                           82.82 59.89 56.36 54.83 51.95 48.32 57.11 60.35
trades_ours                                       83.93 59.32 56.23 54.98 51.73 48.78 58.46 59.45
mart_ours                                         83.33 60.87 57.41 55.81 51.83 48.48 58.54 60.56
lma_at                                            83.56 61.19 57.21 55.64 52.30 49.10 59.54 60.44
lma_at tau=0                                      79.33 - 56.93 55.92 51.97 48.34 - 58.86
lma_at tau=0.1                                    84.11 - 56.45 54.65 52.62 48.75 - 60.14
lma_at tau=0.7                                    81.72 - 57.83 56.47 52.49 48.96 - 59.10
lma_at tau=0.9                                    80.33 - 57.31 56.12 52.28 49.20 - 59.16
at_ours attack_loss=ce                            83.88 60.78 56.26 54.79 51.91 48.57 56.83 60.55
lma_at margin_weight=0                            82.60 60.36 56.74 55.08 52.17 48.67 57.69 60.51
# cifar10 wrn-34-10
at_ours attack_loss=ce margin_weight=0 beta=0     86.46 61.62 56.75 54.72 55.63 51.06 59.68 60.66
trades_ours attack_loss=kl margin_weight=0 beta=0 84.58 60.60 57.71 56.69 55.01 52.57 59.45 61.09
mart_ours attack_loss=ce margin_weight=0 beta=0   84.25 62.03 58.29 55.56 54.82 51.40 58.21 59.87
at_ours                                           85.96 63.03 59.76 58.31 56.03 52.82 60.02 63.78
trades_ours                                       85.62 63.22 59.31 58.26 54.87 52.25 58.89 63.95
mart_ours                                         84.83 63.66 60.89 59.76 55.56 52.45 59.42 62.65
lma_at                                            85.39 64.04 60.62 59.48 56.07 52.61 60.10 64.19
# cifar100 resnet18
at_ours attack_loss=ce margin_weight=0 beta=0     56.87 31.21 29.33 28.46 26.33 23.69 30.06 31.63
trades_ours attack_loss=kl margin_weight=0 beta=0 57.16 31.45 30.32 29.48 25.16 25.18 30.46 32.06
mart_ours attack_loss=ce margin_weight=0 beta=0   54.02 32.81 31.13 30.14 26.98 24.83 31.17 32.45
at_ours                                           60.41 33.61 30.83 29.65 28.89 25.14 33.10 34.42
trades_ours                                       59.23 34.05 31.72 30.98 27.84 25.42 31.66 33.30
mart_ours                                         55.55 34.74 32.92 32.29 28.70 26.29 31.49 33.57
lma_at                                            58.86 34.79 32.51 31.65 29.04 26.29 33.57 34.07
lma_at tau=0                                      51.40 - 32.76 32.21 28.43 26.51 - 31.71
lma_at tau=0.1                                    59.78 - 32.02 31.08 28.91 25.51 - 34.98
lma_at tau=0.7                                    53.98 - 33.48 32.83 29.31 26.84 - 32.78
lma_at tau=0.9                                    52.20 - 33.29 32.83 29.19 26.78 - 31.88
# tinyimagenet resnet18
trades_ours attack_loss=kl margin_weight=0 beta=0 49.56 - 22.90 - 19.70 16.78 - -
mart_ours attack_loss=ce margin_weight=0 beta=0   45.94 - 26.02 - 21.87 19.20 - -
trades_ours                                       50.43 - 24.82 - 20.52 18.15 - -
mart_ours                                         46.88 - 26.87 - 22.10 19.84 - -
lma_at                                            49.10 - 26.35 - 22.40 18.31 - -
"""
ROWS = {}  # {(data set, network, name of a run): {column: percent}}
for block in PAPER.split("#")[1:]:
    title, *lines = block.strip().splitlines()
    for line in lines:
        name, *cells = line.rsplit(maxsplit=len(COLUMNS))
        numbers = {c: float(v) for c, v in zip(COLUMNS, cells, strict=True) if v != "-"}
        ROWS[*title.split(), name] = numbers


# --------------------------------------------------------------------------- loading a checkpoint
def read_checkpoint(path, args):
    """(weights, arguments of the training) of a run's folder, a file of it, or a foreign file."""
    file = Path(path)
    if file.is_dir():
        file /= "best.pt" if (file / "best.pt").exists() else "last.pt"
    saved = torch.load(file, map_location="cpu", weights_only=True)
    if "name" not in saved.get("args", ()):
        return foreign(file, saved, args)
    training, weights = saved["args"] | {"path": file}, saved["model"]
    if file == Path(path) and "best" in saved:
        training["name"] += ", last epoch"
    elif "best" in saved:
        weights = saved["best"]["model"]
    if not saved.get("done"):
        training["name"] += f" after {saved['epoch']} of {training['epochs']} epochs"
    return weights, training


def foreign(file, saved, args):
    """(weights, training) of a state_dict, alone or as "state_dict", "model" or "net" of a file."""
    if None in (args.dataset, args.arch):
        fail(f"{file} is not of this version of the code; say by --dataset and --arch what it is")
    training = vars(args) | {"path": file, "name": str(file)}
    classes = saved.get("classes", saved.get("class_to_idx"))
    if isinstance(classes, dict):
        classes = sorted(classes, key=classes.get)
    if isinstance(classes, (list, tuple)):
        training["classes"] = list(classes)
    for key in ("state_dict", "model", "net"):  # unwrap
        saved = saved.get(key, saved)
    return saved, training


def names_of_here(weights):
    """Weights under the names that the networks of common.py have, from other people's names."""
    renamed = {}
    for key, weight in weights.items():
        name = re.sub(r"^((module|_orig_mod)\.)+", "", key).replace(".shortcut.", ".downsample.")
        if not name.startswith("sub_block1."):  # TRADES' files hold block1 twice
            renamed[re.sub(r"^linear\.", "fc.", name)] = weight
    return renamed


def load_network(weights, training, classes):
    """The network of a checkpoint, in eval mode and without gradients for its weights."""
    theirs = training.get("classes", classes)
    if theirs != classes:
        fail(f"{training['path']} is for other classes: {theirs!s:.200}, here {classes!s:.200}")
    model = common.make_model(training["arch"], len(classes))
    if weights.keys() != model.state_dict().keys():
        weights = names_of_here(weights)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # it names what is missing, unexpected or of another shape
        fail(f"{training['path']}: {error!s:.300}; is --arch right?")
    if training.get("mean") or training.get("std"):
        model = nn.Sequential(Normalize(training["mean"], training["std"]), model)
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------ the results, in a file
class Evaluation:
    """The predictions for one checkpoint, kept in a JSON file from which they are continued.

    prediction[name] [n] are the classes predicted under the attack of that name, so far or -1.
    """

    def __init__(self, path, args, device):
        weights, self.training = read_checkpoint(path, args)
        self.path, self.name, self.device = self.training["path"], self.training["name"], device
        where = args.data_dir or self.training["data_dir"] or "data"
        data = common.load_data(self.training["dataset"], where, "test")
        size = f" of {data.x.shape[2]}x{data.x.shape[3]},"
        if size not in self.training.get("data", size):
            fail(f"{path} was trained on {self.training['data']}; the test images are{size[:-1]}")
        order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(0))
        self.index = order[: args.n].sort().values
        self.images, self.label, self.classes = data.x[self.index], data.y[self.index], data.classes
        self.model = load_network(weights, self.training, data.classes)
        self.model.to(device, memory_format=torch.channels_last)
        raw = b"".join(value.numpy().tobytes() for value in weights.values())
        self.settings = {key: self.training.get(key) for key in ("arch", "mean", "std")}
        self.settings |= {
            "version": 3,  # whoever changes an attack raises it: older results do not continue
            "weights": zlib.crc32(raw),
            "images": common.fingerprint(self.images, self.label),
            "epsilon": args.epsilon,
            "seed": args.seed,
        }
        key = zlib.crc32(json.dumps(self.settings).encode())
        self.out = self.path.with_suffix(f".{key:08x}.eval.json")
        self.prediction = {name: torch.full_like(self.label, -1) for name in ATTACKS}
        self.save()  # takes in what is known; an unwritable folder is found now

    def save(self):
        """Write the file, after taking in what another evaluation has written there meanwhile."""
        if self.out.exists():
            for name, known in json.loads(self.out.read_text())["prediction"].items():
                mine = self.prediction[name]
                self.prediction[name] = torch.where(mine == -1, torch.tensor(known), mine)
        prediction = {name: p.tolist() for name, p in self.prediction.items()}
        content = {"settings": self.settings, "prediction": prediction}
        common.save(lambda part: part.write_text(json.dumps(content)), self.out)

    def robust(self, *names):
        """[n] bool: which images are classified correctly under each of these attacks."""
        return torch.stack([self.prediction[name] == self.label for name in names]).all(0)

    def to_do(self, name, before=()):
        """[n] bool: what `name` has yet to attack of the images that survive `before`."""
        unknown = self.prediction[name] == -1
        return unknown if name == "Clean" else unknown & self.robust("Clean", *before)

    def accuracies(self):
        """{column: percent} of all complete columns."""
        complete = {}
        for column in () if self.to_do("Clean").any() else COLUMNS:
            names = AA if column == "AA" else [column]
            if not any(self.to_do(name, names[:k]).any() for k, name in enumerate(names)):
                complete[column] = 100 * int(self.robust(*names).sum()) / len(self.label)
        return complete

    def batch(self, rows):
        """Images [N, 3, H, W] and labels of some rows, on the device, and the images' numbers."""
        x = common.to_float(self.images[rows].to(self.device))
        return x, self.label[rows].to(self.device), self.index[rows]

    def run(self, column, batch_size):
        """Run the attacks of a column, each on the images that none before it has fooled."""
        names = AA if column == "AA" else [column]
        epsilon, seed = self.settings["epsilon"], self.settings["seed"]
        for k, name in enumerate(names):
            parts = self.to_do(name, names[:k]).nonzero()[:, 0].split(batch_size)
            for rows in common.progress(parts, len(parts), f"{name}, part"):
                x, y, index = self.batch(rows)
                x_adv = perturb(name, self.model, x, y, epsilon, seed, index, batch_size)
                self.prediction[name][rows] = logits_of(self.model, x_adv).argmax(1).cpu()
                self.save()
        print(f"{column:8} {self.cell(column)}", file=sys.stderr)

    def cell(self, column):
        """The accuracy under a column and Wilson's 95 % interval of it, as the table shows them."""
        n, z, p = len(self.label), 1.96, self.accuracies()[column] / 100
        middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        low, high = (100 * abs(bound) / (1 + z**2 / n) for bound in (middle - half, middle + half))
        return f"{100 * p:.2f} [{low:.1f}, {high:.1f}]"


# ---------------------------------------------------------------- the table, the checks, Figure 1
# 97.5 % points of Student's t for 2 to 10 runs (NIST/SEMATECH e-Handbook, section 1.3.6.7.2). More
# runs take the last, which is a little wider than theirs.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def table(evaluations, columns):
    """The evaluations, the means over seeds and the paper's rows, in Markdown."""
    groups = {}  # of runs that differ in the seed alone
    for e in evaluations:
        same = ("name", "dataset", "arch", "data", "processes")
        kind = e.settings["images"], *map(e.training.get, same)
        groups.setdefault(kind, []).append(e)
    rows = [["Method", *columns]]
    for group in groups.values():
        rows += [[f"{e.name} ({e.path})", *map(e.cell, columns)] for e in group]
        runs = {e.training["seed"]: e.accuracies() for e in reversed(group)}  # one for each seed
        values = {c: [accuracies[c] for accuracies in runs.values()] for c in columns}
        if len(runs) > 1:  # mean and half of its 95 % interval by Student's t
            t = STUDENT_T[min(len(runs), 10) - 2] / math.sqrt(len(runs))
            cells = [f"{mean(v):.2f} ± {t * stdev(v):.2f}" for v in values.values()]
            rows.append([f"{group[0].name}, mean of {len(runs)}", *cells])
        rows += paper_rows(group[0], {c: mean(v) for c, v in values.items()})
    return markdown(rows)


def paper_rows(e, means):
    """The paper's row for a method, if there is one, and how much the means {column} exceed it."""
    name = re.sub(r" (amp|val_size)=\S+", "", e.name)  # these do not hide the paper's row
    paper = ROWS.get((e.training["dataset"], e.training["arch"], name))
    if paper is None or e.settings["epsilon"] != 8 / 255:
        return []
    cells = [f"{paper[c]:.2f} ({means[c] - paper[c]:+.2f})" if c in paper else "-" for c in means]
    return [[f"paper, {name} (difference)", *cells]]


def markdown(rows):
    """A table of these rows, of which the first is the header."""
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def column_checks(e):
    """{(column, other): (passed, text)}: is the first column no higher than the other?

    Unmasked, the attack of the first column is the stronger one (Athalye et al. 2018).
    """
    accuracy, checks, n = e.accuracies(), {}, len(e.label)
    if "AA" in accuracy:
        accuracy["APGD and FAB"] = 100 * int(e.robust(*AA[:3]).sum()) / n
    white_box = [c for c in ("PGD-20", "PGD-100", "CW", "APGD and FAB") if c in accuracy]
    black_box = [c for c in ("SQUARE", "SPSA", "AA") if c in accuracy]
    pairs = [("PGD-100", "PGD-20"), *((c, "FGSM") for c in ("PGD-20", "PGD-100", "CW"))]
    if white_box and black_box:  # the strongest of each
        pairs.append((min(white_box, key=accuracy.get), min(black_box, key=accuracy.get)))
    slack = max(0.2, 100 / n) + 1e-9  # points; among few images, one image
    for first, other in pairs:
        if first in accuracy and other in accuracy:
            text = (
                f"{first} ({accuracy[first]:.2f}) is no weaker than {other} ({accuracy[other]:.2f})"
            )
            checks[first, other] = accuracy[first] <= accuracy[other] + slack, text
    return checks


def network_checks(e):
    """{check: (passed, text)} of a network on up to 200 images that it classifies correctly."""
    rows = e.robust("Clean").nonzero()[:, 0]
    if len(rows) == 0:
        return {"clean": (False, "no image is classified correctly")}
    rows = rows[:: math.ceil(len(rows) / 200)]  # of all classes: files may lie class by class
    (x, y, _), model, n = e.batch(rows), e.model, len(rows)
    generators = [torch.Generator(x.device)] * n
    noisy = pgd_attack(model, x, y, e.settings["epsilon"], generators, steps=0)
    far = x
    for _ in range(20):
        far = (far + 0.1 * gradient(model, far, cross_entropy, y)[2].sign()).clamp(0, 1)
    noise, far = (100 * int((logits_of(model, z).argmax(1) == y).sum()) / n for z in (noisy, far))
    zero = int((linf_norm(gradient(model, x, cross_entropy, y)[2]) == 0).sum())
    logits = logits_of(model, x)
    alone = torch.cat([logits_of(model, image[None]) for image in x[:10]])
    spread = float((alone - logits[:10]).abs().max() / logits.abs().max())
    low, high = map(float, logits.aminmax())
    return {
        "far": (far <= 5, f"unbounded PGD breaks nearly all: {far:.1f} % of {n} stay right"),
        "noise": (noise >= 90, f"uniform noise costs little: {noise:.1f} % of {n} stay right"),
        "gradient": (zero == 0, f"cross-entropy's gradient is not zero: it is for {zero} of {n}"),
        "alone": (spread < 1e-4, f"logits of an image alone differ by {spread:.1g} at most"),
        "logits": (low < 0 or high > 1.01, f"no probabilities: from {low:.3g} to {high:.3g}"),
    }


def figure1(natural, e):
    """Figure 1, a table in Markdown: the rank of the wrong class of x' in natural training.

    A naturally trained network ranks the wrong classes of the clean image; 2 is the most probable.
    open: the paper counts every misclassified x'. An image that is wrong before the attack is such
    an x' itself and is counted with the class that it has.
    """
    ranks = range(2, min(10, len(e.classes)) + 1)
    rows = [["rank", *ranks, "all"]]
    for name in ("PGD-20", "CW"):
        prediction = torch.where(e.robust("Clean"), e.prediction[name], e.prediction["Clean"])
        wrong = (prediction != e.label).nonzero()[:, 0]
        x, y, _ = e.batch(wrong)
        logits = logits_of(natural, x).scatter(1, y[:, None], -torch.inf)
        chosen = logits.gather(1, prediction[wrong, None].to(e.device))
        rank = 2 + (logits > chosen).sum(1)
        rows.append([name, *(int((rank == k).sum()) for k in ranks), len(wrong)])
    return markdown(rows)


# ------------------------------------------------------------------------------------ the command
def parse_args():
    parser = argparse.ArgumentParser(
        usage="%(prog)s CHECKPOINT ... [options]", description=__doc__, formatter_class=common.Help
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", help="folder of a run, its best.pt or last.pt, foreign weights")
    add("--attacks", nargs="+", choices=COLUMNS, default=COLUMNS, help="columns of the table")
    add("--n", type=int, help="number of test images, the same in every call; None: all")
    add("--epsilon", type=common.radius, default="8/255", help="radius of the attacks")
    device, batch_size = ("cuda", 512) if torch.cuda.is_available() else ("cpu", 64)
    add("--batch-size", type=int, default=batch_size, help="images in a pass")
    add("--seed", type=int, default=0, help="seed of the attacks")
    add("--device", default=device, help="cuda, cuda:1, cpu, ...")
    add("--data-dir", help="where the data set is; None: as in the training, or data")
    add("--figure1", metavar="NATURAL", help="natural network: print Figure 1 of the first")
    add("--dataset", choices=common.DATASETS, help="data set that foreign weights are for")
    add("--arch", help="network of foreign weights: resnet18 or wrn-<depth>-<widen>")
    add("--mean", type=float, nargs=3, help="of the channels of images that they expect")
    add("--std", type=float, nargs=3, help="likewise")
    args = parser.parse_args()
    if args.figure1:
        args.attacks = [*args.attacks, "PGD-20", "CW"]
    return args


def main():
    args = parse_args()
    device = common.setup(args.device)
    torch.backends.cudnn.allow_tf32 = False  # TF32's rounding would depend on the other images
    evaluations = [Evaluation(path, args, device) for path in args.checkpoints]
    for e in evaluations:
        print(f"{e.path}: {e.name}, {len(e.label)} images of {e.training['dataset']}; see {e.out}")
    if args.figure1:
        natural = load_network(*read_checkpoint(args.figure1, args), evaluations[0].classes)
    columns = [column for column in COLUMNS if column in ("Clean", *args.attacks)]
    for e in evaluations:
        for column in columns:
            e.run(column, args.batch_size)
    print(
        f"\n{table(evaluations, columns)}\n\nepsilon {255 * args.epsilon:g}/255, seed {args.seed}\n"
        "[low, high] is Wilson's 95 % interval of a checkpoint, given its number of images.\n"
        "± is half of Student's 95 % interval of a mean, given the spread of its runs.\n"
        "SUSPECT below is a sign of masked gradients: see What SUSPECT means in README.md. At an\n"
        "epsilon above 10/255, PGD-20 and CW cannot cross the box by 20 steps of 1/255."
    )
    for e in evaluations:
        print(f"\n{e.path}")
        for passed, text in (column_checks(e) | network_checks(e)).values():
            print("pass   " if passed else "SUSPECT", text)
    if args.figure1:
        print(f"\n{figure1(natural.to(device), evaluations[0])}")


if __name__ == "__main__":
    common.run(main, "")
