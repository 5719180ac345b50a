"""What the four training scripts and evaluate.py share: arguments, networks, data, PGD, mHuber, run folders.

Nothing here decides the method; that is in the scripts. Images are float tensors N x 3 x H x W in [0, 1], networks return
logits N x C, perturbations are L-infinity in the unit of the images. Under torchrun each process runs the same code on its
part of every batch (RANK of WORLD); without it WORLD is 1.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import re
import shlex
import sys
import textwrap
import time
from collections import namedtuple
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import distributed as dist, nn
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.utils import download_url, extract_archive

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
TINY_URL, TINY_MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
DATASETS = ("cifar10", "cifar100", "tinyimagenet", "folder", "shapes")


# ---------------------------------------------------------------------------------------------- arguments and messages
def say(text):
    """Print, from one process only, at once."""
    if RANK == 0:
        print(text, flush=True)


def fail(message):
    """End the program with one line on stderr and exit status 2: an error that the user can mend."""
    print(f"error: {message}\n", end="", file=sys.stderr, flush=True)  # in one piece: other processes may write as well
    os._exit(2) if WORLD > 1 else sys.exit(2)  # at once: threads of torch.distributed can crash a slower end


def brief(error):
    """An exception in one short line."""
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")


class Parser(argparse.ArgumentParser):
    """argparse with errors in one line and the defaults in the help."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            no_default = action.default is None or action.default is False
            return action.help if no_default else super()._get_help_string(action)

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self.Help)

    def error(self, message):
        fail(f"{message} (see --help)")


def number(low, high=math.inf, kind=float):
    """An argparse type: a number in [low, high], typed as 0.031, 3e-4 or 8/255."""
    def parse(text):
        top, _, bottom = text.partition("/")
        try:
            value = kind(text) if kind is int else float(top) / float(bottom or 1)
        except (ValueError, ZeroDivisionError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number such as {'100' if kind is int else '8/255'}")
        if not low <= value <= high:
            hint = f"; images are in [0, 1], did you mean {text}/255?" if high == 1 and value > 1 else ""
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}{hint}")
        return value
    return parse


def setup(device):
    """The torch.device ("auto": CUDA if there is one); joins the other processes of torchrun."""
    name = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: not usable here ({brief(error)}); try --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    if WORLD > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))  # for a download
    return device


def barrier():
    """Wait until every process is here (an all_reduce would not do: on CUDA it returns at once)."""
    if dist.is_initialized():
        dist.barrier()


# ------------------------------------------------------------------------------------------------------------- networks
class WideBlock(nn.Module):
    """Pre-activation residual block of WideResNet (Zagoruyko & Komodakis 2016), parameters named as in TRADES' code."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.convShortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if c_in != c_out else None

    def forward(self, x):
        out = F.relu(self.bn1(x), inplace=True)
        skip = x if self.convShortcut is None else self.convShortcut(out)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(out)), inplace=True))


class WideResNet(nn.Module):
    """WideResNet-depth-widen (the paper's is 34-10): images of any size from 8 x 8 up, logits N x num_classes."""

    def __init__(self, depth, widen, num_classes):
        super().__init__()
        width = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        for i in (1, 2, 3):
            blocks = [WideBlock(width[i - 1], width[i], 1 if i == 1 else 2)]
            blocks += [WideBlock(width[i], width[i], 1) for _ in range((depth - 4) // 6 - 1)]
            self.add_module(f"block{i}", nn.ModuleDict({"layer": nn.Sequential(*blocks)}))
        self.bn1 = nn.BatchNorm2d(width[3])
        self.fc = nn.Linear(width[3], num_classes)
        for conv in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        x = self.conv1(x)
        for block in (self.block1, self.block2, self.block3):
            x = block["layer"](x)
        return self.fc(F.relu(self.bn1(x), inplace=True).mean((2, 3)))


def make_model(arch, num_classes):
    """`resnet18` (torchvision's with the CIFAR stem: 3x3 stride-1 convolution, no max-pool) or `wrn-<depth>-<widen>`."""
    if arch == "resnet18":
        model = torchvision.models.resnet18(num_classes=num_classes)
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's others
        return model
    size = re.fullmatch(r"wrn-(\d+)-(\d+)", arch)
    if not size or (depth := int(size[1])) < 10 or (depth - 4) % 6 or not (widen := int(size[2])):
        fail(f"--arch {arch}: unknown; take resnet18 or wrn-<depth>-<widen> with a depth of 6n+4, such as wrn-34-10")
    return WideResNet(depth, widen, num_classes)


def fold_batchnorm(model):
    """An eval-mode twin of `model` for attacks, with every batch norm that follows a convolution folded into it.

    Same logits up to float rounding in fewer passes over memory, no parameter gradients. It shares all other tensors with
    the model and leaves the model as it is; `twin.refresh()` folds anew after the weights have changed.
    """
    twin = torch.fx.symbolic_trace(copy.deepcopy(model)).eval().requires_grad_(False)
    source = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        tensor.data = source[name].data
    modules, folds = dict(twin.named_modules()), []
    for node in twin.graph.nodes:
        before = node.args[0] if node.args else None
        bn, conv = modules.get(str(node.target)), modules.get(str(getattr(before, "target", None)))
        if isinstance(bn, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d) and len(before.users) == 1:
            folds.append((bn, conv, conv.weight.data))
            conv.weight, conv.bias = (nn.Parameter(torch.empty_like(t), False) for t in (conv.weight, bn.bias))
            node.replace_all_uses_with(before)
            twin.graph.erase_node(node)
    twin.recompile()

    @torch.no_grad()
    def refresh():
        for bn, conv, weight in folds:  # bn(w * x) = (s w) * x + (b - s mean),  s = gamma / sqrt(var + eps)
            s = bn.weight * (bn.running_var + bn.eps).rsqrt()
            torch.mul(weight, s[:, None, None, None], out=conv.weight)
            torch.addcmul(bn.bias, s, bn.running_mean, value=-1, out=conv.bias)
    refresh()
    twin.refresh = refresh
    return twin


def accelerate(net, args, parallel=False):
    """`net` as the training loop calls it: DistributedDataParallel, torch.compile (--compile), bfloat16 (--amp)."""
    run = nn.parallel.DistributedDataParallel(net) if parallel and WORLD > 1 else net
    if run is not net:  # batch norm's running statistics stay each process's own until average_statistics; set here because
        run.broadcast_buffers = False  # the argument's name differs between releases of torch
    run = torch.compile(run) if args.compile else run

    def forward(x):  # losses, moving averages and PGD's projection stay outside, in float32
        with torch.autocast(x.device.type, torch.bfloat16):
            return run(x).float()
    forward.refresh = getattr(net, "refresh", None)
    return forward if args.amp else run


# ----------------------------------------------------------------------------------------------------------------- data
Data = namedtuple("Data", "x_train y_train x_test y_test num_classes")  # images uint8 N x 3 x H x W, labels int64 N


def load_data(name, data_dir):
    """The data set `name` (one of DATASETS), downloaded into or read from `data_dir`; exits in one line if it cannot."""
    data_dir = Path(data_dir)
    if RANK > 0:
        barrier()  # process 0 downloads and fills the cache, the others then find it
    try:
        if name == "shapes":
            data = Data(*draw_shapes(5000, seed=0), *draw_shapes(1000, seed=1), 10)
        elif name in ("cifar10", "cifar100"):
            kind = CIFAR10 if name == "cifar10" else CIFAR100
            train, test = (kind(data_dir, is_train, download=True) for is_train in (True, False))
            data = Data(*(t for s in (train, test) for t in (torch.from_numpy(s.data).permute(0, 3, 1, 2),
                                                             torch.tensor(s.targets))), len(train.classes))
        else:
            data = decode(data_dir / f"{name}.cache.pt", *(folder if name == "folder" else tinyimagenet)(data_dir))
    except Exception as error:  # a broken file makes its reader raise anything
        remedy = "choose another --data-dir" if name == "folder" else "connect to the internet, put the files there"
        fail(f"--dataset {name}: not to be had from {data_dir.resolve()} ({brief(error)}); {remedy}, or take --dataset "
             "shapes, which needs no download")
    if RANK == 0:
        barrier()
    return data


def folder(root):
    """Any ImageFolder tree with train/ and test/ (or val/): two lists of (path, label) and the number of classes."""
    test = next((root / split for split in ("test", "val") if (root / split).is_dir()), None)
    if test is None or not (root / "train").is_dir():
        raise ValueError("it needs the folders train/ and test/ (or val/) with a folder of images per class in each")
    train, test = ImageFolder(root / "train"), ImageFolder(test)
    if train.classes != test.classes:
        raise ValueError(f"train and test differ in the classes {sorted(set(train.classes) ^ set(test.classes))[:5]}")
    return train.samples, test.samples, len(train.classes)


def tinyimagenet(data_dir):
    """tiny-imagenet-200, downloaded and unpacked if need be, its val split as the test set; as `folder`."""
    root, aside = data_dir / "tiny-imagenet-200", data_dir / "tiny-imagenet-200.tmp"
    if not root.is_dir():  # unpacked aside and renamed: a half-unpacked folder is never taken for a whole one
        download_url(TINY_URL, data_dir, md5=TINY_MD5)
        extract_archive(data_dir / "tiny-imagenet-200.zip", aside)
        (aside / root.name).rename(root)
        aside.rmdir()
    train = ImageFolder(root / "train")
    rows = [line.split("\t") for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
    test = [(str(root / "val" / "images" / row[0]), train.class_to_idx[row[1]]) for row in rows]
    return train.samples, test, len(train.classes)


def decode(cache, train, test, num_classes):
    """Lists of (path, label) to Data, once: `cache` keeps the tensors until a path, label, size or date changes."""
    paths, y = zip(*train, *test)
    stats = [(path, label, (s := os.stat(path)).st_size, s.st_mtime_ns) for path, label in zip(paths, y)]
    signature = hashlib.sha256(repr((len(train), stats)).encode()).hexdigest()
    try:
        saved = torch.load(cache, weights_only=True)
        if saved["signature"] == signature:
            return Data(*saved["data"])
    except Exception:  # no cache or an unreadable one: decode
        pass
    say(f"decoding {len(paths):,} images into {cache} (once)")
    for i, path in enumerate(paths):
        try:
            image = Image.open(path)
            if image.mode[0] in "IF":  # 16 or 32 bits, which convert() would clip
                raise ValueError
            image = np.asarray(image.convert("RGB"))
        except Exception:  # a broken file makes PIL raise anything
            fail(f"{path} is not a readable image of 8 bits a channel; replace or remove it")
        x = x if i else np.empty((len(paths), *image.shape), np.uint8)
        if image.shape != x.shape[1:]:
            fail(f"{path} is {image.shape[1]}x{image.shape[0]}, {paths[0]} {x.shape[2]}x{x.shape[1]}; make the sizes equal")
        x[i] = image
    x, y, n = torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor(y), len(train)
    data = Data(x[:n], y[:n], x[n:], y[n:], num_classes)
    try:
        save({"signature": signature, "data": tuple(data)}, cache)
    except (OSError, RuntimeError) as error:
        say(f"note: {cache} cannot be written ({error}); the next start decodes again")
    return data


def draw_shapes(n, seed):
    """Ten drawn classes, 32 x 32: what is learnt from the shape is robust, the faint pattern of each class is not.

    A shape in a random colour, place, size and small rotation stands out by 0.2 to 0.4; a tile of +-2/255 peculiar to
    the class covers the image: natural training may rely on it, an attack of 8/255 removes it.
    """
    g = torch.Generator().manual_seed(seed)
    tile = torch.randint(2, (10, 3, 4, 4), generator=torch.Generator().manual_seed(0)) * 4 - 2  # the same for every seed
    row, column = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    x, y = torch.empty(n, 3, 32, 32), torch.randperm(n, generator=g) % 10
    for label in range(10):
        index = (y == label).nonzero()[:, 0]
        def uniform(low, high, channels=()):
            return low + (high - low) * torch.rand(len(index), *channels, 1, 1, generator=g)
        angle, size, dx, dy = uniform(-0.2, 0.2), uniform(9, 13), column - uniform(13, 18), row - uniform(13, 18)
        u, v = (angle.cos() * dx + angle.sin() * dy) / size, (angle.cos() * dy - angle.sin() * dx) / size
        a, b, r = u.abs(), v.abs(), (u * u + v * v).sqrt()
        box = torch.maximum(a, b) < 0.9
        mask = (r < 0.9, box, (v < 0.8) & (v > 2 * a - 0.9), box & (torch.minimum(a, b) < 0.3), (r < 1) & (r > 0.6),
                a + b < 1, box & (v * 2 % 1 < 0.5), box & (u * 2 % 1 < 0.5),
                box & ((u * 2).floor() + (v * 2).floor()).remainder(2).bool(), box & ((a - b).abs() < 0.3))[label]
        ground, contrast = uniform(0.3, 0.7, (3,)), uniform(0.2, 0.4, (3,)) * uniform(-1, 1).sign()[:, None]
        noise = 0.02 * torch.randn(len(index), 3, 32, 32, generator=g)
        x[index] = ground + contrast * mask[:, None] + noise + tile[label].repeat(1, 8, 8) / 255
    return (x.clamp(0, 1) * 255).round().byte(), y


def hold_out(data, args, device):
    """x_train, y_train, x_val, y_val on the device: --val-size training images, the same for every seed, are held out."""
    n = len(data.x_train) - args.val_size
    if n < args.batch_size or args.batch_size // WORLD < 2 or args.batch_size % WORLD:
        fail(f"--batch-size {args.batch_size} with --val-size {args.val_size} of {len(data.x_train)} training images: an "
             f"epoch needs one whole batch, and each of {WORLD} processes the same number of its images, at least two")
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    return [t[part].to(device) for part in (order[:n], order[n:]) for t in (data.x_train, data.y_train)]


def augment(x):
    """A random crop after padding by 4 zero pixels and a random flip, own to each image: uint8 in, float [0, 1] out."""
    n, _, height, width = x.shape
    image = torch.arange(n, device=x.device)[:, None, None]
    rows = torch.randint(9, (n, 1), device=x.device) + torch.arange(height, device=x.device)
    columns = torch.randint(9, (n, 1), device=x.device) + torch.arange(width, device=x.device)
    columns = torch.where(torch.rand(n, 1, device=x.device) < 0.5, columns, columns.flip(1))
    padded = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    return to_float(padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2))


def to_float(x):
    """uint8 images as float in [0, 1], in the memory format that convolutions like best."""
    return x.to(torch.float32, memory_format=torch.channels_last).div_(255)


# ------------------------------------------------------------------------------------------------------ PGD and mHuber
def pgd(model, x, loss, epsilon=8 / 255, step_size=2 / 255, steps=10, start=None):
    """Projected gradient ascent in the L-infinity ball (eq. 2; the inner loop of Algorithm 1).

    model: images to logits, run in eval mode and put back into its own; no parameter gradients. loss: logits to a scalar.
    start: the first iterate, by default x + 0.001 N(0, I), Algorithm 1's. Returns the last iterate, detached, within
    epsilon of x and in [0, 1].
    """
    training = getattr(model, "training", False)
    if training:
        model.eval()  # open: the paper does not say which mode; eval as in TRADES and MART
    lower, upper = (x - epsilon).clamp_(min=0), (x + epsilon).clamp_(max=1)
    x_adv = x + 0.001 * torch.randn_like(x) if start is None else start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        gradient, = torch.autograd.grad(loss(model(x_adv)), x_adv)
        x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign_(), lower, upper)
    if training:
        model.train()
    return x_adv


def mhuber(u, v, alpha):
    """Modified Huber loss (section 3), the mean over all elements of u - v; value and slope agree at the seam."""
    d = u - v
    c = d.abs() / alpha <= math.pi / 2
    A = alpha ** 2 * (1 - torch.cos(d / alpha))
    B = alpha * d.abs() + (1 - math.pi / 2) * alpha ** 2
    return torch.where(c, A, B).mean()


# ------------------------------------------------------------------------------------------------ the run and its folder
def run(main, *resume):
    """Call main(); Ctrl-C ends it with the command, this one and the options `resume`, that continues it."""
    try:
        main()
    except KeyboardInterrupt:
        again = sys.argv + [option for option in resume if option not in sys.argv]
        say(f"\ninterrupted; continue with: python {shlex.join(again)}")
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that does not exist or is not ours
        fail(f"{brief(error)}; is the folder there, writable and not full?")
    if dist.is_initialized():  # not after an error: NCCL would wait for the others before the error is shown
        dist.destroy_process_group()


def save(state, path):
    """A text, or anything else by torch.save, by process 0; renamed when whole: `path` never holds half a file."""
    if RANK == 0:
        Path(f"{path}.tmp").write_text(state) if isinstance(state, str) else torch.save(state, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)


def open_run(args, device):
    """Make the run folder and its args.json; with --resume return its last.pt (None if no epoch was finished)."""
    record, last = Path(args.run_dir) / "args.json", Path(args.run_dir) / "last.pt"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    new = vars(args) | {"processes": WORLD, "torch": torch.__version__, "hardware": hardware}
    if record.exists() and not args.resume:
        fail(f"{record.parent} already holds a run; add --resume to continue it, or choose another --run-dir")
    barrier()  # every process has looked
    try:
        old = json.loads(record.read_text()) if record.exists() else new
        changed = [f"{k} was {old.get(k)}, is {v}" for k, v in new.items() if old.get(k) != v
                   and k not in ("resume", "run_dir", "data_dir", "device", "hardware", "torch")]
        if changed:
            fail(f"--resume: {record.parent} was started with other settings ({'; '.join(changed)}); give the same ones, "
                 "or choose another --run-dir")
        record.parent.mkdir(parents=True, exist_ok=True)
        save(json.dumps(new, indent=1), record)
        return torch.load(last, map_location=device, weights_only=True) if last.exists() else None
    except Exception as error:  # whatever a damaged file or the file system raises
        fail(f"--run-dir {record.parent}: not readable or not writable ({brief(error)}); choose another")


def start_epoch(n, batch_size, seed, epoch):
    """Seed all random numbers of this epoch (a resumed run needs no generator state); return its shuffled batches:
    this process's indices [n // batch_size, batch_size // WORLD]. An incomplete last batch is left out."""
    shared, *own = np.random.SeedSequence([seed, epoch]).generate_state(1 + WORLD).tolist()
    torch.manual_seed(own[RANK])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(shared))
    return order[:n // batch_size * batch_size].view(-1, batch_size)[:, RANK::WORLD]


def progress(batches, text):
    """Iterate over `batches`, with a live line on a terminal."""
    live, start = RANK == 0 and sys.stderr.isatty(), time.time()
    for i, batch in enumerate(batches, 1):
        yield batch
        if live:
            left = timedelta(seconds=int((time.time() - start) / i * (len(batches) - i)))
            print(f"\r\033[K{text}: step {i}/{len(batches)}, {left} left\r", end="", file=sys.stderr, flush=True)
    print("\033[K" * live, end="", file=sys.stderr, flush=True)


def read_log(log, epoch):
    """{term: mean over the epoch} of {term: values by step}, kept on the device so far; stops if one is not finite."""
    values = all_sum(torch.stack(list(log.values()), 1)).cpu() / WORLD
    for step, term in (~values.isfinite()).nonzero().tolist():
        fail(f"epoch {epoch}, step {step + 1}: the term {list(log)[term]} is {values[step, term]:g}; last.pt, if there is "
             "one, holds the epoch before; try a lower --lr or a smaller weight of the term, in another --run-dir")
    return dict(zip(log, values.mean(0).tolist()))


def all_sum(tensor):
    """`tensor` summed over the processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def all_slots(ema):
    """The moving averages [m / WORLD, C] of all processes, one below the other: [m, C]."""
    slots = ema.new_zeros(WORLD, *ema.shape)
    slots[RANK] = ema
    return all_sum(slots).flatten(0, 1)


def average_statistics(model):
    """Make batch norm's running statistics their mean over the processes, which saw different images."""
    for buffer in (b for b in model.buffers() if b.is_floating_point()):
        all_sum(buffer).div_(WORLD)


def accuracy(net, x, y, epsilon, step_size, steps, batch_size=250):
    """Clean and PGD accuracy in percent on uint8 images (CE, uniform start, last iterate; epsilon 0: no attack)."""
    right = torch.zeros(2, device=x.device)
    for images, labels in zip(x[RANK::WORLD].split(batch_size), y[RANK::WORLD].split(batch_size)):
        x_adv = images = to_float(images)
        if epsilon:
            x_adv = pgd(net, images, lambda logits: F.cross_entropy(logits, labels), epsilon, step_size, steps,
                        images + torch.empty_like(images).uniform_(-epsilon, epsilon))
        with torch.no_grad():
            clean = net(images).argmax(1) == labels
            right += torch.stack([clean.sum(), (clean & (net(x_adv).argmax(1) == labels)).sum()])
    return (100 * all_sum(right) / len(x)).tolist()


def report(model, net, data, args, device):
    """The end of a run: clean and PGD-20 test accuracy of best.pt and last.pt, examples.png, what to run next."""
    barrier()  # the checkpoints are written
    folder, epsilon, rows = Path(args.run_dir), args.epsilon or 8 / 255, {}
    x, y = data.x_test.to(device), data.y_test.to(device)
    say(f"\n| test accuracy | epoch | clean | PGD-20, epsilon {255 * epsilon:g}/255 |\n|---|---|---|---|")
    names = [name for name in ("best.pt", "last.pt") if (folder / name).exists()]
    for name in names:
        state = torch.load(folder / name, map_location=device, weights_only=True)
        if (epoch := state["epoch"]) not in rows:
            model.load_state_dict(state["model"])
            net.refresh()
            start_epoch(1, 1, args.seed, 0)  # the same random starts for every table
            rows[epoch] = accuracy(net, x, y, epsilon, 1 / 255, 20)
        say(f"| {name} | {epoch} | {rows[epoch][0]:.2f} | {rows[epoch][1]:.2f} |")
    x = to_float(x[:10])
    x_adv = pgd(net, x, lambda logits: F.cross_entropy(logits, y[:10]), epsilon, 1 / 255, 20)
    images = F.interpolate(torch.cat([x, x_adv, 0.5 + (x_adv - x) / (2 * epsilon)]), scale_factor=4)
    if RANK == 0:
        torchvision.utils.save_image(images, folder / "examples.png", nrow=10)
    say(f"{folder}/examples.png: natural, adversarial, their difference times {1 / (2 * epsilon):.0f}\n"
        f"next: python evaluate.py {folder / names[0]}")
