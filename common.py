"""What the four training scripts and evaluate.py share: networks, data, PGD, mHuber.

Images are float tensors [N, 3, H, W] in [0, 1], networks return logits [N, C], perturbations are
L-infinity in the unit of the images. Under torchrun, process RANK of WORLD works on its part of
every batch.
"""

import argparse
import csv
import json
import os
import re
import sys
import time
import zlib
from collections import namedtuple
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from math import pi
from multiprocessing.pool import ThreadPool
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
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.utils import save_image

TORCHRUN = dist.is_torchelastic_launched()  # a Slurm or MPI shell may set RANK too: not ours
RANK = int(os.environ["RANK"]) if TORCHRUN else 0
WORLD = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1
CPUINFO = Path("/proc/cpuinfo")
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
TINY_SIZE = (200, 100_000, 10_000)  # classes, training images, test images


# ------------------------------------------------------------------------------------ networks
def resnet18(num_classes):
    """torchvision's ResNet-18 with the CIFAR stem: a 3x3 convolution of stride 1, no max-pool."""
    model = torchvision.models.resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


class WideBlock(nn.Module):
    """Pre-activation residual block (Zagoruyko & Komodakis 2016), named as in TRADES' code."""

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
        out = F.relu(self.bn2(self.conv1(out)), inplace=True)
        return skip + self.conv2(out)


class WideResNet(nn.Module):
    """WideResNet-depth-widen (the paper's is 34-10) for images from 8 x 8 up."""

    def __init__(self, depth, widen, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        width = (16, 16 * widen, 32 * widen, 64 * widen)
        for i, stride in ((1, 1), (2, 2), (3, 2)):
            blocks = [WideBlock(width[i - 1], width[i], stride)]
            blocks += [WideBlock(width[i], width[i], 1) for _ in range((depth - 4) // 6 - 1)]
            self.add_module(f"block{i}", nn.ModuleDict({"layer": nn.Sequential(*blocks)}))
        self.bn1 = nn.BatchNorm2d(width[3])
        self.fc = nn.Linear(width[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        x = self.conv1(x)
        for block in (self.block1, self.block2, self.block3):
            x = block["layer"](x)
        x = F.relu(self.bn1(x), inplace=True)
        return self.fc(x.mean((2, 3)))


def make_model(arch, num_classes):
    """The network `resnet18` or `wrn-<depth>-<widen>`, with its initial weights."""
    if arch == "resnet18":
        return resnet18(num_classes)
    match = re.fullmatch(r"wrn-(\d{1,3})-([1-9]\d?)", arch)
    if match is None or int(match[1]) < 10 or int(match[1]) % 6 != 4:
        fail(f"--arch {arch}: unknown; take resnet18 or wrn-<depth>-<widen>, depth 6n+4: wrn-34-10")
    return WideResNet(int(match[1]), int(match[2]), num_classes)


# ---------------------------------------------------------------------------------------- data
Data = namedtuple("Data", "x_train y_train x_test y_test classes")  # x: uint8 [N, 3, H, W]


def load_data(name, data_dir):
    """The data set `name` (of DATASETS), read from `data_dir` or downloaded into it."""
    data_dir = Path(data_dir).resolve()
    if RANK > 0:
        barrier()  # process 0 downloads, the others then find the files
    try:
        data = DATASETS[name](data_dir)
    except Exception as error:  # a broken file makes its reader raise anything
        fail(
            f"--dataset {name} in {data_dir}: {error!s:.300}; put the files there, or take "
            "--dataset shapes, which needs none"
        )
    if RANK == 0:
        barrier()
    return data


def cifar(dataset, data_dir):
    """CIFAR-10 or CIFAR-100 below `data_dir`, which may also be the folder of batches itself."""
    root = data_dir.parent if data_dir.name == dataset.base_folder else data_dir
    train, test = dataset(root, train=True, download=True), dataset(root, train=False)
    x_train, x_test = (torch.from_numpy(d.data).permute(0, 3, 1, 2) for d in (train, test))
    y_train, y_test = torch.tensor(train.targets), torch.tensor(test.targets)
    return Data(x_train, y_train, x_test, y_test, train.classes)


def tinyimagenet(data_dir):
    """tiny-imagenet-200, downloaded and unpacked if need be; its val split is the test set."""
    root, unpacked = data_dir / "tiny-imagenet-200", data_dir / "tiny-imagenet-200.tmp"
    if (data_dir / "train").is_dir():
        root = data_dir
    elif not root.is_dir():  # unpacked aside: half of it is never taken for the whole
        download_and_extract_archive(TINY_URL, data_dir, unpacked, md5=TINY_MD5)
        (unpacked / root.name).rename(root)
        unpacked.rmdir()
    train, val = ImageFolder(root / "train"), root / "val"
    if any(val.glob("images/*")):  # as published: one folder and a table of the classes
        table = (val / "val_annotations.txt").read_text("utf-8-sig")
        rows = [line.split("\t") for line in table.splitlines() if line]
        test = [(val / "images" / row[0], train.class_to_idx[row[1]]) for row in rows]
    else:  # as tutorials leave it: sorted into a folder for each class
        test = class_folders(val, train.classes).samples
    found = (len(train.classes), len(train.samples), len(test))
    if found != TINY_SIZE:
        raise ValueError(
            f"{root} has {found} classes, training and val images, Tiny ImageNet {TINY_SIZE}; "
            "--dataset folder takes other images"
        )
    return Data(*read_images(train.samples), *read_images(test), train.classes)


def folder(data_dir):
    """Images of your own: train/ and test/ (or val/), in each a folder of images per class."""
    train = class_folders(data_dir / "train")
    split = "test" if (data_dir / "test").is_dir() else "val"
    test = class_folders(data_dir / split, train.classes)
    return Data(*read_images(train.samples), *read_images(test.samples), train.classes)


def class_folders(root, classes=None):
    """torchvision's ImageFolder of two or more classes, which must be `classes` if given."""
    images = ImageFolder(root)
    odd = sorted(set(images.classes) ^ set(classes or images.classes))[:5]
    if odd or len(images.classes) < 2:
        raise ValueError(
            f"train/ and {root.name}/ need the same two or more classes; differing: {odd}"
        )
    files = sum(len(names) for _, _, names in os.walk(root, followlinks=True))
    if files > len(images):
        print0(f"note: {files - len(images)} files in {root} have no ending of an image: left out")
    return images


def read_images(samples):
    """uint8 images, all of one size, and labels of a list of (path, label)."""
    paths, labels = zip(*samples, strict=True)
    x = np.empty((len(paths), *read_image(paths[0]).shape), np.uint8)
    with ThreadPool() as pool:
        images = progress(pool.imap(read_image, paths, 64), len(paths), "reading images")
        for i, image in enumerate(images):
            if image.shape != x.shape[1:]:
                raise ValueError(f"{paths[i]} and {paths[0]} differ in size; make all sizes equal")
            x[i] = image
    return torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor(labels)


def read_image(path):
    """One file as uint8 [H, W, 3]."""
    try:
        image = Image.open(path)
        if image.mode[0] in "IF":  # 16 or 32 bits, which convert() would clip
            raise ValueError(image.mode)
        return np.asarray(image.convert("RGB"))
    except Exception as error:  # a broken file makes PIL raise anything
        raise ValueError(f"{path} is not a readable image of 8 bits a channel") from error


def draw_shapes(n, seed):
    """Ten classes of drawn 32 x 32 images that hold a robust feature and one that is not.

    The robust one is a mirror-symmetric shape of 6 x 6 squares that stands out by 0.2 to 0.4. The
    other is a tile of +-2/255, peculiar to the class, all over the image: natural training may
    rely on it, an attack of 8/255 removes it.
    """
    same, g = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    left = torch.randint(2, (10, 1, 6, 3), generator=same)
    shapes = F.interpolate(torch.cat([left, left.flip(3)], 3).float(), scale_factor=4)
    tiles = (torch.randint(2, (10, 3, 4, 4), generator=same) * 4 - 2) / 255
    y = torch.randperm(n, generator=g) % 10
    sign = torch.randint(2, (n, 1, 1, 1), generator=g) * 2 - 1
    contrast = sign * (0.2 + 0.2 * torch.rand(n, 3, 1, 1, generator=g))
    x = 0.3 + 0.4 * torch.rand(n, 3, 1, 1, generator=g) + contrast * F.pad(shapes[y], (4, 4, 4, 4))
    x += tiles[y].repeat(1, 1, 8, 8) + 0.02 * torch.randn(n, 3, 32, 32, generator=g)
    return (x.clamp(0, 1) * 255).round().byte(), y


DATASETS = {
    "cifar10": partial(cifar, CIFAR10),
    "cifar100": partial(cifar, CIFAR100),
    "tinyimagenet": tinyimagenet,
    "folder": folder,
    "shapes": lambda _: Data(*draw_shapes(5000, seed=1), *draw_shapes(1000, seed=2), "ABCDEFGHIJ"),
}


def fingerprint(x, y):
    """Number, size and checksum of images and labels: whether two runs saw the same data."""
    checksum = zlib.crc32(x.permute(0, 2, 3, 1).contiguous().numpy(), zlib.crc32(y.numpy()))
    return f"{len(x)} images of {x.shape[2]}x{x.shape[3]}, checksum {checksum:08x}"


def hold_out(data, n, device):
    """x_train, y_train, x_val, y_val: n training images, the same for every seed, are held out.

    open: the paper does not say which epoch it reports. Here the best on the held-out images is
    kept, since choosing on the test set overstates the accuracy (Rice et al. 2020).
    """
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    n_train = max(0, len(order) - n)
    train, val = order[:n_train], order[n_train:]
    x, y = data.x_train, data.y_train
    return x[train].to(device), y[train].to(device), x[val].to(device), y[val].to(device)


def check_batch(args, n):
    """Refuse a batch that does not fit `n` training images or the number of processes."""
    part = args.batch_size // WORLD
    if args.batch_size > n or args.batch_size % WORLD or part < 2:
        fail(
            f"--batch-size {args.batch_size}, --val-size {args.val_size}: an epoch of {n} images "
            f"needs one whole batch, and each of {WORLD} processes the same part, two or more"
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


# ------------------------------------------------------------------------- PGD, accuracy, mHuber
@contextmanager
def frozen(model):
    """Inside, `model` is in eval mode and its weights need no gradient.

    Afterwards, also after an exception, every module has its own mode again and every weight its
    own requires_grad: a batch norm that the caller keeps in eval mode stays there.
    """
    modes = [(module, module.training) for module in model.modules()]
    needs = [(weight, weight.requires_grad) for weight in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, requires_grad in needs:
            weight.requires_grad = requires_grad


def pgd(model, x, loss, epsilon=8 / 255, step_size=2 / 255, steps=10, start=None):
    """Projected gradient ascent in the L-infinity ball (eq. 2; the inner loop of Algorithm 1).

    x are images [N, 3, H, W] in [0, 1], not standardised: a Normalize belongs into the model.
    loss maps logits [N, C] to a scalar. start is the first iterate, by default x + 0.001 N(0, I)
    as in Algorithm 1. Returns the last iterate, within epsilon of x and in [0, 1].
    """
    lower, upper = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    x_adv = x + 0.001 * torch.randn_like(x) if start is None else start
    with frozen(model):  # open: the paper does not say which mode; eval as in TRADES and MART
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            logits = model(x_adv).to(x.dtype)  # under autocast they are bfloat16
            gradient = torch.autograd.grad(loss(logits), x_adv)[0]
            x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), lower, upper)
    return x_adv


def accuracy(model, x, y, epsilon, step_size, steps, batch_size, amp=False, text="test"):
    """Clean and PGD accuracy in percent on uint8 images x with labels y.

    PGD maximises the cross-entropy from a uniform start, and its last iterate decides. With amp
    the search runs in bfloat16; the decisions stay in float32.
    """
    correct = torch.zeros(2, dtype=torch.int64, device=x.device)
    x_parts, y_parts = x[RANK::WORLD].split(batch_size), y[RANK::WORLD].split(batch_size)
    parts = zip(x_parts, y_parts, strict=True)
    for images, labels in progress(parts, len(x_parts), text):
        images = x_adv = to_float(images)
        if epsilon:
            loss = partial(F.cross_entropy, target=labels)
            start = images + torch.empty_like(images).uniform_(-epsilon, epsilon)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                x_adv = pgd(model, images, loss, epsilon, step_size, steps, start)
        with frozen(model), torch.no_grad():
            clean = model(images).argmax(1) == labels
            robust = clean & (model(x_adv).argmax(1) == labels)
        correct += torch.stack([clean.sum(), robust.sum()])
    return [100 * count / len(x) for count in all_sum(correct).tolist()]


def mhuber(u, v, alpha):
    """Modified Huber loss (section 3) of tensors of one shape: the mean over the elements of u - v.

    In float32 the value of an element is 0 below |d| of about 1e-3, where 1 - cos cancels; its
    gradient stays right.
    """
    d = u - v
    c = d.abs() / alpha <= pi / 2
    A = alpha**2 * (1 - torch.cos(d / alpha))
    B = alpha * d.abs() + (1 - pi / 2) * alpha**2
    return torch.where(c, A, B).mean()


# ------------------------------------------------------------------------------ the files of a run
def open_run(args, device):
    """Begin the folder of a run and return None, or with --resume return what its last.pt holds.

    Refused are a folder with other files, files of other settings, and a damaged last.pt.
    """
    folder = Path(args.run_dir)
    last, best, metrics = folder / "last.pt", folder / "best.pt", folder / "metrics.csv"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        fail(f"{folder}: {error.strerror}; choose another --run-dir")
    if RANK == 0 and not (empty or args.resume):
        fail(f"{folder} is not empty; add --resume to continue, or choose another --run-dir")
    state = None
    if args.resume and last.exists():
        state = read_last(last, args, device)
        save_best_and_metrics(args, state)  # a kill may have come before they were written
    elif args.resume and (best.exists() or metrics.exists()):
        fail(f"{last} is missing; put it back to continue, or choose another --run-dir")
    for part in folder.glob("*.pt.*.tmp") if RANK == 0 else ():  # left by a save that was killed
        part.unlink()
    save(lambda part: part.write_text(json.dumps(vars(args), indent=1)), folder / "args.json")
    return state


def read_last(path, args, device):
    """What last.pt holds; refused if it is damaged or of a run with other arguments."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        old = dict(state["args"])
        missing = {"model", "optimizer", "history", "ema_adv", "ema_nat"} - state.keys()
    except Exception as error:  # whatever a damaged or foreign file raises
        old, missing = {}, f"what a run saves ({error!s:.300})"
    if missing:
        fail(f"{path} lacks {missing}: it is not the last.pt of a run; choose another --run-dir")
    changed = [
        f"{name} was {old.get(name)}, is {new}"
        for name, new in vars(args).items()
        if name not in ("resume", "run_dir", "data_dir", "device") and new != old.get(name)
    ]
    if changed:
        fail(f"--resume: {'; '.join(changed)}; give the same, or choose another --run-dir")
    return state


def save(write, path):
    """write(temporary name), then rename: `path` never holds half a file. By process 0 alone."""
    part = Path(f"{path}.{os.getpid()}.tmp")
    try:
        if RANK == 0:
            write(part)
            os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save on a full disk: RuntimeError
        part.unlink(missing_ok=True)
        fail(f"{path}: not writable ({error!s:.300}); is the folder there and not full?")


def save_epoch(args, history, model, optimizer, ema_adv, ema_nat):
    """Write last.pt after the epoch of the newest row of `history`, and what follows from it."""
    last = {"model": model.state_dict(), "args": vars(args), "epoch": history[-1]["epoch"]}
    last |= {"optimizer": optimizer.state_dict(), "history": history}
    last |= {"ema_adv": all_rows(ema_adv), "ema_nat": all_rows(ema_nat)}
    save(partial(torch.save, last), Path(args.run_dir) / "last.pt")
    save_best_and_metrics(args, last)


def save_best_and_metrics(args, last):
    """Write best.pt, if the epoch of last.pt is the best of all, and metrics.csv."""
    best, history = Path(args.run_dir) / "best.pt", last["history"]
    if args.val_size:
        first_best = max(history, key=lambda row: row["val PGD-10"])["epoch"]
        if first_best == last["epoch"]:
            state = {name: last[name] for name in ("model", "args", "epoch")}
            save(partial(torch.save, state), best)
        elif not best.exists():
            fail(f"{best} is missing; put it back beside last.pt, or choose another --run-dir")

    def write_metrics(part):
        with open(part, "w", newline="") as file:
            table = csv.DictWriter(file, history[0])
            table.writeheader()
            table.writerows(history)

    save(write_metrics, best.with_name("metrics.csv"))


def check_finite(model, terms, epoch):
    """Stop before anything is saved if a term of the loss or a weight is not finite."""
    for name, values in [*terms.items(), *model.state_dict().items()]:
        if not values.isfinite().all():
            fail(
                f"epoch {epoch}, {name} is not finite; last.pt, if there is one, holds the epoch "
                "before; try a lower --lr or weight of the term, in another --run-dir"
            )


def final_test(model, data, args, device):
    """Print the test accuracies of last.pt and best.pt under PGD-20 and draw examples.png."""
    barrier()  # process 0 has written the checkpoints
    folder, epsilon = Path(args.run_dir), args.epsilon or 8 / 255
    x, y = data.x_test.to(device), data.y_test.to(device)
    tested, names = None, ["last.pt", "best.pt"] if args.val_size else ["last.pt"]
    for name in names:
        state = torch.load(folder / name, map_location=device, weights_only=True)
        if state["epoch"] != tested:  # the last epoch may be the best
            tested = state["epoch"]
            model.load_state_dict(state["model"])
            torch.manual_seed(args.seed)
            batch = args.batch_size // WORLD
            clean, robust = accuracy(model, x, y, epsilon, 1 / 255, 20, batch, args.amp)
        print0(
            f"{name}: epoch {tested}, test accuracy {clean:.2f} % clean, {robust:.2f} % PGD-20, "
            f"epsilon {255 * epsilon:g}/255"
        )
    spread = torch.linspace(0, len(x) - 1, 10).long().unique()  # a folder lies class by class
    x, loss = to_float(x[spread]), partial(F.cross_entropy, target=y[spread])
    x_adv = pgd(model, x, loss, epsilon, 1 / 255, 20)
    pictures = torch.cat([x, x_adv, 0.5 + (x_adv - x) / (2 * epsilon)])
    if RANK == 0:
        pictures = F.interpolate(pictures, scale_factor=4)
        save_image(pictures, folder / "examples.png", nrow=len(x))
    option = "" if epsilon == 8 / 255 else f" --epsilon {epsilon}"
    print0(
        f"{folder}/examples.png: natural images, adversarial images, their difference\n"
        f"next: python evaluate.py {quote(str(folder / names[-1]))}{option}"
    )


# ------------------------------------------------------------- arguments, messages, the program
class Parser(argparse.ArgumentParser):
    """argparse with the script's docstring, as it is, in --help, and errors in one line."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add_argument(self, *names, help, **options):
        if options.get("default") not in (None, argparse.SUPPRESS):
            help += " (default: %(default)s)"
        return super().add_argument(*names, help=help, **options)

    def error(self, message):
        fail(f"{message} (see --help)")


def number(low, high=10**6, kind=float):
    """An argparse type: a number in [low, high], typed as 0.031, 3e-4 or 8/255."""

    def parse(text):
        top, _, bottom = text.partition("/")
        try:
            value = int(text) if kind is int else float(top) / float(bottom or 1)
        except (ValueError, ArithmeticError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a number such as 100 or 8/255"
            ) from None
        if not low <= value <= high:
            hint = f", did you mean {text}/255?" if high == 1 and value > 1 and not bottom else ""
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}{hint}")
        return value

    return parse


def print0(*args, **kwargs):
    """print, by process 0 alone."""
    if RANK == 0:
        print(*args, flush=True, **kwargs)


def fail(message):
    """End the program with one line on stderr, exit status 2: an error that the user can mend."""
    live("")  # an error does not stand behind a line of progress
    print("error:", *message.split(), file=sys.stderr, flush=True)
    if WORLD > 1:
        os._exit(2)  # at once, as the other processes may wait for this one
    sys.exit(2)


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
    try:
        terminal = sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is no stderr, or it is closed
        terminal = False
    if RANK == 0 and terminal:
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def setup(name, amp=False):
    """The torch.device of that name ("auto": CUDA if there is one); joins torchrun's processes."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if TORCHRUN and ":" in name:
        fail(f"--device {name}: torchrun gives each process a GPU of its own; say --device cuda")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            index = int(os.environ["LOCAL_RANK"]) if TORCHRUN else device.index or 0
            device = torch.device("cuda", index)
            torch.cuda.set_device(device)
            torch.backends.cudnn.benchmark = True
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: not usable here ({error!s:.300}); try --device cpu")
    if amp and not has_bfloat16(device):
        print0(f"note: {name} has no bfloat16 instructions: --amp is slower than float32 here")
    if WORLD > 1:  # patient: process 0 may download
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device


def has_bfloat16(device):
    """Whether this CPU or GPU computes in bfloat16 itself, as far as one can tell."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and CPUINFO.exists():
        return "bf16" in CPUINFO.read_text()
    return True


def run(main, how):
    """Call main(). What ends it from outside is said in one line, not by a traceback.

    `how` completes the advice "the same command ... continues it".
    """
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may be unable to write "±"
        sys.stdout.reconfigure(errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        print0(f"\ninterrupted; the same command {how} continues it", file=sys.stderr)
        if WORLD > 1:
            os._exit(130)  # at once, as the other processes may wait for this one
        sys.exit(130)
    except BrokenPipeError:  # nobody reads our output any more, as after `| head`
        os._exit(141)
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|can't allocate", str(error)):
            fail(f"out of memory ({error!r:.300}); take a smaller --batch-size")
        if isinstance(error, OSError):
            fail(f"{error!s:.300}; is the place there, writable and not full?")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail(f"--compile does not work here ({error!s:.300}); leave it out")
        raise
    if dist.is_initialized():  # not after an error: NCCL would wait for the others
        dist.destroy_process_group()


def barrier():
    """Wait until every process is here."""
    if WORLD > 1:
        dist.barrier()


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


def average_buffers(model):
    """Average batch norm's statistics over the processes, each of which saw other images."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            all_sum(buffer).div_(WORLD)
