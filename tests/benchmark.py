"""Speed as ratios in one run, and counted FLOPs. pytest does not run it; leave the machine idle.

    python tests/benchmark.py                 # steps of training, memory, start-up on a CPU
    python tests/benchmark.py --device cuda   # on a GPU, with --compile too, in a few minutes
    python tests/benchmark.py --autoattack CHECKPOINT   # against pyautoattack, if installed
    python tests/benchmark.py --flops         # FLOPs of the paper's rows, counted

Ratios are of medians over alternating calls. "Bare passes" are the passes of an LMA-AT step and no
more: the same network in the same modes. "Published" is the step of the public MART or TRADES
code, written here with its passes: float32, NCHW, and in TRADES 23 forward passes, since f(x) is
computed in every attack step and twice in the loss. With one thread on a CPU (OMP_NUM_THREADS=1)
the times are CPU times, which busy neighbours disturb less.
"""

import json
import multiprocessing
import platform
import re
import subprocess
import sys
import tempfile
import time
from itertools import count, islice
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import train_lma_at  # noqa: E402
import train_mart_ours  # noqa: E402
import train_trades_ours  # noqa: E402

EPSILON, STEP = 8 / 255, 2 / 255
SIZES = {
    "cpu": ["wrn-10-2,100", "resnet18/4,100", "resnet18,32"],
    "cuda": ["resnet18,100", "wrn-34-10,100"],
}
OPTIONS = {"cpu": ["", "--amp"], "cuda": ["", "--amp", "--amp --compile"]}
PLAIN = "--margin-weight 0 --beta 0"
METHODS = {
    "LMA-AT": (train_lma_at, ""),
    "MART": (train_mart_ours, f"--attack-loss ce {PLAIN}"),
    "TRADES": (train_trades_ours, f"--attack-loss kl {PLAIN}"),
}
torch.backends.cudnn.benchmark = True  # as in the training scripts


# ------------------------------------------------------------------------------ what is measured
def network(arch, device, memory_format=torch.channels_last):
    """The network of that name; "resnet18/4" is a ResNet-18 of a quarter of the width."""
    torch.manual_seed(0)
    model = common.make_model(arch.removesuffix("/4"), 10)
    if arch.endswith("/4"):
        for t in (*model.parameters(), *model.buffers()):
            t.data = t.data[tuple(slice(n // 4 if n >= 64 else n) for n in t.shape)].clone()
    return model.to(device, memory_format=memory_format)


def our_step(method, arch, batch, device, options=""):
    """A function that makes one step of train_epoch."""
    script, line = METHODS[method]
    sys.argv = [script.__name__, *f"--batch-size {batch} {line} {options}".split()]
    args, model = script.parse_args(), network(arch, device)
    if args.compile:
        model.compile(mode="reduce-overhead")
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay)
    x = torch.randint(256, (20 * batch, 3, 32, 32), dtype=torch.uint8, device=device)
    y = torch.randint(10, (len(x),), device=device)
    past = torch.zeros(2, batch, 10, device=device)
    batches = (b for epoch in count() for b in common.shuffled_batches(x, y, batch, 0, epoch))
    return lambda: script.train_epoch(model, optimizer, islice(batches, 1), *past, args)


def bare_step(arch, batch, device, options=""):
    """10 x (forward, input gradient), 2 training forward passes and their backward pass."""
    model = network(arch, device)
    if "--compile" in options:
        model.compile(mode="reduce-overhead")
    x = torch.rand(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled="--amp" in options):
            with common.frozen(model):
                for _ in range(10):
                    torch.autograd.grad(model(x.requires_grad_()).sum(), x)
            logits = model(x.detach()), model(x.detach())
        (logits[0].sum() + logits[1].sum()).backward()
        model.zero_grad()

    return step


def published_step(method, arch, batch, device):
    """A function that makes one step of the public code of MART or TRADES."""
    model = network(arch, device, torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=3.5e-3)
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)

    def kl(x_adv):
        return F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")

    def attack():
        model.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(10):
            x_adv.requires_grad_()
            loss = kl(x_adv) if method == "TRADES" else F.cross_entropy(model(x_adv), y)
            x_adv = x_adv.detach() + STEP * torch.sign(torch.autograd.grad(loss, [x_adv])[0])
            x_adv = torch.clamp(torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON), 0, 1)
        model.train()
        return x_adv

    def trades_loss(x_adv):
        return F.cross_entropy(model(x), y) + 6 * kl(x_adv) / batch

    def mart_loss(x_adv):
        logits, logits_adv = model(x), model(x_adv)
        p_nat, p_adv = F.softmax(logits, 1), F.softmax(logits_adv, 1)
        second, first = p_adv.argsort(1)[:, -2:].T
        rest = (1.0001 - p_adv + 1e-12).log()
        bce = F.cross_entropy(logits_adv, y)
        bce = bce + F.nll_loss(rest, torch.where(first == y, second, first))
        each = F.kl_div((p_adv + 1e-12).log(), p_nat, reduction="none").sum(1)
        return bce + 5 * (each * (1.0000001 - p_nat.gather(1, y[:, None])[:, 0])).mean()

    def step():
        x_adv = attack()
        optimizer.zero_grad()
        loss = trades_loss(x_adv) if method == "TRADES" else mart_loss(x_adv)
        loss.backward()
        optimizer.step()

    return step


# ---------------------------------------------------------------------------- how it is measured
def timed(call):
    """Seconds of one call."""
    clock, wait = time.perf_counter, int
    if torch.cuda.is_initialized():
        wait = torch.cuda.synchronize
    elif torch.get_num_threads() == 1:
        clock = time.process_time
    wait()
    start = clock()
    call()
    wait()
    return clock() - start


def seconds(*calls, rounds=7):
    """The median seconds of each of `calls`, called in turn; the first two rounds do not count."""
    times = [[timed(call) for call in calls] for _ in range(rounds)]
    return [median(own) for own in zip(*times[2:], strict=True)]


def peak(build, *arguments):
    """MiB by which a network and two steps raise the peak of this process."""

    def now():
        if "cuda" in arguments:
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()  # getrusage's peak may be the parent's
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    before, step = now(), build(*arguments)
    step()
    step()
    return now() - before


def machine(device):
    """What the figures are of: card and versions, processor and its bfloat16 instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    name = (re.findall(r"model name\s*: (.+)", text) or [platform.processor()])[0]
    bf16 = ", ".join(sorted(set(re.findall(r"\b\w*bf16\b", text)))) or "none"
    if device == "cuda":
        name = (
            f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN "
            f"{torch.backends.cudnn.version()}; {name}"
        )
    threads = torch.get_num_threads()
    return f"{name}, bfloat16 instructions: {bf16}; torch {torch.__version__}, {threads} threads\n"


def print_row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


# ------------------------------------------------------------------------------------- the tables
def training(device, sizes):
    """Steps of LMA-AT against its bare passes, of MART and TRADES against the published ones."""
    titles = ["network, batch", "options", "LMA-AT images/s", "gain", "step / bare passes"]
    titles += ["published MART / ours", "published TRADES / ours", "peak MiB"]
    print_row(*titles)
    print_row(*len(titles) * ["---"])
    for arch, batch in sizes:
        plain = None
        published = {m: published_step(m, arch, batch, device) for m in ("MART", "TRADES")}
        for options in OPTIONS[device]:
            size = (arch, batch, device)
            with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
                mib = fresh.apply(peak, (our_step, "LMA-AT", *size, options))
            own, bare = seconds(our_step("LMA-AT", *size, options), bare_step(*size, options))
            plain = plain or own
            cells = [f"{batch / own:.1f}", f"{plain / own:.2f}", f"{own / bare:.3f}"]
            for method, step in published.items():
                theirs, ours = seconds(step, our_step(method, *size, options))
                cells.append(f"{theirs / ours:.2f}")
            print_row(f"{arch}, {batch}", options, *cells, f"{mib:.0f}")
            torch.compiler.reset()


def start_up():
    """Seconds from the command to the first step."""
    start, command = time.time(), [sys.executable, ROOT / "train_lma_at.py", "--dataset", "shapes"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process,
    ):
        next(line for line in process.stdout if "done; folder" in line)  # the first step is next
        print(f"start to first step, train_lma_at.py --dataset shapes: {time.time() - start:.1f} s")
        process.kill()


def flops():
    """FLOPs, 2 per multiply-add; tests/test_training.py counts the passes of a step."""

    def giga(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / 1e9

    titles = ["network, images", "method", "GFLOP per image: attack", "training"]
    titles += ["EFLOP per run", "hours at 20 TFLOP/s"]
    print_row(*titles)
    print_row(*len(titles) * ["---"])
    methods = {"vanilla AT": (0, 1), "TRADES": (1, 2), "MART, LMA-AT and all + Ours": (0, 2)}
    for arch, side, n, classes in (
        ("resnet18", 32, 50_000, 10),
        ("resnet18", 64, 100_000, 200),
        ("wrn-34-10", 32, 50_000, 10),
    ):
        with torch.device("meta"):
            model, x = common.make_model(arch, classes), torch.zeros(1, 3, side, side)
        forward = giga(lambda: model(x))
        both = giga(lambda: model(x).sum().backward())
        with common.frozen(model):
            attack = 10 * giga(lambda: model(x.requires_grad_()).sum().backward())
        for method, (clean, passes) in methods.items():  # f(x) in the attack, passes in training
            a, t = attack + clean * forward, passes * both
            total = 130 * n * (a + t)
            size = f"{arch}, {n:,} {side}x{side}"
            hours = total / 2e4 / 3600
            print_row(size, method, f"{a:.1f}", f"{t:.1f}", f"{total / 1e9:.3g}", f"{hours:.3g}")


def autoattack(path, device, n):
    """AutoAttack on n test images: evaluate.py against pyautoattack, image by image."""
    from pyautoattack import AutoAttack

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, ROOT / "evaluate.py", path, "--attacks", "AA", "--n", str(n)]
        command += ["--device", device, "--out", out]
        start = time.time()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ours, found = time.time() - start, json.loads(out.read_text())
    label, predictions = torch.tensor(found["label"]), found["prediction"]
    parts = ("Clean", "APGD-CE", "APGD-T", "FAB-T", "SQUARE")
    stand = torch.stack([torch.tensor(predictions[part]) == label for part in parts]).all(0)

    state = torch.load(path, map_location=device, weights_only=True)
    args = state["args"]
    model = common.make_model(args["arch"], len(args["classes"])).to(device)
    model.load_state_dict(state["model"])
    model.eval().requires_grad_(False)
    data = common.load_data(args["dataset"], args["data_dir"], "test")
    x = common.to_float(data.x[found["index"]].to(device)).contiguous()
    y = data.y[found["index"]].to(device)
    attack = AutoAttack(model, norm="Linf", eps=EPSILON, version="standard", device=device, seed=0)
    attack.verbose = False
    start = time.time()
    x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=n)
    theirs = time.time() - start
    other = ((model(x_adv).argmax(1) == y).cpu() != stand).sum()
    print(
        f"of {n} images {stand.sum()} stand, {other} are judged differently by pyautoattack\n"
        f"evaluate.py, start included: {ours:.0f} s, pyautoattack: {theirs:.0f} s"
    )


def main():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--device", default="cpu", choices=SIZES, help="where to measure")
    add("--sizes", nargs="+", metavar="NETWORK,BATCH", help="sizes of the steps: resnet18,100 ...")
    add("--autoattack", metavar="CHECKPOINT", help="best.pt of a run, to time AutoAttack on it")
    add("--n", type=common.number(1, kind=int), default=200, help="images for AutoAttack")
    add("--flops", action="store_true", help="count FLOPs and measure nothing")
    args = parser.parse_args()
    if args.flops:
        flops()
        return
    print(machine(args.device))
    if args.autoattack:
        autoattack(args.autoattack, args.device, args.n)
        return
    sizes = [size.split(",") for size in args.sizes or SIZES[args.device]]
    training(args.device, [(arch, int(batch)) for arch, batch in sizes])
    start_up()


if __name__ == "__main__":
    main()
