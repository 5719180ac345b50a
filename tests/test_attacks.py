"""The attacks of evaluate.py and common.pgd: point by point against NumPy, and as a library.

Each numpy_* function is written from the attack's paper and treats one image, a flat array. Both
sides get the same random numbers and the same network, whose boundaries are curved, and have to
agree on every point that the attack visits.
"""

import itertools
import math
import zlib
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from reference import plane_step, signed_step, square_side

import common
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


def draw(generator, *shape):
    return torch.empty(shape).uniform_(generator=generator).numpy()


def agree(found, expected):
    """Flat images, or lists of them, of the same number, and equal up to rounding."""
    np.testing.assert_allclose(np.vstack(found), np.vstack(expected), rtol=0, atol=1e-9)


def in_turn(paths):
    """The first point of every image, the second of every image whose path has not ended, ..."""
    turns = itertools.zip_longest(*paths)
    return [point for points in turns for point in points if point is not None]


def flat(x):
    return list(x.detach().flatten(1).numpy().copy())


class Waves(nn.Module):
    """Logits that are sums of sine waves, one for each class and pixel; it notes what it is asked.

    The first pixel raises the logit of class 2 or 3 by `lift`, so that attacks take many steps.
    `coarse` rounds logits to quarters, so that points tie; 0.03 keeps those of one point apart.
    """

    def __init__(self, frequency, lift, classes=5, height=1.0, coarse=False):
        super().__init__()
        random = np.random.RandomState(0)  # numpy promises that its numbers never change
        self.height = height * random.normal(size=(classes, PIXELS))
        self.height[:, 0] = 0
        self.frequency = frequency * random.uniform(0.3, 1, (classes, PIXELS))
        self.phase = random.uniform(0, 2 * np.pi, (classes, PIXELS))
        self.lifts = height * lift * np.eye(classes)[2:4]
        self.coarse, self.apart, self.seen = coarse, 0.03 * np.arange(classes), []

    def logits(self, z):
        waves = self.height * np.sin(self.frequency * z + self.phase)
        logits = waves.sum(1) + self.lifts[int(z[0] > 0.5)]
        return np.round(4 * logits) / 4 + self.apart if self.coarse else logits

    def look(self, loss, z, *aims):
        """The loss, its gradient with respect to the pixels."""
        value, slope = loss(self.logits(z), *aims)
        waves = self.height * np.cos(self.frequency * z + self.phase)
        return value, slope @ (self.frequency * waves)

    def errs(self, z, y):
        return self.logits(z).argmax() != y

    def forward(self, images):
        self.seen += flat(images)
        pixels = images.flatten(1)
        height, frequency, phase = map(torch.tensor, (self.height, self.frequency, self.phase))
        waves = height * torch.sin(frequency * pixels[:, None] + phase)
        logits = waves.sum(2) + torch.tensor(self.lifts)[(pixels[:, 0] > 0.5).long()]
        return torch.round(4 * logits) / 4 + torch.tensor(self.apart) if self.coarse else logits


def images(n, network):
    """Random images, the network's predictions for them; and pairs of a flat array and a label."""
    pixels = np.random.RandomState(1).uniform(-0.1, 1.1, (n, PIXELS)).clip(0, 1)
    pixels[:, 0] = np.arange(n) % 2
    labels = [int(network.logits(z).argmax()) for z in pixels]
    return torch.tensor(pixels).view(n, *SHAPE), torch.tensor(labels), list(zip(pixels, labels))


# ------------------------------ losses of logits z: value and gradient
def numpy_cross_entropy(z, y):
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    return -np.log(p[y]), p - np.eye(len(z))[y]


def numpy_margin(z, y):
    """z_y - max_{j != y} z_j, which is negative where z is misclassified."""
    other = max((j for j in range(len(z)) if j != y), key=z.__getitem__)
    return z[y] - z[other], np.eye(len(z))[y] - np.eye(len(z))[other]


def numpy_cw(z, y):
    """-max(margin + 50, 0)."""
    margin, slope = numpy_margin(z, y)
    return -max(margin + 50, 0), -slope


def numpy_towards(z, y, target):
    """z_t - z_y."""
    return z[target] - z[y], np.eye(len(z))[target] - np.eye(len(z))[y]


def numpy_dlr(z, y, target):
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), its gradient by the quotient rule."""
    (first, _, third, fourth), unit = np.argsort(-z)[:4], np.eye(len(z))
    top, top_slope = numpy_towards(z, y, target)
    bottom = z[first] - (z[third] + z[fourth]) / 2
    bottom_slope = unit[first] - (unit[third] + unit[fourth]) / 2
    return top / bottom, (top_slope * bottom - top * bottom_slope) / bottom**2


def test_losses_where_their_formulas_change():
    """CW's is 0 from a margin of -50 on. With fewer than four classes DLR is z_t - z_y."""
    z, y = torch.tensor(np.random.RandomState(0).normal(0, 50, (40, 3))), torch.arange(40) % 3
    cw, dlr, rows = evaluate.cw_loss(z, y), evaluate.dlr_targeted(z, y, (y + 2) % 3), range(40)
    agree([cw], [[numpy_cw(*row)[0] for row in zip(z.numpy(), y)]])
    agree([dlr], [z[rows, (y + 2) % 3] - z[rows, y]])
    assert 5 < (cw == 0).sum() < 35


# ------------------------------ the attacks: the points that the network is asked about, the result
def numpy_pgd(network, x, y, epsilon, g, loss=numpy_cross_entropy, steps=20, step=1 / 255, noise=1):
    """PGD (eq. 2) with a uniform start, up to the first misclassified iterate; the network is not
    asked about the last."""
    path = [np.clip(x + noise * epsilon * (2 * draw(g, PIXELS) - 1), 0, 1)]
    while len(path) <= steps and not network.errs(path[-1], y):
        _, slope = network.look(loss, path[-1], y)
        path.append(signed_step(path[-1], x, slope, step, epsilon))
    return path[:steps], path[-1]


def numpy_apgd(loss, network, x, y, epsilon, g, *target, steps=100, values=None):
    """Auto-PGD (Croce & Hein 2020b, Algorithm 1), up to the first misclassified point. If values
    are given, they are the loss in each iteration."""
    windows = np.cumsum([0, 22, 19, 16, 13, 10, 7, 6, 6])  # percent: each 3 shorter, at least 6
    checkpoints = [math.ceil(p * steps / 100) for p in windows]
    t = 2 * draw(g, PIXELS) - 1  # to the box's surface
    z = z_prev = signed_step(x + epsilon * t / abs(t).max(), x, 0, 0, epsilon)
    step, losses, best, best_loss, best_grad = 2 * epsilon, [], z, -np.inf, None
    halved, at_check, points = True, -np.inf, []
    for k in range(steps):
        points.append(z)
        if network.errs(z, y):
            return points, z
        value, grad = network.look(loss, z, y, *target)
        losses.append(value if values is None else values[k])
        if losses[k] > best_loss:
            best, best_loss, best_grad = z, losses[k], grad
        if k in checkpoints[1:]:
            since = checkpoints[checkpoints.index(k) - 1]
            rises = sum(losses[i + 1] > losses[i] for i in range(since, k))
            stuck = rises <= 0.75 * (k - since) or (not halved and best_loss == at_check)
            halved, at_check = stuck, best_loss
            if stuck:
                step, z, grad = step / 2, best, best_grad
        ahead = signed_step(z, x, grad, step, epsilon)
        alpha = 0.75 if k else 1
        moved = z + alpha * (ahead - z) + (1 - alpha) * (z - z_prev)
        z, z_prev = signed_step(moved, x, 0, 0, epsilon), z
    return points + [z], z if network.errs(z, y) else best


def numpy_fab(network, x, y, epsilon, g, target):
    """FAB towards one target (Croce & Hein 2020a, Algorithm 1): alpha_max 0.1, eta 1.05, beta 0.9.
    Ends at the first misclassified point within epsilon; the result is x if there is none."""
    z, points = x, []
    for _ in range(100):
        value, w = network.look(numpy_towards, z, y, target)
        b = value - w @ z  # the target's margin is about w . u + b in a point u near z
        step_z, step_x = plane_step(z, w, b), plane_step(x, w, b)
        norm_z, norm_x = np.abs(step_z).max(), np.abs(step_x).max()
        alpha = min(norm_z / (norm_z + norm_x), 0.1)
        new = np.clip((1 - alpha) * (z + 1.05 * step_z) + alpha * (x + 1.05 * step_x), 0, 1)
        points += [z, new]
        crossed = network.errs(new, y)
        if crossed and np.abs(new - x).max() <= epsilon:
            return points, new
        z = x + 0.9 * (new - x) if crossed else new
    return points, x


def numpy_square(network, x, y, epsilon, g):
    """Square Attack (Andriushchenko et al. 2020, Algorithms 1 and 2): vertical stripes, then 5,000
    squares that may lie anywhere, each channel with a sign of its own. Ties are not kept."""
    x, (channels, height, width) = x.reshape(SHAPE), SHAPE
    best = signed_step(x, x, draw(g, channels, 1, width) - 0.5, epsilon, epsilon)
    points, lowest = [best.ravel()], numpy_margin(network.logits(best.ravel()), y)[0]
    for k, (row, column, *signs) in enumerate(draw(g, 5000, 2 + channels)):
        if lowest < 0:
            break
        side = square_side(k, height, width)
        top, left = int(row * (height - side + 1)), int(column * (width - side + 1))
        change = np.zeros(SHAPE)
        change[:, top : top + side, left : left + side] = np.array(signs)[:, None, None] - 0.5
        z = signed_step(best, x, change, 2 * epsilon, epsilon)
        points.append(z.ravel())
        margin, _ = numpy_margin(network.logits(z.ravel()), y)
        if margin < lowest:
            best, lowest = z, margin
    return points, best.ravel()


def numpy_spsa(network, x, y, epsilon, g, steps=20, samples=100, delta=0.001, lr=0.01):
    """SPSA (Uesato et al. 2018, section 4; constants of section 5.2) with Adam (Kingma & Ba 2015,
    Algorithm 1), up to the first misclassified iterate."""
    z, points, first, second = x, [], np.zeros_like(x), np.zeros_like(x)
    for k in range(1, steps + 1):
        bits = torch.randint(2, (samples, *SHAPE), generator=g, dtype=torch.float64)
        signs = 2 * bits.view(samples, PIXELS).numpy() - 1
        asked = np.vstack([z + delta * signs, z - delta * signs])
        margins = np.array([numpy_margin(network.logits(p), y)[0] for p in asked]).reshape(2, -1)
        slope = (margins[0] - margins[1]) / (2 * delta) @ signs / samples
        first = 0.9 * first + 0.1 * slope
        second = 0.999 * second + 0.001 * slope**2
        step = first / (1 - 0.9**k) / (np.sqrt(second / (1 - 0.999**k)) + 1e-8)
        z = signed_step(z - lr * step, x, 0, 0, epsilon)
        points += [asked, z]
        if network.errs(z, y):
            break
    return points, z


@pytest.mark.parametrize(
    "attack, numpy_attack, network, epsilon, longest",
    [
        ("FGSM", partial(numpy_pgd, steps=1, step=0.1, noise=0), (30, 50), 0.1, None),
        ("PGD-20", numpy_pgd, (30, 50), 0.1, 20),
        ("PGD-100", partial(numpy_pgd, steps=100), (30, 50), 0.1, 100),
        ("CW", partial(numpy_pgd, loss=numpy_cw), (30, 50), 0.1, 20),
        ("APGD-CE", partial(numpy_apgd, numpy_cross_entropy), (30, 40), 0.1, 101),
        ("SQUARE", numpy_square, (6, 16, 5, 1, True), 0.1, 5001),
        ("SPSA", numpy_spsa, (60, 40, 5, 1e-8), 0.03, 40),  # so small that Adam's 1e-8 counts
        ("SPSA", numpy_spsa, (60, 100, 5, 1e-8), 0.5, None),  # never meets its box
    ],
)
def test_attacks_visit_the_points_of_their_papers(attack, numpy_attack, network, epsilon, longest):
    """Some images end at their first misclassified point, and some never."""
    network, attack = Waves(*network), ATTACKS.get(attack, attack)
    x, y, pairs = images(6, network)
    asked = [numpy_attack(network, *pair, epsilon, g) for pair, g in zip(pairs, generators(6))]
    paths, results = zip(*asked)
    result = attack(network, x, y, epsilon, generators(6))
    agree(network.seen, in_turn(paths))
    agree(flat(result), results)
    lengths = {len(path) for path in paths}
    assert longest is None or min(lengths) < max(lengths) == longest, lengths


@pytest.mark.parametrize("steps", [100, 50])
def test_apgd_halves_its_step_at_its_checkpoints(steps):
    """And returns the best point, of equals the first. Each iteration's loss is from a table of
    integers: it often ties, gains nothing between checkpoints, or rises in 3 of 4 iterations."""
    network, n = Waves(frequency=30, lift=1000), 30
    x, y, pairs = images(n, network)
    random = np.random.RandomState(2)
    up = random.uniform(size=(steps + 1, n)) < np.linspace(0.6, 1, n)
    table = np.where(up, 1, random.randint(-5, 1, size=up.shape)).cumsum(0)
    table[:, ::3] = np.arange(steps + 1)[:, None] % np.arange(4, 14)
    passes, paths = iter(table), []

    def loss(logits, y):
        value = evaluate.cw_loss(logits, y)
        return value - value.detach() + torch.tensor(next(passes))

    for pair, g, values in zip(pairs, generators(n), table.T):
        attack = partial(numpy_apgd, numpy_cw, steps=steps, values=values)
        paths.append(attack(network, *pair, 0.1, g))
    result = evaluate.apgd(network, x, y, 0.1, generators(n), loss=loss, steps=steps)
    agree(network.seen, in_turn(path for path, _ in paths))
    agree(flat(result), [best for _, best in paths])


@pytest.mark.parametrize(
    "name, epsilon, network",
    [
        ("APGD-T", 0.051, (30, 40, 12)),
        ("FAB-T", 0.047, (30, 40, 12)),
        ("FAB-T", 0.04, (8, 10, 5)),  # where a misclassified point may be of another class
    ],
)
def test_targets_in_turn(name, epsilon, network):
    """APGD-T and FAB-T try the nine wrong classes of largest clean logit, or all there are, in this
    order. After each they look at the results, and images that are misclassified leave."""
    attack = numpy_fab if name == "FAB-T" else partial(numpy_apgd, numpy_dlr)
    network, own = Waves(*network), generators(6)
    x, y, pairs = images(6, network)
    results, points, standing = {}, flat(x), list(range(6))
    for rank in range(1, min(len(network.apart), 10)):
        paths = []
        for i in standing:
            target = np.argsort(-network.logits(pairs[i][0]))[rank]
            path, results[i] = attack(network, *pairs[i], epsilon, own[i], target)
            paths.append(path)
        points += in_turn(paths) + [results[i] for i in standing]
        standing = [i for i in standing if not network.errs(results[i], pairs[i][1])]
    result = ATTACKS[name](network, x, y, epsilon, generators(6))
    agree(network.seen, points)
    agree(flat(result), [(pairs[i][0] if i in standing else results[i]) for i in range(6)])
    assert 0 < len(standing) < 6


def test_projection():
    """to_hyperplane takes the smallest step to a plane on either side, and where it is out of reach
    goes as far as it can. It ends, also for NaN."""
    random = np.random.RandomState(0)
    x, w = random.uniform(-0.1, 1.1, (1000, PIXELS)).clip(0, 1), random.normal(size=(1000, PIXELS))
    gap = np.linspace(-30, 30, 1000)
    steps = [plane_step(*row) for row in zip(x, w, -(w * x).sum(1) - gap)]
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        given = [torch.tensor(a, dtype=dtype).view(1000, -1, 1, 1) for a in (x, w, gap)]
        given[2][0] = math.nan
        found = evaluate.to_hyperplane(*given).view(1000, PIXELS)
        np.testing.assert_allclose(found[1:], steps[1:], rtol=0, atol=near)


def test_square_sides():
    for k, h, w in itertools.product(range(0, 9000, 5), (3, 32), (3, 32)):
        assert evaluate.square_side(k, h, w) == square_side(k, h, w), (k, h, w)


# ------------------------------ as a library
NAMES = ["pgd", *ATTACKS, "AA"]


def call(name, model, x, y, **options):
    if name == "pgd":
        torch.manual_seed(0)
        return common.pgd(model, x, lambda logits: F.cross_entropy(logits, y), **options)
    attack = evaluate.autoattack if name == "AA" else partial(evaluate.perturb, name)
    return attack(model, x, y, **options)


def small_network():
    torch.manual_seed(0)
    layers = nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(PIXELS, 16), nn.Tanh(), nn.Linear(16, 5)
    model, x = nn.Sequential(*layers, nn.Dropout()), (1.2 * torch.rand(6, *SHAPE) - 0.1).clamp(0, 1)
    return model, x, model.eval()(x).argmax(1)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_an_attack_changes_nothing_and_an_images_result_is_its_own(name):
    """Modes, requires_grad, statistics and gradients of a network in train mode, also after an
    exception. The result is a constant in the box, and the same inside no_grad, for a function, and
    for any batch_size, which bounds all passes but those of SPSA, order or neighbours."""
    (model, x, y), (function, _, _) = small_network(), small_network()
    passes, rows, breaks = [], torch.tensor([4, 1]), False
    model.train()[0].eval()
    model[2].bias.requires_grad_(False)

    def state():
        values = [(v.requires_grad, v.grad, v.tolist()) for v in (x, *model.parameters())]
        values += [value.tolist() for value in model.buffers()]
        return [module.training for module in model.modules()] + values

    def look(_, given):
        passes.append(len(given[0]))
        assert not any(module.training for module in model.modules())
        assert not any(weight.requires_grad for weight in model.parameters())
        if breaks:
            raise KeyError

    model.register_forward_pre_hook(look)
    x.requires_grad_()
    before, found = state(), call(name, model, x, y)
    with torch.no_grad():
        assert torch.equal(call(name, model, x, y), found) and not torch.is_grad_enabled()
    assert torch.equal(call(name, lambda x: function(x), x, y), found)
    assert torch.equal(found, x) == (name == "Clean") and not found.requires_grad
    assert 0 <= found.min() <= found.max() <= 1 and (found - x).abs().max() <= 8 / 255 + 1e-12
    for size in (1, 4) if name != "pgd" else ():
        passes.clear()
        agree(flat(call(name, model, x, y, batch_size=size)), flat(found))
        assert name == "SPSA" or max(passes, default=0) <= size
    if name in ATTACKS:
        agree(flat(call(name, model, x[rows], y[rows], index=rows)), flat(found[rows]))
    breaks = True
    if passes:
        with pytest.raises(KeyError):
            call(name, model, x, y)
    assert state() == before and function[2].weight.grad is None
    assert call(name, function.float(), x.float(), y).dtype == torch.float32


def test_random_numbers_follow_from_seed_attack_and_index():
    """The same in every version; another seed, attack or index has others."""
    rows, own = torch.arange(50), []
    for seed, name in itertools.product((0, 1), ATTACKS):
        own += [g.initial_seed() for g in evaluate.generators_of(seed, name, rows, "cpu")]
    assert len(set(own)) == len(own) and own[57] == zlib.crc32(b"0 FGSM 7")


def test_autoattack_is_four_attacks_in_turn(monkeypatch):
    """Each gets what the ones before left, and none an image that is wrong from the start. Here the
    images' random numbers decide; steps out of the box are cut off. It warns of zero gradients."""
    x, y = torch.full((100, 3, 2, 2), 0.5), torch.zeros(100, dtype=torch.long)
    x[:20, 0, 0, 0], expected = 0.6, x.clone()
    expected[:20, 0, 0, 0], expected[20:, 2] = 0.6, 0.55

    def bright(x):
        return F.one_hot((x[:, 0, 0, 0] > 0.55).long(), 2).double()

    def fake(i, model, x, y, epsilon, own):
        x, lucky = x.clone(), torch.tensor([draw(g, 1)[0] < 0.3 for g in own])
        x[lucky, 0, 0, 0] += 2 * epsilon
        x[lucky, 1, i // 2, i % 2] -= 2 * epsilon
        return x + epsilon / 2 * torch.tensor([0, 0, 1])[:, None, None]

    for i, name in enumerate(("APGD-CE", "APGD-T", "FAB-T", "SQUARE")):
        monkeypatch.setitem(ATTACKS, name, partial(fake, i))
        for row, g in enumerate(evaluate.generators_of(3, name, torch.arange(100), "cpu")):
            if expected[row, 0, 0, 0] == 0.5 and draw(g, 1) < 0.3:
                expected[row, 0, 0, 0], expected[row, 1, i // 2, i % 2] = 0.6, 0.4
    with pytest.warns(UserWarning):
        found = evaluate.autoattack(bright, x, y, 0.1, seed=3, batch_size=40)
    agree(flat(found), flat(expected))
    assert torch.equal(evaluate.perturb("FGSM", bright, x, y), x)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_image_no_radius_or_not_finite_is_refused(name):
    """common.pgd, which must not wait for a GPU, does not look at the values. No image is fine."""
    model, x, y = small_network()
    assert call(name, model, x[:0], y[:0]).shape == (0, *SHAPE)
    cases = [((255 * x).byte(), 0.1), (x.half(), 0.1), (x.bfloat16(), 0.1)]
    cases += [(x, radius) for radius in (1, 8, -0.1, math.nan)]
    if name != "pgd":
        cases += [((x - 0.5) / 0.2, 0.1), (x - 0.01, 0.1), (x + 0.01, 0.1), (x * math.nan, 0.1)]
    for given, epsilon in cases:
        with pytest.raises(ValueError):
            call(name, model, given, y, epsilon=epsilon)

    def undefined(z):  # a single logit
        place = (z[:, :1, 0, 0] > x[:, 0, 0, 0].max() - 0.04) & (torch.arange(5) == 2)
        return model(z) * torch.where(place, math.nan, 1)

    def steep(z):  # a logit's gradient is infinite
        return model(z) + (z - z.detach())[:, 0, 0, :5].sqrt()

    for network in (undefined, steep)[: 1 if name in ("SQUARE", "SPSA") else 2]:
        if name not in ("pgd", "Clean"):
            with pytest.raises(FloatingPointError):
                call(name, network, x, y)
