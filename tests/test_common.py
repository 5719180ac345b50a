"""common.py: accuracy, networks, every data set from small files in its real layout, batches,
names, messages and devices. Runs are in test_training.py, the attacks in test_attacks.py."""

import argparse
import hashlib
import importlib.util
import io
import itertools
import os
import pickle
import re
import shutil
import sys
import tarfile
import time
import zlib
from argparse import Namespace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision import datasets

import common


# ------------------------------------------------------------------------------------ accuracy
class Linear(torch.nn.Module):
    """Logits 0 and 255 * mean(w x), w = +-1: the mean is 0 on grey images. Keeps what it sees."""

    def __init__(self):
        super().__init__()
        self.w = torch.tensor([1.0, -1.0]).repeat(3 * 32 * 16)
        self.seen = []

    def forward(self, x):
        assert not self.training
        self.seen.append(x.detach())
        z = 255 * (x.flatten(1) * self.w).mean(1)
        return torch.stack([0 * z, z], 1)


@pytest.mark.parametrize(
    "epsilon, step, steps, robust",
    [(4, 1, 10, 40), (8, 2, 10, 20), (8, 2, 1, 60), (12, 12, 3, 0), (0, 1, 10, 70)],
)
def test_accuracy_counts_the_images_that_pgd_leaves_right(epsilon, step, steps, robust):
    """Of 10 images (in batches of 4, 4, 2) three are wrong before the attack. Seven stand 1 to 11
    255ths from the boundary: those that are farther than epsilon, or than the steps lead, stay."""
    model, distance = Linear().train(), torch.tensor([1, 3, 5, 7, 9, 11, -3, -2, -9, 5])
    y = torch.tensor([1, 1, 1, 1, 1, 1, 0, 1, 1, 0])
    x = (128 + distance[:, None] * model.w).byte().view(10, 3, 32, 32)
    found = common.accuracy(model, x, y, epsilon / 255, step / 255, steps, batch_size=4)
    assert found == [70, robust] and model.training  # 70 and not 69.9999988
    assert len(model.seen) == 3 * (2 + (steps if epsilon else 0))  # epsilon 0 searches nothing
    start = 255 * model.seen[0] - x[:4]  # uniform in the box
    assert start.abs().max() <= epsilon + 1e-3
    assert start.std() == pytest.approx(epsilon / 3**0.5, rel=0.05)


def test_an_image_that_is_wrong_before_the_attack_is_not_robust():
    """Here the noise of the start makes all images right, which are of whole 255ths."""

    def model(x):
        noise = (255 * x - (255 * x).round()).abs().flatten(1).amax(1)
        return torch.stack([0.1 - noise, 0 * noise], 1)

    x, y = torch.full((9, 3, 4, 4), 99, dtype=torch.uint8), torch.ones(9, dtype=torch.long)
    assert common.accuracy(model, x, y, 0.1, 1e-4, 2, batch_size=9) == [0, 0]


@pytest.mark.parametrize("amp", [False, True])
def test_accuracy_searches_in_bfloat16_if_asked_and_decides_in_float32(amp):
    layer, seen = torch.nn.Linear(48, 2), []

    def model(x):
        logits = layer(x.flatten(1))
        seen.append(logits.dtype)
        return logits

    x, y = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8), torch.zeros(5).long()
    common.accuracy(model, x, y, 0.1, 0.1, 3, batch_size=5, amp=amp)
    assert seen == 3 * [torch.bfloat16 if amp else torch.float32] + 2 * [torch.float32]


def test_what_takes_images_of_bytes_refuses_others():
    """Floats, in [0, 1] already, would be divided by 255. Bytes become floats in [0, 1]."""
    x, y = torch.randint(256, (2, 3, 8, 6), dtype=torch.uint8), torch.zeros(2).long()

    def accuracy(x):
        return common.accuracy(lambda x: x[:, :2, 0, 0], x, y, 0.1, 0.1, 1, batch_size=2)

    for function in (common.to_float, common.augment, accuracy):
        function(x)
        for other in (x.float() / 255, x.double() / 255, x.long()):
            with pytest.raises(ValueError):
                function(other)
    floats = common.to_float(x)
    assert floats.dtype == torch.float32 and torch.equal(floats, x / 255)
    assert floats.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------ networks
@pytest.mark.parametrize(
    "arch, size, stages, pixels",
    [
        ("resnet18", 11_173_962, "conv1 layer1 layer2 layer3 layer4", [32, 32, 16, 8, 4]),
        ("wrn-34-10", 46_160_474, "conv1 block1 block2 block3", [32, 32, 16, 8]),
    ],
)
def test_networks_have_the_published_sizes(arch, size, stages, pixels):
    """Parameters for 10 classes; pixels that each stage sees of 32 x 32: the stem keeps all."""
    with torch.device("meta"):
        model, seen = common.make_model(arch, 10), {}
        for name, module in model.named_children():
            module.register_forward_hook(lambda _, x, z, name=name: seen.update({name: z.shape}))
        model(torch.zeros(1, 3, 32, 32))
        assert common.make_model(arch, 7)(torch.zeros(2, 3, 24, 8)).shape == (2, 7)
    assert sum(p.numel() for p in model.parameters()) == size
    assert [seen[name][2] for name in stages.split()] == pixels


@pytest.mark.parametrize(
    "arch", "wrn-12-1 wrn-13-1 wrn-4-1 wrn-10-0 resnet50 wrn-10 wrn-10-1x wrn-100000-1000".split()
)
def test_a_network_that_does_not_exist_is_refused(arch, refused):
    """As an error for who imports make_model, in one line for who types the command."""
    with pytest.raises(ValueError, match=arch):
        common.make_model(arch, 10)
    assert arch in refused(common.run, lambda: common.make_model(arch, 10), "")


def reference_wide_resnet(weights, x, depth, train):
    """WideResNet (Zagoruyko & Komodakis 2016) of its weights, of TRADES' names.

    Three groups of blocks B(3, 3), full pre-activation (He et al. 2016b): the first block of a
    group has a 1 x 1 convolution of the activated input as shortcut, that of 2 and 3 halves.
    """
    w = weights.pop

    def bn_relu(x, name):
        mean, var = w(f"{name}.running_mean"), w(f"{name}.running_var")
        if train:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        gamma, beta = w(f"{name}.weight"), w(f"{name}.bias")
        mean, var, gamma, beta = (t.view(-1, 1, 1) for t in (mean, var, gamma, beta))
        return ((x - mean) / (var + 1e-5).sqrt() * gamma + beta).clamp(min=0)

    x = F.conv2d(x, w("conv1.weight"), padding=1)
    for group, i in itertools.product((1, 2, 3), range((depth - 4) // 6)):
        name = f"block{group}.layer.{i}"
        stride = 2 if group > 1 and i == 0 else 1
        out = bn_relu(x, f"{name}.bn1")
        shortcut = x
        if i == 0:
            shortcut = F.conv2d(out, w(f"{name}.convShortcut.weight"), stride=stride)
        out = F.conv2d(out, w(f"{name}.conv1.weight"), stride=stride, padding=1)
        out = bn_relu(out, f"{name}.bn2")
        x = shortcut + F.conv2d(out, w(f"{name}.conv2.weight"), padding=1)
    x = bn_relu(x, "bn1").mean((2, 3))
    return x @ w("fc.weight").T + w("fc.bias")


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("arch", ["resnet18", "wrn-16-2"])
def test_networks_compute_what_independent_ones_compute(arch, train):
    """In float64 the logits and the input gradient equal the reference's to 1e-9, in both modes.
    Names of weights are those of torchvision and of TRADES' code; there is no weight besides."""
    torch.manual_seed(0)
    model = common.make_model(arch, 10).double().train(train)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # not those of a fresh network
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.05, 1.5)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(3, 3, 12, 8).double().requires_grad_()
    logits = model(x)
    if arch == "resnet18":
        reference = torchvision.models.resnet18(num_classes=10)
        reference.conv1 = torch.nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        reference.maxpool = torch.nn.Identity()
        reference.double().train(train).load_state_dict(state)
        expected = reference(x)
    else:
        expected = reference_wide_resnet(state, x, 16, train)
        assert all(name.endswith("num_batches_tracked") for name in state)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-9)
    gradients = [torch.autograd.grad(z.square().sum(), x)[0] for z in (logits, expected)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-9)


@pytest.mark.parametrize("arch", ["resnet18", "wrn-16-4"])
def test_initial_weights_are_he_normal_fan_out(arch):
    """Of variance 2 / fan-out; batch norms are the identity, a WideResNet's last bias is 0."""
    torch.manual_seed(0)
    model = common.make_model(arch, 10)
    assert (model.fc.bias == 0).all() == arch.startswith("wrn")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            weight = module.weight.detach() / (2 / fan_out) ** 0.5
            n = weight.numel()
            assert abs(weight.mean()) < 6 / n**0.5, name
            assert weight.var().item() == pytest.approx(1, abs=6 * (2 / n) ** 0.5), name
            assert weight.pow(4).mean().item() == pytest.approx(3, abs=6 * (96 / n) ** 0.5), name
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
            assert (module.momentum, module.eps) == (0.1, 1e-5)


# ---------------------------------------------------------------------------------- data sets
@pytest.fixture(autouse=True)
def network(monkeypatch):
    """There is none, unless a test lets it serve a file. Its calls are counted."""
    network = Namespace(file=None, calls=0)

    def urlopen(*_, **__):
        network.calls += 1
        if network.file is None:
            raise OSError("no route to host")
        response = io.BytesIO(network.file)
        response.url, response.length = None, 1
        return response

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return network


def load(name, root):
    """Both splits, in the order train, test."""
    return [common.load_data(name, root, split) for split in ("train", "test")]


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """Its folder and archive as published, with batches of 4 images (channel, row, column): batch
    i, of which the last is the test set, has the labels 3 1 0 2, turned by i."""
    kind = datasets.CIFAR10 if request.param == "cifar10" else datasets.CIFAR100
    base, turn = tmp_path / kind.base_folder, itertools.count()
    key = "labels" if request.param == "cifar10" else "fine_labels"
    base.mkdir()

    def write(file, content):
        (base / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((base / file).read_bytes()).hexdigest()]

    def batch():
        i = next(turn)
        return {"data": PIXELS + np.uint8(i), key: np.roll([3, 1, 0, 2], i).tolist()}

    for split in ("train_list", "test_list"):
        files = [write(file, batch()) for file, _ in getattr(kind, split)]
        monkeypatch.setattr(kind, split, files)
    meta = write(kind.meta["filename"], {kind.meta["key"]: ["cat", "dog", "elk", "fox"]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta[1]})
    archive = tmp_path / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, kind.base_folder)
    monkeypatch.setattr(kind, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return Namespace(name=request.param, kind=kind, base=base, archive=archive)


@pytest.mark.parametrize("place", ["folder", "archive", "network"])
def test_cifar_from_its_folder_its_archive_and_the_network(place, cifar, tmp_path, network):
    """All training batches in turn are the train split, the test batch is the test split."""
    network.file = cifar.archive.read_bytes() if place == "network" else None
    if place != "folder":
        shutil.rmtree(cifar.base)
    if place != "archive":
        cifar.archive.unlink()
    train, test = load(cifar.name, tmp_path)
    batches = {"cifar10": 5, "cifar100": 1}[cifar.name]
    x = np.concatenate([PIXELS + np.uint8(i) for i in range(batches + 1)]).reshape(-1, 3, 32, 32)
    y = np.concatenate([np.roll([3, 1, 0, 2], i) for i in range(batches + 1)])
    assert torch.equal(torch.cat([train.x, test.x]), torch.from_numpy(x)) and len(test.x) == 4
    assert torch.cat([train.y, test.y]).tolist() == y.tolist()
    assert train.classes == test.classes == ["cat", "dog", "elk", "fox"]
    assert bool(network.calls) == (place == "network")


def test_changed_cifar_files_are_refused_and_not_overwritten(cifar, tmp_path, network, refused):
    """Noisy labels, say, though the archive lies beside them and the network has it too."""
    network.file = cifar.archive.read_bytes()
    changed = cifar.base / cifar.kind.train_list[0][0]
    changed.write_bytes(b"mine")
    for split in ("train", "test"):
        assert "--data-dir" in refused(common.load_data, cifar.name, tmp_path, split)
    assert changed.read_bytes() == b"mine" and not network.calls


FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}
FOLDERS["tinyimagenet"] = "tiny-imagenet-200"


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_downloaded_must_have_the_published_checksum(name, tmp_path, network, refused):
    """Another archive is refused before it is unpacked, as is none."""
    assert "--data-dir" in refused(common.load_data, name, tmp_path / "none", "train")
    archive, folder, calls = tmp_path / "build", FOLDERS[name], network.calls
    (archive / folder).mkdir(parents=True)
    (archive / folder / "file").touch()
    kind = "zip" if name == "tinyimagenet" else "gztar"
    network.file = Path(shutil.make_archive(tmp_path / "theirs", kind, archive)).read_bytes()
    assert "--data-dir" in refused(common.load_data, name, tmp_path / "other", "train")
    assert network.calls > calls > 0 and not (tmp_path / "other" / folder).exists()


def picture(path, colour=(9, 9, 9), size=(16, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, "ppm" if mode == "RGB" else "png")


@pytest.fixture
def tiny(tmp_path):
    """tiny-imagenet-200 in its layout: 200 classes of one image, 10,000 rows of two val images."""
    folder, names = tmp_path / "tiny-imagenet-200", [f"n{i:03}" for i in range(200)]
    for name in names:
        picture(folder / "train" / name / "images" / f"{name}_0.JPEG")
        (folder / "train" / name / f"{name}_boxes.txt").touch()
    for i in (0, 1):
        picture(folder / "val" / "images" / f"val_{i}.JPEG", (200 * i, 0, 0))
        picture(folder / "test" / "images" / f"test_{i}.JPEG")
    rows = [f"val_{i % 2}.JPEG\t{names[7 * i % 200]}\t0\t0\t62\t62\n" for i in range(10_000)]
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    return folder


def test_the_test_set_of_tiny_imagenet_is_its_val_table(tiny, tmp_path, network):
    """Not test/, which has no labels. Each row of the table is a name and its class."""
    data = common.load_data("tinyimagenet", tmp_path, "test")
    assert data.classes == [f"n{i:03}" for i in range(200)] and data.x.shape == (10_000, 3, 12, 16)
    assert data.y.tolist() == [7 * i % 200 for i in range(10_000)]
    red = data.x[:, 0].float().mean((1, 2)) > 100
    assert red.tolist() == 5_000 * [False, True] and not network.calls


def test_tiny_imagenet_is_read_whole_or_not_at_all(tiny, tmp_path, monkeypatch, refused):
    """100,000 training images of 200 classes; one file or one class less is refused."""
    assert str(tiny) in refused(common.load_data, "tinyimagenet", tmp_path, "train")
    table = tiny / "val" / "val_annotations.txt"
    table.write_text("".join(table.open().readlines()[1:]))
    assert str(tiny) in refused(common.load_data, "tinyimagenet", tmp_path, "test")
    roots = []
    for n, classes in ((99_999, 200), (100_000, 199), (100_000, 200)):
        images = Namespace(samples=[("", i % 199) for i in range(n)], classes=[""] * classes)
        monkeypatch.setattr(common, "ImageFolder", lambda root, **_: roots.append(root) or images)
        monkeypatch.setattr(common, "read_images", lambda samples, *_: len(samples))
        if (n, classes) != (100_000, 200):
            refused(common.load_data, "tinyimagenet", tmp_path, "train")
    assert common.load_data("tinyimagenet", tmp_path, "train") == 100_000
    assert set(roots) == {tiny / "train"}


NAMES = ["10", "2", "a"]  # in the order of text


@pytest.fixture
def own(tmp_path):
    """Own images: 3 training and 2 test images of each class, in a hidden folder."""
    for split, n in (("train", 3), ("test", 2)):
        for c, i in itertools.product(range(3), range(n)):
            picture(tmp_path / ".my" / split / NAMES[c] / f"{i}.png", (c, i, len(split)))
    return tmp_path / ".my"


def test_own_images_keep_their_labels_and_classes_are_in_the_order_of_text(own):
    for data, split, n in zip(load("folder", own), ("train", "test"), (3, 2)):
        assert data.classes == NAMES and data.x.shape == (3 * n, 3, 12, 16)
        expected = [[c, i, len(split)] for c in range(3) for i in range(n)]
        assert data.x[:, :, 5, 9].tolist() == expected == data.x[:, :, 11, 15].tolist()
        assert data.y.tolist() == [c for c, _, _ in expected]


def test_copies_that_programs_hide_are_left_out(own):
    before = common.load_data("folder", own, "train")
    for name in (".ipynb_checkpoints/0-checkpoint.png", "@eaDir/0.png", "._0.png", "deep/.x/1.png"):
        picture(own / "train" / "2" / name, size=(3, 3))
    assert all(map(torch.equal, common.load_data("folder", own, "train")[:2], before[:2]))


def test_images_are_read_as_viewers_show_them(own):
    """Turned as EXIF says, and grey, palette and transparent images in RGB."""
    shown = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    for file in (own / "train").glob("*/*.png"):
        orientation, turns = [(6, 1), (3, 2), (8, 3)][int(file.stem)]  # against the clock
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(np.rot90(shown, turns).copy()).save(file, exif=exif)
    x, expected = common.load_data("folder", own, "train").x, torch.from_numpy(shown)
    assert all(torch.equal(image.permute(1, 2, 0), expected) for image in x)
    for mode, colour in (("L", [90] * 3), ("P", [255, 0, 0]), ("RGBA", [1, 2, 3]), ("1", [0] * 3)):
        picture(own / "train" / "10" / "0.png", tuple(colour), mode=mode)
        assert common.load_data("folder", own, "train").x[0, :, 5, 9].tolist() == colour, mode


PAGES = [Image.new("RGB", (16, 12), colour) for colour in ("red", "blue")]
SPOIL = {
    "no image": lambda file: file.write_bytes(b"not an image"),
    "damaged": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "one pixel": lambda file: picture(file, size=(1, 1)),
    "turned": lambda file: picture(file, size=(12, 16)),
    "pages": lambda file: PAGES[0].save(file, save_all=True, append_images=PAGES[1:]),
    "16 bits": lambda file: Image.fromarray(np.full((12, 16), 40_000, np.uint16)).save(file),
    "floats": lambda file: Image.fromarray(np.ones((12, 16), np.float32)).save(file, "tiff"),
}


@pytest.mark.parametrize("how", SPOIL)
def test_an_image_that_cannot_be_taken_is_named(how, own, refused):
    """Also the first, unless it is right itself but others then have another size."""
    for name in ["2/1.png"] + ["10/0.png"] * (how not in ("damaged", "one pixel", "turned")):
        SPOIL[how](own / "train" / name)
        assert str(own / "train" / name) in refused(common.load_data, "folder", own, "train")


def test_folders_without_images_are_refused_with_the_way_to_the_data(own, refused):
    """None at all, no class, a class without images; the option that mends it is named."""
    for folder in ("9", ".hidden"):
        (own / "train" / folder).mkdir()
        assert folder in refused(common.load_data, "folder", own, "train")
        (own / "train" / folder).rmdir()
    shutil.rmtree(own / "test")
    picture(own / "test" / "0.png")  # images without a class
    for place, split in ((own, "test"), (own / "nowhere", "train")):
        error = refused(common.load_data, "folder", place, split)
        assert str(place / split) in error and "--data-dir" in error


@pytest.mark.parametrize("error", [MemoryError, TypeError, NameError])
def test_too_little_memory_and_our_faults_are_not_blamed_on_the_files(error, monkeypatch):
    def reader(*_, **__):
        raise error("ours")

    monkeypatch.setitem(common.DATASETS, "folder", reader)
    with pytest.raises(error, match="ours"):
        common.load_data("folder", "nowhere", "train")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda test: (test / "2").rename(test / "3"),
        lambda test: shutil.rmtree(test / "2"),
        lambda test: shutil.copytree(test / "2", test / "3"),
        lambda test: [picture(file, size=(12, 16)) for file in test.glob("*/*")],
    ],
)
def test_train_and_test_need_the_same_classes_and_one_size(spoil, own, refused):
    spoil(own / "test")
    args = Namespace(dataset="folder", data_dir=own)
    assert str(own) in refused(common.load_splits, args)


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_the_splits_of_a_run(copies, own, capsys):
    """Train, test; its classes and fingerprint; how many images are both in train and in test."""
    for i in range(copies):
        shutil.copy(own / "train" / "10" / f"{i}.png", own / "test" / "a" / f"{i}.png")
    args = Namespace(dataset="folder", data_dir=own)
    train, test = common.load_splits(args)
    assert (len(train.x), len(test.x)) == (9, 6) and args.classes == NAMES
    assert args.data == common.fingerprint(train.x, train.y) != common.fingerprint(test.x, test.y)
    out = capsys.readouterr().out
    assert str(copies) in out.split() if copies else not out


@pytest.mark.parametrize(
    "split, n, labels, images",
    [("train", 5000, 562_693_931, 245_559_108_190), ("test", 1000, 3_788_443_699, 49_039_323_298)],
)
def test_drawn_shapes_are_always_the_same_and_balanced(split, n, labels, images):
    """By a weighted sum: randn rounds by the processor's instructions, which changes a few pixels
    by 1; any other images change it by far more than is allowed here."""
    x, y, classes = common.load_data("shapes", "nowhere", split)
    assert x.shape == (n, 3, 32, 32) and len(classes) == 10
    assert y.bincount().tolist() == 10 * [n // 10] and zlib.crc32(y.numpy()) == labels
    weights = torch.arange(x.numel()) % 251
    assert int((x.flatten() * weights).sum()) == pytest.approx(images, abs=10_000)


def test_fingerprint_tells_one_changed_pixel_label_and_shape():
    x, y = torch.randint(256, (5, 3, 8, 6), dtype=torch.uint8), torch.arange(5)
    other = x.clone()
    other[3, 1, 2, 4] ^= 1
    different = (x, y), (other, y), (x, y.flip(0)), (x.view(5, 3, 6, 8), y)
    assert len({common.fingerprint(*images) for images in different}) == 4
    view = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as torchvision's lie in memory
    assert common.fingerprint(view, y) == common.fingerprint(x, y)


# ------------------------------------------------------------------------------------- batches
def numbered(n, classes=1):
    """n images, the i-th of the value i + 1, with labels i % classes."""
    x = torch.arange(1, n + 1).byte().view(-1, 1, 1, 1).repeat(1, 3, 8, 8)
    return common.Data(x, torch.arange(n) % classes, [f"class{i}" for i in range(classes)])


def hold_out(data, **changes):
    args = Namespace(**{"val_size": 10, "batch_size": 30, "ema": "image", "seed": 0} | changes)
    return common.hold_out(data, args, torch.device("cpu"))


def test_held_out_images_are_no_training_images_and_the_same_for_every_seed():
    data, parts = numbered(40, 7), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        x_train, y_train, x_val, y_val = hold_out(data, seed=seed)
        parts.append(x_val)
        assert len(x_train) == 30 and len(x_val) == 10
        assert torch.equal(torch.cat([x_train, x_val]).sort(0)[0], data.x)
        for x, y in ((x_train, y_train), (x_val, y_val)):
            assert torch.equal((x[:, 0, 0, 0].long() - 1) % 7, y)
    assert torch.equal(*parts) and not torch.equal(parts[0], data.x[-10:])
    assert [len(part) for part in hold_out(data, val_size=0)] == [40, 40, 0, 0]


@pytest.mark.parametrize(
    "classes, changes, world, named",
    [
        (2, {"batch_size": 31}, 1, "--batch-size"),
        (2, {"val_size": 40, "batch_size": 1}, 1, "--batch-size"),
        (2, {"val_size": 41, "batch_size": 1}, 1, "--batch-size"),
        (2, {"ema": "slot", "batch_size": 29}, 2, "--batch-size"),
        (2, {"ema": "image"}, 2, "--ema"),
        (40, {"val_size": 1}, 1, "--val-size"),
    ],
)
def test_a_batch_of_all_classes_must_be_left(classes, changes, world, named, monkeypatch, refused):
    """Of 40 images, equal parts for all processes. Averages of each image are for one process."""
    monkeypatch.setattr(common, "WORLD", world)
    data = numbered(40, classes)
    error = refused(lambda: hold_out(data, **changes))
    assert named in error
    if classes == 40:  # the one whose image is held out is named
        assert f"class{hold_out(numbered(40), **changes)[2].max() - 1}" in error.split()


def epoch(data, batch_size=5, seed=0, number=1):
    """The batches of an epoch, whatever was drawn before, and what is drawn after it."""
    torch.rand(torch.randint(9, ()))
    return list(common.shuffled_batches(data.x, data.y, batch_size, seed, number)), torch.rand(2)


def test_an_epoch_is_a_new_order_of_all_images_with_their_labels_and_index():
    """Whole batches, no image twice, augmented; (seed, epoch) alone decides the order, the
    augmentation and what is drawn after it; any other pair is another order."""
    data, orders = numbered(23, 7), set()
    batches, after = epoch(data)
    index = torch.cat([index for _, _, index in batches])
    assert [len(part) for batch in batches for part in batch] == 12 * [5]
    assert len(set(index.tolist())) == 20 and index.max() < 23
    for images, labels, index in batches:
        assert torch.equal(labels, data.y[index]) and images.dtype == torch.float32
        assert torch.equal((images * 255).round().amax((1, 2, 3)).long(), index + 1)
    assert any((images == 0).any() for images, _, _ in batches)  # the padding
    again, after_again = epoch(data)
    assert all(all(map(torch.equal, *pair)) for pair in zip(batches, again, strict=True))
    assert torch.equal(after, after_again)
    for seed, number in itertools.product(range(3), range(3)):
        batches, after = epoch(data, 20, seed, number)
        orders.add((*batches[0][2].tolist(),))
        orders.add((*after.tolist(),))
    assert len(orders) == 18 and len(epoch(numbered(20))[0]) == 4


def test_processes_share_each_batch_and_draw_their_own_crops(monkeypatch):
    """Process r of 2 has the images r, r + 2, ... of a batch of one process."""
    x, y = torch.full((40, 3, 8, 8), 255, dtype=torch.uint8), torch.arange(40) % 3
    data, parts = common.Data(x, y, "abc"), []
    whole, _ = epoch(data, 12)
    monkeypatch.setattr(common, "WORLD", 2)
    for rank in (0, 1):
        monkeypatch.setattr(common, "RANK", rank)
        parts.append(epoch(data, 12)[0])
        for batch, part in zip(whole, parts[-1], strict=True):
            assert torch.equal(part[2], batch[2][rank::2]) and torch.equal(part[1], y[part[2]])
    assert len(parts[0][0][0]) == 6 and not torch.equal(parts[0][0][0], parts[1][0][0])


def test_augment_draws_every_crop_and_flip_of_each_image():
    """Of one image, in one batch: its 81 x 2 views in a frame of zeros, no others, half flipped."""
    image = torch.randint(1, 256, (3, 8, 12), dtype=torch.uint8)  # above 0, unlike the frame
    padded, views = F.pad(image, (4, 4, 4, 4)), {}
    for top, left in itertools.product(range(9), range(9)):
        crop = padded[:, top : top + 8, left : left + 12]
        views[crop.numpy().tobytes()] = top, left, False
        views[crop.flip(2).numpy().tobytes()] = top, left, True
    out = common.augment(image.expand(5000, 3, 8, 12))
    seen = [views[result.numpy().tobytes()] for result in (out * 255).round().byte()]
    assert len(views) == len(set(seen)) == 162
    assert sum(flip for *_, flip in seen) == pytest.approx(2500, abs=250)


# ----------------------------------------------------------------- names, messages, devices
OPTIONS = {"dataset": "cifar10", "arch": "resnet18", "epochs": 130, "tau": 0.2, "ema": "slot"}
OPTIONS |= {"seed": 0, "amp": ""} | dict.fromkeys(
    "data_dir device compile run_dir resume".split(), ""
)


def test_a_radius_is_a_fraction_or_decimal_below_1(refused):
    """Who types --epsilon 1 or 8 means 1/255 or 8/255."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epsilon", type=common.radius, default="8/255")
    for text, value in (("0", 0), ("8/255", 8 / 255), ("254/255", 254 / 255), ("0.031", 0.031)):
        assert parser.parse_args(["--epsilon", text]).epsilon == value
    assert parser.parse_args([]).epsilon == 8 / 255
    for text in ("1", "255/255", "8", "-1/255", "nan", "inf", "eight", "8/2/55", ""):
        assert "--epsilon" in refused(parser.parse_args, [f"--epsilon={text}"])


@pytest.mark.parametrize(
    "error, status, named",
    [
        (KeyboardInterrupt(), 130, "with --more"),
        (MemoryError("140 GiB"), 2, "--batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to"), 2, "--batch-size"),
        (FileNotFoundError(2, "No such file", "runs/last.pt"), 2, "runs/last.pt"),
        (common.UnknownNetwork("--arch vgg"), 2, "--arch vgg"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line(error, status, named, refused):
    def main(error=error):
        raise error

    line = refused(common.run, main, "with --more", status=status)
    assert named in line and len(line.strip().splitlines()) == 1
    for ours in (TypeError, ValueError, RuntimeError, KeyError):  # these keep their traceback
        with pytest.raises(ours):
            common.run(lambda: main(ours()), "")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_a_terminal_how_far_it_is_and_the_time_left(terminal, monkeypatch):
    """Six items of 10, 10, 0.1, 9.9, 10, 0.1 seconds by a clock of ours: after 0.1 s there is no
    new line, unless it is the last, which is empty."""
    clock, stream, items, shown = Namespace(now=1000.0), io.StringIO(), "", []
    stream.isatty = lambda: terminal
    monkeypatch.setattr(time, "time", lambda: clock.now)
    monkeypatch.setattr(sys, "stderr", stream)
    for item, seconds in zip(common.progress("abcdef", 6, "epoch"), (10, 10, 0.1, 9.9, 10, 0.1)):
        items += item
        clock.now += seconds
        numbers = re.findall(r"\d+", stream.getvalue().split("\r")[-1])
        shown.append([int(numbers[i]) for i in (0, 1, -1)] if numbers else [])
    assert items == "abcdef" and not stream.getvalue().split("\r")[-1].strip("\033[K")
    expected = [[], [1, 6, 50], [2, 6, 40], [2, 6, 40], [4, 6, 15], [5, 6, 8]]
    assert shown == (expected if terminal else 6 * [[]]) and (terminal or not stream.getvalue())


@pytest.mark.parametrize(
    "name, local_rank, expected",
    [("cuda", "", 0), ("cuda:3", "", 3), ("cuda", "1", 1), ("cuda:0", "1", 1)],
)
def test_each_process_has_its_own_gpu(name, local_rank, expected, monkeypatch, refused):
    """The first or the named one; torchrun's LOCAL_RANK wins: a name is the same for all."""
    current = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = common.setup(name)
    assert device == torch.device("cuda", expected) and current == [device]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"--device {name}" in refused(common.setup, name)
    assert common.setup("cpu") == torch.device("cpu")


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_wait_for_each_other_and_the_first_alone_prints(rank, monkeypatch, capsys):
    """Process 0 may download or test for hours while the others wait."""
    groups = []
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(common, "RANK", rank)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: groups.append(options))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # given back
    common.setup("cpu")
    print("epoch 1")
    assert (capsys.readouterr().out == "") == (rank == 1)
    assert len(groups) == 1 and groups[0]["timeout"] >= timedelta(days=1)


@pytest.mark.parametrize("launcher", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
def test_variables_of_other_launchers_change_nothing(launcher, monkeypatch):
    """RANK and WORLD_SIZE without torchrun (a Slurm or MPI shell): one process, number 0."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", launcher: "1"}.items():
        monkeypatch.setenv(name, value)
    spec = importlib.util.spec_from_file_location("fresh", common.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert (copy.RANK, copy.WORLD) == ((1, 2) if "ELASTIC" in launcher else (0, 1))


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_file_before_and_no_half_one(error, tmp_path):
    """save() writes aside, to a name that no other process takes, and renames what is whole."""

    def full(part):
        assert str(os.getpid()) in part.name and part.parent == tmp_path
        part.write_text("half")
        raise error

    path = tmp_path / "last.pt"
    path.write_text("before")
    with pytest.raises(type(error)):
        common.save(full, path)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "before"
    inode = []  # the file itself is renamed: a copy could be half a file for a while
    common.save(lambda part: inode.append(part.write_text("after") and part.stat().st_ino), path)
    assert [path.stat().st_ino] == inode
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == "after"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["block2.layer.0.conv1.weight", "bn1.running_var", "mHuber"])
def test_one_value_that_is_not_finite_stops_the_run(name, value, refused):
    """One of a weight, a statistic of batch norm, or a term of the loss; it is named."""
    model = common.make_model("wrn-10-1", 3)
    terms = {name: torch.ones(()) for name in ("BCE", "mHuber")}
    common.check_finite(model, terms, 1)
    (terms | model.state_dict())[name].view(-1)[-1] = value
    assert name in refused(common.check_finite, model, terms, 7)
