"""Robust accuracy of a checkpoint under the attacks of section 5.2, as a row of Table 4, and whether to believe it.

    python evaluate.py runs/cifar10-resnet18-lma_at-seed0/best.pt
    python evaluate.py runs/cifar10-resnet18-lma_at-seed*/best.pt --attacks PGD-20 CW AA --n 1000
    python evaluate.py trades.pt --dataset cifar10 --arch wrn-34-10 --method TRADES      # somebody else's weights
    torchrun --nproc-per-node=4 evaluate.py ...                                          # each process a part of the images

The table (Markdown) and the sceptic's checks go to stdout, progress to stderr, everything else (per image, per attack)
to <checkpoint>.eval.json, which is also what an interrupted evaluation continues from.

Every attack is a function attack(model, x, y, epsilon, draws) -> x_adv of the same shape: model maps images
[N, 3, H, W] in [0, 1] to logits [N, C], is in eval mode and its parameters need no gradients; x is classified correctly
as y [N]; epsilon is the L-infinity radius in the unit of the images; draws are the random numbers. An image leaves the
batch at its first misclassified iterate (worst iterate counts), so no pass is spent on it afterwards, and what happens
to it depends on that image, the model and the seed alone, not on its neighbours in the batch.
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


# ------------------------------------------------------------------------------------------------------- random numbers

def scramble(z):
    """Finaliser of SplitMix64 (Steele et al. 2014) on int64: every bit of the input moves every bit of the output."""
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47  # the masks make >> of a signed number a logical shift
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
    return z ^ (z >> 31 & (1 << 33) - 1)


class Draws:
    """Random numbers that depend on (seed, attack, image, k) and on nothing else: a hash instead of a generator's state.

    So an image sees the same numbers in whatever batch it is. k numbers the draw within the attack.
    """

    def __init__(self, seed, attack, index):
        self.keys = scramble(scramble(index + (seed << 32)) + zlib.crc32(attack.encode()))

    def select(self, rows):
        new = object.__new__(Draws)
        new.keys = self.keys[rows]
        return new

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
        table = (torch.arange(256, device=self.keys.device)[:, None] >> torch.arange(8, device=self.keys.device) & 1) * 2.0 - 1
        octets = self.bits(k, -(-size // 64)).view(torch.uint8).long()
        return table[octets].flatten(1)[:, :size].view(-1, *shape)


# ------------------------------------------------------------------------------------- what every attack is made from

class Meter:
    """Counts the images sent through the network and back, and shows how far the attack is if stderr is a terminal."""

    def __init__(self):
        self.forward = self.backward = 0
        self.begin("", 0, 0)

    def begin(self, text, images, passes):
        """text: the attack; images still to attack; passes: forward + backward for one that survives."""
        self.text, self.images, self.alive, self.done, self.passes = text, images, images, 0, passes
        self.start = self.shown = time.time()
        self.before = self.forward + self.backward

    def count(self, forward, backward=0):
        self.forward += forward
        self.backward += backward
        now, made = time.time(), self.forward + self.backward - self.before
        if self.text and RANK == 0 and now > self.shown + 0.5 and sys.stderr.isatty():
            left = (now - self.start) * max(0, self.alive * self.passes / max(made, 1) - 1)
            print(f"\r\033[K{self.text}: {self.done}/{self.images} images done, {self.alive} not fooled, "
                  f"at most {common.clock(left)} left in it", end="", file=sys.stderr, flush=True)
            self.shown = now


METER = Meter()


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
    return [torch.cat(column) for column in zip(*rows)]


def settle(fooled, x_adv, left, z, *state):
    """Write the iterates z of fooled images into x_adv, of which they are the rows `left`; return the state of the others."""
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


def column(v):
    """[N] to [N, 1, 1, 1]."""
    return v.view(-1, 1, 1, 1)


def cross_entropy(logits, y):
    return F.cross_entropy(logits, y, reduction="none")


def lead(logits, y):
    """z_y - max_{j != y} z_j: negative where misclassified."""
    return pick(logits, y) - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def pick(logits, y):
    return logits.gather(1, y[:, None])[:, 0]


def cw_loss(logits, y):
    """The CW loss in PGD's place for cross-entropy, confidence K = 50 (section 5.2; Carlini & Wagner 2017)."""
    return -(lead(logits, y) + 50).clamp(min=0)


def target_lead(logits, y, target):
    """z_t - z_y."""
    return pick(logits, target) - pick(logits, y)


def dlr_targeted(logits, y, target):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2): Croce & Hein 2020b, eq. 7; does not change when logits are scaled."""
    top = logits.topk(4).values
    return target_lead(logits, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


# -------------------------------------------------------------------------------------------------- white-box attacks

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


def apgd(model, x, y, epsilon, draws, loss=cross_entropy, target=None, k_draw=0, steps=100):
    """Auto-PGD (Croce & Hein 2020b, Algorithm 1): PGD with momentum whose step size each image finds for itself.

    Maximises loss(logits, y) or loss(logits, y, target) with target [N].
    """
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
        best, best_grad = (torch.where(column(better), new, old) for new, old in ((z, best), (grad, best_grad)))
        best_value = torch.maximum(value, best_value)
        if k in ends:  # halve the step and go back to the best point where the loss has stopped to rise
            stuck = (rises <= 0.75 * ends[k]) | ~halved & (best_value <= checked)
            step = torch.where(column(stuck), step / 2, step)
            z, grad = torch.where(column(stuck), best, z), torch.where(column(stuck), best_grad, grad)
            rises, halved, checked = torch.zeros_like(rises), stuck, best_value
        ahead = (z + step * grad.sign()).clamp(low, high)
        a = 0.75 if k else 1.0
        z, z_prev = (z + a * (ahead - z) + (1 - a) * (z - z_prev)).clamp(low, high), z
    left, z, best = settle(forward(model, z).argmax(1) != labels[0], x_adv, left, z, best)
    x_adv[left] = best
    return x_adv


def each_target(attack, model, x, y, epsilon, draws):
    """attack(model, x, y, epsilon, draws, target, r) for the 9 wrong classes of largest clean logit (all, if fewer)."""
    ranked = forward(model, x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1][:, :9]
    x_adv, left = x.clone(), torch.arange(len(x), device=x.device)
    for r in range(ranked.shape[1]):
        if not len(left):
            break
        z = attack(model, x[left], y[left], epsilon, draws.select(left), ranked[left, r], r)
        fooled = forward(model, z).argmax(1) != y[left]
        x_adv[left[fooled]] = z[fooled]
        left = left[~fooled]
    return x_adv


def apgd_t(model, x, y, epsilon, draws):
    """APGD on the targeted DLR loss. Below 4 classes that has no denominator: z_t - z_y takes its place."""
    def attack(model, x, y, epsilon, draws, target, r):
        loss = dlr_targeted if forward(model, x[:1]).shape[1] >= 4 else target_lead
        return apgd(model, x, y, epsilon, draws, loss, target, r)
    return each_target(attack, model, x, y, epsilon, draws)


def to_hyperplane(x, w, gap):
    """The smallest d (L-infinity) with w . d = gap [N, 1, 1, 1] and x + d in [0, 1]; where none reaches it, the farthest.

    Every pixel moves by t unless its room ends first; t solves sum |w| min(t, room) = gap, which is concave and piecewise
    linear in t, so that Newton's steps from t = 0 end on the exact solution (Croce & Hein 2020a, section 3, sort instead).
    """
    direction, weight, gap = w.sign() * gap.sign(), w.abs(), gap.abs()
    room = torch.where(direction > 0, 1 - x, x)
    t = torch.zeros_like(gap)
    while True:
        covered = (weight * torch.minimum(room, t)).sum((1, 2, 3), keepdim=True)
        slope = (weight * (room > t)).sum((1, 2, 3), keepdim=True)
        t, before = (t + (gap - covered) / slope.clamp(min=1e-30)).clamp(max=1), t  # no room is larger than 1
        if (t <= before * (1 + 1e-6)).all():
            return direction * torch.minimum(room, t)


def fab(model, x, y, epsilon, draws, target, r, steps=100):
    """Fast adaptive boundary attack (Croce & Hein 2020a) towards one class: walk along the boundary between y and target.

    The original keeps the nearest misclassified point; only whether it is within epsilon matters here, so an image leaves
    with the first that is.
    """
    x_adv, left = x.clone(), torch.arange(len(x), device=x.device)
    z = x
    for _ in range(steps):
        _, f, w = gradient(model, z, target_lead, y, target)
        gap = -column(f)
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
        z = torch.where(column(over), x + 0.9 * (z - x), z)
    return x_adv


def fab_t(model, x, y, epsilon, draws):
    """FAB towards each of the 9 targets."""
    return each_target(fab, model, x, y, epsilon, draws)


# -------------------------------------------------------------------------------------------------- black-box attacks

def square(model, x, y, epsilon, draws, queries=5000):
    """Square Attack (Andriushchenko et al. 2020), L-infinity: random squares, kept where they lower z_y - max z_j."""
    (low, high), (_, c, h, w) = box(x, epsilon), x.shape
    x_adv, left = x.clone(), torch.arange(len(x), device=x.device)
    rows, columns = torch.arange(h, device=x.device).view(1, 1, h, 1), torch.arange(w, device=x.device).view(1, 1, 1, w)
    z = torch.where(draws.uniform(0, c, 1, w) < 0.5, low, high)  # vertical stripes
    value = lead(forward(model, z), y)
    for k in range(queries):
        left, z, y, low, high, value, keys = settle(value < 0, x_adv, left, z, y, low, high, value, draws.keys)
        ...
    return x_adv
