"""examples/serve_many.py with OpenAI's own client over loopback: answers, batches and errors."""

import http.client
import importlib.util
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from maskft import MaskConfig
from maskft.models import load_model, load_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
PROMPT = "1+2="


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("serve_many", EXAMPLES / "serve_many.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_many"] = module  # where dataclasses and pydantic look for annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["serve_many"]


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    for seed, name in enumerate(("sums", "intents")):
        config = MaskConfig(sparsity=0.4, mask_seed=seed)
        get_peft_model(load_model(str(base)), config).save_pretrained(folder / name)
    model = PeftModel.from_pretrained(load_model(str(base)), folder / "sums", adapter_name="sums")
    model.load_adapter(folder / "intents", "intents")
    return model


class Watched:
    """The server's model, which notes the names of every batch."""

    def __init__(self, model):
        self.model = model
        self.batches = []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def eval(self):
        self.model.eval()
        return self

    def generate(self, *args, adapter_names, **kwargs):
        self.batches.append(adapter_names)
        time.sleep(0.2)  # requests that arrive now wait for the next batch
        return self.model.generate(*args, adapter_names=adapter_names, **kwargs)


@pytest.fixture(scope="module")
def served(example, model, base):
    """The watched model and a client of a server that runs in a thread."""
    watched = Watched(model)
    app = example.Server(watched, load_tokenizer(str(base))).app()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield watched, openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    server.should_exit = True
    thread.join()


def test_requests_that_do_not_fit_together_are_answered_alone(example, model, base):
    tokenizer = load_tokenizer(str(base))
    watched = Watched(model)
    server = example.Server(watched, tokenizer)
    context = model.config.max_position_embeddings
    long = PROMPT * ((context - 4) // len(tokenizer(PROMPT)["input_ids"]))
    asked = [("sums", long, 2), ("intents", PROMPT, 9)]
    num_long = len(tokenizer(long)["input_ids"])
    assert num_long + 2 <= context < num_long + 9
    batch = [
        example.Waiting(example.CompletionRequest(model=f"base:{name}", prompt=prompt, max_tokens=size), name, None)
        for name, prompt, size in asked
    ]
    texts = [json.loads(answer.body)["choices"][0]["text"] for answer in server.generate(batch)]
    assert texts == [alone(model, tokenizer, *request) for request in asked]
    assert watched.batches == [["sums"], ["intents"]]


def test_an_answer_keeps_the_space_before_it(example, model):
    """Llama 2's tokenizer drops the space at the beginning of a text: a client would read "isParis"."""
    backend = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "\u2581is": 2, "\u2581Paris": 3}, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert tokenizer.decode([3]) == "Paris"
    server = example.Server(model, tokenizer)
    asked = example.Waiting(example.CompletionRequest(model="base", prompt="is"), "__base__", None)
    answer = json.loads(server.completion(asked, [2], [3, 1, 1]).body)
    assert answer["choices"][0] == {"index": 0, "logprobs": None, "text": " Paris", "finish_reason": "stop"}
    assert answer["usage"] == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


def alone(model, tokenizer, adapter, prompt, max_tokens):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    model.set_adapter("sums" if adapter == "base" else adapter)
    with torch.inference_mode():
        options = {"max_new_tokens": max_tokens, "do_sample": False}
        if adapter == "base":
            with model.disable_adapter():
                output = model.generate(input_ids=ids, **options)
        else:
            output = model.generate(input_ids=ids, **options)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_requests_of_different_masks_share_batches_and_get_their_own_answers(served, model, base):
    watched, client = served
    asked = [(name, PROMPT * (1 + row % 3), 4 + row % 3) for row, name in enumerate(["sums", "intents", "base"] * 4)]

    def ask(request):
        name, prompt, max_tokens = request
        model_name = "base" if name == "base" else f"base:{name}"
        return client.completions.create(model=model_name, prompt=prompt, max_tokens=max_tokens, temperature=0)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    tokenizer = load_tokenizer(str(base))
    expected = [alone(model, tokenizer, *request) for request in asked]
    assert [answer.choices[0].text for answer in answers] == expected
    assert len({answer.choices[0].text for answer in answers}) > 1
    assert any(len(set(names)) == 3 for names in watched.batches)
    assert answers[0].model == "base:sums"
    assert answers[0].choices[0].finish_reason in ("stop", "length")
    assert answers[0].usage.completion_tokens <= 4


@pytest.mark.parametrize(
    ("status", "message", "request_"),
    [
        (404, "no model 'base:dates'; there are base, base:sums, base:intents", {"model": "base:dates"}),
        (400, "prompt: String should have at least 1 character", {"prompt": ""}),
        (400, "max_tokens", {"max_tokens": 0}),
        (400, "temperature", {"temperature": 0.7}),
        (400, "stop: Extra inputs are not permitted", {"stop": ["."]}),
        (400, "more than the model's context", {"max_tokens": 4000}),
    ],
)
def test_bad_requests(served, status, message, request_):
    _, client = served
    with pytest.raises(openai.APIStatusError, match=message) as raised:
        client.completions.create(**{"model": "base", "prompt": PROMPT, **request_})
    assert raised.value.status_code == status


def test_a_batch_that_fails_is_an_error_and_not_the_end(served, monkeypatch):
    watched, client = served
    with monkeypatch.context() as patch:
        patch.setattr(watched, "generate", lambda **kwargs: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="ZeroDivisionError"):
            client.completions.create(model="base", prompt=PROMPT)
    assert client.completions.create(model="base:sums", prompt=PROMPT).choices


def test_a_body_that_is_not_json(served):
    _, client = served
    connection = http.client.HTTPConnection("127.0.0.1", client.base_url.port)
    connection.request("POST", "/v1/completions", body=b"nope")
    response = connection.getresponse()
    message = json.load(response)["error"]["message"]
    connection.close()
    assert response.status == 400
    assert message.startswith("Invalid JSON")


def test_an_answer_ends_at_any_end_token_of_the_model(example, model, base, monkeypatch):
    tokenizer = load_tokenizer(str(base))
    other_end = tokenizer.eos_token_id + 10
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, other_end])
    server = example.Server(model, tokenizer)
    request = example.CompletionRequest(model="base", prompt=PROMPT)
    waiting = example.Waiting(request, "__base__", None)

    words = tokenizer("12")["input_ids"]
    padding = [tokenizer.pad_token_id] * 2
    prompt = tokenizer(PROMPT)["input_ids"]
    response = server.completion(waiting, prompt, [*words, other_end, *padding])
    body = json.loads(response.body)
    assert body["choices"][0]["text"] == tokenizer.decode(words)
    assert body["choices"][0]["finish_reason"] == "stop"
    num_prompt = len(prompt)
    total = num_prompt + len(words)
    assert body["usage"] == {"prompt_tokens": num_prompt, "completion_tokens": len(words), "total_tokens": total}
