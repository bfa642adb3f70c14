"""Write the rows of study_curve_clinc150.yaml: 150 intents of questions to an assistant.

python recipes/smollm2/make_clinc_inputs.py data_full.json runs/curve

``data_full.json`` is CLINC150 as published (Larson et al., EMNLP 2019, D19-1131; github.com/clinc/oos-eval, CC-BY 3.0);
its rows that have none of the 150 intents are left out. The probes come from make_curve_inputs.py.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from make_curve_inputs import NUM_PROMPTS, SEED, write_task

from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.files import read_json

NUM_TRAIN = 1_200  # of which the study holds some out
NUM_TEST = 600


def main(source: Path, folder: Path) -> None:
    """Write training rows, test rows and the prompts on which KL to the base is measured."""
    # The splits `oos_*` hold the questions without an intent. `val` is not used.
    published = read_json(source)
    if not {"train", "test"} <= published.keys():
        raise UserError(f"{source} has no splits train and test; name data_full.json of CLINC150")
    train = [as_row(text, intent) for text, intent in published["train"]]
    test = [as_row(text, intent) for text, intent in published["test"]]
    rng = random.Random(SEED)
    rng.shuffle(train)
    rng.shuffle(test)

    # Leave out test rows that are training rows as well, so that no answer is known by heart.
    trained = {row["prompt"] for row in train}
    test = [row for row in test if row["prompt"] not in trained]
    train = train[: NUM_TRAIN + NUM_PROMPTS]
    write_task(folder, "clinc150", train, test[:NUM_TEST])


def as_row(text: str, intent: str) -> dict:
    """Return a prompt and the intent's name in words, the answer to be generated."""
    name = intent.replace("_", " ")
    return {
        "prompt": f"{text}\nIntent:",
        "completion": f" {name}",
        "answer": name,
    }


def command() -> None:
    """Write the rows of the file on the command line into its folder."""
    if len(sys.argv) != 3:
        sys.exit("usage: python recipes/smollm2/make_clinc_inputs.py data_full.json DIR")
    main(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    run_script(command)
