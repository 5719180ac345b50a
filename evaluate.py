"""Robust accuracy of a checkpoint under the attacks of section 5.2: a row of Table 4.

    python evaluate.py runs/cifar10-resnet18-lma_at-seed0/best.pt
    python evaluate.py runs/cifar10-resnet18-lma_at-seed*/best.pt --attacks PGD-20 CW AA --n 1000
    python evaluate.py trades.pt --dataset cifar10 --arch wrn-34-10 --method TRADES
    torchrun --nproc-per-node=4 -- evaluate.py ...      # each attacks a part of the images

The table (Markdown) and checks for hidden gradients go to stdout, progress to stderr, all else to
best.eval.json (other settings: best.n1000.eps4.eval.json), from which the same command continues.

An attack is a function attack(model, x, y, epsilon, generators, ...) -> x_adv: model, in eval mode,
maps images [N, 3, H, W] in [0, 1] to logits [N, C]; x is classified correctly as y [N]; epsilon is
the L-infinity radius; each image has a torch.Generator, so that its neighbours do not change what
happens to it. It is lost, and leaves the batch, at its first misclassified iterate.
"""
import argparse
import json
import math
import re
import sys
import time
import warnings
import zlib
from datetime import timedelta
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.distributed import ReduceOp, all_reduce, new_group
from torchvision.transforms import Normalize

import common
from common import RANK, WORLD, fail, number, print0


# ------------------------------ passes, randomness, losses
class Passes:
    """Counts the images sent through the network and back; shows how long it may take."""
    rows = 64  # images in one pass: enough to keep a core busy, few enough for its cache
    amp, text, forward, backward = False, "", 0, 0

    def begin(self, text, most):  # most: the passes to come if every image survives
        self.text, self.most, self.before = text, most, self.forward + self.backward
        self.start = self.shown = time.time()

    def count(self, forward, backward=0):
        self.forward, self.backward = self.forward + forward, self.backward + backward
        if self.text and time.time() > self.shown + 0.5:
            self.shown, made = time.time(), self.forward + self.backward - self.before
            left = (self.shown - self.start) * (self.most / made - 1)
            common.live(f"{self.text}, at most {timedelta(seconds=int(left))} left")


PASSES = Passes()

def parts(*tensors):
    """The rows of all tensors in equal parts of at most PASSES.rows."""
    n = math.ceil(len(tensors[0]) / PASSES.rows)
    return zip(*(t.tensor_split(n) for t in tensors))

@torch.no_grad()
def logits_of(model, x):
    PASSES.count(len(x))
    logits = torch.cat([model(part) for part, in parts(x)])
    if not logits.isfinite().all():
        fail("a network's logits are not finite: its weights are broken, or --mean and --std wrong")
    return logits

def gradient(model, x, loss, y, *target, amp=True):
    """Misclassified [N] (see confirmed), loss(logits, y, *target) [N, 1, 1, 1], gradient as x."""
    PASSES.count(len(x), len(x))
    rows = []
    for part, *labels in parts(x, y, *target):
        part = part.detach().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=PASSES.amp and amp):
            logits = model(part).to(x.dtype)
        value = loss(logits, *labels).view(-1, 1, 1, 1)
        grad = torch.autograd.grad(value.sum(), part)[0]
        rows.append((logits.argmax(1) != labels[0], value.detach(), grad))
    return [torch.cat(found) for found in zip(*rows)]

def confirmed(fooled, model, x, y):
    """[N]: with --amp float32 decides about the images that are fooled by bfloat16 logits."""
    if PASSES.amp and fooled.any():
        rows = fooled.nonzero()[:, 0]
        fooled[rows] = logits_of(model, x[rows]).argmax(1) != y[rows]
    return fooled

class Active:
    """What an attack knows of the images that still stand, a row each: rows, their numbers in the
    batch, z, their iterates, ...; and of all images the result."""
    def __init__(self, images, z, **tensors):
        self.result, self.rows, self.z = images.clone(), torch.arange(len(z), device=z.device), z
        vars(self).update(tensors)

    def drop(self, fooled):
        """The result of fooled images is their iterate; no passes more. Does none stand?"""
        if fooled.any():
            self.result[self.rows[fooled]] = self.z[fooled]
            for name, tensor in vars(self).items():
                if name != "result":
                    setattr(self, name, tensor[~fooled])
        return len(self.rows) == 0

    def finish(self, last):
        self.result[self.rows] = last
        return self.result

def generators_of(seed, attack, index, device):
    """A torch.Generator for each image; numpy documents that SeedSequence's values stay."""
    name = zlib.crc32(attack.encode())
    seeds = [np.random.SeedSequence([seed, name, i]) for i in index.tolist()]
    seeds = [s.generate_state(1, "uint64").item() for s in seeds]
    return [torch.Generator(device).manual_seed(s) for s in seeds]

def uniform(generators, *shape):
    """[N, *shape] in [0, 1), row i from generator i."""
    return torch.stack([torch.rand(shape, generator=g, device=g.device) for g in generators])

def box(x, epsilon):
    """Lower and upper bound of the allowed images: within epsilon of x and in [0, 1]."""
    return (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)

def linf_norm(d):
    return d.abs().amax((1, 2, 3), keepdim=True)

def cross_entropy(logits, y, target=None):
    return F.cross_entropy(logits, y, reduction="none")

def margin(logits, y):
    """z_y - max_{j != y} z_j: negative where misclassified."""
    return logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -torch.inf).amax(1)

def cw_loss(logits, y):
    """In PGD's place for CE, confidence K = 50 (section 5.2; Carlini & Wagner 2017)."""
    return -(margin(logits, y) + 50).clamp(min=0)

def target_margin(logits, y, target):  # z_t - z_y
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]

def dlr_targeted(logits, y, target):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) (Croce & Hein 2020b); few classes: z_t - z_y."""
    if logits.shape[1] < 4:
        return target_margin(logits, y, target)
    first, _, third, fourth = logits.topk(4).values.T
    return target_margin(logits, y, target) / (first - (third + fourth) / 2 + 1e-12)


# ------------------------------ the attacks
def fgsm(model, x, y, epsilon, generators):
    """x + epsilon sign(grad CE), clipped (Goodfellow et al. 2014)."""
    grad = gradient(model, x, cross_entropy, y)[2]
    return (x + epsilon * grad.sign()).clamp(*box(x, epsilon))


def pgd(model, x, y, epsilon, generators, steps=20, step_size=1 / 255, loss=cross_entropy):
    """From a uniform point of the box (eq. 2; step size of section 5.2)."""
    low, high = box(x, epsilon)
    start = x + epsilon * (2 * uniform(generators, *x.shape[1:]) - 1)
    s = Active(x, start.clamp(low, high), y=y, low=low, high=high)
    for _ in range(steps):
        fooled, _, s.grad = gradient(model, s.z, loss, s.y)
        if s.drop(confirmed(fooled, model, s.z, s.y)):
            break
        s.z = (s.z + step_size * s.grad.sign()).clamp(s.low, s.high)
    return s.finish(s.z)


def apgd(model, x, y, epsilon, generators, target=None, loss=cross_entropy, steps=100):
    """Auto-PGD (Croce & Hein 2020b, Algorithm 1): momentum, each image finds its own step size."""
    low, high = box(x, epsilon)
    t = 2 * uniform(generators, *x.shape[1:]) - 1
    start = (x + epsilon * t / linf_norm(t)).clamp(low, high)
    s = Active(x, start, y=y, low=low, high=high, z_prev=start, best=start, best_grad=x)
    s.target = y if target is None else target
    s.step = torch.full_like(linf_norm(x), 2 * epsilon)
    s.value = torch.full_like(s.step, torch.inf)  # the start is no rise
    s.best_value = s.best_value_at_check = -s.value
    s.rises, s.halved = torch.zeros_like(s.step), torch.ones_like(s.step, dtype=torch.bool)
    windows = {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}  # end: length
    for k in range(steps):
        s.value_prev = s.value
        fooled, s.value, s.grad = gradient(model, s.z, loss, s.y, s.target)
        if s.drop(confirmed(fooled, model, s.z, s.y)):
            return s.result
        s.rises = s.rises + (s.value > s.value_prev)
        better = s.value > s.best_value
        s.best = torch.where(better, s.z, s.best)
        s.best_grad = torch.where(better, s.grad, s.best_grad)
        s.best_value = torch.maximum(s.value, s.best_value)
        if k in windows:  # halve the step and go back to the best point where the loss is stuck
            no_gain = ~s.halved & (s.best_value <= s.best_value_at_check)
            s.halved = (s.rises <= 0.75 * windows[k]) | no_gain
            s.step = torch.where(s.halved, s.step / 2, s.step)
            s.z = torch.where(s.halved, s.best, s.z)
            s.grad = torch.where(s.halved, s.best_grad, s.grad)
            s.rises, s.best_value_at_check = torch.zeros_like(s.rises), s.best_value
        ahead = (s.z + s.step * s.grad.sign()).clamp(s.low, s.high)
        a = 0.75 if k else 1.0  # 1 - a: momentum
        z = s.z + a * (ahead - s.z) + (1 - a) * (s.z - s.z_prev)
        s.z_prev, s.z = s.z, z.clamp(s.low, s.high)
    s.drop(logits_of(model, s.z).argmax(1) != s.y)
    return s.finish(s.best)


def each_target(attack, model, x, y, epsilon, generators):
    """attack(..., target) towards each of the (at most 9) wrong classes of largest clean logit."""
    wrong = logits_of(model, x).scatter(1, y[:, None], -torch.inf)
    s = Active(x, x, x=x, y=y, targets=wrong.argsort(1, descending=True)[:, :-1][:, :9])
    for r in range(s.targets.shape[1]):
        own = [generators[i] for i in s.rows.tolist()]
        s.z = attack(model, s.x, s.y, epsilon, own, s.targets[:, r])
        if s.drop(logits_of(model, s.z).argmax(1) != s.y):
            break
    return s.result


def to_hyperplane(x, w, gap):
    """The smallest d (L-infinity) with w . d = gap [N, 1, 1, 1] and x + d in [0, 1]; where none
    reaches it, the farthest. Every pixel moves by t unless its room ends first; Newton's steps from
    t = 0 end on the exact t, as sum |w| min(t, room) is concave and piecewise linear in t."""
    direction, weight, gap = w.sign() * gap.sign(), w.abs(), gap.abs()
    room = torch.where(direction > 0, 1 - x, x)
    t = torch.zeros_like(gap)
    while True:
        covered = (weight * torch.minimum(room, t)).sum((1, 2, 3), keepdim=True)
        rising = (room - t).sign().relu()  # 1 where room > t; a mask takes a CPU twice as long
        slope = (weight * rising).sum((1, 2, 3), keepdim=True)
        ahead = t + (gap - covered) / slope.clamp(min=1e-30)
        t, before = torch.maximum(t, ahead.clamp(max=1)), t  # no room exceeds 1
        if not (t > before * (1 + 1e-6)).any():
            return direction * torch.minimum(room, t)


def fab(model, x, y, epsilon, generators, target, steps=100):
    """Fast adaptive boundary attack (Croce & Hein 2020a): walk along the boundary between y and
    target; an image leaves with its first misclassified point within epsilon."""
    s = Active(x, x, x=x, y=y, target=target)
    for _ in range(steps):
        # in float32: bfloat16 is too coarse for the distance from the boundary
        _, value, w = gradient(model, s.z, target_margin, s.y, s.target, amp=False)
        d_z = to_hyperplane(s.z, w, -value)
        d_x = to_hyperplane(s.x, w, (w * (s.z - s.x)).sum((1, 2, 3), keepdim=True) - value)
        norm_z, norm_x = linf_norm(d_z).clamp(min=1e-8), linf_norm(d_x).clamp(min=1e-8)
        alpha = (norm_z / (norm_z + norm_x)).clamp(max=0.1)
        s.z = ((s.z + 1.05 * d_z) * (1 - alpha) + (s.x + 1.05 * d_x) * alpha).clamp(0, 1)
        s.over = logits_of(model, s.z).argmax(1) != s.y
        if s.drop(s.over & (linf_norm(s.z - s.x).flatten() <= epsilon)):
            break
        s.z = torch.where(s.over.view(-1, 1, 1, 1), s.x + 0.9 * (s.z - s.x), s.z)
    return s.result


def square_side(k, h, w):
    """Of query k of 5,000: 0.8 of the image's area, halved after 10, 50, ... queries."""
    p = 0.8 / 2 ** sum(k > end for end in (10, 50, 200, 500, 1000, 2000, 4000))
    return min(max(round(math.sqrt(p * h * w)), 1), h, w)


def square(model, x, y, epsilon, generators, queries=5000):
    """Square Attack (Andriushchenko et al. 2020): a random square of +-epsilon in each channel is
    kept if it lowers z_y - max_{j != y} z_j."""
    (low, high), (c, h, w) = box(x, epsilon), x.shape[1:]
    stripes = uniform(generators, c, 1, w) < 0.5
    squares = uniform(generators, queries, 2 + c)  # row, column, signs of the channels
    s = Active(x, torch.where(stripes, low, high), y=y, low=low, high=high)
    s.value = margin(logits_of(model, s.z), y)
    for k in range(queries):
        if s.drop(s.value < 0):
            break
        side = square_side(k, h, w)
        top, left, sign = squares[s.rows, k, None].split((1, 1, c), 2)  # [n, 1, 1 or c]
        span = torch.arange(side, device=x.device)
        rows = (top * (h - side + 1)).long() + span[:, None]
        columns = (left * (w - side + 1)).long() + span
        image = torch.arange(len(top), device=x.device).view(-1, 1, 1)
        window = image, slice(None), rows, columns  # [n, side, side, c]
        z = s.z.clone()
        z[window] = torch.where(sign[:, None] < 0.5, s.low[window], s.high[window])
        value = margin(logits_of(model, z), s.y)
        better = value < s.value
        s.z[better], s.value = z[better], torch.minimum(value, s.value)
    return s.finish(s.z)


def spsa(model, x, y, epsilon, generators, steps=20, samples=100, delta=0.001, lr=0.01):
    """SPSA (Uesato et al. 2018; section 5.2): Adam on f = z_y - max_{j != y} z_j, its gradient the
    mean of (f(x + delta v) - f(x - delta v)) / (2 delta) v over random sign vectors v."""
    low, high = box(x, epsilon)
    s = Active(x, x, y=y, low=low, high=high, mean=torch.zeros_like(x), var=torch.zeros_like(x))
    bits = torch.arange(8, dtype=torch.uint8, device=x.device).view(8, 1, 1, 1)
    size = (-(-samples // 8), 1, *x.shape[1:])  # of random bytes, 8 signs from each
    for k in range(1, steps + 1):
        s.grad = torch.empty_like(s.z)
        for i, g in enumerate(generators[row] for row in s.rows.tolist()):
            octets = torch.randint(256, size, generator=g, device=x.device, dtype=torch.uint8)
            v = (octets >> bits & 1).flatten(0, 1)[:samples] * 2.0 - 1
            f = logits_of(model, torch.cat([s.z[i] + delta * v, s.z[i] - delta * v]))
            ahead, behind = margin(f, s.y[i].expand(2 * samples)).chunk(2)
            s.grad[i] = torch.einsum("s,schw->chw", (ahead - behind) / (2 * delta * samples), v)
        s.mean, s.var = 0.9 * s.mean + 0.1 * s.grad, 0.999 * s.var + 0.001 * s.grad ** 2
        step = s.mean / (1 - 0.9 ** k) / ((s.var / (1 - 0.999 ** k)).sqrt() + 1e-8)
        s.z = (s.z - lr * step).clamp(s.low, s.high)
        if s.drop(logits_of(model, s.z).argmax(1) != s.y):
            break
    return s.finish(s.z)


# the function; the passes, forward + backward, for an image that survives it
ATTACKS = {
    "Clean": (lambda model, x, y, epsilon, generators: x, 1),
    "FGSM": (fgsm, 2), "PGD-20": (pgd, 40), "PGD-100": (partial(pgd, steps=100), 200),
    "CW": (partial(pgd, loss=cw_loss), 40), "APGD-CE": (apgd, 201),
    "APGD-T": (partial(each_target, partial(apgd, loss=dlr_targeted)), 9 * 202 + 1),
    "FAB-T": (partial(each_target, fab), 9 * 301 + 1),
    "SQUARE": (square, 5001), "SPSA": (spsa, 20 * 201)}
AA = ("APGD-CE", "APGD-T", "FAB-T", "SQUARE")  # AutoAttack's standard version, in its order
COLUMNS = ("Clean", "FGSM", "PGD-20", "PGD-100", "CW", "AA", "SQUARE", "SPSA")  # the paper's
TOGETHER = 4  # times Passes.rows are attacked together: as images fall, passes stay full


# ------------------------------ the paper's numbers, the checkpoint
# Tables 2 to 8 and 10 (A, B), columns as in COLUMNS
PAPER = """
cifar10 resnet18
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
cifar10 wrn-34-10
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
cifar100 resnet18
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
tinyimagenet resnet18
TRADES           49.56 - 22.90 - 19.70 16.78 - -
MART             45.94 - 26.02 - 21.87 19.20 - -
TRADES + Ours    50.43 - 24.82 - 20.52 18.15 - -
MART + Ours      46.88 - 26.87 - 22.10 19.84 - -
LMA-AT(Ours)     49.10 - 26.35 - 22.40 18.31 - -
"""
ROWS = {}  # {(data set, network, method): {column: percent}}
for line in PAPER.strip().splitlines():
    name, *cells = line.rsplit(maxsplit=len(COLUMNS))
    if len(cells) == 1:
        source = name, *cells
    else:
        ROWS[(*source, name)] = {c: float(v) for c, v in zip(COLUMNS, cells) if v != "-"}
# (script, attack loss, margin weight, tau or None without mHuber): the paper's name for it
METHODS = {
    ("at_ours", "ce", 0, None): "vanillaAT", ("at_ours", "margin+ce", 1, 0.2): "vanillaAT + Ours",
    ("trades_ours", "kl", 0, None): "TRADES", ("mart_ours", "ce", 0, None): "MART",
    ("trades_ours", "margin+ce", 1, 0.2): "TRADES + Ours", ("at_ours", "ce", 1, 0.2): "Table 10 A",
    ("mart_ours", "margin+ce", 1, 0.2): "MART + Ours",
    ("lma_at", "margin+ce", 1, 0.2): "LMA-AT(Ours)", ("lma_at", "margin+ce", 0, 0.2): "Table 10 B",
    **{("lma_at", "margin+ce", 1, tau): f"LMA-AT, tau {tau}" for tau in (0, 0.1, 0.7, 0.9)}}


def paper_method(args):
    """The paper's name for what a checkpoint of ours is, and what differs; None: it has no row."""
    alpha = {"tinyimagenet": 6.345}.get(args["dataset"], 5.345)  # section 5.1
    beta, tau = {"cifar100": 96, "tinyimagenet": 96}.get(args["dataset"], 86), args["tau"]
    if args["arch"].startswith("wrn"):
        alpha = 2.345
    if not args["beta"]:  # no mHuber
        beta, tau = 0, None
    wanted = {"epochs": 130, "lr": 0.01, "weight_decay": 3.5e-3, "batch_size": 100, "amp": False,
              "epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10, "delta": 0.9, "ema": "slot",
              "margin_reduction": "mean", "alpha": alpha, "beta": beta, "inv_lambda": 6, "lam": 5,
              "val_size": min(args.get("val_size", 0), 1000)}  # ours by default: 1000 of 50,000
    differ = [f"{name} {str(args[name])[:6]} ({str(value)[:6]})" for name, value in wanted.items()
              if args.get(name, value) != value]
    name = METHODS.get((args["method"], args["attack_loss"], args["margin_weight"], tau))
    if name and differ:
        name += f", settings differ: {', '.join(differ)}"
    return name


# harmless, and frequent beside other people's weights: argparse's arguments and numpy's numbers
NUMBER = np.float64(0).__reduce__()[0]
SAFE = [argparse.Namespace, np.dtype, NUMBER, (NUMBER, "numpy.core.multiarray.scalar")]
SAFE += {type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?"}
WRAPPER = r"((state_dict|model_state_dict|model|module|_orig_mod|net|network|basic_net|ema|\d+)\.)*"
STANDARDISES = r"(.*\.)?(mu|sigma|mean|std|[^.]*normali[sz]e[^.]*)"


def read_checkpoint(path):
    """({dotted path: value} of all that the file holds, our script's arguments or {})."""
    try:
        with torch.serialization.safe_globals(SAFE):
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler meets
        found = re.search(r"GLOBAL ([\w.]+)|got <class '([\w.]+)", str(error))
        why = f"holds {found[1] or found[2]}" if found else "is no file of torch.save, or damaged"
        if isinstance(error, OSError) and error.filename:
            why = error.strerror
        fail(f"{path}: {why}; give a checkpoint, or a state_dict: tensors, numbers and text alone "
             "are unpickled")
    args = saved.get("args") if isinstance(saved, dict) else None
    if not isinstance(args, dict) or not {"method", "margin_reduction", "tau"} <= args.keys():
        args = {}
    for key, value in args.items():
        each = value if key == "classes" and isinstance(value, list) else [value]
        if not all(isinstance(one, (str, int, float, type(None))) for one in each):
            fail(f"{path}: args.{key} is a {type(value).__name__}, which no script here writes")
    return dict(leaves(saved)), args


def leaves(value, path=()):
    """(dotted path, value) of what nested dicts hold."""
    if isinstance(value, dict) and len(path) < 9:  # a dict may hold itself
        for key in value:
            yield from leaves(value[key], (*path, str(key)))
    else:
        yield ".".join(path), value


def load_network(path, values, arch, args, num_classes):
    """The network in eval mode. Foreign weights may have wrappers and prefixes (WRAPPER), TRADES'
    unused sub_block1 and the usual ResNet-18's names linear and shortcut."""
    with torch.device("meta"):  # which takes no memory: compared with the file first
        model, sets = common.make_model(arch, num_classes), {}
    want = {key: list(value.shape) for key, value in model.state_dict().items() if value.dim()}
    for key, value in values.items():
        prefix = re.match(WRAPPER, key)[0]
        name = "." + key.removeprefix(prefix)
        name = name.replace(".shortcut.", ".downsample.").replace(".linear.", ".fc.")[1:]
        if re.fullmatch(STANDARDISES, key) and (torch.is_tensor(value) or value):
            if not args.mean:
                fail(f"{path}: {key} says that it standardises its images; give --mean and --std")
        elif not re.match("sub_block1|.*num_batches_tracked", name):
            if name in sets.setdefault(prefix, {}):
                fail(f"{path}: {key} and another key mean {name}; save the one that is meant")
            plain = torch.is_tensor(value) and value.layout == torch.strided and not value.is_meta
            sets[prefix][name] = value if plain and value.is_floating_point() else None
    sets = {prefix or "top": state for prefix, state in sets.items() if state.keys() & want.keys()}
    if len(sets) != 1:
        fail(f"{path}: holds {len(sets)} state_dicts of {arch} {list(sets)}; save the one that is "
             "meant, or choose another --arch")
    state, = sets.values()
    have = {key: "no plain tensor of floats" if value is None else list(value.shape)
            for key, value in state.items()}
    wrong = [f"{key} is {have.get(key, 'missing')} instead of {want.get(key, 'absent')}"
             for key in sorted(want | have) if want.get(key) != have.get(key)]
    if wrong:
        fail(f"{path} does not fit {arch} with {num_classes} classes in {len(wrong)} keys: "
             f"{'; '.join(wrong[:3])}; choose another --arch or --dataset, or rename them")
    if not all(value.isfinite().all() for value in state.values()):
        fail(f"{path}: has weights that are not finite; its training diverged")
    model = common.make_model(arch, num_classes)
    model.load_state_dict(state, strict=False)
    if args.mean:
        model = torch.nn.Sequential(Normalize(args.mean, args.std), model)
    return model.eval().requires_grad_(False)


# ------------------------------ the evaluation
class Evaluation:
    """Of one checkpoint: its network, images, the class predicted for each under every attack (-1:
    not computed), the cost. Kept in the file `out`; one with other settings is refused."""

    def __init__(self, path, args, load_data, device, group=None):
        values, trained = read_checkpoint(path)
        dataset, arch = args.dataset or trained.get("dataset"), args.arch or trained.get("arch")
        if dataset not in common.DATASETS or not arch:
            fail(f"{path}: says not what it was trained on, or what it is; give --dataset, --arch")
        data = load_data(dataset, args.data_dir or trained.get("data_dir") or "data")
        total, self.classes = len(data.x_test), len(data.classes)
        classes = trained.get("classes", list(data.classes))
        if classes != list(data.classes):
            differ = sorted(set(classes) ^ set(data.classes))[:5] or "in another order"
            fail(f"{path}: {dataset} has other classes than it was trained on: {differ}; choose "
                 "another --dataset or --data-dir")
        if trained.get("data") not in (None, common.fingerprint(data.x_train, data.y_train)):
            print0(f"note: {path} was trained on other images, {trained['data']}")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:args.n]
        self.index = order.sort().values
        self.images, self.label = data.x_test[self.index], data.y_test[self.index]
        model = load_network(path, values, str(arch), args, self.classes)
        weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
        self.settings = {"epsilon": args.epsilon, "seed": args.seed, "weights": zlib.crc32(weights),
                         "images": common.fingerprint(self.images, self.label),
                         "mean": args.mean, "std": args.std, "amp": args.amp,
                         "program": zlib.crc32(Path(__file__).read_bytes())}
        self.model = model.to(device, memory_format=torch.channels_last)
        self.path, self.device, self.group = path, device, group
        self.method, self.paper = args.method or "no row of the paper", {}
        alike = args.method or path  # a mean is of foreign weights of one method
        if trained:  # or of runs that differ in the seed alone
            self.method = args.method or paper_method(trained) or str(trained["method"])
            varies = ("seed", "run_dir", "data_dir", "device", "resume")
            alike = Path(path).name, str([v for k, v in trained.items() if k not in varies])
        self.alike = dataset, arch, self.method, self.settings["images"], alike
        if abs(args.epsilon - 8 / 255) < 1e-6:
            self.paper = ROWS.get((dataset, arch, self.method), {})
        differs = [args.dataset, args.n and f"n{args.n}", args.seed and f"seed{args.seed}",
                   args.mean and "standardised", args.amp and "amp"]
        if args.epsilon != 8 / 255:
            differs.append(f"eps{255 * args.epsilon:g}")
        name = ".".join([Path(path).stem, *filter(None, differs), "eval.json"])
        self.out = Path(args.out or Path(path).with_name(name))
        self.prediction = {name: torch.full_like(self.label, -1) for name in ATTACKS}
        self.cost, self.summary = {}, {}
        other = {k: self.settings[k] for k in ("mean", "std", "amp") if self.settings[k]}
        print0(f"{path}: {self.method}, {arch} on {dataset}, {len(order)} of {total} test images, "
               f"epsilon {255 * args.epsilon:g}/255, seed {args.seed} {other or ''}")

    def open(self):
        """Take the file of results and what it holds."""
        if self.out.exists() and not self.out.is_file():
            fail(f"{self.out} is not a file; choose another --out")
        if RANK == 0:
            if self.out.exists():
                self.read()
            self.save()
        self.share()

    def read(self):
        try:
            old = json.loads(self.out.read_text())
            settings = old["settings"]
            for title, cost in old["cost"].items():
                self.cost[title] = {k: 0 + cost[k] for k in ("seconds", "forward", "backward")}
            other = [key for key in sorted(settings | self.settings)
                     if (key in settings, settings.get(key)) != (True, self.settings.get(key))]
            for name, found in () if other else old["prediction"].items():
                whole = {type(p) for p in found} == {int} and len(found) == len(self.label)
                if not whole or not {*found} <= {*range(-1, self.classes)}:
                    raise ValueError
                self.prediction[name].copy_(torch.tensor(found))
        except Exception:  # anything may stand in it
            fail(f"{self.out} is no result of evaluate.py; move it or choose another --out")
        if other:
            fail(f"{self.out} is of other {', '.join(other)}; move it or choose an --out")

    def save(self):
        first = np.full(len(self.label), None)  # AA's attack that broke the image; Clean: none
        for name in (*reversed(AA), "Clean"):
            first[(self.prediction[name] >= 0) & ~self.robust(name)] = name
        content = self.summary | {
            "settings": self.settings, "torch": torch.__version__, "index": self.index.tolist(),
            "label": self.label.tolist(), "AA_broken_by": first.tolist(), "cost": self.cost,
            "prediction": {k: p.tolist() for k, p in self.prediction.items() if p.max() >= 0}}
        common.save(lambda part: part.write_text(json.dumps(content)), self.out)

    def robust(self, *names):  # [n] bool: classified correctly under each of these attacks
        return torch.stack([self.prediction[name] == self.label for name in names]).all(0)

    def share(self):  # under torchrun every process gets what all have found
        for prediction in self.prediction.values() if WORLD > 1 else ():
            all_reduce(prediction, ReduceOp.MAX, self.group)

    def batch(self, rows, purpose):
        """Images [N, 3, H, W], labels and generators of some rows."""
        x = common.to_float(self.images[rows].to(self.device))
        generators = generators_of(self.settings["seed"], purpose, self.index[rows], self.device)
        return x, self.label[rows].to(self.device), generators

    def run(self, name, before, title):
        """Attack, a batch at a time, what stood under Clean and the attacks `before`."""
        (attack, passes), epsilon = ATTACKS[name], self.settings["epsilon"]
        todo = self.prediction[name] == -1
        if name != "Clean":
            todo &= self.robust("Clean", *before)
        mine = todo.nonzero()[RANK::WORLD, 0]
        for batch in range(0, len(mine), TOGETHER * PASSES.rows):
            rows, left = mine[batch:batch + TOGETHER * PASSES.rows], len(mine) - batch
            PASSES.begin(f"{title}: {batch}/{len(mine)} images done", left * passes)
            start, forward, backward = time.time(), PASSES.forward, PASSES.backward
            x, y, generators = self.batch(rows, name)
            x_adv = attack(self.model, x, y, epsilon, generators)
            self.prediction[name][rows] = logits_of(self.model, x_adv).argmax(1).cpu()
            assert ((x_adv - x).abs() < epsilon + 1e-6).all() and (x_adv == x_adv.clamp(0, 1)).all()
            cost = self.cost.setdefault(title, {"seconds": 0, "forward": 0, "backward": 0})
            cost["seconds"] += time.time() - start
            cost["forward"] += PASSES.forward - forward
            cost["backward"] += PASSES.backward - backward
            if WORLD == 1:
                self.save()
        PASSES.text = ""
        self.share()
        self.save()

    def column(self, column):
        """Percent of the images that stand under one of COLUMNS and half of Wilson's interval."""
        start, names = time.time(), AA if column == "AA" else (column,)
        for k, name in enumerate(names):
            self.run(name, names[:k], column if name == column else f"{column}: {name}")
        p, n = self.robust(*names).float().mean().item(), len(self.label)
        half = 1.96 / (1 + 1.96 ** 2 / n) * math.sqrt(p * (1 - p) / n + (1.96 / n) ** 2 / 4)
        common.live("")
        if RANK == 0:
            print(f"{column:8} {100 * p:6.2f} ± {100 * half:.2f} %  ({time.time() - start:.1f} s)",
                  file=sys.stderr, flush=True)
        return 100 * p, 100 * half


# ------------------------------ the output
def table(evaluations, columns):
    """Markdown: a row for each; below those that are alike the mean, the paper, the difference."""
    def shown(cells):
        return [f"{value:.2f} ± {half:.2f}" for value, half in cells.values()]

    lines = [["Method", *columns], ["---"] * (1 + len(columns))]
    for alike in dict.fromkeys(e.alike for e in evaluations):
        group = [e for e in evaluations if e.alike == alike]
        k, method, paper, cells = len(group), group[0].method, group[0].paper, group[0].cells
        lines += [[f"{method} ({e.path})", *shown(e.cells)] for e in group]
        if k > 1:
            values = {c: [e.cells[c][0] for e in group] for c in columns}
            t = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)[min(k, 10) - 2]
            cells = {c: (np.mean(v), t * np.std(v, ddof=1) / k ** 0.5) for c, v in values.items()}
            lines.append([f"{method}, mean of {k}", *shown(cells)])
        if paper:
            both = [f"{cells[c][0] - paper[c]:+.2f}" if c in paper else "-" for c in columns]
            paper = [f"{paper[c]:.2f}" if c in paper else "-" for c in columns]
            lines += [[f"paper, {method}", *paper], ["difference", *both]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sceptic(e, points):
    """Signs that a network hides its gradients instead of resisting (Athalye et al. 2018)."""
    rows = e.robust("Clean").nonzero()[:, 0]
    if not len(rows):
        return ["SUSPECT no image is classified correctly"]
    rows = rows[::math.ceil(len(rows) / 200)]  # for attacks of its own; files may lie by classes
    x, y, generators = e.batch(rows, "sceptic")
    checks, of_all = {}, f"of {len(x)} images"  # {text: whether it is so}
    slack = max(0.2, 100 / len(e.label)) + 1e-9  # points; among few images, one

    def left(x_adv):
        return 100 * (logits_of(e.model, x_adv).argmax(1) == y).float().mean().item()

    white = {c: points[c] for c in ("PGD-20", "PGD-100", "CW") if c in points}
    black = {c: points[c] for c in ("SQUARE", "SPSA") if c in points}
    if "AA" in points:
        white["APGD and FAB"] = 100 * e.robust(*AA[:3]).float().mean().item()
        black["AA with SQUARE"] = points["AA"]
    if white and black:
        w, b = min(white, key=white.get), min(black, key=black.get)
        checks[f"black box not stronger than white box: {b} leaves {black[b]:.2f} %, {w} "
               f"{white[w]:.2f} %"] = black[b] >= white[w] - slack
    if {"PGD-20", "PGD-100"} <= points.keys():
        short, long = points["PGD-20"], points["PGD-100"]
        checks[f"PGD: {short:.2f} % after 20 steps, {long:.2f} % after 100"] = long <= short + slack
    stand = left(pgd(e.model, x, y, 64 / 255, generators, 20, 8 / 255))
    checks[f"epsilon 64/255 breaks nearly all: PGD-20 leaves {stand:.1f} % {of_all}"] = stand <= 5
    low, high = box(x, e.settings["epsilon"])
    stand = left(low + (high - low) * uniform(generators, *x.shape[1:]))
    checks[f"uniform noise costs little: it leaves {stand:.1f} % {of_all}"] = stand >= 90
    zero = int((linf_norm(gradient(e.model, x, cross_entropy, y)[2]) == 0).sum())
    checks[f"cross-entropy's gradient is not zero: it is for {zero} {of_all}"] = zero == 0
    z = logits_of(e.model, x)
    spread = ((logits_of(e.model, x) - z).abs().max() / z.abs().max()).item()
    checks[f"two calls agree: logits differ by {spread:.1g} of the largest"] = spread < 1e-4
    logits = z.min() < 0 or (z.sum(1) - 1).abs().max() > 1e-4
    checks[f"logits, not probabilities: from {z.min():.3g} to {z.max():.3g}"] = logits
    return [f"{'pass   ' if passed else 'SUSPECT'} {text}" for text, passed in checks.items()]


def figure1(path, natural, e):
    """Figure 1: rank, among a naturally trained network's wrong classes on the clean image, of the
    class into which PGD-20 and CW turn it. "2nd" is the most probable wrong class."""
    bins, counts = min(10, e.classes - 1), {}
    names = ["2nd", "3rd", *(f"{k}th" for k in range(4, 11)), "11th and later"]
    for name in ("PGD-20", "CW"):
        # open: the paper counts every misclassified x'; an image that is wrong before the attack,
        # which attacks pass over, is such an x' itself and is counted with the class it has
        found = torch.where(e.robust("Clean"), e.prediction[name], e.prediction["Clean"])
        rows = (found != e.label).nonzero()[:, 0]
        x, y, _ = e.batch(rows, name)
        logits = logits_of(natural, x).scatter(1, y[:, None], -torch.inf)
        rank = (logits > logits.gather(1, found[rows, None].to(e.device))).sum(1)
        counts[name] = rank.clamp(max=bins - 1).bincount(minlength=bins).tolist()
        print(f"{name}, rank of the wrong class: {dict(zip(names, counts[name]))}")
    picture = Image.new("RGB", (920, 480), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    draw.text((30, 14), "images by rank of their wrong class in natural training", "black", font)
    slot, peak = 860 / bins, max(1, *map(max, counts.values()))
    for side, (name, colour) in enumerate({"PGD-20": "#1f5fa8", "CW": "#e08a1e"}.items()):
        draw.text((30 + 200 * side, 44), f"{name} ({sum(counts[name])})", colour, font)
        for k, value in enumerate(counts[name]):
            x, y = 30 + slot * (k + 0.1 + 0.4 * side), 440 - 350 * value / peak
            draw.rectangle((x, y, x + 0.4 * slot, 440), colour)
            draw.text((x + 0.2 * slot, y - 2), str(value), "black", font, "mb")
            draw.text((30 + slot * (k + 0.5), 448), names[k][:4], "black", font, "mt")
    picture.save(path, "png")
    print(f"drawn to {path}")


# ------------------------------ the command
def parse_args():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    methods = list(dict.fromkeys(method for _, _, method in ROWS))
    add("checkpoints", nargs="+", help="best.pt or last.pt, or foreign weights")
    add("--attacks", nargs="+", default=COLUMNS[1:], choices=COLUMNS, help="columns of the table")
    add("--n", type=number(1, kind=int), help="so many test images, drawn once (default: all)")
    add("--epsilon", type=number(0, 1), default="8/255", help="radius")
    add("--batch-size", type=number(1, kind=int), help="images in one pass of the network (512 on "
        f"CUDA, else 64), of {TOGETHER} times as many that are attacked together")
    add("--dataset", choices=common.DATASETS, help="default: what the checkpoint was trained on")
    add("--data-dir", help="default: where it was trained from")
    add("--arch", help="default: the checkpoint's; resnet18 or wrn-<depth>-<widen>")
    add("--mean", type=number(0, 1), nargs=3, metavar="C", help="of R, G and B, and")
    add("--std", type=number(1e-3, 1), nargs=3, metavar="C", help="for networks that standardise")
    add("--amp", action="store_true", help="FGSM, PGD, CW, APGD in bfloat16, decisions not")
    add("--method", choices=methods, help="of foreign weights: the paper's row to compare with")
    add("--device", default="auto", help="cuda, cpu, ...; auto: cuda if there is one")
    add("--seed", type=number(0, 2 ** 31 - 1, kind=int), default=0, help="of the attacks")
    add("--out", help="the file of the results, for one checkpoint (default: see above)")
    add("--figure1", nargs=2, metavar=("NATURAL_CKPT", "OUT.png"), help="of the first checkpoint")
    args = parser.parse_args()
    if args.out and len(args.checkpoints) > 1:
        fail("--out: takes the results of one checkpoint; leave it out")
    if (args.mean is None) != (args.std is None):
        fail("--mean and --std: give both")
    picture = Path(args.figure1[1] if args.figure1 else "figure1.png")
    able = not args.figure1 or {"PGD-20", "CW"} <= set(args.attacks)
    if not able or picture.is_dir() or not picture.parent.is_dir():
        fail("--figure1: needs PGD-20 and CW among --attacks and a file in a folder that exists")
    return args


def main():
    args = parse_args()
    warnings.simplefilter("ignore")  # torch's about what foreign files hold
    device = common.setup(args.device, args.amp)
    torch.backends.cudnn.benchmark = False  # batches vary in size
    PASSES.amp, PASSES.rows = args.amp, args.batch_size or (512 if device.type == "cuda" else 64)
    group = new_group(backend="gloo", timeout=timedelta(days=30)) if WORLD > 1 else None
    load_data = cache(common.load_data)
    evaluations = [Evaluation(path, args, load_data, device, group) for path in args.checkpoints]
    if args.figure1:
        values, trained = read_checkpoint(args.figure1[0])
        arch = args.arch or str(trained.get("arch"))
        natural = load_network(args.figure1[0], values, arch, args, evaluations[0].classes)
    for e in evaluations:
        e.open()
    columns, notes = [c for c in COLUMNS if c in ("Clean", *args.attacks)], ""
    for e in evaluations:
        e.cells = {column: e.column(column) for column in columns}
        if RANK == 0:
            points = {column: value for column, (value, _) in e.cells.items()}
            e.summary = {"accuracy": points, "checks": sceptic(e, points)}
            e.save()
            notes += "\n".join(["\n", e.path, *e.summary["checks"]])
    if args.figure1 and RANK == 0:
        figure1(args.figure1[1], natural.to(device), evaluations[0])
    print0(f"\n{table(evaluations, columns)}\n\n±: half the 95 % interval, Wilson's of a "
           f"checkpoint, Student's of a mean{notes}")


if __name__ == "__main__":
    common.run(main, "as it is")
