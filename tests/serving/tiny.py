"""A tiny reward model as `polar-ft convert` leaves it, and a server in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from fastapi import FastAPI

from polar_ft.conversion.huggingface import write_hf_folder
from polar_ft.model.tiny_base import make_tiny_base
from polar_ft.model.weights import load_backbone
from polar_ft.serving.connections import HttpServer
from polar_ft.template import PolarTemplate

TEXTS = ["Which city is the capital of China?\nBeijing.", "It is Shanghai, I think.\nNo!"] * 20


def write_tiny_reward_model(folder: Path) -> Path:
    """Random weights, two layers of width 64, at most 300 tokens, responses of at most 80."""
    base = make_tiny_base(folder / "base", TEXTS, vocab_size=300)
    decoder, _, _ = load_backbone(base, torch.float32)
    generator = torch.Generator().manual_seed(1)
    state = {
        f"llm.{name}": tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in decoder.state_dict().items()
    }
    template = PolarTemplate.from_pretrained(base, max_length=300, max_response_length=80)
    write_hf_folder(
        state | {"v_head.weight": torch.randn(1, 64, generator=generator)},
        base_folder=base,
        out_dir=folder / "reward-model",
        template=template,
        dtype=torch.float32,
    )
    return folder / "reward-model"


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serves an application on a free port of this machine; gives the address."""
    server = HttpServer(app)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
