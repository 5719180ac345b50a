"""Losses and learning rate of the four scripts, PGD and mHuber, against reference.py."""

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import train_at_ours
import train_lma_at
import train_mart_ours
import train_trades_ours

SCRIPTS = [train_lma_at, train_at_ours, train_trades_ours, train_mart_ours]
PRECISIONS = [(torch.float64, 1e-7), (torch.float32, 3e-5)]


def scripts_with(name):
    return [script for script in SCRIPTS if hasattr(script, name)]


def logits(classes, seed=0):
    """Of 16 images: p_y is near 1 for the first four and near 0 for the next four."""
    random = np.random.RandomState(seed)
    z, y = random.normal(0, 2, (16, classes)), np.arange(16) % classes
    z[np.arange(4), y[:4]] += 40
    z[np.arange(4, 8), y[4:8]] -= 40
    return z, torch.tensor(y)


def check(ours, theirs, *arrays, dtype=torch.float64, tolerance=1e-7):
    """ours(*tensors) and theirs(*arrays) have the same value, and the same gradient in each."""
    tensors = [torch.tensor(values, dtype=dtype, requires_grad=True) for values in arrays]
    value = ours(*tensors)
    assert value.dtype == dtype and value.shape == ()
    np.testing.assert_allclose(value.item(), theirs(*arrays), rtol=tolerance, atol=tolerance)
    value.backward()
    for i, tensor in enumerate(tensors):
        slope = reference.gradient(lambda z: theirs(*arrays[:i], z, *arrays[i + 1 :]), arrays[i])
        grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        np.testing.assert_allclose(grad.double(), slope, rtol=tolerance, atol=tolerance)


def test_the_reference_gives_the_papers_worked_example():
    """Eq. 10: scores 12, -6, 11, class 0, margin 8 violate the margin by 0 and by 7."""
    assert reference.margin_loss([[12.0, -6.0, 11.0]], [0], 8, "sum") == 49


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("classes", [2, 10])
def test_losses_have_the_papers_values_and_gradients(classes, dtype, tolerance):
    """L' with both reductions, BCE, KL and MART's KL (1 - p_y), also where 1 - p_k rounds to 0."""
    (adv, y), (nat, _) = logits(classes), logits(classes, seed=1)
    near = {"dtype": dtype, "tolerance": tolerance}
    for script in SCRIPTS:
        for options in ((0.9,), (0.9, "mean"), (0.4, "sum")):
            check(
                lambda z: script.margin_loss(z, y, *options),
                lambda z: reference.margin_loss(z, y, *options),
                adv,
                **near,
            )
    for script in scripts_with("boosted_cross_entropy"):
        check(
            lambda z: script.boosted_cross_entropy(z, y),
            lambda z: reference.boosted_cross_entropy(z, y),
            adv,
            **near,
        )

    def kl(adv, nat):
        return train_trades_ours.kl(F.log_softmax(adv, 1), F.log_softmax(nat, 1))

    def weighted_kl(adv, nat):
        return train_mart_ours.weighted_kl(adv, nat, y)

    check(kl, lambda adv, nat: reference.kl(nat, adv), adv, nat, **near)
    check(weighted_kl, lambda adv, nat: reference.weighted_kl(nat, adv, y), adv, nat, **near)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_attack_maximises_margin_plus_ce(script):
    """Section 4.4; --attack-loss ce leaves L' out, and kl is TRADES' own, with p(x) constant."""
    (adv, y), (nat, _) = logits(10), logits(10, seed=1)
    extra = {}
    choices = ["margin+ce", "ce"]
    if script is train_trades_ours:
        extra["log_p_nat"] = torch.tensor(reference.log_softmax(nat))
        choices.append("kl")
    for choice in choices:
        for reduction, delta in (("mean", 0.9), ("sum", 0.4)):
            args = SimpleNamespace(attack_loss=choice, delta=delta, margin_reduction=reduction)
            check(
                lambda z: script.attack_loss(z, y=y, args=args, **extra),
                lambda z: reference.attack_objective(
                    y=y, logits_adv=z, logits_nat=nat, **vars(args)
                ),
                adv,
            )


def test_p_of_trades_own_attack_is_that_of_eval_mode_and_a_constant():
    """It is there for --attack-loss kl alone, and leaves the statistics of a batch norm alone."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 3))
    x = torch.rand(4, 3, 2, 2)
    expected = reference.log_softmax(model.eval()(x))
    found = train_trades_ours.eval_log_p(model.train(), x, SimpleNamespace(attack_loss="kl"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert not found.requires_grad and model[1].training and not model[1].running_mean.any()
    for choice in ("margin+ce", "ce"):
        assert train_trades_ours.eval_log_p(None, x, SimpleNamespace(attack_loss=choice)) is None


@pytest.mark.parametrize("dtype, tolerance", PRECISIONS)
@pytest.mark.parametrize("alpha", [0.7, 2.345, 5.345])
def test_mhuber_has_the_papers_values_and_gradients(alpha, dtype, tolerance):
    """At 0, in the cosine, on either side of the seam |u - v| = alpha pi / 2, and far out."""
    seam = alpha * np.pi / 2
    d = np.array([0, 0.01, 0.3, 0.99 * seam, 1.01 * seam, 3 * seam, 40]) * np.array([[1], [-1]])
    v = np.random.RandomState(0).normal(size=d.shape)
    mhuber = (lambda u, v: common.mhuber(u, v, alpha), lambda u, v: reference.mhuber(u, v, alpha))
    check(*mhuber, v + d, v, dtype=dtype, tolerance=tolerance)


def test_mhuber_of_a_tiny_difference_has_a_gradient():
    """In float32 1 - cos rounds to 0 there; the slope alpha sin(d / alpha) does not."""
    u = torch.tensor([1e-4, -1e-5], requires_grad=True)
    common.mhuber(u, torch.zeros(2), 5.345).backward()
    np.testing.assert_allclose(u.grad, u.detach() / 2, rtol=1e-5)


def test_pgd_of_the_training_is_algorithm_1():
    """The first iterate is x + 0.001 N(0, I), or the start that is given, not projected. All steps
    are taken, 10 of 2/255 within 8/255 if nothing is said."""
    random, seen = np.random.RandomState(0), []
    x, y = torch.tensor(random.uniform(size=(5, 3, 2, 2))), torch.arange(5)
    w, v = torch.tensor(random.normal(size=(12, 8))), torch.tensor(random.normal(size=(8, 5)))
    for start, options, (epsilon, steps, step_size) in (
        (None, {}, (8 / 255, 10, 2 / 255)),
        (x + 0.2, {"epsilon": 0.1, "step_size": 0.03, "steps": 4}, (0.1, 4, 0.03)),
    ):

        def network(x):
            seen.append(x.detach().clone().numpy())
            return torch.tanh(x.flatten(1) @ w) @ v

        def numpy_loss(z):
            return reference.cross_entropy(np.tanh(z.reshape(5, 12) @ w.numpy()) @ v.numpy(), y)

        seen.clear()
        torch.manual_seed(0)
        result = common.pgd(network, x, lambda z: F.cross_entropy(z, y), start=start, **options)
        torch.manual_seed(0)
        points = [reference.array(x + 0.001 * torch.randn_like(x) if start is None else start)]
        for _ in range(steps):
            slope = reference.gradient(numpy_loss, points[-1])
            points.append(reference.signed_step(points[-1], x, slope, step_size, epsilon))
        np.testing.assert_allclose([*seen, result], points, rtol=0, atol=1e-12)


def test_pgd_gives_the_loss_float32():
    """Under autocast the network computes in bfloat16, the loss of its logits does not."""
    layer, given = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), []
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.rand(2, 3, 2, 2)).dtype == torch.bfloat16
        x_adv = common.pgd(layer, torch.rand(2, 3, 2, 2), lambda z: given.append(z) or z.sum())
    assert {z.dtype for z in (*given, x_adv)} == {torch.float32} and len(given) == 10


def test_the_learning_rate_drops_in_the_75th_and_90th_of_130_epochs():
    """Section 5.1; with another number of epochs at the same parts of them."""
    rates = [train_lma_at.learning_rate(epoch, 130, 0.01) for epoch in (1, 74, 75, 89, 90, 130)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001, 0.0001])
    for epochs in (1, 2, 3, 7, 13, 26, 100, 130, 260):
        for epoch in range(1, epochs + 1):
            expected = reference.learning_rate(epoch, epochs, 0.3)
            assert train_lma_at.learning_rate(epoch, epochs, 0.3) == pytest.approx(expected)


def test_functions_that_scripts_share_are_the_same_in_each():
    """Those that do not depend on the method; attack_loss and train_epoch are compared by value."""
    for name in ("margin_loss", "boosted_cross_entropy", "learning_rate"):
        copies = [inspect.getsource(getattr(script, name)) for script in scripts_with(name)]
        assert len(copies) > 1 and len(set(copies)) == 1, name
