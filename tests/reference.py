"""The paper's formulas once more, in float64 NumPy: what the tests compare the program with.

Written from the paper alone. Every function takes arrays or tensors: logits [N, C], labels [N].
The weights of the objectives have the names of the scripts' options, so **vars(args) is accepted.
"""

import math

import numpy as np


def array(values):
    """float64 NumPy of an array or a tensor."""
    return np.asarray(values.detach() if hasattr(values, "detach") else values, np.float64)


def of_class(values, y):
    """values[i, y[i]]."""
    return values[np.arange(len(y)), np.asarray(y)]


def log_sum_exp(z):
    top = z.max(1, keepdims=True)
    return top[:, 0] + np.log(np.exp(z - top).sum(1))


def log_softmax(logits):  # section 3
    z = array(logits)
    return z - log_sum_exp(z)[:, None]


# ------------------------------------------------ losses: the mean over the images
def margin_loss(logits, y, delta, reduction="mean"):
    """Eq. 13: sum_{j != y} max(0, f_j - f_y + delta)^2; "mean" divides it by C."""
    z, images = array(logits), np.arange(len(y))
    violations = np.maximum(0, z - z[images, np.asarray(y)][:, None] + delta) ** 2
    violations[images, np.asarray(y)] = 0  # j != y
    return violations.sum(1).mean() / {"sum": 1, "mean": z.shape[1]}[reduction]


def cross_entropy(logits, y):
    """Eq. 8: -log p_y."""
    return -of_class(log_softmax(logits), y).mean()


def boosted_cross_entropy(logits, y):
    """Eq. 7: -log p_y - log(1 - max_{k != y} p_k). 1 - p_k is the sum of the other classes."""
    z, images = array(logits), np.arange(len(y))
    others, rest = z.copy(), z.copy()
    others[images, np.asarray(y)] = -np.inf
    rest[images, others.argmax(1)] = -np.inf
    return cross_entropy(z, y) + (log_sum_exp(z) - log_sum_exp(rest)).mean()


def kl_of_images(logits_nat, logits_adv):
    log_p, log_q = log_softmax(logits_nat), log_softmax(logits_adv)
    return (np.exp(log_p) * (log_p - log_q)).sum(1)


def kl(logits_nat, logits_adv):
    """KL(p(x) || p(x')) (eq. 16)."""
    return kl_of_images(logits_nat, logits_adv).mean()


def weighted_kl(logits_nat, logits_adv, y):
    """KL(p(x) || p(x')) (1 - p_y(x)) (Table 1, MART)."""
    p_y = np.exp(of_class(log_softmax(logits_nat), y))
    return (kl_of_images(logits_nat, logits_adv) * (1 - p_y)).mean()


def mhuber(u, v, alpha):
    """Section 3: mean(H)."""
    d = array(u) - array(v)
    c = abs(d) / alpha <= math.pi / 2
    a = alpha**2 * (1 - np.cos(d / alpha))
    b = alpha * abs(d) + (1 - math.pi / 2) * alpha**2
    return np.where(c, a, b).mean()


# ------------------------------------------------ what a step minimises, what its attack maximises
def ema(past, logits, tau):
    """Section 4.3: logit_t = tau logit_{t-1} + (1 - tau) logit."""
    return tau * array(past) + (1 - tau) * array(logits)


def terms(method, logits_adv, logits_nat, y, ema_adv, ema_nat, *, delta=0.9, alpha=5.345, **rest):
    """The terms of a row of Table 1 without their weights, by the names of metrics.csv."""
    values = {"L'": margin_loss(logits_adv, y, delta, rest.get("margin_reduction", "mean"))}
    if method == "at_ours":
        values["CE"] = cross_entropy(logits_adv, y)
    elif method == "trades_ours":
        values["CE"] = cross_entropy(logits_nat, y)
        values["KL"] = kl(logits_nat, logits_adv)
    elif method == "mart_ours":
        values["BCE"] = boosted_cross_entropy(logits_adv, y)
        values["KL"] = weighted_kl(logits_nat, logits_adv, y)
    else:
        assert method == "lma_at"
        values["BCE"] = boosted_cross_entropy(logits_adv, y)
    values["mHuber"] = mhuber(ema_adv, ema_nat, alpha)
    return values


def objective(method, logits_adv, logits_nat, y, ema_adv, ema_nat, **weights):
    """A row of Table 1: lma_at (eq. 18), at_ours (eq. 15), trades_ours (eq. 17) or mart_ours."""
    of_terms = {"L'": weights.get("margin_weight", 1.0), "mHuber": weights.get("beta", 86.0)}
    of_terms["KL"] = {
        "trades_ours": weights.get("inv_lambda", 6.0),
        "mart_ours": weights.get("lam", 5.0),
    }.get(method)
    values = terms(method, logits_adv, logits_nat, y, ema_adv, ema_nat, **weights)
    return sum(of_terms.get(name, 1.0) * value for name, value in values.items())


def attack_objective(attack_loss, logits_adv, y, logits_nat=None, *, delta=0.9, **rest):
    """What PGD maximises: "margin+ce" (section 4.4), "ce", or "kl" (TRADES alone)."""
    if attack_loss == "kl":
        return kl(logits_nat, logits_adv)
    margin = margin_loss(logits_adv, y, delta, rest.get("margin_reduction", "mean"))
    return cross_entropy(logits_adv, y) + (margin if attack_loss == "margin+ce" else 0)


# ------------------------------------------------ gradients
def gradient(function, values, h=1e-4):
    """The gradient of function(values) by central differences, right to about 1e-8."""
    values = array(values).copy()
    slopes = np.empty_like(values)
    for i in np.ndindex(values.shape):
        kept = values[i]
        values[i] = kept + h
        ahead = function(values)
        values[i] = kept - h
        slopes[i] = (ahead - function(values)) / (2 * h)
        values[i] = kept
    return slopes


def objective_gradients(method, logits_adv, logits_nat, y, past_adv, past_nat, tau, **weights):
    """d objective / d f(x') and / d f(x), through the moving averages, whose past is constant."""

    def loss(adv, nat):
        averages = ema(past_adv, adv, tau), ema(past_nat, nat, tau)
        return objective(method, adv, nat, y, *averages, **weights)

    adv, nat = array(logits_adv), array(logits_nat)
    return gradient(lambda z: loss(z, nat), adv), gradient(lambda z: loss(adv, z), nat)


def signed_step(x_adv, x, slope, step_size, epsilon):
    """Eq. 2: a step of PGD, projected into the box of radius epsilon and into [0, 1]."""
    x_adv, x = array(x_adv), array(x)
    ahead = x_adv + step_size * np.sign(array(slope))
    return np.clip(np.clip(ahead, x - epsilon, x + epsilon), 0, 1)


def learning_rate(epoch, epochs, lr):
    """Section 5.1: divided by ten at the 75th of 130 epochs, and again at the 90th."""
    passed = sum(130 * (epoch - 1) >= epochs * drop for drop in (74, 89))
    return lr / 10**passed


# ------------------------------------------------ parts of attacks, on one flat image
def plane_step(x, w, b):
    """The smallest step from x to the plane w . z + b = 0 inside [0, 1], measured by its largest
    pixel (Croce & Hein 2020a, section 3).

    Every pixel moves by the same t, unless it stops at 0 or 1 before. Between two stops w . z is
    linear in t, so the stops are sorted. Out of reach of the plane every pixel stops.
    """
    gap = -(w @ x + b)
    direction = np.sign(w) * np.sign(gap)
    room = np.where(direction > 0, 1 - x, x)
    order = np.argsort(room)
    stops, weights = room[order], np.abs(w[order])
    later = weights[::-1].cumsum()[::-1] - weights  # the weights of the pixels that stop later
    change = (weights * stops).cumsum() + later * stops
    i = np.searchsorted(change, abs(gap))
    if i == len(change):
        return direction * room
    return direction * np.minimum(room, stops[i] - (change[i] - abs(gap)) / (later + weights)[i])


def square_side(k, h, w):
    """The side of Square's query k (Andriushchenko et al. 2020, section 5): of 0.8 of the area,
    which is halved after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 queries."""
    halvings = np.searchsorted([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000], k)
    return int(np.clip(np.round(np.sqrt(0.8 / 2**halvings * h * w)), 1, min(h, w)))
