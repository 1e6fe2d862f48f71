"""A local server that speaks the chat-completions protocol and misbehaves on request."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CHECK = "Rate this message: [[5]]"


@dataclass
class Reply:
    """What the server does with one request."""

    content: Any = "Rating: [[5]]"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None  # in place of a well-formed one
    hang: bool = False  # until the server stops


@dataclass
class JudgeServer:
    """The server's address and what it was asked, the check of the endpoint left out."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def judge_server(respond: Callable[[dict[str, Any], int], Reply]) -> Iterator[JudgeServer]:
    """Serve until the end of the block.

    Args:
        respond: Decides on the reply from the request's body and its number, from 0.
    """
    stopping, lock = threading.Event(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.keys.append(self.headers["Authorization"])
                if request["messages"][0]["content"] == CHECK:
                    reply = Reply()
                else:
                    reply = respond(request, len(server.requests))
                    server.requests.append(request)
            if self.path != "/v1/chat/completions":
                reply = Reply(status=404)
            if reply.hang:
                stopping.wait(20)
                return
            body = reply.body
            if body is None:
                body = json.dumps(_body(request["model"], reply)).encode()
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            # Whoever did not wait has gone.
            with suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = JudgeServer(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        stopping.set()
        http.shutdown()
        thread.join()
        http.server_close()


def _body(model: str, reply: Reply) -> dict[str, Any]:
    if reply.status != 200:
        return {"error": {"message": str(reply.content), "type": "stub", "code": None}}
    message = {"role": "assistant", "content": reply.content}
    return {
        "id": "stub",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }
