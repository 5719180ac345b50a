"""What the four training scripts and evaluate.py share: PGD, mHuber, networks, data, a run's files.

Images are float tensors [N, 3, H, W] in [0, 1], networks return logits [N, C], perturbations are
L-infinity in the unit of the images. Under torchrun, process RANK of WORLD works on its part of
every batch.
"""

import argparse
import json
import os
import re
import sys
import time
import zlib
from collections import OrderedDict, namedtuple
from contextlib import contextmanager, suppress
from copy import deepcopy
from datetime import timedelta
from functools import partial
from math import ceil, pi
from pathlib import Path
from shlex import quote

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import is_image_file
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models.resnet import conv1x1, conv3x3
from torchvision.utils import save_image

RANK, WORLD = 0, 1
if dist.is_available() and dist.is_torchelastic_launched():  # Slurm and MPI set RANK too: not ours
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_SIZE = {"train": (200, 100_000), "test": (200, 10_000)}  # classes, images


# ------------------------------------------------------------------------- PGD, mHuber, accuracy
@contextmanager
def frozen(model):
    """Inside, `model` is in eval mode and its weights need no gradient.

    Afterwards, also after an exception, every module has its own mode again and every weight its
    own requires_grad: a batch norm that the caller keeps in eval mode stays there.
    """
    before = [(module, "training", module.training) for module in model.modules()]
    before += [(weight, "requires_grad", weight.requires_grad) for weight in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


@torch.enable_grad()
def pgd(model, x, loss, epsilon=8 / 255, step_size=2 / 255, steps=10, start=None):
    """Projected gradient ascent in the L-infinity ball (eq. 2; the inner loop of Algorithm 1).

    x are images [N, 3, H, W] in [0, 1], not standardised: a Normalize belongs into the model.
    loss maps logits [N, C] to a scalar. start is the first iterate, by default x + 0.001 N(0, I)
    as in Algorithm 1. Returns the last iterate, within epsilon of x and in [0, 1], as a constant:
    no gradient flows through it.
    """
    x = x.detach()
    lower, upper = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    x_adv = x + 0.001 * torch.randn_like(x) if start is None else start
    with frozen(model):  # open: the paper does not say which mode; eval as in TRADES and MART
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            logits = model(x_adv).to(x.dtype)  # under autocast they are bfloat16
            gradient = torch.autograd.grad(loss(logits), x_adv)[0]
            x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), lower, upper)
    return x_adv


def mhuber(u, v, alpha):
    """Modified Huber loss (section 3) of u - v, tensors of one shape: the mean over its elements.

    In float32 the value of an element is 0 below |d| of about 1e-3, where 1 - cos cancels; its
    gradient stays right.
    """
    d = u - v
    c = d.abs() / alpha <= pi / 2
    A = alpha**2 * (1 - torch.cos(d / alpha))
    B = alpha * d.abs() + (1 - pi / 2) * alpha**2
    return torch.where(c, A, B).mean()


def accuracy(model, x, y, epsilon, step_size, steps, batch_size, amp=False):
    """Clean and PGD accuracy in percent on uint8 images x with labels y.

    PGD maximises the cross-entropy from a uniform start, and its last iterate decides. With amp
    the search runs in bfloat16; the decisions do not.
    """
    correct = torch.zeros(2, dtype=torch.int64, device=x.device)
    parts = torch.arange(len(x))[RANK::WORLD].split(batch_size)
    for part in progress(parts, len(parts), "accuracy, batch"):
        x_nat = x_adv = to_float(x[part])
        labels = y[part]
        if epsilon:
            loss = partial(F.cross_entropy, target=labels)
            start = x_nat + torch.empty_like(x_nat).uniform_(-epsilon, epsilon)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                x_adv = pgd(model, x_nat, loss, epsilon, step_size, steps, start)
        with frozen(model), torch.no_grad():
            clean = model(x_nat).argmax(1) == labels
            robust = clean & (model(x_adv).argmax(1) == labels)
        correct += torch.stack([clean.sum(), robust.sum()])
    return [100 * count / len(x) for count in all_sum(correct).tolist()]


# ------------------------------------------------------------------------------------ networks
def resnet18(num_classes):
    """torchvision's ResNet-18 with the CIFAR stem: a 3x3 convolution of stride 1, no max-pool."""
    model = torchvision.models.resnet18(num_classes=num_classes)
    model.conv1 = conv3x3(3, 64)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out")
    model.maxpool = nn.Identity()
    return model


class WideBlock(nn.Module):
    """Pre-activation residual block (Zagoruyko & Komodakis 2016), named as in TRADES' code."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = conv3x3(c_in, c_out, stride)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = conv3x3(c_out, c_out)
        self.convShortcut = conv1x1(c_in, c_out, stride) if c_in != c_out else None

    def forward(self, x):
        out = self.bn1(x).relu_()
        skip = x if self.convShortcut is None else self.convShortcut(out)
        out = self.bn2(self.conv1(out)).relu_()
        return skip + self.conv2(out)


class WideResNet(nn.Module):
    """WideResNet-depth-widen (the paper's is 34-10) for images from 8 x 8 up."""

    def __init__(self, depth, widen, num_classes):
        super().__init__()
        self.conv1 = conv3x3(3, 16)
        c_in = 16
        for i, stride in ((1, 1), (2, 2), (3, 2)):
            blocks, c_out = [], 8 * 2**i * widen
            for k in range((depth - 4) // 6):
                blocks.append(WideBlock(c_in, c_out, 1 if k else stride))
                c_in = c_out
            self.add_module(f"block{i}", nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks))))
        self.bn1 = nn.BatchNorm2d(c_in)
        self.fc = nn.Linear(c_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.bn1(x).relu_().mean((2, 3)))


def make_model(arch, num_classes):
    """The network `resnet18` or `wrn-<depth>-<widen>`, with its initial weights."""
    if arch == "resnet18":
        return resnet18(num_classes)
    match = re.fullmatch(r"wrn-([1-9]\d+)-([1-9]\d?)", arch)
    if match is None or int(match[1]) % 6 != 4:
        fail(f"--arch {arch}: unknown; take resnet18 or wrn-<depth>-<widen>, depth 6n+4: wrn-34-10")
    return WideResNet(int(match[1]), int(match[2]), num_classes)


# ---------------------------------------------------------------------------------------- data
Data = namedtuple("Data", "x y classes")  # uint8 [N, 3, H, W], int64 [N], names of the classes


def load_data(name, data_dir, split, download=True):
    """The images of one split, "train" or "test", of the data set `name` of DATASETS."""
    if RANK > 0:
        dist.barrier()  # process 0 downloads, the others then find the files
    try:
        data = DATASETS[name](Path(data_dir), split, download)
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        fail(
            f"{name} ({split}) cannot be read from {data_dir} ({error!s:.300}); give its place by "
            "--data-dir, or move a damaged folder away: what can be downloaded then is"
        )
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    return data


def load_splits(args):
    """The train and the test split. Sets args.classes, and args.data, a fingerprint of train."""
    train, test = (load_data(args.dataset, args.data_dir, split) for split in ("train", "test"))
    args.classes, args.data = train.classes, fingerprint(train.x, train.y)
    if (train.classes, train.x.shape[1:]) != (test.classes, test.x.shape[1:]):
        odd = sorted(set(train.classes) ^ set(test.classes))
        fail(f"train and test need the same classes ({odd}: in one alone) and images of one size")
    return train, test


def cifar(dataset, root, split, download):
    """CIFAR-10 or CIFAR-100, downloaded if its folder is not there: it is never overwritten."""
    download = download and not (root / dataset.base_folder).is_dir()
    images = dataset(root, train=split == "train", download=download)
    x = torch.from_numpy(images.data).permute(0, 3, 1, 2)
    return Data(x, torch.tensor(images.targets), images.classes)


def tinyimagenet(root, split, download):
    """tiny-imagenet-200 as published, downloaded if need be; its val split is the test set."""
    folder = root / "tiny-imagenet-200"
    if download and not folder.is_dir():
        download_and_extract_archive(TINY_URL, root, md5=TINY_MD5)
    if split == "train":
        samples, classes = class_folders(folder / "train")
    else:
        table = (folder / "val/val_annotations.txt").read_text()
        rows = [line.split("\t")[:2] for line in table.splitlines()]
        classes = sorted({label for _, label in rows})
        samples = [(folder / "val/images" / name, classes.index(label)) for name, label in rows]
    if (len(classes), len(samples)) != TINY_SIZE[split]:
        raise ValueError(f"{folder} has not {TINY_SIZE[split]} classes and images")
    return read_images(samples, classes)


def own_images(root, split, download):
    """Images of your own: train/ and test/ (or val/), in each a folder of images per class."""
    if split == "test" and not (root / split).is_dir():
        split = "val"
    return read_images(*class_folders(root / split))


def class_folders(root):
    """[(path, label)] of the images in the folders of `root`, and the classes, their names."""

    def is_image(path):  # not a copy that a notebook or a network drive hides (@eaDir)
        hidden = re.search(r"[/\\][.@]", path.removeprefix(str(root)))
        return is_image_file(path) and not hidden

    images = ImageFolder(root, is_valid_file=is_image)
    if len(images.classes) < 2:
        raise ValueError(f"{root} needs two or more folders, one for each class")
    left_out = sum(len(names) for _, _, names in os.walk(root, followlinks=True)) - len(images)
    if left_out:
        print0(f"note: {left_out} files in {root} are hidden, or no images: left out")
    return images.samples, images.classes


def read_images(samples, classes):
    """Data of a list of (path, label); all images are of one size and of 8 bits a channel."""
    first = Image.open(samples[0][0])
    x = np.empty((len(samples), first.height, first.width, 3), np.uint8)
    for i, (path, _) in enumerate(progress(samples, len(samples), "reading images")):
        try:
            image = Image.open(path)
            if image.mode[0] in "IF" or image.size != first.size:  # convert() clips 16 bits
                raise ValueError(f"{image.mode} of {image.size}, needed are 8 bits, {first.size}")
            x[i] = image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # PIL's, for a damaged file
            raise ValueError(f"{path}: {error}") from error
    y = torch.tensor([label for _, label in samples])
    return Data(torch.from_numpy(x).permute(0, 3, 1, 2), y, classes)


def drawn_shapes(root, split, download):
    """Ten classes of drawn 32 x 32 images that hold a robust feature and one that is not.

    The robust one is a mirror-symmetric shape of 6 x 6 squares that stands out by 0.2 to 0.4. The
    other is a tile of +-2/255, peculiar to the class, all over the image: natural training may
    rely on it, an attack of 8/255 removes it.
    """
    n, seed = (5000, 1) if split == "train" else (1000, 2)
    same, g = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    left = torch.randint(2, (10, 1, 6, 3), generator=same)
    shapes = F.interpolate(torch.cat([left, left.flip(3)], 3).float(), scale_factor=4)
    tiles = (torch.randint(2, (10, 3, 4, 4), generator=same) * 4 - 2) / 255
    y = torch.randperm(n, generator=g) % 10
    sign = torch.randint(2, (n, 1, 1, 1), generator=g) * 2 - 1
    contrast = sign * (0.2 + 0.2 * torch.rand(n, 3, 1, 1, generator=g))
    x = 0.3 + 0.4 * torch.rand(n, 3, 1, 1, generator=g) + contrast * F.pad(shapes[y], (4, 4, 4, 4))
    x += tiles[y].repeat(1, 1, 8, 8) + 0.02 * torch.randn(n, 3, 32, 32, generator=g)
    return Data((x.clamp(0, 1) * 255).round().byte(), y, list("ABCDEFGHIJ"))


DATASETS = {
    "cifar10": partial(cifar, CIFAR10),
    "cifar100": partial(cifar, CIFAR100),
    "tinyimagenet": tinyimagenet,
    "folder": own_images,
    "shapes": drawn_shapes,
}


def fingerprint(x, y):
    """Number, size and checksum of images and labels: whether two of them are the same."""
    checksum = zlib.crc32(x.contiguous().numpy(), zlib.crc32(y.numpy()))
    return f"{len(x)} images of {x.shape[2]}x{x.shape[3]}, checksum {checksum:08x}"


def hold_out(train, n, device):
    """x_train, y_train, x_val, y_val: n training images, the same for every seed, are held out.

    open: the paper does not say which epoch it reports. Here the best on the held-out images is
    kept, since choosing on the test set overstates the accuracy (Rice et al. 2020).
    """
    order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split([max(0, len(order) - n)])
    return [tensor[part].to(device) for part in parts for tensor in (train.x, train.y)]


def check_batch(args, n):
    """Refuse a batch, or moving averages, that do not fit the `n` training images and processes."""
    if args.batch_size > n or args.batch_size % WORLD:
        fail(
            f"--batch-size {args.batch_size}: --val-size leaves {n} images to train on; lower one "
            f"of the two, and take a multiple of {WORLD}, the number of processes"
        )
    if args.ema == "image" and WORLD > 1:
        fail("--ema image: one process alone has all images' averages; leave out torchrun")


def shuffled_batches(x, y, batch_size, seed, epoch):
    """Batches (augmented images, labels, their index in x) of one epoch, this process's part.

    The incomplete last batch is left out. All random numbers follow from (seed, epoch), the
    starts of PGD too, which are drawn between two batches.
    """
    order_seed, *process_seeds = np.random.SeedSequence([seed, epoch]).generate_state(1 + WORLD)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(int(order_seed)))
    batches = order[: len(x) // batch_size * batch_size].view(-1, batch_size)
    torch.manual_seed(int(process_seeds[RANK]))
    for index in batches[:, RANK::WORLD].to(x.device):
        yield augment(x[index]), y[index], index


def augment(x):
    """Float images: a random crop after padding by 4 zero pixels, and a random flip, of each.

    open: the paper names no augmentation; this is that of TRADES and MART.
    """
    n, _, height, width = x.shape
    crops = F.pad(x, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)  # n x 3 x 9 x 9 x H x W
    top, left = torch.randint(9, (2, n), device=x.device)
    x = crops[torch.arange(n, device=x.device), :, top, left]
    flip = torch.rand(n, 1, 1, 1, device=x.device) < 0.5
    return to_float(torch.where(flip, x.flip(3), x))


def to_float(x):
    """uint8 images as float in [0, 1], in the memory format that convolutions like best."""
    return x.to(torch.float32, memory_format=torch.channels_last) / 255


# ------------------------------------------------------------------------------ the files of a run
def open_run(args, model, optimizer, ema_adv, ema_nat):
    """Begin the folder of a run, or with --resume load its last.pt. Returns history and best.

    history has a row for each epoch done; best is what best.pt holds, or None. Without a last.pt
    the folder must be empty, or hold nothing but the args.json of this run.
    """
    may_differ = dict.fromkeys(("resume", "run_dir", "data_dir", "device"))
    folder, settings = Path(args.run_dir), vars(args) | may_differ
    last = folder / "last.pt"
    folder.mkdir(parents=True, exist_ok=True)
    if args.resume and last.exists():
        state = load_file(last)
        old = (state["args"] if "best" in state else {}) | may_differ
        differ = [f"{k} was {old.get(k)}, is {v}" for k, v in settings.items() if v != old.get(k)]
        if differ:
            fail(f"{last} is of another run ({'; '.join(differ):.300}); take another --run-dir")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema_adv.copy_(state["ema_adv"].chunk(WORLD)[RANK])
        ema_nat.copy_(state["ema_nat"].chunk(WORLD)[RANK])
        write_best_and_metrics(folder, state)  # a kill may have come before they were written
        return state["history"], state["best"]
    args_json, text = folder / "args.json", json.dumps(settings, indent=1).encode()
    for path in folder.iterdir():
        ours = path.suffix == ".tmp" or (path == args_json and path.read_bytes() == text)
        if not ours:  # a run that was killed in its first epoch leaves args.json and .tmp alone
            fail(f"{path} is there; take another --run-dir, or --resume a run that has a last.pt")
    save(lambda part: part.write_bytes(text), args_json)
    return [], None


def load_file(path):
    """What torch.save has written: tensors and plain values, nothing that could run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file raises
        fail(f"{path} is not there, damaged, or holds more than tensors ({error!s:.300})")


def save(write, path):
    """write(temporary name), then rename: `path` never holds half a file. By process 0 alone."""
    if RANK == 0:
        part = Path(f"{path}.{os.getpid()}.tmp")
        write(part)
        os.replace(part, path)


def save_epoch(args, history, best, model, optimizer, ema_adv, ema_nat):
    """Write last.pt after the epoch of the newest row of `history`, and what follows from it.

    Returns best, which is what best.pt holds. Of equally good epochs it is the first.
    """
    column = "val PGD-10" if args.epsilon else "val clean"
    now = {"model": model.state_dict(), "args": vars(args)}
    now |= {"epoch": len(history), "done": len(history)}
    if args.val_size and max(history, key=lambda row: row[column]) is history[-1]:
        best = deepcopy(now)
    last = now | {"optimizer": optimizer.state_dict(), "history": history, "best": best}
    last |= {"ema_adv": all_rows(ema_adv), "ema_nat": all_rows(ema_nat)}
    folder = Path(args.run_dir)
    save(partial(torch.save, last), folder / "last.pt")
    write_best_and_metrics(folder, last)
    return best


def write_best_and_metrics(folder, last):
    """Write best.pt and metrics.csv, which follow from last.pt; no training reads them."""
    if last["best"]:
        best = last["best"] | {"done": last["done"]}  # epochs; the run may be at its end or not
        save(partial(torch.save, best), folder / "best.pt")
    lines = [last["history"][0], *map(dict.values, last["history"])]  # first the names
    text = "".join(",".join(map(str, line)) + "\n" for line in lines)
    save(lambda part: part.write_text(text), folder / "metrics.csv")


def check_finite(model, terms, epoch):
    """Stop before anything is saved if a term of the loss or a weight is not finite."""
    for name, values in (terms | model.state_dict()).items():
        if not values.isfinite().all():
            fail(f"epoch {epoch}: {name} is not finite; try a lower --lr or weight of the term")


def final_test(model, best, test, args, device):
    """Print the test accuracies of last.pt and best.pt under PGD-20, draw examples.png."""
    folder, epsilon = Path(args.run_dir), args.epsilon or 8 / 255  # natural training is tested too
    x, y = test.x.to(device), test.y.to(device)
    states = {args.epochs: ("last.pt", model.state_dict())}
    if best:  # it takes the place of last.pt where the last epoch is the best
        states[best["epoch"]] = ("best.pt", best["model"])
    for epoch, (name, weights) in states.items():
        model.load_state_dict(weights)
        torch.manual_seed(args.seed)
        batch_size = args.batch_size // WORLD
        clean, robust = accuracy(model, x, y, epsilon, 1 / 255, 20, batch_size, args.amp)
        print0(
            f"{name}: epoch {epoch}, test accuracy {clean:.2f} % clean, {robust:.2f} % PGD-20, "
            f"epsilon {255 * epsilon:g}/255"
        )
    step = ceil(len(x) / 10)  # ten images from all classes: a folder lies class by class
    x, loss = to_float(x[::step]), partial(F.cross_entropy, target=y[::step])
    x_adv = pgd(model, x, loss, epsilon, 1 / 255, 20)
    pictures = torch.cat([x, x_adv, 0.5 + (x_adv - x) / (2 * epsilon)])
    pictures = F.interpolate(pictures, scale_factor=4)
    save(partial(save_image, pictures, nrow=len(x), format="png"), folder / "examples.png")
    print0(
        f"{folder}/examples.png: natural images, adversarial images, their difference\n"
        f"next: python evaluate.py {quote(str(folder))} --epsilon {255 * epsilon:.12g}/255"
    )


# ------------------------------------------------------------- arguments, messages, the program
class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring and all defaults in --help, and errors in one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_argument(self, *names, help, **options):
        if options.get("default") not in (None, argparse.SUPPRESS):
            help += " (default: %(default)s)"
        return super().add_argument(*names, help=help, **options)

    def error(self, message):
        fail(f"{message} (see --help)")


def number(low, high=10**6, kind=float):
    """An argparse type: a number in [low, high], typed as 100, 3e-4 or 8/255."""

    def parse(text):
        with suppress(ValueError, ArithmeticError):
            top, _, bottom = text.partition("/")
            value = int(text) if kind is int else float(top) / float(bottom or 1)
            if low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(
            f"{text!r} is no {'whole number' if kind is int else 'number such as 0.1 or 8/255'} "
            f"from {low:g} to {high:g}"
        )

    return parse


radius = number(0, 254 / 255)  # an argparse type for 8/255: who types 1 means 1/255


def name_run(parser, args, method):
    """Set args.method, args.changed and, if it is not given, args.run_dir, which they name.

    changed holds the options that differ from the script's defaults for the data set and network.
    Data set, network, method, changed and seed identify a run.
    """
    apart = ("dataset", "arch", "seed", "data_dir", "device", "compile", "run_dir", "resume")
    default = vars(parser.parse_args([]))
    args.changed = {k: v for k, v in vars(args).items() if k not in apart and v != default[k]}
    args.method, args.processes = method, WORLD
    parts = [args.dataset, args.arch, method, *pairs(args.changed), f"seed{args.seed}"]
    args.run_dir = args.run_dir or f"runs/{'-'.join(parts)}"


def pairs(changed):
    """["tau=0.9", ...] of {"tau": 0.9, ...}."""
    return [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in changed.items()]


def print0(*args, **kwargs):
    """print, by process 0 alone."""
    if RANK == 0:
        print(*args, flush=True, **kwargs)


def fail(message, status=2):
    """End the program with one line on stderr: an error that the user can mend."""
    live("")  # an error does not stand behind a line of progress
    print("error:", *message.split(), file=sys.stderr)
    if WORLD > 1:
        os._exit(status)  # at once, as the other processes may wait for this one
    sys.exit(status)


def progress(items, total, text):
    """Iterate over `items`; a terminal sees how far it is."""
    start = shown = time.time()
    for i, item in enumerate(items, 1):
        yield item
        if time.time() > shown + 0.5:
            shown = time.time()
            left = timedelta(seconds=int((shown - start) / i * (total - i)))
            live(f"{text}: {i:,} of {total:,}, {left} left")
    live("")


def live(text):
    """Rewrite one line of the terminal, if stderr is one."""
    if RANK == 0 and sys.stderr and sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def setup(name):
    """The torch.device of that name; joins torchrun's processes."""
    try:
        device = torch.device(name)
        if device.type == "cuda":  # under torchrun each process has a GPU of its own
            index = int(os.environ["LOCAL_RANK"]) if WORLD > 1 else device.index or 0
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
            torch.backends.cudnn.benchmark = True
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: not usable here ({error!s:.300}); try --device cpu")
    if WORLD > 1:  # patient: process 0 may download, another may attack for hours
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=30))
    return device


def run(main, again):
    """Call main(). What ends it from outside is said in one line, not by a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        fail(f"interrupted; the same command {again} continues it", 130)
    except (MemoryError, torch.OutOfMemoryError) as error:
        fail(f"out of memory ({error!s:.300}); take a smaller --batch-size")
    except OSError as error:
        fail(f"{error!s:.300}")
    if WORLD > 1:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------- several processes
def all_sum(tensor):
    """`tensor` summed over the processes, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def all_rows(tensor):
    """The rows of all processes, one below the other."""
    rows = tensor.new_zeros(WORLD, *tensor.shape)
    rows[RANK] = tensor
    return all_sum(rows).flatten(0, 1)


def average(tensors):
    """Average the tensors of floats over the processes, in place and in one message."""
    if WORLD == 1:
        return
    tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    mean = all_sum(torch.cat([tensor.flatten() for tensor in tensors])) / WORLD
    for tensor, part in zip(tensors, mean.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
