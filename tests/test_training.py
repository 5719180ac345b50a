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
    log = script.train_epoch(model, model, optimizer, iter(steps), past_adv, past_nat, args)
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
    return model, [model, model, optimizer, batches, past, past.clone(), args]


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
    11 + 2 (f(x) once), natural training 0 + 1. All passes in training mode go through ddp_model,
    which averages the gradients of the processes; the attack's go past it.
    """
    model, epoch = prepare(script, options, monkeypatch)
    passes, ddp_passes = [], []
    model.register_forward_hook(lambda model, *_: passes.append(model.training))

    def ddp_model(x):
        ddp_passes.append(model.training)
        return model(x)

    epoch[1] = ddp_model
    script.train_epoch(*epoch)
    assert (passes.count(False), passes.count(True)) == (3 * attack, 3 * train)
    assert ddp_passes == [True] * 3 * train


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


@pytest.mark.parametrize("script", [train_lma_at, train_trades_ours])
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
        kept = [*log.values(), *model.parameters(), *epoch[4:6]]
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
    r"boosted|weighted_kl|kl\(|logits_nat = ddp_model|log_p_nat|frozen|attack-loss|inv-lambda"
    r"|--lambda|choices=\[\"margin\+ce\"|loss that PGD|terms\[|terms = |def objective|f\"loss "
    r"|mHuber\\n|loss = partial|eq\. 1|Table 1|if args\.(inv_)?lam|== \"kl\"|What the search"
)


@pytest.mark.parametrize("a, b", [*itertools.combinations(SCRIPTS, 2)])
def test_scripts_differ_in_the_method_alone(a, b):
    """`diff` of two scripts: under 66 lines, and outside docstring and loss functions only lines
    that name the method."""
    texts = [(ROOT / f"{s.__name__}.py").read_text() for s in (a, b)]
    changed = [line for line in difflib.ndiff(*(t.splitlines() for t in texts)) if line[0] in "+-"]
    assert len(changed) < 66
    for name in ("margin_loss", "train_epoch", "learning_rate", "main", "parse_args", "objective"):
        lines = difflib.ndiff(*(inspect.getsource(getattr(s, name)).splitlines() for s in (a, b)))
        strange = [line for line in lines if line[0] in "+-" and not re.search(METHOD, line)]
        assert not strange


# -------------------------------------------------------------------------- arguments, schedule


def test_defaults_are_the_papers(monkeypatch):
    """Section 5.1; alpha and beta by data set and network."""
    for script in SCRIPTS:
        a = parse(script, "", monkeypatch)
        assert (a.epochs, a.batch_size, a.lr, a.weight_decay) == (130, 100, 0.01, 3.5e-3)
        assert (a.epsilon, a.step_size, a.steps, a.attack_loss) == (
            8 / 255,
            2 / 255,
            10,
            "margin+ce",
        )
        assert (a.delta, a.tau, a.ema, a.margin_weight) == (0.9, 0.2, "slot", 1)
        assert (a.alpha, a.beta) == (5.345, 86)
        assert (a.dataset, a.arch, a.seed, a.val_size) == ("cifar10", "resnet18", 0, 1000)
        assert (a.data_dir, a.device, a.amp, a.compile) == ("data", "auto", False, False)
        assert (a.margin_reduction, a.run_dir) == (
            "mean",
            f"runs/cifar10-resnet18-{a.method}-seed0",
        )
        for options, alpha, beta in (
            ("--dataset cifar100", 5.345, 96),
            ("--dataset tinyimagenet", 6.345, 96),
            ("--arch wrn-34-10", 2.345, 86),
            ("--dataset shapes --alpha 1 --beta 2", 1, 2),
        ):
            a = parse(script, options, monkeypatch)
            assert (a.alpha, a.beta) == (alpha, beta)
    assert parse(train_trades_ours, "", monkeypatch).inv_lambda == 6
    assert parse(train_mart_ours, "", monkeypatch).lam == 5


def test_dataset_shapes_alone_is_a_demonstration(monkeypatch):
    """It sets network, epochs, batch, learning rate and validation size, unless they are given."""
    a = parse(train_lma_at, "--dataset shapes", monkeypatch)
    assert (a.arch, a.epochs, a.batch_size, a.lr, a.val_size) == ("wrn-10-1", 3, 50, 0.05, 500)
    a = parse(train_lma_at, "--dataset shapes --epochs 7 --arch resnet18", monkeypatch)
    assert (a.arch, a.epochs, a.batch_size) == ("resnet18", 7, 50)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_the_script_is_and_its_defaults(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(script, "--help", monkeypatch)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and script.__doc__ in out
    assert out.startswith(f"usage: {script.__name__}.py [-h]")
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
    return [*state["model"].values(), *momentum, state["ema_adv"], state["ema_nat"]]


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
    assert "is not empty" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err.strip() == "interrupted; the same command with --resume continues it"
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


def test_a_run_folder_holds_what_it_should(images, run, monkeypatch, capsys):
    """args.json, a row of metrics an epoch, examples.png, checkpoints that know their data; a
    finished run that is resumed prints its results once more."""
    names = {"best.pt", "last.pt", "args.json", "metrics.csv", "examples.png"}
    assert {path.name for path in run.iterdir()} == names
    args = json.loads((run / "args.json").read_text())
    state = torch.load(run / "best.pt", weights_only=True)
    assert state["args"] == args and args["method"] == "lma_at" and args["alpha"] == 2.345
    assert args["classes"] == ["a", "b", "c", "d"] and "48 images of 16x16" in args["data"]
    (row,) = csv.DictReader((run / "metrics.csv").open())
    assert {"epoch", "lr", "L'", "BCE", "mHuber", "val clean", "val PGD-10"} < set(row)
    assert Image.open(run / "examples.png").width > 10 * 64
    call(train_lma_at, f"{small(images, run)} --epochs 1 --resume", monkeypatch)
    out = capsys.readouterr().out
    assert "1 epochs done" in out and "last.pt: epoch 1, test accuracy" in out


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
    best.pt; PGD-20 at 1/255 on the test images, once for each checkpoint."""
    x = torch.arange(1, 61).byte().view(-1, 1, 1, 1).repeat(1, 3, 16, 16)  # image i is all i
    data = common.Data(x[:40], torch.arange(40) % 4, x[40:], torch.arange(20) % 4, list("abcd"))
    epochs, tested, compiled = [], [], []
    # validation: clean and PGD-10; then the test of last.pt and best.pt
    scores = [(50, 20), (40, 30), (60, 25), (70, 30), *[(80, 10)] * 9, (1, 2), (3, 4)]

    def train_epoch(model, ddp_model, optimizer, batches, past_adv, past_nat, args):
        assert ddp_model is model and past_adv is not past_nat
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

    def accuracy(model, x, y, epsilon, step_size, steps, batch_size, amp=False, text=""):
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

    monkeypatch.setattr(common, "load_data", lambda *_: data)
    monkeypatch.setattr(common, "accuracy", accuracy)
    monkeypatch.setattr(script, "train_epoch", train_epoch)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model, mode: compiled.append(mode))
    call(
        script,
        "--dataset folder --arch wrn-10-1 --epochs 13 --batch-size 8 --lr 0.1 --val-size 8"
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

    x_train, y_train, x_val, y_val = common.hold_out(data, 8, "cpu")
    val = x_val[:, 0, 0, 0].tolist()
    for epoch, (_, batches) in enumerate(epochs, 1):
        images = torch.cat([x for x, _, _ in batches])
        rows = torch.cat([rows for _, _, rows in batches])
        brightest = (255 * images.amax((1, 2, 3))).round().long().tolist()
        assert sorted(brightest + val) == list(range(1, 41))
        assert brightest == x_train[rows, 0, 0, 0].tolist()
        assert torch.equal(torch.cat([y for _, y, _ in batches]), y_train[rows])
        assert (images.amin((1, 2, 3)) == 0).sum() > 20  # cropped with the padding
        expected = common.shuffled_batches(x_train, y_train, 8, 7, epoch)
        assert torch.equal(rows, torch.cat([rows for _, _, rows in expected]))

    assert tested[:13] == [
        (val, y_val.tolist(), 6 / 255, 1.5 / 255, 10, True, epoch) for epoch in range(1, 14)
    ]
    assert tested[13:] == [
        (list(range(41, 61)), data.y_test.tolist(), 6 / 255, 1 / 255, 20, True, epoch)
        for epoch in (13, 2)
    ]
    state = torch.load(tmp_path / "best.pt", weights_only=True)
    assert state["epoch"] == 2 and (state["model"]["fc.bias"] == 2).all()
    out = capsys.readouterr().out
    assert "last.pt: epoch 13, test accuracy 1.00 % clean, 2.00 % PGD-20, epsilon 6/255" in out
    assert "best.pt: epoch 2, test accuracy 3.00 % clean, 4.00 % PGD-20" in out


# ---------------------------------------------------------------- the bookkeeping of a run


def play(script, monkeypatch, scores):
    """Let training do nothing and every test return the next of `scores`. Returns the calls."""
    calls, results = [], iter(scores)

    def accuracy(model, x, y, epsilon, step_size, steps, *rest):
        calls.append((len(x), epsilon, step_size, steps))
        return next(results)

    def train_epoch(*_):
        return {"BCE": torch.ones(())}

    monkeypatch.setattr(common, "accuracy", accuracy)
    monkeypatch.setattr(script, "train_epoch", train_epoch)
    return calls


def test_natural_training_is_tested_under_attack(images, tmp_path, monkeypatch):
    """--epsilon 0 validates without an attack; the final test is at the 8/255 of all others."""
    calls = play(train_at_ours, monkeypatch, [(50, 50), (60, 20)])
    options = f"{small(images, tmp_path)} --epochs 1 --epsilon 0"
    call(train_at_ours, options, monkeypatch)
    assert calls == [(8, 0, 0, 10), (16, 8 / 255, 1 / 255, 20)]


def test_after_a_resume_the_best_epoch_is_the_best_of_all(images, tmp_path, monkeypatch):
    """best.pt stays that of the first epoch, although the third is the best since the resume."""
    options = f"{small(images, tmp_path)} --epochs 3"
    play(train_lma_at, monkeypatch, [(50, 40)])
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(train_lma_at, "learning_rate", lambda epoch, *_: [0.01][epoch - 1])
        call(train_lma_at, options, monkeypatch)
    play(train_lma_at, monkeypatch, [(50, 20), (50, 30), (1, 2), (3, 4)])
    call(train_lma_at, f"{options} --resume", monkeypatch)
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 1
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["val PGD-10"] for row in rows] == ["40", "20", "30"]


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


OTHER = {
    "--epochs": 2,
    "--batch-size": 4,
    "--weight-decay": 0.1,
    "--epsilon": 0.1,
    "--step-size": 0.1,
    "--steps": 3,
    "--attack-loss": "ce",
    "--delta": 2,
    "--margin-reduction": "sum",
    "--margin-weight": 2,
    "--alpha": 2,
    "--beta": 2,
    "--tau": 0.5,
    "--ema": "image",
    "--val-size": 4,
    "--seed": 1,
    "--arch": "wrn-10-2",
}


@pytest.mark.parametrize("option, value", OTHER.items())
def test_every_argument_is_compared_on_resume(option, value, images, run, refuses):
    """A run goes on with the arguments with which it began; the line names the one that differs."""
    error = refuses(train_lma_at, f"{small(images, run)} --epochs 1 --resume {option} {value}")
    assert f"{option[2:].replace('-', '_')} was " in error


@pytest.mark.parametrize("kept", [["best.pt"], ["metrics.csv"], ["best.pt", "metrics.csv"]])
def test_a_run_without_its_last_pt_is_not_begun_anew(kept, images, run, refuses):
    """--resume does not overwrite the best.pt of a run whose last.pt is gone."""
    for path in run.iterdir():
        if path.name not in kept:
            path.unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    error = refuses(train_lma_at, f"{small(images, run)} --epochs 1 --resume")
    assert "last.pt is missing" in error
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}


def test_a_missing_best_pt_is_said_before_the_training(images, tmp_path, monkeypatch, refuses):
    """last.pt is of the second epoch and best.pt, of the first, is gone."""
    options = f"{small(images, tmp_path)} --epochs 2"
    play(train_lma_at, monkeypatch, [(50, 40), (50, 20), (1, 2), (3, 4)])
    call(train_lma_at, options, monkeypatch)
    (tmp_path / "best.pt").unlink()
    monkeypatch.setattr(train_lma_at, "train_epoch", None)  # calling it would be a TypeError
    assert "best.pt is missing" in refuses(train_lma_at, f"{options} --resume")


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
    assert best["epoch"] == 2 and set(best) == {"model", "args", "epoch"}
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["val PGD-10"] for row in rows] == ["40", "60"]


def test_what_killed_saves_left_is_removed(images, run, monkeypatch):
    """A kill between write and rename leaves last.pt.<process>.tmp; the next start removes it."""
    (run / "last.pt.12345.tmp").write_bytes(b"half")
    call(train_lma_at, f"{small(images, run)} --epochs 1 --resume", monkeypatch)
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("n", [3, 30])
def test_examples_png_has_three_rows_of_images(n, tmp_path, monkeypatch):
    """Natural, adversarial, difference: a row each, also for fewer than ten test images.

    They are spread over the test set, since the images of a folder lie class by class.
    """
    monkeypatch.chdir(tmp_path)
    y = torch.arange(n)
    x = (y * (240 // n)).byte().view(-1, 1, 1, 1).repeat(1, 3, 8, 8)  # each of one grey of its own
    data, model = common.Data(None, None, x, y, "ab"), common.make_model("wrn-10-1", n)
    args = argparse.Namespace(run_dir=".", epsilon=0.1, val_size=0, seed=0, batch_size=4, amp=False)
    torch.save({"model": model.state_dict(), "epoch": 1}, "last.pt")
    common.final_test(model, data, args, "cpu")
    picture = np.asarray(Image.open("examples.png"))
    columns = min(n, 10)
    assert picture.shape[:2] == (3 * 34 + 2, columns * 34 + 2)  # 8 x 8, enlarged to 32 x 32
    greys = [picture[18, 18 + 34 * i, 0] for i in range(columns)]
    assert greys == x[torch.linspace(0, n - 1, columns).long(), 0, 0, 0].tolist()
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


def test_a_terminal_that_cannot_write_a_character_gets_another(monkeypatch):
    """An ASCII stdout shows a question mark for the ± of the table, not a traceback."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    common.run(lambda: print("97.5 ± 1.0", flush=True), "as it is")
    assert written.getvalue() == b"97.5 ? 1.0\n"


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "options, words",
    [
        ("--epsilon 8", "8/255"),
        ("--epsilon lots", "--epsilon"),
        ("--dataset mnist", "mnist"),
        ("--tau 1", "--tau"),
        ("--attack-loss kl", "--attack-loss"),
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
def test_bad_input_ends_in_one_line(options, words, images, tmp_path, refuses):
    """Exit status 2, one line on stderr that names the argument, and no run folder begun."""
    assert words in refuses(train_lma_at, f"{small(images, tmp_path / 'run')} {options}")
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_nor_resumed_with_other_settings(images, run, refuses):
    """A folder with anything in it is not taken; with --resume the line names the difference."""
    options, before = f"{small(images, run)} --epochs 1", (run / "last.pt").read_bytes()
    assert "is not empty" in refuses(train_lma_at, options)
    assert "lr was 0.01, is 0.5" in refuses(train_lma_at, f"{options} --resume --lr 0.5")
    (run / "args.json").unlink()
    assert "is not empty" in refuses(train_lma_at, options)
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


def args_that_are_a_list(path):
    torch.save(torch.load(path, weights_only=True) | {"args": [1]}, path)


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("spoil", [half, empty_dict, best_pt, args_that_are_a_list, a_folder])
def test_what_is_not_the_last_pt_of_a_run_is_refused(spoil, images, run, refuses):
    spoil(run / "last.pt")
    assert "last.pt" in refuses(train_lma_at, f"{small(images, run)} --epochs 1 --resume")


def test_a_folder_with_args_json_alone_begins_anew_with_resume(
    images, tmp_path, monkeypatch, refuses
):
    """As it is left where training ran out of memory, or as another has it who is in the first
    epoch: it is not taken without --resume; with it other settings may be tried there."""
    (tmp_path / "args.json").write_text("{")
    options = f"{small(images, tmp_path)} --epochs 1 --batch-size 4"
    assert "add --resume" in refuses(train_lma_at, options)
    assert (tmp_path / "args.json").read_text() == "{"
    call(train_lma_at, f"{options} --resume", monkeypatch)
    assert json.loads((tmp_path / "args.json").read_text())["batch_size"] == 4


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
    assert error.startswith("error: epoch 2, L' is not finite")
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
    assert f"epoch {epochs}, fc.bias is not finite" in error
    for name in ("best.pt", "last.pt"):
        assert (tmp_path / name).exists() == (epochs == 2)
        if epochs == 2:
            state = torch.load(tmp_path / name, weights_only=True)
            assert state["epoch"] == 1 and state["model"]["fc.bias"].isfinite().all()


# --------------------------------------------------------------- how programs end, what they print


@pytest.mark.parametrize(
    "error, words",
    [
        (lambda: torch.empty(2**60), "smaller --batch-size"),
        (lambda: bytearray(2**62), "smaller --batch-size"),
        (lambda: np.empty(2**50), "smaller --batch-size"),
        (lambda: open("/nowhere/file", "w"), "/nowhere/file"),
        (
            lambda: torch.compile(lambda x: x + 1, backend=lambda *_: open("/nowhere"))(
                torch.ones(2)
            ),
            "--compile does not work here",
        ),
    ],
)
def test_a_machine_that_fails_is_one_line(error, words, capsys):
    """Out of memory (torch's, Python's and numpy's), a place that is not there, no compiler."""
    with pytest.raises(SystemExit) as stop:
        common.run(error, "again")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_what_is_our_fault_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="size"):
        common.run(lambda: torch.ones(2) + torch.ones(3), "again")


def test_nobody_reading_the_output_is_no_error(images, tmp_path):
    """`python train_lma_at.py ... | head -1`: no traceback, the exit status of a broken pipe."""
    command = f"train_lma_at.py {small(images, tmp_path)} --epochs 500"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} {command} | head -1"],
        cwd=ROOT,
        env=CPU,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 141 and done.stdout.startswith("lma_at on folder: 40 training")
    assert not done.stderr


@pytest.mark.parametrize("epsilon", ["8/255", "2/255", "0.031"])
def test_the_printed_command_evaluates_the_run(epsilon, images, tmp_path, monkeypatch, capsys):
    """The command that a run prints last, as a shell reads it, evaluates that run.

    The name of its folder has a blank, and epsilon is the run's own to the last bit.
    """
    folder = tmp_path / "my run"
    call(train_lma_at, f"{small(images, folder)} --epochs 1 --epsilon {epsilon}", monkeypatch)
    (command,) = re.findall("^next: python (.*)$", capsys.readouterr().out, re.M)
    program, checkpoint, *options = shlex.split(command)
    assert (program, checkpoint) == ("evaluate.py", str(folder / "best.pt"))
    assert options[0::2] in ([], ["--epsilon"])
    value = options[1] if options else "8/255"
    assert common.number(0, 1)(value) == common.number(0, 1)(epsilon)
    if epsilon == "0.031":
        import evaluate

        call(
            evaluate,
            f"{shlex.join([checkpoint, *options])} --n 8 --attacks FGSM --device cpu",
            monkeypatch,
        )
        assert "FGSM" in capsys.readouterr().out


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
    data = common.Data(*bars_and_tints(600, 0), *bars_and_tints(100, 1), list("ABC"))
    monkeypatch.setattr(common, "load_data", lambda *a: data)
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
import sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import common, train_lma_at

def everyone(t):
    found = [torch.empty_like(t) for _ in range(2)]
    dist.all_gather(found, t.contiguous())
    return found

def gradients_are_averaged():
    torch.manual_seed(0)
    model = common.make_model("wrn-10-1", 10)
    net = torch.nn.parallel.DistributedDataParallel(model)
    x, y = torch.rand(4, 3, 16, 16) + common.RANK, torch.arange(4)
    loss = lambda net: torch.nn.functional.cross_entropy(net(x), y)
    own = torch.autograd.grad(loss(model), model.parameters())
    loss(net).backward()
    for mine, p in zip(own, model.parameters()):
        assert torch.allclose(sum(everyone(mine)) / 2, p.grad, atol=1e-6)

def each_image_goes_to_one_process():
    x, y = torch.zeros(24, 3, 8, 8, dtype=torch.uint8), torch.arange(24)
    batches = list(common.shuffled_batches(x, y, 8, 0, 1))
    rows = torch.cat([rows for _, _, rows in batches])
    assert sorted(torch.cat(everyone(rows)).tolist()) == list(range(24))
    assert [len(x) for x, _, _ in batches] == [4, 4, 4]
    a, b = everyone(torch.rand(8))
    assert not torch.equal(a, b)  # their random numbers differ

def train(folder, *options):
    sys.argv = ["train_lma_at.py", *{options!r}, "--run-dir", folder, *options]
    train_lma_at.main()

def main():
    device = common.setup("cpu")
    common.print0("heard once", file=sys.stderr)
    gradients_are_averaged()
    each_image_goes_to_one_process()

    make_model, save, models = common.make_model, common.save, []
    learning_rate = train_lma_at.learning_rate
    def kept(*args):
        models.append(make_model(*args))
        return models[-1]
    distribute = train_lma_at.DistributedDataParallel
    def without_broadcast(model, **options):
        net = distribute(model, **options)
        assert not net.broadcast_buffers  # each process keeps its own statistics in an epoch
        return net
    def compare_and_save(write, path):
        for name, t in models[-1].state_dict().items():
            a, b = everyone(t)
            assert torch.equal(a, b), name
        save(write, path)
    def stop(epoch, *args):
        return learning_rate(epoch, *args) if epoch < 2 else 1 / 0
    common.setup = lambda *_: device
    common.make_model, common.save = kept, compare_and_save
    train_lma_at.DistributedDataParallel = without_broadcast
    train({folder!r} + "/whole")
    train_lma_at.learning_rate = stop
    try:
        train({folder!r} + "/run")
    except ZeroDivisionError:
        train_lma_at.learning_rate = learning_rate
    train({folder!r} + "/run", "--resume")
    print("agreed", flush=True)
    common.barrier()
    train({folder!r} + "/run", "--lr", "0.5")

common.run(main, "again")
"""


def test_two_processes(images, tmp_path, refuses):
    """torchrun, gloo: the gradient is the mean of the halves', each image goes to one process, all
    weights and statistics are equal whenever a checkpoint is written; stopped and resumed is the
    uninterrupted run bit for bit; one process alone is told that it was two; an error ends both."""
    options = f"{small(images, tmp_path / 'run')} --epochs 3"
    worker = tmp_path / "worker.py"
    worker.write_text(
        WORKER.format(
            root=str(ROOT),
            folder=str(tmp_path),
            options=shlex.split(options)[:-4] + ["--epochs", "3"],
        )
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, worker], env=CPU, capture_output=True, text=True
    )
    assert done.stdout.count("agreed") == 2, done.stderr
    assert done.stderr.count("heard once") == 1
    assert same(tmp_path / "run", tmp_path / "whole")
    assert tensors(tmp_path / "run" / "last.pt")[-1].shape == (8, 4)
    assert "is not empty" in done.stderr and "lr was" not in done.stderr and done.returncode != 0
    assert "processes was 2, is 1" in refuses(train_lma_at, f"{options} --resume")
