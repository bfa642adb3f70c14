r"""Share of right answers that llama.cpp gives with a GGUF file, greedy, exact match.

python recipes/qwen25_05b/answer.py runs/qwen-intents/intents-q4_k_m.gguf runs/curve/banking77_test.jsonl.gz \
    --num_rows 200 --output answers.json

Needs the extra ``gguf``. Rows have ``prompt`` and ``answer``; the prompt is given as it is, without a chat template, as
in training with ``--as_chat false``.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from maskft.data.sources import read_file
from maskft_common.command_line import positive, run_script
from maskft_common.errors import UserError
from maskft_common.files import write_text

if TYPE_CHECKING:
    import xllamacpp

MAX_NEW_TOKENS = 12


def serve(file: Path, num_threads: int) -> xllamacpp.Server:
    """A llama.cpp server of one slot in this process."""
    # Here, so that --help and a wrong path need no extra.
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = 512  # prompt and answer are far shorter
    params.n_parallel = 1
    params.cpuparams.n_threads = num_threads
    return xllamacpp.Server(params)


def answer(server: xllamacpp.Server, prompt: str) -> str:
    """The first line of a greedy answer."""
    request = {
        "prompt": prompt,
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
    }
    completion = server.handle_completions(request)
    text = completion["choices"][0]["text"].strip()
    if not text:
        return ""
    return text.splitlines()[0].strip()


def main() -> None:
    """Ask all rows and print how many are right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="GGUF file")
    parser.add_argument("rows", type=Path, help="JSON lines, maybe gzipped")
    parser.add_argument("--num_rows", type=positive, default=200, help="first rows to ask (default: %(default)s)")
    parser.add_argument("--num_threads", type=positive, default=1, help="of llama.cpp (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="JSON file to write every answer to")
    args = parser.parse_args()
    if not args.gguf.is_file():
        raise UserError(f"{args.gguf} is no file; name a GGUF file")

    rows = []
    for place, row in islice(read_file(args.rows), args.num_rows):
        if not {"prompt", "answer"} <= row.keys():
            raise UserError(f"{args.rows}, {place}: no columns 'prompt' and 'answer'")
        rows.append(row)
    if not rows:
        raise UserError(f"{args.rows} has no rows")
    server = serve(args.gguf, args.num_threads)
    started = time.perf_counter()
    answers = [answer(server, row["prompt"]) for row in rows]
    seconds = time.perf_counter() - started

    # 1 for a right answer, 0 for a wrong one: from these a paired interval can be computed.
    right = []
    for found, row in zip(answers, rows, strict=True):
        is_right = found == row["answer"]
        right.append(int(is_right))
    accuracy = sum(right) / len(rows)
    print(f"{args.gguf.name}: {sum(right)} of {len(rows)} right ({accuracy:.1%}) in {seconds:.0f} s")
    if args.output is not None:
        content = {
            "file": args.gguf.name,
            "answers": answers,
            "right": right,
            "accuracy": accuracy,
        }
        write_text(args.output, json.dumps(content) + "\n")


if __name__ == "__main__":
    run_script(main, extra="gguf")
