r"""Choose a mask for each prompt without labels: the task whose prompts look most like it to the base.

python examples/route_by_prompt.py my-model sums=sums_train.jsonl intents=intents_train.jsonl \
    --test sums=sums_test.jsonl intents=intents_test.jsonl

A task is the mean of its prompts' hidden states (last layer of the base, mean over tokens, centred and of length 1); a
prompt goes to the nearest one. Files are JSON lines, also gzipped, with a column ``prompt``. The names are those for
``adapter_names`` of ``model.generate`` (examples/serve_many.py).
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from maskft.data.sources import read_file
from maskft.models import load_model, load_tokenizer

BATCH_SIZE = 16


class Router:
    """Nearest mean of hidden states.

    Args:
        model: The base, in evaluation mode.
        tokenizer: Its tokenizer, with a padding token.
        prompts: Task -> prompts of its training rows; some dozens are enough.
    """

    def __init__(self, model, tokenizer, prompts: dict[str, list[str]]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.names = list(prompts)
        means_MD = torch.stack([self.hidden(texts).mean(0) for texts in prompts.values()])
        # A large part of a hidden state is the same for any text; without it, tasks differ more.
        self.common_D = means_MD.mean(0)
        self.centroids_MD = torch.nn.functional.normalize(means_MD - self.common_D, dim=-1)

    @torch.inference_mode()
    def hidden(self, prompts: list[str]) -> Tensor:
        """Mean hidden state of each prompt, (N, D)."""
        found = []
        for start in range(0, len(prompts), BATCH_SIZE):
            batch = self.tokenizer(prompts[start : start + BATCH_SIZE], return_tensors="pt", padding=True)
            batch.pop("token_type_ids", None)
            hidden_BTD = self.model.base_model(**batch, use_cache=False).last_hidden_state
            weight_BT1 = batch["attention_mask"].unsqueeze(-1)
            found.append((hidden_BTD * weight_BT1).sum(1) / weight_BT1.sum(1))
        return torch.cat(found)

    def route(self, prompts: list[str]) -> list[str]:
        """The task of each prompt."""
        direction_ND = torch.nn.functional.normalize(self.hidden(prompts) - self.common_D, dim=-1)
        nearest_N = (direction_ND @ self.centroids_MD.T).argmax(-1)
        return [self.names[place] for place in nearest_N.tolist()]


def read_prompts(file: str, limit: int) -> list[str]:
    """The first prompts of a file."""
    return [row["prompt"] for _, row in islice(read_file(Path(file)), limit)]


def main() -> None:
    """Learn the tasks' means, and route test prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="base model, a folder or a hub name")
    parser.add_argument("train", nargs="+", metavar="NAME=FILE", help="prompts of each task")
    parser.add_argument("--test", nargs="+", default=[], metavar="NAME=FILE", help="prompts to route")
    parser.add_argument("--limit", type=int, default=64, help="prompts of a file that are read (default: 64)")
    args = parser.parse_args()

    files = dict(pair.split("=", 1) for pair in args.train)
    model = load_model(args.base).eval()
    router = Router(
        model, load_tokenizer(args.base), {name: read_prompts(file, args.limit) for name, file in files.items()}
    )

    num_right = 0
    num_routed = 0
    for name, file in (pair.split("=", 1) for pair in args.test):
        routed = router.route(read_prompts(file, args.limit))
        num_right += routed.count(name)
        num_routed += len(routed)
        print(f"{name}: {routed.count(name)} of {len(routed)} prompts go to {name}")
    if num_routed:
        print(f"all: {num_right} of {num_routed}")


if __name__ == "__main__":
    main()
