"""LoRA and QLoRA in training: adapters in a decoder, and checkpoints that hold them and the head alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from polar_ft.errors import PolarError
from polar_ft.files import first_line
from polar_ft.model.lora import RECORD, Adapter, absolute_base, base_digest
from polar_ft.model.settings import PROJECTIONS, LoraSettings


def add_adapters(decoder: Any, settings: LoraSettings, base: str) -> Adapter:
    """Freezes a decoder and adds float32 adapters to its projections; they start as zero updates.

    Args:
        decoder: ``LlamaModel`` or ``Qwen2Model``, as it was loaded.
        settings: Of the config.
        base: Where it was loaded from.

    Returns:
        What a checkpoint must record of the adapters.

    Raises:
        PolarError: QLoRA is asked for, and there is no GPU or no bitsandbytes for it.
    """
    dtype = decoder.dtype
    digest = base_digest(decoder.state_dict(), len(decoder.layers), dtype)
    decoder.requires_grad_(False)
    if settings.load_in_4bit:
        _hold_in_4bit(decoder)
    import_module("torch.distributed.tensor")  # peft takes it as imported; `import_decoders` leaves it out
    from peft import LoraConfig, inject_adapter_in_model

    with _bitsandbytes_hidden(not settings.load_in_4bit), torch.random.fork_rng(devices=[]):
        # Adapters start alike with and without DeepSpeed, which draw different numbers before this.
        torch.default_generator.manual_seed(torch.initial_seed())
        config = LoraConfig(
            r=settings.r,
            # Also fractions work; peft only annotates an int.
            lora_alpha=settings.alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=list(settings.target_modules),
        )
        inject_adapter_in_model(config, decoder)
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return Adapter(
        lora=settings,
        base=absolute_base(base),
        base_digest=digest,
        base_dtype=str(dtype).removeprefix("torch."),
    )


def work_around_zero3_checkpoint_error(decoder: Any) -> None:
    """Recomputed layers under ZeRO-3 end in CheckpointError: metadata of the weight of a norm has shape [0].

    Upstream: torch 2.15 ``utils/checkpoint.py``, which while recomputing keeps a tensor that needs no
    gradient itself, where it detaches others; deepspeed 0.16.2 then partitions it. A frozen norm multiplies
    by its parameter, so it is handed another tensor of the same memory. Goes when torch detaches all of them.
    """
    for module in decoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_with_alias, module, module.forward)


def _with_alias(norm: Any, forward: Callable[..., torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    # An attribute of the instance is found before a parameter.
    norm.__dict__["weight"] = norm.weight.view_as(norm.weight)
    try:
        return forward(hidden)
    finally:
        del norm.__dict__["weight"]


def record_adapters(model: nn.Module, adapter: Adapter) -> None:
    """Restricts a model's checkpoints to the trained tensors and the record of the adapters.

    The record is a buffer: that is what plain checkpoints and those of every ZeRO stage have in common.

    Args:
        model: The complete model, with the adapters in it.
        adapter: What `add_adapters` returned.
    """
    model.register_buffer(RECORD, adapter.to_tensor())
    model.register_state_dict_post_hook(_keep_trained)
    model.register_load_state_dict_pre_hook(_check_record)


def refuse_other_tensors(model: nn.Module) -> None:
    """Rejects checkpoints that lack a trained tensor or hold one that the model does not have.

    mmengine and DeepSpeed load what fits and only log the rest: a run without adapters that is resumed from
    adapters would train on from the base model.
    """
    model.register_load_state_dict_post_hook(_check_names)


def describe(model: nn.Module, adapter: Adapter) -> str:
    """What is trained, for the log."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = adapter.lora
    kind = "QLoRA" if lora.load_in_4bit else "LoRA"
    return (
        f"{kind}: r={lora.r}, alpha={lora.alpha:g}, dropout={lora.dropout:g} on "
        f"{', '.join(lora.target_modules)}; {trained:,} parameters are trained, the reward head among them"
    )


def check_zero_stage(model: nn.Module, adapter: Adapter) -> None:
    """Raises PolarError for QLoRA under ZeRO-3, which cannot cut weights of four bits into pieces."""
    if adapter.lora.load_in_4bit and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise PolarError(
            "lora: load_in_4bit does not work with ZeRO-3, which cannot divide weights of four bits; use "
            "--deepspeed deepspeed_zero2, or no DeepSpeed"
        )


def _keep_trained(model: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    kept = {name for name, parameter in model.named_parameters() if parameter.requires_grad} | {RECORD}
    for name in [name for name in state if name.startswith(prefix) and name[len(prefix) :] not in kept]:
        del state[name]


def _check_record(model: nn.Module, state: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    name = prefix + RECORD
    if name not in state:
        return  # then adapters are missing as well, which `_check_names` reports
    mine: torch.Tensor = getattr(model, RECORD)
    changed = Adapter.of_tensor(state[name]).differences(Adapter.of_tensor(mine))
    if changed:
        raise PolarError(
            f"the checkpoint's adapters are not those of the config (checkpoint and config: "
            f"{'; '.join(changed)}); restore the config, or start from the beginning"
        )
    state[name] = mine  # what may differ may have another length


def _check_names(model: nn.Module, incompatible: Any) -> None:
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    missing: list[str] = incompatible.missing_keys
    missing[:] = [name for name in missing if name not in frozen]  # so that mmengine does not warn of them
    unexpected = incompatible.unexpected_keys
    if not missing and not unexpected:
        return
    found = [f"{name} is missing" for name in missing] + [f"{name} is not known" for name in unexpected]
    more = f" … and {len(found) - 6} more" if len(found) > 6 else ""
    hint = "was it trained with the same model and the same lora = … of the config?"
    raise PolarError(f"the checkpoint does not fit the model: {'; '.join(found[:6])}{more}; {hint}")


def _hold_in_4bit(decoder: Any) -> None:
    """Replaces every projection by one that is quantized when it is moved to the GPU."""
    bitsandbytes = _usable_bitsandbytes()
    for layer in decoder.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if name not in PROJECTIONS:
                    continue
                quantized = bitsandbytes.nn.Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    compute_dtype=torch.bfloat16,
                    compress_statistics=False,
                    quant_type="nf4",
                    device="meta",
                )
                quantized.weight = bitsandbytes.nn.Params4bit(
                    linear.weight.data,
                    requires_grad=False,
                    compress_statistics=False,
                    quant_type="nf4",
                    module=quantized,
                )
                quantized.bias = linear.bias
                setattr(parent, name, quantized)
    # peft looks for such layers only where this is set.
    decoder.is_loaded_in_4bit = True


def _usable_bitsandbytes() -> Any:
    """bitsandbytes, if it can quantize on this machine's GPU."""
    if not torch.cuda.is_available():
        raise PolarError(
            "lora: load_in_4bit (QLoRA) needs a GPU, and torch finds none here; train on a machine with one, "
            "or set load_in_4bit=False"
        )
    try:
        bitsandbytes = import_module("bitsandbytes")
        bitsandbytes.functional.quantize_4bit(torch.zeros(64, device="cuda"), quant_type="nf4")
    except Exception as error:  # a library that was not built for this CUDA fails in many ways
        reason = first_line(error, 160)
        raise PolarError(
            f"lora: load_in_4bit (QLoRA) needs bitsandbytes, and {_named_version('bitsandbytes')} does not "
            f"work with torch {torch.__version__} here ({type(error).__name__}: {reason}); "
            f"pip install --upgrade bitsandbytes"
        ) from error
    return bitsandbytes


def _named_version(package: str) -> str:
    try:
        return f"version {version(package)}"
    except PackageNotFoundError:
        return "the installed version"


@contextmanager
def _bitsandbytes_hidden(hidden: bool) -> Iterator[None]:
    """Adding adapters ends in ModuleNotFoundError: No module named 'triton.ops'.

    Upstream: xtuner 0.2.0 requires bitsandbytes 0.45.0, whose ``nn/triton_based_modules.py`` imports what
    triton 3 no longer has; peft 0.21.2 imports bitsandbytes (``tuners/lora/model.py``) wherever it is
    installed, also where nothing is quantized. Goes when xtuner allows a later bitsandbytes.
    """
    import peft.tuners.lora.model as peft_lora

    names = ("is_bnb_available", "is_bnb_4bit_available") if hidden else ()
    originals = {name: getattr(peft_lora, name) for name in names}
    for name in names:
        setattr(peft_lora, name, lambda: False)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(peft_lora, name, original)
