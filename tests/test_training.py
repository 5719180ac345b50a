"""The training scripts: two steps of Algorithm 1 by hand, what main() gives the loop, whole
programs, resume, refusals, processes."""

import argparse
import csv
import difflib
import inspect
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import evaluate
import train_at_ours
import train_lma_at
import train_mart_ours
import train_trades_ours

ROOT = Path(__file__).parents[1]
SCRIPTS = [train_lma_at, train_at_ours, train_trades_ours, train_mart_ours]
PLAIN = "--margin-weight 0 --beta 0"
CPU = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def parse(script, options, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *shlex.split(options)])
    return script.parse_args()


# --------------------------------------------------- two steps of Algorithm 1, written by hand


class Network(torch.nn.Module):
    """A convolution with batch norm, a linear layer; softplus has no kinks: nothing hangs by a
    rounding but the signs of PGD."""

    def __init__(self, classes=5):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = torch.nn.BatchNorm2d(6)
        self.fc = torch.nn.Linear(6, classes)

    def forward(self, x):
        return self.fc(F.softplus(3 * self.bn(self.conv(x))).mean((2, 3)))


def hand_forward(w, x, train):
    """The same in formulas; `w` is the state by name. Training mode moves the statistics."""
    z, m = F.conv2d(x, w["conv.weight"], padding=1), x[:, 0].numel()
    mean, var = w["bn.running_mean"], w["bn.running_var"]
    if train:
        mean, var = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
        w["bn.running_mean"] = 0.9 * w["bn.running_mean"] + 0.1 * mean.detach()
        w["bn.running_var"] = 0.9 * w["bn.running_var"] + 0.1 * m / (m - 1) * var.detach()
    mean, var, gamma, beta = (t.view(-1, 1, 1) for t in (mean, var, w["bn.weight"], w["bn.bias"]))
    z = gamma * (z - mean) / (var + 1e-5).sqrt() + beta
    return (1 + (3 * z).exp()).log().mean((2, 3)) @ w["fc.weight"].T + w["fc.bias"]


def hand_log_p(z):
    return z - z.exp().sum(1, keepdim=True).log()


def hand_ce(z, y):  # eq. 8
    return -hand_log_p(z)[range(len(y)), y].mean()


def hand_margin(z, y, o):  # eq. 13
    violated = (z - z[range(len(y)), y][:, None] + o["delta"]).clamp(min=0) ** 2
    others = torch.arange(z.shape[1]) != y[:, None]
    total = (violated * others).sum(1).mean()
    return total if o["reduction"] == "sum" else total / z.shape[1]


def hand_kl(z_nat, z_adv):  # of each image
    return (hand_log_p(z_nat).exp() * (hand_log_p(z_nat) - hand_log_p(z_adv))).sum(1)


def hand_mhuber(u, v, alpha):  # section 3
    d = (u - v).abs()
    A = alpha**2 * (1 - (d / alpha).cos())
    B = alpha * d + (1 - math.pi / 2) * alpha**2
    return torch.where(d / alpha <= math.pi / 2, A, B).mean()


def hand_pgd(w, x, y, o):
    """x' (the inner loop of Algorithm 1); TRADES' own attack maximises KL to the clean logits."""
    if not o["epsilon"]:
        return x
    z_nat = hand_forward(w, x, train=False)
    x_adv = x + 0.001 * torch.randn(x.shape, dtype=x.dtype)
    for _ in range(o["steps"]):
        x_adv.requires_grad_()
        z = hand_forward(w, x_adv, train=False)
        loss = hand_kl(z_nat, z).mean() if o["attack"] == "kl" else hand_ce(z, y)
        if o["attack"] == "margin+ce":
            loss = hand_margin(z, y, o) + loss
        (g,) = torch.autograd.grad(loss, x_adv)
        x_adv = x_adv.detach() + o["step_size"] * g.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - o["epsilon"]), x + o["epsilon"])
        x_adv = x_adv.clamp(0, 1)
    return x_adv


def hand_base(script, z_adv, z_nat, y, o):
    """The terms of Table 1 that are not the paper's additions."""
    if script is train_at_ours:  # eq. 15
        return hand_ce(z_adv, y)
    if script is train_trades_ours:  # eq. 17
        return hand_ce(z_nat, y) + o["kl"] * hand_kl(z_nat, z_adv).mean()
    p = hand_log_p(z_adv).exp()
    p_k = p.masked_fill(torch.arange(p.shape[1]) == y[:, None], 0).amax(1)
    loss = hand_ce(z_adv, y) - (1 - p_k).log().mean()  # eq. 18: BCE (eq. 7)
    if script is train_mart_ours and o["kl"]:
        p_y = hand_log_p(z_nat).exp()[range(len(y)), y]
        loss = loss + o["kl"] * (hand_kl(z_nat, z_adv) * (1 - p_y)).mean()
    return loss


def hand_steps(script, w, steps, past_adv, past_nat, o):
    """Algorithm 1 (and Table 1) over (x, y, index). Returns weights, moving averages and losses.

    f(x) is computed before f(x'), which shows in batch norm's statistics alone, and only where a
    term needs it.
    """
    weights = [name for name in w if "running" not in name]
    velocity, losses = {}, []
    for x, y, index in steps:
        x_adv, z_nat = hand_pgd(w, x, y, o), None
        for name in weights:
            w[name] = w[name].detach().requires_grad_()
        if o["beta"] or o["kl"] or script is train_trades_ours:
            z_nat = hand_forward(w, x, train=True)
        z_adv = hand_forward(w, x_adv, train=True)
        loss = hand_base(script, z_adv, z_nat, y, o)
        loss = loss + o["margin_weight"] * hand_margin(z_adv, y, o)
        if o["beta"]:
            at = index if o["ema"] == "image" else range(len(y))
            ema_adv = o["tau"] * past_adv[at] + (1 - o["tau"]) * z_adv
            ema_nat = o["tau"] * past_nat[at] + (1 - o["tau"]) * z_nat
            past_adv[at], past_nat[at] = ema_adv.detach(), ema_nat.detach()
            loss = loss + o["beta"] * hand_mhuber(ema_adv, ema_nat, o["alpha"])
        for name, g in zip(weights, torch.autograd.grad(loss, [w[name] for name in weights])):
            g = g + o["weight_decay"] * w[name].detach()
            velocity[name] = g + (0.9 * velocity[name] if name in velocity else 0)
            w[name] = w[name].detach() - o["lr"] * velocity[name]
        losses.append(loss.detach())
    return w, past_adv, past_nat, losses


# options of a case beyond the shared ones; what they change in the hand's settings
CASES = {
    "": {},
    "--tau 0.7": {"tau": 0.7},
    "--tau 0": {"tau": 0},
    "--ema image": {"ema": "image"},
    "--ema image --tau 0.7": {"ema": "image", "tau": 0.7},
    "--margin-weight 0": {"margin_weight": 0},
    "--margin-weight 2.5": {"margin_weight": 2.5},
    "--margin-reduction sum --delta 1.7": {"reduction": "sum", "delta": 1.7},
    "--beta 0": {"beta": 0},
    "--beta 0 --margin-weight 0": {"beta": 0, "margin_weight": 0},
    "--attack-loss ce": {"attack": "ce"},
    "--epsilon 0": {"epsilon": 0},
    "--alpha 5": {"alpha": 5},
    "--weight-decay 0": {"weight_decay": 0},
}
OWN = {
    train_trades_ours: {
        "--attack-loss kl": {"attack": "kl"},
        "--inv-lambda 0": {"kl": 0},
        "--inv-lambda 2.5 --tau 0.7": {"kl": 2.5, "tau": 0.7},
        "--attack-loss kl --beta 0 --margin-weight 0": {
            "attack": "kl",
            "beta": 0,
            "margin_weight": 0,
        },
    },
    train_mart_ours: {
        "--lambda 2.5 --tau 0.7": {"kl": 2.5, "tau": 0.7},
        "--lambda 0": {"kl": 0},
        "--lambda 0 --beta 0": {"kl": 0, "beta": 0},
    },
}
HAND = [(script, options) for script in SCRIPTS for options in (CASES | OWN.get(script, {}))]


@pytest.mark.parametrize("script, options", HAND)
def test_two_steps_are_algorithm_1_written_by_hand(script, options, monkeypatch):
    """In float64, from moving averages that are not zero: weights, statistics, moving averages and
    losses after two steps of train_epoch equal those of hand_steps to 1e-9."""
    shared = (
        "--epsilon 0.1 --step-size 0.03 --steps 5 --beta 7 --alpha 0.4 --delta 0.6"
        " --margin-weight 0.8 --lr 0.2 --weight-decay 0.05"
    )
    args = parse(script, f"{shared} {options}", monkeypatch)
    o = {
        "epsilon": 0.1,
        "step_size": 0.03,
        "steps": 5,
        "beta": 7,
        "alpha": 0.4,
        "delta": 0.6,
        "margin_weight": 0.8,
        "lr": 0.2,
        "weight_decay": 0.05,
        "tau": 0.2,
        "ema": "slot",
        "reduction": "mean",
        "attack": "margin+ce",
        "kl": {train_trades_ours: 6, train_mart_ours: 5}.get(script, 0),
    }
    o |= (CASES | OWN.get(script, {}))[options]

    torch.manual_seed(0)
    model = Network().double()
    torch.nn.init.uniform_(model.bn.weight, 0.5, 1.5)
    torch.nn.init.uniform_(model.bn.bias, -0.5, 0.5)
    model(torch.rand(20, 3, 8, 7).double())  # statistics of its own
    past_adv, past_nat = torch.randn(2, 10 if o["ema"] == "image" else 6, 5).double()
    x, y = torch.rand(2, 6, 3, 8, 7).double(), torch.randint(5, (2, 6))
    rows = torch.tensor([[3, 1, 4, 0, 5, 9], [2, 6, 5, 3, 8, 7]])
    steps = list(zip(x, y, rows))

    state = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
    torch.manual_seed(1)
    w, ema_adv, ema_nat, losses = hand_steps(
        script, state, steps, past_adv.clone(), past_nat.clone(), o
    )
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay)
    torch.manual_seed(1)
    log = script.train_epoch(model.eval(), optimizer, iter(steps), past_adv, past_nat, args)
    for name, t in w.items():
        assert torch.allclose(model.state_dict()[name], t, rtol=0, atol=1e-9), name
    assert torch.allclose(past_adv, ema_adv, atol=1e-9)
    assert torch.allclose(past_nat, ema_nat, atol=1e-9)
    assert torch.allclose(sum(log.values()), torch.stack(losses).mean(), atol=1e-9)


# ----------------------------------------------------------------------------- the batch loop


def prepare(script, options, monkeypatch, device="cpu", images=24):
    """The model and all arguments of script.train_epoch for steps of 8 random images."""
    args = parse(script, f"--arch wrn-10-1 --batch-size 8 {options}", monkeypatch)
    torch.manual_seed(0)
    model = common.make_model(args.arch, 10).to(device, memory_format=torch.channels_last)
    x = torch.randint(256, (images, 3, 16, 16), dtype=torch.uint8).to(device)
    y = torch.randint(10, (images,)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay)
    past = torch.zeros(images if args.ema == "image" else 8, 10, device=device)
    batches = common.shuffled_batches(x, y, 8, args.seed, epoch=1)
    return model, [model, optimizer, batches, past, past.clone(), args]


@pytest.mark.parametrize(
    "script, options, attack, train",
    [
        (train_lma_at, "", 10, 2),
        (train_at_ours, "", 10, 2),
        (train_trades_ours, "", 10, 2),
        (train_mart_ours, "", 10, 2),
        (train_lma_at, "--beta 0", 10, 1),
        (train_at_ours, f"--attack-loss ce {PLAIN}", 10, 1),
        (train_trades_ours, f"--attack-loss kl {PLAIN}", 11, 2),
        (train_mart_ours, f"--attack-loss ce {PLAIN}", 10, 2),
        (train_mart_ours, f"--attack-loss ce --lambda 0 {PLAIN}", 10, 1),
        (train_at_ours, f"--epsilon 0 {PLAIN}", 0, 1),
    ],
)
def test_no_forward_pass_that_no_term_needs(script, options, attack, train, monkeypatch):
    """Passes a step in eval and in training mode, at 10 attack steps: vanilla AT 10 + 1, TRADES
    11 + 2 (f(x) once), natural training 0 + 1. Training mode is set, whatever the mode before.
    """
    model, epoch = prepare(script, options, monkeypatch)
    passes = []
    model.register_forward_hook(lambda model, *_: passes.append(model.training))
    model.eval()  # as validation may leave it
    script.train_epoch(*epoch)
    assert (passes.count(False), passes.count(True)) == (3 * attack, 3 * train)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", ["", "--attack-loss ce --ema image"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_batch_loop_never_waits_for_the_device(script, options, monkeypatch):
    """On the meta device a stray CPU tensor, .item() or any other synchronisation raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # meta has none
    _, epoch = prepare(script, f"--steps 3 {options}", monkeypatch, device="meta")
    log = script.train_epoch(*epoch)
    assert all(v.device.type == "meta" and v.shape == () for v in log.values())
    with pytest.raises(RuntimeError):
        log["L'"].item()


@pytest.mark.parametrize("script", SCRIPTS)
def test_amp_runs_and_stays_near_float32(script, monkeypatch):
    """--amp on the CPU: networks compute in bfloat16, weights, averages and terms stay float32, and
    the terms are within bfloat16's few percent of the float32 run."""
    logs = []
    for options in ("", "--amp"):
        model, epoch = prepare(script, options, monkeypatch)
        found = set()
        model.register_forward_hook(lambda model, x, logits: found.add(logits.dtype))
        log = script.train_epoch(*epoch)
        assert found == {torch.bfloat16 if options else torch.float32}
        kept = [*log.values(), *model.parameters(), *epoch[3:5]]
        assert all(t.dtype == torch.float32 for t in kept)
        logs.append(torch.stack([v for k, v in log.items() if k != "mHuber"]))
    assert torch.allclose(*logs, rtol=0.1, atol=0.05)


def test_compile_makes_one_graph_for_training_and_one_for_the_attack(monkeypatch):
    """--compile is model.compile(): two graphs, none more later, the names of weights unchanged."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, epoch = prepare(train_lma_at, "--steps 2", monkeypatch)
    names = list(model.state_dict())
    model.compile(backend=backend)
    train_lma_at.train_epoch(*epoch)
    torch._dynamo.reset()
    assert len(graphs) == 2 and list(model.state_dict()) == names


# -------------------------------------------------------------------- four scripts, one text

METHOD = (
    r"boosted|weighted_kl|kl\(|logits_nat = model|log_p_nat|attack-loss|inv-lambda"
    r"|--lambda|choices=\[\"margin\+ce\"|loss that PGD|terms\[|terms = |def objective|f\"loss "
    r"|mHuber\\n|loss = partial|eq\. 1|Table 1|if args\.(inv_)?lam|== \"kl\"|What the search"
)


@pytest.mark.parametrize("a, b", [*itertools.combinations(SCRIPTS, 2)])
def test_scripts_differ_in_the_method_alone(a, b):
    """`diff` of two scripts: under 72 lines, and outside docstring and loss functions only lines
    that name the method."""
    texts = [(ROOT / f"{s.__name__}.py").read_text() for s in (a, b)]
    changed = [line for line in difflib.ndiff(*(t.splitlines() for t in texts)) if line[0] in "+-"]
    assert len(changed) < 72
    for name in ("margin_loss", "train_epoch", "learning_rate", "main", "parse_args", "objective"):
        lines = difflib.ndiff(*(inspect.getsource(getattr(s, name)).splitlines() for s in (a, b)))
        strange = [line for line in lines if line[0] in "+-" and not re.search(METHOD, line)]
        assert not strange


# -------------------------------------------------------------------------- arguments, schedule


def test_defaults_are_the_papers(monkeypatch):
    """Section 5.1, in each script."""
    for script in SCRIPTS:
        a = parse(script, "", monkeypatch)
        assert (a.epochs, a.batch_size, a.lr, a.weight_decay) == (130, 100, 0.01, 3.5e-3)
        assert (a.epsilon, a.step_size, a.steps) == (8 / 255, 2 / 255, 10)
        assert (a.delta, a.tau, a.ema, a.margin_weight) == (0.9, 0.2, "slot", 1)
        assert (a.attack_loss, a.margin_reduction) == ("margin+ce", "mean")
        assert (a.dataset, a.arch, a.seed, a.val_size) == ("cifar10", "resnet18", 0, 1000)
        assert a.device == ("cuda" if torch.cuda.is_available() else "cpu")
        assert (a.data_dir, a.amp, a.compile, a.resume) == ("data", False, False, False)
        assert a.method == script.METHOD == script.__name__.removeprefix("train_")
    assert parse(train_trades_ours, "", monkeypatch).inv_lambda == 6
    assert parse(train_mart_ours, "", monkeypatch).lam == 5


BETA = {"cifar10": 86, "cifar100": 96, "tinyimagenet": 96, "folder": 86, "shapes": 86}
ALPHA = {"resnet18": 5.345, "wrn-34-10": 2.345, "wrn-10-1": 2.345}
PAPER = {(d, a): (ALPHA[a], BETA[d]) for d in BETA for a in ALPHA}
PAPER["tinyimagenet", "resnet18"] = (6.345, 96)
APART = {"dataset", "arch", "seed", "data_dir", "device", "compile", "run_dir", "resume"}
APART |= {"changed", "method", "processes"}  # no options


@pytest.mark.parametrize("script", SCRIPTS)
def test_alpha_and_beta_of_each_data_set_and_network(script, monkeypatch):
    """Section 5.1 for all combinations. Defaults that are typed by hand change nothing."""
    for (dataset, arch), expected in PAPER.items():
        options = f"--dataset {dataset} --arch {arch}"
        args = parse(script, options, monkeypatch)
        assert (args.alpha, args.beta) == expected and args.changed == {}
        typed = [
            f"{flag(name)} {value}"
            for name, value in vars(args).items()
            if name not in APART and value is not False
        ]
        assert len(typed) > 15
        again = parse(script, f"{options} {' '.join(typed)}", monkeypatch)
        assert vars(again) == vars(args)
        other = parse(script, f"{options} --alpha 1 --beta 2", monkeypatch)
        assert other.changed == {"alpha": 1, "beta": 2}


def flag(name):
    """The option that sets an argument of that name."""
    return "--lambda" if name == "lam" else f"--{name.replace('_', '-')}"


# for each argument that makes a run another one, a value that is not its default
OTHER = {
    "epochs": 2,
    "batch_size": 4,
    "lr": 0.5,
    "weight_decay": 0.1,
    "epsilon": 0.1,
    "step_size": 0.2,
    "steps": 3,
    "attack_loss": "ce",
    "delta": 2,
    "margin_reduction": "sum",
    "margin_weight": 5,
    "alpha": 3,
    "beta": 4,
    "tau": 0.5,
    "ema": "image",
    "val_size": 4,
    "amp": True,
}
WEIGHT = {train_trades_ours: {"inv_lambda": 2.5}, train_mart_ours: {"lam": 2.5}}  # of KL


def typed(changed):
    """{"tau": 0.5, ...} as options."""
    parts = [flag(k) if v is True else f"{flag(k)} {v}" for k, v in changed.items()]
    return " ".join(parts)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_named_after_what_is_changed(script, monkeypatch):
    """args.changed holds the options that differ from the defaults, and the folder's default name
    shows them, so that the runs of a sweep lie apart. Place and device of a run change neither.
    """
    method, default = script.METHOD, parse(script, "", monkeypatch)
    other = OTHER | WEIGHT.get(script, {})
    assert other.keys() == vars(default).keys() - APART
    assert (default.changed, default.run_dir) == ({}, f"runs/cifar10-resnet18-{method}-seed0")
    for name, value in other.items():
        args = parse(script, typed({name: value}), monkeypatch)
        assert args.changed == {name: value}
        assert args.run_dir == f"runs/cifar10-resnet18-{method}-{name}={value}-seed0"
    all_at_once = parse(script, typed(other), monkeypatch)
    assert all_at_once.changed == other and len(Path(all_at_once.run_dir).name) < 255

    place = parse(script, "--data-dir /d --device cuda:7 --compile --resume", monkeypatch)
    assert (place.changed, place.run_dir) == ({}, default.run_dir)
    apart = parse(script, "--dataset cifar100 --arch wrn-16-2 --seed 3 --tau 0.5", monkeypatch)
    assert apart.run_dir == f"runs/cifar100-wrn-16-2-{method}-tau=0.5-seed3"
    by_hand = parse(script, "--run-dir /r --tau 0.5", monkeypatch)
    assert (by_hand.changed, by_hand.run_dir) == ({"tau": 0.5}, "/r")


def test_dataset_shapes_alone_is_a_demonstration(monkeypatch):
    """It sets network, epochs, batch, learning rate and validation size, unless they are given."""
    for script in SCRIPTS:
        a = parse(script, "--dataset shapes", monkeypatch)
        assert (a.arch, a.epochs, a.batch_size, a.lr, a.val_size) == ("wrn-10-1", 3, 50, 0.05, 500)
        assert (a.alpha, a.changed) == (2.345, {})
        a = parse(script, "--dataset shapes --epochs 7 --arch resnet18", monkeypatch)
        assert (a.arch, a.epochs, a.batch_size) == ("resnet18", 7, 50)
        assert (a.alpha, a.changed) == (5.345, {"epochs": 7})


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_the_script_is_and_its_defaults(script, monkeypatch, capsys):
    """The docstring, and the defaults that are numbers or names: no "(default: None)"."""
    with pytest.raises(SystemExit) as stop:
        parse(script, "--help", monkeypatch)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and script.__doc__ in out
    assert out.startswith(f"usage: {script.__name__}.py [-h]")
    out = " ".join(out.split())
    assert "(default: 8/255)" in out and "(default: 130)" in out
    assert "None" not in out and "False" not in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_learning_rate_falls_in_the_75th_and_90th_of_130_epochs(script):
    rates = [script.learning_rate(e, 130, 0.01) for e in (1, 74, 75, 89, 90, 130)]
    assert rates == pytest.approx([0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


# ------------------------------------------------------------------------------ whole programs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """48 + 16 images, 16 x 16, four classes of colour, as a tree of folders. Not to be changed."""
    g, root = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for split, n in (("train", 12), ("test", 4)):
        for c, name in enumerate("abcd"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = g.integers(0, 256, (16, 16, 3)) // 2 + 30 * c
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


def small(images, folder):
    """Options of a run of a second."""
    return (
        f"--dataset folder --data-dir {shlex.quote(str(images))} --arch wrn-10-1 --batch-size 8"
        f" --val-size 8 --steps 2 --device cpu --run-dir {shlex.quote(str(folder))}"
    )


def call(script, options, monkeypatch):
    """The script's main() with these arguments, in this process."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *shlex.split(options)])
        script.main()


@pytest.fixture
def refuses(refused, monkeypatch):
    """refuses(script, options): the one line with which its main() ends."""
    return lambda script, options: refused(call, script, options, monkeypatch)


@pytest.fixture(scope="module")
def one_epoch(images, tmp_path_factory):
    """The folder of a run of one epoch. Not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(train_lma_at, f"{small(images, folder)} --epochs 1", monkeypatch)
    return folder


@pytest.fixture
def run(one_epoch, tmp_path):
    """A copy of that folder."""
    return Path(shutil.copytree(one_epoch, tmp_path / "run"))


def tensors(path):
    state = torch.load(path, weights_only=True)
    momentum = [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
    weights = [*state["model"].values(), *state["best"]["model"].values()]
    return [*weights, *momentum, state["ema_adv"], state["ema_nat"]]


def same(a, b):
    """Whether the last.pt of two run folders are equal bit for bit."""
    pairs = zip(tensors(a / "last.pt"), tensors(b / "last.pt"), strict=True)
    return all(torch.equal(s, t) for s, t in pairs)


def start(command):
    """A program as a user starts it; Ctrl-C reaches it although pytest may ignore it."""
    return subprocess.Popen(
        command,
        text=True,
        env=CPU,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_rows(path, rows, process):
    """Until `path` has more lines than `rows`, or the process ends."""
    for _ in range(12000):
        ended = process.poll() is not None
        if ended or path.exists() and len(path.read_text().splitlines()) > rows:
            return
        time.sleep(0.005)


def test_an_interrupted_and_killed_run_resumes_bit_identically(
    images, tmp_path, monkeypatch, capsys
):
    """Ctrl-C, then --resume as it says, kill -9, then to the end: weights, momentum and averages
    and metrics are the uninterrupted run's. A second start meanwhile is not let in."""
    run, whole = tmp_path / "my run", tmp_path / "whole"
    options, metrics = f"{small(images, run)} --epochs 9", run / "metrics.csv"
    command = [sys.executable, ROOT / "train_lma_at.py", *shlex.split(options)]
    process = start(command)
    wait_for_rows(metrics, 1, process)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(SystemExit):
        call(train_lma_at, options, monkeypatch)
    assert "is there; take another --run-dir" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err == "error: interrupted; the same command with --resume continues it\n"
    process = start([*command, "--resume"])
    wait_for_rows(metrics, len(metrics.read_text().splitlines()) + 2, process)
    process.kill()
    process.communicate()
    assert 3 < len(metrics.read_text().splitlines()) < 9
    call(train_lma_at, f"{options} --resume", monkeypatch)
    call(train_lma_at, f"{small(images, whole)} --epochs 9", monkeypatch)
    assert same(run, whole)
    a, b = (torch.load(folder / "best.pt", weights_only=True) for folder in (run, whole))
    assert a["epoch"] == b["epoch"]
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    a, b = (
        [row | {"images/s": ""} for row in csv.DictReader(open(folder / "metrics.csv"))]
        for folder in (run, whole)
    )
    assert a == b and len(a) == 9


def test_a_run_per_image_resumes_bit_identically(images, tmp_path, monkeypatch):
    """--ema image: one moving average for each training image, in last.pt too."""
    options = "--epochs 2 --ema image"
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(train_at_ours, "learning_rate", lambda epoch, *_: [0.01][epoch - 1])
        call(train_at_ours, f"{small(images, tmp_path / 'run')} {options}", patch)
    call(train_at_ours, f"{small(images, tmp_path / 'run')} {options} --resume", monkeypatch)
    call(train_at_ours, f"{small(images, tmp_path / 'whole')} {options}", monkeypatch)
    assert same(tmp_path / "run", tmp_path / "whole")
    assert tensors(tmp_path / "run" / "last.pt")[-1].shape == (40, 4)


def test_a_run_folder_holds_what_it_should(images, one_epoch, run, monkeypatch, capsys):
    """args.json, a row of metrics an epoch, examples.png, checkpoints that know their data; a
    finished run that is resumed prints its results once more."""
    names = {"best.pt", "last.pt", "args.json", "metrics.csv", "examples.png"}
    assert {path.name for path in run.iterdir()} == names
    args = json.loads((run / "args.json").read_text())
    state = torch.load(run / "best.pt", weights_only=True)
    place = {"data_dir": str(images), "run_dir": str(one_epoch), "device": "cpu", "resume": False}
    assert state["args"] == args | place
    assert args["method"] == "lma_at" and args["alpha"] == 2.345 and args["changed"]["steps"] == 2
    assert args["classes"] == ["a", "b", "c", "d"] and "48 images of 16x16" in args["data"]
    assert Image.open(run / "examples.png").width > 10 * 32
    call(train_lma_at, f"{small(images, run)} --epochs 1 --resume", monkeypatch)
    out = capsys.readouterr().out
    assert "1 epochs on cpu, 1 done" in out and "best.pt: epoch 1, test accuracy" in out
    assert "last.pt" not in out  # the last epoch is the best: it is tested once


TERMS = {
    train_lma_at: ["L'", "BCE", "mHuber"],
    train_at_ours: ["L'", "CE", "mHuber"],
    train_trades_ours: ["L'", "CE", "KL", "mHuber"],
    train_mart_ours: ["L'", "BCE", "KL", "mHuber"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_pasted_into_a_notebook_trains(script, images, tmp_path, monkeypatch):
    """Its text alone, under no file's name: METHOD says what is trained. metrics.csv has a column
    for each term, and the weights are those of the script."""
    options = f"{small(images, tmp_path / 'pasted')} --epochs 1"
    monkeypatch.setattr(sys, "argv", ["cell", *shlex.split(options)])
    exec(Path(script.__file__).read_text(), {"__name__": "__main__"})
    call(script, f"{small(images, tmp_path / 'called')} --epochs 1", monkeypatch)
    assert same(tmp_path / "pasted", tmp_path / "called")
    state = torch.load(tmp_path / "pasted" / "last.pt", weights_only=True)
    assert state["args"]["method"] == script.__name__.removeprefix("train_")
    columns = ["epoch", "lr", *TERMS[script], "images/s", "val clean", "val PGD-10"]
    assert (tmp_path / "pasted" / "metrics.csv").read_text().split("\n")[0] == ",".join(columns)


def test_without_validation_there_is_no_best(images, tmp_path, monkeypatch):
    """--val-size 0 keeps last.pt alone; --resume starts a run where there is none."""
    options = "--epochs 1 --val-size 0 --resume"
    call(train_at_ours, f"{small(images, tmp_path / 'run')} {options}", monkeypatch)
    assert (tmp_path / "run/last.pt").exists() and not (tmp_path / "run/best.pt").exists()


# ------------------------------------------------------------------ what main() gives the loop


@pytest.mark.parametrize("script", SCRIPTS)
def test_main_trains_and_chooses_as_section_5_1_says(script, tmp_path, monkeypatch, capsys):
    """The loop and the accuracies are played, and record what they are given: weights that follow
    from the seed; SGD over all of them with momentum, weight decay and each epoch's learning rate;
    moving averages from zero that stay over the epochs; augmented batches of the training images
    alone in an order of their own each epoch; PGD-10 on the held-out images, which alone chooses
    best.pt; PGD-20 at 1/255 on the test images, once for each checkpoint; --amp in all of these.
    What is saved: the classes, a row for each epoch with the mean of the processes' terms."""
    x = torch.arange(1, 61).byte().view(-1, 1, 1, 1).repeat(1, 3, 16, 16)  # image i is all i
    y, classes = torch.arange(60) % 4, list("abcd")
    data = {"train": common.Data(x[:40], y[:40], classes)}
    data["test"] = common.Data(x[40:], y[40:], classes)
    epochs, tested, compiled = [], [], []
    # validation: clean and PGD-10; then the test of last.pt and best.pt
    scores = [(50, 20), (40, 30), (60, 25), (70, 30), *[(80, 10)] * 9, (1, 2), (3, 4)]

    def train_epoch(model, optimizer, batches, past_adv, past_nat, args):
        assert args.amp is True and past_adv is not past_nat
        assert past_adv.shape == past_nat.shape == (8, 4)
        assert (past_adv == len(epochs)).all() and (past_nat == -len(epochs)).all()
        past_adv += 1
        past_nat -= 1
        (group,) = optimizer.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
        if not epochs:
            torch.manual_seed(7)
            fresh = common.make_model("wrn-10-1", 4).state_dict()
            assert all(torch.equal(v, fresh[k]) for k, v in model.state_dict().items())
        epochs.append((group.copy(), list(batches)))
        model.fc.bias.data.fill_(len(epochs))
        return {"BCE": torch.tensor(len(epochs) + 0.5)}

    def accuracy(model, x, y, epsilon, step_size, steps, batch_size, amp=False):
        tested.append(
            (
                x[:, 0, 0, 0].tolist(),
                y.tolist(),
                epsilon,
                step_size,
                steps,
                amp,
                model.fc.bias[0].item(),
            )
        )
        return scores[len(tested) - 1]

    def all_sum(tensor):  # of two processes, of which the other's terms are greater by one
        return 2 * tensor + 1 if tensor.dim() == 0 else tensor

    monkeypatch.setattr(common, "load_data", lambda name, data_dir, split: data[split])
    monkeypatch.setattr(common, "accuracy", accuracy)
    monkeypatch.setattr(common, "all_sum", all_sum)
    monkeypatch.setattr(script, "WORLD", 2)
    monkeypatch.setattr(script, "train_epoch", train_epoch)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, mode: compiled.append(mode))
    call(
        script,
        "--dataset folder --arch wrn-10-1 --epochs 13 --batch-size 16 --lr 0.1 --val-size 8"
        " --weight-decay 0.02 --epsilon 6/255 --seed 7 --device cpu --amp --compile --run-dir "
        f"{tmp_path}",
        monkeypatch,
    )

    rates = [group["lr"] for group, _ in epochs]
    assert rates == pytest.approx([0.1] * 8 + [0.01] + [0.001] * 4)
    assert compiled == ["reduce-overhead"]
    for group, _ in epochs:
        assert (group["momentum"], group["weight_decay"]) == (0.9, 0.02)
        assert not group["nesterov"] and group["dampening"] == 0

    x_train, y_train, x_val, y_val = common.hold_out(data["train"], 8, "cpu")
    val = x_val[:, 0, 0, 0].tolist()
    for epoch, (_, batches) in enumerate(epochs, 1):
        images = torch.cat([x for x, _, _ in batches])
        rows = torch.cat([rows for _, _, rows in batches])
        brightest = (255 * images.amax((1, 2, 3))).round().long().tolist()
        assert sorted(brightest + val) == list(range(1, 41))
        assert brightest == x_train[rows, 0, 0, 0].tolist()
        assert torch.equal(torch.cat([y for _, y, _ in batches]), y_train[rows])
        assert (images.amin((1, 2, 3)) == 0).sum() > 20  # cropped with the padding
        expected = common.shuffled_batches(x_train, y_train, 16, 7, epoch)
        assert torch.equal(rows, torch.cat([rows for _, _, rows in expected]))

    assert tested[:13] == [
        (val, y_val.tolist(), 6 / 255, 1.5 / 255, 10, True, epoch) for epoch in range(1, 14)
    ]
    assert tested[13:] == [
        (list(range(41, 61)), data["test"].y.tolist(), 6 / 255, 1 / 255, 20, True, epoch)
        for epoch in (13, 2)
    ]
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    assert state["epoch"] == 2 and (state["model"]["fc.bias"] == 2).all()
    assert state["done"] == 13
    assert state["args"]["classes"] == classes and "40 images of 16x16" in state["args"]["data"]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    kept = ["epoch", "lr", "BCE", "val clean", "val PGD-10"]
    assert [[float(row[name]) for name in kept] for row in rows] == [
        [epoch, pytest.approx(rates[epoch - 1]), epoch + 1, *scores[epoch - 1]]
        for epoch in range(1, 14)
    ]
    assert all(float(row["images/s"]) > 0 for row in rows)
    out = capsys.readouterr().out
    assert "last.pt: epoch 13, test accuracy 1.00 % clean, 2.00 % PGD-20, epsilon 6/255" in out
    assert "best.pt: epoch 2, test accuracy 3.00 % clean, 4.00 % PGD-20" in out


# ---------------------------------------------------------------- the bookkeeping of a run


def play(script, monkeypatch, scores):
    """Let every epoch add 1 to the last bias and every test return the next of `scores`. Returns
    what the tests were given, and that bias."""
    calls, results = [], iter(scores)

    def accuracy(model, x, y, epsilon, step_size, steps, batch_size, amp):
        calls.append((len(x), epsilon, step_size, steps, amp, model.fc.bias[0].item()))
        return next(results)

    def train_epoch(model, *_):
        model.fc.bias.data += 1
        return {"BCE": torch.ones(())}

    monkeypatch.setattr(common, "accuracy", accuracy)
    monkeypatch.setattr(script, "train_epoch", train_epoch)
    return calls


class Begun(Exception):
    """Raised in place of the first epoch."""


def begin(*_):
    raise Begun


@pytest.mark.parametrize("script", SCRIPTS)
def test_natural_training_chooses_by_clean_accuracy(script, images, tmp_path, monkeypatch):
    """--epsilon 0 validates without an attack and stores no accuracy under one; the final test is
    at the 8/255 of all others."""
    scores = [(50, 90), (70, 10), (60, 95), (1, 2), (3, 4)]
    calls = play(script, monkeypatch, scores)
    call(script, f"{small(images, tmp_path)} --epochs 3 --epsilon 0", monkeypatch)
    assert calls[:3] == [(8, 0, 0, 10, False, epoch) for epoch in (1, 2, 3)]
    assert calls[3:] == [(16, 8 / 255, 1 / 255, 20, False, epoch) for epoch in (3, 2)]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["val clean"] for row in rows] == ["50", "70", "60"]
    assert "val PGD-10" not in rows[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_says_what_is_changed(script, images, tmp_path, monkeypatch, capsys):
    """The first lines tell all numbers that decide a run. What is changed is among them, in the
    saved arguments, and in the name of the folder that is made."""
    other = OTHER | WEIGHT.get(script, {})
    options = small(images, "unused").rpartition(" --run-dir")[0]
    play(script, monkeypatch, [(50, 40)] * 4)
    monkeypatch.chdir(tmp_path)
    call(script, f"{options} {typed(other)}", monkeypatch)
    (folder,) = (tmp_path / "runs").iterdir()
    parts = [f"{name}={value}" for name, value in other.items()]
    assert folder.name.startswith(f"folder-wrn-10-1-{script.METHOD}-")
    assert folder.name.endswith("-seed0") and all(f"-{part}-" in folder.name for part in parts)
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["args"]["changed"] == other
    assert json.loads((folder / "args.json").read_text())["changed"] == other

    out = capsys.readouterr().out.partition("epoch 1")[0]
    assert out.startswith(f"{script.METHOD} on folder: 44 training, 4 validation, 16 test images")
    said = re.search("; not the default: (.*)", out)[1].split(", ")
    assert sorted(said) == sorted(parts)
    kl = ["2.5 KL"] if script in WEIGHT else []
    numbers = "lr 0.5, batch 4, epsilon 25.5/255, step size 51/255, 3 steps, delta 2, alpha 3"
    for part in [numbers, "beta 4, tau 0.5", "loss 5 L'", *kl, "4 mHuber", "2 epochs on cpu"]:
        assert part in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_with_the_defaults_says_them(script, tmp_path, monkeypatch, capsys):
    """All numbers of section 5.1, and that nothing is changed."""
    x, y = torch.zeros(1100, 3, 4, 4, dtype=torch.uint8), torch.arange(1100) % 10
    data = common.Data(x, y, list("ABCDEFGHIJ"))
    monkeypatch.setattr(common, "load_data", lambda *_: data)
    monkeypatch.setattr(script, "train_epoch", begin)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Begun):
        call(script, "--device cpu", monkeypatch)
    out = capsys.readouterr().out
    assert (
        "lr 0.01, batch 100, epsilon 8/255, step size 2/255, 10 steps, delta 0.9, alpha 5.345, "
        "beta 86, tau 0.2; not the default: nothing\n130 epochs on cpu, 0 done; "
        f"folder runs/cifar10-resnet18-{script.METHOD}-seed0\n"
    ) in out
    assert "loss 1 L' + " in out and " + 86 mHuber\n" in out
    kl = {train_trades_ours: "CE(x) + 6 KL +", train_mart_ours: "BCE + 5 KL (1 - p_y) +"}
    assert kl.get(script, "CE + 86 mHuber") in out


def test_after_a_resume_the_best_epoch_is_the_best_of_all(images, tmp_path, monkeypatch):
    """best.pt stays that of the first epoch, although the third is the best since the resume."""
    options = f"{small(images, tmp_path)} --epochs 3"
    play(train_lma_at, monkeypatch, [(50, 40)])
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(train_lma_at, "learning_rate", lambda epoch, *_: [0.01][epoch - 1])
        call(train_lma_at, options, monkeypatch)
    play(train_lma_at, monkeypatch, [(50, 20), (50, 30), (1, 2), (3, 4)])
    call(train_lma_at, f"{options} --resume", monkeypatch)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["epoch"], best["done"]) == (1, 3) and (best["model"]["fc.bias"] == 1).all()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["val PGD-10"] for row in rows] == ["40", "20", "30"]


@pytest.mark.parametrize("content", [None, b"half", [1, 2], {"model": {}, "args": {}, "epoch": 9}])
def test_best_pt_and_metrics_csv_are_written_and_never_read(
    content, images, tmp_path, monkeypatch, capsys
):
    """Missing, damaged, foreign or stale, a resume writes them anew, from last.pt. It tests the
    weights of the best epoch that are in last.pt, and leaves all other files as they are."""
    options, tests = f"{small(images, tmp_path)} --epochs 2", [(1, 2), (3, 4)]
    play(train_lma_at, monkeypatch, [(50, 40), (50, 20), *tests])
    call(train_lma_at, options, monkeypatch)
    out = capsys.readouterr().out.partition("last.pt: ")[2]
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    metrics = (tmp_path / "metrics.csv").read_text()

    for name in ("best.pt", "metrics.csv"):
        (tmp_path / name).unlink()
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        elif content:
            torch.save(content, tmp_path / name)
    (tmp_path / "notes.txt").write_text("mine")
    calls = play(train_lma_at, monkeypatch, tests)
    call(train_lma_at, f"{options} --resume", monkeypatch)
    assert [bias for *_, bias in calls] == [2, 1]
    assert capsys.readouterr().out.partition("last.pt: ")[2] == out
    again = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (again["epoch"], again["args"]) == (1, best["args"])
    assert all(torch.equal(v, best["model"][k]) for k, v in again["model"].items())
    assert (tmp_path / "metrics.csv").read_text() == metrics
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_the_final_test_follows_from_the_seed(images, tmp_path, monkeypatch, capsys):
    """A run prints the same numbers as the continuation that does no more than test. Here the
    accuracies are random numbers, of which validation draws too."""

    def accuracy(*_):
        return (100 * torch.rand(2)).tolist()

    play(train_lma_at, monkeypatch, [])
    monkeypatch.setattr(common, "accuracy", accuracy)
    printed = []
    for options in ("", "--resume", "--resume"):
        torch.rand(7)  # whatever was drawn before
        call(train_lma_at, f"{small(images, tmp_path)} --epochs 3 {options}", monkeypatch)
        printed.append(re.findall("^.*test accuracy.*$", capsys.readouterr().out, re.M))
    assert printed[0] and printed == [printed[0]] * 3


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_time_left_of_a_run(script, images, tmp_path, monkeypatch, capsys):
    """Epochs of ten seconds: after the first of five, 40 seconds are left. A resumed run counts
    its own epochs alone."""
    now = [1000.0]

    def train_epoch(*_):
        now[0] += 10
        return {"BCE": torch.ones(())}

    options = f"{small(images, tmp_path)} --epochs 5"
    play(script, monkeypatch, [(50, 40)] * 7)
    monkeypatch.setattr(script, "train_epoch", train_epoch)
    monkeypatch.setattr(time, "time", lambda: now[0])
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(script, "learning_rate", lambda epoch, *_: [0.1, 0.1][epoch - 1])
        call(script, options, patch)
    call(script, f"{options} --resume", monkeypatch)
    shown = re.findall(r"images/s (\S+) .* left (\S+)", capsys.readouterr().out)
    left = ["0:00:40", "0:00:30", "0:00:20", "0:00:10", "0:00:00"]
    assert shown == [("4", time) for time in left]  # 40 images in ten seconds


@pytest.mark.parametrize("name", [*OTHER, "arch", "seed", "compile"])
def test_every_argument_is_compared_on_resume(name, images, run, monkeypatch, refuses):
    """A run goes on with the arguments with which it began; the line names the one that differs."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *_, **__: None)
    value = ({"arch": "wrn-10-2", "seed": 1, "compile": True} | OTHER)[name]
    options = f"{small(images, run)} --epochs 1 --resume {typed({name: value})}"
    assert f"{name} was " in refuses(train_lma_at, options)


@pytest.mark.parametrize("script", WEIGHT)
def test_the_weight_of_kl_is_compared_on_resume(script, images, tmp_path, monkeypatch, refuses):
    """The one argument that these scripts alone have."""
    options, ((name, value),) = f"{small(images, tmp_path)} --epochs 1", WEIGHT[script].items()
    play(script, monkeypatch, [(50, 40)] * 2)
    call(script, options, monkeypatch)
    error = refuses(script, f"{options} --resume {typed({name: value})}")
    assert f"{name} was " in error and f", is {value}" in error


def test_a_run_may_move_with_its_data(images, run, tmp_path, monkeypatch, capsys):
    """Folder, place of the data and device may be others after a resume."""
    moved = shutil.copytree(images, tmp_path / "moved data")
    options = f"{small(moved, run)} --epochs 1 --device cpu:0 --resume"
    call(train_lma_at, options, monkeypatch)
    assert "1 epochs on cpu:0, 1 done" in capsys.readouterr().out


def its_args_json(text):
    return text


@pytest.mark.parametrize("resume", ["", "--resume"])
@pytest.mark.parametrize(
    "content, begins",
    [
        ({}, True),
        ({"args.json": its_args_json}, True),
        ({"last.pt.123.tmp": b"half", "args.json.123.tmp": b""}, True),
        ({"args.json": its_args_json, "last.pt.123.tmp": b"half"}, True),
        ({"args.json": lambda text: text.replace(b'"seed": 0', b'"seed": 1')}, False),
        ({"args.json": b'{"mine": 1}'}, False),
        ({"args.json": b"{"}, False),
        ({"args.json": b""}, False),
        ({"args.json": b"\xff\xfe{\x00}\x00"}, False),  # UTF-16
        ({"notes.txt": b"mine"}, False),
        ({"plots/notes.tmp": b"mine"}, False),
        ({"best.pt": b"a run's"}, False),
        ({"metrics.csv": b"epoch"}, False),
        ({"args.json": its_args_json, "best.pt": b"a run's"}, False),
        ({"args.json": its_args_json, "examples.png": b"mine"}, False),
    ],
)
def test_where_a_run_begins(
    content, begins, resume, images, one_epoch, tmp_path, monkeypatch, refuses
):
    """Without a last.pt, in a folder that holds nothing but what a run of these settings leaves
    that was killed in its first epoch; with --resume as without. No file is changed."""
    for name, text in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        ours = (one_epoch / "args.json").read_bytes()
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text(ours))

    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before, options = files(), f"{small(images, tmp_path)} --epochs 1 {resume}"
    monkeypatch.setattr(train_lma_at, "train_epoch", begin)
    if begins:
        with pytest.raises(Begun):
            call(train_lma_at, options, monkeypatch)
        ours = {tmp_path / "args.json": (one_epoch / "args.json").read_bytes()}
        assert files() == before | ours
    else:
        error = refuses(train_lma_at, options)
        assert "is there; take another --run-dir" in error and str(tmp_path) in error
        assert files() == before


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "metrics.csv"])
@pytest.mark.parametrize("epoch", [1, 2])
def test_a_kill_between_two_saves_loses_nothing(name, epoch, images, tmp_path, monkeypatch):
    """Killed before the save of one of the three files, a run resumes to the same files."""
    scores, replace, saves = [(50, 40), (50, 60), (1, 2)], os.replace, itertools.count(1)

    def killed(part, path):
        if path.name == name and next(saves) == epoch:
            raise KeyboardInterrupt
        replace(part, path)

    options = f"{small(images, tmp_path / 'run')} --epochs 2"
    play(train_lma_at, monkeypatch, scores)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        call(train_lma_at, options, patch)
    done = epoch if name != "last.pt" else epoch - 1
    play(train_lma_at, monkeypatch, [*scores[done:2], *2 * scores[2:]])
    call(train_lma_at, f"{options} --resume", monkeypatch)
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert best["epoch"] == best["done"] == 2
    assert set(best) == {"model", "args", "epoch", "done"}
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["val PGD-10"] for row in rows] == ["40", "60"]


@pytest.mark.parametrize("n, shown", [(3, [0, 1, 2]), (30, [*range(0, 30, 3)])])
def test_examples_png_has_three_rows_of_images(n, shown, tmp_path, monkeypatch):
    """Natural, adversarial, difference: a row each, also for fewer than ten test images.

    They are spread over the test set, since the images of a folder lie class by class.
    """
    monkeypatch.chdir(tmp_path)
    y = torch.arange(n)
    x = (y * (240 // n)).byte().view(-1, 1, 1, 1).repeat(1, 3, 8, 8)  # each of one grey of its own
    data, model = common.Data(x, y, "ab"), common.make_model("wrn-10-1", n)
    args = argparse.Namespace(run_dir=".", epsilon=0.1, epochs=1, seed=0, batch_size=4, amp=False)
    common.final_test(model, None, data, args, "cpu")
    picture = np.asarray(Image.open("examples.png"))
    columns = len(shown)
    assert picture.shape[:2] == (3 * 34 + 2, columns * 34 + 2)  # 8 x 8, enlarged to 32 x 32
    greys = [picture[18, 18 + 34 * i, 0] for i in range(columns)]
    assert greys == x[shown, 0, 0, 0].tolist()
    natural, adversarial, difference = (
        picture[2 + 34 * row : 34 + 34 * row, 2:34].astype(float) for row in range(3)
    )
    moved = adversarial - natural  # by up to 20 steps of 1/255
    assert np.abs(moved).max() == pytest.approx(20, abs=1)
    # epsilon, 0.1, is drawn as half of all grey values; the picture has 8 bits
    assert np.abs(difference - (127.5 + moved / 0.2)).max() < 6


def interrupted():
    raise KeyboardInterrupt


def test_ctrl_c_ends_a_program_and_not_the_notebook_that_runs_it(capsys):
    """A SystemExit, which a notebook's %run survives, with the status of an interrupt."""
    with pytest.raises(SystemExit) as stop:
        common.run(interrupted, "with --resume")
    assert stop.value.code == 130
    assert "the same command with --resume continues it" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_a_terminal_and_from_one_process(monkeypatch):
    """Each line replaces the one before; a file, a pipe and the other processes get none."""
    for stderr, rank, expected in (
        (Terminal(), 0, "\r\033[Kone\r\033[Ktwo"),
        (Terminal(), 1, ""),
        (io.StringIO(), 0, ""),
    ):
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setattr(common, "RANK", rank)
        common.live("one")
        common.live("two")
        assert stderr.getvalue() == expected


def test_the_time_left_of_an_epoch(monkeypatch):
    """Ten batches of which each takes a second: after the first, nine seconds are left."""
    shown = []
    monkeypatch.setattr(common, "live", shown.append)
    monkeypatch.setattr(common.time, "time", lambda: now[0])
    now = [0.0]
    for _ in common.progress(range(10), 10, "epoch 1/3"):
        now[0] += 1
    assert shown[0] == "epoch 1/3: 1 of 10, 0:00:09 left"
    assert shown[4] == "epoch 1/3: 5 of 10, 0:00:05 left"
    assert len(shown) == 11 and shown[-1] == ""  # in the end the line is cleared


def test_under_torchrun_a_process_that_fails_ends_at_once(monkeypatch):
    """Exit handlers would wait for the other processes, which wait for this one."""

    class Ended(Exception):
        pass

    def end(status):
        raise Ended(status)

    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(os, "_exit", end)
    for ending, status in ((lambda: common.fail("no"), 2), (interrupted, 130)):
        with pytest.raises(Ended) as stop:
            common.run(ending, "again")
        assert stop.value.args == (status,)


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, words",
    [
        ("--epsilon 8", "--epsilon"),
        ("--epsilon 1", "--epsilon"),
        ("--step-size 1", "--step-size"),
        ("--epsilon lots", "--epsilon"),
        ("--dataset mnist", "mnist"),
        ("--tau 1", "--tau"),
        ("--attack-loss mse", "--attack-loss"),
        ("--margin-reduction max", "--margin-reduction"),
        ("--ema class", "--ema"),
        ("--seed x", "--seed"),
        ("--seed 0.5", "--seed"),
        ("--seed -1", "--seed"),
        ("--epochs 0", "--epochs"),
        ("--steps 0", "--steps"),
        ("--alpha 0", "--alpha"),
        ("--batch-size 1", "--batch-size"),
        ("--batch-size 64", "--batch-size"),
        ("--arch wrn-12-1", "6n+4"),
        ("--device nonsense", "--device"),
        ("--nonsense", "--nonsense"),
        ("--batch-size 100/2", "100/2"),
        ("--val-size 48", "--val-size"),
        ("--val-size 49", "--val-size"),
        ("--lr 1e39", "--lr"),
        ("--lr 1/0", "--lr"),
        ("--lr nan", "--lr"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_input_ends_in_one_line(script, options, words, images, tmp_path, refuses):
    """Exit status 2, one line on stderr that names the argument, and no run folder begun."""
    assert words in refuses(script, f"{small(images, tmp_path / 'run')} {options}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_choices_and_numbers_of_a_script(script, monkeypatch, refused):
    """--seed is an integer, a radius ends at 254/255, and TRADES alone has its attack."""
    args = parse(script, "--seed 7 --epsilon 254/255 --step-size 254/255", monkeypatch)
    assert args.seed == 7 and type(args.seed) is int
    assert (args.epsilon, args.step_size) == (254 / 255, 254 / 255)
    if script is train_trades_ours:
        assert parse(script, "--attack-loss kl", monkeypatch).attack_loss == "kl"
    else:
        assert "--attack-loss" in refused(parse, script, "--attack-loss kl", monkeypatch)


def test_a_run_is_never_overwritten_nor_resumed_with_other_settings(images, run, refuses):
    """A folder with a run in it is not taken; with --resume the line names the difference."""
    options, before = f"{small(images, run)} --epochs 1", (run / "last.pt").read_bytes()
    assert "is there" in refuses(train_lma_at, options)
    assert "lr was 0.01, is 0.5" in refuses(train_lma_at, f"{options} --resume --lr 0.5")
    (run / "args.json").unlink()
    assert "is there" in refuses(train_lma_at, options)
    assert "lr was 0.01, is 0.5" in refuses(train_lma_at, f"{options} --resume --lr 0.5")
    error = refuses(train_at_ours, f"{options} --resume")
    assert "method was lma_at, is at_ours" in error
    assert (run / "last.pt").read_bytes() == before


def half(path):
    path.write_bytes(path.read_bytes()[:1000])


def empty_dict(path):
    torch.save({}, path)


def best_pt(path):
    shutil.copy(path.with_name("best.pt"), path)


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [half, empty_dict, best_pt, a_folder])
def test_what_is_not_the_last_pt_of_a_run_is_refused(spoil, images, run, refuses):
    """Damaged, foreign, a best.pt that was copied to its place, a folder: one line names it."""
    spoil(run / "last.pt")
    assert "last.pt" in refuses(train_lma_at, f"{small(images, run)} --epochs 1 --resume")


def rename_a_class(root):
    for split in ("train", "test"):
        (root / split / "a").rename(root / split / "z")


def add_a_class(root):
    for split in ("train", "test"):
        shutil.copytree(root / split / "a", root / split / "z")


def change_an_image(root):
    shutil.copy(root / "train" / "a" / "0.png", root / "train" / "a" / "1.png")


@pytest.mark.parametrize(
    "change, words",
    [
        (rename_a_class, "classes was ['a', 'b', 'c', 'd'], is ['b', 'c', 'd', 'z']"),
        (add_a_class, "classes was ['a', 'b', 'c', 'd'], is ['a', 'b', 'c', 'd', 'z']"),
        (change_an_image, "data was 48 images of 16x16, checksum"),
    ],
)
def test_a_run_knows_its_data(change, words, images, run, tmp_path, refuses):
    """--resume with other classes or other images is refused in one line that names the change."""
    changed = shutil.copytree(images, tmp_path / "changed")
    change(changed)
    assert words in refuses(train_lma_at, f"{small(changed, run)} --epochs 1 --resume")


def test_a_term_that_is_not_finite_stops_the_run(images, tmp_path, monkeypatch, refuses):
    """The message names epoch and term; the checkpoint of the epoch before stays."""
    really, calls = train_lma_at.margin_loss, itertools.count()
    monkeypatch.setattr(
        train_lma_at,
        "margin_loss",  # 3 calls a step, 5 steps an epoch
        lambda *a: really(*a) * (torch.inf if next(calls) == 26 else 1),
    )
    error = refuses(train_lma_at, f"{small(images, tmp_path)} --epochs 5")
    assert error.startswith("error: epoch 2: L' is not finite")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_that_diverge_in_the_last_step_are_not_saved(
    script, epochs, images, tmp_path, monkeypatch, refuses
):
    """An infinite weight after the last step of an epoch, with terms that are finite: best.pt and
    last.pt stay those of the epoch before, or do not appear."""

    def train_epoch(model, *rest):
        model.fc.bias.data[0] = torch.inf if next(count) == epochs else 0
        return {"BCE": torch.ones(())}

    count = itertools.count(1)
    monkeypatch.setattr(script, "train_epoch", train_epoch)
    error = refuses(script, f"{small(images, tmp_path)} --epochs {epochs}")
    assert f"epoch {epochs}: fc.bias is not finite" in error
    for name in ("best.pt", "last.pt"):
        assert (tmp_path / name).exists() == (epochs == 2)
        if epochs == 2:
            state = torch.load(tmp_path / name, weights_only=True)
            assert state["epoch"] == 1 and state["model"]["fc.bias"].isfinite().all()


# --------------------------------------------------------------- how programs end, what they print


def closed_pipe():
    """A file number that nobody reads any more, as after `| head -1`."""
    read, write = os.pipe()
    os.close(read)
    return write


def gpu_without_memory():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "error, words",
    [
        (gpu_without_memory, "smaller --batch-size"),
        (lambda: bytearray(2**62), "smaller --batch-size"),
        (lambda: np.empty(2**50), "smaller --batch-size"),
        (lambda: open("/nowhere/file", "w"), "/nowhere/file"),
        (lambda: os.write(closed_pipe(), b"x"), "Broken pipe"),
    ],
)
def test_a_machine_that_fails_is_one_line(error, words, capsys):
    """Out of memory (a GPU's, Python's and numpy's), a place that is not there, no reader."""
    with pytest.raises(SystemExit) as stop:
        common.run(error, "again")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_what_is_our_fault_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="size"):
        common.run(lambda: torch.ones(2) + torch.ones(3), "again")


@pytest.mark.parametrize(
    "epsilon, val_size", [("8/255", 8), ("2/255", 0), ("0.031", 8), ("0.0123456789", 8)]
)
def test_the_printed_command_evaluates_the_run(
    epsilon, val_size, images, tmp_path, monkeypatch, capsys
):
    """The command that a run prints last, as a shell reads it, evaluates that run.

    The name of its folder has a blank, and epsilon is the run's own to the last bit.
    """
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 64)  # its main() sets it
    folder = tmp_path / "my run"
    options = f"{small(images, folder)} --epochs 1 --epsilon {epsilon} --val-size {val_size}"
    call(train_lma_at, options, monkeypatch)
    (command,) = re.findall("^next: python (.*)$", capsys.readouterr().out, re.M)
    program, *options = shlex.split(command)
    assert (program, options[0]) == ("evaluate.py", str(folder))
    call(evaluate, f"{shlex.join(options)} --n 8 --attacks FGSM --device cpu", monkeypatch)
    assert "FGSM" in capsys.readouterr().out
    (results,) = folder.glob("*.eval.json")
    settings = json.loads(results.read_text())["settings"]
    assert settings["epsilon"] == common.radius(epsilon)


def bars_and_tints(n, seed):
    """Images of three classes with two features.

    Broad bars (lying, standing or crossed) stand out by 0.15, but a fifth of the images show bars
    drawn by lot. A tint of 4/255 (red, green or blue) is always that of the class: an attack of
    8/255 turns it into the tint of another class and leaves the bars.
    """
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    shown = torch.where(torch.rand(n, generator=g) < 0.8, y, torch.randint(3, (n,), generator=g))
    bars = (torch.arange(16) // 4 % 2 * 2.0 - 1).expand(16, 16)
    bars = torch.stack([bars, bars.T, bars * bars.T])[shown, None]
    x = 0.5 + 0.15 * bars + 4 / 255 * (2 * torch.eye(3)[y, :, None, None] - 1)
    x += 0.02 * torch.randn(n, 3, 16, 16, generator=g)
    return (255 * x).round().byte(), y


def test_lma_at_beats_natural_training_under_attack(tmp_path, monkeypatch, capsys):
    """The point of it all, end to end: LMA-AT resists PGD-20 of 8/255, natural training does not.

    LMA-AT had to learn the bars, natural training learns the tint. The difference is at least 40
    points. Training without x' cannot reach it: it ends at chance, a third, at best.
    """
    data = {"train": bars_and_tints(600, 0), "test": bars_and_tints(100, 1)}
    monkeypatch.setattr(
        common, "load_data", lambda name, data_dir, split: common.Data(*data[split], list("ABC"))
    )
    shared = (
        "--dataset shapes --batch-size 20 --lr 0.03 --steps 2 --step-size 8/255 --val-size 0"
        " --device cpu"
    )
    robust = []
    for script, options in ((train_lma_at, ""), (train_at_ours, f"--epsilon 0 {PLAIN}")):
        folder = tmp_path / script.__name__
        call(script, f"{shared} {options} --run-dir {folder}", monkeypatch)
        found = re.search(r"(\S+) % PGD-20, epsilon 8/255", capsys.readouterr().out)
        robust.append(float(found[1]))
    lma, natural = robust
    assert lma - natural >= 40, robust


# --------------------------------------------------------------------------------- many processes

WORKER = """
import importlib, sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import common

SCRIPTS = [importlib.import_module(name) for name in {scripts!r}]

def everyone(t):
    found = [torch.empty_like(t) for _ in range(2)]
    dist.all_gather(found, t.contiguous())
    return found

def mean(t):
    return sum(everyone(t)) / 2

def floats(tensors):
    return [t for t in tensors if t.is_floating_point()]

def gradients_and_buffers_are_averaged():
    torch.manual_seed(0)
    model = common.make_model("wrn-10-1", 10)
    x, y = torch.rand(4, 3, 16, 16) + common.RANK, torch.arange(4)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    count, weights = torch.tensor(5 + common.RANK), list(model.parameters())
    expected = [mean(t) for t in [*(w.grad for w in weights), *floats(model.buffers())]]
    common.average(w.grad for w in weights)
    common.average([count, *model.buffers()])
    for t, e in zip([*(w.grad for w in weights), *floats(model.buffers())], expected):
        assert torch.allclose(t, e, atol=1e-6) and not e.isnan().any()
    assert count == 5 + common.RANK  # not a float

def each_image_goes_to_one_process():
    x, y = torch.zeros(24, 3, 8, 8, dtype=torch.uint8), torch.arange(24)
    batches = list(common.shuffled_batches(x, y, 8, 0, 1))
    rows = torch.cat([rows for _, _, rows in batches])
    assert sorted(torch.cat(everyone(rows)).tolist()) == list(range(24))
    assert [len(x) for x, _, _ in batches] == [4, 4, 4]
    a, b = everyone(torch.rand(8))
    assert not torch.equal(a, b)  # their random numbers differ

def watch(script):
    # what the processes found in an epoch differs; its mean is what is saved
    train_epoch = script.train_epoch
    def watched(model, *rest):
        terms = train_epoch(model, *rest)
        a, b = everyone(next(iter(terms.values())))
        assert not torch.equal(a, b)
        found["terms"] = {{name: mean(t).item() for name, t in terms.items()}}
        found["buffers"] = [mean(t) for t in floats(model.buffers())]
        return terms
    script.train_epoch = watched

def compare_and_save(args, history, best, model, *rest):
    for name, t in model.state_dict().items():
        a, b = everyone(t)
        assert torch.equal(a, b), name
    row = history[-1]
    for name, value in found["terms"].items():
        assert abs(row[name] - value) <= 1e-5 * abs(value), name
    for t, e in zip(floats(model.buffers()), found["buffers"]):
        assert torch.allclose(t, e, atol=1e-6)
    a, b = everyone(torch.tensor([v for name, v in row.items() if name[:3] == "val"]))
    assert len(a) == (2 if args.epsilon else 1) and torch.equal(a, b)
    return save_epoch(args, history, best, model, *rest)

def train(script, folder, *options):
    sys.argv = [script.METHOD, *{options!r}, "--run-dir", {folder!r} + "/" + folder, *options]
    script.main()

def stop(epoch, *args):
    return learning_rate(epoch, *args) if epoch < 2 else 1 / 0

def main():
    device = common.setup("cpu")
    common.print0("heard once", file=sys.stderr)
    gradients_and_buffers_are_averaged()
    each_image_goes_to_one_process()
    common.setup = lambda *_: device
    common.save_epoch = compare_and_save
    for script in SCRIPTS:
        watch(script)
        train(script, script.METHOD + "-natural", "--epsilon", "0", "--epochs", "1")
        if script is not first:
            train(script, script.METHOD, "--epochs", "1")
    train(first, "whole")
    first.learning_rate = stop
    try:
        train(first, "run")
    except ZeroDivisionError:
        first.learning_rate = learning_rate
    train(first, "run", "--resume")
    print("agreed", flush=True)
    dist.barrier()
    train(first, "run", "--lr", "0.5")

found, first = {{}}, SCRIPTS[0]
save_epoch, learning_rate = common.save_epoch, first.learning_rate
common.run(main, "again")
"""


@pytest.fixture(scope="module")
def two_processes(images, tmp_path_factory):
    """What torchrun printed, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("two")
    options = shlex.split(f"{small(images, 'unused')} --epochs 3")
    at = options.index("--run-dir")
    worker = folder / "worker.py"
    worker.write_text(
        WORKER.format(
            root=str(ROOT),
            scripts=[script.__name__ for script in SCRIPTS],
            folder=str(folder),
            options=options[:at] + options[at + 2 :],
        )
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, worker], env=CPU, capture_output=True, text=True
    )
    return done, folder


def test_two_processes(two_processes):
    """torchrun, gloo, the four scripts, with and without an attack: gradients and statistics are
    the mean of the halves', each image goes to one process, all weights and statistics are equal
    whenever a checkpoint is written, a row of metrics has the mean of the terms; stopped and
    resumed is the uninterrupted run bit for bit; an error ends both."""
    done, folder = two_processes
    assert done.stdout.count("agreed") == 2, done.stderr
    assert done.stderr.count("heard once") == 1
    assert same(folder / "run", folder / "whole")
    assert tensors(folder / "run" / "last.pt")[-1].shape == (8, 4)
    assert "is there" in done.stderr and "lr was" not in done.stderr and done.returncode != 0


def test_one_process_does_not_continue_what_two_began(two_processes, images, refuses):
    """It would not be the same run: the random numbers of a batch follow from its process."""
    options = f"{small(images, two_processes[1] / 'run')} --epochs 3 --resume"
    assert "processes" in refuses(train_lma_at, options)
