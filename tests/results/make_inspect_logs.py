"""Write the files of ``tests/results/inspect`` with inspect-ai and its mock model: ``python THIS FOLDER``.

The logs are as inspect-ai writes them. It takes names of files relative to where it runs, so run it outside of a
repository, in a folder that anyone may know of.
"""

import os
import sys
from collections import defaultdict
from pathlib import Path

from inspect_ai import Task, eval
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageUser, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import match
from inspect_ai.solver import generate

NUM_ITEMS = 5
EPOCHS = 2
# Of each sum, which of its epochs a model gets right.
RIGHT = {
    "base": [(1, 1), (0, 0), (0, 1), (0, 0), (1, 0)],
    "tuned": [(1, 1), (0, 1), (1, 1), (0, 0), (1, 1)],
}


def sums() -> Task:
    """Sums, two on each passage, every other one asked in a message."""
    samples = []
    for index in range(NUM_ITEMS):
        question = f"{index} + {index + 3} = ?"
        prompt = [ChatMessageUser(content=question)] if index % 2 else question
        samples.append(Sample(input=prompt, target=str(2 * index + 3), metadata={"passage": f"p{index // 2}"}))
    return Task(dataset=MemoryDataset(samples), solver=generate(), scorer=match(), name="sums", version=1)


def answers(model: str):
    """Return what the mock model says, epoch after epoch of each question."""
    asked: dict[str, int] = defaultdict(int)

    def answer(messages, tools, tool_choice, config) -> ModelOutput:
        question = messages[-1].text
        index, epoch = int(question.split()[0]), asked[question]
        asked[question] += 1
        is_right = RIGHT[model][index][epoch]
        output = ModelOutput.from_content(f"mockllm/{model}", str(2 * index + 3 if is_right else 0))
        output.usage = ModelUsage()  # otherwise tokens are counted, for which a vocabulary is downloaded
        return output

    return answer


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True)
    os.chdir(target)
    for name in RIGHT:
        mock = get_model(f"mockllm/{name}", custom_outputs=answers(name), memoize=False)
        (found,) = eval(
            sums(),
            model=mock,
            epochs=EPOCHS,
            max_tokens=16,
            temperature=0.7,
            max_connections=1,
            log_dir="logs",
            log_format="eval",
            display="none",
        )
        assert found.status == "success" and found.location, found.status
        Path(found.location.removeprefix("file://")).rename(f"{name}.eval")
    Path("logs").rmdir()
