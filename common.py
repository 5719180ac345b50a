"""What the four training scripts and evaluate.py share: networks, data, PGD, mHuber.

Images are float tensors N x 3 x H x W in [0, 1], networks return logits N x C, perturbations are
L-infinity in the unit of the images. Under torchrun process RANK of WORLD has its part of a batch.
"""
import argparse
import json
import math
import os
import re
import sys
import time
import zlib
from collections import namedtuple
from datetime import timedelta
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.models import resnet

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
CPUINFO = Path("/proc/cpuinfo")
TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


# ------------------------------------------------------------------------------------ networks
def conv_bn(conv, bn, x):
    """bn(conv(x)). In eval mode as one convolution: the same values in fewer passes over memory."""
    if bn.training:
        return bn(conv(x))
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    weight = conv.weight * scale.view(-1, 1, 1, 1)
    return F.conv2d(x, weight, bn.bias - bn.running_mean * scale, conv.stride, conv.padding)


class BasicBlock(resnet.BasicBlock):
    def forward(self, x):
        skip = x if self.downsample is None else conv_bn(*self.downsample, x)
        out = F.relu(conv_bn(self.conv1, self.bn1, x), inplace=True)
        out = conv_bn(self.conv2, self.bn2, out)
        return F.relu(out + skip, inplace=True)


def resnet18(num_classes):
    """torchvision's ResNet-18 with the CIFAR stem: a 3x3 convolution of stride 1, no max-pool."""
    model = resnet.ResNet(BasicBlock, [2, 2, 2, 2], num_classes)
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
        out = F.relu(conv_bn(self.conv1, self.bn2, out), inplace=True)
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
    """`resnet18` or `wrn-<depth>-<widen>`."""
    if arch == "resnet18":
        return resnet18(num_classes)
    match = re.fullmatch(r"wrn-(\d{1,3})-([1-9]\d?)", arch)
    if match is None or int(match[1]) < 10 or int(match[1]) % 6 != 4:
        fail(f"--arch {arch}: unknown; take resnet18 or wrn-<depth>-<widen>, depth 6n+4: wrn-34-10")
    return WideResNet(int(match[1]), int(match[2]), num_classes)


# ---------------------------------------------------------------------------------------- data
Data = namedtuple("Data", "x_train y_train x_test y_test classes")  # x: uint8 N x 3 x H x W


def load_data(name, data_dir):
    """The data set `name` (of DATASETS), downloaded into or read from `data_dir`."""
    data_dir = Path(data_dir).resolve()
    if RANK > 0:
        barrier()  # process 0 downloads, the others then find the files
    try:
        data = DATASETS[name](data_dir)
    except Exception as error:  # a broken file makes its reader raise anything
        fail(f"--dataset {name} in {data_dir}: {error!s:.300}; put the files there, or take "
             "--dataset shapes, which needs none")
    if RANK == 0:
        barrier()
    return data


def cifar(dataset, data_dir):
    """CIFAR-10 or CIFAR-100 below `data_dir`, which may also be the folder of batches itself."""
    root = data_dir.parent if data_dir.name == dataset.base_folder else data_dir
    train, test = dataset(root, train=True, download=True), dataset(root, train=False)
    x_train, x_test = (torch.from_numpy(d.data).permute(0, 3, 1, 2) for d in (train, test))
    return Data(x_train, torch.tensor(train.targets), x_test, torch.tensor(test.targets),
                train.classes)


def tinyimagenet(data_dir):
    """tiny-imagenet-200, downloaded and unpacked if need be; its val split is the test set."""
    root, unpacked = data_dir / "tiny-imagenet-200", data_dir / "tiny-imagenet-200.tmp"
    if (data_dir / "train").is_dir():
        root = data_dir
    elif not root.is_dir():  # unpacked aside: half of it is never taken for the whole
        download_and_extract_archive(TINY_URL, data_dir, unpacked, md5=TINY_MD5)
        (unpacked / root.name).rename(root)
        unpacked.rmdir()
    if not any(root.glob("val/images/*")):  # sorted into a folder for each class
        return folder(root, "val")
    train, table = ImageFolder(root / "train"), (root / "val" / "val_annotations.txt").read_text()
    rows = [line.split("\t") for line in table.splitlines() if line]
    test = [(root / "val" / "images" / row[0], train.class_to_idx[row[1]]) for row in rows]
    return Data(*read_images(train.samples), *read_images(test), train.classes)


def folder(root, split="test"):
    """train/ and test/ (or val/): in each a folder of images per class."""
    if not (root / split).is_dir():
        split = "val"
    train, test = ImageFolder(root / "train"), ImageFolder(root / split)
    if train.classes != test.classes or len(train.classes) < 2:
        odd = sorted(set(train.classes) ^ set(test.classes))[:5]
        raise ValueError(f"train/ and {split}/ need the same two or more classes; differing: {odd}")
    return Data(*read_images(train.samples), *read_images(test.samples), train.classes)


def read_images(samples):
    """uint8 images, all of one size, and labels of a list of (path, label)."""
    def read(path):
        try:
            image = Image.open(path)
            if image.mode[0] in "IF":  # 16 or 32 bits, which convert() would clip
                raise ValueError(image.mode)
            return np.asarray(image.convert("RGB"))
        except Exception:  # a broken file makes PIL raise anything
            raise ValueError(f"{path} is not a readable image of 8 bits a channel")

    paths, labels = zip(*samples)
    x = np.empty((len(paths), *read(paths[0]).shape), np.uint8)
    with ThreadPool() as pool:
        images = progress(pool.imap(read, paths, chunksize=64), len(paths), "reading images")
        for i, image in enumerate(images):
            if image.shape != x.shape[1:]:
                raise ValueError(f"{paths[i]} and {paths[0]} differ in size; make all sizes equal")
            x[i] = image
    return torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor(labels)


def draw_shapes(n, seed):
    """Ten mirror-symmetric shapes of 6 x 6 squares, in images of 32 x 32: a robust feature and one
    that is not. The shape stands out by 0.2 to 0.4; a tile of +-2/255 peculiar to the class covers
    the image: natural training may rely on it, an attack of 8/255 removes it."""
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
    "cifar10": partial(cifar, CIFAR10), "cifar100": partial(cifar, CIFAR100),
    "tinyimagenet": tinyimagenet, "folder": folder,
    "shapes": lambda _: Data(*draw_shapes(5000, seed=1), *draw_shapes(1000, seed=2), "ABCDEFGHIJ")}


def fingerprint(x, y):
    """Number, size and checksum of images and labels: whether two runs saw the same data."""
    checksum = zlib.crc32(x.permute(0, 2, 3, 1).contiguous().numpy(), zlib.crc32(y.numpy()))
    return f"{len(x)} images of {x.shape[2]}x{x.shape[3]}, checksum {checksum:08x}"


def hold_out(data, n, device):
    """x_train, y_train, x_val, y_val: n training images, the same for every seed, are held out."""
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split([max(0, len(order) - n)])
    return [t[rows].to(device) for rows in parts for t in (data.x_train, data.y_train)]


def shuffled_batches(x, y, batch_size, seed, epoch):
    """Augmented batches (images, labels, their rows in x) of one epoch, of each our process's part;
    an incomplete last one is left out. All random numbers follow from (seed, epoch)."""
    seeds = np.random.SeedSequence([seed, epoch]).generate_state(1 + WORLD).tolist()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seeds[0]))
    order = order[:len(x) // batch_size * batch_size].view(-1, batch_size)
    torch.manual_seed(seeds[1 + RANK])
    for rows in order[:, RANK::WORLD].to(x.device):
        yield augment(x[rows]), y[rows], rows


def augment(x):
    """A random crop after padding by 4 zero pixels and a random flip of each image."""
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
def pgd(model, x, loss, epsilon=8 / 255, step_size=2 / 255, steps=10, start=None):
    """Projected gradient ascent in the L-infinity ball (eq. 2; the inner loop of Algorithm 1).

    loss maps logits to a scalar. start is the first iterate, by default x + 0.001 N(0, I) as in
    Algorithm 1. Returns the last iterate, within epsilon of x and in [0, 1].
    """
    training = model.training
    model.eval()  # open: the paper does not say which mode; eval as in TRADES and MART
    lower, upper = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    x_adv = x + 0.001 * torch.randn_like(x) if start is None else start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        logits = model(x_adv).to(x.dtype)  # under autocast they are bfloat16
        gradient = torch.autograd.grad(loss(logits), x_adv)[0]
        x_adv = torch.clamp(x_adv.detach() + step_size * gradient.sign(), lower, upper)
    model.train(training)
    return x_adv


def accuracy(model, x, y, epsilon, step_size, steps, batch_size, amp=False, text="test"):
    """Clean and PGD accuracy in percent on uint8 images, in eval mode: CE, uniform start, the last
    iterate decides. With amp the search runs in bfloat16, the decisions stay in float32."""
    model.eval()
    correct = torch.zeros(2, device=x.device)
    parts = list(zip(x[RANK::WORLD].split(batch_size), y[RANK::WORLD].split(batch_size)))
    for images, labels in progress(parts, len(parts), text):
        images = x_adv = to_float(images)
        if epsilon:
            start = images + torch.empty_like(images).uniform_(-epsilon, epsilon)
            with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
                x_adv = pgd(model, images, lambda logits: F.cross_entropy(logits, labels),
                            epsilon, step_size, steps, start)
        with torch.no_grad():
            clean = model(images).argmax(1) == labels
            robust = clean & (model(x_adv).argmax(1) == labels)
        correct += torch.stack([clean.sum(), robust.sum()])
    return (100 * all_sum(correct) / len(x)).tolist()


def mhuber(u, v, alpha):
    """Modified Huber loss (section 3), the mean over all elements of u - v. In float32 the value of
    an element is 0 below |d| of about 1e-3, where 1 - cos cancels; its gradient stays right."""
    d = u - v
    c = d.abs() / alpha <= math.pi / 2
    A = alpha ** 2 * (1 - torch.cos(d / alpha))
    B = alpha * d.abs() + (1 - math.pi / 2) * alpha ** 2
    return torch.where(c, A, B).mean()


# ------------------------------------------------------------- arguments, messages, processes
class Parser(argparse.ArgumentParser):
    """argparse with errors in one line and the script's own text and the defaults as its help."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            shown = action.default not in (None, False)
            return super()._get_help_string(action) if shown else action.help

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=self.Formatter)

    def error(self, message):
        fail(f"{message} (see --help)")


def number(low, high=10 ** 6, kind=float):
    """An argparse type: a number in [low, high], typed as 0.031, 3e-4 or 8/255."""
    def parse(text):
        try:
            top, _, bottom = text.partition("/")
            value = int(text) if kind is int else float(top) / float(bottom or 1)
        except (ValueError, ArithmeticError):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 100 or 8/255")
        if not low <= value <= high:
            hint = f", did you mean {text}/255?" if high == 1 and value > 1 else ""
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}{hint}")
        return value
    return parse


print0 = partial(print, flush=True) if RANK == 0 else lambda *_, **__: None


def fail(message):
    """End the program with one line on stderr, exit status 2: an error that the user can mend."""
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
    """Rewrite one line of the terminal."""
    if RANK == 0 and sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def setup(name, amp=False):
    """The torch.device of that name ("auto": CUDA if there is one); joins torchrun's processes."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.backends.cudnn.benchmark = True
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {name}: not usable here ({error!s:.300}); try --device cpu")
    if amp and device.type == "cpu" and CPUINFO.exists() and "bf16" not in CPUINFO.read_text():
        print0("note: this CPU has no bfloat16 instructions: --amp is slower than float32 here")
    if WORLD > 1:  # patient: process 0 may download
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device


def run(main, how):
    """Call main(). Ctrl-C, a full memory or disk, a missing compiler end it in one line; `how`
    completes "the same command ... continues it"."""
    try:
        main()
    except KeyboardInterrupt:
        print0(f"\ninterrupted; the same command {how} continues it", file=sys.stderr)
        os._exit(130)
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


# --------------------------------------------------------------------------- the files of a run
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


def open_run(args, device):
    """Begin the run folder, or with --resume return its last.pt, if any; refuse another run's."""
    folder, state, old = Path(args.run_dir), None, vars(args)
    last = folder / "last.pt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if RANK == 0 and not args.resume and any(folder.iterdir()):
            fail(f"{folder} is not empty; add --resume to continue, or choose another --run-dir")
        if args.resume and last.exists():
            state = torch.load(last, map_location=device, weights_only=True)
            old = dict(state["args"])
            state["model"], state["optimizer"], state["history"], state["ema_adv"], state["ema_nat"]
    except Exception as error:  # whatever a damaged or foreign file or the file system raises
        fail(f"{last}: not the last.pt of a run, or not to be read or written ({error!s:.300}); "
             "choose another --run-dir")
    changed = [f"{name} was {old.get(name)}, is {new}" for name, new in vars(args).items()
               if name not in ("resume", "run_dir", "data_dir", "device") and new != old.get(name)]
    if changed:
        fail(f"--resume: {'; '.join(changed)}; give the same, or choose another --run-dir")
    if RANK == 0:
        (folder / "args.json").write_text(json.dumps(vars(args), indent=1))
    return state


def check_finite(model, terms, epoch):
    """Stop before anything is saved if a term of the loss or a weight is not finite."""
    for name, values in [*terms.items(), *model.state_dict().items()]:
        if not values.isfinite().all():
            fail(f"epoch {epoch}, {name} is not finite; last.pt, if there is one, holds the epoch "
                 "before; try a lower --lr or weight of the term, in another --run-dir")
