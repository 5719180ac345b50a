"""common.py: networks, PGD, augmentation, every data set from small files in its real format, one-line errors."""
import hashlib
import pickle
import tarfile
import zipfile
from argparse import ArgumentTypeError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets

import common

CE = F.cross_entropy


def trained_looking(arch, classes=10):
    """A network whose batch norms have seen data, so that folding them is not the identity."""
    torch.manual_seed(0)
    model = common.make_model(arch, classes)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            torch.nn.init.normal_(m.bias, std=0.2)
    for _ in range(2):
        model(torch.rand(16, 3, 32, 32))
    return model


# ------------------------------------------------------------------------------------------------------------ networks

@pytest.mark.parametrize("arch, parameters", [("resnet18", 11_173_962), ("wrn-34-10", 46_160_474)])
def test_networks_have_the_published_sizes(arch, parameters):
    """ResNet-18 has 11,173,962 and WRN-34-10 46,160,474 parameters for 10 classes."""
    with torch.device("meta"):
        assert sum(p.numel() for p in common.make_model(arch, 10).parameters()) == parameters


def test_wide_resnet_has_the_fields_parameter_names():
    names = set(common.make_model("wrn-10-2", 10).state_dict())
    assert {"conv1.weight", "block1.layer.0.bn1.weight", "block2.layer.0.convShortcut.weight", "block3.layer.0.conv2.weight",
            "bn1.running_mean", "fc.bias"} <= names and not any("sub_block" in n for n in names)


@pytest.mark.parametrize("size, classes", [(32, 10), (64, 200), (32, 3)])
@pytest.mark.parametrize("arch", ["resnet18", "wrn-10-1"])
def test_networks_take_32_and_64_pixels_and_any_number_of_classes(arch, size, classes):
    with torch.no_grad():
        assert common.make_model(arch, classes)(torch.rand(2, 3, size, size)).shape == (2, classes)


@pytest.mark.parametrize("arch", ["wrn-12-1", "wrn-4-1", "wrn-10-0", "resnet50", "wrn-10"])
def test_an_impossible_network_is_refused_in_one_line(arch, capsys):
    with pytest.raises(SystemExit) as stop:
        common.make_model(arch, 10)
    assert stop.value.code == 2 and arch in (line := capsys.readouterr().err) and line.count("\n") == 1


@pytest.mark.parametrize("arch", ["resnet18", "wrn-16-2"])
def test_folded_twin_is_the_eval_network_and_follows_its_weights(arch):
    """Same logits and input gradients up to rounding, before and after a training step; the network is left untouched."""
    model = trained_looking(arch)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    twin = common.fold_batchnorm(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()) and model.training
    left = sum(isinstance(twin.get_submodule(n.target), torch.nn.BatchNorm2d) for n in twin.graph.nodes if n.op == "call_module")
    assert left == (0 if arch == "resnet18" else 6)  # all but a WRN's bn1 after an addition
    x = torch.rand(4, 3, 32, 32, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.eval()
        a, b = model(x), twin(x)
        ga, gb = (torch.autograd.grad(z.square().sum(), x)[0] for z in (a, b))
        assert torch.allclose(a, b, atol=1e-5 * a.abs().max().item())
        assert (ga - gb).norm() < 1e-2 * ga.norm()  # a ReLU at 0 may fall on either side
        model.train()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        twin.refresh()
    assert not torch.allclose(b, twin(x), atol=1e-3)  # the step did change the logits


# ----------------------------------------------------------------------------------------------------------------- PGD

def test_pgd_stays_in_the_box_raises_the_loss_and_leaves_the_network_alone():
    model, x, y = trained_looking("wrn-10-1"), torch.rand(8, 3, 32, 32), torch.arange(8)
    x[0] = 0
    x[1] = 1
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x_adv = common.pgd(model, x, lambda z: CE(z, y), epsilon=8 / 255, step_size=2 / 255, steps=10)
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-7 and x_adv.min() >= 0 and x_adv.max() <= 1 and not x_adv.requires_grad
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    model.eval()
    with torch.no_grad():
        assert CE(model(x_adv), y) > CE(model(x), y) + 0.03
    common.pgd(model, x, lambda z: CE(z, y), steps=1)
    assert not model.training


def test_pgd_on_a_linear_model_is_the_corner_of_the_box():
    """Linear logits: the maximum of CE for two classes is x + epsilon sign(w), reached when steps x step size > epsilon."""
    w = torch.randn(3 * 4 * 4, generator=torch.Generator().manual_seed(0))
    x = torch.full((1, 3, 4, 4), 0.5)
    x_adv = common.pgd(lambda x: torch.stack([0 * x.flatten(1) @ w, x.flatten(1) @ w], 1), x,
                       lambda z: CE(z, torch.tensor([0])), epsilon=0.1, step_size=0.02, steps=10)
    assert torch.allclose(x_adv, x + 0.1 * w.view(1, 3, 4, 4).sign())


def test_pgd_starts_as_algorithm_1():
    """The first iterate is x + 0.001 N(0, I), not projected; a start that is given is taken."""
    seen = []
    x = torch.rand(4, 3, 32, 32)
    torch.manual_seed(0)
    common.pgd(lambda x: (seen.append(x.detach()), x.flatten(1)[:, :5])[1], x, lambda z: z.sum(), steps=1)
    noise = (seen[0] - x) / 0.001
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05 and noise.abs().max() > 3
    common.pgd(lambda x: (seen.append(x.detach()), x.flatten(1)[:, :5])[1], x, lambda z: z.sum(), steps=1, start=x + 0.01)
    assert torch.equal(seen[1], x + 0.01)


def test_augment_is_a_crop_of_the_padded_image_or_of_its_mirror_image():
    """Each image against all 81 x 2 windows that it may be; offsets and flips are the images' own."""
    x = torch.randint(1, 256, (64, 3, 8, 8), dtype=torch.uint8)
    out, padded, found = (common.augment(x) * 255).round().byte(), F.pad(x, (4, 4, 4, 4)), set()
    for i in range(64):
        match = [(r, c, flip) for r in range(9) for c in range(9) for flip in (False, True)
                 if torch.equal(out[i].flip(2) if flip else out[i], padded[i, :, r:r + 8, c:c + 8])]
        assert len(match) == 1
        found.add(match[0])
    assert len(found) > 40 and 10 < sum(f for *_, f in found) < len(found) - 10


# ---------------------------------------------------------------------------------------------------------------- data

def check(data, train, test, size, classes):
    assert data.x_train.shape == (train, 3, size, size) and data.x_test.shape == (test, 3, size, size)
    assert data.x_train.dtype == data.x_test.dtype == torch.uint8 and data.num_classes == classes
    assert data.y_train.shape == (train,) and data.y_test.shape == (test,) and data.y_train.dtype == torch.int64


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_from_its_archive(name, tmp_path, monkeypatch):
    """The pickled batches inside the tar archive, as published (pixel order: channel, row, column)."""
    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    key, pixels = ("labels", "fine_labels")[name == "cifar100"], np.random.default_rng(0).integers(0, 256, (4, 3072), np.uint8)
    base, source = tmp_path / kind.base_folder, tmp_path / "source"
    source.mkdir()

    def md5(path):
        return hashlib.md5(path.read_bytes()).hexdigest()

    def write(file, content):
        path = source / file
        path.write_bytes(pickle.dumps(content))
        return [file, md5(path)]
    batches = {"train": [f for f, _ in kind.train_list], "test": [f for f, _ in kind.test_list]}
    for split, files in batches.items():
        monkeypatch.setattr(kind, f"{split}_list", [write(f, {"data": pixels, key: [3, 1, 0, 2]}) for f in files])
    file, md5_meta = write(kind.meta["filename"], {kind.meta["key"]: [f"class{i}" for i in range(4)]})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": md5_meta})
    with tarfile.open(tmp_path / kind.filename, "w:gz") as tar:
        tar.add(source, kind.base_folder)
    monkeypatch.setattr(kind, "tgz_md5", md5(tmp_path / kind.filename))

    data = common.load_data(name, tmp_path)
    assert base.is_dir()
    check(data, 4 * len(batches["train"]), 4, 32, 4)
    assert torch.equal(data.x_test[2], torch.from_numpy(pixels[2].reshape(3, 32, 32))) and data.y_test.tolist() == [3, 1, 0, 2]


def tiny_imagenet(root):
    """Two classes, 3 + 2 images, a grey one among them, in the published layout."""
    for c, wnid in enumerate(("n01443537", "n01629819")):
        (root / "train" / wnid / "images").mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("")
        for i in range(3):
            mode, colour = ("L", 100) if i == 0 else ("RGB", (40 * c, 50, 60))
            Image.new(mode, (64, 64), colour).save(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
    (root / "val" / "images").mkdir(parents=True)
    for i in range(2):
        Image.new("RGB", (64, 64), (200, 0, 0)).save(root / "val" / "images" / f"val_{i}.JPEG")
    (root / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01629819\t0\t0\t1\t1\nval_1.JPEG\tn01443537\t0\t0\t1\t1\n")


@pytest.mark.parametrize("zipped", [False, True])
def test_tiny_imagenet_from_folder_and_zip(zipped, tmp_path, monkeypatch):
    """train by class folder, val by val_annotations.txt, grey images as RGB; a zip is checked by its MD5 and unpacked."""
    tiny_imagenet(tmp_path / ("build" if zipped else "") / "tiny-imagenet-200")
    if zipped:
        with zipfile.ZipFile(tmp_path / "tiny-imagenet-200.zip", "w") as archive:
            for path in sorted((tmp_path / "build").rglob("*")):
                archive.write(path, path.relative_to(tmp_path / "build"))
        monkeypatch.setattr(common, "TINY_MD5", hashlib.md5((tmp_path / "tiny-imagenet-200.zip").read_bytes()).hexdigest())
    data = common.load_data("tinyimagenet", tmp_path)
    check(data, 6, 2, 64, 2)
    assert data.y_test.tolist() == [1, 0] and data.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.x_train[0].int() - 100).abs().max() < 3 and abs(int(data.x_test[0, 0, 0, 0]) - 200) < 3


def image_folder(root, test="test", size=(32, 32)):
    for split, n in (("train", 3), (test, 2)):
        for c in range(3):
            (root / split / f"class{c}").mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", size, (c, i, 7)).save(root / split / f"class{c}" / f"{i}.png")


@pytest.mark.parametrize("test", ["test", "val"])
def test_folder_and_its_cache(test, tmp_path, monkeypatch):
    """An ImageFolder tree with train/ and test/ or val/; decoded once, and again when a file has changed."""
    image_folder(tmp_path, test)
    data = common.load_data("folder", tmp_path)
    check(data, 9, 6, 32, 3)
    assert data.x_train[4, :, 0, 0].tolist() == [1, 1, 7]
    opened = []
    monkeypatch.setattr(common.Image, "open", lambda path, really=Image.open: (opened.append(path), really(path))[1])
    again = common.load_data("folder", tmp_path)
    assert not opened and all(torch.equal(a, b) for a, b in zip(data[:4], again[:4]))
    Image.new("RGB", (32, 32), (99, 99, 99)).save(tmp_path / "train" / "class1" / "1.png")
    assert common.load_data("folder", tmp_path).x_train[4, :, 0, 0].tolist() == [99, 99, 99] and len(opened) == 15


def test_shapes_are_deterministic_balanced_and_differ_between_train_and_test():
    a, b = common.load_data("shapes", "nowhere"), common.load_data("shapes", "nowhere")
    check(a, 5000, 1000, 32, 10)
    assert torch.equal(a.x_train, b.x_train) and torch.equal(a.y_test, b.y_test)
    assert a.y_train.bincount().tolist() == [500] * 10 and not torch.equal(a.x_train[:1000], a.x_test)


def broken_cifar(path):
    (path / "cifar-10-python.tar.gz").write_bytes(b"not an archive")


def broken_image(path):
    image_folder(path)
    (path / "test" / "class0" / "0.png").write_bytes(b"not an image")


def two_sizes(path):
    image_folder(path)
    Image.new("RGB", (40, 32)).save(path / "train" / "class2" / "9.png")


def sixteen_bits(path):
    image_folder(path)
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(path / "train" / "class0" / "0.png")


def other_classes(path):
    image_folder(path)
    (path / "test" / "class2").rename(path / "test" / "class9")


@pytest.mark.parametrize("name, spoil, words", [
    ("cifar10", lambda path: None, "shapes"), ("cifar10", broken_cifar, "shapes"), ("tinyimagenet", lambda path: None, "shapes"),
    ("folder", lambda path: None, "train/ and test/"), ("folder", broken_image, "0.png is not a readable image"),
    ("folder", sixteen_bits, "of 8 bits"), ("folder", two_sizes, "40x32"), ("folder", other_classes, "class9")])
def test_missing_and_broken_data_end_in_one_line(name, spoil, words, tmp_path, capsys, monkeypatch):
    """What is missing, where it was looked for, what to do; exit status 2. No network: downloads are made to fail."""
    def no_network(*args, **kwargs):
        raise OSError("no route to host")
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    spoil(tmp_path)
    with pytest.raises(SystemExit) as stop:
        common.load_data(name, tmp_path)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and str(tmp_path) in err and words in err


# ----------------------------------------------------------------------------------------------------------- arguments

def test_numbers_are_typed_as_fractions_or_decimals():
    assert common.number(0, 1)("8/255") == 8 / 255 and common.number(0, 1)("0.031") == 0.031
    assert common.number(1, kind=int)("130") == 130
    for text, kind, words in (("8", float, "did you mean 8/255"), ("eight", float, "not a number"), ("1/0", float, "not a"),
                              ("nan", float, "not between"), ("-1/255", float, "not between"), ("2.5", int, "not a number")):
        with pytest.raises(ArgumentTypeError, match=words):
            common.number(0, 1, kind)(text)
