"""What the four training scripts and evaluate.py share: PGD, mHuber, networks, data, a run's files.

Images are floats [N, 3, H, W] in [0, 1], networks return logits [N, C], perturbations are
L-infinity in the unit of the images. Each of torchrun's WORLD processes takes part of a batch.
"""

import argparse
import json
import os
import re
import sys
import time
import zlib
from collections import namedtuple
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from fractions import Fraction
from functools import partial
from math import ceil, pi
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import is_image_file
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models.resnet import conv1x1, conv3x3
from torchvision.utils import save_image

RANK, WORLD = 0, 1
if dist.is_available() and dist.is_torchelastic_launched():  # Slurm and MPI set RANK too: not ours
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


# ------------------------------------------------------------------------- PGD, mHuber, accuracy
@contextmanager
def frozen(model):
    """Inside, `model` is in eval mode and its weights need no gradient.

    Afterwards every module has its own mode again, and every weight its own requires_grad.
    """
    if not isinstance(model, nn.Module):
        model = nn.Module()  # a plain function has nothing to freeze
    training = [module for module in model.modules() if module.training]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for weight in trained:
            weight.requires_grad = True


def check_attack(x, epsilon):
    """Raise ValueError unless x are floats and 0 <= epsilon < 1. Pixels are not read: no sync."""
    if x.dtype not in (torch.float32, torch.float64) or not 0 <= epsilon < 1:
        raise ValueError(f"{x.dtype}, epsilon {epsilon}: take floats in [0, 1], epsilon 8 / 255")


@torch.enable_grad()
def pgd(model, x, loss, epsilon=8 / 255, step_size=2 / 255, steps=10, start=None):
    """Projected gradient ascent in the L-infinity ball (eq. 2; the inner loop of Algorithm 1).

    x are images [N, 3, H, W] in [0, 1], not standardised: a Normalize belongs into the model, which
    may be a plain function. loss maps logits [N, C] to a scalar. start is the first iterate, by
    default x + 0.001 N(0, I). Returns the last iterate, within epsilon of x and in [0, 1], as a
    constant: no gradient flows through it. Raises ValueError as check_attack does.
    """
    check_attack(x, epsilon)
    x = x.detach()
    lower, upper = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    x_adv = x + 0.001 * torch.randn_like(x) if start is None else start
    with frozen(model):  # open: the paper names no mode; TRADES and MART attack in eval mode
        for _ in range(steps):
            x_adv = x_adv.detach().requires_grad_()
            logits = model(x_adv).to(x.dtype)  # under autocast they are bfloat16
            gradient = torch.autograd.grad(loss(logits), x_adv)[0]
            x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), lower, upper)
    return x_adv


def mhuber(u, v, alpha):
    """Modified Huber loss of u - v, the mean over the elements; names as in section 3.

    Below |u - v| of about 1e-3 float32 rounds A to 0; its gradient is unaffected.
    """
    d = u - v
    c = d.abs() / alpha <= pi / 2
    A = alpha**2 * (1 - torch.cos(d / alpha))
    B = alpha * d.abs() + (1 - pi / 2) * alpha**2
    return torch.where(c, A, B).mean()


def accuracy(model, x, y, epsilon, step_size, steps, batch_size, amp=False):
    """Clean and PGD accuracy in percent on uint8 images x with labels y.

    PGD (in bfloat16 with amp) on cross-entropy has a uniform start; its last iterate counts.
    """
    clean, robust = [], []
    for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        x_nat, loss = to_float(images), partial(F.cross_entropy, target=labels)
        start = x_nat + torch.empty_like(x_nat).uniform_(-epsilon, epsilon)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            x_adv = pgd(model, x_nat, loss, epsilon, step_size, steps if epsilon else 0, start)
        with frozen(model), torch.no_grad():
            clean.append(model(x_nat).argmax(1) == labels)
            robust.append(clean[-1] & (model(x_adv).argmax(1) == labels))
    return [100 * torch.cat(right).sum().item() / len(x) for right in (clean, robust)]


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
        self.conv1, c_in = conv3x3(3, 16), 16
        for i, (width, stride) in enumerate([(16, 1), (32, 2), (64, 2)], 1):
            blocks = []
            for k in range((depth - 4) // 6):
                blocks.append(WideBlock(c_in, width * widen, 1 if k else stride))
                c_in = width * widen
            stage = nn.Sequential()
            stage.add_module("layer", nn.Sequential(*blocks))  # its name in TRADES' code
            self.add_module(f"block{i}", stage)
        self.bn1 = nn.BatchNorm2d(c_in)
        self.fc = nn.Linear(c_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.bn1(x).relu_().mean((2, 3)))


class UnknownNetwork(ValueError):
    """make_model does not know the name."""


def make_model(arch, num_classes):
    """The network `resnet18` or `wrn-<depth>-<widen>`; raises UnknownNetwork for other names."""
    if arch == "resnet18":
        return resnet18(num_classes)
    match = re.fullmatch(r"wrn-([1-9]\d+)-([1-9]\d?)", arch)
    if not match or int(match[1]) % 6 != 4:
        raise UnknownNetwork(f"--arch {arch}: not resnet18 or wrn-<6n + 4>-<widen>")
    return WideResNet(int(match[1]), int(match[2]), num_classes)


# ---------------------------------------------------------------------------------------- data
Data = namedtuple("Data", "x y classes")  # uint8 [N, 3, H, W], int64 [N], names of the classes


def load_data(name, data_dir, split):
    """The images of one split, "train" or "test", of the data set `name` of DATASETS."""
    try:
        return DATASETS[name](Path(data_dir), split)
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        fail(f"{name} ({split}): {error}; is --data-dir right? A damaged folder must be moved away")


def load_splits(args):
    """The train and the test split. Sets args.classes, and args.data, a fingerprint of train."""
    if RANK > 0:
        dist.barrier()  # process 0 downloads, the others then find the files
    train = load_data(args.dataset, args.data_dir, "train")
    test = load_data(args.dataset, args.data_dir, "test")
    if RANK == 0 and WORLD > 1:
        dist.barrier()
    if (train.classes, train.x.shape[1:]) != (test.classes, test.x.shape[1:]):
        fail(f"{args.data_dir}: train and test need the same classes and images of one size")
    pixels = [{hash(image.tobytes()) for image in split.x.numpy()} for split in (train, test)]
    if copies := len(set.intersection(*pixels)):
        print(f"note: {copies} images are both in train and in test")
    args.classes, args.data = train.classes, fingerprint(train.x, train.y)
    return train, test


def cifar(dataset, root, split):
    """CIFAR-10 or CIFAR-100, downloaded if its folder is not there: it is never overwritten."""
    download = not (root / dataset.base_folder).is_dir()
    images = dataset(root, split == "train", download=download)
    x = torch.from_numpy(images.data).permute(0, 3, 1, 2)
    return Data(x, torch.tensor(images.targets), images.classes)


def tinyimagenet(root, split):
    """tiny-imagenet-200 as published, downloaded if need be; its val split is the test set."""
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
        download_and_extract_archive(url, root, md5="90528d7ca1a48142e341f4ef8d21d0de")
    samples, classes = class_folders(folder / "train")
    if split == "test":
        rows = [line.split("\t") for line in open(folder / "val/val_annotations.txt")]
        samples = [(folder / "val/images" / row[0], classes.index(row[1])) for row in rows]
    if (len(classes), len(samples)) != (200, 100_000 if split == "train" else 10_000):
        raise ValueError(f"{folder} is incomplete: {len(samples)} images of {len(classes)} classes")
    return read_images(samples, classes)


def class_folders(root):
    """[(path, label)] of the images in the folders of `root`, and the classes, their names."""

    def is_image(path):  # no hidden copy: .ipynb_checkpoints, @eaDir
        return is_image_file(path) and not re.search(r"[/\\][.@]", path[len(str(root)) :])

    images = ImageFolder(root, is_valid_file=is_image)
    return images.samples, images.classes


def read_images(samples, classes):
    """Data of a list of (path, label): RGB images, upright as their EXIF orientation says."""
    size = ImageOps.exif_transpose(Image.open(samples[0][0])).size
    x = np.empty((len(samples), *size[::-1], 3), np.uint8)
    for i, (path, _) in enumerate(progress(samples, len(samples), "reading images")):
        try:
            file = Image.open(path)
            image = ImageOps.exif_transpose(file)
            if image.size != size or file.mode[0] in "IF" or getattr(file, "is_animated", False):
                raise ValueError(f"this is not one image of {size} pixels, 8 bits a channel")
            x[i] = image.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:  # PIL's, for a damaged file
            fail(f"{path}: {error}")
    y = torch.tensor([label for _, label in samples])
    return Data(torch.from_numpy(x).permute(0, 3, 1, 2), y, classes)


def drawn_shapes(root, split):
    """Ten classes. A shape of high contrast is a robust feature, a tile of +-2/255 is not one."""
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
    "folder": lambda root, split: read_images(*class_folders(root / split)),
    "shapes": drawn_shapes,
}


def fingerprint(x, y):
    """Number, size and checksum of images and labels, to tell data sets apart."""
    checksum = zlib.crc32(x.contiguous().numpy(), zlib.crc32(y.numpy()))
    return f"{len(x)} images of {x.shape[2]}x{x.shape[3]}, checksum {checksum:08x}"


def hold_out(train, args, device):
    """x_train, y_train, x_val, y_val: --val-size images, for every seed the same, are held out.

    open: the paper does not say which epoch it reports. Here the best on the held-out images is
    kept, since choosing on the test set overstates the accuracy (Rice et al. 2020).
    """
    order = torch.randperm(len(train.x), generator=torch.Generator().manual_seed(0))
    kept, held_out = order.tensor_split([max(0, len(order) - args.val_size)])
    if args.batch_size > len(kept) or args.batch_size % WORLD:
        fail(f"--batch-size: --val-size leaves {len(kept)} images, for {WORLD} equal processes")
    if WORLD > 1 and args.ema == "image":  # an image has one average, and any process may draw it
        fail("--ema image needs one process: leave out torchrun")
    for label in {*range(len(train.classes))} - {*train.y[kept].tolist()}:
        fail(f"--val-size leaves no image of class {train.classes[label]} to train on")
    return [tensor[part].to(device) for part in (kept, held_out) for tensor in (train.x, train.y)]


def shuffled_batches(x, y, batch_size, seed, epoch):
    """Batches (augmented images, labels, their index in x) of one epoch, this process's part.

    The incomplete last batch is left out. (seed, epoch) decides all random numbers of the epoch:
    the order, the augmentation, and where PGD starts.
    """
    order_seed, seed = np.random.SeedSequence([seed, epoch]).generate_state(2).tolist()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(order_seed))
    torch.manual_seed(seed + RANK)
    for index in order.to(x.device).split(batch_size)[: len(x) // batch_size]:
        index = index[RANK::WORLD]
        yield augment(x[index]), y[index], index


def augment(x):
    """Floats of uint8 images: a random crop after padding by 4 zero pixels, and a random flip.

    open: the paper names no augmentation; this is that of TRADES and MART.
    """
    n, _, height, width = x.shape
    crops = F.pad(x, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)  # n x 3 x 9 x 9 x H x W
    top, left = torch.randint(9, (2, n), device=x.device)
    x = crops[torch.arange(n, device=x.device), :, top, left]
    flip = torch.rand(n, 1, 1, 1, device=x.device) < 0.5
    return to_float(torch.where(flip, x.flip(3), x))


def to_float(x):
    """uint8 images (else ValueError) as float in [0, 1], in convolutions' best memory format."""
    if x.dtype != torch.uint8:
        raise ValueError(f"images of {x.dtype}: needed are uint8 images, 0 to 255")
    return x.to(torch.float32, memory_format=torch.channels_last) / 255


# ------------------------------------------------------------------------------ the files of a run
FILES = ("args.json", "last.pt", "best.pt", "metrics.csv", "examples.png")
NOT_COMPARED = ("run_dir", "resume", "data_dir", "device")  # --resume may change these


def open_run(args, model, optimizer, past_adv, past_nat):
    """Begin a run, or with --resume load its last.pt. Returns metrics.csv's rows, best so far."""
    last, history, best = Path(args.run_dir) / "last.pt", [], None
    if RANK == 0:
        claim(last.parent, args)
    if args.resume and last.exists():
        state = torch.load(last, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        past_adv.copy_(state["ema_adv"].chunk(WORLD)[RANK])
        past_nat.copy_(state["ema_nat"].chunk(WORLD)[RANK])
        history, best = state["history"], state["best"]
    if all_sum(past_adv.new_tensor(len(history))) != WORLD * len(history):
        fail(f"{last}: not all processes have read the same file")
    return history, best


def claim(folder, args):
    """Write args.json, if no file of a run is there, or with --resume see that it is the same."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_COMPARED}
    files = [name for name in FILES if (folder / name).exists()]
    args_json, text = folder / "args.json", json.dumps(settings, indent=1)
    # a kill in the first epoch leaves no last.pt
    if args.resume and "args.json" in files and ("last.pt" in files or "best.pt" not in files):
        if args_json.read_text() != text:
            fail(f"{args_json} has other options, data or processes; take another --run-dir")
    elif files:
        fail(f"{folder / files[0]} is there; take another --run-dir, or --resume its run")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with open(args_json, "x") as file:  # "x": of two runs that start now one is refused
            file.write(text)


def save(write, path):
    """write(temporary name), then rename: `path` never holds half a file."""
    part = Path(f"{path}.{os.getpid()}.tmp")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_epoch(args, history, best, model, optimizer, past_adv, past_nat):
    """Write metrics.csv and last.pt after an epoch. Returns the best epoch so far."""
    folder, epoch = Path(args.run_dir), len(history)
    state = {"model": model.state_dict(), "args": vars(args)}
    state |= {"epoch": epoch, "done": epoch == args.epochs}
    if not args.val_size or max(history, key=lambda row: row["val PGD-10"]) is history[-1]:
        best = deepcopy(state)  # a tie keeps the earlier epoch
    state |= {"optimizer": optimizer.state_dict(), "ema_adv": past_adv, "ema_nat": past_nat}
    state |= {"history": history, "best": best}
    text = "".join(
        ",".join(map(str, line)) + "\n" for line in [[*history[0]], *map(dict.values, history)]
    )
    save(lambda part: part.write_text(text), folder / "metrics.csv")
    save(partial(torch.save, state), folder / "last.pt")
    return best


def check_finite(model, terms, epoch):
    """Stop before anything is saved if a term of the loss or a weight is not finite."""
    for name, values in (terms | model.state_dict()).items():
        if not values.isfinite().all():
            fail(f"epoch {epoch}: {name} is not finite; try a lower --lr or weight of the term")


def finish_run(model, best, test, args, device):
    """Write best.pt, print its test accuracy under PGD-20, draw examples.png."""
    folder, epsilon = Path(args.run_dir), args.epsilon or 8 / 255  # also after natural training
    save(partial(torch.save, best | {"done": True}), folder / "best.pt")
    model.load_state_dict(best["model"])
    x, y = test.x.to(device), test.y.to(device)
    torch.manual_seed(args.seed)
    clean, robust = accuracy(model, x, y, epsilon, 1 / 255, 20, args.batch_size // WORLD, args.amp)
    result = f"test accuracy {clean:.2f} % clean, {robust:.2f} % PGD-20 (its last iterate)"
    print(f"best.pt: epoch {best['epoch']}, {result}, epsilon {255 * epsilon:g}/255")
    step = ceil(len(x) / 10)  # ten images spread over a set that is sorted by class
    x, y = to_float(x[::step]), y[::step]
    x_adv = pgd(model, x, partial(F.cross_entropy, target=y), epsilon, 1 / 255, 20)
    rows = torch.cat([x, x_adv, 0.5 + (x_adv - x) / (2 * epsilon)])
    pictures = F.interpolate(rows, scale_factor=4)
    save(partial(save_image, pictures, nrow=len(x), format="png"), folder / "examples.png")
    print(f"{folder}/examples.png shows images, x', difference; next: python evaluate.py {folder}")


# ------------------------------------------------------------------ arguments, messages, processes
class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """For --help: the script's docstring as it is, and all defaults."""


def radius(text):
    """An argparse type for a number below 1, as 8/255 or 0.031. It refuses 8, which means 8/255."""
    value = float(Fraction(text))
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1), as pixels are; write 8/255")
    return value


def name_run(parser, args, method):
    """Set args.name, such as "lma_at tau=0.9", and args.run_dir, if it is not given.

    The name lists the options that are not at their default for this data set and network.
    """
    unnamed, words = ("dataset", "arch", "seed", "compile", *NOT_COMPARED), [method]
    defaults = vars(parser.parse_args([]))
    for option, value in vars(args).items():
        if option not in unnamed and value != defaults[option]:
            words.append(f"{option}={value:g}" if isinstance(value, float) else f"{option}={value}")
    args.name, args.processes = " ".join(words), WORLD
    folder = "-".join([f"runs/{args.dataset}-{args.arch}", *words, f"seed{args.seed}"])
    args.run_dir = args.run_dir or folder


def fail(message, status=2):
    """End the program with one line on stderr: an error that the user can mend."""
    print("\nerror:", *str(message).split(), file=sys.stderr)
    sys.exit(status)


def progress(items, total, text):
    """Iterate over `items`; on a terminal, one line on stderr counts them as they pass."""
    start = shown = time.time()
    for i, item in enumerate(items, 1):
        yield item
        if RANK == 0 and sys.stderr.isatty() and (time.time() > shown + 0.5 or i == total):
            shown = time.time()
            left = (shown - start) / i * (total - i)
            line = f"{text}: {i:,} of {total:,}, {left:.0f} s left" if left else ""
            print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)


def setup(name):
    """The torch.device of that name; joins torchrun's processes, of which process 0 prints."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            fail(f"--device {name}: torch finds no GPU here; try --device cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    if WORLD > 1:  # the others wait while process 0 downloads and tests
        dist.init_process_group(timeout=timedelta(days=30))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def run(main, again):
    """Call main(). Ctrl-C, too little memory and errors of files end it in one line."""
    try:
        main()
    except KeyboardInterrupt:
        fail(f"interrupted; to continue, run the same command again{again}", 130)
    except (MemoryError, torch.OutOfMemoryError) as error:
        fail(f"out of memory ({error!s:.300}); take a smaller --batch-size")
    except (OSError, UnknownNetwork) as error:
        fail(error)


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
    """Average the tensors of floats over the processes, in place."""
    for tensor in tensors if WORLD > 1 else ():
        if tensor.is_floating_point():
            tensor.copy_(all_sum(tensor.contiguous()) / WORLD)
