r"""Choose a mask for each prompt: that of the task whose prompts have the most similar hidden states in the base.

python examples/route_by_prompt.py my-model sums=sums_train.jsonl intents=intents_train.jsonl \
    --test sums=sums_test.jsonl intents=intents_test.jsonl

Each task is represented by the mean of its prompts' hidden states (last layer of the base, mean over tokens), centred
and normalised to length 1; a prompt goes to the nearest one. Files are JSON lines, also gzipped, with a column
``prompt``. The names are those to pass as ``adapter_names`` to ``model.generate`` (examples/serve_many.py).

Suffixes of tensors: B prompts of a batch, N prompts, T tokens, D hidden size, M tasks (one mask each).
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from maskft.data.sources import read_file
from maskft.models import load_model, load_tokenizer
from maskft_common.command_line import positive, run_script
from maskft_common.errors import UserError

BATCH_SIZE = 16


class Router:
    """Nearest mean of hidden states.

    Args:
        model: The base, in evaluation mode.
        tokenizer: Its tokenizer, with a padding token.
        prompts: Task -> prompts of its training rows; some dozens are enough.
    """

    def __init__(
        self,
        model,
        tokenizer,
        prompts: dict[str, list[str]],
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.names = list(prompts)

        means = [self.hidden(texts).mean(0) for texts in prompts.values()]
        means_MD = torch.stack(means)
        # A large part of a hidden state is the same for any text. Without subtracting it all cosines would be near 1.
        self.common_D = means_MD.mean(0)
        self.centroids_MD = torch.nn.functional.normalize(means_MD - self.common_D, dim=-1)

    @torch.inference_mode()
    def hidden(self, prompts: list[str]) -> Tensor:
        """Mean hidden state of each prompt, (N, D)."""
        found = []
        for start in range(0, len(prompts), BATCH_SIZE):
            texts = prompts[start : start + BATCH_SIZE]
            batch = self.tokenizer(texts, return_tensors="pt", padding=True).to(self.model.device)
            batch.pop("token_type_ids", None)  # some tokenizers return it, and decoders do not take it
            # `base_model` is the model without its head, so no logits are computed.
            hidden_BTD = self.model.base_model(**batch, use_cache=False).last_hidden_state

            # The mean over a prompt's own tokens, without its padding.
            weight_BT1 = batch["attention_mask"].unsqueeze(-1)
            sum_BD = (hidden_BTD * weight_BT1).sum(1)
            found.append(sum_BD / weight_BT1.sum(1))
        return torch.cat(found)

    def route(self, prompts: list[str]) -> list[str]:
        """The task of each prompt."""
        centred_ND = self.hidden(prompts) - self.common_D
        direction_ND = torch.nn.functional.normalize(centred_ND, dim=-1)
        cosine_NM = direction_ND @ self.centroids_MD.T
        nearest_N = cosine_NM.argmax(-1)
        return [self.names[index] for index in nearest_N.tolist()]


def read_prompts(file: str, limit: int) -> list[str]:
    """The first prompts of a file; at least one."""
    prompts = []
    for place, row in islice(read_file(Path(file)), limit):
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f"{file}, {place}: no text in a column 'prompt'")
        prompts.append(row["prompt"])
    if not prompts:
        raise UserError(f"{file} has no rows; some dozens are enough")
    return prompts


def name_and_file(text: str) -> tuple[str, str]:
    """Parse an argument ``NAME=FILE``."""
    name, separator, file = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE")
    return name, file


def main() -> None:
    """Learn the tasks' means, and route test prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="base model, a folder or a hub name")
    parser.add_argument("train", nargs="+", type=name_and_file, metavar="NAME=FILE", help="prompts of each task")
    parser.add_argument(
        "--test", nargs="+", default=[], type=name_and_file, metavar="NAME=FILE", help="prompts to route"
    )
    parser.add_argument("--limit", type=positive, default=64, help="prompts of a file that are read (default: 64)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="dtype of the weights; auto: as they are stored (default: float32)",
    )
    args = parser.parse_args()

    # All files before the model, which takes longer to load.
    prompts = {}
    for name, file in args.train:
        if name in prompts:
            raise UserError(f"two files of the task {name}: name one, or give the other another name")
        prompts[name] = read_prompts(file, args.limit)
    tests = [(name, read_prompts(file, args.limit)) for name, file in args.test]
    for name, _ in tests:
        if name not in prompts:
            raise UserError(f"--test {name}: no such task; there are {', '.join(prompts)}")

    # The base alone, without any mask: a mask would have to be chosen before the prompt is read.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(args.base, args.dtype).to(device).eval()
    tokenizer = load_tokenizer(args.base)
    router = Router(model, tokenizer, prompts)

    num_right = 0
    num_routed = 0
    for name, test_prompts in tests:
        routed = router.route(test_prompts)
        num_right_here = routed.count(name)
        num_right += num_right_here
        num_routed += len(routed)
        print(f"{name}: {num_right_here} of {len(routed)} prompts go to {name}")
    if num_routed:
        print(f"all: {num_right} of {num_routed}")


if __name__ == "__main__":
    run_script(main)
