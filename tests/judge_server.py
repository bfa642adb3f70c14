"""A judge for the tests: a real HTTP server process that speaks OpenAI's chat completions, log-probabilities included.

Run as a script with a JSON object of settings; prints its port, and writes a line per request to ``log``.
"""

import json
import math
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

OUTPUTS = re.compile(r'"model_identifier": "(m|M)",\s+"output": """(.*?)"""\n', re.DOTALL)
INSTRUCTION = re.compile(r'"instruction": """(.*?)""",\n', re.DOTALL)

settings = {
    "port": 0,
    "log": None,
    "key": None,  # required as bearer token
    "busy": 0,  # answer the first so many requests with 503
    "exit_after": None,  # end the process instead of giving one answer more
    "logprobs": {},  # instruction -> {token: log-probability} instead of a verdict by length
    "refuse": (),  # instructions that are too long for its context
    "without_logprobs": False,
    "redirect": None,  # answer every request with status 307 and this place
    "speaks": "openai",  # or a web page, or JSON that is cut off
}
lock = threading.Lock()
answered = busy = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.allowed():
            self.reply(200, {"object": "list", "data": [{"id": "longer", "object": "model"}]})

    def do_POST(self):
        global answered, busy
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.allowed():
            return
        prompt = request["messages"][-1]["content"]
        instruction = INSTRUCTION.search(prompt)[1]
        with lock:
            if busy < settings["busy"]:
                busy += 1
                return self.reply(503, {"error": {"message": "loading the model"}})
            if answered == settings["exit_after"]:
                os._exit(1)
            answered += 1
            with open(settings["log"], "a") as log:
                log.write(json.dumps({"instruction": instruction, "request": request}) + "\n")
        if instruction in settings["refuse"]:
            return self.reply(400, {"error": {"message": "the prompt is longer than the context"}})
        lengths = {name: len(text) for name, text in OUTPUTS.findall(prompt)}
        share = 1 / (1 + math.exp((lengths["M"] - lengths["m"]) / 20))
        logprobs = settings["logprobs"].get(instruction) or {"m": math.log(share), "M": math.log(1 - share)}
        ranked = [{"token": t, "logprob": p, "bytes": None} for t, p in sorted(logprobs.items(), key=lambda e: -e[1])]
        content = [{**ranked[0], "top_logprobs": ranked[: request["top_logprobs"]]}]
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": ranked[0]["token"]},
            "finish_reason": "length",
            "logprobs": None if settings["without_logprobs"] or not request["logprobs"] else {"content": content},
        }
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice]}
        self.reply(200, reply)

    def allowed(self):
        with open(settings["log"] + ".headers", "a") as log:
            log.write(json.dumps(dict(self.headers)) + "\n")
        if settings["redirect"]:
            self.send_response(307)
            self.send_header("Location", settings["redirect"] + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return False
        if settings["key"] and self.headers.get("Authorization") != f"Bearer {settings['key']}":
            self.reply(401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})
            return False
        return True

    def reply(self, status, body):
        data = json.dumps(body).encode()
        kind = "application/json"
        if settings["speaks"] == "html":
            data, kind = b"<html>hello</html>", "text/html"
        elif settings["speaks"] == "cut" and "choices" in body:
            data = data[:20]
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    settings |= json.loads(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", settings["port"]), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
