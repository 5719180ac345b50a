"""The formulas: against hand-computed values, float64 NumPy written from the paper, and finite
differences."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import train_at_ours
import train_lma_at
import train_mart_ours
import train_trades_ours

SCRIPTS = [train_lma_at, train_at_ours, train_trades_ours, train_mart_ours]


def arguments(**changes):
    defaults = dict(
        delta=0.9,
        margin_reduction="mean",
        margin_weight=0.7,
        alpha=5.345,
        beta=86.0,
        tau=0.2,
        attack_loss="margin+ce",
        inv_lambda=6.0,
        lam=5.0,
    )
    return SimpleNamespace(**defaults | changes)


def logits(n=64, classes=10, scale=3.0, seed=0):
    """Random logits with saturated rows: p_y near 1 in the first quarter, near 0 in the second."""
    g = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(n, classes, generator=g, dtype=torch.float64)
    y = torch.randint(classes, (n,), generator=g)
    z[torch.arange(n // 4), y[: n // 4]] += 40
    z[torch.arange(n // 4, n // 2), y[n // 4 : n // 2]] -= 40
    return z.requires_grad_(), y


# ---------------------------------------------- the paper's formulas, in NumPy, image by image


def np_log_sum_exp(z):
    return z.max() + np.log(np.exp(z - z.max()).sum())


def np_margin(z, y, delta, reduction):  # eq. 13
    total = sum(max(0, z[j] - z[y] + delta) ** 2 for j in range(len(z)) if j != y)
    return total / len(z) if reduction == "mean" else total


def np_ce(z, y):  # eq. 8
    return np_log_sum_exp(z) - z[y]


def np_bce(z, y):  # eq. 7; 1 - p_k as the sum of the others: exact when p_k is near 1
    k = max((j for j in range(len(z)) if j != y), key=lambda j: z[j])
    return np_ce(z, y) + np_log_sum_exp(z) - np_log_sum_exp(np.delete(z, k))


def np_kl(z_nat, z_adv):
    log_p, log_q = z_nat - np_log_sum_exp(z_nat), z_adv - np_log_sum_exp(z_adv)
    return (np.exp(log_p) * (log_p - log_q)).sum()


def np_mhuber(u, v, alpha):  # section 3
    H = []
    for a, b in zip(u.ravel(), v.ravel()):
        if abs(a - b) / alpha <= math.pi / 2:
            H.append(alpha**2 * (1 - math.cos((a - b) / alpha)))
        else:
            H.append(alpha * abs(a - b) + (1 - math.pi / 2) * alpha**2)
    return sum(H) / len(H)


def np_objective(script, adv, nat, ema_adv, ema_nat, y, a):
    """Table 1, row by row."""

    def mean(loss):
        return np.mean([loss(adv[i], nat[i], y[i]) for i in range(len(y))])

    def weighted_kl(adv, nat, y):
        return np_kl(nat, adv) * (1 - np.exp(nat[y] - np_log_sum_exp(nat)))

    loss = mean(lambda adv, nat, y: np_margin(adv, y, a.delta, a.margin_reduction))
    loss = a.margin_weight * loss + a.beta * np_mhuber(ema_adv, ema_nat, a.alpha)
    if script is train_at_ours:
        return loss + mean(lambda adv, nat, y: np_ce(adv, y))
    if script is train_trades_ours:
        loss += a.inv_lambda * mean(lambda adv, nat, y: np_kl(nat, adv))
        return loss + mean(lambda adv, nat, y: np_ce(nat, y))
    if script is train_mart_ours:
        loss += a.lam * mean(weighted_kl)
    return loss + mean(lambda adv, nat, y: np_bce(adv, y))


# ----------------------------------------------------------------------------------- the tests


def terms(script, adv, nat, y, ema_adv, ema_nat, a):
    """script.objective; vanilla AT + Ours and LMA-AT have no term of the natural logits alone."""
    nat = () if script in (train_lma_at, train_at_ours) else (nat,)
    return script.objective(adv, *nat, y, ema_adv, ema_nat, a)


@pytest.mark.parametrize("script", SCRIPTS)
def test_margin_loss_is_the_papers_worked_example(script):
    """Eq. 10: scores 12, -6, 11, class 0, margin 8 violate the margin by 0 and 7; squared (eq. 11)
    that is 49; --margin-reduction mean divides by the number of classes."""
    z, y = torch.tensor([[12.0, -6.0, 11.0]]), torch.tensor([0])
    assert script.margin_loss(z, y, 8, "sum").item() == 49
    assert script.margin_loss(z, y, 8).item() == pytest.approx(49 / 3)


@pytest.mark.parametrize("script", SCRIPTS)
def test_margin_loss_is_torchs_multi_margin_loss(script):
    """With "mean" value and gradient equal those of torch's own kernel, an independent one."""
    z, y = logits()
    found, expected = script.margin_loss(z, y, 0.9), F.multi_margin_loss(z, y, p=2, margin=0.9)
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = [torch.autograd.grad(loss, z)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("reduction", ["none", "Sum", ""])
def test_margin_loss_refuses_an_unknown_reduction(script, reduction):
    """torch's "none", or a misspelt "sum", is not taken for another reduction in silence."""
    with pytest.raises(ValueError, match="neither 'mean' nor 'sum'"):
        script.margin_loss(torch.zeros(2, 3), torch.tensor([0, 1]), 0.9, reduction)


@pytest.mark.parametrize("script", [train_lma_at, train_mart_ours])
def test_boosted_cross_entropy_by_hand(script):
    """Eq. 7 for p = (1/2, 1/4, 1/4), class 0: -log 1/2 - log(1 - 1/4)."""
    z = torch.tensor([[0.5, 0.25, 0.25]]).log()
    loss = script.boosted_cross_entropy(z, torch.tensor([0])).item()
    assert loss == pytest.approx(-math.log(0.5) - math.log(0.75))


@pytest.mark.parametrize("script", [train_lma_at, train_mart_ours])
def test_boosted_cross_entropy_stays_exact_when_the_wrong_class_is_certain(script):
    """Logits (0, 80): -log p_0 = 80, log(1 - p_1) = -80, where 1 - p_1 rounds to 0."""
    z = torch.tensor([[0.0, 80.0]], requires_grad=True)
    loss = script.boosted_cross_entropy(z, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 160 and z.grad.tolist() == [[-2, 2]]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_objective_is_the_papers_in_numpy(script, reduction):
    """Every objective of Table 1 equals its float64 NumPy version to 1e-9, saturated and
    misclassified images included."""
    (adv, y), (nat, _) = logits(seed=1), logits(seed=2)
    (ema_adv, _), (ema_nat, _) = logits(seed=3), logits(seed=4)
    a = arguments(margin_reduction=reduction)
    ours = sum(terms(script, adv, nat, y, ema_adv, ema_nat, a).values()).item()
    arrays = (t.detach().numpy() for t in (adv, nat, ema_adv, ema_nat, y))
    assert ours == pytest.approx(np_objective(script, *arrays, a), rel=1e-9)


@pytest.mark.parametrize("script", SCRIPTS)
def test_objective_gradient_is_finite_differences(script):
    """gradcheck of the whole objective in both logits, through the moving averages."""
    g = torch.Generator().manual_seed(0)
    adv, nat, past_adv, past_nat = torch.randn(4, 6, 5, generator=g, dtype=torch.float64).mul(2)
    y, a = torch.arange(6) % 5, arguments(alpha=0.7)

    def loss(adv, nat):
        ema_adv = a.tau * past_adv + (1 - a.tau) * adv
        ema_nat = a.tau * past_nat + (1 - a.tau) * nat
        return sum(terms(script, adv, nat, y, ema_adv, ema_nat, a).values())

    assert torch.autograd.gradcheck(loss, (adv.requires_grad_(), nat.requires_grad_()))


@pytest.mark.parametrize("script", SCRIPTS)
def test_attack_maximises_margin_plus_ce(script):
    """Section 4.4: x' is searched with L' + CE; --attack-loss ce leaves L' out; TRADES' is KL."""
    (z, y), (nat, _) = logits(), logits(seed=5)
    z_np, y_np, nat_np = z.detach().numpy(), y.numpy(), nat.detach().numpy()
    ce = np.mean([np_ce(*pair) for pair in zip(z_np, y_np)])
    margin = np.mean([np_margin(*pair, 0.9, "mean") for pair in zip(z_np, y_np)])
    kl = np.mean([np_kl(*pair) for pair in zip(nat_np, z_np)])

    def ours(choice):
        extra = (F.log_softmax(nat, 1),) if script is train_trades_ours else ()
        return script.attack_loss(z, y, *extra, arguments(attack_loss=choice)).item()

    assert ours("margin+ce") == pytest.approx(margin + ce, rel=1e-9)
    assert ours("ce") == pytest.approx(ce, rel=1e-9)
    if script is train_trades_ours:
        assert ours("kl") == pytest.approx(kl, rel=1e-9)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_term_of_weight_zero_is_left_out(script):
    """The plain methods have no L' and no mHuber, and those without KL no KL."""
    (adv, y), (nat, _) = logits(), logits(seed=5)
    a = arguments(margin_weight=0, beta=0, lam=0, inv_lambda=0)
    assert len(terms(script, adv, nat, y, None, None, a)) == 1


def test_mhuber_value_and_slope():
    """Value and slope are 0 at 0; at the seam |d| = alpha pi/2 both branches give value alpha^2 and
    slope alpha."""
    alpha = 2.345
    seam, far = alpha * math.pi / 2, alpha * 10 + (1 - math.pi / 2) * alpha**2
    d = torch.tensor(
        [0.0, seam - 1e-9, seam + 1e-9, -seam - 1e-9, 10.0], dtype=torch.float64, requires_grad=True
    )
    value = torch.stack([common.mhuber(x, torch.zeros_like(x), alpha) for x in d])
    (slope,) = torch.autograd.grad(value.sum(), d)
    expected = torch.tensor([0, alpha**2, alpha**2, alpha**2, far], dtype=torch.float64)
    assert torch.allclose(value, expected, atol=1e-7)
    expected = torch.tensor([0, alpha, alpha, -alpha, alpha], dtype=torch.float64)
    assert torch.allclose(slope, expected, atol=1e-8)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda u: common.mhuber(u, torch.zeros(1), alpha), zero)


# ---------------------------- parity: the published baselines, from their formulas and guards


def published(method, adv, nat, y):
    """The loss of each baseline's public code, with its guards (1.0001, 1e-12, 1.0000001)."""
    if method == "vanilla AT":
        return F.cross_entropy(adv, y)
    if method == "TRADES":
        kl = F.kl_div(F.log_softmax(adv, 1), F.softmax(nat, 1), reduction="sum") / len(y)
        return F.cross_entropy(nat, y) + 6.0 * kl
    p_adv, p_nat = F.softmax(adv, 1), F.softmax(nat, 1)
    order = p_adv.argsort(1)[:, -2:]
    wrong = torch.where(order[:, -1] == y, order[:, -2], order[:, -1])
    bce = F.cross_entropy(adv, y) + F.nll_loss((1.0001 - p_adv + 1e-12).log(), wrong)
    kl = (p_nat * (p_nat.clamp_min(1e-300).log() - (p_adv + 1e-12).log())).sum(1)
    return bce + 5.0 * (kl * (1.0000001 - p_nat.gather(1, y[:, None])[:, 0])).mean()


BASELINES = {"vanilla AT": train_at_ours, "TRADES": train_trades_ours, "MART": train_mart_ours}


def ours(method, adv, nat, y):
    a = arguments(margin_weight=0, beta=0)
    return sum(terms(BASELINES[method], adv, nat, y, None, None, a).values())


def gradients(loss, *logits):
    """Zeros for what the loss does not depend on."""
    return torch.autograd.grad(
        loss, logits, allow_unused=True, materialize_grads=True, retain_graph=True
    )


@pytest.mark.parametrize("method", ["vanilla AT", "TRADES"])
def test_baseline_is_the_published_method(method):
    """Vanilla AT and TRADES: loss and gradients as the published formulas to 1e-9, saturated images
    included."""
    for scale in (0.1, 3.0, 30.0):
        (adv, y), (nat, _) = logits(seed=6, scale=scale), logits(seed=7, scale=scale)
        a, b = ours(method, adv, nat, y), published(method, adv, nat, y)
        assert a.item() == pytest.approx(b.item(), rel=1e-9)
        for g, h in zip(gradients(a, adv, nat), gradients(b, adv, nat)):
            assert torch.allclose(g, h, rtol=1e-9, atol=1e-12)


def test_mart_is_the_published_method_up_to_its_guards():
    """MART: its 1e-4 in log(1.0001 - p) is the difference; it moves the loss by at most
    1e-4 / (1 - p_k) an image. With the guards taken out of the published formula the two agree to
    1e-9 on images that are not saturated."""
    g = torch.Generator().manual_seed(0)
    adv, nat = torch.randn(2, 64, 10, generator=g, dtype=torch.float64).mul(2)
    adv, nat, y = adv.requires_grad_(), nat.requires_grad_(), torch.randint(10, (64,), generator=g)
    p, p_nat = F.softmax(adv, 1), F.softmax(nat, 1)
    top = p.scatter(1, y[:, None], 0).amax(1)
    a = ours("MART", adv, nat, y)
    bound = (1e-4 / (1 - top)).mean().item() + 1e-6
    assert 0 < (a - published("MART", adv, nat, y)).item() <= bound

    kl = (p_nat * (p_nat.log() - p.log())).sum(1)
    bare = F.cross_entropy(adv, y) - (1 - top).log().mean()
    bare = bare + 5 * (kl * (1 - p_nat.gather(1, y[:, None])[:, 0])).mean()
    assert a.item() == pytest.approx(bare.item(), rel=1e-9)
    for g, h in zip(gradients(a, adv, nat), gradients(bare, adv, nat)):
        assert torch.allclose(g, h, rtol=1e-9, atol=1e-12)
