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

import maskft  # noqa: F401 - lets PEFT know masks
from maskft.models import load_model, load_tokenizer

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
        self.adapters = {"base": "__base__", **{f"base:{name}": name for name in model.peft_config}}
        self.queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def run(self) -> None:
        """Answer for ever: whatever waits when the model is free is the next batch."""
        while True:
            batch = [await self.queue.get()]
            while len(batch) < MAX_BATCH_SIZE and not self.queue.empty():
                batch.append(self.queue.get_nowait())
            try:
                answers = await asyncio.to_thread(self.generate, batch)
            except Exception as error:  # one bad batch must not end the server
                answers = [failed(500, f"{type(error).__name__}: {error}")] * len(batch)
            for waiting, answer in zip(batch, answers, strict=True):
                if not waiting.answer.cancelled():  # its client has gone
                    waiting.answer.set_result(answer)

    @torch.inference_mode()
    def generate(self, batch: list[Waiting]) -> list[JSONResponse]:
        """Answers of one batch, each row with the mask of its request."""
        prompts = [waiting.request.prompt for waiting in batch]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.model.device)
        inputs.pop("token_type_ids", None)
        names = [waiting.adapter for waiting in batch]
        num_new = max(waiting.request.max_tokens for waiting in batch)
        output = self.model.generate(**inputs, adapter_names=names, max_new_tokens=num_new, do_sample=False)
        answers = []
        for row, waiting in enumerate(batch):
            tokens = output[row, inputs["input_ids"].shape[1] :].tolist()[: waiting.request.max_tokens]
            has_ended = self.tokenizer.eos_token_id in tokens
            if has_ended:
                tokens = tokens[: tokens.index(self.tokenizer.eos_token_id)]
            choice = {"text": self.tokenizer.decode(tokens), "finish_reason": "stop" if has_ended else "length"}
            num_prompt = int(inputs["attention_mask"][row].sum())
            counts = {"prompt_tokens": num_prompt, "completion_tokens": len(tokens)}
            body = {"id": f"cmpl-{id(waiting)}", "object": "text_completion", "created": int(time.time())}
            body |= {"model": waiting.request.model, "choices": [{"index": 0, "logprobs": None, **choice}]}
            answers.append(JSONResponse({**body, "usage": {**counts, "total_tokens": sum(counts.values())}}))
        return answers

    async def completions(self, request: Request) -> JSONResponse:
        """POST /v1/completions."""
        try:
            asked = CompletionRequest.model_validate_json(await request.body())
        except ValidationError as error:
            first = error.errors()[0]
            return failed(400, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
        if asked.model not in self.adapters:
            return failed(404, f"no model {asked.model!r}; there are {', '.join(self.adapters)}")
        num_tokens = len(self.tokenizer(asked.prompt)["input_ids"]) + asked.max_tokens
        if num_tokens > self.model.config.max_position_embeddings:
            return failed(400, f"prompt and max_tokens are {num_tokens} tokens, more than the model's context")
        waiting = Waiting(asked, self.adapters[asked.model], asyncio.get_running_loop().create_future())
        self.queue.put_nowait(waiting)
        return await waiting.answer

    def app(self) -> Starlette:
        """The web application."""

        @asynccontextmanager
        async def lifespan(app: Starlette):
            task = asyncio.create_task(self.run())
            yield
            task.cancel()

        return Starlette(routes=[Route("/v1/completions", self.completions, methods=["POST"])], lifespan=lifespan)


def failed(status: int, message: str) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "code": None}}, status)


def main() -> None:
    """Load the base and its masks, and serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="base model, a folder or a hub name")
    parser.add_argument("masks", nargs="+", metavar="NAME=DIR", help="adapter folders and the names to serve them by")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    folders = dict(mask.split("=", 1) for mask in args.masks)
    first = next(iter(folders))
    model = PeftModel.from_pretrained(load_model(args.base), folders.pop(first), adapter_name=first)
    for name, folder in folders.items():
        model.load_adapter(folder, name)
    uvicorn.run(Server(model, load_tokenizer(args.base)).app(), host="127.0.0.1", port=args.port)


if __name__ == "__main__":
    main()
