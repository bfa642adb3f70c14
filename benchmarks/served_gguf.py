"""Tokens per second of llama.cpp: a GGUF base, the same with a mask merged, the base with a GGUF LoRA of rank 16.

python -m benchmarks.served_gguf base.gguf runs/mask [--num_threads 1] [--rounds 5]

Needs the extra ``gguf``. The LoRA has random values, which cost as much as learned ones; it covers all linear layers of
the blocks, as QLoRA does, in float16. Rounds alternate, so that a busy machine slows all three alike; printed are the
medians of each round's ratio to the base, and the bytes of the files to distribute.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from maskft.masks.gguf import merge_into_gguf
from maskft_common.command_line import positive, run_script
from maskft_common.errors import UserError
from maskft_common.layout import ADAPTER_WEIGHTS, holds_adapter, no_adapter

if TYPE_CHECKING:
    import xllamacpp

RANK = 16
LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
PROMPT = "Write a long story about a bank and its customers."


def write_lora(base: Path, file: Path) -> Path:
    """Write a LoRA of random values for a GGUF base, in llama.cpp's format."""
    # Here as all packages of the extra, so that --help and a wrong path do without.
    import gguf

    reader = gguf.GGUFReader(base)
    # The last part of a field is its value; a text is an array of bytes.
    architecture_bytes = reader.fields["general.architecture"].parts[-1]
    architecture = str(bytes(architecture_bytes), "utf-8")
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 2.0 * RANK)
    generator = np.random.default_rng(0)
    for tensor in reader.tensors:
        # Such as blk.0.attn_q.weight.
        kind = tensor.name.split(".")[-2]
        if kind not in LINEAR or not tensor.name.endswith(".weight"):
            continue
        # The reader gives the sizes in ggml's order: inputs first.
        num_inputs, num_outputs = (int(size) for size in tensor.shape)
        a_RI = generator.normal(0, 1e-3, (RANK, num_inputs)).astype(np.float16)
        b_OR = generator.normal(0, 1e-3, (num_outputs, RANK)).astype(np.float16)
        writer.add_tensor(f"{tensor.name}.lora_a", a_RI)
        writer.add_tensor(f"{tensor.name}.lora_b", b_OR)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def serve(
    file: Path,
    num_threads: int,
    lora: Path | None = None,
) -> xllamacpp.Server:
    """A server of one slot."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = 512
    params.n_parallel = 1
    params.cpuparams.n_threads = num_threads
    # llama.cpp computes the adapter's product beside the base's in every layer.
    if lora is not None:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path = str(lora)
        adapter.scale = 1.0
        params.lora_adapters = [adapter]
    return xllamacpp.Server(params)


def tokens_per_s(server: xllamacpp.Server, num_tokens: int) -> float:
    """Speed of one greedy answer; the prompt is a small part of it."""
    request = {
        "prompt": PROMPT,
        "max_tokens": num_tokens,
        "temperature": 0,
        # All rounds do the same work: no answer ends early, and no prompt is remembered.
        "ignore_eos": True,
        "cache_prompt": False,
    }
    started = time.perf_counter()
    answer = server.handle_completions(request)
    seconds = time.perf_counter() - started
    return answer["usage"]["completion_tokens"] / seconds


def main() -> None:
    """Serve all three and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="GGUF file")
    parser.add_argument("mask", type=Path, help="adapter folder of a mask over it")
    parser.add_argument("--num_threads", type=positive, default=1, help="of llama.cpp (default: %(default)s)")
    parser.add_argument(
        "--rounds",
        type=positive,
        default=5,
        help="answers of each of the three (default: %(default)s)",
    )
    parser.add_argument("--num_tokens", type=positive, default=64, help="of an answer (default: %(default)s)")
    args = parser.parse_args()
    if not args.base.is_file():
        raise UserError(f"{args.base} is no file; name a GGUF file")
    if not holds_adapter(args.mask):
        raise no_adapter(args.mask)

    with tempfile.TemporaryDirectory() as folder:
        task = Path(folder) / "task.gguf"
        merge_into_gguf(args.mask, args.base, task)
        lora = write_lora(args.base, Path(folder) / "lora.gguf")
        servers = {
            "base": serve(args.base, args.num_threads),
            "mask merged": serve(task, args.num_threads),
            "LoRA r 16 beside": serve(args.base, args.num_threads, lora),
        }
        mask_bytes = (args.mask / ADAPTER_WEIGHTS).stat().st_size
        lora_bytes = lora.stat().st_size

        # Once before, uncounted: the first call allocates memory.
        for server in servers.values():
            tokens_per_s(server, 4)
        speeds = {name: [] for name in servers}
        for _ in range(args.rounds):
            for name, server in servers.items():
                speeds[name].append(tokens_per_s(server, args.num_tokens))

    for name, found in speeds.items():
        ratios = [own / base for own, base in zip(found, speeds["base"], strict=True)]
        print(
            f"{name}: {statistics.median(found):.1f} tokens/s, {statistics.median(ratios):.2f} of the base "
            f"[{min(ratios):.2f}, {max(ratios):.2f}] in {args.rounds} rounds"
        )
    print(f"bytes: mask {mask_bytes:,}, LoRA r 16 in float16 {lora_bytes:,}")


if __name__ == "__main__":
    run_script(main, extra="gguf")
