"""The training scripts: a step of Algorithm 1 against the paper's formulas, whole programs against
their loop by hand, where a run begins and goes on, what is refused, two processes."""

import csv
import inspect
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from argparse import Namespace
from copy import deepcopy
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
import torch.nn as nn
from PIL import Image
from torch import library

import common
import train_at_ours
import train_lma_at
import train_mart_ours
import train_trades_ours

ROOT = Path(__file__).parents[1]
SCRIPTS = [train_lma_at, train_at_ours, train_trades_ours, train_mart_ours]
PLAIN = "--margin-weight 0 --beta 0"
CPU = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TERMS = {
    train_lma_at: ["L'", "BCE", "mHuber"],
    train_at_ours: ["L'", "CE", "mHuber"],
    train_trades_ours: ["L'", "CE", "KL", "mHuber"],
    train_mart_ours: ["L'", "BCE", "KL", "mHuber"],
}


def parse(script, options):
    """The script's arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *shlex.split(options)])
        return script.parse_args()


def call(script, options):
    """The script as the program that a user starts, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *shlex.split(options)])
        runpy.run_path(script.__file__, run_name="__main__")


# ------------------------------------------------------------------------------- the arguments
BETA = {"cifar10": 86, "cifar100": 96, "tinyimagenet": 96, "folder": 86, "shapes": 86}
ALPHA = {"resnet18": 5.345, "wrn-34-10": 2.345, "wrn-10-1": 2.345}
PAPER = {
    f"--dataset {dataset} --arch {arch}": {"alpha": alpha, "beta": beta}
    for dataset, beta in BETA.items()
    for arch, alpha in ALPHA.items()
}
PAPER["--dataset tinyimagenet --arch resnet18"]["alpha"] = 6.345
DEFAULTS = dict(dataset="cifar10", arch="resnet18", epochs=130, batch_size=100, lr=0.01)
DEFAULTS |= dict(weight_decay=3.5e-3, epsilon=8 / 255, step_size=2 / 255, steps=10, delta=0.9)
DEFAULTS |= dict(attack_loss="margin+ce", margin_reduction="mean", margin_weight=1, tau=0.2)
DEFAULTS |= dict(ema="slot", val_size=1000, seed=0, data_dir="data", alpha=5.345, beta=86)
SHAPES = dict(arch="wrn-10-1", epochs=3, batch_size=50, lr=0.05, val_size=500, alpha=2.345)
WEIGHT = {train_trades_ours: ("--inv-lambda", "inv_lambda"), train_mart_ours: ("--lambda", "lam")}
ARGUMENTS = {  # options: the arguments they give, and the words that the run is named by
    "": (DEFAULTS | {"amp": False, "compile": False, "resume": False}, ""),
    **{options: (values, "") for options, values in PAPER.items()},
    "--arch=wrn-16-2 --dataset=cifar100": ({"alpha": 2.345, "beta": 96}, ""),
    "--dataset shapes": (SHAPES, ""),
    "--dataset shapes --epochs 7": (SHAPES | {"epochs": 7}, " epochs=7"),
    "--dataset shapes --arch resnet18": ({"epochs": 3, "alpha": 5.345, "arch": "resnet18"}, ""),
    "--beta 96 --dataset cifar100 --alpha 5.345 --epsilon 8/255 --steps 10": ({"beta": 96}, ""),
    "--epsilon 0.031 --step-size 0": ({"epsilon": 0.031}, " epsilon=0.031 step_size=0"),
    "--epsilon 254/255 --epochs 2": ({"epsilon": 254 / 255}, " epochs=2 epsilon=0.996078"),
    "--tau 0.5 --beta 8.6": ({"tau": 0.5, "beta": 8.6}, " beta=8.6 tau=0.5"),
    "--amp --ema image --attack-loss ce": ({"amp": True}, " attack_loss=ce ema=image amp=True"),
    "--seed 3 --compile --resume --data-dir d --device meta": ({"seed": 3, "resume": True}, ""),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_arguments_are_those_of_section_5_1_and_name_the_run(script):
    """By data set and network, unless they are given. A run is named after what differs from them,
    so that the folders of a sweep lie apart; place, device and seed are no part of the name."""
    method = script.__name__.removeprefix("train_")
    for options, (values, words) in ARGUMENTS.items():
        args = parse(script, options)
        assert vars(args).items() >= values.items(), options
        assert args.name == method + words
        folder = f"{args.dataset}-{args.arch}-{args.name.replace(' ', '-')}-seed{args.seed}"
        assert args.run_dir == f"runs/{folder}"
        assert parse(script, f"{options} --run-dir r").run_dir == "r"
    if script in WEIGHT:
        option, name = WEIGHT[script]
        assert vars(parse(script, ""))[name] == {"lam": 5, "inv_lambda": 6}[name]
        assert parse(script, f"{option} 2.5").name == f"{method} {name}=2.5"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_defaults_that_hold(script, capsys):
    """The docstring as it is, and after --dataset and --arch their own defaults."""
    for options, shown in (
        ("", "data 8/255 2/255 130 0.01 0.0035 5.345 86.0 margin+ce slot 1000"),
        ("--dataset tinyimagenet", "6.345 96.0"),
        ("--dataset cifar100 --arch wrn-34-10", "2.345 96.0"),
        ("--dataset shapes", "wrn-10-1 3 50 0.05 500 2.345 86.0"),
    ):
        with pytest.raises(SystemExit) as stop:
            parse(script, f"--help {options}")
        out = capsys.readouterr().out
        assert stop.value.code == 0 and script.__doc__ in out
        text = " ".join(out.split())
        for value in shown.split():
            assert f"(default: {value})" in text, value


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_bad_option_is_named_and_begins_no_run(script, images, tmp_path, refused):
    bad = "--epsilon=8 --epsilon=1 --epsilon=-1 --epsilon=nan --epsilon=x --step-size=2 --tau=1"
    bad += " --seed=0.5 --dataset=mnist --attack-loss=mse --margin-reduction=max --ema=class"
    bad += (
        " --nonsense --batch-size=9/2 --batch-size=25 --val-size=25 --val-size=32 --arch=wrn-12-1"
    )
    kl = "" if script is train_trades_ours else "--attack-loss=kl"
    for option in f"{bad} {kl}".split():
        error = refused(call, script, f"{small(images, tmp_path / 'run')} {option}")
        named = "--batch-size" if "--val-size" in option else option.partition("=")[0]
        assert named in error
        assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------ a step of Algorithm 1
def watched(model):
    """The list of (training mode, input) of all passes of `model` from now on."""
    passes = []
    model.register_forward_hook(
        lambda model, inputs, _: passes.append((model.training, inputs[0].detach().clone()))
    )
    return passes


def reference_attack(model, x, y, args):
    """x' of reference.py: the network's derivative is torch's, all else NumPy's."""
    if not args.epsilon:
        return x
    model.eval()
    nat = model(x).detach() if args.attack_loss == "kl" else None
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(args.steps):
        adv = model(x_adv.requires_grad_())

        def loss(z):
            return reference.attack_objective(logits_adv=z, y=y, logits_nat=nat, **vars(args))

        slope = torch.from_numpy(reference.gradient(loss, adv))
        (slope,) = torch.autograd.grad(adv, x_adv, slope)
        x_adv = reference.signed_step(x_adv, x, slope, args.step_size, args.epsilon)
        x_adv = torch.from_numpy(x_adv)
    return x_adv


def reference_epoch(script, model, optimizer, batches, past_adv, past_nat, args):
    """What train_epoch has to do. f(x) comes before f(x'), and only where a term needs it."""
    found = []
    for x, y, index in batches:
        x_adv = reference_attack(model, x, y, args)
        model.train()
        needed = args.beta or script in (train_trades_ours, train_mart_ours)
        nat = model(x) if needed else torch.zeros(len(x), 3).double().requires_grad_()
        adv = model(x_adv)
        at = index if args.ema == "image" else range(len(x))
        past = past_adv[at], past_nat[at]
        slopes = reference.objective_gradients(script.METHOD, adv, nat, y, *past, **vars(args))
        optimizer.zero_grad()
        torch.autograd.backward([adv, nat], [torch.from_numpy(slope) for slope in slopes])
        optimizer.step()
        averages = [reference.ema(p, z, args.tau) for p, z in zip(past, (adv, nat))]
        terms = reference.terms(script.METHOD, adv, nat, y, *averages, **vars(args))
        if args.beta:
            past_adv[at], past_nat[at] = map(torch.from_numpy, averages)
        found.append(terms if args.beta else terms | {"mHuber": 0})
    return {name: np.mean([terms[name] for terms in found]) for name in found[0]}


STEPS = [
    "",
    "--tau 0 --alpha 5",
    "--ema image --tau 0.7",
    "--margin-weight 0 --attack-loss ce",
    "--margin-reduction sum --delta 1.7 --margin-weight 2.5",
    "--beta 0",
    f"--attack-loss ce {PLAIN}",
    "--epsilon 0",
]
OWN = {
    train_trades_ours: ["--attack-loss kl", f"--attack-loss kl {PLAIN}", "--inv-lambda 2.5"],
    train_mart_ours: ["--lambda 2.5 --tau 0.7", "--lambda 0 --beta 0"],
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_steps_are_those_of_the_paper_in_numpy(script):
    """From averages that are not zero, in float64: all passes of the network in their order, x' and
    modes among them, weights, batch norm's statistics, moving averages and the mean of each term.
    """
    shared = "--epsilon 0.1 --step-size 0.03 --steps 3 --beta 7 --alpha 0.4 --delta 0.6"
    for options in STEPS + OWN.get(script, []):
        args = parse(script, f"{shared} --margin-weight 0.8 --lr 0.1 {options}")
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Softplus(3), nn.Flatten(), nn.Linear(24, 3)
        ).double()
        nn.init.normal_(model[-1].weight, std=0.5)
        model(2 * torch.rand(20, 3, 5, 4).double())  # statistics of its own
        x, y = torch.rand(2, 4, 3, 5, 4).double(), torch.tensor([[0, 1, 2, 0], [1, 2, 2, 0]])
        batches = list(zip(x, y, torch.tensor([[3, 1, 5, 0], [2, 0, 4, 3]])))
        past = torch.randn(2, 6 if args.ema == "image" else 4, 3).double()
        results = []
        for epoch in (script.train_epoch, lambda *given: reference_epoch(script, *given)):
            network, averages = deepcopy(model).eval(), past.clone()
            passes = watched(network)
            optimizer = torch.optim.SGD(network.parameters(), args.lr, 0.9)
            torch.manual_seed(1)
            terms = epoch(network, optimizer, iter(batches), *averages, args)
            state = network.state_dict() | {"averages": averages}
            results.append((passes, state, terms))
        (passes, state, terms), (right_passes, right_state, right_terms) = results
        assert [mode for mode, _ in passes] == [mode for mode, _ in right_passes], options
        for (_, seen), (_, right) in zip(passes, right_passes):
            assert torch.allclose(seen, right, rtol=0, atol=1e-9), options
        for name, value in right_state.items():
            assert torch.allclose(state[name], value, rtol=0, atol=1e-6), (options, name)
        assert {name: term.item() for name, term in terms.items()} == pytest.approx(right_terms)
        assert list(terms) == TERMS[script]


def epoch_of_train_epoch(script, options, device="cpu"):
    """The arguments of train_epoch for two steps on random images."""
    args = parse(script, f"--steps 2 {options}")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    x = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8).to(device)
    y = torch.randint(10, (16,)).to(device)
    past = torch.zeros(2, 16 if args.ema == "image" else 8, 10, device=device)
    optimizer = torch.optim.SGD(model.to(device).parameters(), args.lr, 0.9)
    return model, optimizer, common.shuffled_batches(x, y, 8, 0, 1), *past, args


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_batch_loop_never_waits_for_the_device(script, monkeypatch):
    """On the meta device .item(), a choice by value and a stray tensor of the CPU raise."""
    name, kernel = "multi_margin_loss_backward", lambda slope, logits, *_: torch.empty_like(logits)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: torch.enable_grad())  # meta has none
    with library._scoped_library("aten", "IMPL") as kernels:
        kernels.impl(name, kernel, "Meta")  # torch has none
        for options in ("", "--attack-loss ce --ema image", *OWN.get(script, [])[:1]):
            terms = script.train_epoch(*epoch_of_train_epoch(script, options, "meta"))
            assert {(term.device.type, term.shape) for term in terms.values()} == {("meta", ())}
    with pytest.raises(RuntimeError):
        terms["L'"].item()


@pytest.mark.parametrize("script", SCRIPTS)
def test_amp_is_of_the_networks_alone(script):
    """All passes are in bfloat16; weights, averages and terms stay float32."""
    model, *rest = epoch_of_train_epoch(script, "--amp")
    found = set()
    model.register_forward_hook(lambda model, x, logits: found.add((x[0].dtype, logits.dtype)))
    terms = script.train_epoch(model, *rest)
    assert found == {(torch.float32, torch.bfloat16)}
    kept = [*terms.values(), *model.parameters(), *rest[2:4]]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


# -------------------------------------------------------------- whole programs and their loop
@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """32 + 12 images, 8 x 8, of four classes, as a tree of folders. Not to be changed."""
    g, root = np.random.default_rng(0), tmp_path_factory.mktemp("some images")
    for split, n in (("train", 8), ("test", 3)):
        for c, name in enumerate("abcd"):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = g.integers(0, 256, (8, 8, 3)) // 2 + 30 * c
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


def small(images, folder):
    """Options of a run of five epochs of three steps: the learning rate drops in epochs 4 and 5."""
    return (
        f"--dataset folder --data-dir {shlex.quote(str(images))} --arch wrn-10-1 --batch-size 8"
        " --epochs 5 --val-size 8 --steps 2 --device cpu --seed 7 --run-dir "
        f"{shlex.quote(str(folder))}"
    )


def by_hand(script, args, images, world=1):
    """Section 5.1: yields {"model": weights, "momentum": ..., ...} after each epoch.

    Of more than one process the parts are computed in turn and averaged; an epoch is one step then.
    """
    train = common.load_data("folder", images, "train")
    x, y, *_ = common.hold_out(train, args, "cpu")
    torch.manual_seed(args.seed)
    model = common.make_model(args.arch, 4).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay)
    past = torch.zeros(2, world, len(x) if args.ema == "image" else args.batch_size // world, 4)
    for epoch in range(1, args.epochs + 1):
        rate = optimizer.param_groups[0]["lr"] = reference.learning_rate(
            epoch, args.epochs, args.lr
        )
        drawn = args.batch_size, args.seed, epoch
        parts = [common.shuffled_batches(x, y, *drawn) for _ in range(world)]
        rows = []
        for _ in range(len(x) // args.batch_size):
            replicas, seen, states = [], [], set()
            for rank in reversed(range(world)):  # process 0 last: its random numbers go on
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(common, "RANK", rank)
                    patch.setattr(common, "WORLD", world)
                    batch = next(parts[rank])
                seen += batch[2].tolist()
                states.add(torch.get_rng_state().numpy().tobytes())
                replica = deepcopy(model)
                still = torch.optim.SGD(replica.parameters(), 0.0)
                terms = script.train_epoch(replica, still, [batch], *past[:, rank], args)
                rows.append(torch.stack([*terms.values()]))
                replicas.append(replica)
            assert len(set(seen)) == args.batch_size and len(states) == world
            for weight, *ours in zip(*(net.parameters() for net in (model, *replicas))):
                weight.grad = sum(own.grad for own in ours) / world
            optimizer.step()
            for buffer, *ours in zip(*(net.buffers() for net in (model, *replicas))):
                buffer.copy_(sum(ours) / world)
        state = {"model": model.state_dict(), "momentum": momentum(optimizer.state_dict())}
        state |= {"ema_adv": past[0].flatten(0, 1), "ema_nat": past[1].flatten(0, 1)}
        row = {"epoch": epoch, "lr": rate, **dict(zip(terms, torch.stack(rows).mean(0).tolist()))}
        yield deepcopy(state) | {"row": row}


def momentum(optimizer):
    return {str(i): state["momentum_buffer"] for i, state in optimizer["state"].items()}


def assert_equal(found, right):
    """The same names, and tensors equal up to rounding."""
    assert list(found) == list(right)
    for name, value in right.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=1e-4, atol=1e-6), name


def assert_is_epoch(last, right):
    """What last.pt holds is what by_hand yields."""
    assert_equal(last["model"], right["model"])
    assert_equal(momentum(last["optimizer"]), right["momentum"])
    for name in ("ema_adv", "ema_nat"):
        assert torch.allclose(last[name], right[name], rtol=1e-4, atol=1e-6), name


def load(path):
    return torch.load(path, weights_only=True)


def metrics(folder):
    """Column names and rows of numbers of metrics.csv."""
    names, *rows = csv.reader((folder / "metrics.csv").open())
    return names, [[float(value) for value in row] for row in rows]


def interrupt(patch, place, name, file, count):
    """Ctrl-C in the count-th call of place.name, of those whose last argument names `file`."""
    really, calls = getattr(place, name), []

    def interrupted(*given, **named):
        calls.append(str(given[-1]).endswith(file))
        if calls[-1] and sum(calls) == count:
            signal.raise_signal(signal.SIGINT)
        return really(*given, **named)

    patch.setattr(place, name, interrupted)


SCORES = [(50, 20), (40, 30), (60, 25), (70, 30), (80, 10)]  # epoch 2 is the first of the best
STOPS = [  # in a batch before and after the learning rate drops, before a file is renamed
    (common, "augment", "", 5),
    (common, "augment", "", 7),
    (os, "replace", "last.pt", 1),
    (os, "replace", "best.pt", 1),
]
RUNS = [  # options, where the run is interrupted and then resumed, the epochs that are validated
    ("", [], [1, 2, 3, 4, 5]),
    ("--ema image --tau 0.7 --amp --epsilon 6/255", STOPS, [1, 2, 3, 4, 4, 5]),
    ("--val-size 0 --epsilon 0 --epochs 2 --compile", [], []),
]


@pytest.mark.parametrize("options, stops, validated", RUNS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_is_its_loop_by_hand(
    script, options, stops, validated, images, tmp_path, monkeypatch, capsys
):
    """Weights, momentum and averages after five epochs, also if it was interrupted and resumed;
    metrics.csv; PGD-10 on the held-out images chooses best.pt, the first of equals; without them it
    is the last epoch; the test is PGD-20 at 1/255 on the test images, natural training's at 8/255;
    images/s are those of training, and the time left that of all epochs to come."""
    folder, now = tmp_path / "my run", [0.0]
    options = f"{small(images, folder)} {options}"
    args = parse(script, options)
    epochs = list(by_hand(script, args, images))
    biases = torch.stack([epoch["model"]["fc.bias"] for epoch in epochs])
    train, test = (common.load_data("folder", images, split) for split in ("train", "test"))
    _, _, x_val, _ = common.hold_out(train, args, "cpu")
    compiled, calls, augment, accuracy = [], [], common.augment, inspect.signature(common.accuracy)

    def play(*given, **named):  # validation: four seconds
        given = Namespace(**accuracy.bind(*given, **named).arguments)
        now[0] += 4
        epoch = int((biases - given.model.fc.bias.detach()).abs().sum(1).argmin())
        split = "test" if torch.equal(given.x, test.x) else "val"
        assert split == "test" or torch.equal(given.x, x_val)
        attack = given.epsilon, given.step_size, given.steps, vars(given).get("amp", False)
        calls.append((split, epoch + 1, *attack))
        return SCORES[epoch]

    def slow(x):  # a step: two seconds
        now[0] += 2
        return augment(x)

    monkeypatch.setattr(common, "accuracy", play)
    monkeypatch.setattr(common, "augment", slow)
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: now[0])
    monkeypatch.setattr(nn.Module, "compile", lambda model, **_: compiled.append(model))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever starts pytest may ignore it
    for stop in stops:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            interrupt(patch, *stop)
            call(script, f"{options} --resume")
        assert ended.value.code == 130 and not [*folder.glob("*.tmp")]
        assert not (folder / "best.pt").exists()
    call(script, f"{options} {'--resume' if stops else ''}")

    e, best_epoch = args.epsilon, 2  # without validation the last
    expected = [("val", epoch, e, e / 4, 10, args.amp) for epoch in validated]
    expected.append(("test", best_epoch, e or 8 / 255, 1 / 255, 20, args.amp))
    assert calls == expected
    last, best = load(folder / "last.pt"), load(folder / "best.pt")
    assert_is_epoch(last, epochs[-1])
    assert_equal(best["model"], epochs[best_epoch - 1]["model"])
    assert (best["epoch"], last["epoch"]) == (best_epoch, args.epochs)
    assert best["done"] and last["done"] and len(compiled) == args.compile
    assert best["args"]["name"] == args.name and best["args"]["classes"] == list("abcd")

    columns = ["epoch", "lr", *TERMS[script], "images/s"]
    columns += ["val clean", "val PGD-10"] if args.val_size else []
    names, rows = metrics(folder)
    assert names == columns and len(rows) == args.epochs
    for row, epoch, scores in zip(rows, epochs, SCORES):
        scores = scores if args.val_size else ()
        assert row == pytest.approx([*epoch["row"].values(), 24 / 6, *scores], rel=1e-4, abs=1e-6)
    assert {path.name for path in folder.iterdir()} == set(common.FILES)
    out = capsys.readouterr().out
    seconds = 10 if args.val_size else 8
    left = [f"0:00:{seconds * epoch:02}" for epoch in reversed(range(args.epochs))]
    assert re.findall(r"epoch \d.*left (\S+)", out)[-len(left) :] == left
    clean, robust = SCORES[best_epoch - 1]
    (line,) = re.findall("best.pt:.*", out)
    assert f"epoch {best_epoch}," in line and f"epsilon {255 * (e or 8 / 255):g}/255" in line
    assert re.findall(r"([\d.]+) %", line) == [f"{clean:.2f}", f"{robust:.2f}"]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The folder of a finished run of train_lma_at.py. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    call(train_lma_at, small(images, folder))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_a_run_that_is_killed_resumes_to_the_same_files(finished, killed, images):
    """kill -9 after metrics.csv of epoch 4 and before its last.pt, with the lower learning rate to
    come: the last epochs and the real accuracies, best.pt among them, are the uninterrupted run's.
    """
    process, folder = killed
    assert process.wait() == -signal.SIGKILL
    assert (len(metrics(folder)[1]), load(folder / "last.pt")["epoch"]) == (4, 3)
    (part,) = folder.glob("*.tmp")
    call(train_lma_at, f"{small(images, folder)} --resume")
    (names, rows), (_, right) = metrics(folder), metrics(finished)
    speed = names.index("images/s")
    assert [row[:speed] + row[speed + 1 :] for row in rows] == [
        row[:speed] + row[speed + 1 :] for row in right
    ]
    last, right = load(folder / "last.pt"), load(finished / "last.pt")
    assert_is_epoch(last, right | {"momentum": momentum(right["optimizer"])})
    best, right = load(folder / "best.pt"), load(finished / "best.pt")
    assert best["epoch"] == right["epoch"]
    assert_equal(best["model"], right["model"])


def test_last_pt_alone_tells_a_finished_run(run, images, monkeypatch, capsys):
    """--resume trains no epoch and writes best.pt and examples.png anew, which it does not read.
    The random numbers of its test follow from the seed. Folder, data and device may have moved."""
    for name in ("best.pt", "examples.png"):
        (run / name).write_bytes(b"half")
    monkeypatch.setattr(common, "accuracy", lambda *_, **__: (100 * torch.rand(2)).tolist())
    torch.rand(7)  # whatever was drawn before
    call(train_lma_at, f"{small(images, run)} --device cpu:0 --resume")
    (line,) = re.findall("best.pt:.*", capsys.readouterr().out)
    torch.manual_seed(7)
    right = [f"{value:.2f}" for value in (100 * torch.rand(2)).tolist()]
    assert re.findall(r"([\d.]+) %", line) == right
    assert_equal(load(run / "best.pt")["model"], load(run / "last.pt")["best"]["model"])
    assert Image.open(run / "examples.png").format == "PNG"


def test_examples_png_shows_ten_images_of_all_classes(tmp_path):
    """Natural, adversarial, difference: a row each, of images spread over the test set."""
    for n, shown in ((3, range(3)), (30, range(0, 30, 3))):
        y = torch.arange(n)
        x = (y * (240 // n)).byte().view(-1, 1, 1, 1).repeat(1, 3, 8, 8)  # each of its own grey
        model = common.make_model("wrn-10-1", n)
        best = {"model": model.state_dict(), "epoch": 1}
        args = Namespace(run_dir=tmp_path, epsilon=0.1, seed=0, batch_size=4, amp=False)
        common.finish_run(model, best, common.Data(x, y, "ab"), args, "cpu")
        picture = np.asarray(Image.open(tmp_path / "examples.png")).astype(float)
        assert picture.shape[:2] == (3 * 34 + 2, len(shown) * 34 + 2)  # 8 x 8, enlarged to 32 x 32
        assert [picture[18, 18 + 34 * i, 0] for i in range(len(shown))] == x[
            shown, 0, 0, 0
        ].tolist()
        natural, adversarial, difference = (
            picture[2 + 34 * i : 34 + 34 * i, 2:34] for i in range(3)
        )
        moved = adversarial - natural
        assert np.abs(moved).max() == pytest.approx(20, abs=1)  # 20 steps of 1/255
        assert np.abs(difference - (127.5 + moved / 0.2)).max() < 6  # epsilon: half of all greys


# ------------------------------------------------------------------------- where a run begins
OTHER = {"epochs": 2, "batch_size": 4, "lr": 0.5, "weight_decay": 0.1, "epsilon": 0.1}
OTHER |= {"step_size": 0.2, "steps": 3, "attack_loss": "ce", "delta": 2, "margin_reduction": "sum"}
OTHER |= {"margin_weight": 5, "alpha": 3, "beta": 4, "tau": 0.5, "ema": "image", "val_size": 4}
OTHER |= {"amp": True, "arch": "wrn-16-1", "seed": 1, "compile": True, "dataset": "shapes"}
OTHER |= {"processes": 2, "data": "other images", "classes": ["a"], "name": "at_ours"}
MOVED = {"run_dir", "resume", "data_dir", "device"}


def begin(args):
    """Begin or continue the run of `args` as a script does; returns how many epochs are done."""
    model = common.make_model("wrn-10-1", 4)
    past = torch.zeros(2, 8, 4)
    history = []
    common.run(
        lambda: history.extend(
            common.open_run(args, model, torch.optim.SGD(model.parameters(), 0.1), *past)[0]
        ),
        "",
    )
    return len(history)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_where_a_run_begins(finished, tmp_path, refused):
    """In a folder without a file of a run, whatever else is there; with --resume also where
    args.json alone is left, if it is the same, and it goes on from a last.pt with its args.json.
    Else nothing is changed, and the message names a file that is in the way."""
    args = Namespace(**load(finished / "last.pt")["args"])
    args_json, last_pt = (finished / "args.json").read_text(), (finished / "last.pt").read_bytes()
    other = args_json.replace('"seed": 7', '"seed": 8')
    assert json.loads(args_json).keys() == vars(args).keys() - MOVED and other != args_json
    foreign = {"notes.txt": "mine", "plots/best.pt": "mine", "last.pt.12.tmp": "half"}
    no, own = None, {"args.json": args_json}
    table = [  # files, epochs that are done if it begins without and with --resume
        ({}, 0, 0),
        (foreign, 0, 0),
        (own, no, 0),
        (own | foreign, no, 0),
        (own | {"last.pt": last_pt}, no, 5),
        (own | {"last.pt": last_pt, "best.pt": "half", "metrics.csv": ""}, no, 5),
        ({"args.json": other, "last.pt": last_pt}, no, no),
        *(({"args.json": text}, no, no) for text in (other, "", "{", '{"mine": 1}')),
        *(({name: "mine"} | foreign, no, no) for name in common.FILES[1:]),
        (own | {"best.pt": "mine"}, no, no),
        (own | {"metrics.csv": "mine"}, no, 0),  # killed before the first last.pt
    ]
    for i, (files, *expected) in enumerate(table):
        for resume, done in zip((False, True), expected):
            folder = tmp_path / f"{i} {resume}"
            for name, content in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                content = content if isinstance(content, bytes) else content.encode()
                (folder / name).write_bytes(content)
            before = contents(folder)
            args.run_dir, args.resume = str(folder), resume
            if done is None:
                error = refused(begin, args)
                assert any(str(folder / name) in error for name in common.FILES), files
                assert contents(folder) == before
            else:
                assert begin(args) == done, files
                assert contents(folder) == before | {folder / "args.json": args_json.encode()}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_goes_on_with_the_options_with_which_it_began(script, finished, tmp_path, refused):
    """Each of them, its images, classes and processes; folder, data's place and device may move."""
    args = Namespace(**vars(parse(script, small("d", tmp_path / "run"))))
    args.data, args.classes = "images", ["a", "b"]
    other = OTHER | ({WEIGHT[script][1]: 2.5} if script in WEIGHT else {})
    assert other.keys() == vars(args).keys() - MOVED
    begin(args)
    args.resume, args.device, args.data_dir = True, "cpu:0", "moved"
    before = contents(tmp_path)
    for name, value in other.items():
        changed = Namespace(**vars(args) | {name: value})
        assert "args.json" in refused(begin, changed)
    assert begin(args) == 0 and contents(tmp_path) == before


def test_of_runs_that_start_at_once_in_one_folder_one_begins(tmp_path):
    args, interval = parse(train_lma_at, ""), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    for i in range(100):
        barrier, begun = threading.Barrier(2), []

        def start(name):
            barrier.wait()
            try:
                common.claim(tmp_path / str(i), Namespace(**vars(args) | {"name": name}))
                begun.append(name)
            except (OSError, SystemExit):
                pass

        threads = [threading.Thread(target=start, args=[name]) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(begun) == 1
        assert json.loads((tmp_path / str(i) / "args.json").read_text())["name"] == begun[0]
    sys.setswitchinterval(interval)


# -------------------------------------------------------------- what is saved, how programs end
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_is_not_finite_is_not_saved(script, images, tmp_path, refused, monkeypatch):
    """A term of the second epoch; weights after the last step alone: the terms are finite then."""
    augment, calls = common.augment, count(1)
    first, second = tmp_path / "first", tmp_path / "second"
    monkeypatch.setattr(common, "augment", lambda x: augment(x) * [1, math.nan][next(calls) == 5])
    refused(call, script, small(images, second))
    assert load(second / "last.pt")["epoch"] == 1 and len(metrics(second)[1]) == 1
    assert not (second / "best.pt").exists()
    monkeypatch.undo()
    refused(call, script, f"{small(images, first)} --batch-size 24 --lr 1e38 --weight-decay 1e3")
    assert [path.name for path in first.iterdir()] == ["args.json"]


# ---------------------------------------------------------------------------------- two processes
def start(*command, **environment):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        text=True,
        cwd=ROOT,
        env=CPU | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


KILL = """
import os, runpy, sys
del sys.argv[0]
replace = os.replace
def kill(part, path):
    if path.name == "last.pt" and len(path.with_name("metrics.csv").read_text().splitlines()) == 5:
        os.kill(os.getpid(), 9)
    replace(part, path)
os.replace = kill
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module", autouse=True)
def background(request, images, tmp_path_factory):
    """The programs of their own processes run while the other tests do."""
    used = {name for item in request.session.items for name in item.fixturenames}
    folder, started = (
        tmp_path_factory.mktemp("processes"),
        {"folder": None, "killed": [], "two": []},
    )
    started["folder"] = folder
    if "killed" in used:
        options = shlex.split(small(images, folder / "killed"))
        started["killed"] = [start("-c", KILL, train_lma_at.__file__, *options)]
    if "two_processes" in used:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        for rank in "01":
            names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", TORCHELASTIC_RUN_ID="test")
            names |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            command = ["tests/two_processes.py", folder, *shlex.split(small(images, "")), *TWO]
            started["two"].append(start(*command, **names))
    yield started
    for process in started["killed"] + started["two"]:
        process.kill()


@pytest.fixture
def killed(background):
    """Its process and folder."""
    return background["killed"][0], background["folder"] / "killed"


@pytest.fixture(scope="module")
def two_processes(background):
    """The folder, and of each process its status, stdout, and what it saw."""
    printed = [process.communicate(timeout=300) for process in background["two"]]
    found = []
    for rank, (process, (out, error)) in enumerate(zip(background["two"], printed)):
        seen = background["folder"] / f"rank{rank}.json"
        assert seen.exists(), error
        found.append((process.returncode, out, json.loads(seen.read_text())))
    return background["folder"], found


TWO = ["--batch-size", "24"]  # an epoch is one step, so that by_hand has the same random numbers


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_train_as_their_parts_by_hand(script, two_processes, images):
    """Gradients, batch norm's statistics and terms are the means of the two parts, the rows of the
    averages one below the other, over the epochs and, for LMA-AT, over a resume. The accuracies are
    those of the averaged network on all images, and are printed once."""
    folder, ((_, out, _), _) = two_processes
    options = f"{small(images, folder / script.METHOD)} {shlex.join(TWO)}"
    args, last = parse(script, options), load(folder / script.METHOD / "last.pt")
    train, test = (common.load_data("folder", images, split) for split in ("train", "test"))
    _, _, x_val, y_val = common.hold_out(train, args, "cpu")
    model = common.make_model("wrn-10-1", 4).to(memory_format=torch.channels_last)
    scores, e = [], 8 / 255
    for row, state in zip(last["history"], by_hand(script, args, images, world=2), strict=True):
        model.load_state_dict(state["model"])
        right = state["row"] | dict(
            zip(("val clean", "val PGD-10"), common.accuracy(model, x_val, y_val, e, e / 4, 10, 12))
        )
        scores.append(right["val PGD-10"])
        found = {name: value for name, value in row.items() if name != "images/s"}
        assert found == pytest.approx(right, rel=1e-4, abs=1e-6)
    assert_is_epoch(last, state)
    best = load(folder / script.METHOD / "best.pt")
    assert best["epoch"] == 1 + scores.index(max(scores))
    model.load_state_dict(best["model"])
    torch.manual_seed(args.seed)
    right = common.accuracy(model, test.x, test.y, e, 1 / 255, 20, 24)
    lines = re.findall("best.pt:.*", out)
    assert len(lines) == len(SCRIPTS)
    line = lines[SCRIPTS.index(script)]
    assert re.findall(r"([\d.]+) %", line) == [f"{value:.2f}" for value in right]


def test_two_processes_refuse_and_end_together(two_processes, images, refused):
    """Process 0 has loaded (and downloaded) before process 1 begins; process 1 prints nothing; both
    refuse unequal parts, --ema image and a last.pt that one does not see. If one fails both end."""
    folder, ((code_0, _, seen_0), (code_1, out_1, seen_1)) = two_processes
    status = dict.fromkeys((script.METHOD for script in SCRIPTS), 0)
    status |= {"interrupted": 130, "parts": 2, "image": 2, "unseen": 2}
    assert seen_0["status"] == seen_1["status"] == status
    assert seen_0["files"] == {"train": [], "test": ["loaded train"]}
    assert seen_1["files"] == dict.fromkeys(("train", "test"), ["loaded test", "loaded train"])
    assert code_0 != 0 and code_1 != 0 and out_1 == ""
    options = f"{small(images, folder / 'lma_at')} {shlex.join(TWO)} --resume"
    assert "args.json" in refused(call, train_lma_at, options)  # one process is another run
