"""Clients that attack a server, for serve_hostile.py: a process of its own, without torch.

    python benchmarks/hostile_clients.py 127.0.0.1:30000 prompt_60_mb

Prints the number of answers by status (0: none) as JSON. Sends to this machine only; every wait has an end.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

CLIENTS = 10

# Every attack ends after so many seconds, and each of its requests gets so many.
ATTACK_SECONDS = 90.0
REQUEST_SECONDS = 30.0

MB = 10**6


def large_prompt() -> bytes:
    """A prompt of 60 MB."""
    return b'{"prompt": "' + b"word " * (12 * MB) + b'", "reference": "", "candidates": ["a"]}'


def long_prompt() -> bytes:
    """A prompt of 7 MB, which the body limit allows."""
    return b'{"prompt": "' + b"word " * (7 * MB // 5) + b'", "reference": "", "candidates": ["a"]}'


def empty_objects() -> bytes:
    """Inputs without any field, 7 MB."""
    return b'{"inputs": [' + b"{}," * (7 * MB // 3) + b"{}]}"


def faulty_inputs() -> bytes:
    """As many inputs as one request may have, each with faults."""
    return b'{"inputs": [' + b'{"candidates": [1, 2, 3]},' * 5000 + b"{}]}"


def empty_lists() -> bytes:
    """Sequences without ids, 7 MB."""
    return b'{"input_ids": [' + b"[]," * (7 * MB // 3) + b"[]]}"


# Each with the route and the number of requests.
BODIES: dict[str, tuple[Callable[[], bytes], str, int]] = {
    "prompt_60_mb": (large_prompt, "/v1/rewards", 100),
    "prompt_7_mb": (long_prompt, "/v1/rewards", 100),
    "empty_objects_7_mb": (empty_objects, "/v1/rewards", 100),
    "faulty_inputs": (faulty_inputs, "/v1/rewards", 100),
    "empty_lists_7_mb": (empty_lists, "/classify", 100),
}


def send_bodies(address: str, name: str) -> Counter[int]:
    """Sends the requests of an attack from several clients; returns the number of answers by status."""
    make, route, number = BODIES[name]
    body = make()
    head = f"POST {route} HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode()
    ends = time.monotonic() + ATTACK_SECONDS

    def send(_: int) -> int:
        if time.monotonic() > ends:
            return -1
        host, port = address.split(":")
        try:
            with socket.create_connection((host, int(port)), REQUEST_SECONDS) as connection:
                connection.sendall(request)
                connection.sendall(body)
                return int(connection.recv(4096).split()[1])
        except (OSError, IndexError, ValueError):
            return 0

    with ThreadPoolExecutor(CLIENTS) as pool:
        return Counter(pool.map(send, range(number)))


def hold_connections(address: str, name: str) -> Counter[int]:
    """Opens connections and sends a part of a request on each, again and again for 20 s."""
    sent = b"POST /v1/rewards HTTP/1.1\r\nHost: " + address.encode() + b"\r\n"
    if name == "slow_bodies":
        sent += b'Content-Type: application/json\r\nContent-Length: 1000000\r\n\r\n{"prompt": "'
    host, port = address.split(":")
    opened: list[socket.socket] = []
    ends = time.monotonic() + 20
    while time.monotonic() < ends:
        try:
            connection = socket.create_connection((host, int(port)), 5)
            connection.sendall(sent)
            opened.append(connection)
        except OSError:
            time.sleep(0.05)
        for one in opened[-50:]:
            try:
                one.send(b"a")
            except OSError:
                opened.remove(one)
                one.close()
        if len(opened) >= 300:
            opened.pop(0).close()
        time.sleep(0.01)
    return Counter({0: len(opened)})


def main() -> None:
    """Attacks and prints the answers."""
    address, name = sys.argv[1:]
    if not address.startswith("127.0.0.1:"):
        raise SystemExit(f"{address}: only this machine is attacked")
    attack = send_bodies if name in BODIES else hold_connections
    print(json.dumps({str(status): n for status, n in sorted(attack(address, name).items())}))


if __name__ == "__main__":
    main()
