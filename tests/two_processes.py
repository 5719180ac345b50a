"""What test_training.py runs in two processes at once, with torchrun's environment variables.

    python two_processes.py <folder for the runs> <options of the scripts>

Each process leaves what it saw in rank<RANK>.json.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common  # noqa: E402
import train_at_ours  # noqa: E402
import train_lma_at  # noqa: E402
import train_mart_ours  # noqa: E402
import train_trades_ours  # noqa: E402
from common import RANK, dist  # noqa: E402

SCRIPTS = [train_lma_at, train_at_ours, train_trades_ours, train_mart_ours]
folder, options = Path(sys.argv[1]), sys.argv[2:]
device = common.setup("cpu")
common.setup = lambda name: device  # the processes are joined
seen = {"status": {}, "files": {}}
load_data, augment = common.load_data, common.augment


def main(script, run, *more):
    """The script's status, 130 after Ctrl-C."""
    sys.argv = [script.METHOD, *options, "--run-dir", str(folder / run), *more]
    try:
        script.main()
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return stop.code
    return 0


def load_in_order(name, data_dir, split):
    """Process 0 leaves a file after it has loaded a split."""
    seen["files"][split] = sorted(path.name for path in folder.glob("loaded*"))
    data = load_data(name, data_dir, split)
    if RANK == 0:
        (folder / f"loaded {split}").touch()
    return data


def interrupted(x):
    """Ctrl-C in the fourth step."""
    interrupted.steps += 1
    if interrupted.steps == 4:
        raise KeyboardInterrupt
    return augment(x)


# process 0 downloads; a run is interrupted before its fourth epoch and resumed
common.load_data, common.augment, interrupted.steps = load_in_order, interrupted, 0
dist.barrier()
seen["status"]["interrupted"] = main(train_lma_at, "lma_at")
common.load_data, common.augment = load_data, augment
for script in SCRIPTS:
    seen["status"][script.METHOD] = main(script, script.METHOD, "--resume")

# what is refused by both: batches of unequal parts, an average per image, and a last.pt that
# process 1 does not see
seen["status"]["parts"] = main(train_lma_at, "parts", "--batch-size", "23")
seen["status"]["image"] = main(train_lma_at, "image", "--ema", "image")
unseen = "lma_at" if RANK == 0 else "elsewhere"
seen["status"]["unseen"] = main(train_lma_at, unseen, "--resume")
(folder / f"rank{RANK}.json").write_text(json.dumps(seen))

# process 1 does not find its data: process 0 does not wait for it
sys.exit(main(train_lma_at, "fails", *["--data-dir", "nowhere"][: 2 * RANK]))
