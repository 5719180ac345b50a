"""Speed as ratios in one run. pytest does not run it; leave the machine idle.

    python tests/benchmark.py                 # steps of training, memory, on a CPU
    python tests/benchmark.py --device cuda   # on a GPU, with --compile too, in a few minutes

Ratios are of medians over alternating calls. "Bare passes" are the passes of an LMA-AT step and no
more. "Published" is a step with the passes of the public MART or TRADES code: float32, NCHW, and in
TRADES 23 forward passes, since f(x) is computed in every attack step and twice in the loss. With
one thread on a CPU (OMP_NUM_THREADS=1) the times are CPU times.
"""

import argparse
import multiprocessing
import sys
import time
from itertools import count, islice
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import train_lma_at  # noqa: E402
import train_mart_ours  # noqa: E402
import train_trades_ours  # noqa: E402

SIZES = {"cpu": ["wrn-10-2,100", "resnet18,32"], "cuda": ["resnet18,100", "wrn-34-10,100"]}
OPTIONS = {"cpu": ["", "--amp"], "cuda": ["", "--amp", "--amp --compile"]}
METHODS = {
    "LMA-AT": (train_lma_at, ""),
    "MART": (train_mart_ours, "--attack-loss ce --margin-weight 0 --beta 0"),
    "TRADES": (train_trades_ours, "--attack-loss kl --margin-weight 0 --beta 0"),
}
torch.backends.cudnn.benchmark = True  # as in the training scripts


def network(arch, device, options="", memory_format=torch.channels_last):
    model = common.make_model(arch, 10).to(device, memory_format=memory_format)
    if "--compile" in options:
        model.compile(mode="reduce-overhead")
    return model, torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=3.5e-3)


def our_step(method, arch, batch, device, options=""):
    """A function that makes one step of train_epoch."""
    script, line = METHODS[method]
    sys.argv = [script.__name__, *f"--batch-size {batch} {line} {options}".split()]
    args, model_and_optimizer = script.parse_args(), network(arch, device, options)
    x = torch.randint(256, (20 * batch, 3, 32, 32), dtype=torch.uint8, device=device)
    y = torch.randint(10, (len(x),), device=device)
    past = torch.zeros(2, batch, 10, device=device)
    batches = (b for epoch in count() for b in common.shuffled_batches(x, y, batch, 0, epoch))
    return lambda: script.train_epoch(*model_and_optimizer, islice(batches, 1), *past, args)


def bare_step(arch, batch, device, options=""):
    """10 x (forward, input gradient), 2 training forward passes and their backward pass."""
    model, _ = network(arch, device, options)
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
    """A function that makes one step with the passes of the public code of MART or TRADES."""
    model, optimizer = network(arch, device, memory_format=torch.contiguous_format)
    x, y = torch.rand(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    trades = method == "TRADES"

    def kl(z_adv, z):
        return F.kl_div(F.log_softmax(z_adv, 1), F.softmax(z, 1), reduction="sum")

    def step():
        model.eval()
        x_adv = x + 0.001 * torch.randn_like(x)
        for _ in range(10):
            z_adv = model(x_adv.requires_grad_())
            loss = kl(z_adv, model(x)) if trades else F.cross_entropy(z_adv, y)
            x_adv = x_adv.detach() + 2 / 255 * torch.autograd.grad(loss, x_adv)[0].sign()
            x_adv = torch.clamp(torch.min(torch.max(x_adv, x - 8 / 255), x + 8 / 255), 0, 1)
        model.train()
        optimizer.zero_grad()
        z, z_adv = model(x), model(x_adv)
        loss = F.cross_entropy(model(x) if trades else z_adv, y) + 6 * kl(z_adv, z) / batch
        loss.backward()
        optimizer.step()

    return step


def timed(call):
    """Seconds of one call."""
    cuda = torch.cuda.is_initialized()
    wait = torch.cuda.synchronize if cuda else int
    clock = time.perf_counter if cuda or torch.get_num_threads() > 1 else time.process_time
    wait()
    start = clock()
    call()
    wait()
    return clock() - start


def seconds(*calls, rounds=7):
    """The median seconds of each of `calls`, called in turn; the first two rounds do not count."""
    times = [[timed(call) for call in calls] for _ in range(rounds)]
    return [median(own) for own in zip(*times[2:], strict=True)]


def peak(arch, batch, device, options):
    """MiB by which a network and two of our steps raise the peak of this process."""

    def now():
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status").read_text()  # getrusage's peak may be the parent's
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    before, step = now(), our_step("LMA-AT", arch, batch, device, options)
    step(), step()
    return now() - before


def training(device, sizes):
    """Steps of LMA-AT against its bare passes, of MART and TRADES against the published ones."""
    print("network, batch | options | LMA-AT images/s | gain | step / bare passes", end=" | ")
    print("published MART / ours | published TRADES / ours | peak MiB\n" + 7 * "---|" + "---")
    for arch, batch in (size.split(",") for size in sizes):
        size, plain = (arch, int(batch), device), None
        published = {method: published_step(method, *size) for method in ("MART", "TRADES")}
        for options in OPTIONS[device]:
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                mib = fresh.apply(peak, (*size, options))
            own, bare = seconds(our_step("LMA-AT", *size, options), bare_step(*size, options))
            plain, ratios = plain or own, []
            for method, step in published.items():
                theirs, ours = seconds(step, our_step(method, *size, options))
                ratios.append(f"{theirs / ours:.2f}")
            cells = f"{size[1] / own:.1f}", f"{plain / own:.2f}", f"{own / bare:.3f}", *ratios
            print(f"{arch}, {batch}", options, *cells, f"{mib:.0f}", sep=" | ", flush=True)
            torch.compiler.reset()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    add = parser.add_argument
    add("--device", default="cpu", choices=SIZES, help="where to measure")
    add("--sizes", nargs="+", metavar="NETWORK,BATCH", help="sizes of the steps: resnet18,100 ...")
    args = parser.parse_args()
    card = torch.cuda.get_device_name() if args.device == "cuda" else "no card"
    print(card, torch.backends.cpu.get_cpu_capability(), torch.__version__, torch.get_num_threads())
    training(args.device, args.sizes or SIZES[args.device])


if __name__ == "__main__":
    main()
