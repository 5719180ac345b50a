"""Robust accuracy of a checkpoint under the attacks of section 5.2, as a row of Table 4, and whether to believe it.

    python evaluate.py runs/cifar10-resnet18-lma_at-seed0/best.pt
    python evaluate.py runs/cifar10-resnet18-lma_at-seed*/best.pt --attacks PGD-20 CW AA --n 1000
    python evaluate.py trades.pt --dataset cifar10 --arch wrn-34-10 --method TRADES      # somebody else's weights
    torchrun --nproc-per-node=4 -- evaluate.py ...                                       # each process a part of the images

The table (Markdown) and the sceptic's checks go to stdout, progress to stderr, all else to <checkpoint>.eval.json, from
which an interrupted evaluation continues. Every attack is a function attack(model, x, y, epsilon, draws) -> x_adv: model
maps images [N, 3, H, W] in [0, 1] to logits [N, C], is in eval mode and needs no parameter gradients; x is classified
correctly as y [N]; epsilon is the L-infinity radius in the unit of the images; draws are the random numbers. An image
leaves the batch at its first misclassified iterate; its neighbours in the batch do not change what happens to it.
"""
import hashlib
import json
import math
import os
import statistics
import sys
import time
import zlib
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import common
from common import RANK, WORLD, fail, number


def scramble(z):
    """Finaliser of SplitMix64 (Steele et al. 2014) on int64: every bit of the input moves every bit of the output."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47  # the masks make >> of a signed number a logical shift
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & (1 << 33) - 1)


class Draws:
    """Random numbers that depend on (seed, attack, image, k) and on nothing else: a hash instead of a generator's state.
    So an image sees the same numbers in whatever batch it is. k numbers the draw within the attack. index: [N] int64."""

    def __init__(self, seed, attack, index, keys=None):
        self.keys = scramble(scramble(index + (seed << 32)) + zlib.crc32(attack.encode())) if keys is None else keys

    def select(self, rows):
        return Draws(None, None, None, self.keys[rows])

    def bits(self, k, n):
        """[N, n] int64, 64 random bits each."""
        steps = torch.arange(1, n + 1, device=self.keys.device) * -0x61C8864680B583EB  # SplitMix64's 2^64 / golden ratio
        return scramble(scramble(self.keys + k)[:, None] + steps)

    def uniform(self, k, *shape):
        """[N, *shape] float32 in [0, 1)."""
        return ((self.bits(k, math.prod(shape)) >> 40 & (1 << 24) - 1) * 2.0 ** -24).view(-1, *shape)

    def signs(self, k, *shape):
        """[N, *shape] of -1 and 1, each with probability 1/2: 64 from every hash."""
        size = math.prod(shape)
        octets = torch.arange(256, device=self.keys.device)[:, None] >> torch.arange(8, device=self.keys.device)
        table = (octets & 1) * 2.0 - 1  # the 8 signs of each octet: looking them up is cheaper than shifting
        return table[self.bits(k, -(-size // 64)).view(torch.uint8).long()].flatten(1)[:, :size].view(-1, *shape)


class Meter:
    """Counts the images sent through the network and back, and shows how far the attack is if stderr is a terminal."""

    forward, backward, alive, text = 0, 0, 0, ""

    def begin(self, text, images, passes):
        """text: the attack; images still to attack; passes: forward + backward for one that survives."""
        self.text, self.images, self.alive, self.done, self.passes = text, images, images, 0, passes
        self.start, self.shown, self.before = time.time(), 0, self.forward + self.backward

    def count(self, forward, backward=0):
        self.forward, self.backward, now = self.forward + forward, self.backward + backward, time.time()
        if self.text and RANK == 0 and now > self.shown + 0.5 and sys.stderr.isatty():
            made = self.forward + self.backward - self.before
            left = (now - self.start) * max(0, self.alive * self.passes / made - 1)
            print(f"\r\033[K{self.text}: {self.done}/{self.images} images done, {self.alive} still robust, "
                  f"at most {timedelta(seconds=int(left))} left in it", end="", file=sys.stderr, flush=True)
            self.shown = now


METER = Meter()
cross_entropy = partial(F.cross_entropy, reduction="none")


def parts(*tensors):
    """Row chunks that keep the network busy and its activations in cache (CPU) or in memory (GPU)."""
    return zip(*(t.split(512 if t.is_cuda else 64) for t in tensors))


@torch.no_grad()
def forward(model, x):
    """Logits [N, C]."""
    METER.count(len(x))
    return torch.cat([model(part) for part, in parts(x)])


def gradient(model, x, loss, *labels):
    """Logits [N, C], loss(logits, *labels) [N] and its gradient with respect to each image [N, 3, H, W]."""
    METER.count(len(x), len(x))
    rows = []
    for part, *given in parts(x, *labels):
        part = part.detach().requires_grad_()
        logits = model(part)
        value = loss(logits, *given)
        grad, = torch.autograd.grad(value.sum(), part)
        rows.append((logits.detach(), value.detach(), grad))
    return [torch.cat(found) for found in zip(*rows)]


def settle(fooled, x_adv, left, z, *state):
    """Write the iterates z of fooled images into their rows `left` of x_adv; return the state of the other images."""
    if fooled.any():
        x_adv[left[fooled]] = z[fooled]
        METER.alive -= int(fooled.sum())
        left, z, *state = (t[~fooled] for t in (left, z, *state))
    return left, z, *state


def box(x, epsilon):
    """Lower and upper bound of the allowed images: within epsilon of x and in [0, 1]."""
    return (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)


def size(d):
    """L-infinity norm of each image, [N, 1, 1, 1]."""
    return d.abs().amax((1, 2, 3), keepdim=True)


def lead(logits, y):
    """z_y - max_{j != y} z_j: negative where misclassified."""
    return logits.gather(1, y[:, None])[:, 0] - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def cw_loss(logits, y):
    """The CW loss in PGD's place for cross-entropy, confidence K = 50 (section 5.2; Carlini & Wagner 2017)."""
    return -(lead(logits, y) + 50).clamp(min=0)


def target_lead(logits, y, target):
    """z_t - z_y."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None]))[:, 0]


def dlr_targeted(logits, y, target):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2) (Croce & Hein 2020b, eq. 7), the same however logits are scaled.
    Below 4 classes there is no z_(4): z_t - z_y takes its place."""
    if logits.shape[1] < 4:
        return target_lead(logits, y, target)
    top = logits.topk(4).values
    return target_lead(logits, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


# -------------------------------------------------------------------------------------------------------- the attacks
def fgsm(model, x, y, epsilon, draws):
    """x + epsilon sign(grad CE), clipped (Goodfellow et al. 2014)."""
    low, high = box(x, epsilon)
    return (x + epsilon * gradient(model, x, cross_entropy, y)[2].sign()).clamp(low, high)


def pgd(model, x, y, epsilon, draws, steps=20, step_size=1 / 255, loss=cross_entropy):
    """Projected gradient ascent from a uniform point of the box (eq. 2; step size of section 5.2)."""
    low, high = box(x, epsilon)
    x_adv, left = x.clone(), torch.arange(len(x), device=x.device)
    z = (x + epsilon * (2 * draws.uniform(0, *x.shape[1:]) - 1)).clamp(low, high)
    for _ in range(steps):
        logits, _, grad = gradient(model, z, loss, y)
        left, z, y, grad, low, high = settle(logits.argmax(1) != y, x_adv, left, z, y, grad, low, high)
        if not len(left):
            return x_adv
        z = (z + step_size * grad.sign()).clamp(low, high)
    x_adv[left] = z
    return x_adv


def apgd_checkpoints(steps):
    """{iteration: length of the window that ends there}: windows of 0.22 steps, then 0.03 shorter each, at least 0.06."""
    ends, window, k = {}, max(int(0.22 * steps), 1), 0
    while (k := k + window) <= steps:
        ends[k] = window
        window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
    return ends


def apgd(model, x, y, epsilon, draws, target=None, k_draw=0, loss=cross_entropy, steps=100):
    """Auto-PGD (Croce & Hein 2020b, Algorithm 1): PGD with momentum whose step size each image finds for itself.
    Maximises loss(logits, y) or loss(logits, y, target) with target [N]."""
    low, high = box(x, epsilon)
    x_adv, left = x.clone(), torch.arange(len(x), device=x.device)
    labels = (y,) if target is None else (y, target)
    t = 2 * draws.uniform(k_draw, *x.shape[1:]) - 1
    z = z_prev = (x + epsilon * t / size(t)).clamp(low, high)
    step = torch.full((len(x), 1, 1, 1), 2 * epsilon, device=x.device)
    ends = apgd_checkpoints(steps)
    for k in range(steps):
        logits, value, grad = gradient(model, z, loss, *labels)
        if k == 0:
            best, best_value, best_grad, last, checked = z, value, grad, value, value
            rises, halved = torch.zeros_like(value), torch.ones_like(y, dtype=torch.bool)
        left, z, z_prev, low, high, step, value, grad, best, best_value, best_grad, last, checked, rises, halved, *labels = \
            settle(logits.argmax(1) != labels[0], x_adv, left, z, z_prev, low, high, step, value, grad, best, best_value,
                   best_grad, last, checked, rises, halved, *labels)
        if not len(left):
            return x_adv
        rises += value > last
        last, better = value, value > best_value
        best, best_grad = (torch.where(better.view(-1, 1, 1, 1), new, old) for new, old in ((z, best), (grad, best_grad)))
        best_value = torch.maximum(value, best_value)
        if k in ends:  # halve the step and go back to the best point where the loss has stopped to rise
            stuck = (rises <= 0.75 * ends[k]) | ~halved & (best_value <= checked)
            step = torch.where(stuck.view(-1, 1, 1, 1), step / 2, step)
            z, grad = torch.where(stuck.view(-1, 1, 1, 1), best, z), torch.where(stuck.view(-1, 1, 1, 1), best_grad, grad)
            rises, halved, checked = torch.zeros_like(rises), stuck, best_value
        ahead = (z + step * grad.sign()).clamp(low, high)
        a = 0.75 if k else 1.0
        z, z_prev = (z + a * (ahead - z) + (1 - a) * (z - z_prev)).clamp(low, high), z
    left, z, best = settle(forward(model, z).argmax(1) != labels[0], x_adv, left, z, best)
    x_adv[left] = best
    return x_adv


def each_target(attack, model, x, y, epsilon, draws):
    """attack(..., target, r) towards each of the 9 wrong classes of largest clean logit (all, if fewer) in turn."""
    ranked = forward(model, x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1][:, :9]
    x_adv, left = x.clone(), torch.arange(len(x), device=x.device)
    for r in range(ranked.shape[1]):
        if len(left):
            z = attack(model, x[left], y[left], epsilon, draws.select(left), ranked[left, r], r)
            fooled = forward(model, z).argmax(1) != y[left]
            x_adv[left[fooled]] = z[fooled]
            left = left[~fooled]
    return x_adv


def to_hyperplane(x, w, gap):
    """The smallest d (L-infinity) with w . d = gap [N, 1, 1, 1] and x + d in [0, 1]; where none reaches it, the farthest.
    Every pixel moves by t unless its room ends first; t solves sum |w| min(t, room) = gap, which is concave and piecewise
    linear in t, so that Newton's steps from t = 0 end on the exact solution (Croce & Hein 2020a, section 3, sort instead)."""
    direction, weight, gap = w.sign() * gap.sign(), w.abs(), gap.abs()
    room = torch.where(direction > 0, 1 - x, x)
    t = torch.zeros_like(gap)
    while True:
        covered = (weight * torch.minimum(room, t)).sum((1, 2, 3), keepdim=True)
        slope = (weight * (room > t)).sum((1, 2, 3), keepdim=True)
        t, before = torch.maximum(t, (t + (gap - covered) / slope.clamp(min=1e-30)).clamp(max=1)), t  # no room exceeds 1
        if (t <= before * (1 + 1e-6)).all():
            return direction * torch.minimum(room, t)


def fab(model, x, y, epsilon, draws, target, r, steps=100):
    """Fast adaptive boundary attack (Croce & Hein 2020a) towards one class: walk along the boundary between y and target.
    The original keeps the nearest misclassified point; only whether it is within epsilon matters here, so an image leaves
    with the first that is."""
    x_adv, left, z = x.clone(), torch.arange(len(x), device=x.device), x
    for _ in range(steps):
        _, f, w = gradient(model, z, target_lead, y, target)
        gap = -f.view(-1, 1, 1, 1)
        d_z = to_hyperplane(z, w, gap)
        d_x = to_hyperplane(x, w, gap + (w * (z - x)).sum((1, 2, 3), keepdim=True))
        alpha = size(d_z).clamp(min=1e-8)
        alpha = (alpha / (alpha + size(d_x).clamp(min=1e-8))).clamp(max=0.1)
        z = ((z + 1.05 * d_z) * (1 - alpha) + (x + 1.05 * d_x) * alpha).clamp(0, 1)
        over = forward(model, z).argmax(1) != y
        fooled = over & (size(z - x)[:, 0, 0, 0] <= epsilon)
        left, z, x, y, target, over = settle(fooled, x_adv, left, z, x, y, target, over)
        if not len(left):
            break
        z = torch.where(over.view(-1, 1, 1, 1), x + 0.9 * (z - x), z)
    return x_adv


def square_side(k, h, w):
    """Side of the square at query k of 5,000: 0.8 of the image's area, halved after 10, 50, 200, ... queries."""
    p = 0.8 / 2 ** sum(k > end for end in (10, 50, 200, 500, 1000, 2000, 4000))
    return max(round(math.sqrt(p * h * w)), 1)


def square(model, x, y, epsilon, draws, queries=5000):
    """Square Attack (Andriushchenko et al. 2020, Algorithms 1 and 2): a random square of +-epsilon in each channel is
    kept if it lowers z_y - max_{j != y} z_j. Position and signs are drawn per image."""
    (low, high), (_, c, h, w) = box(x, epsilon), x.shape
    x_adv, left = x.clone(), torch.arange(len(x), device=x.device)
    z = torch.where(draws.uniform(0, c, 1, w) < 0.5, low, high)  # the start: vertical stripes
    value = lead(forward(model, z), y)
    for k in range(queries):
        left, z, y, low, high, value = settle(value < 0, x_adv, left, z, y, low, high, value)
        if not len(left):
            return x_adv
        side = square_side(k, h, w)
        u, span = draws.select(left).uniform(k + 1, 2 + c), torch.arange(side, device=x.device)
        rows = (u[:, 0] * (h - side + 1)).long().view(-1, 1, 1) + span[:, None]
        columns = (u[:, 1] * (w - side + 1)).long().view(-1, 1, 1) + span
        window = torch.arange(len(z), device=x.device).view(-1, 1, 1), slice(None), rows, columns  # [n, side, side, c]
        z_new = z.clone()
        z_new[window] = torch.where(u[:, None, None, 2:] < 0.5, low[window], high[window])
        value_new = lead(forward(model, z_new), y)
        better = value_new < value
        z[better], value = z_new[better], torch.minimum(value, value_new)
    x_adv[left] = z
    return x_adv


def spsa(model, x, y, epsilon, draws, steps=20, samples=100, delta=0.001, lr=0.01):
    """SPSA (Uesato et al. 2018; constants of section 5.2): Adam on z_y - max_{j != y} z_j, its gradient estimated from
    differences along random sign vectors v: mean over the samples of (f(x + delta v) - f(x - delta v)) / (2 delta) v."""
    low, high = box(x, epsilon)
    x_adv, left = x.clone(), torch.arange(len(x), device=x.device)
    z, first, second = x, torch.zeros_like(x), torch.zeros_like(x)
    for k in range(1, steps + 1):
        grad = torch.empty_like(z)
        for rows in torch.arange(len(z), device=x.device).split(8):  # bounds the memory: 1,600 images at once
            v = draws.select(left[rows]).signs(k, samples, *x.shape[1:])
            queries = torch.cat([z[rows, None] + delta * v, z[rows, None] - delta * v], 1).flatten(0, 1)
            f = lead(forward(model, queries), y[rows].repeat_interleave(2 * samples)).view(len(rows), 2, samples)
            slope = (f[:, 0] - f[:, 1]) / (2 * delta * samples)
            grad[rows] = torch.einsum("ns,nschw->nchw", slope, v)
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad ** 2
        z = (z - lr * first / (1 - 0.9 ** k) / ((second / (1 - 0.999 ** k)).sqrt() + 1e-8)).clamp(low, high)
        left, z, y, low, high, first, second = settle(forward(model, z).argmax(1) != y, x_adv, left, z, y, low, high,
                                                      first, second)
        if not len(left):
            return x_adv
    x_adv[left] = z
    return x_adv


# the name of every attack: the function, and the passes (forward + backward) that an image costs which survives it
ATTACKS = {
    "Clean": (lambda model, x, y, epsilon, draws: x, 1),
    "FGSM": (fgsm, 2),
    "PGD-20": (pgd, 40),
    "PGD-100": (partial(pgd, steps=100), 200),
    "CW": (partial(pgd, loss=cw_loss), 40),
    "APGD-CE": (apgd, 201),
    "APGD-T": (partial(each_target, partial(apgd, loss=dlr_targeted)), 9 * 202 + 1),
    "FAB-T": (partial(each_target, fab), 9 * 301 + 1),
    "SQUARE": (square, 5001),
    "SPSA": (spsa, 20 * 201),
}
AA = ("APGD-CE", "APGD-T", "FAB-T", "SQUARE")  # AutoAttack's standard version, in its order
COLUMNS = ("Clean", "FGSM", "PGD-20", "PGD-100", "CW", "AA", "SQUARE", "SPSA")  # the paper's


# ----------------------------------------------------------------------------------- the paper's numbers, the checkpoint
# Tables 2 to 8 and 10 (A, B), columns as in COLUMNS; - where the paper has none
PAPER = """
cifar10 resnet18
vanillaAT           85.80 57.87 52.05 49.28 51.08 46.62 55.69 56.17
TRADES              82.46 58.26 54.78 53.45 51.65 49.08 55.64 56.50
MART                81.30 58.06 54.73 53.28 51.86 49.01 55.66 56.15
PMHR-AT             83.12 60.34 56.13 54.45 52.16 49.42 56.54 57.16
vanillaAT + Ours    82.82 59.89 56.36 54.83 51.95 48.32 57.11 60.35
TRADES + Ours       83.93 59.32 56.23 54.98 51.73 48.78 58.46 59.45
MART + Ours         83.33 60.87 57.41 55.81 51.83 48.48 58.54 60.56
LMA-AT(Ours)        83.56 61.19 57.21 55.64 52.30 49.10 59.54 60.44
LMA-AT, tau 0       79.33 - 56.93 55.92 51.97 48.34 - 58.86
LMA-AT, tau 0.1     84.11 - 56.45 54.65 52.62 48.75 - 60.14
LMA-AT, tau 0.7     81.72 - 57.83 56.47 52.49 48.96 - 59.10
LMA-AT, tau 0.9     80.33 - 57.31 56.12 52.28 49.20 - 59.16
Table 10 A          83.88 60.78 56.26 54.79 51.91 48.57 56.83 60.55
Table 10 B          82.60 60.36 56.74 55.08 52.17 48.67 57.69 60.51
cifar10 wrn-34-10
vanillaAT           86.46 61.62 56.75 54.72 55.63 51.06 59.68 60.66
TRADES              84.58 60.60 57.71 56.69 55.01 52.57 59.45 61.09
MART                84.25 62.03 58.29 55.56 54.82 51.40 58.21 59.87
PMHR-AT             84.87 63.05 59.26 57.60 56.36 53.58 59.67 61.18
vanillaAT + Ours    85.96 63.03 59.76 58.31 56.03 52.82 60.02 63.78
TRADES + Ours       85.62 63.22 59.31 58.26 54.87 52.25 58.89 63.95
MART + Ours         84.83 63.66 60.89 59.76 55.56 52.45 59.42 62.65
LMA-AT(Ours)        85.39 64.04 60.62 59.48 56.07 52.61 60.10 64.19
MMA                 86.21 - 57.17 - 57.52 44.57 - 59.87
WAT                 85.16 - 56.69 - 54.06 49.87 - 60.78
MAIL                86.82 - 60.38 - 51.48 47.15 - 59.23
GAIRAT              85.39 - 60.59 - 45.08 42.30 - 52.32
cifar100 resnet18
vanillaAT           56.87 31.21 29.33 28.46 26.33 23.69 30.06 31.63
TRADES              57.16 31.45 30.32 29.48 25.16 25.18 30.46 32.06
MART                54.02 32.81 31.13 30.14 26.98 24.83 31.17 32.45
PMHR-AT             57.55 34.33 32.25 31.35 27.78 25.96 31.32 32.60
vanillaAT + Ours    60.41 33.61 30.83 29.65 28.89 25.14 33.10 34.42
TRADES + Ours       59.23 34.05 31.72 30.98 27.84 25.42 31.66 33.30
MART + Ours         55.55 34.74 32.92 32.29 28.70 26.29 31.49 33.57
LMA-AT(Ours)        58.86 34.79 32.51 31.65 29.04 26.29 33.57 34.07
LMA-AT, tau 0       51.40 - 32.76 32.21 28.43 26.51 - 31.71
LMA-AT, tau 0.1     59.78 - 32.02 31.08 28.91 25.51 - 34.98
LMA-AT, tau 0.7     53.98 - 33.48 32.83 29.31 26.84 - 32.78
LMA-AT, tau 0.9     52.20 - 33.29 32.83 29.19 26.78 - 31.88
tinyimagenet resnet18
TRADES              49.56 - 22.90 - 19.70 16.78 - -
MART                45.94 - 26.02 - 21.87 19.20 - -
TRADES + Ours       50.43 - 24.82 - 20.52 18.15 - -
MART + Ours         46.88 - 26.87 - 22.10 19.84 - -
LMA-AT(Ours)        49.10 - 26.35 - 22.40 18.31 - -
"""


def paper_rows():
    """{(data set, network, method): {column: percent}}."""
    rows = {}
    for line in PAPER.strip().splitlines():
        cells = line.rsplit(maxsplit=len(COLUMNS))
        if len(cells) <= len(COLUMNS):
            dataset, arch = cells
        else:
            rows[dataset, arch, cells[0]] = {c: float(v) for c, v in zip(COLUMNS, cells[1:]) if v != "-"}
    return rows


def paper_method(args):
    """The paper's name for what a checkpoint of ours was trained with; None for a method or setting that has no row."""
    rows = {("at_ours", "ce", 0, None): "vanillaAT", ("trades_ours", "kl", 0, None): "TRADES",
            ("mart_ours", "ce", 0, None): "MART", ("at_ours", "margin+ce", 1, 0.2): "vanillaAT + Ours",
            ("trades_ours", "margin+ce", 1, 0.2): "TRADES + Ours", ("mart_ours", "margin+ce", 1, 0.2): "MART + Ours",
            ("lma_at", "margin+ce", 1, 0.2): "LMA-AT(Ours)", ("at_ours", "ce", 1, 0.2): "Table 10 A",
            ("lma_at", "margin+ce", 0, 0.2): "Table 10 B"}
    rows |= {("lma_at", "margin+ce", 1, tau): f"LMA-AT, tau {tau}" for tau in (0, 0.1, 0.7, 0.9)}
    tau, data, wide = args["tau"] if args["beta"] else None, args["dataset"], args["arch"].startswith("wrn")
    papers = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10, "delta": 0.9, "margin_reduction": "mean",
              "alpha": 2.345 if wide else 6.345 if data == "tinyimagenet" else 5.345, "inv_lambda": 6, "lam": 5,
              "beta": args["beta"] and (96 if data in ("cifar100", "tinyimagenet") else 86)}  # section 5.1
    same = all(args.get(k, v) == v for k, v in papers.items())
    return rows.get((args["method"], args["attack_loss"], args["margin_weight"], tau)) if same else None


def load_checkpoint(path, arch):
    """(network in eval mode, number of classes, the training script's arguments or {}); exits in one line if it cannot.
    Foreign weights may be wrapped (state_dict, model_state_dict, net, model), carry a module. prefix, TRADES' unused
    sub_block1 or the names linear and shortcut of the usual CIFAR ResNet-18."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the unpickler meets in a file of somebody else's
        fail(f"{path}: not loadable as tensors and plain values ({common.brief(error)}); give a checkpoint such as "
             "runs/.../best.pt; nothing else is unpickled, save its state_dict alone")
    args = saved.get("args") if isinstance(saved, dict) else None
    args = args if isinstance(args, dict) and {"method", "margin_reduction", "tau"} <= args.keys() else {}
    arch = arch or args.get("arch") or fail(f"{path}: says not which network it is; give --arch, such as wrn-34-10")
    for key in ("state_dict", "model_state_dict", "net", "model"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    if not isinstance(saved, dict) or not all(isinstance(v, torch.Tensor) for v in saved.values()):
        fail(f"{path}: holds no state_dict (at the top or under state_dict, model_state_dict, net or model)")
    state = {("." + key.removeprefix("module.")).replace(".shortcut.", ".downsample.").replace(".linear.", ".fc.")[1:]: value
             for key, value in saved.items() if not key.removeprefix("module.").startswith("sub_block1.")}
    num_classes = len(state["fc.weight"]) if "fc.weight" in state else 10
    model = common.make_model(arch, num_classes)
    want, have = ({k: v.shape for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
                  for tensors in (model.state_dict(), state))
    wrong = {"missing": want.keys() - have, "not known": have.keys() - want,
             "of another shape": [k for k in want.keys() & have if want[k] != have[k]]}
    wrong = "; ".join(f"{what}: {', '.join(sorted(keys)[:3])} ({len(keys)} in all)" for what, keys in wrong.items() if keys)
    if wrong:
        fail(f"{path} does not fit {arch}: {wrong}; choose another --arch, or rename its keys")
    if not all(v.isfinite().all() for v in state.values()):
        fail(f"{path}: has weights that are not finite; its training diverged")
    model.load_state_dict(state, strict=False)
    return model.eval().requires_grad_(False), num_classes, args


def digest(*tensors):
    return hashlib.sha256(b"".join(t.cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]


class Results:
    """The class predicted on every image under every attack (-1: not computed), saved after each batch.
    A file with other settings (weights, images, epsilon, seed, this program) is set aside, never mixed in.
    Each process of `group` saves its part (.rank1, ...); they are merged when an attack is through, or at the restart."""

    def __init__(self, path, settings, index, label, group=None):
        self.path, self.settings, self.index, self.label, self.group = Path(path), settings, index, label, group
        self.prediction = {name: torch.full_like(label, -1) for name in ATTACKS}
        self.cost, self.summary = {}, {}
        if RANK == 0:
            for file in filter(Path.exists, [self.path, *self.path.parent.glob(f"{self.path.name}.rank*[0-9]")]):
                self.read(file)
            self.finish()
        self.share()

    def finish(self):
        """Process 0 has every result: its file alone is kept."""
        self.save()
        for file in self.path.parent.glob(f"{self.path.name}.rank*[0-9]"):
            file.unlink(missing_ok=True)

    def read(self, file):
        try:
            old = json.loads(file.read_text())
            other = [k for k in old["settings"] if old["settings"][k] != self.settings.get(k)]
            if other:
                aside = f"{file}.{zlib.crc32(json.dumps(old['settings']).encode()):08x}"
                os.replace(file, aside)
                common.say(f"note: {file} was made with other {', '.join(other)}; it is kept as {aside}")
                return
            for name, prediction in old["prediction"].items():
                self.prediction[name] = torch.maximum(self.prediction[name], torch.tensor(prediction))
            for title, cost in old["cost"].items():
                self.add(title, *cost.values())
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            fail(f"{file} is not a result of evaluate.py; move it away or choose another --out")

    def save(self):
        """To a temporary file renamed when whole."""
        path = f"{self.path}.rank{RANK}" if RANK else self.path
        content = self.summary | {"settings": self.settings, "torch": torch.__version__, "index": self.index.tolist(),
            "label": self.label.tolist(), "prediction": {k: p.tolist() for k, p in self.prediction.items() if p.max() >= 0},
            "AA_broken_by": self.broken_by(),
            "cost": {k: dict(zip(("seconds", "forward", "backward"), v)) for k, v in self.cost.items()}}
        Path(f"{path}.tmp").write_text(json.dumps(content))
        os.replace(f"{path}.tmp", path)

    def share(self):
        """Under torchrun: every process gets every result."""
        for prediction in self.prediction.values() if WORLD > 1 else []:
            dist.all_reduce(prediction, dist.ReduceOp.MAX, self.group)

    def add(self, title, *cost):
        self.cost[title] = [a + b for a, b in zip(self.cost.get(title, (0, 0, 0)), cost)]

    def robust(self, *names):
        """[n] bool: classified correctly under each of these attacks; an image is not given to AA's later ones once lost."""
        return torch.stack([self.prediction[name] == self.label for name in names]).all(0)

    def broken_by(self):
        """The first of AA's attacks that broke each image; Clean if it was wrong from the start, None if it stands."""
        first = [None] * len(self.label)
        for name in (*reversed(AA), "Clean"):
            broken = (self.prediction[name] >= 0) & ~self.robust(name)
            first = [name if b else f for b, f in zip(broken.tolist(), first)]
        return first


def verdict(model, x, x_adv, epsilon):
    """The model's own prediction on x_adv [N], which must be in the box (to 1e-6, float32 rounding) and in [0, 1]."""
    assert (x_adv - x).abs().max() <= epsilon + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1, "an attack left its box"
    return forward(model, x_adv).argmax(1)


def run_attack(name, before, title, model, net, images, results, args, device):
    """Attack, a batch at a time, what stood under the attacks `before`; net (folded) is attacked, model decides."""
    attack, passes = ATTACKS[name]
    todo = (results.prediction[name] == -1) & (results.robust(*before) if before else True)
    mine = todo.nonzero()[RANK::WORLD, 0]
    METER.begin(title, len(mine), passes)
    for rows in mine.split(args.batch_size) if len(mine) else []:
        x, y = common.to_float(images[rows].to(device)), results.label[rows].to(device)
        start, forward_before, backward_before = time.time(), METER.forward, METER.backward
        x_adv = attack(net, x, y, args.epsilon, Draws(args.seed, name, results.index[rows].to(device)))
        results.prediction[name][rows] = verdict(model, x, x_adv, args.epsilon).cpu()
        results.add(title, time.time() - start, METER.forward - forward_before, METER.backward - backward_before)
        results.save()
        METER.done += len(rows)
        METER.alive = len(mine) - METER.done + int(results.robust(name)[mine[:METER.done]].sum())
    METER.text = ""
    results.share()


# --------------------------------------------------------------------------------------------------------- the output
def table(rows, columns, paper):
    """Markdown. rows: [(key, path, {column: (percent, +-)})], key: (data set, network, method, ...); below those of one key
    their mean with its 95 % interval (Student's t), the paper's row and the difference."""
    lines = []
    def line(name, cells):
        lines.append(f"| {' | '.join([name, *(cells.get(c, '-') for c in columns)])} |")
    line("Method", {c: c for c in columns})
    lines.append("|---" * (1 + len(columns)) + "|")
    for key in dict.fromkeys(key for key, _, _ in rows):
        same = [(path, cells) for k, path, cells in rows if k == key]
        for path, cells in same:
            line(f"{key[2]} ({path})", {c: f"{v:.2f} ± {e:.2f}" for c, (v, e) in cells.items()})
        if len(same) > 1:
            k, values = len(same), {c: [cells[c][0] for _, cells in same] for c in columns}
            t = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)[k - 2] if k < 11 else 1.96 + 2.6 / (k - 1)
            cells = {c: (statistics.mean(v), t * statistics.stdev(v) / math.sqrt(k)) for c, v in values.items()}
            line(f"{key[2]}, mean of {len(same)}", {c: f"{v:.2f} ± {e:.2f}" for c, (v, e) in cells.items()})
        if theirs := paper.get(key[:3]):
            line(f"paper, {key[2]}", {c: f"{v:.2f}" for c, v in theirs.items()})
            line("difference", {c: f"{cells[c][0] - v:+.2f}" for c, v in theirs.items() if c in cells})
    return "\n".join(lines)


def sceptic(model, net, images, results, points, args, device):
    """Signs that a network hides its gradients instead of resisting (Athalye et al. 2018; AutoAttack's warnings), a line
    each. points: {column: percent}. Attacks of its own look at 200 correctly classified images at most."""
    rows = results.robust("Clean").nonzero()[:200, 0]
    if not len(rows):
        return ["SUSPECT no image is classified correctly: there is nothing to attack"]
    x, y = common.to_float(images[rows].to(device)), results.label[rows].to(device)
    draws, found = Draws(args.seed, "sceptic", results.index[rows].to(device)), []
    slack = max(0.2, 100 / len(results.label)) + 1e-9  # points; among few images, one
    def left(predictions):
        return 100 * (predictions == y).float().mean().item()
    white = {c: points[c] for c in ("PGD-20", "PGD-100", "CW") if c in points}
    black = {c: points[c] for c in ("SQUARE", "SPSA") if c in points}
    if "AA" in points:
        white["APGD and FAB"], black["AA with SQUARE"] = 100 * results.robust(*AA[:3]).float().mean().item(), points["AA"]
    if white and black:
        w, b = min(white, key=white.get), min(black, key=black.get)
        found.append((black[b] >= white[w] - slack,
                      f"black box not stronger than white box: {b} leaves {black[b]:.2f} %, {w} {white[w]:.2f} %"))
    if {"PGD-20", "PGD-100"} <= points.keys():
        found.append((points["PGD-100"] <= points["PGD-20"] + slack, "more steps not weaker: "
                      f"PGD-100 leaves {points['PGD-100']:.2f} %, PGD-20 {points['PGD-20']:.2f} %"))
    huge, (low, high) = 64 / 255, box(x, args.epsilon)
    stand = left(verdict(model, x, pgd(net, x, y, huge, draws, 20, huge / 8), huge))
    found.append((stand <= 5, f"epsilon 64/255 breaks nearly everything: PGD-20 leaves {stand:.1f} % of {len(x)} images"))
    stand = left(forward(model, low + (high - low) * draws.uniform(1, *x.shape[1:])).argmax(1))
    found.append((stand >= 90, f"uniform noise in the box costs little: it leaves {stand:.1f} % of {len(x)} images"))
    logits, _, grad = gradient(net, x, cross_entropy, y)
    zero = int((size(grad) == 0).sum())
    found.append((not zero, f"the gradient of the cross-entropy is not zero: it is for {zero} of {len(x)} images"))
    spread = ((forward(net, x) - logits).abs().max() / logits.abs().max()).item()
    found.append((spread < 1e-4, f"two calls agree: the logits differ by {spread:.1g} of the largest"))
    found.append((logits.min() < 0 or (logits.sum(1) - 1).abs().max() > 1e-4,
                  f"outputs are logits, not probabilities: from {logits.min():.3g} to {logits.max():.3g}"))
    return [f"{'pass   ' if ok else 'SUSPECT'} {text}" for ok, text in found]


def figure1(path, natural, images, results, device):
    """Figure 1: rank, among the wrong classes of a naturally trained network on the clean image, of the class into which
    PGD-20 and CW turn an image; counted in the terminal and drawn as bars. "2nd" is the most probable wrong class."""
    counts = {}
    for name in ("PGD-20", "CW"):
        turned = (results.robust("Clean") & ~results.robust(name)).nonzero()[:, 0]
        x, y = common.to_float(images[turned].to(device)), results.label[turned].to(device)
        logits = forward(natural, x).scatter(1, y[:, None], -torch.inf)
        rank = (logits > logits.gather(1, results.prediction[name][turned].to(device)[:, None])).sum(1)
        bins = min(10, logits.shape[1] - 1)  # the tenth holds all later ranks
        counts[name] = rank.clamp(max=bins - 1).bincount(minlength=bins).tolist()
    names = ["2nd", "3rd", *(f"{k}th" for k in range(4, 12))][:bins]
    names[-1] += "+" if logits.shape[1] - 1 > bins else ""
    print(f"\n| rank of the wrong class | {' | '.join(names)} |\n{'|---' * (bins + 1)}|")
    for name, row in counts.items():
        print(f"| {name} | {' | '.join(map(str, row))} |")
    picture, peak = Image.new("RGB", (920, 480), "white"), max(1, *map(max, counts.values()))
    draw, font, small = ImageDraw.Draw(picture), ImageFont.load_default(18), ImageFont.load_default(14)
    draw.text((30, 25), "number of adversarial images", "black", font, "lm")
    draw.text((460, 462), "rank of their wrong class on the clean image under natural training", "black", font, "ms")
    for side, (colour, (name, row)) in enumerate(zip(("#1f5fa8", "#e08a1e"), counts.items())):
        draw.rectangle((540 + 180 * side, 16, 558 + 180 * side, 34), colour)
        draw.text((566 + 180 * side, 25), f"{name} ({sum(row)})", "black", font, "lm")
        for k, value in enumerate(row):
            slot = 860 / bins
            x, y = 30 + slot * (k + 0.5) + 0.4 * slot * (side - 1), 400 - 320 * value / peak
            draw.rectangle((x, y, x + 0.4 * slot, 400), colour)
            draw.text((x + 0.2 * slot, y - 2), str(value), "black", small, "mb")
            draw.text((30 + slot * (k + 0.5), 408), names[k], "black", font, "mt")
    picture.save(path, "png")
    print(f"drawn to {path}")


def parse_args():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("checkpoints", nargs="+", help="best.pt or last.pt of a run, or foreign weights; several give mean and interval")
    add("--attacks", nargs="+", default=COLUMNS[1:], choices=COLUMNS, metavar="NAME", help=f"of {' '.join(COLUMNS)}")
    add("--n", type=number(1, kind=int), help="test images: a random subset, the same for every checkpoint (default: all)")
    add("--epsilon", type=number(0, 1), default="8/255", help="radius")
    add("--batch-size", type=number(1, kind=int), help="images attacked together, lost by a kill (512 on CUDA, else 128)")
    add("--dataset", choices=common.DATASETS, help="default: the one the checkpoint was trained on")
    add("--data-dir", help="default: where it was trained from")
    add("--arch", help="default: the checkpoint's; resnet18 or wrn-<depth>-<widen>")
    add("--method", choices=(methods := list(dict.fromkeys(name for _, _, name in paper_rows()))), metavar="NAME",
        help=f"the paper's row to compare with: {'; '.join(methods)}")
    add("--device", default="auto", help="cuda, cpu, ...; auto: cuda if there is one")
    add("--seed", type=number(0, 2 ** 31 - 1, kind=int), default=0, help="of the attacks")
    add("--out", help="default <checkpoint>.eval.json; for one checkpoint only")
    add("--figure1", nargs=2, metavar=("NATURAL_CKPT", "OUT.png"), help="draw Figure 1 for the first checkpoint")
    args = parser.parse_args()
    if args.out and len(args.checkpoints) > 1:
        fail("--out: takes the results of one checkpoint; leave it out to get one file each")
    if args.figure1 and not ({"PGD-20", "CW"} <= set(args.attacks) and Path(args.figure1[1]).parent.is_dir()):
        fail("--figure1: needs PGD-20 and CW among --attacks, and for OUT.png a folder that exists")
    return args


def main():
    args = parse_args()
    device = common.setup(args.device)
    torch.backends.cudnn.benchmark = False  # batches shrink as images fall: a search for each size would cost more
    args.batch_size = args.batch_size or (512 if device.type == "cuda" else 128)
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if WORLD > 1 else None  # all, patient
    columns = [c for c in COLUMNS if c in {"Clean", *args.attacks}]
    program = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    loaded = [(path, *load_checkpoint(path, args.arch)) for path in args.checkpoints]  # refused before hours of work
    natural = load_checkpoint(args.figure1[0], args.arch) if args.figure1 else None
    source, rows, notes = None, [], []
    for path, model, num_classes, trained in loaded:
        dataset = args.dataset or trained.get("dataset") or fail(f"{path}: says not its data set; give --dataset")
        arch = args.arch or trained["arch"]
        method = args.method or (paper_method(trained) if trained else None)
        wanted = dataset, args.data_dir or trained.get("data_dir") or "data"
        if wanted != source:
            data, source = common.load_data(*wanted), wanted
        for file, classes in [(path, num_classes)] + ([(args.figure1[0], natural[1])] if natural else []):
            if classes != data.num_classes:
                fail(f"{file}: has {classes} classes, {dataset} {data.num_classes}; choose another --dataset or checkpoint")
        total = len(data.x_test)
        if (args.n or 0) > total:
            fail(f"--n {args.n}: {dataset} has {total} test images")
        index = torch.randperm(total, generator=torch.Generator().manual_seed(0))[:args.n].sort().values
        images, label = data.x_test[index], data.y_test[index]
        model = model.to(device, memory_format=torch.channels_last)
        net = common.fold_batchnorm(model)
        settings = {"weights": digest(*model.state_dict().values()), "images": digest(index, images, label),
                    "epsilon": args.epsilon, "seed": args.seed, "program": program}
        common.say(f"{path}: {method or 'no row of the paper'}, {arch} on {dataset}, {len(label)} of {total} test images, "
                   f"epsilon {255 * args.epsilon:g}/255, seed {args.seed}")
        if num_classes < 10 and "AA" in columns:
            common.say(f"note: AA has {num_classes - 1} targets instead of 9" + (
                " and z_t - z_y in place of the DLR loss, which needs 4 classes" if num_classes < 4 else ""))
        results, cells = Results(args.out or f"{path}.eval.json", settings, index, label, group), {}
        for column in columns:
            start = time.time()
            for k, name in enumerate(names := AA if column == "AA" else (column,)):
                before = ("Clean", *names[:k]) if name != "Clean" else ()
                run_attack(name, before, column if name == column else f"{column}: {name}", model, net, images, results,
                           args, device)
            p, n = results.robust(*names).float().mean().item(), len(label)
            half = 1.96 / (1 + 1.96 ** 2 / n) * math.sqrt(p * (1 - p) / n + (1.96 / n) ** 2 / 4)  # Wilson's interval
            cells[column] = 100 * p, 100 * half
            if RANK == 0:
                print("\r\033[K" * sys.stderr.isatty() + f"{column:8} {100 * p:6.2f} ± {100 * half:.2f} %  "
                      f"({time.time() - start:.1f} s)", file=sys.stderr, flush=True)
        alike = args.method or path  # a mean is of foreign weights of one method, or of runs that differ in the seed alone
        if trained:
            varies = ("seed", "run_dir", "data_dir", "device", "resume")
            alike = Path(path).name, str({k: v for k, v in trained.items() if k not in varies})
        rows.append(((dataset, arch, method or trained.get("method", "?"), settings["images"], alike), path, cells))
        if RANK == 0:
            points = {c: v for c, (v, _) in cells.items()}
            checks = sceptic(model, net, images, results, points, args, device)
            results.summary = {"accuracy": points, "checks": checks}
            results.finish()
            notes += [f"\n{path}", *checks]
            if natural and path == args.checkpoints[0]:
                figure1(args.figure1[1], natural[0].to(device), images, results, device)
    common.say("\n" + table(rows, columns, paper_rows() if abs(args.epsilon - 8 / 255) < 1e-6 else {}))
    common.say("\n±: half the 95 % interval, Wilson's of a checkpoint, Student's of a mean\n" + "\n".join(notes))


if __name__ == "__main__":
    common.run(main)
