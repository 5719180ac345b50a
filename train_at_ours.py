"""Vanilla AT + Ours: adversarial training with the margin loss and logit moving averages (eq. 15).

    python train_at_ours.py --dataset cifar10
    python train_at_ours.py --attack-loss ce --margin-weight 0 --beta 0  # vanilla AT (eq. 14)

minimises  L' + CE(p(x'), y) + beta * mHuber(logit'_t, logit_t, alpha)
where L' is the margin loss (eq. 13) of x', found by PGD on L' + CE, and logit'_t, logit_t are
moving averages of the adversarial and natural logits over the iterations. Defaults are the paper's
(section 5.1); --dataset shapes alone is a demonstration for a CPU.
"""

import argparse
import time
from datetime import timedelta
from functools import partial

import torch
import torch.nn.functional as F

import common
from common import RANK, WORLD, mhuber, radius

METHOD = "at_ours"


def parse_args():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description=__doc__,
        formatter_class=common.Help,
        add_help=False,
    )
    add = parser.add_argument
    add("--dataset", default="cifar10", choices=common.DATASETS, help="images to train on")
    add("--data-dir", default="data", help="where the data set is, or is downloaded to")
    add("--arch", default="resnet18", help="network: resnet18 or wrn-<depth>-<widen>")
    add("--epochs", type=int, default=130, help="passes over the training images")
    add("--batch-size", type=int, default=100, help="images in a step, over all processes")
    add("--lr", type=float, default=0.01, help="learning rate; it drops, see learning_rate()")
    add("--weight-decay", type=float, default=3.5e-3, help="weight decay of SGD")
    # the inner maximisation: x'
    add("--epsilon", type=radius, default="8/255", help="radius; 0 trains on the natural images")
    add("--step-size", type=radius, default="2/255", help="PGD step size")
    add("--steps", type=int, default=10, help="number of PGD steps")
    add("--attack-loss", default="margin+ce", choices=["margin+ce", "ce"], help="loss of PGD")
    # the outer minimisation: the weights
    add("--delta", type=float, default=0.9, help="margin of L' (eq. 13)")
    add("--margin-reduction", default="mean", choices=["mean", "sum"], help="of L' over classes")
    add("--margin-weight", type=float, default=1.0, help="weight of L' in the loss")
    add("--alpha", type=float, help="alpha of mHuber")
    add("--beta", type=float, help="weight of mHuber")
    add("--tau", type=radius, default=0.2, help="weight of the past logits, 0 <= tau < 1")
    add("--ema", default="slot", choices=["slot", "image"], help="one average per slot or image")
    # the run
    add("--val-size", type=int, default=1000, help="images that choose best.pt; 0: the last epoch")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cuda, cuda:1, cpu, ...")
    add("--amp", action="store_true", help="compute the networks in bfloat16")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--run-dir", help="folder of the run; None: one in runs/ that the options name")
    add("--resume", action="store_true", help="continue the run in its folder, if there is one")
    # defaults that depend on --dataset and --arch (section 5.1)
    if parser.parse_known_args()[0].dataset == "shapes":
        parser.set_defaults(arch="wrn-10-1", epochs=3, batch_size=50, lr=0.05, val_size=500)
    given = parser.parse_known_args()[0]
    alpha = 6.345 if given.dataset == "tinyimagenet" else 5.345
    if given.arch.startswith("wrn"):
        alpha = 2.345
    beta = 96.0 if given.dataset in ("cifar100", "tinyimagenet") else 86.0
    parser.set_defaults(alpha=alpha, beta=beta)
    add("-h", "--help", action="help", help="show this, with the defaults for --dataset and --arch")
    args = parser.parse_args()
    common.name_run(parser, args, METHOD)
    return args


def margin_loss(logits, y, delta, reduction="mean"):
    """L' (eq. 13) of logits [N, C]: sum_{j != y} max(0, f_j - f_y + delta)^2, batch average.

    open: eq. 13 as printed is the "sum", with which training diverged. "mean" divides it by C, as
    torch's loss does, in whose words section 4.2 introduces L'.
    """
    loss = F.multi_margin_loss(logits, y, p=2, margin=delta)
    return loss * {"mean": 1, "sum": logits.shape[1]}[reduction]


def attack_loss(logits_adv, y, args):
    """What the search for x' maximises: L' + CE (section 4.4), or CE alone."""
    loss = F.cross_entropy(logits_adv, y)
    if args.attack_loss == "margin+ce":
        loss = margin_loss(logits_adv, y, args.delta, args.margin_reduction) + loss
    return loss


def train_epoch(model, optimizer, batches, past_adv, past_nat, args):
    """Algorithm 1 over `batches` of (images, labels, index). Returns the mean of each term.

    past_adv and past_nat [slots or images, C] are logit'_{t-1} and logit_{t-1}, updated in place.
    """
    terms = []
    model.train()
    for x, y, index in batches:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=args.amp):
            # x', by PGD (eq. 2)
            x_adv = x
            if args.epsilon:
                g = partial(attack_loss, y=y, args=args)
                x_adv = common.pgd(model, x, g, args.epsilon, args.step_size, args.steps)
            # f(x), only for mHuber, and f(x')
            logits_nat = model(x).to(x.dtype) if args.beta else None
            logits_adv = model(x_adv).to(x.dtype)

        # logit_t <- tau * logit_{t-1} + (1 - tau) * f(x), with the past as a constant
        huber = x.new_zeros(())
        if args.beta:
            slot = index if args.ema == "image" else slice(None)
            ema_adv = args.tau * past_adv[slot] + (1 - args.tau) * logits_adv
            ema_nat = args.tau * past_nat[slot] + (1 - args.tau) * logits_nat
            past_adv[slot] = ema_adv.detach()
            past_nat[slot] = ema_nat.detach()
            huber = mhuber(ema_adv, ema_nat, args.alpha)

        # eq. 15
        margin = margin_loss(logits_adv, y, args.delta, args.margin_reduction)
        ce = F.cross_entropy(logits_adv, y)
        loss = ce + args.margin_weight * margin + args.beta * huber

        optimizer.zero_grad()
        loss.backward()
        common.average(weight.grad for weight in model.parameters())  # over torchrun's processes
        optimizer.step()
        terms.append(torch.stack([margin, ce, huber]).detach())  # .item() would wait for a GPU
    return dict(zip(("L'", "CE", "mHuber"), torch.stack(terms).mean(0), strict=True))


def learning_rate(epoch, epochs, lr):
    """A tenth from the 75th of 130 epochs on, a hundredth from the 90th (section 5.1).

    open: the paper gives no factor for the second drop; ten, as for the first. With
    other --epochs the rate drops after the same fractions of them.
    """
    done = (epoch - 1) / epochs
    if done >= 89 / 130:
        return lr / 100
    if done >= 74 / 130:
        return lr / 10
    return lr


def main():
    args = parse_args()
    device = common.setup(args.device)
    torch.backends.cudnn.benchmark = True

    # the data, the training images on the device
    train, test = common.load_splits(args)
    x_train, y_train, x_val, y_val = common.hold_out(train, args, device)
    n, m, classes = len(x_train), args.batch_size // WORLD, len(train.classes)

    # the network, the optimiser, the moving averages
    torch.manual_seed(args.seed)
    model = common.make_model(args.arch, classes).to(device, memory_format=torch.channels_last)
    if args.compile:
        model.compile(mode="reduce-overhead")
    optimizer = torch.optim.SGD(model.parameters(), args.lr, 0.9, weight_decay=args.weight_decay)
    # open: Algorithm 1 keeps no state per image: slot i averages the i-th image of all batches
    past_adv = torch.zeros(n if args.ema == "image" else m, classes, device=device)
    past_nat = torch.zeros_like(past_adv)  # logit_0 = logit'_0 = 0

    history, best = common.open_run(args, model, optimizer, past_adv, past_nat)
    print(
        f"{args.name} on {args.dataset}, {args.arch}: {n:,} training, {len(x_val):,} validation, "
        f"{len(test.x):,} test images of {classes} classes\n"
        f"loss CE + {args.margin_weight:g} L' + {args.beta:g} mHuber\n"
        f"delta {args.delta:g}, alpha {args.alpha:g}, tau {args.tau:g}; x' by {args.attack_loss}, "
        f"{args.steps} steps of {255 * args.step_size:g}/255, epsilon {255 * args.epsilon:g}/255\n"
        f"{args.epochs} epochs on {device}, {len(history)} done; folder {args.run_dir}",
        flush=True,
    )

    for epoch in range(len(history) + 1, args.epochs + 1):
        # train
        start = time.time()
        row = {"epoch": epoch, "lr": learning_rate(epoch, args.epochs, args.lr)}
        for group in optimizer.param_groups:
            group["lr"] = row["lr"]
        batches = common.shuffled_batches(x_train, y_train, args.batch_size, args.seed, epoch)
        batches = common.progress(batches, n // args.batch_size, f"epoch {epoch}/{args.epochs}")
        terms = train_epoch(model, optimizer, batches, past_adv, past_nat, args)
        common.average([*model.buffers(), *terms.values()])
        common.check_finite(model, terms, epoch)
        row |= {name: term.item() for name, term in terms.items()}
        row["images/s"] = n // args.batch_size * args.batch_size / (time.time() - start)
        averages = common.all_rows(past_adv), common.all_rows(past_nat)
        if RANK > 0:
            continue  # process 0 validates, saves and prints, the others begin the next epoch

        # validate
        if args.val_size:
            row["val clean"], row["val PGD-10"] = common.accuracy(
                model, x_val, y_val, args.epsilon, args.epsilon / 4, 10, m, args.amp
            )
        history.append(row)
        best = common.save_epoch(args, history, best, model, optimizer, *averages)
        left = timedelta(seconds=int((time.time() - start) * (args.epochs - epoch)))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
        print(f"{shown}  left {left}", flush=True)

    if RANK == 0:
        common.finish_run(model, best, test, args, device)


if __name__ == "__main__":
    common.run(main, " with --resume")
