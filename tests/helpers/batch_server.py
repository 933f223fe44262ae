"""A Batch API in this process, whose batches are complete at once, with faults on demand."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TEXT = "A man rides a brown horse. He is on the beach and the horse walks in the sand near the blue water."


def completion(**usage):
    choice = {"index": 0, "message": {"role": "assistant", "content": TEXT}, "finish_reason": "stop"}
    return {"id": "x", "model": "m", "choices": [choice], "usage": usage or None}


class BatchServer:
    """What the server does.

    Attributes:
        fields: of every batch, in place of the right ones.
        row: function that changes a line of an output file.
        after_create: called when a batch is created.
        answers: statuses with which the next requests for a kind of path are answered, after they were served; None
            drops the connection, and a number of seconds delays the reply.
        created: the requests that created batches.
    """

    def __init__(self):
        self.fields, self.answers, self.created, self.polls = {}, {}, [], 0
        self.row, self.after_create = lambda row: row, lambda: None
        self.files, self.batches = {}, {}

    def serve(self, method, path, raw):
        kind = re.sub(r"^/v1/", "", path.partition("?")[0])
        kind = "content" if kind.endswith("/content") else kind.partition("/")[0] if "/" in kind else f"{method} {kind}"
        reply = self.reply(method, path.partition("?")[0], raw)
        if not self.answers.get(kind):
            return reply
        answer = self.answers[kind].pop(0)
        if isinstance(answer, float):
            time.sleep(answer)
            return reply
        if isinstance(answer, bytes):
            return 200, answer
        return answer and (answer, {"error": {"message": "No such thing"}})

    def reply(self, method, path, raw):
        if (method, path) == ("POST", "/v1/files"):
            self.files[f"file-{len(self.files)}"] = [
                json.loads(line) for line in raw.split(b"\n") if line.startswith(b"{")
            ]
            return 200, {"id": f"file-{len(self.files) - 1}"}
        if (method, path) == ("POST", "/v1/batches"):
            request = json.loads(raw)
            name, lines = f"batch_{len(self.batches)}", self.files[request["input_file_id"]]
            self.created.append(lines)
            self.after_create()
            response = {"status_code": 200, "body": completion(prompt_tokens=100, completion_tokens=30)}
            self.files[f"out-{name}"] = [{"custom_id": line["custom_id"], "response": response} for line in lines]
            self.batches[name] = {"id": name, "status": "completed", "output_file_id": f"out-{name}"}
            counts = {"total": len(lines), "completed": len(lines), "failed": 0}
            self.batches[name] |= {"metadata": request["metadata"], "request_counts": counts}
            return 200, self.batches[name] | self.fields
        if path == "/v1/batches":
            return 200, {"data": [batch | self.fields for batch in reversed(self.batches.values())]}
        if path.endswith("/content"):
            lines = self.files[path.split("/")[-2]]
            return 200, "\n".join(json.dumps(self.row(line)) for line in lines).encode()
        self.polls += 1
        batch = self.batches.get(path.split("/")[-1])
        return (404, {}) if batch is None else (200, batch | self.fields)


@contextmanager
def batch_server():
    """Yield a `BatchServer` and its base URL."""
    state = BatchServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_GET(self):
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            answer = state.serve(self.command, self.path, raw)
            if answer is None:
                self.close_connection = True
                return
            content = answer[1] if isinstance(answer[1], bytes) else json.dumps(answer[1]).encode()
            self.send_response(answer[0])
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
