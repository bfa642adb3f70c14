"""Serve many masks over one base with OpenAI's completions interface; requests of different masks share a batch.

python examples/serve_many.py my-model sums=runs/sums intents=runs/intents    # pip install -e '.[examples]'

With any client of that interface at http://127.0.0.1:8000/v1, ``model="base:intents"`` is the base with that mask and
``model="base"`` the base alone. Answers are greedy. Requests that arrive while a batch runs are the next batch: a
server for production would let them join at every token.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import uvicorn
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

import maskft  # noqa: F401 - registers masks with PEFT, which could not load the adapters without it
from maskft.models import load_model, load_tokenizer
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.layout import holds_adapter, no_adapter

MAX_BATCH_SIZE = 16


class CompletionRequest(BaseModel):
    """The part of OpenAI's request that is served; other fields are errors and not ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str
    prompt: str = Field(min_length=1)
    max_tokens: int = Field(default=16, ge=1, le=4096)
    temperature: Literal[0] = 0


@dataclass
class Waiting:
    """A request in the queue."""

    request: CompletionRequest
    adapter: str
    answer: asyncio.Future[JSONResponse]


class Server:
    """The model, its queue, and the loop that makes batches of waiting requests."""

    def __init__(self, model: PeftModel, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokenizer.padding_side = "left"  # all rows of a batch end where their answers begin

        # Name of a served model -> name of the adapter. PEFT takes `__base__` for a row without an adapter.
        self.adapters = {"base": "__base__"}
        for name in model.peft_config:
            self.adapters[f"base:{name}"] = name

        # Tokens that end an answer: those at which `generate` stops (an instruct model often has several), and the
        # tokenizer's.
        end_tokens = model.generation_config.eos_token_id
        if not isinstance(end_tokens, list):
            end_tokens = [end_tokens]
        self.end_tokens = {*end_tokens, tokenizer.eos_token_id}
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def run(self) -> None:
        """Answer until the server stops: the requests that wait when the model is free are the next batch."""
        while True:
            batch = [await self.queue.get()]
            while len(batch) < MAX_BATCH_SIZE and not self.queue.empty():
                batch.append(self.queue.get_nowait())

            # In a thread, so that new requests are accepted while the model runs.
            try:
                answers = await asyncio.to_thread(self.generate, batch)
            except Exception as error:  # one bad batch must not end the server
                answer = failed(500, f"{type(error).__name__}: {error}")
                answers = [answer] * len(batch)

            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.answer.cancelled():  # its client has gone
                    waiting.answer.set_result(answer)

    @torch.inference_mode()
    def generate(self, batch: list[Waiting]) -> list[JSONResponse]:
        """Answers of one batch, each row with the mask of its request."""
        prompts = [waiting.request.prompt for waiting in batch]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.model.device)
        inputs.pop("token_type_ids", None)  # some tokenizers return it, and decoders do not take it

        # PEFT's argument for mixed batches: one adapter name per row. Masked layers compute x @ W.T once for all rows
        # and subtract, per row, the part of the weights that the row's mask removes.
        names = [waiting.adapter for waiting in batch]
        num_new = max(waiting.request.max_tokens for waiting in batch)

        # Each request fits into the context by itself, but the longest prompt with the longest answer may not.
        num_tokens = inputs["input_ids"].shape[1] + num_new
        if len(batch) > 1 and num_tokens > self.model.config.max_position_embeddings:
            return [answer for waiting in batch for answer in self.generate([waiting])]

        output = self.model.generate(
            **inputs,
            adapter_names=names,
            max_new_tokens=num_new,
            do_sample=False,
        )

        answers = []
        width = inputs["input_ids"].shape[1]
        for row, waiting in enumerate(batch):
            # All rows were generated up to the largest max_tokens of the batch, or until all had ended.
            tokens = output[row, width:].tolist()[: waiting.request.max_tokens]
            # The padding is on the left.
            num_prompt = int(inputs["attention_mask"][row].sum())
            prompt = output[row, width - num_prompt : width].tolist()
            answers.append(self.completion(waiting, prompt, tokens))
        return answers

    def completion(
        self,
        waiting: Waiting,
        prompt: list[int],
        tokens: list[int],
    ) -> JSONResponse:
        """The answer to a request, as OpenAI's interface has it.

        Args:
            waiting: The request.
            prompt: Tokens of its prompt.
            tokens: New tokens; after one that ends the answer only padding follows.
        """
        finish_reason = "length"
        for index, token in enumerate(tokens):
            if token in self.end_tokens:
                tokens = tokens[:index]
                finish_reason = "stop"
                break

        # Decoded after the prompt: by themselves, the tokens of a SentencePiece tokenizer lose the space before them.
        before = self.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)
        text = self.tokenizer.decode(prompt + tokens, clean_up_tokenization_spaces=False)
        choice = {
            "index": 0,
            "logprobs": None,
            "text": text[len(before) :],
            "finish_reason": finish_reason,
        }
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(tokens),
            "total_tokens": len(prompt) + len(tokens),
        }
        body = {
            "id": f"cmpl-{id(waiting)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": waiting.request.model,
            "choices": [choice],
            "usage": usage,
        }
        return JSONResponse(body)

    async def completions(self, request: Request) -> JSONResponse:
        """POST /v1/completions."""
        try:
            asked = CompletionRequest.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            # The field and its problem. A body that is not a JSON object has no field.
            parts = [".".join(map(str, first["loc"])), first["msg"]]
            return failed(400, ": ".join(part for part in parts if part))
        if asked.model not in self.adapters:
            return failed(404, f"no model {asked.model!r}; there are {', '.join(self.adapters)}")

        num_prompt = len(self.tokenizer(asked.prompt)["input_ids"])
        num_tokens = num_prompt + asked.max_tokens
        if num_tokens > self.model.config.max_position_embeddings:
            return failed(400, f"prompt and max_tokens are {num_tokens} tokens, more than the model's context")

        answer = asyncio.get_running_loop().create_future()
        self.queue.put_nowait(Waiting(asked, self.adapters[asked.model], answer))
        return await answer

    def app(self) -> Starlette:
        """The web application."""

        @asynccontextmanager
        async def lifespan(app: Starlette):
            task = asyncio.create_task(self.run())
            yield
            task.cancel()

        route = Route("/v1/completions", self.completions, methods=["POST"])
        return Starlette(routes=[route], lifespan=lifespan)


def failed(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    error = {
        "message": message,
        "type": "invalid_request_error",
        "code": None,
    }
    return JSONResponse({"error": error}, status)


def name_and_folder(text: str) -> tuple[str, str]:
    """Parse an argument ``NAME=DIR``."""
    name, separator, folder = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR")
    return name, folder


def main() -> None:
    """Load the base and its masks, and serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="base model, a folder or a hub name")
    parser.add_argument(
        "masks",
        nargs="+",
        type=name_and_folder,
        metavar="NAME=DIR",
        help="adapter folders and the names to serve them by",
    )
    parser.add_argument("--port", type=int, default=8000, help="port at 127.0.0.1 (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="dtype of the weights; auto: as they are stored (default: float32)",
    )
    args = parser.parse_args()

    # Before the base is loaded, which takes longer.
    folders: dict[str, str] = {}
    for name, folder in args.masks:
        if name in folders:
            raise UserError(f"two masks have the name {name}: give one of them another")
        if not holds_adapter(folder):
            raise no_adapter(folder)
        folders[name] = folder

    # PEFT wraps the base with the first adapter, and adds the others to it. The base is in memory once.
    first = next(iter(folders))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_model(args.base, args.dtype).to(device)
    model = PeftModel.from_pretrained(base, folders.pop(first), adapter_name=first)
    for name, folder in folders.items():
        model.load_adapter(folder, name)

    server = Server(model, load_tokenizer(args.base))
    uvicorn.run(server.app(), host="127.0.0.1", port=args.port)


if __name__ == "__main__":
    run_script(main)
