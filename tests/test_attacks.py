"""The attacks of evaluate.py against independent implementations in float64 NumPy.

Each numpy_* function is written from the attack's paper and treats one image, as a flat array of
pixels. Both sides get the same random numbers and the same network, whose boundaries are curved,
and have to agree on every point that the attack visits.
"""

import math
from itertools import zip_longest

import numpy as np
import pytest
import torch
import torch.nn as nn

import evaluate
from evaluate import ATTACKS

SHAPE, PIXELS = (3, 4, 5), 60


@pytest.fixture(autouse=True)
def float64():
    """Images, random numbers and networks are in float64, so that nothing hangs on rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def generators(n):
    """The same n generators in every call: one side uses the first n, the other side the second."""
    return evaluate.generators_of(0, "test", torch.arange(n), "cpu")


def agree(found, expected):
    """Both are lists of flat images, of the same length, and equal up to rounding."""
    np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=0, atol=1e-9)


def in_turn(paths):
    """The points of all images in the order in which an attack on the batch visits them.

    These are the first point of every image, then the second point of every image, and so on. An
    image whose path has ended is left out.
    """
    return [point for points in zip_longest(*paths) for point in points if point is not None]


class Waves(nn.Module):
    """A network whose logits are sums of sine waves, one wave for each class and pixel.

    Every boundary between two of its classes is curved. The first pixel has no waves. It tells
    whether the logit of class 2 or of class 3 is raised by `lift`, so that attacks on this class
    take many steps. The network notes the points that it is asked about.
    """

    def __init__(self, frequency, lift, classes=5, height=1.0):
        super().__init__()
        random = np.random.RandomState(0)  # numpy promises that its numbers never change
        self.height = height * random.normal(size=(classes, PIXELS))
        self.height[:, 0] = 0
        self.frequency = frequency * random.uniform(0.3, 1, (classes, PIXELS))
        self.phase = random.uniform(0, 2 * np.pi, (classes, PIXELS))
        self.lifts = height * lift * np.eye(classes)[2:4]
        self.seen = []

    def logits(self, z):
        waves = self.height * np.sin(self.frequency * z + self.phase)
        return waves.sum(1) + self.lifts[int(z[0] > 0.5)]

    def jacobian(self, z):
        return self.height * self.frequency * np.cos(self.frequency * z + self.phase)

    def forward(self, images):
        pixels = images.flatten(1)
        self.seen += list(pixels.detach().clone().numpy())
        height, frequency, phase = map(torch.tensor, (self.height, self.frequency, self.phase))
        waves = height * torch.sin(frequency * pixels[:, None] + phase)
        return waves.sum(2) + torch.tensor(self.lifts)[(pixels[:, 0] > 0.5).long()]


def images(n, network):
    """Random images, some pixels of which are exactly 0 or 1, as the first is. The labels are the
    network's own predictions.

    They come as tensors x and y for evaluate.py, and as pairs of a flat array and an int for NumPy.
    """
    pixels = np.random.RandomState(1).uniform(-0.1, 1.1, (n, PIXELS)).clip(0, 1)
    pixels[:, 0] = np.arange(n) % 2
    labels = [int(network.logits(z).argmax()) for z in pixels]
    return torch.tensor(pixels).view(n, *SHAPE), torch.tensor(labels), list(zip(pixels, labels))


def flat(x):
    """A tensor of images as a list of flat arrays."""
    return list(x.flatten(1).numpy())


# ------------------------------ losses
# Each returns its value and its gradient with respect to the pixels. jacobian holds the gradient of
# each logit in a row.
def numpy_cross_entropy(logits, jacobian, y):
    """-log softmax(z)_y."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return -np.log(p[y]), (p - np.eye(len(p))[y]) @ jacobian


def numpy_cw(logits, jacobian, y):
    """-max(z_y - max_{j != y} z_j + 50, 0)."""
    other = max((j for j in range(len(logits)) if j != y), key=logits.__getitem__)
    margin = logits[y] - logits[other]
    return -max(margin + 50, 0), (margin > -50) * (jacobian[other] - jacobian[y])


def numpy_target_margin(logits, jacobian, y, target):
    """z_t - z_y."""
    return logits[target] - logits[y], jacobian[target] - jacobian[y]


def numpy_dlr_targeted(logits, jacobian, y, target):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), its gradient by the quotient rule."""
    first, _, third, fourth = np.argsort(-logits)[:4]
    top, top_gradient = numpy_target_margin(logits, jacobian, y, target)
    bottom = logits[first] - (logits[third] + logits[fourth]) / 2
    bottom_gradient = jacobian[first] - (jacobian[third] + jacobian[fourth]) / 2
    return top / bottom, (top_gradient * bottom - top * bottom_gradient) / bottom**2


def test_losses():
    """CW's loss with confidence 50 and the targeted DLR loss have the values and gradients of their
    formulas. CW's margin is above -50 for some logits and below for others."""
    logits = torch.tensor(np.random.RandomState(0).normal(0, 50, (40, 6))).requires_grad_()
    y, target = torch.arange(40) % 6, (torch.arange(40) + 2) % 6
    cw = [numpy_cw(z, np.eye(6), i) for z, i in zip(logits.detach().numpy(), y)]
    dlr = [
        numpy_dlr_targeted(z, np.eye(6), i, t)
        for z, i, t in zip(logits.detach().numpy(), y, target)
    ]
    found_cw = evaluate.cw_loss(logits, y)
    found_dlr = evaluate.dlr_targeted(logits, y, target)
    for found, expected in ((found_cw, cw), (found_dlr, dlr)):
        values, gradients = zip(*expected)
        agree(found.detach(), values)
        agree(torch.autograd.grad(found.sum(), logits)[0], gradients)
    assert 5 < (found_cw == 0).sum() < 35


# ------------------------------ FGSM and PGD
def numpy_pgd(network, loss, x, y, start, epsilon, steps, step_size):
    """The iterates: signed gradient steps, each clipped to the box, up to the first iterate that is
    misclassified."""
    low, high = np.maximum(x - epsilon, 0), np.minimum(x + epsilon, 1)
    path = [np.clip(start, low, high)]
    while len(path) <= steps and network.logits(path[-1]).argmax() == y:
        _, gradient = loss(network.logits(path[-1]), network.jacobian(path[-1]), y)
        path.append(np.clip(path[-1] + step_size * np.sign(gradient), low, high))
    return path


def test_fgsm():
    """FGSM is one step of size epsilon from the image itself."""
    network = Waves(frequency=30, lift=50)
    x, y, pairs = images(8, network)
    expected = [
        numpy_pgd(network, numpy_cross_entropy, image, label, image, 0.1, 1, 0.1)[-1]
        for image, label in pairs
    ]
    agree(flat(evaluate.fgsm(network, x, y, 0.1, generators(8))), expected)


@pytest.mark.parametrize(
    "name, loss, steps",
    [
        ("PGD-20", numpy_cross_entropy, 20),
        ("PGD-100", numpy_cross_entropy, 100),
        ("CW", numpy_cw, 20),
    ],
)
def test_pgd(name, loss, steps):
    """PGD starts uniformly in the box and takes 20 or 100 steps of 1/255. CW is PGD on CW's loss.
    An image keeps its first misclassified iterate. The network does not see the last iterate."""
    network = Waves(frequency=30, lift=50)
    x, y, pairs = images(8, network)
    starts = x + 0.1 * (2 * evaluate.uniform(x, generators(8), *SHAPE) - 1)
    paths = [
        numpy_pgd(network, loss, image, label, start, 0.1, steps, 1 / 255)
        for (image, label), start in zip(pairs, flat(starts))
    ]
    result = ATTACKS[name](network, x, y, 0.1, generators(8))
    agree(network.seen, in_turn(path[:steps] for path in paths))
    agree(flat(result), [path[-1] for path in paths])
    lengths = [len(path) for path in paths]
    assert 1 < min(lengths) < max(lengths) == steps + 1, lengths


# ------------------------------ Auto-PGD
def numpy_apgd(look, x, epsilon, start, steps=100):
    """Auto-PGD (Croce & Hein 2020b, Algorithm 1). look(z, k) returns the loss in iteration k, its
    gradient, and whether z is misclassified.

    Returns the points at which it looks, up to the first misclassified one, and the result.
    """
    low, high = np.maximum(x - epsilon, 0), np.minimum(x + epsilon, 1)
    checkpoints, fractions = [0], [0, 0.22]
    while fractions[-1] < 1:
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06))
    checkpoints = [math.ceil(p * steps - 1e-9) for p in fractions if p <= 1]
    z = z_prev = np.clip(start, low, high)
    step, losses, best, best_loss, best_grad = 2 * epsilon, [], z, -np.inf, None
    halved, at_check, points = True, -np.inf, []
    for k in range(steps):
        loss, grad, fooled = look(z, k)
        points.append(z)
        if fooled:
            return points, z
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
    return points + [z], z if look(z, steps)[2] else best


def apgd_starts(x, epsilon, own):
    """A random point of the box's surface for each image (before it is clipped to [0, 1])."""
    t = 2 * evaluate.uniform(x, own, *SHAPE) - 1
    return flat(x + epsilon * t / t.abs().amax((1, 2, 3), keepdim=True))


@pytest.mark.parametrize(
    "period, growth, steps",
    [(1, 0, 100), (10, 0, 100), (5, 0.01, 100), (4, 0.01, 100), (1, 0, 50)],
)
def test_apgd_on_a_maximum_inside_the_box(period, growth, steps):
    """APGD-CE visits the points of the NumPy version and returns the best of them.

    It starts on the box's surface with a step of 2 epsilon and momentum 0.75. At its checkpoints
    22, 41, 57, 70, 80, 87, 93 and 99 of 100 steps, in proportion of 50 steps, it may halve the
    step and go back to the best point.

    The logits are quadratic in the image, so the maximum lies inside the box. They also drift.
    With a period of 10 the loss rises in nine of ten iterations and gains nothing in the end. With
    the other periods it gains a little. It rises in 4 of 5 iterations, which never halves the step,
    or in 3 of 4, which does.
    """
    random, n = np.random.RandomState(0), 4
    x = random.uniform(0.1, 0.9, (n, PIXELS))
    centres = random.uniform(0.2, 0.8, (3, PIXELS))
    scales = random.uniform(0.5, 0.9, (3, PIXELS))
    centres[1:] = x[:2] + random.uniform(-0.05, 0.05, (2, PIXELS))
    first, offset = np.array([1.0, 0, 0]), np.array([12.0, 0, 0])  # always classified as 0

    def drift(k):
        return offset - (0.3 * (k % period) + growth * k) * first

    def look(z, k):
        logits = drift(k) - (scales * (z - centres) ** 2).sum(1)
        return *numpy_cross_entropy(logits, -2 * scales * (z - centres), 0), False

    class Quadratic(nn.Module):
        def forward(self, z):
            constant = torch.tensor(drift(len(passes)))
            passes.append(flat(z.detach().clone()))
            d = z.flatten(1)[:, None] - torch.tensor(centres)
            return constant - (torch.tensor(scales) * d**2).sum(2)

    passes, pixels = [], torch.tensor(x).view(n, *SHAPE)
    y = torch.zeros(n, dtype=torch.long)
    result = ATTACKS["APGD-CE"](Quadratic(), pixels, y, 0.1, generators(n), steps=steps)
    starts = apgd_starts(pixels, 0.1, generators(n))
    outcomes = [numpy_apgd(look, image, 0.1, start, steps) for image, start in zip(x, starts)]
    paths, results = zip(*outcomes)
    agree(sum(passes, []), in_turn(paths))
    agree(flat(result), results)
    moves = np.abs(np.diff(paths, axis=1)).max(2)
    late = 9 * steps // 10
    halved = moves[:, late:].max(1) < 0.25 * moves[:, 1 : steps // 5].max(1)
    assert halved.all() if period != 5 else not halved.any()


def numpy_apgd_towards(network, x, y, target, epsilon, start):
    """APGD on the targeted DLR loss of one target, as in APGD-T."""

    def look(z, k):
        logits = network.logits(z)
        loss, gradient = numpy_dlr_targeted(logits, network.jacobian(z), y, target)
        return loss, gradient, logits.argmax() != y

    return numpy_apgd(look, x, epsilon, start)


def test_apgd_towards_a_target():
    """APGD on the targeted DLR loss visits the points of the NumPy version. It returns the first
    misclassified one, or the one of largest loss if there is none."""
    network = Waves(frequency=30, lift=40)
    x, y, pairs = images(8, network)
    target = (y + 1 + torch.arange(8) % 4) % 5
    starts = apgd_starts(x, 0.1, generators(8))
    outcomes = [
        numpy_apgd_towards(network, image, label, t, 0.1, start)
        for (image, label), t, start in zip(pairs, target.tolist(), starts)
    ]
    paths, results = zip(*outcomes)
    result = evaluate.apgd(
        network, x, y, 0.1, generators(8), target=target, loss=evaluate.dlr_targeted
    )
    agree(network.seen, in_turn(paths))
    agree(flat(result), results)
    lengths = [len(path) for path in paths]
    assert 1 < min(lengths) < max(lengths) == 101, lengths


# ------------------------------ FAB
def numpy_projection(x, w, b):
    """The smallest step from x to the plane w . z + b = 0 inside [0, 1], measured by its largest
    pixel (Croce & Hein 2020a, section 3).

    Every pixel moves by the same t, unless it stops at 0 or 1 before. Between two stops w . z is
    linear in t, so the stops are sorted to find the interval in which the plane is reached. Where
    the plane is out of reach, every pixel moves until it stops.
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
    t = stops[i] - (change[i] - abs(gap)) / (later[i] + weights[i])
    return direction * np.minimum(room, t)


def numpy_fab(network, x, y, target, epsilon, steps=100):
    """FAB towards one target (Croce & Hein 2020a, Algorithm 1): alpha_max 0.1, eta 1.05, beta 0.9.

    Returns the points that the network is asked about, and the result. This is the first point that
    is misclassified and within epsilon, where the attack ends, or x if there is none.
    """
    z, points = x, []
    for _ in range(steps):
        value, w = numpy_target_margin(network.logits(z), network.jacobian(z), y, target)
        b = value - w @ z  # the target's margin is about w . u + b in a point u near z
        step_z, step_x = numpy_projection(z, w, b), numpy_projection(x, w, b)
        norm_z, norm_x = np.abs(step_z).max(), np.abs(step_x).max()
        alpha = min(norm_z / (norm_z + norm_x), 0.1)
        new = np.clip((1 - alpha) * (z + 1.05 * step_z) + alpha * (x + 1.05 * step_x), 0, 1)
        points += [z, new]
        fooled = network.logits(new).argmax() != y
        if fooled and np.abs(new - x).max() <= epsilon:
            return points, new
        z = x + 0.9 * (new - x) if fooled else new
    return points, x


def test_projection():
    """to_hyperplane takes the smallest step to a plane on either side, and goes as far as it can
    where the plane is out of reach. Pixels without weight stay."""
    random, n = np.random.RandomState(0), 1000
    x = random.uniform(-0.1, 1.1, (n, PIXELS)).clip(0, 1)
    scale = 10 ** random.uniform(-3, 1, n)
    w = scale[:, None] * random.normal(size=(n, PIXELS)) * (random.uniform(size=(n, PIXELS)) < 0.9)
    gap = scale * np.linspace(-30, 30, n)
    expected = [numpy_projection(x[i], w[i], -w[i] @ x[i] - gap[i]) for i in range(n)]
    found = evaluate.to_hyperplane(
        torch.tensor(x).view(n, *SHAPE),
        torch.tensor(w).view(n, *SHAPE),
        torch.tensor(gap).view(n, 1, 1, 1),
    )
    agree(flat(found), expected)
    reached = np.abs((w * expected).sum(1) - gap) < 1e-9
    assert 500 < reached.sum() < 950


@pytest.mark.parametrize("frequency, lift, epsilon", [(20, 40, 0.09), (8, 10, 0.05)])
def test_fab(frequency, lift, epsilon):
    """FAB visits the points of the NumPy version and ends at the first that is misclassified and
    within epsilon. Otherwise it returns the image itself after 100 steps.

    The points show the projections from the iterate and from the image, the bound 0.1 on the weight
    of the second, the overshoot 1.05, and the return to 0.9 of the way after a misclassified point.
    In the second case this point may belong to a class that is not the target.
    """
    network = Waves(frequency, lift)
    x, y, pairs = images(8, network)
    target = (y + 1 + torch.arange(8) % 4) % 5
    outcomes = [
        numpy_fab(network, image, label, t, epsilon)
        for (image, label), t in zip(pairs, target.tolist())
    ]
    paths, results = zip(*outcomes)
    result = evaluate.fab(network, x, y, epsilon, generators(8), target)
    agree(network.seen, in_turn(paths))
    agree(flat(result), results)
    lengths = [len(path) for path in paths]
    assert max(lengths) == 200 and len(set(lengths)) > 2, lengths


@pytest.mark.parametrize(
    "name, epsilon, classes", [("APGD-T", 0.051, 12), ("FAB-T", 0.047, 12), ("FAB-T", 0.045, 5)]
)
def test_targets_in_turn(name, epsilon, classes):
    """APGD-T and FAB-T rank the classes by their logits for the clean image and try the nine first
    wrong ones, or all there are, in this order. APGD-T has a new start for each. After each target
    they look at the results, and an image that is misclassified keeps its result and leaves."""
    network = Waves(frequency=30, lift=40, classes=classes)
    x, y, pairs = images(6, network)
    own, results = generators(6), [image for image, _ in pairs]
    points, standing = list(results), list(range(6))
    for rank in range(1, min(classes, 10)):
        outcomes = []
        for i in standing:
            image, label = pairs[i]
            target = np.argsort(-network.logits(image))[rank]
            if name == "FAB-T":
                outcomes.append(numpy_fab(network, image, label, target, epsilon))
            else:
                (start,) = apgd_starts(x[i : i + 1], epsilon, own[i : i + 1])
                outcomes.append(numpy_apgd_towards(network, image, label, target, epsilon, start))
        points += in_turn(path for path, _ in outcomes) + [z for _, z in outcomes]
        for i, (_, z) in zip(list(standing), outcomes):
            if network.logits(z).argmax() != pairs[i][1]:
                results[i] = z
                standing.remove(i)
    result = ATTACKS[name](network, x, y, epsilon, generators(6))
    agree(network.seen, points)
    agree(flat(result), results)
    assert 0 < len(standing) < 6


# ------------------------------ Square
class Coarse(Waves):
    """Waves rounded to quarters, so that many queries leave the margin as it is. The last term
    keeps any two logits apart."""

    def logits(self, z):
        return np.round(4 * super().logits(z)) / 4 + 0.03 * np.arange(5)

    def forward(self, images):
        return torch.round(4 * super().forward(images)) / 4 + 0.03 * torch.arange(5)


def numpy_margin(network, z, y):
    """z_y - max_{j != y} z_j, which is negative where z is misclassified."""
    logits = network.logits(z)
    return logits[y] - np.delete(logits, y).max()


def numpy_side(k, h, w):
    """The side of query k's square (Andriushchenko et al. 2020, section 5).

    The square has 0.8 of the image's area at first. This is halved after 10, 50, 200, 500, 1000,
    2000, 4000, 6000 and 8000 queries.
    """
    halvings = np.searchsorted([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000], k)
    return int(np.clip(np.round(np.sqrt(0.8 / 2**halvings * h * w)), 1, min(h, w)))


def numpy_square(network, x, y, epsilon, stripes, draws):
    """Square Attack (Andriushchenko et al. 2020, Algorithms 1 and 2).

    All random numbers are in [0, 1): stripes [C, 1, W] decide about the start, and draws
    [queries, 2 + C] about row, column and signs of each query. Returns the points that the network
    is asked about, and the result.
    """
    x, (_, height, width) = x.reshape(SHAPE), SHAPE
    low, high = np.maximum(x - epsilon, 0), np.minimum(x + epsilon, 1)
    best = np.clip(x + epsilon * np.where(stripes < 0.5, -1, 1), low, high)
    points, lowest = [best.ravel()], numpy_margin(network, best.ravel(), y)
    for k, (row, column, *signs) in enumerate(draws):
        if lowest < 0:
            break
        side = numpy_side(k, height, width)
        top = int(row * (height - side + 1))
        left = int(column * (width - side + 1))
        z = best.copy()
        for channel, sign in enumerate(signs):
            change = -2 * epsilon if sign < 0.5 else 2 * epsilon
            z[channel, top : top + side, left : left + side] += change
        z = np.clip(z, low, high)
        points.append(z.ravel())
        margin = numpy_margin(network, z.ravel(), y)
        if margin < lowest:
            best, lowest = z, margin
    return points, best.ravel()


def test_square_sides():
    """The square's side follows the schedule in its 10,000 queries, also if height and width of the
    image differ."""
    for h, w in ((32, 32), (64, 64), (3, 40), (40, 3)):
        expected = [numpy_side(k, h, w) for k in range(10_000)]
        assert [evaluate.square_side(k, h, w) for k in range(10_000)] == expected, (h, w)


def test_square():
    """Square asks about the points of the NumPy version. A query is kept if the margin falls, and
    not if it stays the same.

    The points are vertical stripes of +-epsilon that differ between the channels, then 5,000
    squares that may lie anywhere in the image, with a sign of its own in each channel.
    """
    network = Coarse(frequency=6, lift=20)
    x, y, pairs = images(6, network)
    own = generators(6)
    stripes = evaluate.uniform(x, own, 3, 1, 5).numpy()
    draws = evaluate.uniform(x, own, 5000, 5).numpy()
    outcomes = [
        numpy_square(network, image, label, 0.1, *random)
        for (image, label), *random in zip(pairs, stripes, draws)
    ]
    paths, results = zip(*outcomes)
    result = evaluate.square(network, x, y, 0.1, generators(6))
    agree(network.seen, in_turn(paths))
    agree(flat(result), results)
    lengths = [len(path) for path in paths]
    assert 1 < min(lengths) < max(lengths) == 5001, lengths


# ------------------------------ SPSA
def numpy_signs(generator, samples):
    """The sign vectors of one step."""
    bits = torch.randint(2, (samples, *SHAPE), generator=generator, dtype=torch.float64).numpy()
    return 2 * bits.reshape(samples, PIXELS) - 1


def numpy_spsa(network, x, y, epsilon, generator, steps, samples, delta, lr):
    """SPSA (Uesato et al. 2018, section 4) with Adam (Kingma & Ba 2015, Algorithm 1): the iterates,
    from x to the first misclassified one."""
    z, path, first, second = x, [x], np.zeros_like(x), np.zeros_like(x)
    low, high = np.maximum(x - epsilon, 0), np.minimum(x + epsilon, 1)
    for k in range(1, steps + 1):
        signs = numpy_signs(generator, samples)
        ahead = np.array([numpy_margin(network, z + delta * v, y) for v in signs])
        behind = np.array([numpy_margin(network, z - delta * v, y) for v in signs])
        gradient = ((ahead - behind) / (2 * delta)) @ signs / samples
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        step = first / (1 - 0.9**k) / (np.sqrt(second / (1 - 0.999**k)) + 1e-8)
        z = np.clip(z - lr * step, low, high)
        path.append(z)
        if numpy_margin(network, z, y) < 0:
            break
    return path


@pytest.mark.parametrize(
    "lift, epsilon, given",
    [(30, 0.05, {"steps": 12, "samples": 13, "delta": 0.05, "lr": 0.02}), (100, 0.5, {})],
)
def test_spsa(lift, epsilon, given):
    """SPSA's iterates are those of the NumPy version, up to the first misclassified one.

    The first case has a small box whose sides the iterates meet. The second has the defaults, which
    are the constants of section 5.2, and a box that is larger than all steps together. The logits
    are so small that Adam's 1e-8 counts, and so curved that delta counts.
    """
    network = Waves(frequency=60, lift=lift, height=1e-8)
    x, y, pairs = images(4, network)
    constants = {"steps": 20, "samples": 100, "delta": 0.001, "lr": 0.01} | given
    paths = [
        numpy_spsa(network, image, label, epsilon, generator, **constants)
        for (image, label), generator in zip(pairs, generators(4))
    ]
    for fewer in ({"steps": 1}, {"steps": 2}, {"steps": 5}, {}):
        last = (constants | fewer)["steps"]
        result = evaluate.spsa(network, x, y, epsilon, generators(4), **given | fewer)
        agree(flat(result), [path[: last + 1][-1] for path in paths])
    fooled = sum(len(path) <= constants["steps"] for path in paths)
    assert fooled == 0 if epsilon == 0.5 else 0 < fooled < 4
