"""How much memory activations take, and how many layers to compute again so that they fit."""

from __future__ import annotations

from typing import Any

import psutil
import torch
from transformers import PretrainedConfig

from polar_ft.groups import TokenGroup
from polar_ft.model.backbones import empty_decoder
from polar_ft.model.packing import build_pack
from polar_ft.model.reward_model import run_layer
from polar_ft.model.settings import Checkpointing

# Share of the memory that is free which activations may take; the rest is for temporaries and fragmentation.
USABLE = 0.85


def layer_of_zeros(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """A decoder of one layer of these shapes and hardly a vocabulary, to measure with.

    Args:
        config: Of the decoder; changed to one layer.
        dtype: Of its parameters.
    """
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 8, None
    decoder = empty_decoder(config)
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # Zeros cost no memory until they are written.
            setattr(module, name, torch.nn.Parameter(torch.zeros(parameter.shape, dtype=dtype)))
    return decoder


def activation_bytes_per_token(decoder: Any, tokens: int = 64) -> int:
    """Bytes that one layer keeps for backward, for each token; measured on a forward of one layer.

    Args:
        decoder: Of a known family, on any device, in the dtype of training.
        tokens: Length of the sequence to measure with.
    """
    parameter = next(decoder.layers[0].parameters())
    group = TokenGroup.of_sequences([[0] * tokens])
    pack = build_pack([group], "flat").to(parameter.device)
    shape = (1, len(pack.input_ids), decoder.config.hidden_size)
    # The decoder's dtype, not the parameter's: weights held in four bits are bytes.
    hidden = torch.zeros(shape, device=parameter.device, dtype=decoder.dtype, requires_grad=True)
    position_embeddings = decoder.rotary_emb(hidden, pack.position_ids.unsqueeze(0))
    parameters = {p.untyped_storage().data_ptr() for p in decoder.layers[0].parameters()}
    shared = {t.untyped_storage().data_ptr() for t in position_embeddings}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters | shared:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run_layer(decoder.layers[0], hidden, position_embeddings, pack, rewards_only=False)
    del output
    return sum(saved.values()) // len(pack.input_ids)


def layers_to_checkpoint(
    mode: Checkpointing,
    layers: int,
    *,
    tokens: int,
    bytes_per_token: int,
    boundary_bytes: int,
    free_bytes: int,
) -> int:
    """How many layers are computed again in backward.

    Each layer that is not keeps ``bytes_per_token``, each one that is only its input, and while one is
    computed again its activations are there as well. Three layers of 100 bytes a token, inputs of 10, room
    for 260:

    >>> layers_to_checkpoint("auto", 3, tokens=1, bytes_per_token=100, boundary_bytes=10, free_bytes=260)
    2

    Args:
        mode: "none", "full", "selective" (every second layer), or "auto": as few as fit.
        layers: Of the decoder.
        tokens: Of the largest pack.
        bytes_per_token: See `activation_bytes_per_token`.
        boundary_bytes: Of a layer's input, a token.
        free_bytes: What activations may take.
    """
    if mode != "auto":
        return {"none": 0, "selective": layers // 2, "full": layers}[mode]
    for count in range(layers + 1):
        kept = (layers - count) * bytes_per_token + count * boundary_bytes
        again = bytes_per_token if count else 0
        if tokens * (kept + again) <= free_bytes:
            return count
    return layers


def free_memory(device: torch.device, trainable: int, optimizer_bytes: int) -> int:
    """Bytes that are left for activations.

    Args:
        device: CUDA or CPU.
        trainable: Parameters of this rank whose gradients are not allocated yet.
        optimizer_bytes: Bytes of optimizer state and gradients, for each of them, still to be allocated.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = psutil.virtual_memory().available
    return int(USABLE * max(0, free - trainable * optimizer_bytes))
