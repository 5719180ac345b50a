"""On a GPU: every script end to end, --amp and --compile, resume, evaluate. Skipped, visibly, where there is none."""
import sys

import pytest
import torch

import common
import evaluate
import train_at_ours
import train_lma_at
import train_mart_ours
import train_trades_ours

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here has been checked on a GPU")


def call(module, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, options)])
    module.main()


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    data = common.Data(*common.draw_shapes(400, 0), *common.draw_shapes(100, 1), 10)
    monkeypatch.setattr(common, "load_data", lambda *a: data)


@pytest.mark.parametrize("options", [[], ["--amp"], ["--compile"], ["--amp", "--compile"]])
@pytest.mark.parametrize("script", [train_lma_at, train_at_ours, train_trades_ours, train_mart_ours])
def test_trains_and_resumes_on_cuda(script, options, tmp_path, monkeypatch):
    shared = ["--dataset", "shapes", "--arch", "wrn-10-1", "--val-size", 100, "--epochs", 2, "--run-dir", tmp_path, *options]
    with monkeypatch.context() as patch, pytest.raises(IndexError):
        patch.setattr(script, "learning_rate", lambda epoch, args: [args.lr][epoch - 1])  # the second epoch ends the run
        call(script, monkeypatch, *shared)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 1
    call(script, monkeypatch, *shared, "--resume")
    assert torch.load(tmp_path / "last.pt", weights_only=True)["epoch"] == 2


def test_batch_loop_does_not_synchronise(monkeypatch):
    """torch's own watch on synchronising calls is set to raise during the batch loop."""
    monkeypatch.setattr(sys, "argv", ["train_lma_at.py", "--batch-size", "50"])
    args, device = train_lma_at.parse_args(), common.setup("cuda")
    data = common.load_data("shapes", "")
    model = common.make_model("wrn-10-1", 10).to(device, memory_format=torch.channels_last)
    optimizer, ema = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), torch.zeros(50, 10, device=device)
    epoch = [model, common.fold_batchnorm(model), optimizer, data.x_train.to(device), data.y_train.to(device),
             common.start_epoch(400, 50, 0, 1).to(device), ema, ema, args]
    train_lma_at.train_epoch(*epoch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_lma_at.train_epoch(*epoch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_evaluates_on_cuda(tmp_path, monkeypatch, capsys):
    call(train_lma_at, monkeypatch, "--dataset", "shapes", "--arch", "wrn-10-1", "--val-size", 0, "--epochs", 1, "--run-dir", tmp_path)
    call(evaluate, monkeypatch, tmp_path / "last.pt", "--n", 20, "--attacks", "Clean", "FGSM", "PGD-20", "AA")
    assert "AA" in capsys.readouterr().out
