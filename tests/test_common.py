"""common.py: networks, PGD, batches, every data set from small files in its real layout, one-line
errors."""

import hashlib
import importlib.util
import itertools
import os
import pickle
import shutil
import sys
import tarfile
import time
import zipfile
import zlib
from argparse import ArgumentTypeError, Namespace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision import datasets

import common
import evaluate

CE = F.cross_entropy


# ------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(
    "arch, size, stages",
    [
        ("resnet18", 11_173_962, {"layer1": 32, "layer2": 16, "layer3": 8, "layer4": 4}),
        (
            "wrn-34-10",
            46_160_474,
            {"conv1": 32, "block1.layer.4": 32, "block2.layer.4": 16, "block3.layer.4": 8},
        ),
    ],
)
def test_networks_have_the_published_sizes(arch, size, stages):
    """ResNet-18 has 11,173,962 and WRN-34-10 46,160,474 parameters for 10 classes; of 32 x 32
    pixels each stage sees as many as published: the stem keeps them all."""
    with torch.device("meta"):
        model, seen = common.make_model(arch, 10), {}
        for name, module in model.named_modules():
            module.register_forward_hook(lambda _, x, z, name=name: seen.update({name: z.shape}))
        model(torch.zeros(1, 3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == size
    assert {name: seen[name][2] for name in stages} == stages


def batch_norm(prefix):
    return [
        prefix + name
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]


def wide_resnet_names(depth):
    """The names of the field's WideResNet files (TRADES)."""
    names = ["conv1.weight", *batch_norm("bn1."), "fc.weight", "fc.bias"]
    for i in (1, 2, 3):
        for j in range((depth - 4) // 6):
            block = f"block{i}.layer.{j}."
            names += batch_norm(f"{block}bn1.") + batch_norm(f"{block}bn2.")
            names += [f"{block}conv1.weight", f"{block}conv2.weight"]
        names.append(f"block{i}.layer.0.convShortcut.weight")
    return names


def resnet18_names():
    """torchvision's names."""
    names = ["conv1.weight", *batch_norm("bn1."), "fc.weight", "fc.bias"]
    for i in (1, 2, 3, 4):
        for j in (0, 1):
            for k in (1, 2):
                names += [f"layer{i}.{j}.conv{k}.weight", *batch_norm(f"layer{i}.{j}.bn{k}.")]
        if i > 1:
            names += [f"layer{i}.0.downsample.0.weight", *batch_norm(f"layer{i}.0.downsample.1.")]
    return names


@pytest.mark.parametrize(
    "arch, names", [("resnet18", resnet18_names()), ("wrn-16-2", wide_resnet_names(16))]
)
def test_checkpoints_keep_the_fields_names(arch, names):
    """Weights named as torchvision and TRADES name them load; there is no name besides."""
    with torch.device("meta"):
        model = common.make_model(arch, 10)
    assert sorted(model.state_dict()) == sorted(names)


@pytest.mark.parametrize("size, classes", [((32, 32), 10), ((64, 64), 200), ((24, 16), 3)])
@pytest.mark.parametrize("arch", ["resnet18", "wrn-10-1"])
def test_networks_take_any_size_and_number_of_classes(arch, size, classes):
    with torch.no_grad():
        model = common.make_model(arch, classes)
        assert model(torch.rand(2, 3, *size)).shape == (2, classes)


@pytest.mark.parametrize(
    "arch", ["wrn-12-1", "wrn-4-1", "wrn-10-0", "resnet50", "wrn-10", "wrn-100000-1000"]
)
def test_an_impossible_network_is_refused_in_one_line(arch, refused):
    assert arch in refused(common.make_model, arch, 10)


def reference_resnet18():
    """torchvision's ResNet-18 with a stem for small images, put together from its parts here."""
    model = torchvision.models.resnet18(num_classes=10)
    stem = torch.nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    return torch.nn.Sequential(
        *(stem, model.bn1, model.relu, model.layer1, model.layer2, model.layer3, model.layer4),
        *(model.avgpool, torch.nn.Flatten(), model.fc),
    )


def reference_wide_resnet(weights, x, depth, train):
    """WideResNet as Zagoruyko & Komodakis 2016 describe it, as a function of its weights.

    Three groups of pre-activation blocks B(3, 3), of which the second and the third halve the
    image in their first block. Where the width changes, the shortcut is a 1 x 1 convolution of
    the activated input (He et al. 2016b, full pre-activation).
    """

    def bn_relu(x, name):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        if train:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        mean, var = mean.view(-1, 1, 1), var.view(-1, 1, 1)
        gamma = weights[f"{name}.weight"].view(-1, 1, 1)
        beta = weights[f"{name}.bias"].view(-1, 1, 1)
        return ((x - mean) / (var + 1e-5).sqrt() * gamma + beta).clamp(min=0)

    x = F.conv2d(x, weights["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        for i in range((depth - 4) // 6):
            name = f"block{group}.layer.{i}"
            stride = 2 if group > 1 and i == 0 else 1
            out = bn_relu(x, f"{name}.bn1")
            shortcut = x
            if f"{name}.convShortcut.weight" in weights:
                shortcut = F.conv2d(out, weights[f"{name}.convShortcut.weight"], stride=stride)
            out = F.conv2d(out, weights[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = bn_relu(out, f"{name}.bn2")
            x = shortcut + F.conv2d(out, weights[f"{name}.conv2.weight"], padding=1)
    x = bn_relu(x, "bn1").mean((2, 3))
    return x @ weights["fc.weight"].T + weights["fc.bias"]


def with_statistics(model):
    """Give batch norms weights, biases and statistics that are not those of a fresh network."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)
            torch.nn.init.uniform_(module.running_var, 0.05, 1.5)
    return model.double()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("arch", ["resnet18", "wrn-16-2", "wrn-10-1"])
def test_networks_compute_what_independent_ones_compute(arch, train):
    """In float64 the logits and the input gradient equal the reference's to 1e-9, in both modes."""
    model = with_statistics(common.make_model(arch, 10)).train(train)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.rand(4, 3, 16, 20).double().requires_grad_()
    logits = model(x)
    if arch == "resnet18":
        reference = reference_resnet18().double().train(train)
        reference.load_state_dict(dict(zip(reference.state_dict(), state.values())))  # same order
        expected = reference(x)
    else:
        expected = reference_wide_resnet(state, x, int(arch.split("-")[1]), train)
    assert torch.allclose(logits, expected, rtol=0, atol=1e-9)
    gradients = [torch.autograd.grad(z.square().sum(), x)[0] for z in (logits, expected)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-9)


@pytest.mark.parametrize("arch", ["resnet18", "wrn-16-4"])
def test_initial_weights_are_he_normal_fan_out(arch):
    """Every convolution has zero mean and variance 2 / fan-out; batch norms are the identity.

    The bias of a WideResNet's last layer is 0; ResNet-18 has torchvision's.
    """
    torch.manual_seed(0)
    model = common.make_model(arch, 10)
    assert (model.fc.bias == 0).all() == arch.startswith("wrn")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            weight, n = module.weight.detach(), module.weight.numel()
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert abs(weight.mean()) < 5 * (2 / fan_out / n) ** 0.5, name
            assert weight.var().item() == pytest.approx(2 / fan_out, rel=5 * (2 / n) ** 0.5), name
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
            assert (module.momentum, module.eps) == (0.1, 1e-5)


# ----------------------------------------------------------------------------------------- PGD


def test_pgd_stays_in_the_box_raises_the_loss_and_leaves_the_network_alone():
    torch.manual_seed(0)
    model, x, y = common.make_model("wrn-10-1", 10), torch.rand(8, 3, 32, 32), torch.arange(8)
    x[0] = 0
    x[1] = 1
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x_adv = common.pgd(model, x, lambda z: CE(z, y), epsilon=8 / 255, step_size=2 / 255, steps=10)
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-7 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert not x_adv.requires_grad and model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        assert CE(model(x_adv), y) > CE(model(x), y) + 0.03
    common.pgd(model, x, lambda z: CE(z, y), steps=1)
    assert not model.training


def test_frozen_gives_everything_back(monkeypatch):
    """Inside eval mode and no gradients for weights; afterwards each module's and weight's own.

    A batch norm that the caller keeps in eval mode stays there and its statistics do not move; a
    weight that the caller has frozen stays frozen; an exception inside changes nothing of this.
    """
    model = common.make_model("wrn-10-1", 3).train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    needs = {name: weight.requires_grad for name, weight in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])

    def look(logits):
        assert not any(module.training for module in model.modules())
        assert not any(weight.requires_grad for weight in model.parameters())
        return CE(logits, y)

    def unable(logits):
        raise RuntimeError("out of memory, say")

    common.pgd(model, x, look, steps=2)
    common.accuracy(model, (255 * x).byte(), y, 0.1, 0.1, 1, batch_size=4)
    with pytest.raises(RuntimeError, match="say"):
        common.pgd(model, x, unable)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert needs == {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Linear(torch.nn.Module):
    """Two logits, 0 and w x; keeps what it was given, and is attacked and scored in eval mode."""

    def __init__(self, w):
        super().__init__()
        self.w, self.seen = w, []

    def forward(self, x):
        assert not self.training
        self.seen.append(x.detach())
        return torch.stack([0 * x.flatten(1) @ self.w, x.flatten(1) @ self.w], 1)


def test_pgd_on_a_linear_model_walks_to_the_corner_of_the_box():
    """CE of class 0 is highest at x + epsilon sign(w), reached in epsilon / step size steps."""
    w = torch.randn(3 * 4 * 4, generator=torch.Generator().manual_seed(0))
    x, sign = torch.full((1, 3, 4, 4), 0.5), w.view(1, 3, 4, 4).sign()
    for steps, distance in ((1, 0.02), (3, 0.06), (10, 0.1)):
        x_adv = common.pgd(Linear(w), x, lambda z: CE(z, torch.tensor([0])), 0.1, 0.02, steps, x)
        assert torch.allclose(x_adv, x + distance * sign)


def test_pgd_starts_as_algorithm_1():
    """The first iterate is x + 0.001 N(0, I), not projected; a start that is given is taken."""
    model, x = Linear(torch.ones(3 * 32 * 32)), torch.rand(4, 3, 32, 32)
    torch.manual_seed(0)
    common.pgd(model, x, lambda z: z.sum(), steps=1)
    noise = (model.seen[0] - x) / 0.001
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05 and noise.abs().max() > 3
    common.pgd(model, x, lambda z: z.sum(), steps=1, start=x + 0.01)
    assert torch.equal(model.seen[1], x + 0.01)


def test_pgd_inside_no_grad_is_pgd():
    """Validation functions call it there: it switches gradients on itself, and off again."""
    torch.manual_seed(0)
    model, x, y = common.make_model("wrn-10-1", 3), torch.rand(4, 3, 8, 8), torch.arange(4) % 3
    outside = common.pgd(model, x, lambda z: CE(z, y), start=x)
    with torch.no_grad():
        inside = common.pgd(model, x, lambda z: CE(z, y), start=x)
        assert not torch.is_grad_enabled()
    assert torch.equal(inside, outside) and not torch.equal(inside, x)
    assert not x.requires_grad  # the caller's own start is left as it was


def test_pgd_returns_a_constant():
    """Also where x, and a start made of x, need a gradient: none flows through x_adv to x."""
    model, x = Linear(torch.ones(48)), torch.rand(2, 3, 4, 4).requires_grad_()
    for start in (None, 0.9 * x):
        x_adv = common.pgd(model, x, lambda z: z[:, 1].sum(), start=start)
        assert not x_adv.requires_grad and x.requires_grad and x.grad is None


def test_pgd_of_no_images_returns_none():
    """As where a batch is filtered and nothing is left."""
    model, x, y = common.make_model("wrn-10-1", 3), torch.rand(4, 3, 8, 8), torch.arange(4) % 3
    found = common.pgd(model, x[:0], lambda z: CE(z, y[:0]))
    assert found.shape == (0, 3, 8, 8) and found.dtype == torch.float32


class Precise(torch.nn.Module):
    """Two logits of a linear layer; keeps in which precision autocast computes them."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(48, 2), []

    def forward(self, x):
        logits = self.layer(x.flatten(1))
        self.seen.append(logits.dtype)
        return logits


def test_pgd_gives_the_loss_float32():
    """Under autocast the network computes in bfloat16, the loss of its logits does not."""
    model, given = Precise(), []

    def loss(logits):
        given.append(logits.dtype)
        return logits.sum()

    with torch.autocast("cpu", torch.bfloat16):
        x_adv = common.pgd(model, torch.rand(2, 3, 4, 4), loss, steps=2)
    assert model.seen == 2 * [torch.bfloat16] and given == 2 * [torch.float32]
    assert x_adv.dtype == torch.float32


@pytest.mark.parametrize("amp", [False, True])
def test_accuracy_decides_in_float32(amp):
    """With amp the three steps of the search are in bfloat16; what decides, clean and attacked,
    never is."""
    model, x = Precise(), torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    common.accuracy(model, x, torch.zeros(5).long(), 0.1, 0.1, 3, batch_size=5, amp=amp)
    search = 3 * [torch.bfloat16 if amp else torch.float32]
    assert model.seen == search + 2 * [torch.float32]


def test_accuracy_attacks_with_what_it_is_told():
    """Clean and PGD accuracy of a linear model whose images stand 6/255 from the boundary: 8/255
    breaks all of them in 16 steps of 1/255, and none in 2; 4/255 none. The start is uniform."""
    w = torch.cat([torch.ones(24), -torch.ones(24)])
    x = 128 + torch.tensor([12, 12, 12, 0, 0, 0]).view(-1, 1) * (w > 0)
    x = x + torch.tensor([0, 0, 0, 12, 12, 12]).view(-1, 1) * (w < 0)
    x, y = x.byte().view(6, 3, 4, 4), torch.tensor([1, 1, 1, 0, 0, 1])  # the last is wrong
    clean = 100 * 5 / 6
    for epsilon, steps, robust in (
        (8 / 255, 16, 0),
        (8 / 255, 2, clean),
        (4 / 255, 16, clean),
        (0, 16, clean),
    ):
        model = Linear(w)
        found = common.accuracy(model, x, y, epsilon, 1 / 255, steps, batch_size=4)
        assert found == pytest.approx([clean, robust])
        start = 255 * model.seen[0] - x[:4]
        assert start.abs().max() <= 255 * epsilon + 1e-3
        assert start.std() == pytest.approx(255 * epsilon / 3**0.5, rel=0.2)


class WrongUnlessNoisy(torch.nn.Module):
    """Takes images of whole 255ths for class 0, all others for class 1."""

    def forward(self, x):
        noise = (255 * x - (255 * x).round()).abs().flatten(1).amax(1)
        return torch.stack([0.1 - noise, 0 * noise], 1)


def test_an_image_that_is_wrong_before_the_attack_is_not_robust():
    x, y = torch.full((4, 3, 4, 4), 99, dtype=torch.uint8), torch.ones(4, dtype=torch.int64)
    assert common.accuracy(WrongUnlessNoisy(), x, y, 0.1, 1e-4, 2, batch_size=4) == [0, 0]


def test_accuracy_is_an_exact_percentage():
    """65 of 100 images are 65 percent, not 64.99999761581421."""
    x, y = torch.full((100, 3, 4, 4), 99, dtype=torch.uint8), (torch.arange(100) >= 65).long()
    found = common.accuracy(WrongUnlessNoisy(), x, y, 0, 0, 1, batch_size=33)
    assert found == [65, 65]


# ------------------------------------------------------------------------------------- batches


def test_augment_draws_each_crop_and_flip_equally_often():
    """One image, 16,200 times: its 81 x 2 possible results and no others, each about 100 times.

    The images have values above 0, so that padding with zeros can be told from the image.
    """
    torch.manual_seed(0)
    image = torch.randint(1, 256, (3, 8, 12), dtype=torch.uint8)
    padded = F.pad(image, (4, 4, 4, 4))
    possible = {}
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + 8, left : left + 12]
            possible[crop.numpy().tobytes()] = 0
            possible[crop.flip(2).numpy().tobytes()] = 0
    assert len(possible) == 162
    for _ in range(10):
        out = common.augment(image.expand(1620, 3, 8, 12))
        assert out.dtype == torch.float32 and 0 <= out.min() and out.max() <= 1
        for result in (out * 255).round().byte().numpy():
            possible[result.tobytes()] += 1  # a KeyError is a result that must not be
    counts = np.array(list(possible.values()))
    assert counts.sum() == 16_200
    assert counts.min() > 50 and counts.max() < 160  # 5 and 6 standard deviations
    chi_square = ((counts - 100) ** 2 / 100).sum()
    assert chi_square < 161 + 6 * (2 * 161) ** 0.5


def test_augment_treats_the_images_of_a_batch_independently():
    """Crops and flips of neighbours are not the same ones: equal images give many results."""
    torch.manual_seed(0)
    image = torch.randint(1, 256, (1, 3, 8, 12), dtype=torch.uint8)
    results = {result.numpy().tobytes() for result in common.augment(image.expand(64, 3, 8, 12))}
    assert len(results) > 40


def test_an_epoch_is_a_new_order_of_all_images_with_their_labels_and_rows():
    """Whole batches, no image twice, augmented; (seed, epoch) alone decides, whatever was drawn
    before; another epoch or seed is another order and other crops."""
    y = torch.arange(23)
    x = y.byte().view(-1, 1, 1, 1).repeat(1, 3, 8, 8) + 1

    def epoch(seed, number):
        torch.rand(1)
        return list(common.shuffled_batches(x, y, 5, seed, number))

    batches = epoch(0, 1)
    rows = torch.cat([rows for _, _, rows in batches])
    assert len(batches) == 4 and len(rows) == 20 and len(set(rows.tolist())) == 20
    assert not torch.equal(rows, rows.sort()[0])
    for images, labels, rows in batches:
        assert torch.equal(labels, y[rows]) and images.dtype == torch.float32
        assert torch.equal((images * 255).round().amax((1, 2, 3)), labels + 1.0)
    assert any((images == 0).any() for images, _, _ in batches)  # the padding
    for a, b in zip(batches, epoch(0, 1)):
        assert all(torch.equal(s, t) for s, t in zip(a, b))
    for other in (epoch(0, 2), epoch(1, 1)):
        assert not torch.equal(batches[0][2], other[0][2])
        assert not torch.equal(batches[0][0] > 0, other[0][0] > 0)


def test_held_out_images_are_no_training_images_and_the_same_for_every_seed():
    x = torch.arange(40).byte().view(-1, 1, 1, 1).repeat(1, 3, 4, 4)
    data = common.Data(x, torch.arange(40), ["a", "b"])
    torch.manual_seed(1)
    x_train, y_train, x_val, y_val = common.hold_out(data, 10, "cpu")
    torch.manual_seed(2)
    assert torch.equal(common.hold_out(data, 10, "cpu")[3], y_val)
    assert len(x_train) == 30 and sorted(torch.cat([y_train, y_val]).tolist()) == list(range(40))
    assert torch.equal(x_val[:, 0, 0, 0], y_val) and torch.equal(x_train[:, 0, 0, 0], y_train)
    assert [len(part) for part in common.hold_out(data, 0, "cpu")] == [40, 40, 0, 0]
    assert len(common.hold_out(data, 41, "cpu")[0]) == 0  # check_batch says so


@pytest.mark.parametrize(
    "world, batch_size, ema, fits",
    [
        (1, 40, "slot", True),
        (1, 41, "slot", False),
        (1, 8, "image", True),
        (2, 8, "slot", True),
        (2, 7, "slot", False),
        (2, 8, "image", False),
    ],
)
def test_a_batch_must_fit_images_and_processes(world, batch_size, ema, fits, monkeypatch):
    """40 images: one whole batch, equal parts of it; averages per image in one process."""
    refusals = []
    monkeypatch.setattr(common, "WORLD", world)
    monkeypatch.setattr(common, "fail", refusals.append)
    args = Namespace(batch_size=batch_size, ema=ema, val_size=0)
    common.check_batch(args, 40)
    assert (not refusals) == fits


# ---------------------------------------------------------------------------------------- data


def load(name, root):
    """Both splits, in the order train, test."""
    return [common.load_data(name, root, split) for split in ("train", "test")]


def check(data, n, size, classes):
    assert data.x.shape == (n, 3, size, size) and data.x.dtype == torch.uint8
    assert data.y.shape == (n,) and data.y.dtype == torch.int64
    assert list(data.classes) == classes


@pytest.fixture
def no_network(monkeypatch):
    """Downloads fail, and are counted."""
    tried = []

    def urlopen(*args, **kwargs):
        tried.append(args)
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    return tried


PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)


def cifar(name, path, monkeypatch):
    """The pickled batches in the folder as published (channel, row, column); their checksums.

    Batch i, of which the last is the test set, has the labels 3 1 0 2, turned by i.
    """
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    base, turn = path / kind.base_folder, itertools.count()
    base.mkdir()

    def write(file, content):
        (base / file).write_bytes(pickle.dumps(content))
        return [file, hashlib.md5((base / file).read_bytes()).hexdigest()]

    def batch():
        i = next(turn)
        labels = np.roll([3, 1, 0, 2], i).tolist()
        return {"data": PIXELS + np.uint8(i), kind_of_labels: labels}

    kind_of_labels = "labels" if name == "cifar10" else "fine_labels"
    for split in ("train_list", "test_list"):
        files = [write(file, batch()) for file, _ in getattr(kind, split)]
        monkeypatch.setattr(kind, split, files)
    meta = write(kind.meta["filename"], {kind.meta["key"]: ["cat", "dog", "elk", "fox"]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": meta[1]})
    return kind, base


def packed(kind, base, monkeypatch):
    """The archive beside the folder of batches, which torchvision unpacks."""
    archive = base.parent / kind.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(base, kind.base_folder)
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(kind, "tgz_md5", md5)


@pytest.mark.parametrize("name, batches", [("cifar10", 5), ("cifar100", 1)])
@pytest.mark.parametrize("place", ["archive", "folder"])
def test_cifar_from_its_archive_and_its_folder(
    name, batches, place, tmp_path, monkeypatch, no_network
):
    """All training batches in turn are the train split, the test batch is the test split."""
    kind, base = cifar(name, tmp_path, monkeypatch)
    if place == "archive":
        packed(kind, base, monkeypatch)
        shutil.rmtree(base)
    train, test = load(name, tmp_path)
    check(train, 4 * batches, 32, ["cat", "dog", "elk", "fox"])
    check(test, 4, 32, ["cat", "dog", "elk", "fox"])
    x = np.concatenate([PIXELS + np.uint8(i) for i in range(batches + 1)]).reshape(-1, 3, 32, 32)
    y = [np.roll([3, 1, 0, 2], i) for i in range(batches + 1)]
    assert torch.equal(torch.cat([train.x, test.x]), torch.from_numpy(x))
    assert torch.cat([train.y, test.y]).tolist() == np.concatenate(y).tolist() and not no_network


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files_that_were_changed_are_not_overwritten(
    name, tmp_path, monkeypatch, no_network, refused
):
    """Noisy labels, say: refused, with the reason, though the archive lies beside them."""
    kind, base = cifar(name, tmp_path, monkeypatch)
    packed(kind, base, monkeypatch)
    changed = base / kind.train_list[0][0]
    changed.write_bytes(b"mine")
    for split in ("train", "test"):
        error = refused(common.load_data, name, tmp_path, split)
        assert "corrupted" in error and str(tmp_path) in error
    assert changed.read_bytes() == b"mine" and not no_network


def picture(path, colour=(9, 9, 9), size=(32, 32), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


WNIDS = ["n01443537", "n01629819"]


def tiny_imagenet(root):
    """Two classes, 6 + 2 images, a grey one among them, in the published layout."""
    for c, wnid in enumerate(WNIDS):
        folder = root / "train" / wnid
        picture(folder / "images" / f"{wnid}_0.JPEG", 100, (64, 64), "L")
        for i in (1, 2):
            picture(folder / "images" / f"{wnid}_{i}.JPEG", (40 * c, 50, 60), (64, 64))
        (folder / f"{wnid}_boxes.txt").write_text("")
    for i in (0, 1):
        picture(root / "val" / "images" / f"val_{i}.JPEG", (200 * i, 0, 0), (64, 64))
        picture(root / "test" / "images" / f"test_{i}.JPEG", (0, 0, 0), (64, 64))
    rows = [f"val_{i}.JPEG\t{WNIDS[1 - i]}\t0\t0\t62\t62\n" for i in (0, 1)]
    (root / "val" / "val_annotations.txt").write_text("".join(rows))


def zipped(root, monkeypatch):
    tiny_imagenet(root / "build" / "tiny-imagenet-200")
    archive = root / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((root / "build").rglob("*")):
            file.write(path, path.relative_to(root / "build"))
    monkeypatch.setattr(common, "TINY_MD5", hashlib.md5(archive.read_bytes()).hexdigest())


def published(root, monkeypatch):
    tiny_imagenet(root / "tiny-imagenet-200")


@pytest.mark.parametrize("layout", [published, zipped])
def test_tiny_imagenet_as_it_lies_on_disk(layout, tmp_path, monkeypatch, no_network):
    """Its val split is the test set, beside a test/ without labels; grey images are RGB."""
    layout(tmp_path, monkeypatch)
    monkeypatch.setattr(common, "TINY_SIZE", {"train": (2, 6), "test": (2, 2)})
    train, test = load("tinyimagenet", tmp_path)
    check(train, 6, 64, WNIDS)
    check(test, 2, 64, WNIDS)
    assert train.y.tolist() == [0, 0, 0, 1, 1, 1] and not no_network
    assert train.x[0, :, 0, 0].tolist() == [100, 100, 100]
    blue = train.x[:, 2].float().mean((1, 2)) < 80
    assert blue.tolist() == 2 * [False, True, True]
    red = test.x[:, 0].float().mean((1, 2)) > 100
    assert test.y[red].tolist() == [0] and test.y[~red].tolist() == [1]


@pytest.mark.parametrize(
    "split, size",
    [("train", (3, 6)), ("train", (2, 5)), ("test", (3, 2)), ("test", (2, 3))],
)
def test_other_images_are_not_taken_for_tiny_imagenet(
    split, size, tmp_path, monkeypatch, refused, no_network
):
    """Either count of either split, if it is not that of Tiny ImageNet, refuses it."""
    assert common.TINY_SIZE == {"train": (200, 100_000), "test": (200, 10_000)}
    published(tmp_path, monkeypatch)
    sizes = {"train": (2, 6), "test": (2, 2)}
    monkeypatch.setattr(common, "TINY_SIZE", sizes | {split: size})
    assert str(size) in refused(common.load_data, "tinyimagenet", tmp_path, split)
    assert not no_network


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "tinyimagenet"])
def test_nothing_is_downloaded_unless_it_may_be(name, tmp_path, refused, no_network):
    """A place that another machine's checkpoint names: nothing is fetched or made there."""
    place = tmp_path / "theirs"
    error = refused(common.load_data, name, place, "test", False)
    assert str(place) in error and "--data-dir" in error
    assert not no_network and not place.exists()


def image_folder(root, test="test", classes=3):
    """3 training and 2 test images of each class, 32 x 32, class i of colour i."""
    for split, n in (("train", 3), (test, 2)):
        for c in range(classes):
            for i in range(n):
                picture(root / split / f"class{c}" / f"{i}.png", (c, i, 7))


def plain(root):
    image_folder(root)


def val_alone(root):
    image_folder(root, "val")


@pytest.mark.parametrize("layout", [plain, val_alone])
def test_an_image_folder_as_it_lies_on_disk(layout, tmp_path):
    """test/ is the test set, or val/ where there is no test/; images keep their labels."""
    layout(tmp_path)
    for data, n in zip(load("folder", tmp_path), (3, 2)):
        check(data, 3 * n, 32, ["class0", "class1", "class2"])
        expected = [[c, i, 7] for c in range(3) for i in range(n)]
        assert data.x[:, :, 5, 9].tolist() == expected
        assert data.y.tolist() == [c for c, _, _ in expected]


def test_one_split_is_read_alone(tmp_path, monkeypatch, no_network):
    """Who evaluates needs no training images, who has no test set yet can look at the others."""
    image_folder(tmp_path)
    published(tmp_path, monkeypatch)
    monkeypatch.setattr(common, "TINY_SIZE", {"train": (2, 6), "test": (2, 2)})
    for name, root in (("folder", tmp_path), ("tinyimagenet", tmp_path / "tiny-imagenet-200")):
        train, test = load(name, tmp_path)
        (root / "train").rename(root / "elsewhere")
        assert torch.equal(common.load_data(name, tmp_path, "test").x, test.x)
        (root / "elsewhere").rename(root / "train")
        shutil.rmtree(root / ("test" if name == "folder" else "val"))
        assert torch.equal(common.load_data(name, tmp_path, "train").x, train.x)


@pytest.mark.parametrize(
    "files",
    [
        ["a.jfif", "b.gif"],  # torchvision's ImageFolder reads neither
        [".ipynb_checkpoints/0-checkpoint.png", "@eaDir/0.png", "@eaDir/1.png"],
        ["._0.png"],
    ],
)
def test_files_that_are_left_out_are_counted(files, tmp_path, capsys):
    """What is no image, and what a notebook or a network drive hides in the folder of a class; not
    what lies in a hidden folder as a whole."""
    root = tmp_path / ".data"
    image_folder(root)
    expected = common.load_data("folder", root, "train")
    assert "note" not in capsys.readouterr().out
    for name in files:
        path = root / "train" / "class1" / name
        picture(path.with_suffix(".png"))
        path.with_suffix(".png").rename(path)
    data = common.load_data("folder", root, "train")
    assert f"note: {len(files)} files in {root / 'train'}" in capsys.readouterr().out
    assert torch.equal(data.x, expected.x) and torch.equal(data.y, expected.y)


def test_data_is_read_without_a_terminal(tmp_path, monkeypatch):
    """No stderr (pythonw, 2>&-) costs the progress line, not the data."""
    image_folder(tmp_path)
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(time, "time", itertools.count().__next__)  # every image takes a second
    assert len(common.load_data("folder", tmp_path, "train").x) == 9


@pytest.mark.parametrize(
    "split, n, labels, images",
    [("train", 5000, 562_693_931, 245_559_108_190), ("test", 1000, 3_788_443_699, 49_039_323_298)],
)
def test_shapes_are_always_the_same_and_balanced(split, n, labels, images):
    """Labels and images by a checksum, other ones for train and test.

    That of the images is a weighted sum: randn rounds by the processor's instructions, which
    changes a few pixels by 1; any other images change it by far more than is allowed here.
    """
    data = common.load_data("shapes", "nowhere", split)
    check(data, n, 32, list("ABCDEFGHIJ"))
    assert data.y.bincount().tolist() == 10 * [n // 10] and zlib.crc32(data.y.numpy()) == labels
    weights = torch.arange(data.x.numel()) % 251
    assert int((data.x.flatten() * weights).sum()) == pytest.approx(images, abs=10_000)


def test_shapes_hold_what_their_docstring_says():
    """Found in the images of each class: a shape of 6 x 6 squares, symmetric, that stands out by
    0.2 to 0.4 with one sign in all channels; a tile of +-2/255; noise of 0.02. No two classes
    share shape or tile."""
    images, labels, _ = common.load_data("shapes", "nowhere", "train")
    images, frame = images.double() / 255, torch.ones(32, 32, dtype=torch.bool)
    frame[4:-4, 4:-4] = False  # nothing of the shape is there
    ground = images[:, :, frame].mean(2)[:, :, None, None]
    assert 0.28 < ground.min() < 0.32 and 0.68 < ground.max() < 0.72
    assert ground.mean() == pytest.approx(0.5, abs=0.01)
    shapes, tiles = set(), set()
    for c in range(10):
        x, level = images[labels == c], ground[labels == c]
        inside = (x - level).abs().mean((0, 1)) > 0.1
        squares = inside[4:-4, 4:-4].view(6, 4, 6, 4).transpose(1, 2).flatten(2)
        assert (squares.all(2) == squares.any(2)).all() and not inside[frame].any()
        assert torch.equal(inside, inside.flip(1))
        shapes.add(tuple(inside.flatten().tolist()))

        contrast = x[:, :, inside].mean(2) - level[:, :, 0, 0]
        assert 0.18 < contrast.abs().min() < 0.22 and 0.37 < contrast.abs().max() < 0.41
        assert contrast.abs().mean() == pytest.approx(0.3, abs=0.01)
        assert (contrast.sign() == contrast.sign()[:, :1]).all()
        assert 0.4 < (contrast[:, 0] > 0).double().mean() < 0.6

        above = 255 * (x - level).mean(0)  # [3, 32, 32]
        tile = torch.stack(
            [
                above[:, i::4, j::4][:, frame[i::4, j::4]].mean(1)  # one place of the tile
                for i in range(4)
                for j in range(4)
            ],
            1,
        )
        high = tile > tile.mean(1, keepdim=True)
        for channel, where in zip(tile, high, strict=True):
            step = channel[where].mean() - channel[~where].mean()
            assert step == pytest.approx(4, abs=0.2)
            assert channel[where].std() < 0.2 and channel[~where].std() < 0.2
        tiles.add(tuple(high.flatten().tolist()))

        noise = (255 * (x - level) - above)[:, :, frame].std() / 255
        assert noise == pytest.approx(0.02, rel=0.02)
    assert len(shapes) == len(tiles) == 10


def broken_archive(path):
    (path / "cifar-10-python.tar.gz").write_bytes(b"not an archive")


def nothing(path):
    pass


def broken_image(path):
    image_folder(path)
    (path / "train" / "class1" / "0.png").write_bytes(b"not an image")


def broken_first_image(path):
    image_folder(path)
    (path / "train" / "class0" / "0.png").write_bytes(b"not an image")


def half_an_image(path):
    image_folder(path)
    file = path / "train" / "class2" / "1.png"
    file.write_bytes(file.read_bytes()[:60])


def two_sizes(path):
    image_folder(path)
    picture(path / "train" / "class2" / "9.png", size=(40, 32))


def sixteen_bits(path):
    image_folder(path)
    deep = Image.fromarray(np.full((32, 32), 40_000, np.uint16))
    deep.save(path / "train" / "class0" / "0.png")


def one_class(path):
    image_folder(path, classes=1)


def hidden_folder(path):
    image_folder(path)
    picture(path / "train" / ".ipynb_checkpoints" / "0.png")


def empty_class(path):
    image_folder(path)
    (path / "train" / "class9").mkdir()


@pytest.mark.parametrize(
    "name, spoil, words, network",
    [
        ("cifar10", nothing, "no route to host", True),
        ("cifar10", broken_archive, "no route to host", True),
        ("tinyimagenet", nothing, "no route to host", True),
        ("folder", nothing, "train'", False),
        ("folder", broken_image, "class1/0.png: cannot identify image file", False),
        ("folder", broken_first_image, "class0/0.png", False),
        ("folder", half_an_image, "class2/1.png: ", False),
        ("folder", sixteen_bits, "class0/0.png: I;16 of (32, 32), needed are 8 bits", False),
        ("folder", two_sizes, "9.png: RGB of (40, 32), needed are 8 bits, (32, 32)", False),
        ("folder", one_class, "two or more", False),
        ("folder", hidden_folder, "classes .ipynb_checkpoints", False),
        ("folder", empty_class, "classes class9", False),
    ],
)
def test_missing_and_broken_data_end_in_one_line(
    name, spoil, words, network, tmp_path, refused, no_network
):
    """Where it was looked for, the reader's reason, what to do; the network is tried where it
    helps."""
    spoil(tmp_path)
    error = refused(common.load_data, name, tmp_path, "train")
    assert str(tmp_path) in error and words in error and "--data-dir" in error
    assert bool(no_network) == network


@pytest.mark.parametrize("error", [MemoryError("140 GiB"), TypeError("ours"), NameError("ours")])
def test_what_is_no_fault_of_the_files_is_not_blamed_on_them(error, monkeypatch):
    """Too little memory and a bug of the reader pass through load_data as they are."""

    def reader(root, split, download):
        raise error

    monkeypatch.setitem(common.DATASETS, "folder", reader)
    with pytest.raises(type(error)) as raised:
        common.load_data("folder", "nowhere", "train")
    assert raised.value is error


def other_classes(path):
    (path / "test" / "class2").rename(path / "test" / "class9")


def class_missing(path):
    """A val/ that has it is not taken instead."""
    image_folder(path, "val")
    shutil.rmtree(path / "test" / "class2")


def unlabelled_test(path):
    """A val/ beside it is not taken in silence."""
    (path / "test").rename(path / "val")
    picture(path / "test" / "unknown" / "0.png")


def flat_test(path):
    (path / "test").rename(path / "val")
    picture(path / "test" / "0.png")


def other_size(path):
    for file in path.glob("test/*/*.png"):
        picture(file, size=(40, 32))


def turned(path):
    """As many pixels, but 40 x 32 and 32 x 40."""
    for split, size in (("train", (40, 32)), ("test", (32, 40))):
        for file in path.glob(f"{split}/*/*.png"):
            picture(file, size=size)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (other_classes, ["the same classes", "class2", "class9"]),
        (class_missing, ["the same classes", "class2"]),
        (unlabelled_test, ["two or more"]),
        (flat_test, ["any class folder"]),
        (other_size, ["images of one size"]),
        (turned, ["images of one size"]),
    ],
)
def test_train_and_test_must_fit_each_other(spoil, words, tmp_path, refused):
    image_folder(tmp_path)
    args = Namespace(dataset="folder", data_dir=tmp_path)
    common.load_splits(args)
    spoil(tmp_path)
    error = refused(common.load_splits, args)
    assert all(word in error for word in words), error


def test_the_splits_of_a_run(monkeypatch, refused):
    """load_splits returns train and test, keeps the classes and the checksum of train with the
    arguments, and refuses a test split whose classes come in another order."""
    x = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    splits = {
        "train": common.Data(x, torch.arange(6) % 2, ["cat", "dog"]),
        "test": common.Data(255 - x[:4], torch.arange(4) % 2, ["cat", "dog"]),
    }
    monkeypatch.setitem(common.DATASETS, "folder", lambda root, split, download: splits[split])
    args = Namespace(dataset="folder", data_dir="nowhere")
    assert common.load_splits(args) == (splits["train"], splits["test"])
    assert args.classes == ["cat", "dog"] and args.data == common.fingerprint(*splits["train"][:2])
    splits["test"] = splits["test"]._replace(classes=["dog", "cat"])
    assert "the same classes" in refused(common.load_splits, args)


def test_fingerprint_tells_one_changed_pixel_label_and_shape():
    x, y = torch.randint(256, (5, 3, 8, 6), dtype=torch.uint8), torch.arange(5)
    prints = {common.fingerprint(x, y), common.fingerprint(x[:4], y[:4])}
    other = x.clone()
    other[3, 1, 2, 4] ^= 1
    prints |= {common.fingerprint(other, y), common.fingerprint(x, y.flip(0))}
    prints |= {common.fingerprint(x.transpose(2, 3), y)}
    assert len(prints) == 5 and "5 images of 8x6" in common.fingerprint(x, y)
    view = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # as torchvision's lie in memory
    assert common.fingerprint(view, y) == common.fingerprint(x, y)


# ----------------------------------------------------------------------- arguments and files


def test_numbers_are_typed_as_fractions_or_decimals():
    assert common.number(0, 1)("8/255") == 8 / 255 and common.number(0, 1)("0.031") == 0.031
    assert common.number(1, kind=int)("130") == 130
    for text, kind in (
        *((text, float) for text in ("8", "eight", "1/0", "8/2/55", "nan", "inf", "-1/255")),
        *((text, float) for text in ("1e39", "1e999", "")),
        *((text, int) for text in ("0.5", "2", "1/1", "nan")),
    ):
        wanted = "whole number" if kind is int else "number such as 0.1 or 8/255"
        with pytest.raises(ArgumentTypeError, match=f"{text!r} is no {wanted} from 0 to 1"):
            common.number(0, 1, kind)(text)


def test_a_radius_is_less_than_1():
    """Who types --epsilon 1 or 8 means 1/255 or 8/255."""
    assert [common.radius(text) for text in ("0", "8/255", "254/255")] == [0, 8 / 255, 254 / 255]
    for text in ("1", "255/255", "0.999", "8", "-1/255"):
        with pytest.raises(ArgumentTypeError):
            common.radius(text)


def test_a_run_folder_is_made_with_the_folders_above_it(tmp_path):
    """runs/ itself need not be there; a folder that is there, and empty, is taken too."""
    folder = tmp_path / "runs" / "mine"
    for _ in range(2):
        args = Namespace(run_dir=str(folder), resume=False)
        assert common.open_run(args, None, None, None, None) == ([], None)
        assert [path.name for path in folder.iterdir()] == ["args.json"]
        (folder / "args.json").unlink()


def test_a_full_disk_leaves_the_file_before_and_no_half_one(tmp_path):
    """save() writes aside, to a name that no other process takes, and renames what is whole."""

    def full(part):
        assert str(os.getpid()) in part.name and part.parent == tmp_path
        part.write_text("half")
        raise OSError("No space left on device")

    path = tmp_path / "last.pt"
    path.write_text("before")
    with pytest.raises(OSError, match="No space"):
        common.save(full, path)
    assert path.read_text() == "before"
    assert all(p == path or p.suffix == ".tmp" for p in tmp_path.iterdir())
    common.save(lambda part: part.write_text("after"), path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"] and path.read_text() == "after"


# ----------------------------------------------------------------------- devices and processes


class FarEnough(Exception):
    pass


@pytest.mark.parametrize(
    "name, world, expected",
    [
        ("cuda", 1, "cuda:0"),
        ("cuda:3", 1, "cuda:3"),
        ("cuda", 2, "cuda:1"),
        ("cuda:0", 2, "cuda:1"),
    ],
)
def test_the_gpu_of_a_process(name, world, expected, monkeypatch):
    """The first GPU or the one that is named; under torchrun that of LOCAL_RANK, since a GPU by
    number would be the same for all processes."""
    asked = []

    def zeros(*args, device):
        asked.append(str(device))
        raise FarEnough

    monkeypatch.setattr(common, "WORLD", world)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # setup sets it: given back
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(str(device)))
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(FarEnough):
        common.setup(name)
    assert asked == [expected, expected]


def test_processes_wait_for_a_download(monkeypatch):
    """Process 0 may download for an hour and more while the others wait for it."""
    groups = []
    monkeypatch.setattr(common, "WORLD", 2)
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, timeout: groups.append((backend, timeout))
    )
    common.setup("cpu")
    ((backend, timeout),) = groups
    assert backend == "gloo" and timeout >= timedelta(hours=1)


def fresh(module):
    """The module's file, imported once more."""
    spec = importlib.util.spec_from_file_location("fresh", module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"RANK": "1"}, (0, 1)),
        ({"WORLD_SIZE": "2"}, (0, 1)),
        ({"LOCAL_RANK": "3"}, (0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, (1, 2)),
    ],
)
def test_variables_of_other_launchers_change_nothing(variables, expected, monkeypatch):
    """RANK or WORLD_SIZE without torchrun (a Slurm or MPI shell): one process, number 0."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    copy = fresh(common)
    assert (copy.RANK, copy.WORLD) == expected


def test_one_process_needs_no_torch_distributed(monkeypatch):
    """A build of torch without it, which leaves is_available() alone, trains and evaluates."""
    for name in [name for name in vars(dist) if not name.startswith("__")]:
        monkeypatch.delattr(dist, name)
    monkeypatch.setattr(dist, "is_available", lambda: False, raising=False)
    copy = fresh(common)
    assert (copy.RANK, copy.WORLD) == (0, 1) and str(copy.setup("cpu")) == "cpu"
    assert len(copy.load_data("shapes", "nowhere", "test").x) == 1000
    copy.average([torch.ones(1)])
    assert copy.all_rows(torch.ones(2, 3)).shape == (2, 3)
    copy.run(lambda: None, "")
    fresh(evaluate)


def test_average_is_the_mean_over_the_processes_in_one_message(monkeypatch):
    """In place, whatever the tensors' shapes and memory formats; integers (batch norm's counter)
    stay as they are. One process sends nothing."""
    mine = [torch.rand(3), torch.tensor(7), torch.rand(()), torch.rand(2, 3, 4, 5)]
    mine[3] = mine[3].to(memory_format=torch.channels_last)
    theirs, before = [torch.rand(t.shape) for t in mine], [t.clone() for t in mine]
    sent = []

    def all_reduce(tensor):
        sent.append(tensor)
        tensor += torch.cat([theirs[i].flatten() for i in (0, 2, 3)])

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    common.average(mine)
    assert not sent and all(map(torch.equal, mine, before))
    monkeypatch.setattr(common, "WORLD", 2)
    common.average(tensor for tensor in mine)  # a generator, as the scripts give
    assert len(sent) == 1 and mine[1].dtype == torch.int64 and mine[1] == 7
    for i in (0, 2, 3):
        assert torch.allclose(mine[i], (before[i] + theirs[i]) / 2)
