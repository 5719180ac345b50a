"""On a GPU: every script end to end, --amp and --compile, resume, evaluate. Skipped, visibly, where
there is none."""

import sys
from itertools import chain

import pytest
import torch

import common
import evaluate
import train_at_ours
import train_lma_at
import train_mart_ours
import train_trades_ours

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: nothing here has been checked on a GPU"
)
SMALL = ["--dataset", "shapes", "--device", DEVICE]


def draw_shapes(split, n):
    """The first n images of a split of the data set `shapes`."""
    x, y, classes = common.load_data("shapes", "", split)
    return common.Data(x[:n], y[:n], classes)


@pytest.fixture
def call(monkeypatch):
    """main() of a script in this process, on few images."""
    data = {"train": draw_shapes("train", 400), "test": draw_shapes("test", 100)}
    monkeypatch.setitem(common.DATASETS, "shapes", lambda root, split: data[split])

    def call(script, *options):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
        script.main()

    return call


@pytest.mark.parametrize(
    "options", [[], ["--ema", "image"], ["--amp"], ["--compile"], ["--amp", "--compile"]]
)
@pytest.mark.parametrize(
    "script", [train_lma_at, train_at_ours, train_trades_ours, train_mart_ours]
)
def test_trains_and_resumes_on_cuda(script, options, tmp_path, monkeypatch, call):
    options = [*SMALL, "--val-size", 100, "--epochs", 2, "--run-dir", tmp_path, *options]
    with monkeypatch.context() as patch, pytest.raises(IndexError):  # the second epoch ends the run
        patch.setattr(script, "learning_rate", lambda epoch, *_: [0.01][epoch - 1])
        call(script, *options)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1
    call(script, *options, "--resume")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 2
    assert torch.load(tmp_path / "best.pt", weights_only=True)["done"]


@pytest.mark.parametrize("ema", ["slot", "image"])
def test_batch_loop_does_not_synchronise(ema, monkeypatch):
    """torch's own watch on synchronising calls is set to raise during the batch loop."""
    monkeypatch.setattr(sys, "argv", ["train_lma_at.py", "--batch-size", "50", "--ema", ema])
    args, device = train_lma_at.parse_args(), common.setup(DEVICE)
    x, y = (t.to(device) for t in draw_shapes("train", 400)[:2])
    model = common.make_model("wrn-10-1", 10).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    past = torch.zeros(2, 400 if ema == "image" else 50, 10, device=device)
    for epoch, mode in ((1, "default"), (2, "error")):  # the first compiles and allocates
        batches = common.shuffled_batches(x, y, 50, 0, epoch)
        batches = chain([next(batches)], batches)  # the order of the epoch is sent to the device
        torch.cuda.set_sync_debug_mode(mode)
        try:
            train_lma_at.train_epoch(model, optimizer, batches, *past, args)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_evaluates_on_cuda(tmp_path, capsys, call):
    call(train_lma_at, *SMALL, "--val-size", 0, "--epochs", 1, "--run-dir", tmp_path)
    attacks = ["--attacks", "Clean", "FGSM", "PGD-20", "AA"]
    call(evaluate, tmp_path / "last.pt", "--n", 20, *attacks, "--batch-size", 8, "--device", DEVICE)
    assert "AA" in capsys.readouterr().out
