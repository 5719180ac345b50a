"""The training scripts: Algorithm 1's loop, passes, moving averages, resume, errors, devices, processes, a whole run."""
import csv
import difflib
import inspect
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import library

import common
import train_at_ours
import train_lma_at
import train_mart_ours
import train_trades_ours

ROOT = Path(__file__).parents[1]
SCRIPTS = [train_lma_at, train_at_ours, train_trades_ours, train_mart_ours]
PLAIN = "--margin-weight 0 --beta 0"
CPU = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def parse(script, options, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *options.split()])
    return script.parse_args()


def prepare(script, options, monkeypatch, device="cpu", images=24):
    """args, model and the arguments of script.train_epoch for 3 steps of 8 random images."""
    args = parse(script, f"--arch wrn-10-1 --batch-size 8 {options}", monkeypatch)
    torch.manual_seed(0)
    model = common.make_model(args.arch, 10)
    x, y = torch.randint(256, (images, 3, 16, 16), dtype=torch.uint8), torch.randint(10, (images,))
    model, ema = model.to(device, memory_format=torch.channels_last), torch.zeros(8, 10, device=device)
    net, attack_net = common.accelerate(model, args, parallel=True), common.accelerate(common.fold_batchnorm(model), args)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    batches = common.start_epoch(images, 8, args.seed, 1).to(device)
    return args, model, [net, attack_net, optimizer, x.to(device), y.to(device), batches, ema, ema, args]


class Counting:
    """A network that counts its forward passes and keeps its logits."""

    def __init__(self, net):
        self.net, self.logits, self.refresh = net, [], getattr(net, "refresh", None)

    def __call__(self, x):
        self.logits.append(self.net(x))
        return self.logits[-1]


# ---------------------------------------------------------------------------------------------------- the batch loop

@pytest.mark.parametrize("script, options, attack, train", [
    (train_lma_at, "", 10, 2), (train_at_ours, "", 10, 2), (train_trades_ours, "", 10, 2), (train_mart_ours, "", 10, 2),
    (train_lma_at, "--beta 0", 10, 1), (train_at_ours, f"--attack-loss ce {PLAIN}", 10, 1),
    (train_trades_ours, f"--attack-loss kl {PLAIN}", 11, 2), (train_mart_ours, f"--attack-loss ce {PLAIN}", 10, 2),
    (train_mart_ours, f"--attack-loss ce --lambda 0 {PLAIN}", 10, 1),
    (train_at_ours, f"--epsilon 0 {PLAIN}", 0, 1)])
def test_no_forward_pass_that_no_term_needs(script, options, attack, train, monkeypatch):
    """Passes a step with 10 attack steps: vanilla AT 10 + 1, TRADES 11 + 2 (f(x) once), natural training 0 + 1."""
    _, _, epoch = prepare(script, options, monkeypatch)
    epoch[0], epoch[1] = Counting(epoch[0]), Counting(epoch[1])
    script.train_epoch(*epoch)
    assert (len(epoch[1].logits), len(epoch[0].logits)) == (3 * attack, 3 * train)


@pytest.mark.parametrize("tau", [0, 0.2, 0.9])
@pytest.mark.parametrize("script", SCRIPTS)
def test_moving_average_is_its_closed_form(script, tau, monkeypatch):
    """After t steps: (1 - tau) sum_i tau^(t - i) f(x_i), slot by slot, from zero, with logit_{t-1} constant to the gradient."""
    _, _, epoch = prepare(script, f"--tau {tau} --steps 1", monkeypatch)
    epoch[0], start = Counting(epoch[0]), torch.zeros(8, 10, requires_grad=True)
    epoch[6] = epoch[7] = start
    ema_adv, ema_nat, _ = script.train_epoch(*epoch)
    logits = [z.detach() for z in epoch[0].logits]
    for ema, passes in ((ema_nat, logits[0::2]), (ema_adv, logits[1::2])):
        closed = (1 - tau) * sum(tau ** (2 - i) * z for i, z in enumerate(passes))
        assert torch.allclose(ema, closed, atol=1e-6) and not ema.requires_grad
    assert start.grad is None and not torch.equal(ema_adv, ema_nat)


def test_beta_zero_and_tau_are_the_ablations_they_say(monkeypatch):
    """tau 0 and one step give the same first update as tau 0.2 with beta scaled to keep (1 - tau)^2 beta (mHuber is
    quadratic near 0); beta 0 leaves mHuber out of the terms."""
    weights = []
    for options in ("--tau 0 --beta 64", "--tau 0.2 --beta 100"):
        _, model, epoch = prepare(train_lma_at, f"--alpha 1000 {options}", monkeypatch, images=8)
        train_lma_at.train_epoch(*epoch)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.allclose(*weights, atol=1e-5)
    _, _, epoch = prepare(train_lma_at, "--beta 0", monkeypatch)
    assert list(train_lma_at.train_epoch(*epoch)[2]) == ["L'", "BCE"]


@pytest.fixture
def meta_multi_margin():
    """torch has no meta kernel for the backward pass of multi_margin_loss: lend it one (the shape is the input's)."""
    kernels = library.Library("aten", "IMPL", "Meta")
    kernels.impl("multi_margin_loss_backward", lambda grad, z, *rest, **named: torch.empty_like(z))
    yield
    kernels._destroy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", ["", "--attack-loss ce"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_batch_loop_never_waits_for_the_device(script, options, monkeypatch, meta_multi_margin):
    """On the meta device a stray CPU tensor, .item(), a print of a value or any other synchronisation raises."""
    _, _, epoch = prepare(script, f"--steps 3 {options}", monkeypatch, device="meta")
    _, _, log = script.train_epoch(*epoch)
    assert all(v.device.type == "meta" and v.shape == (3,) for v in log.values())
    with pytest.raises(RuntimeError):
        log["L'"].sum().item()


@pytest.mark.parametrize("script", SCRIPTS)
def test_amp_runs_and_stays_near_float32(script, monkeypatch):
    """--amp under CPU autocast: the logged terms are float32 and within bfloat16's few percent of the float32 run."""
    logs = []
    for options in ("", "--amp"):
        _, _, epoch = prepare(script, options, monkeypatch)
        ema_adv, _, log = script.train_epoch(*epoch)
        assert ema_adv.dtype == torch.float32 and all(v.dtype == torch.float32 for v in log.values())
        logs.append(torch.stack([v for k, v in log.items() if k != "mHuber"]))
    assert torch.allclose(*logs, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("script, options", [(train_lma_at, ""), (train_trades_ours, f"--attack-loss kl {PLAIN}")])
def test_compile_makes_one_graph_for_training_and_one_for_the_attack(script, options, monkeypatch):
    """Three steps compile two graphs, and no more in the steps after the first."""
    graphs, compile = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda net: compile(net, backend=backend))
    _, _, epoch = prepare(script, f"--compile --steps 2 {options}", monkeypatch)
    script.train_epoch(*epoch)
    script.train_epoch(*epoch)
    torch._dynamo.reset()
    assert len(graphs) == 2


# ------------------------------------------------------------------------------------------- four scripts, one text

METHOD = r"boosted|weighted_kl|kl\(|logits_nat = net|log_p_nat|attack-loss|inv-lambda|--lambda|terms\[|f\"loss |eq\. 1|Table 1|" \
         r"if args\.inv_lambda|if args\.lam|f\(x\) is the same|What the search|\"kl\"|lambda logits: attack_loss"


@pytest.mark.parametrize("a, b", [*itertools.combinations(SCRIPTS, 2)])
def test_scripts_differ_in_the_method_alone(a, b):
    """`diff` of two scripts: under 60 lines, and outside docstring and loss functions only lines that name the method."""
    texts = [(ROOT / f"{s.__name__}.py").read_text() for s in (a, b)]
    changed = [line for line in difflib.ndiff(*(t.splitlines() for t in texts)) if line[0] in "+-"]
    assert len(changed) < 60
    for name in ("margin_loss", "train_epoch", "main", "parse_args", "objective"):
        lines = difflib.ndiff(*(inspect.getsource(getattr(s, name)).splitlines() for s in (a, b)))
        strange = [line for line in lines if line[0] in "+-" and not re.search(METHOD, line)]
        assert not strange


# --------------------------------------------------------------------------------------------------- whole programs

@pytest.fixture
def images(tmp_path):
    """48 + 16 images, 16 x 16, four classes of colour, as an ImageFolder tree."""
    g = np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 4)):
        for c in range(4):
            (tmp_path / "data" / split / str(c)).mkdir(parents=True)
            for i in range(n):
                pixels = g.integers(0, 256, (16, 16, 3)) // 2 + 30 * c
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / split / str(c) / f"{i}.png")
    return f"--dataset folder --data-dir {tmp_path / 'data'} --arch wrn-10-1 --batch-size 8 --val-size 8 --steps 2"


def call(script, options, monkeypatch):
    """The script's main() with these arguments, in this process; returns the run folder."""
    parse(script, options, monkeypatch)
    script.main()


def tensors(path):
    state = torch.load(path, weights_only=True)
    momentum = [s["momentum_buffer"] for s in state["optimizer"]["state"].values()]
    return [*state["model"].values(), *momentum, state["ema_adv"], state["ema_nat"]]


def start(options, *launcher, **environment):
    return subprocess.Popen([sys.executable, *launcher, ROOT / "train_lma_at.py", *options.split()], text=True,
                            env=CPU | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # ignored in background jobs


def start_pair(options):
    """Two processes of one run, as torchrun starts them but without its own start."""
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    return [start(options, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
            for rank in "01"]


def wait_for_rows(path, rows, process):
    for _ in range(6000):
        if process.poll() is not None or path.exists() and len(path.read_text().splitlines()) > rows:
            return
        time.sleep(0.005)


def test_a_killed_run_resumes_bit_identically(images, tmp_path, monkeypatch, capsys):
    """Ctrl-C, then kill -9, then to the end: weights, momentum, moving averages and metrics of the uninterrupted run."""
    options = f"{images} --epochs 12 --run-dir {tmp_path / 'run'}"
    metrics = tmp_path / "run" / "metrics.csv"
    process = start(options)
    wait_for_rows(metrics, 1, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and "--resume" in out and "Traceback" not in err
    process = start(f"{options} --resume")
    wait_for_rows(metrics, len(metrics.read_text().splitlines()) + 2, process)
    process.kill()
    process.wait()
    assert 3 < len(metrics.read_text().splitlines()) < 12
    call(train_lma_at, f"{options} --resume", monkeypatch)
    call(train_lma_at, f"{images} --epochs 12 --run-dir {tmp_path / 'whole'}", monkeypatch)
    for name in ("best.pt", "last.pt"):
        a, b = (torch.load(tmp_path / run / name, weights_only=True) for run in ("run", "whole"))
        assert a["epoch"] == b["epoch"] and all(torch.equal(a["model"][k], v) for k, v in b["model"].items())
    assert all(torch.equal(a, b) for a, b in zip(tensors(tmp_path / "run" / "last.pt"), tensors(tmp_path / "whole" / "last.pt")))
    rows = [[{k: v for k, v in row.items() if k != "images/s"} for row in csv.DictReader(open(tmp_path / run / "metrics.csv"))]
            for run in ("run", "whole")]
    assert rows[0] == rows[1] and len(rows[0]) == 12
    capsys.readouterr()
    call(train_lma_at, f"{options} --resume", monkeypatch)  # a finished run: the table once more
    assert "| last.pt | 12 |" in capsys.readouterr().out


def test_run_folder_and_best_epoch(images, tmp_path, monkeypatch, capsys):
    """args.json, a metrics row an epoch, examples.png, a final table; best.pt is the epoch of the best val PGD-10; the
    learning rate falls tenfold after 74/130 and after 89/130 of the epochs (here both in epoch 4); --val-size 0 keeps last.pt alone;
    --resume starts a run where there is none."""
    call(train_mart_ours, f"{images} --epochs 4 --lr 0.1 --run-dir {tmp_path / 'run'}", monkeypatch)
    out = capsys.readouterr().out
    args, rows = json.loads((tmp_path / "run/args.json").read_text()), list(csv.DictReader(open(tmp_path / "run/metrics.csv")))
    assert args["method"] == "mart_ours" and args["beta"] == 86 and args["alpha"] == 2.345 and args["torch"]
    assert [float(r["lr"]) for r in rows] == [0.1, 0.1, 0.1, 0.001]
    val = [float(r["val PGD-10"]) for r in rows]
    assert torch.load(tmp_path / "run/best.pt", weights_only=True)["epoch"] == val.index(max(val)) + 1
    assert {"best.pt", "last.pt", "args.json", "metrics.csv", "examples.png"} == {p.name for p in (tmp_path / "run").iterdir()}
    assert "| best.pt |" in out and "python evaluate.py" in out and len(re.findall(r"^epoch \d/4", out, re.M)) == 4
    assert Image.open(tmp_path / "run/examples.png").width > 10 * 64
    call(train_at_ours, f"{images} --epochs 1 --val-size 0 --resume --run-dir {tmp_path / 'all'}", monkeypatch)
    assert not (tmp_path / "all/best.pt").exists() and (tmp_path / "all/last.pt").exists()


def test_defaults_are_the_papers(monkeypatch):
    """Section 5.1: one argument at a time, alpha and beta by data set and network."""
    for script in SCRIPTS:
        a = parse(script, "", monkeypatch)
        assert (a.epochs, a.batch_size, a.lr, a.weight_decay, a.steps) == (130, 100, 0.01, 3.5e-3, 10)
        assert (a.epsilon, a.step_size, a.delta, a.tau, a.margin_weight) == (8 / 255, 2 / 255, 0.9, 0.2, 1)
        assert (a.attack_loss, a.alpha, a.beta) == ("margin+ce", 5.345, 86)
        for options, alpha, beta in (("--dataset cifar100", 5.345, 96), ("--dataset tinyimagenet", 6.345, 96),
                                     ("--arch wrn-34-10", 2.345, 86), ("--dataset shapes --alpha 1 --beta 2", 1, 2)):
            a = parse(script, options, monkeypatch)
            assert (a.alpha, a.beta) == (alpha, beta)
    assert parse(train_trades_ours, "", monkeypatch).inv_lambda == 6 and parse(train_mart_ours, "", monkeypatch).lam == 5


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_the_script_is_and_its_defaults(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(script, "--help", monkeypatch)
    out = capsys.readouterr().out
    assert stop.value.code == 0 and script.__doc__ in out and out.startswith(f"usage: {script.__name__}.py [-h]")
    assert "(default: 8/255)" in out and "(default: 130)" in out and "None" not in out and "False" not in out


@pytest.mark.parametrize("script", SCRIPTS)
def test_learning_rate_falls_in_the_75th_and_90th_of_130_epochs(script, monkeypatch):
    a = parse(script, "", monkeypatch)
    assert [script.learning_rate(e, a) for e in (1, 74, 75, 89, 90, 130)] == pytest.approx([.01, .01, 1e-3, 1e-3, 1e-4, 1e-4])


@pytest.mark.parametrize("options, words", [
    ("--epsilon 8", "8/255"), ("--epsilon lots", "--epsilon"), ("--dataset mnist", "mnist"), ("--tau 1", "--tau"),
    ("--attack-loss kl", "--attack-loss"), ("--batch-size 64", "--batch-size"), ("--arch wrn-12-1", "6n+4"),
    ("--device nonsense", "--device"), ("--nonsense", "--nonsense"), ("--batch-size 100/2", "100/2"), ("--val-size 48", "--val-size")])
def test_bad_input_ends_in_one_line(options, words, images, tmp_path, monkeypatch, capsys):
    """Exit status 2, one line on stderr that names the argument, and no run folder begun."""
    with pytest.raises(SystemExit) as stop:
        call(train_lma_at, f"{images} --run-dir {tmp_path / 'run'} {options}", monkeypatch)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and words in err and not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten_nor_resumed_with_other_settings(images, tmp_path, monkeypatch, capsys):
    options = f"{images} --epochs 1 --run-dir {tmp_path / 'run'}"
    call(train_lma_at, options, monkeypatch)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    def refused(changed, words):
        with pytest.raises(SystemExit) as stop:
            call(train_lma_at, f"{options} {changed}", monkeypatch)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and words in err and err.count("\n") == 1
    refused("", "already holds a run")
    refused("--resume --lr 0.5", "lr was 0.01, is 0.5")
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    (tmp_path / "run" / "last.pt").write_bytes(before[:1000])
    refused("--resume", "not readable")
    (tmp_path / "run" / "args.json").write_text("{")
    refused("--resume", "not readable")
    refused(f"--run-dir {tmp_path / 'run' / 'args.json' / 'x'}", "not writable")


def test_a_loss_that_is_not_finite_stops_the_run(images, tmp_path, monkeypatch, capsys):
    """The message names epoch, step and term; the checkpoint of the epoch before stays."""
    options = f"{images} --epochs 5 --run-dir {tmp_path / 'run'}"
    really = train_lma_at.margin_loss
    calls = itertools.count()
    monkeypatch.setattr(train_lma_at, "margin_loss", lambda *a: really(*a) * (torch.inf if next(calls) == 26 else 1))
    with pytest.raises(SystemExit) as stop:  # 3 calls a step (two in the attack), 5 steps an epoch: call 26 is of epoch 2, step 4
        call(train_lma_at, options, monkeypatch)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: epoch 2, step 4: the term L' is inf")
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1


def test_lma_at_on_shapes_beats_natural_training_under_attack(tmp_path, monkeypatch, capsys):
    """The point of it all, end to end: PGD-20 accuracy on drawn shapes, LMA-AT against natural training."""
    data = common.Data(*common.draw_shapes(1600, 0), *common.draw_shapes(100, 1), 10)
    monkeypatch.setattr(common, "load_data", lambda *a: data)
    shared = "--dataset shapes --arch wrn-10-1 --epochs 3 --batch-size 16 --lr 0.03 --val-size 0 --steps 2 --step-size 6/255"
    scores, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    for name, script, options in (("lma", train_lma_at, ""), ("natural", train_at_ours, f"--epsilon 0 {PLAIN}")):
        call(script, f"{shared} {options} --run-dir {tmp_path / name}", monkeypatch)
        clean, robust = re.search(r"last.pt \| 3 \| (\S+) \| (\S+) \|", capsys.readouterr().out).groups()
        scores.append((float(clean), float(robust)))
    torch.set_num_threads(threads)
    (_, lma), (natural_clean, natural) = scores
    assert natural_clean > 60 and lma > natural + 10, scores


# ------------------------------------------------------------------------------------------------------ many processes

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d",
            "--rdzv-endpoint=localhost:0")

WORKER = '''
import sys, torch, torch.distributed as dist
sys.path.insert(0, {root!r})
import common, train_lma_at

def main():
    args = train_lma_at.parse_args()
    common.setup("cpu")
    torch.manual_seed(0)
    model = common.make_model("wrn-10-1", 10).to(memory_format=torch.channels_last)
    net, attack_net = common.accelerate(model, args, parallel=True), common.accelerate(common.fold_batchnorm(model), args)
    x, y = torch.randint(256, (24, 3, 16, 16), dtype=torch.uint8), torch.randint(10, (24,))
    ema, optimizer = torch.zeros(4, 10), torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    own = torch.autograd.grad(torch.nn.functional.cross_entropy(model(z := torch.rand(4, 3, 16, 16) + common.RANK), y[:4]), model.parameters())
    torch.nn.functional.cross_entropy(net(z), y[:4]).backward()
    assert common.WORLD == 2
    for mine, p in zip(own, model.parameters()):
        assert torch.allclose(common.all_sum(mine.clone()) / 2, p.grad, atol=1e-6)
    batches = common.start_epoch(24, 8, 0, 1)
    everyone = [torch.empty_like(batches) for _ in range(2)]
    dist.all_gather(everyone, batches.contiguous())
    assert sorted(torch.cat(everyone).flatten().tolist()) == list(range(24)) and batches.shape == (3, 4)
    train_lma_at.train_epoch(net, attack_net, optimizer, x, y, batches, ema, ema, args)
    common.average_statistics(model)
    for name, t in model.state_dict().items():
        other = [torch.empty_like(t) for _ in range(2)]
        dist.all_gather(other, t)
        assert torch.equal(*other), name
    print("agreed")

common.run(main)
'''


def test_two_processes_keep_equal_weights_and_average_their_gradients(tmp_path):
    """Gloo: the gradient is the mean of the halves', each image goes to one process, all state is equal after 3 steps."""
    (tmp_path / "worker.py").write_text(WORKER.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, *TORCHRUN, tmp_path / "worker.py", "--batch-size", "8", "--steps", "2"],
                          env=CPU, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("agreed") == 2, done.stderr


def test_two_processes_train_resume_and_refuse_another_number(images, tmp_path, monkeypatch, capsys):
    """Kill -9 and resume gives the uninterrupted weights; one process alone is told so; an error ends torchrun and both."""
    options = f"{images} --epochs 8 --run-dir {tmp_path}"
    assert [process.wait() for process in start_pair(f"{options}/whole")] == [0, 0]
    pair = start_pair(f"{options}/run")
    wait_for_rows(tmp_path / "run" / "metrics.csv", 2, pair[0])
    for process in pair:
        process.kill()
        process.wait()
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) < 9
    with pytest.raises(SystemExit) as stop:
        call(train_lma_at, f"{options}/run --resume", monkeypatch)
    assert stop.value.code == 2 and "processes was 2, is 1" in capsys.readouterr().err
    assert [process.wait() for process in start_pair(f"{options}/run --resume")] == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(tensors(tmp_path / "run/last.pt"), tensors(tmp_path / "whole/last.pt")))
    assert tensors(tmp_path / "whole/last.pt")[-1].shape == (8, 4)
    broken = start(f"{options}/run", *TORCHRUN)
    assert "already holds a run" in broken.communicate()[1] and broken.returncode != 0
