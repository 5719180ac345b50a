"""Robust accuracy of a checkpoint under the attacks of section 5.2: a row of Table 4.

    python evaluate.py runs/cifar10-resnet18-lma_at-seed0/best.pt
    python evaluate.py runs/cifar10-resnet18-lma_at-seed*/best.pt --attacks PGD-20 CW AA --n 1000
    python evaluate.py trades.pt --dataset cifar10 --arch wrn-34-10 --method TRADES
    torchrun --nproc-per-node=4 -- evaluate.py ...      # each process attacks a part of the images

The table (Markdown) and checks for masked gradients go to stdout, progress goes to stderr. The
predictions are kept in best.eval.json, with other settings in a file such as
best.n1000.eps4.eval.json. The same command continues from this file, which is written after every
few images, under torchrun after every attack.

The attacks can be called, or copied, on their own:

    generators = evaluate.generators_of(0, "APGD-CE", torch.arange(len(x)), x.device)
    with common.frozen(model):  # eval mode
        x_adv = evaluate.apgd(model, x, y, 8 / 255, generators)

Here model maps images [N, 3, H, W] in [0, 1] to logits [N, C], and x are images with labels y [N]
that it classifies correctly. Each image has its own random numbers, so that its result does not
depend on the other images of the batch. As soon as an iterate is misclassified, the attack stops
for this image and returns this iterate.
"""

import json
import math
import re
import sys
import tempfile
import time
import zlib
from collections import namedtuple
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from shlex import quote

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.distributed import ReduceOp, all_reduce, new_group
from torchvision.transforms import Normalize

import common
from common import RANK, WORLD, fail, number, print0

BATCH_SIZE = 64  # images in one pass through the network; --batch-size sets it


# --------------------------------------------------------------------- passes through the network
@torch.no_grad()
def logits_of(model, x):
    """Logits [N, C] of images x, BATCH_SIZE at a time."""
    logits = torch.cat([model(part) for part in x.split(BATCH_SIZE)])
    if not logits.isfinite().all():
        raise FloatingPointError("the logits of a network are not finite")
    return logits


def gradient(model, x, loss, y, *target):
    """For each image: misclassified [N], loss(logits, y, *target) [N, 1, 1, 1], its gradient."""
    found = []
    for part, *labels in zip(*(t.split(BATCH_SIZE) for t in (x, y, *target)), strict=True):
        part = part.detach().requires_grad_()
        logits = model(part)
        value = loss(logits, *labels)
        grad = torch.autograd.grad(value.sum(), part)[0]
        if not (logits.isfinite().all() and grad.isfinite().all()):  # the sign of NaN is no attack
            raise FloatingPointError("the logits of a network, or their gradients, are not finite")
        fooled = logits.argmax(1) != labels[0]
        found.append((fooled, value.detach().view(-1, 1, 1, 1), grad))
    return [torch.cat(column) for column in zip(*found, strict=True)]


class Standing:
    """What an attack knows of the images that still stand, which are not misclassified so far.

    Every attribute is a tensor with a row for each of them: x_adv are their iterates, row is their
    place in the batch, and an attack adds what else it needs.
    """

    def __init__(self, x_adv, **tensors):
        self.x_adv = x_adv
        self.row = torch.arange(len(x_adv), device=x_adv.device)
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def drop(self, fooled, result):
        """Write the iterates of fooled images into result, and remove their rows everywhere."""
        if fooled.any():
            result[self.row[fooled]] = self.x_adv[fooled]
            for name, tensor in vars(self).items():
                setattr(self, name, tensor[~fooled])


# --------------------------------------------------------------------- random numbers, box, losses
def generators_of(seed, attack, index, device):
    """A torch.Generator for each image, which follows from seed, name of the attack and index."""
    name = zlib.crc32(attack.encode())
    generators = []
    for i in index.tolist():  # numpy promises that the values of SeedSequence never change
        state = np.random.SeedSequence([seed, name, i]).generate_state(1, "uint64").item()
        generators.append(torch.Generator(device).manual_seed(state))
    return generators


def uniform(generators, *shape):
    """[N, *shape] uniform in [0, 1), row i from generator i."""
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])


def box(x, epsilon):
    """Lower and upper bound of the allowed images: within epsilon of x and in [0, 1]."""
    return (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)


def linf_norm(d):
    """The largest absolute value in each image of d, [N, 1, 1, 1]."""
    return d.abs().amax((1, 2, 3), keepdim=True)


def cross_entropy(logits, y):
    """Cross-entropy [N] of each image."""
    return F.cross_entropy(logits, y, reduction="none")


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
    start = x + epsilon * (2 * uniform(generators, *x.shape[1:]) - 1)
    s, result = Standing(start.clamp(low, high), y=y, low=low, high=high), x.clone()
    for _ in range(steps):
        fooled, _, s.grad = gradient(model, s.x_adv, loss, s.y)
        s.drop(fooled, result)
        if len(s.row) == 0:
            break
        s.x_adv = (s.x_adv + step_size * s.grad.sign()).clamp(s.low, s.high)
    result[s.row] = s.x_adv
    return result


def apgd_checkpoints(steps):
    """Iterations after which APGD may halve the step size: 22, 41, 57, 70, 80, 87, 93, 99 of 100.

    The windows between them are 22 % of the steps, then each 3 % shorter, down to 6 %.
    """
    ends, window = [22], 19
    while ends[-1] + window < 100:
        ends.append(ends[-1] + window)
        window = max(window - 3, 6)
    return [math.ceil(end * steps / 100) for end in ends]


def apgd(model, x, y, epsilon, generators, target=None, loss=cross_entropy, steps=100):
    """Auto-PGD (Croce & Hein 2020b, Algorithm 1): each image finds its own step size.

    It maximises loss(logits, y), or loss(logits, y, target) if target classes [N] are given.
    Returns the first misclassified iterate of an image, or else the one of largest loss.
    """
    low, high = box(x, epsilon)
    t = 2 * uniform(generators, *x.shape[1:]) - 1
    start = (x + epsilon * t / linf_norm(t)).clamp(low, high)
    s, result = Standing(start, y=y, low=low, high=high), x.clone()
    s.target = y if target is None else target  # without targets it is not used
    s.x_before = s.x_best = start
    s.grad_best = torch.zeros_like(x)
    s.step = torch.full_like(linf_norm(x), 2 * epsilon)
    s.value = torch.full_like(s.step, torch.inf)  # so that the start does not count as a rise
    s.value_best = s.value_at_checkpoint = -s.value
    s.rises = torch.zeros_like(s.step)  # since the last checkpoint
    s.halved = torch.ones_like(s.step, dtype=torch.bool)  # at the last checkpoint
    checkpoints, checkpoint = apgd_checkpoints(steps), 0

    for k in range(steps):
        s.value_before = s.value
        targets = () if target is None else (s.target,)
        fooled, s.value, s.grad = gradient(model, s.x_adv, loss, s.y, *targets)
        s.drop(fooled, result)
        if len(s.row) == 0:
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
    s, result = Standing(x, x=x, y=y, targets=targets), x.clone()
    for rank in range(targets.shape[1]):
        own = [generators[row] for row in s.row.tolist()]
        s.x_adv = attack(model, s.x, s.y, epsilon, own, s.targets[:, rank])
        s.drop(logits_of(model, s.x_adv).argmax(1) != s.y, result)
        if len(s.row) == 0:
            break
    return result


def apgd_t(model, x, y, epsilon, generators):
    """APGD-T of AutoAttack: Auto-PGD on the targeted DLR loss (Croce & Hein 2020b)."""
    return each_target(partial(apgd, loss=dlr_targeted), model, x, y, epsilon, generators)


def to_hyperplane(x, w, gap):
    """The smallest d (L-infinity) with w . d = gap [N, 1, 1, 1] and x + d in [0, 1].

    Where no d reaches the gap, the farthest (Croce & Hein 2020a, section 3). Every pixel moves by t
    unless its room ends before. What is covered, sum |w| min(t, room), is concave and piecewise
    linear in t, so Newton's steps from t = 0 end on the exact t.
    """
    direction, weight, gap = w.sign() * gap.sign(), w.abs(), gap.abs()
    room = torch.where(direction > 0, 1 - x, x)
    t = torch.zeros_like(gap)
    while True:
        covered = (weight * torch.minimum(room, t)).sum((1, 2, 3), keepdim=True)
        moving = (room - t).sign().relu()  # 1 where room > t; a mask takes a CPU twice as long
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
    s, result = Standing(x, x=x, y=y, target=target), x.clone()
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
        s.drop(s.crossed & near, result)
        if len(s.row) == 0:
            break
        back = s.x + 0.9 * (s.x_adv - s.x)
        s.x_adv = torch.where(s.crossed.view(-1, 1, 1, 1), back, s.x_adv)
    return result


def fab_t(model, x, y, epsilon, generators):
    """FAB-T of AutoAttack (Croce & Hein 2020b): FAB towards up to nine classes in turn."""
    return each_target(fab, model, x, y, epsilon, generators)


def square_side(k, h, w):
    """Side of the square of query k of 5,000 in images of h x w pixels.

    Its area is 0.8 of the image's, halved after 10, 50, ... queries (Andriushchenko et al. 2020).
    """
    p = 0.8 / 2 ** sum(k > end for end in (10, 50, 200, 500, 1000, 2000, 4000))
    return min(max(round(math.sqrt(p * h * w)), 1), h, w)


def square(model, x, y, epsilon, generators, queries=5000):
    """Square Attack (Andriushchenko et al. 2020, Algorithms 1 and 2), which needs no gradient.

    A random square, in each channel at the lower or the upper bound, is kept if it lowers
    z_y - max_{j != y} z_j.
    """
    (low, high), (c, h, w) = box(x, epsilon), x.shape[1:]
    stripes = uniform(generators, c, 1, w) < 0.5
    draws = uniform(generators, queries, 2 + c)  # for row, column and signs of each square
    s = Standing(torch.where(stripes, low, high), y=y, low=low, high=high)
    s.margin, result = margin(logits_of(model, s.x_adv), y), x.clone()
    for k in range(queries):
        s.drop(s.margin < 0, result)
        if len(s.row) == 0:
            break
        side = square_side(k, h, w)
        draw = draws[s.row, k, None]  # [n, 1, 2 + c]
        top, left, sign = draw.split((1, 1, c), 2)
        span = torch.arange(side, device=x.device)
        rows = (top * (h - side + 1)).long() + span[:, None]  # [n, side, 1]
        columns = (left * (w - side + 1)).long() + span  # [n, 1, side]
        places = torch.arange(len(top), device=x.device).view(-1, 1, 1)
        window = places, slice(None), rows, columns  # of images [n, c, h, w]: [n, side, side, c]
        proposal = s.x_adv.clone()
        proposal[window] = torch.where(sign[:, None] < 0.5, s.low[window], s.high[window])
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
    s, result = Standing(x, y=y, low=low, high=high), x.clone()
    s.first_moment, s.second_moment = torch.zeros_like(x), torch.zeros_like(x)
    bits = torch.arange(8, dtype=torch.uint8, device=x.device).view(8, 1, 1, 1)
    size = (math.ceil(samples / 8), 1, *x.shape[1:])  # of random bytes, each of which is 8 signs
    for k in range(1, steps + 1):
        s.grad = torch.empty_like(s.x_adv)
        for i, row in enumerate(s.row.tolist()):
            g = generators[row]
            octets = torch.randint(256, size, generator=g, device=x.device, dtype=torch.uint8)
            v = (octets >> bits & 1).flatten(0, 1)[:samples].to(x.dtype) * 2 - 1
            f = logits_of(model, torch.cat([s.x_adv[i] + delta * v, s.x_adv[i] - delta * v]))
            ahead, behind = margin(f, s.y[i].expand(2 * samples)).chunk(2)
            s.grad[i] = torch.einsum("s,schw->chw", (ahead - behind) / (2 * delta * samples), v)
        s.first_moment = 0.9 * s.first_moment + 0.1 * s.grad
        s.second_moment = 0.999 * s.second_moment + 0.001 * s.grad**2
        scale = (s.second_moment / (1 - 0.999**k)).sqrt() + 1e-8
        s.x_adv = s.x_adv - lr * (s.first_moment / (1 - 0.9**k) / scale)
        s.x_adv = s.x_adv.clamp(s.low, s.high)
        s.drop(logits_of(model, s.x_adv).argmax(1) != s.y, result)
        if len(s.row) == 0:
            break
    result[s.row] = s.x_adv
    return result


# Whoever changes an attack raises RESULTS_VERSION, so that older results are not continued.
ATTACKS = {
    "Clean": lambda model, x, y, epsilon, generators: x,
    "FGSM": fgsm,
    "PGD-20": pgd_attack,
    "PGD-100": partial(pgd_attack, steps=100),
    "CW": partial(pgd_attack, loss=cw_loss),
    "APGD-CE": apgd,
    "APGD-T": apgd_t,
    "FAB-T": fab_t,
    "SQUARE": square,
    "SPSA": spsa,
}
AA = ("APGD-CE", "APGD-T", "FAB-T", "SQUARE")  # AutoAttack's standard version, in its order
COLUMNS = ("Clean", "FGSM", "PGD-20", "PGD-100", "CW", "AA", "SQUARE", "SPSA")  # of Table 4


# ------------------------------------------------------------------------- the paper's numbers
# Tables 2 to 8 and 10 (A, B), columns as in COLUMNS
PAPER = """
# cifar10 resnet18
vanillaAT        85.80 57.87 52.05 49.28 51.08 46.62 55.69 56.17
TRADES           82.46 58.26 54.78 53.45 51.65 49.08 55.64 56.50
MART             81.30 58.06 54.73 53.28 51.86 49.01 55.66 56.15
PMHR-AT          83.12 60.34 56.13 54.45 52.16 49.42 56.54 57.16
vanillaAT + Ours 82.82 59.89 56.36 54.83 51.95 48.32 57.11 60.35
TRADES + Ours    83.93 59.32 56.23 54.98 51.73 48.78 58.46 59.45
MART + Ours      83.33 60.87 57.41 55.81 51.83 48.48 58.54 60.56
LMA-AT(Ours)     83.56 61.19 57.21 55.64 52.30 49.10 59.54 60.44
LMA-AT, tau 0    79.33 - 56.93 55.92 51.97 48.34 - 58.86
LMA-AT, tau 0.1  84.11 - 56.45 54.65 52.62 48.75 - 60.14
LMA-AT, tau 0.7  81.72 - 57.83 56.47 52.49 48.96 - 59.10
LMA-AT, tau 0.9  80.33 - 57.31 56.12 52.28 49.20 - 59.16
Table 10 A       83.88 60.78 56.26 54.79 51.91 48.57 56.83 60.55
Table 10 B       82.60 60.36 56.74 55.08 52.17 48.67 57.69 60.51
# cifar10 wrn-34-10
vanillaAT        86.46 61.62 56.75 54.72 55.63 51.06 59.68 60.66
TRADES           84.58 60.60 57.71 56.69 55.01 52.57 59.45 61.09
MART             84.25 62.03 58.29 55.56 54.82 51.40 58.21 59.87
PMHR-AT          84.87 63.05 59.26 57.60 56.36 53.58 59.67 61.18
vanillaAT + Ours 85.96 63.03 59.76 58.31 56.03 52.82 60.02 63.78
TRADES + Ours    85.62 63.22 59.31 58.26 54.87 52.25 58.89 63.95
MART + Ours      84.83 63.66 60.89 59.76 55.56 52.45 59.42 62.65
LMA-AT(Ours)     85.39 64.04 60.62 59.48 56.07 52.61 60.10 64.19
MMA              86.21 - 57.17 - 57.52 44.57 - 59.87
WAT              85.16 - 56.69 - 54.06 49.87 - 60.78
MAIL             86.82 - 60.38 - 51.48 47.15 - 59.23
GAIRAT           85.39 - 60.59 - 45.08 42.30 - 52.32
# cifar100 resnet18
vanillaAT        56.87 31.21 29.33 28.46 26.33 23.69 30.06 31.63
TRADES           57.16 31.45 30.32 29.48 25.16 25.18 30.46 32.06
MART             54.02 32.81 31.13 30.14 26.98 24.83 31.17 32.45
PMHR-AT          57.55 34.33 32.25 31.35 27.78 25.96 31.32 32.60
vanillaAT + Ours 60.41 33.61 30.83 29.65 28.89 25.14 33.10 34.42
TRADES + Ours    59.23 34.05 31.72 30.98 27.84 25.42 31.66 33.30
MART + Ours      55.55 34.74 32.92 32.29 28.70 26.29 31.49 33.57
LMA-AT(Ours)     58.86 34.79 32.51 31.65 29.04 26.29 33.57 34.07
LMA-AT, tau 0    51.40 - 32.76 32.21 28.43 26.51 - 31.71
LMA-AT, tau 0.1  59.78 - 32.02 31.08 28.91 25.51 - 34.98
LMA-AT, tau 0.7  53.98 - 33.48 32.83 29.31 26.84 - 32.78
LMA-AT, tau 0.9  52.20 - 33.29 32.83 29.19 26.78 - 31.88
# tinyimagenet resnet18
TRADES           49.56 - 22.90 - 19.70 16.78 - -
MART             45.94 - 26.02 - 21.87 19.20 - -
TRADES + Ours    50.43 - 24.82 - 20.52 18.15 - -
MART + Ours      46.88 - 26.87 - 22.10 19.84 - -
LMA-AT(Ours)     49.10 - 26.35 - 22.40 18.31 - -
"""


def read_table(text):
    """{(data set, network, method): {column: percent}} of a table such as PAPER."""
    rows = {}
    for line in text.strip().splitlines():
        if line.startswith("#"):
            dataset, arch = line[1:].split()
            continue
        method, *cells = line.rsplit(maxsplit=len(COLUMNS))
        numbers = {c: float(v) for c, v in zip(COLUMNS, cells, strict=True) if v != "-"}
        rows[dataset, arch, method] = numbers
    return rows


ROWS = read_table(PAPER)
METHODS = {  # (script, attack loss, weight of L' in the loss, tau or None without mHuber): name
    ("at_ours", "ce", 0, None): "vanillaAT",
    ("trades_ours", "kl", 0, None): "TRADES",
    ("mart_ours", "ce", 0, None): "MART",
    ("at_ours", "margin+ce", 1, 0.2): "vanillaAT + Ours",
    ("trades_ours", "margin+ce", 1, 0.2): "TRADES + Ours",
    ("mart_ours", "margin+ce", 1, 0.2): "MART + Ours",
    ("lma_at", "margin+ce", 1, 0.2): "LMA-AT(Ours)",
    ("lma_at", "margin+ce", 1, 0): "LMA-AT, tau 0",
    ("lma_at", "margin+ce", 1, 0.1): "LMA-AT, tau 0.1",
    ("lma_at", "margin+ce", 1, 0.7): "LMA-AT, tau 0.7",
    ("lma_at", "margin+ce", 1, 0.9): "LMA-AT, tau 0.9",
    ("at_ours", "ce", 1, 0.2): "Table 10 A",
    ("lma_at", "margin+ce", 0, 0.2): "Table 10 B",
}


def short(value):
    """A setting as the table shows it: a number of at most four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def paper_method(trained):
    """The paper's name for what a training script's arguments make, and what differs, or None."""
    dataset, arch, tau = trained["dataset"], trained["arch"], trained["tau"]
    wanted = {"epochs": 130, "lr": 0.01, "weight_decay": 3.5e-3, "batch_size": 100, "amp": False}
    wanted |= {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10, "delta": 0.9}
    wanted |= {"margin_reduction": "mean", "ema": "slot", "inv_lambda": 6, "lam": 5}
    wanted["val_size"] = min(trained.get("val_size", 0), 1000)  # the scripts hold out 1000 images
    wanted["alpha"] = 6.345 if dataset == "tinyimagenet" else 5.345
    if arch.startswith("wrn"):
        wanted["alpha"] = 2.345
    wanted["beta"] = 96 if dataset in ("cifar100", "tinyimagenet") else 86
    if trained["beta"] == 0:  # no mHuber
        wanted["beta"], tau = 0, None
    name = METHODS.get((trained["method"], trained["attack_loss"], trained["margin_weight"], tau))
    differ = []
    for key, value in wanted.items():
        own = trained.get(key, value)
        if own != value:
            differ.append(f"{key} {short(own)} ({short(value)})")
    return f"{name}, settings differ: {', '.join(differ)}" if name and differ else name


# --------------------------------------------------------------------------- loading a checkpoint
# In other people's files: what stands before the names of weights, keys that say that the network
# standardises its images, keys that are no weights of ours.
PREFIXES = r"^((state_dict|model|module|_orig_mod|net|network|basic_net|ema|\d+)\.)+"
STANDARDISES = r"(.*\.)?(mu|sigma|mean|std|[^.]*normali[sz]e[^.]*)"
UNUSED = r"sub_block1\..*|.*num_batches_tracked|n_averaged|" + STANDARDISES
Checkpoint = namedtuple("Checkpoint", "path model trained dataset arch data mean std")


def load_checkpoint(path, args, load_data, natural_for=None):
    """The Checkpoint in a file of ours, or in one of foreign weights, which the options describe.

    Its `trained` are our training script's arguments, or {}. What they say wins, and an option that
    contradicts them is refused. With natural_for the file is the naturally trained network for
    Figure 1 of that Checkpoint, for which the options may be meant.
    """
    saved, trained = read_checkpoint(path)
    if trained and natural_for is None:
        refuse_contradictions(path, trained, args)
    dataset, arch = trained.get("dataset", args.dataset), trained.get("arch", args.arch)
    if natural_for and dataset is None:
        dataset = natural_for.dataset
    if dataset not in common.DATASETS or arch is None:
        fail(f"{path}: does not say its data set or its network; give --dataset and --arch")
    data = load_data(dataset, args.data_dir or trained.get("data_dir") or "data")
    classes = list(natural_for.data.classes if natural_for else data.classes)
    for own in (list(data.classes), trained.get("classes", classes)):
        if own != classes:
            differ = [c for c in own + classes if c not in own or c not in classes][:5]
            fail(f"{path}: other or reordered classes {differ}; choose another --data-dir")
    if trained.get("data") not in (None, common.fingerprint(data.x_train, data.y_train)):
        print0(f"note: {path} was trained on other images, {trained['data']}")
    mean, std = (None, None) if trained else (args.mean, args.std)
    model = load_network(path, saved, arch, len(classes), mean, std)
    return Checkpoint(path, model, trained, dataset, arch, data, mean, std)


def read_checkpoint(path):
    """What the file holds, and our training script's arguments, or {} if it is not ours."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file raises
        if isinstance(error, OSError) and error.filename:
            fail(f"{path}: {error.strerror}")
        found = re.search(r"GLOBAL ([\w.]+)|got <class '([\w.]+)", str(error))
        if found is None:
            fail(f"{path}: is no file of torch.save, or damaged; give a checkpoint or state_dict")
        load = f"torch.load({json.dumps(str(path))}, weights_only=False)"
        program = f'import torch; torch.save({load}["state_dict"], "weights.pt")'
        fail(
            f"{path}: holds a Python object ({found[1] or found[2]}), which can run programs. If "
            f"you trust the file, save the weights alone by their key: python -c {quote(program)}"
        )
    trained = saved.get("args") if isinstance(saved, dict) else None
    if not isinstance(trained, dict) or not {"method", "margin_reduction", "tau"} <= trained.keys():
        return saved, {}
    for name, value in trained.items():
        if not isinstance(value, list if name == "classes" else (str, int, float, type(None))):
            fail(f"{path}: args.{name} is a {type(value).__name__}, which no script here writes")
    return saved, trained


def refuse_contradictions(path, trained, args):
    """End with an error if an option says something else of a checkpoint of ours than it does."""
    own = {"dataset": trained["dataset"], "arch": trained["arch"], "method": paper_method(trained)}
    own |= {"mean": "none", "std": "none"}  # the scripts train on images as they are
    for name, value in own.items():
        if getattr(args, name) not in (None, value):
            fail(
                f"--{name} is for foreign weights, but {path} was trained here and its {name} is "
                f"{value}; leave --{name} out, or give it in a command without {path}"
            )


def nested_dicts(value, place="file", depth=0):
    """(place, dict) of a dict and of the dicts in it, to a depth of 5: a dict may hold itself."""
    if isinstance(value, dict) and depth < 5:
        yield place, value
        for key, inner in value.items():
            yield from nested_dicts(inner, f"{place}.{key}", depth + 1)


def plain_name(key):
    """The name here of a weight that other people's files call `key`."""
    name = re.sub(PREFIXES, "", str(key)).replace(".shortcut.", ".downsample.")
    return re.sub(r"^linear\.", "fc.", name)


def find_state_dict(path, saved, wanted):
    """{name here: weight} from the only dict in the file that has some of the wanted names."""
    dicts = list(nested_dicts(saved))
    found = [pair for pair in dicts if wanted & {plain_name(key) for key in pair[1]}]
    if not found:
        fail(f"{path}: holds no weights of this --arch; give a state_dict, or another --arch")
    if len(found) > 1:
        places = ", ".join(place for place, _ in found)
        fail(f"{path}: {len(found)} state_dicts fit ({places}); save the one that is meant")
    state = {}
    for key, weight in found[0][1].items():
        name = plain_name(key)
        if name in state:
            fail(f"{path}: {key} and another key mean {name}; save the one that is meant")
        if not re.fullmatch(UNUSED, name):
            state[name] = weight
    return state


def refuse_standardising(path, saved):
    """End with an error if the file says that its network standardises images."""
    for _, values in nested_dicts(saved):
        for key, value in values.items():
            if re.fullmatch(STANDARDISES, str(key)) and value is not None and value is not False:
                fail(f"{path}: {key} says that it standardises its images; give --mean and --std")


def load_network(path, saved, arch, num_classes, mean=None, std=None):
    """The network of a file, in eval mode and without gradients for its weights."""
    if mean is None:
        refuse_standardising(path, saved)
    model = common.make_model(arch, num_classes)
    state = find_state_dict(path, saved, model.state_dict().keys())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # it names weights that are missing, unexpected, of other shape
        fail(f"{path}: {error!s:.400}; choose another --arch or --dataset, or rename the weights")
    for name, weight in state.items():
        if not (weight.is_floating_point() and weight.isfinite().all()):
            fail(f"{path}: {name} has values that are not finite, or not of floats")
    if mean:
        model = nn.Sequential(Normalize(mean, std), model)
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------ the results, in a file
RESULTS_VERSION = 1  # raised when an attack changes: results of another version are not continued


class Evaluation:
    """The predictions for one checkpoint, kept in a JSON file from which they are continued.

    prediction[name] [n] has the class predicted for each image under the attack of that name, or -1
    where there is none yet.
    """

    def __init__(self, checkpoint, args, device, group=None):
        data, self.checkpoint, self.path = checkpoint.data, checkpoint, checkpoint.path
        order = torch.randperm(len(data.x_test), generator=torch.Generator().manual_seed(0))
        self.index = order[: args.n].sort().values
        self.images, self.label = data.x_test[self.index], data.y_test[self.index]
        weights = [value.numpy().tobytes() for value in checkpoint.model.state_dict().values()]
        self.settings = {"version": RESULTS_VERSION, "epsilon": args.epsilon, "seed": args.seed}
        self.settings["weights"] = zlib.crc32(b"".join(weights))
        self.settings["images"] = common.fingerprint(self.images, self.label)
        self.settings |= {"mean": checkpoint.mean, "std": checkpoint.std}
        self.model = checkpoint.model.to(device, memory_format=torch.channels_last)
        self.device, self.group = device, group  # group: the processes of torchrun
        self.prediction = {name: torch.full_like(self.label, -1) for name in ATTACKS}
        self.checks = []
        differs = [
            None if checkpoint.trained else args.dataset,
            args.n and f"n{args.n}",
            args.seed and f"seed{args.seed}",
        ]
        differs += [checkpoint.mean and "standardised"]
        differs += [args.epsilon != 8 / 255 and f"eps{255 * args.epsilon:g}"]
        name = ".".join([Path(self.path).stem, *filter(None, differs), "eval.json"])
        self.out = Path(args.out or Path(self.path).with_name(name))
        self.name_method(args.method)

    def name_method(self, method):
        """Set method and paper, its row in the paper or {}, and kind: a mean is over one kind."""
        found = self.checkpoint
        dataset, arch, trained = found.dataset, found.arch, found.trained
        alike = method or self.path  # foreign weights of one method
        if trained:  # runs that differ in the seed alone
            method = paper_method(trained) or trained["method"]
            varies = ("seed", "run_dir", "data_dir", "device", "resume")
            alike = Path(self.path).name, str([v for k, v in trained.items() if k not in varies])
        self.method, self.paper = method or "no row of the paper", {}
        self.kind = dataset, arch, self.method, self.settings["images"], alike
        if abs(self.settings["epsilon"] - 8 / 255) < 1e-6:
            self.paper = ROWS.get((dataset, arch, self.method), {})

    def save(self):
        """Write the file, after taking in what another evaluation has written there meanwhile.

        Of two saves within the same milliseconds one may be lost until the next save.
        """
        self.share()
        if RANK == 0 and self.out.exists():
            self.read()
        self.share()
        content = {"settings": self.settings, "accuracy": self.accuracies(), "checks": self.checks}
        content |= {"index": self.index.tolist(), "label": self.label.tolist()}
        some = {name: p for name, p in self.prediction.items() if p.max() >= 0}
        content["prediction"] = {name: p.tolist() for name, p in some.items()}
        common.save(lambda part: part.write_text(json.dumps(content)), self.out)

    def read(self):
        """Take in the predictions of the file. One of other settings is refused."""
        try:
            found = json.loads(self.out.read_text())
            settings, checks = dict(found["settings"]), list(found.get("checks", []))
            predictions = {name: torch.tensor(p) for name, p in found["prediction"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            fail(f"{self.out} is no result of evaluate.py; move it or choose another --out")
        both = [
            (k, settings.get(k, "-"), self.settings.get(k, "-")) for k in settings | self.settings
        ]
        differ = [key for key, old, new in both if old != new]
        if differ:
            fail(f"{self.out} is of other {', '.join(differ)}; move it or choose another --out")
        classes = len(self.checkpoint.data.classes)
        for name, found in predictions.items():
            valid = found.dtype == torch.int64 and found.shape == self.label.shape
            if name not in ATTACKS or not valid or found.min() < -1 or found.max() >= classes:
                fail(f"{self.out} is damaged at {name}; move it or choose another --out")
            missing = self.prediction[name] == -1
            self.prediction[name] = torch.where(missing, found, self.prediction[name])
        self.checks = self.checks or checks

    def share(self):
        """Under torchrun, every process gets what all have found."""
        if WORLD > 1:
            for prediction in self.prediction.values():
                all_reduce(prediction, ReduceOp.MAX, self.group)

    def robust(self, *names):
        """[n] bool: which images are classified correctly under each of these attacks."""
        return torch.stack([self.prediction[name] == self.label for name in names]).all(0)

    def to_do(self, name, before=()):
        """[n] bool: which images an attack that follows the attacks `before` has yet to try."""
        unknown = self.prediction[name] == -1
        return unknown if name == "Clean" else unknown & self.robust("Clean", *before)

    def correct(self, column):
        """Number of images that stand under a column of the table, or None if it is incomplete."""
        names = AA if column == "AA" else (column,)
        to_do = [self.to_do(name, names[:k]).any() for k, name in enumerate(names)]
        if self.to_do("Clean").any() or any(to_do):
            return None
        return int(self.robust(*names).sum())

    def accuracies(self):
        """{column: percent} of all complete columns."""
        correct = {column: self.correct(column) for column in COLUMNS}
        return {c: 100 * k / len(self.label) for c, k in correct.items() if k is not None}

    def batch(self, rows, purpose):
        """Images [N, 3, H, W], labels and generators of some rows, on the device."""
        x = common.to_float(self.images[rows].to(self.device))
        generators = generators_of(self.settings["seed"], purpose, self.index[rows], self.device)
        return x, self.label[rows].to(self.device), generators


# ------------------------------------------------------------------------------- running a column
# How often a network sees an image that survives an attack. The time left is estimated from it.
TIMES_SEEN = {"Clean": 1, "FGSM": 2, "PGD-20": 21, "PGD-100": 101, "CW": 21, "APGD-CE": 102}
TIMES_SEEN |= {"APGD-T": 920, "FAB-T": 1811, "SQUARE": 5002, "SPSA": 4021}


class Watched(nn.Module):
    """A network that shows on the terminal how far the attack on it is.

    total is the number of images that it will see if every image survives.
    """

    def __init__(self, model, text, total):
        super().__init__()
        self.model, self.text, self.total, self.seen = model, text, total, 0
        self.start = self.shown = time.time()

    def forward(self, x):
        logits = self.model(x)
        self.seen += len(x)
        if time.time() > self.shown + 0.5:
            self.shown = time.time()
            left = (self.shown - self.start) * (self.total / self.seen - 1)
            common.live(f"{self.text}, at most {timedelta(seconds=int(left))} left")
        return logits


def run_attack(e, name, before, title):
    """Attack the images that stand under Clean and the attacks `before`; keep the predictions."""
    mine, epsilon = e.to_do(name, before).nonzero()[RANK::WORLD, 0], e.settings["epsilon"]
    together = 4 * BATCH_SIZE  # so that passes stay full while images fall
    for done in range(0, len(mine), together):
        rows, left = mine[done : done + together], len(mine) - done
        text = f"{title}: {done}/{len(mine)} images done"
        model = Watched(e.model, text, left * TIMES_SEEN[name])
        x, y, generators = e.batch(rows, name)
        x_adv = ATTACKS[name](model, x, y, epsilon, generators)
        assert (x_adv - x).abs().max() < epsilon + 1e-6
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        e.prediction[name][rows] = logits_of(model, x_adv).argmax(1).cpu()
        if WORLD == 1:
            e.save()
    e.save()


def run_column(e, column):
    """Run the attacks of one column, and say on stderr what they leave."""
    start, names = time.time(), AA if column == "AA" else (column,)
    for k, name in enumerate(names):
        run_attack(e, name, names[:k], f"AA: {name}" if column == "AA" else column)
    common.live("")
    print0(f"{column:8} {cell(e, column)} ({time.time() - start:.1f} s)", file=sys.stderr)


# ---------------------------------------------------------------- the table, the checks, Figure 1
# 97.5 % points of Student's t for 1 to 9 degrees of freedom, so 2 to 10 runs (NIST/SEMATECH
# e-Handbook of Statistical Methods, section 1.3.6.7.2). More than 10 runs take the last, which is
# a little wider than theirs.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def wilson(k, n):
    """Wilson's 95 % interval, in percent, of a probability when k of n images stand."""
    p, z = k / n, 1.96
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return 100 * max(centre - half, 0), 100 * min(centre + half, 1)


def mean_and_half(values):
    """Mean of two or more runs and half of its 95 % interval by Student's t."""
    t = STUDENT_T[min(len(values), 10) - 2]
    return np.mean(values), t * np.std(values, ddof=1) / math.sqrt(len(values))


def cell(e, column):
    """The accuracy under a column and its interval, as the table shows them."""
    low, high = wilson(e.correct(column), len(e.label))
    return f"{e.accuracies()[column]:.2f} [{low:.1f}, {high:.1f}]"


def rows_of(group, columns):
    """Rows of evaluations of one kind; below them their mean, the paper's row, the difference."""
    method, paper = group[0].method, group[0].paper
    rows = [[f"{method} ({e.path})", *(cell(e, c) for c in columns)] for e in group]
    runs = {}  # two of one seed count as one run
    for e in group:
        runs.setdefault(e.checkpoint.trained.get("seed", e.path), e.accuracies())
    values = {c: [accuracies[c] for accuracies in runs.values()] for c in columns}
    if len(runs) > 1:
        means = [mean_and_half(values[c]) for c in columns]
        cells = [f"{mean:.2f} ± {half:.2f}" for mean, half in means]
        note = ", one of each seed" if len(runs) < len(group) else ""
        rows.append([f"{method}, mean of {len(runs)}{note}", *cells])
    return rows + paper_rows(method, paper, {c: np.mean(values[c]) for c in columns})


def paper_rows(method, paper, mean):
    """The paper's row for a method, if there is one, and how much the means {column} differ."""
    if not paper:
        return []
    numbers = [f"{paper[c]:.2f}" if c in paper else "-" for c in mean]
    differences = [f"{mean[c] - paper[c]:+.2f}" if c in paper else "-" for c in mean]
    return [[f"paper, {method}", *numbers], ["difference", *differences]]


def table(evaluations, columns):
    """The evaluations as a table in Markdown."""
    rows = [["Method", *columns], ["---"] * (1 + len(columns))]
    for kind in dict.fromkeys(e.kind for e in evaluations):
        rows += rows_of([e for e in evaluations if e.kind == kind], columns)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def column_checks(accuracy, slack):
    """[(passed, text)]: whether accuracies {name: percent} agree with each other, up to slack."""
    checks = []
    white = [c for c in ("PGD-20", "PGD-100", "CW", "APGD and FAB") if c in accuracy]
    black = [c for c in ("SQUARE", "SPSA", "AA") if c in accuracy]
    if white and black:
        w, b = min(white, key=accuracy.get), min(black, key=accuracy.get)
        text = f"{b} leaves {accuracy[b]:.2f} %, {w} {accuracy[w]:.2f} %"
        passed = accuracy[b] >= accuracy[w] - slack
        checks.append((passed, f"black box not stronger than white box: {text}"))
    if "PGD-20" in accuracy and "PGD-100" in accuracy:
        short, long = accuracy["PGD-20"], accuracy["PGD-100"]
        text = f"PGD: {short:.2f} % after 20 steps, {long:.2f} % after 100"
        checks.append((long <= short + slack, text))
    return checks


def network_checks(model, x, y, epsilon, generators):
    """[(passed, text)]: how a network behaves on images x that it classifies correctly as y."""

    def left(x_adv):
        return 100 * int((logits_of(model, x_adv).argmax(1) == y).sum()) / len(y)

    n, checks = len(x), []
    stand = left(pgd_attack(model, x, y, 64 / 255, generators, 20, 8 / 255))
    text = f"epsilon 64/255 breaks nearly all: PGD-20 leaves {stand:.1f} % of {n} images"
    checks.append((stand <= 5, text))
    low, high = box(x, epsilon)
    stand = left(low + (high - low) * uniform(generators, *x.shape[1:]))
    text = f"uniform noise costs little: it leaves {stand:.1f} % of {n} images"
    checks.append((stand >= 90, text))
    zero = int((linf_norm(gradient(model, x, cross_entropy, y)[2]) == 0).sum())
    text = f"cross-entropy's gradient is not zero: it is for {zero} of {n} images"
    checks.append((zero == 0, text))
    logits = logits_of(model, x)
    spread = float((logits_of(model, x) - logits).abs().max() / logits.abs().max())
    checks.append((spread < 1e-4, f"two calls agree: logits differ by {spread:.1g} of the largest"))
    least, most = float(logits.min()), float(logits.max())
    passed = least < 0 or float((logits.sum(1) - 1).abs().max()) > 1e-4
    checks.append((passed, f"logits, not probabilities: from {least:.3g} to {most:.3g}"))
    return checks


def masking_checks(e):
    """Signs that a network masks its gradients instead of resisting (Athalye et al. 2018).

    Returns lines that begin with "pass" or "SUSPECT".
    """
    rows = e.robust("Clean").nonzero()[:, 0]
    if len(rows) == 0:
        return ["SUSPECT no image is classified correctly"]
    accuracy, n = e.accuracies(), len(e.label)
    if "AA" in accuracy:
        accuracy["APGD and FAB"] = 100 * int(e.robust(*AA[:3]).sum()) / n
    rows = rows[:: math.ceil(len(rows) / 200)]  # of all classes: files may lie class by class
    x, y, generators = e.batch(rows, "sceptic")
    checks = column_checks(accuracy, max(0.2, 100 / n) + 1e-9)  # points; among few images, one
    checks += network_checks(e.model, x, y, e.settings["epsilon"], generators)
    return [f"{'pass   ' if passed else 'SUSPECT'} {text}" for passed, text in checks]


def wrong_class_ranks(natural, e, name):
    """How many images an attack turns into the natural network's 2nd, 3rd, ... most probable class.

    open: the paper counts every misclassified x'. An image that is wrong before the attack, which
    attacks pass over, is such an x' itself and is counted with the class that it has.
    """
    bins = min(10, len(e.checkpoint.data.classes) - 1)  # the tenth is "11th and later"
    found = torch.where(e.robust("Clean"), e.prediction[name], e.prediction["Clean"])
    rows = (found != e.label).nonzero()[:, 0]
    if len(rows) == 0:
        return [0] * bins
    x, y, _ = e.batch(rows, name)
    wrong = logits_of(natural, x).scatter(1, y[:, None], -torch.inf)
    rank = (wrong > wrong.gather(1, found[rows, None].to(e.device))).sum(1)
    return rank.clamp(max=bins - 1).bincount(minlength=bins).tolist()


def figure1(path, natural, e):
    """Figure 1: rank of the class into which PGD-20 and CW turn an image, in natural training.

    A naturally trained network ranks the wrong classes of the clean image. "2nd" is the most
    probable of them.
    """
    counts = {name: wrong_class_ranks(natural, e, name) for name in ("PGD-20", "CW")}
    bins = len(counts["CW"])
    ranks = ["2nd", "3rd", *(f"{k}th" for k in range(4, 11)), "11th and later"][:bins]
    picture = Image.new("RGB", (920, 480), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    draw.text((30, 14), "images by rank of their wrong class in natural training", "black", font)
    width, peak = 860 / bins, max(1, *counts["PGD-20"], *counts["CW"])
    for side, (name, colour) in enumerate({"PGD-20": "#1f5fa8", "CW": "#e08a1e"}.items()):
        print(f"{name}, rank of the wrong class: {dict(zip(ranks, counts[name], strict=True))}")
        draw.text((30 + 200 * side, 44), f"{name} ({sum(counts[name])})", colour, font)
        for k, count in enumerate(counts[name]):
            left, top = 30 + width * (k + 0.1 + 0.4 * side), 440 - 350 * count / peak
            draw.rectangle((left, top, left + 0.4 * width, 440), colour)
            draw.text((left + 0.2 * width, top - 2), str(count), "black", font, "mb")
            draw.text((30 + width * (k + 0.5), 448), ranks[k][:4], "black", font, "mt")
    common.save(partial(picture.save, format="png"), path)
    print(f"drawn to {path}")


# ------------------------------------------------------------------------------------ the command
def parse_args():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", help="best.pt or last.pt of a run, or foreign weights")
    add("--attacks", nargs="+", choices=COLUMNS, help="columns of the table; if not given, all")
    add(
        "--n",
        type=number(1, kind=int),
        help="test images, the same in every call; if not given, all",
    )
    add("--epsilon", type=number(0, 1), default="8/255", help="radius of the attacks")
    text = "images in one pass through the network; if not given, 512 on CUDA and 64 elsewhere"
    add("--batch-size", type=number(1, kind=int), help=text)
    add("--seed", type=number(0, 2**31, int), default=0, help="seed of the attacks")
    add("--device", default="auto", help="cuda, cpu, ...; auto is cuda if there is one")
    add("--data-dir", help="where the data set is; if not given, where it was in the training")
    add("--out", help="file of the results of one checkpoint; if not given, see above")
    text = "a natural network and where to draw Figure 1; needs the attacks PGD-20 and CW"
    add("--figure1", nargs=2, metavar=("NATURAL", "OUT.png"), help=text)
    # what foreign weights do not say themselves
    add("--dataset", choices=common.DATASETS, help="data set that foreign weights are for")
    add("--arch", help="network of foreign weights: resnet18 or wrn-<depth>-<widen>")
    text = "of each channel, for foreign weights trained on standardised images"
    add("--mean", type=number(0, 1), nargs=3, metavar="C", help=f"mean {text} (give --std too)")
    add("--std", type=number(1e-3, 1), nargs=3, metavar="C", help=f"standard deviation {text}")
    methods = list(dict.fromkeys(method for _, _, method in ROWS))
    add("--method", choices=methods, help="row of the paper to compare foreign weights with")
    args = parser.parse_args()
    args.attacks = args.attacks or COLUMNS
    if args.out and len(args.checkpoints) > 1:
        fail("--out: takes the results of one checkpoint; leave it out")
    if (args.mean is None) != (args.std is None):
        fail("--mean and --std: give both")
    if args.figure1:
        if not {"PGD-20", "CW"} <= set(args.attacks):
            fail("--figure1: needs PGD-20 and CW among --attacks")
        check_picture(Path(args.figure1[1]))
    return args


def check_picture(path):
    """End with an error if Figure 1 cannot be drawn to this path or would overwrite other work."""
    if path.suffix != ".png" or path.is_dir():
        fail(f"--figure1: {path} is no file that ends in .png; give a checkpoint and OUT.png")
    if path.exists() and path.read_bytes()[:4] != b"\x89PNG":
        fail(f"--figure1: {path} exists and is no PNG image; choose another file")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        fail(f"--figure1: {path} is not writable ({error.strerror}); choose another folder")


def load_all(args, device):
    """The evaluations of all checkpoints, and the natural network of Figure 1 or None."""
    group = new_group(backend="gloo", timeout=timedelta(days=30)) if WORLD > 1 else None
    load_data = cache(common.load_data)
    checkpoints = [load_checkpoint(path, args, load_data) for path in args.checkpoints]
    natural = None
    if args.figure1:
        natural = load_checkpoint(args.figure1[0], args, load_data, checkpoints[0]).model.to(device)
    evaluations = []
    for e in [Evaluation(c, args, device, group) for c in checkpoints]:
        copies = [other.path for other in evaluations if other.settings == e.settings]
        if copies:
            print0(f"note: {e.path} has the weights of {copies[0]} and is left out")
            continue
        evaluations.append(e)
        found, n = e.checkpoint, f"{len(e.label)} of {len(e.checkpoint.data.x_test)} test images"
        print0(f"{e.path}: {e.method}, {found.arch} on {found.dataset}, {n}")
    return evaluations, natural


def evaluate(args, device):
    """Run the columns, print the table, then the checks and Figure 1."""
    evaluations, natural = load_all(args, device)
    print0(f"epsilon {255 * args.epsilon:g}/255, seed {args.seed}")
    for e in evaluations:
        if e.out.exists() and not e.out.is_file():
            fail(f"{e.out} is not a file; choose another --out")
        e.save()  # so that a place that is not writable is found now
    columns = [column for column in COLUMNS if column in ("Clean", *args.attacks)]
    for e in evaluations:
        for column in columns:
            run_column(e, column)
    print0(f"\n{table(evaluations, columns)}\n")
    print0("[low, high] is Wilson's 95 % interval of a checkpoint, given its number of images.")
    print0("± is half of Student's 95 % interval of a mean, given the spread of its runs.")
    for e in evaluations:
        if RANK == 0:
            e.checks = masking_checks(e)
            print("\n".join(["", str(e.path), *e.checks]), flush=True)
        e.save()
    if natural and RANK == 0:
        figure1(args.figure1[1], natural, evaluations[0])


def main():
    global BATCH_SIZE
    args = parse_args()
    device = common.setup(args.device)
    torch.backends.cudnn.benchmark = False  # the size of a pass varies
    torch.backends.cudnn.allow_tf32 = False  # TF32's rounding would depend on the other images
    BATCH_SIZE = args.batch_size or (512 if device.type == "cuda" else 64)
    try:
        evaluate(args, device)
    except FloatingPointError as error:
        fail(f"{error}: its weights are broken, or --mean and --std are wrong")


if __name__ == "__main__":
    common.run(main, "as it is")
