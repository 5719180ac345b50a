"""What the four training scripts and evaluate.py share: networks, data, PGD, mHuber.

Images are float tensors N x 3 x H x W in [0, 1], networks return logits N x C, perturbations are
L-infinity in the unit of the images. Under torchrun process RANK of WORLD has its part of a batch.
"""
import argparse
import glob
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
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
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


class ResNet18(resnet.ResNet):
    """torchvision's ResNet-18 with the CIFAR stem: a 3x3 convolution of stride 1, no max-pool."""

    def __init__(self, num_classes):
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes)
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        x = F.relu(conv_bn(self.conv1, self.bn1, x), inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


class WideBlock(nn.Module):
    """Pre-activation residual block (Zagoruyko & Komodakis 2016), named as in TRADES' code."""

    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        widens = c_in != c_out
        self.convShortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if widens else None

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
        return ResNet18(num_classes)
    match = re.fullmatch(r"wrn-(\d{1,3})-([1-9]\d?)", arch)
    if match is None or int(match[1]) < 10 or int(match[1]) % 6 != 4:
        fail(f"--arch {arch}: unknown; take resnet18 or wrn-<depth>-<widen>, depth 6n+4: wrn-34-10")
    return WideResNet(int(match[1]), int(match[2]), num_classes)


# ---------------------------------------------------------------------------------------- data
# images uint8 N x 3 x H x W, labels int64 N, the names of the classes
Data = namedtuple("Data", "x_train y_train x_test y_test classes")


def load_data(name, data_dir):
    """The data set `name` (of DATASETS), downloaded into or read from `data_dir`."""
    data_dir = Path(data_dir).resolve()
    if RANK > 0:
        barrier()  # process 0 downloads, the others then find the files
    try:
        data = DATASETS[name](data_dir)
    except Exception as error:  # a broken file makes its reader raise anything
        network = "connect to the internet, " if isinstance(error, OSError) else ""
        fail(f"--dataset {name} in {data_dir}: {brief(error)}; {network}put the files "
             "there, or take --dataset shapes, which needs none")
    if RANK == 0:
        barrier()
    return data


def cifar(dataset, data_dir):
    """CIFAR-10 or CIFAR-100 below `data_dir`, which may also be the folder of batches itself."""
    root = data_dir.parent if data_dir.name == dataset.base_folder else data_dir
    batches = root / dataset.base_folder
    lost = [f for f, _ in dataset.train_list + dataset.test_list if not (batches / f).exists()]
    if lost and batches.is_dir() and not (root / dataset.filename).exists():
        raise ValueError(f"{batches.name} lacks {', '.join(lost)}")
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
    return folder(root)


def folder(root):
    """train/ and test/ (or val/, if test/ has no labels): in each a folder of images per class.
    val/ may have its labels in val_annotations.txt instead, as Tiny ImageNet's has."""
    train = list_images(root / "train")
    classes = sorted({label for _, label in train})
    for split in ("test", "val"):
        test = list_images(root / split)
        table = root / split / "val_annotations.txt"
        if {label for _, label in test} == {"images"} and table.exists():
            rows = [line.split("\t") for line in table.read_text().splitlines() if "\t" in line]
            label_of = {row[0]: row[1] for row in rows}
            test = [(path, label_of.get(path.name, "")) for path, _ in test]
        labels = {label for _, label in test}
        if labels & set(classes):
            break
    if len(classes) < 2 or labels != set(classes):
        raise ValueError(f"train/ has the classes {classes[:5]}, {split}/ lacks or adds "
                         f"{sorted(labels ^ set(classes))[:5]}; both need the same two or more, "
                         "in folders train/ and test/ (or val/) with a folder of images for each")
    return Data(*read_images(train, classes), *read_images(test, classes), classes)


def list_images(root):
    """[(path, class)] of the images in the folders below `root`; .names are passed over."""
    names = [Path(name) for name in sorted(glob.glob("*/**", root_dir=root, recursive=True))]
    images = [name for name in names if name.suffix.lower() in IMG_EXTENSIONS]
    others = [name for name in set(names) - set(images) if (root / name).is_file()]
    if others:
        kinds = ", ".join({name.suffix for name in others})
        print0(f"note: {len(others)} files in {root} are not read ({kinds})", file=sys.stderr)
    return [(root / name, name.parts[0]) for name in images]


def read_images(samples, classes):
    """uint8 images, all of one size, and labels of a list of (path, class)."""
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
    labels = torch.tensor([classes.index(label) for label in labels])
    return torch.from_numpy(x).permute(0, 3, 1, 2), labels


SHAPES = [f"{fill} {shape}" for fill in ("hollow", "filled")
          for shape in ("circle", "square", "diamond", "triangle", "cross")]


def draw_shapes(n, seed):
    """Images of SHAPES, 32 x 32: the shape is a robust feature, the faint pattern is not.

    A shape in a random colour, place and size stands out by 0.2 to 0.4; a tile of +-2/255 peculiar
    to the class covers the image: natural training may rely on it, an attack of 8/255 removes it.
    """
    g = torch.Generator().manual_seed(seed)
    y = torch.randperm(n, generator=g) % 10

    def uniform(low, high, channels=1):
        return low + (high - low) * torch.rand(n, channels, 1, 1, generator=g)

    size = uniform(9, 13)
    u = (torch.arange(32.0) - uniform(13, 18)).abs() / size
    v = (torch.arange(32.0)[:, None] - uniform(13, 18)) / size
    most, least = torch.maximum(u, v.abs()), torch.minimum(u, v.abs())
    norms = [(u * u + v * v).sqrt(), most / 0.9, u + v.abs(), torch.maximum(v, 2 * u - v) / 0.9,
             torch.maximum(most / 0.9, least / 0.35)]
    norm = torch.stack(norms)[y % 5, torch.arange(n)]
    mask = (norm < 1) & ((norm > 0.6) | (y >= 5).view(-1, 1, 1, 1))
    contrast = uniform(0.2, 0.4, channels=3) * uniform(-1, 1).sign()
    noise = 0.02 * torch.randn(n, 3, 32, 32, generator=g)
    tile_g = torch.Generator().manual_seed(0)  # the same tiles for every seed
    tiles = (torch.randint(2, (10, 3, 4, 4), generator=tile_g) * 4 - 2) / 255
    x = uniform(0.3, 0.7, channels=3) + contrast * mask + noise + tiles[y].repeat(1, 1, 8, 8)
    return (x.clamp(0, 1) * 255).round().byte(), y


DATASETS = {
    "cifar10": partial(cifar, CIFAR10), "cifar100": partial(cifar, CIFAR100),
    "tinyimagenet": tinyimagenet, "folder": folder,
    "shapes": lambda _: Data(*draw_shapes(5000, seed=0), *draw_shapes(1000, seed=1), SHAPES)}


def fingerprint(x, y):
    """Number, size and checksum of images and labels: whether two runs saw the same data."""
    checksum = zlib.crc32(x.permute(0, 2, 3, 1).contiguous().numpy(), zlib.crc32(y.numpy()))
    return f"{len(x)} images of {x.shape[2]}x{x.shape[3]}, checksum {checksum:08x}"


def hold_out(data, n, device):
    """x_train, y_train, x_val, y_val: n training images, the same for every seed, are held out."""
    order = torch.randperm(len(data.x_train), generator=torch.Generator().manual_seed(0))
    parts = order.split([len(order) - n, n])
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
    crops = F.pad(x, (4, 4, 4, 4)).unfold(2, height, 1).unfold(3, width, 1)  # a view, n x 3 x 9 x 9
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


def brief(error):
    """The beginning of an exception's text, in one line."""
    return " ".join((str(error) or type(error).__name__).split())[:300]


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
        fail(f"--device {name}: not usable here ({brief(error)}); try --device cpu")
    if amp and device.type == "cpu" and CPUINFO.exists() and "bf16" not in CPUINFO.read_text():
        print0("note: this CPU has no bfloat16 instructions: --amp is slower than float32 here")
    if WORLD > 1:  # patient: process 0 may download
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return device


def run(main, how):
    """Call main(). Ctrl-C, a full memory or disk, a missing compiler end it in one line; `how` to
    give the same command again so that it continues."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a sign that a terminal lacks is no error
    try:
        main()
    except KeyboardInterrupt:
        print0(f"\ninterrupted; the same command {how} continues it", file=sys.stderr)
        os._exit(130)
    except BrokenPipeError:  # nobody reads our output any more, as after `| head`
        os._exit(141)
    except (OSError, MemoryError, RuntimeError) as error:
        short = re.search("out of memory|can't allocate memory", str(error))
        if short or isinstance(error, MemoryError):
            fail(f"out of memory ({brief(error)}); take a smaller --batch-size")
        if isinstance(error, OSError):
            fail(f"{brief(error)}; is the place there, writable and not full?")
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            fail(f"--compile does not work here ({brief(error)}); leave it out")
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
def lock(path):
    """Hold the file `path` until this process ends; refuse to work beside one that holds it."""
    file = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        import fcntl  # Windows has none
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{path}: another process is at work there; wait for it, or choose another place")
    except ImportError:
        pass


def save(write, path):
    """write(temporary name), then rename: `path` never holds half a file. By process 0 alone."""
    part = Path(f"{path}.tmp")
    try:
        if RANK == 0:
            write(part)
            os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save on a full disk: RuntimeError
        part.unlink(missing_ok=True)
        fail(f"{path}: not writable ({brief(error)}); is the folder there and not full?")


def open_run(args, device):
    """Take the run folder; with --resume return its last.pt, which alone says what run it is."""
    last, state, old = Path(args.run_dir, "last.pt"), None, vars(args)
    try:
        last.parent.mkdir(parents=True, exist_ok=True)
        if RANK == 0:
            lock(last.with_name("args.json"))
        if last.exists():
            state = torch.load(last, map_location=device, weights_only=True)
            old = dict(state["args"])
            state["model"], state["optimizer"], state["history"], state["ema_adv"], state["ema_nat"]
    except Exception as error:  # whatever a damaged or foreign file or the file system raises
        fail(f"{last}: not the last.pt of a run, or not to be read or written ({brief(error)}); "
             "choose another --run-dir")
    if state and not args.resume:
        fail(f"{last.parent} already holds a run; add --resume, or choose another --run-dir")
    changed = [f"{name} was {old.get(name)}, is {value}" for name, value in vars(args).items()
               if value != old.get(name)
               and name not in ("resume", "run_dir", "data_dir", "device")]
    if changed:
        fail(f"--resume: {'; '.join(changed)}; give the same, or choose another --run-dir")
    if RANK == 0:
        last.with_name("args.json").write_text(json.dumps(vars(args), indent=1))
    return state


def check_finite(model, terms, epoch):
    """Stop before anything is saved if a term of the loss or a weight is not finite."""
    for name, values in [*terms.items(), *model.state_dict().items()]:
        if not values.isfinite().all():
            fail(f"epoch {epoch}, {name} is not finite; last.pt, if there is one, holds the epoch "
                 "before; try a lower --lr or weight of the term, in another --run-dir")
