"""Vanilla AT + Ours: adversarial training with the margin loss and the logit moving averages (eq. 15).

    python train_at_ours.py --dataset cifar10
    python train_at_ours.py --dataset cifar10 --attack-loss ce --margin-weight 0 --beta 0  # vanilla AT (eq. 14)

minimises  L' + CE(p(x'), y) + beta * mHuber(logit'_t, logit_t, alpha)  where x' is found by PGD on L' + CE and
logit'_t, logit_t are moving averages over the iterations of the adversarial and of the natural logits.
Defaults are the paper's (section 5.1).
"""
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F

import common
from common import number


def parse_args():
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--dataset", default="cifar10", choices=common.DATASETS, help="what to train on")
    add("--data-dir", default="data", help="where the data set is or is downloaded to")
    add("--arch", default="resnet18", help="resnet18 or wrn-<depth>-<widen>; the paper's are resnet18 and wrn-34-10")
    add("--epochs", type=number(1, kind=int), default=130, help="passes over the training images")
    add("--batch-size", type=number(2, kind=int), default=100, help="over all processes")
    add("--lr", type=number(0), default=0.01, help="divided by ten after 74/130 and again after 89/130 of the epochs")
    add("--weight-decay", type=number(0), default=3.5e-3, help="of SGD, momentum 0.9")
    # the inner maximisation: x'
    add("--epsilon", type=number(0, 1), default="8/255", help="radius; 0: natural training, no attack is computed")
    add("--step-size", type=number(0, 1), default="2/255", help="of PGD")
    add("--steps", type=number(1, kind=int), default=10, help="of PGD")
    add("--attack-loss", default="margin+ce", choices=["margin+ce", "ce"], help="what PGD maximises")
    # the outer minimisation: the weights
    add("--delta", type=number(0), default=0.9, help="margin of L' (eq. 13)")
    add("--margin-reduction", default="mean", choices=["mean", "sum"], help="over the classes in L'; sum as printed")
    add("--margin-weight", type=number(0), default=1.0, help="of L' in the training loss; 0 removes it")
    add("--alpha", type=number(1e-3), help="of mHuber (default 2.345 with a WRN, 6.345 on tinyimagenet, else 5.345)")
    add("--beta", type=number(0), help="weight of mHuber (default 96 on cifar100 and tinyimagenet, else 86)")
    add("--tau", type=number(0, 0.999999), default=0.2, help="moving average of the logits; 0: none")
    # the run
    add("--val-size", type=number(0, kind=int), default=1000, help="training images held out to choose best.pt")
    add("--seed", type=number(0, kind=int), default=0, help="of weights, order, augmentation and attack")
    add("--device", default="auto", help="cuda, cpu, ...; auto: cuda if there is one")
    add("--amp", action="store_true", help="networks in bfloat16")
    add("--compile", action="store_true", help="torch.compile the networks")
    add("--run-dir", help="default runs/<dataset>-<arch>-<method>-seed<n>")
    add("--resume", action="store_true", help="continue the run in the run folder, if there is one")
    args = parser.parse_args()
    args.method = Path(__file__).stem.removeprefix("train_")
    args.run_dir = args.run_dir or f"runs/{args.dataset}-{args.arch}-{args.method}-seed{args.seed}"
    if args.alpha is None:
        args.alpha = 2.345 if args.arch.startswith("wrn") else 6.345 if args.dataset == "tinyimagenet" else 5.345
    if args.beta is None:
        args.beta = 96 if args.dataset in ("cifar100", "tinyimagenet") else 86
    return args


def margin_loss(logits, y, args):
    """L' (eq. 13): the squared hinge sum_{j != y} max(0, f_j - f_y + delta)^2, averaged over the batch."""
    loss = F.multi_margin_loss(logits, y, p=2, margin=args.delta)
    return loss * logits.shape[1] if args.margin_reduction == "sum" else loss  # open: torch divides eq. 13 by C


def attack_loss(logits_adv, y, args):
    """What the search for x' maximises: L' + CE (Algorithm 1)."""
    loss = F.cross_entropy(logits_adv, y)
    return margin_loss(logits_adv, y, args) + loss if args.attack_loss == "margin+ce" else loss


def objective(logits_adv, logits_nat, y, ema_adv, ema_nat, args):
    """The terms of eq. 15, weighted: their sum is what the weights minimise. A term of weight 0 is left out."""
    terms = {}
    if args.margin_weight:
        terms["L'"] = args.margin_weight * margin_loss(logits_adv, y, args)
    terms["CE"] = F.cross_entropy(logits_adv, y)
    if args.beta:
        terms["mHuber"] = args.beta * common.mhuber(ema_adv, ema_nat, args.alpha)
    return terms


def train_epoch(net, attack_net, optimizer, x_train, y_train, batches, ema_adv, ema_nat, args, text=""):
    """Algorithm 1 over `batches` (indices [steps, m]). Returns the moving averages [m, C] and the terms by step."""
    log = []
    for batch in common.progress(batches, text):
        x, y = common.augment(x_train[batch]), y_train[batch]

        # x' = argmax L' + CE, PGD in eval mode
        x_adv = x
        if args.epsilon:
            attack_net.refresh()
            x_adv = common.pgd(attack_net, x, lambda logits: attack_loss(logits, y, args),
                               args.epsilon, args.step_size, args.steps)

        logits_nat = net(x) if args.beta else None
        logits_adv = net(x_adv)

        # logit_t <- tau logit_{t-1} + (1 - tau) f(x); logit_{t-1} is a constant to the gradient
        if args.beta:
            ema_adv = args.tau * ema_adv.detach() + (1 - args.tau) * logits_adv
            ema_nat = args.tau * ema_nat.detach() + (1 - args.tau) * logits_nat

        terms = objective(logits_adv, logits_nat, y, ema_adv, ema_nat, args)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        log.append(torch.stack([term.detach() for term in terms.values()]))  # read once an epoch: no waiting here
    return ema_adv.detach(), ema_nat.detach(), dict(zip(terms, torch.stack(log).T))


def learning_rate(epoch, args):
    """Divided by ten at the 75th and again at the 90th of 130 epochs (section 5.1), at the same fractions of others."""
    return args.lr / 10 ** sum(130 * (epoch - 1) >= args.epochs * done for done in (74, 89))


def main():
    args = parse_args()
    device = common.setup(args.device)
    data = common.load_data(args.dataset, args.data_dir)
    x_train, y_train, x_val, y_val = common.hold_out(data, args, device)

    common.start_epoch(1, 1, args.seed, 0)  # seeds the initial weights
    model = common.make_model(args.arch, data.num_classes).to(device, memory_format=torch.channels_last).train()
    folded = common.fold_batchnorm(model)
    net, attack_net = common.accelerate(model, args, parallel=True), common.accelerate(folded, args)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    # open: slot i of the moving average belongs to the i-th image of every batch, whichever image that is
    ema_adv = ema_nat = torch.zeros(args.batch_size // common.WORLD, data.num_classes, device=device)
    history, folder = [], Path(args.run_dir)
    if state := common.open_run(args, device):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema_adv, ema_nat = (state[k].chunk(common.WORLD)[common.RANK] for k in ("ema_adv", "ema_nat"))
        history = state["history"]

    parameters = sum(p.numel() for p in model.parameters())
    common.say(
        f"{args.method} on {args.dataset}: {len(x_train):,} training, {len(x_val):,} validation, {len(data.x_test):,} test "
        f"images {'x'.join(map(str, x_train.shape[1:]))}, {data.num_classes} classes\n"
        f"{args.arch}, {parameters:,} parameters, on {device}" + f" x {common.WORLD}" * (common.WORLD > 1) + "\n"
        f"attack on {args.attack_loss}: epsilon {255 * args.epsilon:g}/255, {args.steps} steps of "
        f"{255 * args.step_size:g}/255\n"
        f"loss {args.margin_weight:g} L' + CE + {args.beta:g} mHuber; "
        f"L' {args.margin_reduction} over classes, delta {args.delta:g}, alpha {args.alpha:g}, tau {args.tau:g}\n"
        f"run folder {folder}, {len(history)} of {args.epochs} epochs done")

    begin, first = time.time(), len(history)
    for epoch in range(first + 1, args.epochs + 1):
        start = time.time()
        lr = learning_rate(epoch, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = common.start_epoch(len(x_train), args.batch_size, args.seed, epoch).to(device)
        ema_adv, ema_nat, log = train_epoch(net, attack_net, optimizer, x_train, y_train, batches, ema_adv, ema_nat,
                                            args, f"epoch {epoch}/{args.epochs}")
        row = {"epoch": epoch, "lr": lr} | common.read_log(log, epoch)
        row["images/s"] = batches.numel() * common.WORLD / (time.time() - start)
        common.average_statistics(model)
        folded.refresh()
        if args.val_size:
            score = common.accuracy(folded, x_val, y_val, args.epsilon, args.epsilon / 4, 10)
            row["val clean"], row["val PGD-10"] = score
        history.append(row)

        rows = [history[0], *(row.values() for row in history)]  # last.pt is written last: what it lacks is done again
        common.save("".join(",".join(map(str, row)) + "\n" for row in rows), folder / "metrics.csv")
        state = {"model": model.state_dict(), "args": vars(args), "num_classes": data.num_classes, "epoch": epoch}
        if args.val_size and row["val PGD-10"] > max((r["val PGD-10"] for r in history[:-1]), default=-1):
            common.save(state, folder / "best.pt")
        common.save(state | {"optimizer": optimizer.state_dict(), "ema_adv": common.all_slots(ema_adv),
                             "ema_nat": common.all_slots(ema_nat), "history": history}, folder / "last.pt")
        left = timedelta(seconds=int((time.time() - begin) / (epoch - first) * (args.epochs - epoch)))
        common.say(f"epoch {epoch}/{args.epochs}  " + "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "epoch")
                   + f"  left {left}")

    common.report(model, folded, data, args, device)


if __name__ == "__main__":
    common.run(main, "--resume")
