"""MART + Ours: MART with the margin loss and the logit moving averages (Table 1).

    python train_mart_ours.py --dataset cifar10
    python train_mart_ours.py --attack-loss ce --margin-weight 0 --beta 0  # MART

minimises  L' + BCE(p(x'), y) + lambda KL(p(x) || p(x')) (1 - p_y(x))
+ beta * mHuber(logit'_t, logit_t, alpha)
where x' is found by PGD on L' + CE and logit'_t, logit_t are moving averages over the iterations of
the adversarial and of the natural logits. Defaults are the paper's (section 5.1); --dataset shapes
alone is a demonstration for a CPU.
"""
import csv
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from shlex import quote

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image

import common
from common import RANK, WORLD, fail, number, print0


def parse_args():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--dataset", default="cifar10", choices=common.DATASETS, help="what to train on")
    add("--data-dir", default="data", help="where the data set is or is downloaded to")
    add("--arch", default="resnet18", help="resnet18 or wrn-<depth>-<widen>; paper's: wrn-34-10")
    add("--epochs", type=number(1, kind=int), default=130, help="passes over the training images")
    add("--batch-size", type=number(2, kind=int), default=100, help="over all processes")
    add("--lr", type=number(0, 100), default=0.01, help="/10 from epoch 75 of 130 on, /100 from 90")
    add("--weight-decay", type=number(0, 1), default=3.5e-3, help="of SGD, momentum 0.9")
    # the inner maximisation: x'
    add("--epsilon", type=number(0, 1), default="8/255", help="radius; 0: natural training")
    add("--step-size", type=number(0, 1), default="2/255", help="of PGD")
    add("--steps", type=number(1, kind=int), default=10, help="of PGD")
    add("--attack-loss", default="margin+ce", choices=["margin+ce", "ce"], help="PGD's")
    # the outer minimisation: the weights
    add("--delta", type=number(0), default=0.9, help="margin of L' (eq. 13)")
    add("--margin-reduction", default="mean", choices=["mean", "sum"], help="of L' over classes")
    add("--margin-weight", type=number(0), default=1.0, help="of L' in the loss; 0 removes it")
    add("--lambda", type=number(0), default=5.0, dest="lam", help="weight of KL (1 - p_y)")
    add("--alpha", type=number(1e-3), help="of mHuber; the paper's for data set and network")
    add("--beta", type=number(0), help="weight of mHuber; the paper's for the data set")
    add("--tau", type=number(0, 0.999999), default=0.2, help="moving average of logits; 0: none")
    add("--ema", default="slot", choices=["slot", "image"], help="what has a moving average: the "
        "i-th place of a batch (Algorithm 1 to the letter), or each training image")
    # the run
    add("--val-size", type=number(0, kind=int), default=1000, help="images that choose best.pt")
    add("--seed", type=number(0, 2 ** 31, int), default=0, help="of all random numbers")
    add("--device", default="auto", help="cuda, cpu, ...; auto: cuda if there is one")
    add("--amp", action="store_true", help="networks in bfloat16")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--run-dir", help="by default runs/<dataset>-<arch>-<method>-seed<n>")
    add("--resume", action="store_true", help="continue the run in the run folder, if any")
    if parser.parse_known_args()[0].dataset == "shapes":
        parser.set_defaults(arch="wrn-10-1", epochs=3, batch_size=50, lr=0.05, val_size=500)
    args = parser.parse_args()
    args.method, args.processes = Path(__file__).stem.removeprefix("train_"), WORLD
    if args.run_dir is None:
        args.run_dir = f"runs/{args.dataset}-{args.arch}-{args.method}-seed{args.seed}"
    if args.alpha is None:
        args.alpha = 5.345
        if args.dataset == "tinyimagenet":
            args.alpha = 6.345
        if args.arch.startswith("wrn"):
            args.alpha = 2.345
    if args.beta is None:
        args.beta = 96 if args.dataset in ("cifar100", "tinyimagenet") else 86
    return args


def margin_loss(logits, y, delta, reduction="mean"):
    """L' (eq. 13): the squared hinge sum_{j != y} max(0, f_j - f_y + delta)^2 of logits [N, C].

    Averaged over the batch and, with "mean", divided by C. open: the paper introduces L' in the
    words of torch's MultiMarginLoss, which divides by C; as printed (the sum) training diverges.
    """
    loss = F.multi_margin_loss(logits, y, p=2, margin=delta)
    return loss * logits.shape[1] if reduction == "sum" else loss


def boosted_cross_entropy(logits, y):
    """BCE (eq. 7): -log p_y - log(1 - max_{k != y} p_k) of logits [N, C], batch average."""
    log_p = F.log_softmax(logits, 1)
    k = log_p.scatter(1, y[:, None], -torch.inf).argmax(1, keepdim=True)
    log_rest = log_p.scatter(1, k, -torch.inf).logsumexp(1)  # log(1 - p_k), exact: all but k
    return F.nll_loss(log_p, y) - log_rest.mean()


def weighted_kl(logits_adv, logits_nat, y):
    """KL(p(x) || p(x')) (1 - p_y(x)) of logits [N, C], batch average; nothing is detached."""
    log_p_adv, log_p_nat = F.log_softmax(logits_adv, 1), F.log_softmax(logits_nat, 1)
    kl = F.kl_div(log_p_adv, log_p_nat, log_target=True, reduction="none").sum(1)
    p_y = log_p_nat.gather(1, y[:, None])[:, 0].exp()
    return (kl * (1 - p_y)).mean()


def attack_loss(logits_adv, y, args):
    """What the search for x' maximises: L' + CE (section 4.4)."""
    loss = F.cross_entropy(logits_adv, y)
    if args.attack_loss == "margin+ce":
        loss = margin_loss(logits_adv, y, args.delta, args.margin_reduction) + loss
    return loss


def objective(logits_adv, logits_nat, y, ema_adv, ema_nat, args):
    """The weighted terms of Table 1, which the weights minimise. A term of weight 0 is left out."""
    terms = {}
    if args.margin_weight:
        loss = margin_loss(logits_adv, y, args.delta, args.margin_reduction)
        terms["L'"] = args.margin_weight * loss
    terms["BCE"] = boosted_cross_entropy(logits_adv, y)
    if args.lam:
        terms["KL"] = args.lam * weighted_kl(logits_adv, logits_nat, y)
    if args.beta:
        terms["mHuber"] = args.beta * common.mhuber(ema_adv, ema_nat, args.alpha)
    return terms


def train_epoch(model, net, optimizer, batches, past_adv, past_nat, args):
    """Algorithm 1 over `batches`. Returns {term: its values by step}.

    net is the model or, under torchrun, its DistributedDataParallel. past_adv and past_nat are
    logit'_{t-1} and logit_{t-1}, updated in place: [m, C], or [N, C] with --ema image.
    """
    log = []
    model.train()
    for x, y, image in batches:
        # x' = argmax L' + CE, by PGD in eval mode
        with torch.autocast(x.device.type, torch.bfloat16) if args.amp else nullcontext():
            x_adv = x
            if args.epsilon:
                x_adv = common.pgd(model, x, lambda logits: attack_loss(logits, y, args),
                                   args.epsilon, args.step_size, args.steps)
            logits_nat = net(x).to(x.dtype) if args.lam or args.beta else None
            logits_adv = net(x_adv).to(x.dtype)

        # logit_t <- tau * logit_{t-1} + (1 - tau) * f(x), in which the past is constant
        ema_adv = ema_nat = None
        if args.beta:
            slot = image if args.ema == "image" else slice(None)
            ema_adv = args.tau * past_adv[slot] + (1 - args.tau) * logits_adv
            ema_nat = args.tau * past_nat[slot] + (1 - args.tau) * logits_nat
            past_adv[slot] = ema_adv.detach()
            past_nat[slot] = ema_nat.detach()

        terms = objective(logits_adv, logits_nat, y, ema_adv, ema_nat, args)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        log.append(torch.stack(list(terms.values())).detach())  # read once an epoch: no waiting
    return dict(zip(terms, torch.stack(log, 1)))


def learning_rate(epoch, epochs, lr):
    """A tenth from the 75th of 130 epochs on, again from the 90th (section 5.1)."""
    done = (epoch - 1) / epochs
    if done >= 89 / 130:
        return lr / 100
    if done >= 74 / 130:
        return lr / 10
    return lr


def main():
    args = parse_args()
    device = common.setup(args.device, args.amp)
    data = common.load_data(args.dataset, args.data_dir)
    x_train, y_train, x_val, y_val = common.hold_out(data, args.val_size, device)
    n, m = len(x_train), args.batch_size // WORLD
    if args.batch_size > n or args.batch_size % WORLD or m < 2:
        fail(f"--batch-size {args.batch_size}, --val-size {args.val_size}: an epoch of {n} images "
             f"needs one whole batch, and each of {WORLD} processes the same part, two or more")
    if args.ema == "image" and WORLD > 1:
        fail("--ema image: one process alone has all images' averages; leave out torchrun")
    args.classes, args.data = list(data.classes), common.fingerprint(data.x_train, data.y_train)

    torch.manual_seed(args.seed)
    model = common.make_model(args.arch, len(data.classes))
    model.to(device, memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    net = model
    if WORLD > 1:
        net = DistributedDataParallel(model)
        net.broadcast_buffers = False  # it would change batch norm's between a step's two passes
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay)
    # open: Algorithm 1 keeps no state per image, so slot i averages logits of different images
    past_adv = torch.zeros(n if args.ema == "image" else m, len(data.classes), device=device)
    past_nat = past_adv.clone()  # logit_0 = logit'_0 = 0
    history, folder = [], Path(args.run_dir)  # history: a row an epoch
    if state := common.open_run(args, device):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        past_adv.copy_(state["ema_adv"].chunk(WORLD)[RANK])
        past_nat.copy_(state["ema_nat"].chunk(WORLD)[RANK])
        history = state["history"]

    print0(f"{args.method} on {args.dataset}: {n:,} training, {len(x_val):,} validation, "
           f"{len(data.x_test):,} test images of {len(data.classes)} classes; {args.arch}\n"
           f"loss {args.margin_weight:g} L' + BCE + {args.lam:g} KL (1 - p_y) + "
           f"{args.beta:g} mHuber\n"
           f"{args.epochs} epochs, batch {args.batch_size}, lr {args.lr:g}, {device}; folder "
           f"{folder}, {len(history)} epochs done")
    begin, first = time.time(), len(history)
    for epoch in range(first + 1, args.epochs + 1):
        start = time.time()
        row = {"epoch": epoch, "lr": learning_rate(epoch, args.epochs, args.lr)}
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        batches = common.shuffled_batches(x_train, y_train, args.batch_size, args.seed, epoch)
        batches = common.progress(batches, n // args.batch_size, f"epoch {epoch}/{args.epochs}")
        log = train_epoch(model, net, optimizer, batches, past_adv, past_nat, args)
        for buffer in model.buffers():  # batch norm's statistics: each process saw other images
            if buffer.is_floating_point():
                common.all_sum(buffer).div_(WORLD)
        common.check_finite(model, log, epoch)
        row |= {term: common.all_sum(values.mean()).item() / WORLD for term, values in log.items()}
        row["images/s"] = n // args.batch_size * args.batch_size / (time.time() - start)
        if args.val_size:
            row["val clean"], row["val PGD-10"] = common.accuracy(
                model, x_val, y_val, args.epsilon, args.epsilon / 4, 10, m, args.amp, "validation")
        history.append(row)
        left = (time.time() - begin) / (epoch - first) * (args.epochs - epoch)
        print0("  ".join(f"{name} {value:.4g}" for name, value in row.items())
               + f"  left {timedelta(seconds=int(left))}")

        if RANK == 0:
            with open(folder / "metrics.csv", "w", newline="") as file:
                table = csv.DictWriter(file, row)
                table.writeheader()
                table.writerows(history)
        state = {"model": model.state_dict(), "args": vars(args), "epoch": epoch}
        if args.val_size and all(row["val PGD-10"] > r["val PGD-10"] for r in history[:-1]):
            common.save(lambda part: torch.save(state, part), folder / "best.pt")
        last = state | {"optimizer": optimizer.state_dict(), "history": history,
                        "ema_adv": common.all_rows(past_adv), "ema_nat": common.all_rows(past_nat)}
        common.save(lambda part: torch.save(last, part), folder / "last.pt")

    common.barrier()  # the checkpoints are written
    epsilon = args.epsilon or 8 / 255
    x, y = data.x_test.to(device), data.y_test.to(device)
    tested = None
    for name in ("last.pt", "best.pt") if args.val_size else ("last.pt",):
        state = torch.load(folder / name, map_location=device, weights_only=True)
        if state["epoch"] != tested:
            tested = state["epoch"]
            model.load_state_dict(state["model"])
            torch.manual_seed(args.seed)
            clean, robust = common.accuracy(model, x, y, epsilon, 1 / 255, 20, m, args.amp)
        print0(f"{name}: epoch {tested}, test accuracy {clean:.2f} % clean, {robust:.2f} % PGD-20, "
               f"epsilon {255 * epsilon:g}/255")
    x, y = common.to_float(x[:10]), y[:10]
    x_adv = common.pgd(model, x, lambda logits: F.cross_entropy(logits, y), epsilon, 1 / 255, 20)
    pictures = torch.cat([x, x_adv, 0.5 + (x_adv - x) / (2 * epsilon)])
    if RANK == 0:
        save_image(F.interpolate(pictures, scale_factor=4), folder / "examples.png", nrow=10)
    option = "" if epsilon == 8 / 255 else f" --epsilon {epsilon}"
    print0(f"{folder}/examples.png: natural, adversarial, their difference\n"
           f"next: python evaluate.py {quote(str(folder / name))}{option}")


if __name__ == "__main__":
    common.run(main, "with --resume")
