"""Speed as ratios in one run, and counted FLOPs. Not collected by pytest; leave the machine alone meanwhile.

    python tests/benchmark.py            # steps against bare passes and against the field's usual code; memory; start-up
    python tests/benchmark.py --autoattack CHECKPOINT   # evaluate.py's AutoAttack against pyautoattack, if installed
    python tests/benchmark.py --flops    # cost of the paper's rows, from torch's FLOP counter (no GPU, no data)

Every ratio is one of medians over alternating calls. "usual" is the field's usual step, written here with the passes of
the published code: NCHW, batch norm as it is, and in TRADES 23 forward passes, f(x) in every attack step and twice in the
loss.
"""
import argparse
import multiprocessing
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, ResNet

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import train_lma_at  # noqa: E402
import train_mart_ours  # noqa: E402
import train_trades_ours  # noqa: E402

EPSILON, STEP = 8 / 255, 2 / 255


class QuarterResNet18(ResNet):
    """The CIFAR ResNet-18 at a quarter of the width."""

    def __init__(self):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=10)
        self.conv1, self.bn1, self.maxpool = torch.nn.Conv2d(3, 16, 3, 1, 1, bias=False), torch.nn.BatchNorm2d(16), torch.nn.Identity()
        self.fc = torch.nn.Linear(128, 10)

    def _make_layer(self, block, planes, *args, **named):
        self.inplanes = 16 if planes == 64 else self.inplanes
        return super()._make_layer(block, planes // 4, *args, **named)


def network(name):
    torch.manual_seed(0)
    return QuarterResNet18() if name == "resnet18/4" else common.make_model(name, 10)


def options(script, line=""):
    sys.argv = [script.__name__, *line.split()]
    return script.parse_args()


METHODS = {"LMA-AT": (train_lma_at, ""), "MART": (train_mart_ours, "--attack-loss ce --margin-weight 0 --beta 0"),
           "TRADES": (train_trades_ours, "--attack-loss kl --margin-weight 0 --beta 0")}


def our_step(method, arch, batch):
    script, line = METHODS[method]
    args, model = options(script, f"--batch-size {batch} {line}"), network(arch).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    net, attack_net = common.accelerate(model, args), common.accelerate(common.fold_batchnorm(model), args)
    x, y = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (batch,))
    ema = torch.zeros(batch, 10)
    return lambda: script.train_epoch(net, attack_net, optimizer, x, y, torch.arange(batch)[None], ema, ema, args)


def bare_passes(arch, batch):
    """10 x (forward, input gradient), 2 training forward passes and their backward pass, and nothing else."""
    model = network(arch).to(memory_format=torch.channels_last)
    folded = common.fold_batchnorm(model)
    x = torch.rand(batch, 3, 32, 32).to(memory_format=torch.channels_last)

    def passes():
        for _ in range(10):
            torch.autograd.grad(folded(x.requires_grad_()).sum(), x)
        (model(x.detach()).sum() + model(x.detach()).sum()).backward()
    return passes


def usual_step(method, arch, batch):
    """The step of the published MART or TRADES code in its form and memory format."""
    model = network(arch)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=3.5e-3)
    x, y = torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))

    def step():
        model.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(10):
            x_adv.requires_grad_()
            if method == "MART":
                loss = F.cross_entropy(model(x_adv), y)
            else:
                loss = F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")
            gradient = torch.autograd.grad(loss, [x_adv])[0]
            x_adv = x_adv.detach() + STEP * torch.sign(gradient)
            x_adv = torch.clamp(torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON), 0, 1)
        model.train()
        optimizer.zero_grad()
        nat, adv = model(x), model(x_adv)
        if method == "MART":
            p_adv, p_nat = F.softmax(adv, 1), F.softmax(nat, 1)
            top = p_adv.argsort(1)[:, -2:]
            wrong = torch.where(top[:, -1] == y, top[:, -2], top[:, -1])
            kl = F.kl_div((p_adv + 1e-12).log(), p_nat, reduction="none").sum(1)
            loss = (F.cross_entropy(adv, y) + F.nll_loss((1.0001 - p_adv + 1e-12).log(), wrong)
                    + 5 * (kl * (1.0000001 - p_nat.gather(1, y[:, None])[:, 0])).mean())
        else:
            kl = F.kl_div(F.log_softmax(adv, 1), F.softmax(model(x), 1), reduction="sum")
            loss = F.cross_entropy(nat, y) + 6 * kl / batch
        loss.backward()
        optimizer.step()
    return step


def ratio(slow, fast, pairs=5):
    """Median time of slow / median time of fast, called in turn."""
    times = [[], []]
    for i in range(pairs + 1):
        for t, call in zip(times, (slow, fast)):
            start = time.perf_counter()
            call()
            t.append(time.perf_counter() - start)
    return median(times[0][1:]) / median(times[1][1:])


def high_water():
    """Peak resident memory of this process in MiB (Linux; getrusage's would include the parent's)."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def peak_memory(build, arguments, queue):
    step, before = build(*arguments), high_water()
    step()
    step()
    queue.put(high_water() - before)


def memory(build, *arguments):
    """MiB by which two steps raise the peak of a fresh process over what it held when the step was built."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_memory, args=(build, arguments, queue))
    process.start()
    process.join()
    return queue.get()


def steps():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}\n")
    print("| network, batch | LMA-AT step / bare passes | usual MART / ours | usual TRADES / ours | peak MiB, MART: usual, ours | TRADES |")
    print("|---|---|---|---|---|---|")
    for arch, batch in (("wrn-10-2", 100), ("resnet18/4", 100), ("resnet18", 32)):
        print(f"| {arch}, {batch} | {ratio(our_step('LMA-AT', arch, batch), bare_passes(arch, batch)):.3f}", end="", flush=True)
        for m in ("MART", "TRADES"):
            print(f" | {ratio(usual_step(m, arch, batch), our_step(m, arch, batch)):.2f}", end="", flush=True)
        for m in ("MART", "TRADES"):
            print(f" | {memory(usual_step, m, arch, batch):.0f}, {memory(our_step, m, arch, batch):.0f}", end="", flush=True)
        print(" |", flush=True)

    x = torch.randint(256, (100, 3, 32, 32), dtype=torch.uint8)
    share = ratio(lambda: [common.augment(x) for _ in range(20)], our_step("LMA-AT", "wrn-10-2", 100))
    print(f"\naugmentation: {100 * share / 20:.2f} % of a wrn-10-2 step, batch 100")
    with tempfile.TemporaryDirectory() as folder:
        n = 60_000  # the size of CIFAR-10, from the cache
        images = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
        data = [images[:50_000], torch.randint(10, (50_000,)), images[50_000:], torch.randint(10, (10_000,)), 10]
        torch.save(data, f"{folder}/data.pt")
        code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import torch, common, train_lma_at as t\n"
                f"common.load_data = lambda *a: common.Data(*torch.load({folder + '/data.pt'!r}, weights_only=True))\n"
                "def stop(*a): print('first step reached'); sys.exit()\n"
                f"common.augment = stop; sys.argv = ['x', '--run-dir', {folder + '/run'!r}]; t.main()")
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        print(f"from process start to the first step, ResNet-18, CIFAR-10-sized data: {time.perf_counter() - start:.1f} s")


def flops():
    """FLOPs (2 per multiply-add) a row of the paper costs; the passes of a step are those that tests/test_training.py counts."""
    def count(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / 1e9
    rows = {"vanilla AT": (0, 1), "TRADES": (1, 2), "MART, LMA-AT and all + Ours": (0, 2)}  # f(x) in the attack, training passes
    print("| network, images | method | GFLOP per image: attack | training | EFLOP per run | hours at 20 TFLOP/s |\n|---|---|---|---|---|---|")
    for arch, size, n, classes in (("resnet18", 32, 50_000, 10), ("resnet18", 64, 100_000, 200), ("wrn-34-10", 32, 50_000, 10)):
        with torch.device("meta"):
            model, x = common.make_model(arch, classes), torch.zeros(2, 3, size, size)
        folded = common.fold_batchnorm(model)
        forward, training = count(lambda: model(x)) / 2, count(lambda: model(x).sum().backward()) / 2
        attack = count(lambda: folded(x.requires_grad_()).sum().backward()) / 2
        x.requires_grad_(False)
        for name, (clean, passes) in rows.items():
            a, t = 10 * attack + clean * forward, passes * training
            total = 130 * n * (a + t)
            print(f"| {arch}, {n:,} {size}x{size} | {name} | {a:.1f} | {t:.1f} | {total / 1e9:.3g} | {total / 2e4 / 3600:.3g} |")


def autoattack(path, n=200, part=40):
    """AutoAttack standard on n test images, `part` at a time in turn: evaluate.py's on the folded twin, channels_last,
    against pyautoattack's on the network as it is (NCHW; it cannot take channels_last)."""
    import evaluate
    from pyautoattack import AutoAttack
    model, _, run = evaluate.load_checkpoint(path, None)
    theirs = AutoAttack(model, norm="Linf", eps=EPSILON, version="standard", device="cpu", seed=0)
    theirs.verbose = False
    folded = common.fold_batchnorm(evaluate.load_checkpoint(path, None)[0].to(memory_format=torch.channels_last))
    data = common.load_data(run["dataset"], run["data_dir"])
    index = torch.randperm(len(data.x_test), generator=torch.Generator().manual_seed(0))[:n]
    seconds, robust = {"ours": [], "pyautoattack": []}, {"ours": [], "pyautoattack": []}
    for i, rows in enumerate(index.split(part)):
        x, y = common.to_float(data.x_test[rows]), data.y_test[rows]
        for name in list(seconds)[::1 if i % 2 else -1]:
            start, left = time.perf_counter(), (model(x).argmax(1) == y).nonzero()[:, 0]
            if name == "ours":
                for attack in evaluate.AA:
                    draws = evaluate.Draws(0, attack, rows[left])
                    x_adv = evaluate.ATTACKS[attack][0](folded, x[left], y[left], EPSILON, draws)
                    left = left[model(x_adv).argmax(1) == y[left]]
            else:
                x_adv, _ = theirs.run_standard_evaluation(x.contiguous(), y, batch_size=part)
                left = (model(x_adv).argmax(1) == y).nonzero()[:, 0]
            seconds[name].append(time.perf_counter() - start)
            robust[name] += rows[left].tolist()
    differ = set(robust["ours"]) ^ set(robust["pyautoattack"])
    ratios = sorted(theirs / ours for theirs, ours in zip(seconds["pyautoattack"], seconds["ours"]))
    print(f"{run['arch']}, {n} images: robust {100 * len(robust['ours']) / n:.1f} % ours, {100 * len(robust['pyautoattack']) / n:.1f} % "
          f"pyautoattack, {len(differ)} images differ; pyautoattack / ours {median(ratios):.2f} times the time "
          f"({ratios[0]:.2f} to {ratios[-1]:.2f} by part; {sum(seconds['pyautoattack']):.0f} s / {sum(seconds['ours']):.0f} s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flops", action="store_true")
    parser.add_argument("--autoattack", metavar="CHECKPOINT")
    arguments = parser.parse_args()
    flops() if arguments.flops else autoattack(arguments.autoattack) if arguments.autoattack else steps()
