"""Speed as ratios in one run, and counted FLOPs. pytest does not run it; leave the machine idle.

    python tests/benchmark.py                 # training: steps, memory, start-up on a CPU
    python tests/benchmark.py --device cuda   # on a GPU, --compile too, in less than 8 minutes
    python tests/benchmark.py --autoattack CHECKPOINT --amp   # against pyautoattack, if installed
    python tests/benchmark.py --flops         # of the paper's rows, counted

Ratios are of medians over alternating calls. "Bare passes" are those of our step and no more: the
same network in the same modes. "Published" is the step of the public MART or TRADES code, written
here with its passes: float32, NCHW, batch norm as it is, in TRADES 23 forward passes, f(x) in every
attack step and twice in the loss. "Gain" is that of the last option. With one thread on a CPU
(OMP_NUM_THREADS=1) the times are CPU times, which busy neighbours disturb less.
"""
import copy
import multiprocessing
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from functools import cache, partial
from itertools import count, islice, product
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

BEGIN, EPSILON, STEP = time.time(), 8 / 255, 2 / 255
SIZES = {"cpu": ["wrn-10-2,100", "resnet18/4,100", "resnet18,32"],
         "cuda": ["resnet18,100", "wrn-34-10,100"]}
PLAIN = "--margin-weight 0 --beta 0"
METHODS = {"LMA-AT": (train_lma_at, ""), "MART": (train_mart_ours, f"--attack-loss ce {PLAIN}"),
           "TRADES": (train_trades_ours, f"--attack-loss kl {PLAIN}")}
torch.backends.cudnn.benchmark = True  # as in the training scripts


# ------------------------------ what is measured
def network(arch, device, memory_format=torch.channels_last):
    torch.manual_seed(0)
    model = common.make_model(arch.removesuffix("/4"), 10)
    if arch.endswith("/4"):  # a quarter of the width
        for t in (*model.parameters(), *model.buffers()):
            t.data = t.data[tuple(slice(n // 4 if n >= 64 else n) for n in t.shape)].clone()
    return model.to(device, memory_format=memory_format)


def our_step(method, arch, batch, device, options=""):
    script, line = METHODS[method]
    sys.argv = [script.__name__, *f"--batch-size {batch} {line} {options}".split()]
    args, model = script.parse_args(), network(arch, device)
    if args.compile:
        model.compile()
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay)
    x = torch.randint(256, (20 * batch, 3, 32, 32), dtype=torch.uint8, device=device)
    y = torch.randint(10, (len(x),), device=device)
    past = torch.zeros(2, batch, 10, device=device)
    batches = (b for epoch in count() for b in common.shuffled_batches(x, y, batch, 0, epoch))
    return lambda: script.train_epoch(model, model, optimizer, islice(batches, 1), *past, args)


def bare_step(arch, batch, device, options=""):
    """10 x (forward, input gradient), 2 training forward passes and their backward pass."""
    model = network(arch, device)
    x = torch.rand(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled="--amp" in options):
            model.eval()
            for _ in range(10):
                torch.autograd.grad(model(x.requires_grad_()).sum(), x)
            model.train()
            logits = model(x.detach()), model(x.detach())
        (logits[0].sum() + logits[1].sum()).backward()
    return step


@contextmanager
def batch_norm_as_it_is():
    """Not folded into the convolutions in eval mode."""
    folding, common.conv_bn = common.conv_bn, lambda conv, bn, x: bn(conv(x))
    yield
    common.conv_bn = folding


def published_step(method, arch, batch, device):
    model = network(arch, device, torch.contiguous_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=3.5e-3)
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)

    def kl(x_adv):
        return F.kl_div(F.log_softmax(model(x_adv), 1), F.softmax(model(x), 1), reduction="sum")

    @batch_norm_as_it_is()
    def step():
        model.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(10):
            x_adv.requires_grad_()
            loss = kl(x_adv) if method == "TRADES" else F.cross_entropy(model(x_adv), y)
            x_adv = x_adv.detach() + STEP * torch.sign(torch.autograd.grad(loss, [x_adv])[0])
            x_adv = torch.clamp(torch.min(torch.max(x_adv, x - EPSILON), x + EPSILON), 0, 1)
        model.train()
        optimizer.zero_grad()
        logits = model(x)
        if method == "TRADES":
            loss = F.cross_entropy(logits, y) + 6 * kl(x_adv) / batch
        else:
            logits_adv = model(x_adv)
            p_nat, p_adv = F.softmax(logits, 1), F.softmax(logits_adv, 1)
            second, first = p_adv.argsort(1)[:, -2:].T
            rest = (1.0001 - p_adv + 1e-12).log()
            bce = F.cross_entropy(logits_adv, y)
            bce += F.nll_loss(rest, torch.where(first == y, second, first))
            each = F.kl_div((p_adv + 1e-12).log(), p_nat, reduction="none").sum(1)
            loss = bce + 5 * (each * (1.0000001 - p_nat.gather(1, y[:, None])[:, 0])).mean()
        loss.backward()
        optimizer.step()
    return step


# ------------------------------ how it is measured
def timed(call):
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


def seconds(*calls, rounds=6):
    """The median seconds of each of `calls`, called in turn; the first round does not count."""
    times = [[timed(call) for call in calls] for _ in range(rounds)]
    return [median(own) for own in zip(*times[1:])]


def peak(build, *arguments):
    """MiB by which a network and two steps raise the peak of this process."""
    def now():
        if "cuda" in arguments:
            return torch.cuda.max_memory_allocated() / 2 ** 20
        status = Path("/proc/self/status").read_text()  # getrusage's peak may be the parent's
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    before, step = now(), build(*arguments)
    step()
    step()
    return now() - before


def machine(device):
    """What the figures are of: card and versions, processor and its bfloat16 instructions."""
    text = common.CPUINFO.read_text() if common.CPUINFO.exists() else ""
    name = (re.findall(r"model name\s*: (.+)", text) or [platform.processor()])[0]
    bf16 = ", ".join(sorted(set(re.findall(r"\b\w*bf16\b", text)))) or "none"
    if device == "cuda":
        name = (f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN "
                f"{torch.backends.cudnn.version()}; {name}")
    return (f"{name}, bfloat16 instructions: {bf16}, {'with' if 'amx' in bf16 else 'no'} AMX; "
            f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")


def row(*cells):
    print(f"| {' | '.join(cells)} |", flush=True)


# ------------------------------ the tables
def training(device, sizes, compiled):
    row("network, batch", "LMA-AT", "images/s", "gain", "step / bare passes",
        "published MART / ours", "published TRADES / ours", "peak MiB")
    row(*8 * ["---"])
    options = "", "--amp"
    for arch, batch in sizes:
        size, rows = (arch, batch, device), [[f"{arch}, {batch}", o] for o in options]
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
            peaks = [fresh.apply(peak, (our_step, "LMA-AT", *size, o)) for o in options]
        times = seconds(*(our_step("LMA-AT", *size, o) for o in options),
                        *(bare_step(*size, o) for o in options))
        for cells, own, bare in zip(rows, times, times[2:]):
            cells += [f"{batch / own:.1f}", f"{times[0] / own:.2f}", f"{own / bare:.3f}"]
        for method in ("MART", "TRADES"):
            published, *ours = seconds(published_step(method, *size),
                                       *(our_step(method, *size, o) for o in options))
            for cells, own in zip(rows, ours):
                cells.append(f"{published / own:.2f}")
        for cells, mib in zip(rows, peaks):
            row(*cells, f"{mib:.0f}")
    for (arch, batch), o in product(sizes, options) if compiled else ():
        if time.time() < BEGIN + 330:  # compiling takes long: not in the last of 8 minutes
            torch.compiler.reset()
            eager, own = seconds(our_step("LMA-AT", arch, batch, device, o),
                                 our_step("LMA-AT", arch, batch, device, f"{o} --compile"))
            row(f"{arch}, {batch}", f"{o} --compile".strip(), f"{batch / own:.1f}",
                f"{eager / own:.2f}", *4 * "-")

    x = torch.randint(256, (batch, 3, 32, 32), dtype=torch.uint8, device=device)
    step, draw = seconds(our_step("LMA-AT", arch, batch, device), lambda: common.augment(x))
    print(f"\naugmentation: {100 * draw / step:.2f} % of a step of {arch}, batch {batch}")
    start, command = time.time(), [sys.executable, ROOT / "train_lma_at.py", "--dataset", "shapes"]
    with (tempfile.TemporaryDirectory() as folder,
          subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process):
        next(line for line in process.stdout if "epochs done" in line)  # the first step is next
        print(f"start to first step, train_lma_at.py --dataset shapes: {time.time() - start:.1f} s")
        process.kill()


def flops():
    """FLOPs, 2 per multiply-add; tests/test_training.py counts the passes of a step."""
    def giga(call):
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops() / 1e9

    row("network, images", "method", "GFLOP per image: attack", "training", "EFLOP per run",
        "hours at 20 TFLOP/s")
    row(*6 * ["---"])
    methods = {"vanilla AT": (0, 1), "TRADES": (1, 2), "MART, LMA-AT and all + Ours": (0, 2)}
    for arch, side, n, classes in (("resnet18", 32, 50_000, 10), ("resnet18", 64, 100_000, 200),
                                   ("wrn-34-10", 32, 50_000, 10)):
        with torch.device("meta"):
            model, x = common.make_model(arch, classes), torch.zeros(1, 3, side, side)
        forward, both = giga(lambda: model(x)), giga(lambda: model(x).sum().backward())
        model.eval().requires_grad_(False)
        attack = 10 * giga(lambda: model(x.requires_grad_()).sum().backward())
        for method, (clean, passes) in methods.items():  # f(x) in the attack, passes in training
            a, t = attack + clean * forward, passes * both
            total = 130 * n * (a + t)
            row(f"{arch}, {n:,} {side}x{side}", method, f"{a:.1f}", f"{t:.1f}",
                f"{total / 1e9:.3g}", f"{total / 2e4 / 3600:.3g}")


def autoattack(path, device, amp, n):
    """AutoAttack on n test images, a part at a time in turn: pyautoattack's on the network in NCHW;
    evaluate.py's, also against bare passes: as many of each kind, all full."""
    import evaluate
    from pyautoattack import AutoAttack
    torch.backends.cudnn.benchmark = False  # as in evaluate.py
    full = evaluate.PASSES.rows = 512 if device == "cuda" else 64  # images in one pass
    part = max(full, 100)
    kinds = list(product((False, True), (False, True)[:1 + amp]))  # backward too, in bfloat16
    load_data, passes, own = cache(common.load_data), Counter(), {"pyautoattack": None}

    def note(_, images):
        passes[images[0].requires_grad, torch.is_autocast_enabled(device)] += len(images[0]) / full

    for option in ("", "--amp")[:1 + amp]:
        sys.argv = ["evaluate.py", path, *f"--n {n} --attacks AA {option}".split()]
        e = evaluate.Evaluation(path, evaluate.parse_args(), load_data, torch.device(device))
        e.save = lambda: None
        e.model.register_forward_pre_hook(note)
        own[f"evaluate.py {option}"] = e
    model, images = e.model, e.batch(torch.arange(full) % len(e.label), "")[0]
    usual = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    theirs = AutoAttack(usual, norm="Linf", eps=EPSILON, version="standard", device=device, seed=0)
    theirs.verbose = False

    def bare(backward, in_bfloat16):
        x = images.detach().requires_grad_(backward)
        with torch.autocast(device, torch.bfloat16, enabled=in_bfloat16):
            logits = model(x)
        if backward:
            torch.autograd.grad(logits.sum(), x)

    def standing(name, rows):
        x, y, _ = e.batch(rows, "")
        if name == "pyautoattack":
            with batch_norm_as_it_is():
                x, _ = theirs.run_standard_evaluation(x.contiguous(), y, batch_size=part)
                return (usual(x).argmax(1) == y).cpu()
        evaluate.PASSES.amp = "--amp" in name
        own[name].prediction["Clean"][rows] = evaluate.logits_of(model, x).argmax(1).cpu()
        for k, attack in enumerate(evaluate.AA):
            own[name].run(attack, evaluate.AA[:k], attack)  # what has a prediction and stands
        return own[name].robust("Clean", *evaluate.AA)[rows]

    stand, times, ratios = ({name: [] for name in own} for _ in range(3))
    for i, rows in enumerate(torch.arange(len(e.label)).split(part)):
        for name in list(own)[::(-1) ** i]:
            passes.clear()
            times[name].append(timed(lambda: stand[name].append(standing(name, rows))))
            made = [passes[kind] for kind in kinds]
            each = seconds(*(partial(bare, *kind) for kind in kinds))
            ratios[name].append(times[name][-1] / sum(a * b for a, b in zip(made, each)))
    row("AutoAttack", "images that stand", "others than pyautoattack's", "seconds",
        "pyautoattack / it, by part", "it / bare passes, by part")
    row(*6 * ["---"])
    for name in own:
        found, other = torch.cat(stand[name]), torch.cat(stand["pyautoattack"])
        faster = [a / b for a, b in zip(times["pyautoattack"], times[name])]
        cells = [f"{median(v):.2f} ({min(v):.2f} to {max(v):.2f})" for v in (faster, ratios[name])]
        row(name, f"{found.sum()} of {len(found)}", f"{(found != other).sum()}",
            f"{sum(times[name]):.0f}", cells[0], cells[1] if own[name] else "-")


if __name__ == "__main__":
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--device", default="cpu", choices=SIZES)
    add("--sizes", nargs="+", metavar="NETWORK,BATCH", help="of the steps, resnet18,100 or others")
    add("--autoattack", metavar="CHECKPOINT", help="best.pt of a run")
    add("--amp", action="store_true", help="AutoAttack with it too; the steps always are")
    add("--n", type=common.number(1, kind=int), default=300, help="images for AutoAttack")
    add("--flops", action="store_true", help="count, and measure nothing")
    args = parser.parse_args()
    if args.flops:
        flops()
        sys.exit()
    print(machine(args.device))
    if args.autoattack:
        autoattack(args.autoattack, args.device, args.amp, args.n)
        sys.exit()
    sizes = [size.split(",") for size in args.sizes or SIZES[args.device]]
    training(args.device, [(arch, int(batch)) for arch, batch in sizes], args.device == "cuda")
