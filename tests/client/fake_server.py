"""An engine that is none: answers in the wire formats, with faults where a test wants them.

Not SGLang, vLLM or LMDeploy: it replays the shapes that they document. The reward of an input depends on its
token ids alone, so a test knows every right answer.
"""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "the-key"


def reward_of(ids: Sequence[int]) -> float:
    """Differs for almost any two inputs; between −12 and 2.

    >>> reward_of([1, 2, 3])
    -10.974
    """
    value = 0
    for token in ids:
        value = (value * 31 + token) % 14000
    return value / 1000 - 12


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


class Answer:
    """What a fault makes of one request, in place of the rewards."""

    def __init__(
        self,
        status: int = 200,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        reset: bool = False,
        half: bool = False,
        wait: threading.Event | None = None,
    ) -> None:
        self.status = status
        self.body = body
        self.headers = headers or {}
        self.reset = reset
        self.half = half
        self.wait = wait


# Called with the number of the scoring request (from 0, those of the first contact not counted) and its
# rewards: an `Answer` in their place, other JSON in theirs, or None for the right answer.
Fault = Callable[[int, list[float]], Any]


class FakeServer:
    """A server on a free port of 127.0.0.1, in a thread.

    Args:
        engine: Whose wire format it speaks and what it says it is.
        fault: What goes wrong.
        activation: What the engine does to rewards: "switch" applies a sigmoid unless ``use_activation`` is
            false, "old switch" unless ``activation`` is, "sigmoid" and "softmax" always, "none" never.
        key: The key it asks for, None for none.
        reward: The model.
        card: More fields of its entry in /v1/models.
        known: The inputs of the first contact.
        port: A certain port, for a server that comes back.
    """

    def __init__(
        self,
        engine: str = "vllm",
        fault: Fault | None = None,
        *,
        activation: str | None = None,
        key: str | None = None,
        reward: Callable[[Sequence[int]], float] = reward_of,
        card: dict[str, Any] | None = None,
        known: list[list[int]] | None = None,
        port: int = 0,
    ) -> None:
        self.engine = engine
        self.fault = fault
        self.activation = activation or ("switch" if engine == "vllm" else "none")
        self.key = key
        self.reward = reward
        self.card = card or {}
        self.known = known
        self.lock = threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.scored: list[list[int]] = []
        self.n_requests = 0
        self.at_once = self.most_at_once = 0
        self.stopped = False
        self.connections: list[socket.socket] = []
        self._http = _Server(("127.0.0.1", port), _handler(self))
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None  # connections that break are what tests are about
        self.port = self._http.server_address[1]
        self.address = f"127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def __enter__(self) -> FakeServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """As a killed process: all connections are closed, and none is taken any more."""
        self._http.shutdown()
        self._http.server_close()
        with self.lock:
            self.stopped = True
            for connection in self.connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    # ---- what it answers

    def models(self) -> dict[str, Any]:
        owner = {"sglang": "sglang", "vllm": "vllm", "lmdeploy": "lmdeploy", "polar_ft": "polar_ft"}
        card = {"id": "polar-tiny", "object": "model", "owned_by": owner.get(self.engine, "somebody")}
        return {"object": "list", "data": [{**card, **self.card}]}

    def rewards(self, body: dict[str, Any]) -> tuple[list[list[int]], list[float]]:
        inputs = body.get("input_ids", body.get("input"))
        if inputs and isinstance(inputs[0], int):
            inputs = [inputs]
        raw = [self.reward(ids) for ids in inputs]
        off = {"switch": "use_activation", "old switch": "activation"}.get(self.activation)
        if self.activation == "none" or (off is not None and body.get(off) is False):
            return inputs, raw
        return inputs, [1.0 if self.activation == "softmax" else sigmoid(r) for r in raw]

    def payload(self, route: str, inputs: list[list[int]], rewards: list[float]) -> Any:
        lengths = [len(ids) for ids in inputs]
        if route == "/classify":
            return [
                {"embedding": [reward], "meta_info": {"id": f"r{i}", "prompt_tokens": n}}
                for i, (reward, n) in enumerate(zip(rewards, lengths, strict=True))
            ]
        data: list[dict[str, Any]] = [
            {
                "index": i,
                "object": "pooling",
                "data": reward if self.engine == "lmdeploy" else [*([[0.5]] * (n - 1)), [reward]],
            }
            for i, (reward, n) in enumerate(zip(rewards, lengths, strict=True))
        ]
        total = sum(lengths)
        usage = {"prompt_tokens": total, "total_tokens": total, "completion_tokens": 0}
        return {"id": "pool-1", "object": "list", "model": "polar-tiny", "data": data, "usage": usage}


class _Server(ThreadingHTTPServer):
    # With the default of 5, connections that many clients open at once are dropped.
    request_queue_size = 128


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def setup(self) -> None:
            super().setup()
            with server.lock:
                server.connections.append(self.connection)
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)

        def reply(self, status: int, payload: Any, headers: dict[str, str] | None = None) -> None:
            body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def allowed(self) -> bool:
            if server.key is None or self.headers.get("Authorization") == f"Bearer {server.key}":
                return True
            self.reply(401, {"error": {"message": "Unauthorized"}})
            return False

        def do_GET(self) -> None:
            if not self.allowed():
                return
            if self.path == "/v1/models":
                self.reply(200, server.models())
            elif self.path == "/version" and server.engine == "vllm":
                self.reply(200, {"version": "0.32.0"})
            elif self.path == "/server_info" and server.engine == "sglang":
                self.reply(200, {"version": "0.5.23"})
            else:
                self.reply(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.allowed():
                return
            route = "/classify" if server.engine in ("sglang", "polar_ft") else "/pooling"
            if self.path != route:
                self.reply(404, {"detail": "Not Found"})
                return
            inputs, rewards = server.rewards(body)
            with server.lock:
                server.bodies.append(body)
                contact = inputs == server.known
                number = None if contact else server.n_requests
                server.n_requests += not contact
                if not contact:
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                self.answer(route, number, inputs, rewards)
            finally:
                if not contact:
                    with server.lock:
                        server.at_once -= 1

        def answer(
            self, route: str, number: int | None, inputs: list[list[int]], rewards: list[float]
        ) -> None:
            fault = server.fault(number, rewards) if server.fault and number is not None else None
            if fault is None:
                fault = server.payload(route, inputs, rewards)
            if not isinstance(fault, Answer):
                if number is not None:
                    with server.lock:
                        server.scored += inputs
                self.reply(200, fault)
                return
            if fault.wait is not None:
                fault.wait.wait(10)
            if fault.reset:
                # With no time to linger, closing resets the connection, as a killed process does.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
            elif fault.half:
                whole = json.dumps(server.payload(route, inputs, rewards)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(whole)))
                self.end_headers()
                self.wfile.write(whole[: len(whole) // 2])
                self.close_connection = True
            else:
                self.reply(fault.status, fault.body, fault.headers)

    return Handler
