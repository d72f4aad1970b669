"""`fuse_` and its report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn._modules import is_from_transformers, paths_of_modules
from ..nn.fused_layer import PROJECTIONS, FusedLayer, fuse_layer, unfuse_layer
from ..quantization.verification.inputs import small_inputs
from .structure import Parts, Unfit, examine, is_decoder_layer

# A fused layer may be off from the original by this fraction of what the layer adds to the hidden
# states, and by one step of bfloat16 of what it gives, in norm. Flipped roundings of norms move
# INT8 codes by one, which is a tenth of it at most; another norm or activation is off by more.
TOLERANCE = 0.05
_STEP = 2.0**-8
_ATTENTION = "liquidgemm"  # as integrations.transformers_cache registers it

Call = tuple[tuple, dict[str, Any], object]


@dataclass(frozen=True)
class FusionReport:
    """What `fuse_` has done.

    Attributes:
        fused: names of the layers that are fused.
        left: name and reason of each decoder layer that is as it was.
        apart: name of each group of projections in a fused layer that is not one product, and what
            stands against it.
        errors: how far each fused layer is off from the original on the small input, relative to
            what the layer adds; of layers that this call has fused.
    """

    fused: tuple[str, ...]
    left: Mapping[str, str]
    apart: Mapping[str, str]
    errors: Mapping[str, float]

    def __str__(self) -> str:
        worst = max(self.errors.values(), default=0.0)
        lines = [f"{len(self.fused)} layers fused" + (f", off by {worst:.1e}" if worst else "")]
        for what, reasons in (("left", self.left), ("not merged in", self.apart)):
            names: dict[str, list[str]] = {}
            for name, reason in reasons.items():
                names.setdefault(reason, []).append(name)
            lines += [
                f"{what} {found[0]}{f' and {len(found) - 1} more' if found[1:] else ''}: {reason}"
                for reason, found in names.items()
            ]
        return "\n".join(lines)


@torch.no_grad()
def fuse_(model: nn.Module, example: Tensor | Mapping[str, Any] | None = None) -> FusionReport:
    """Give decoder layers of a quantized model fused producers and merged projections, in place.

    In a fused layer the norms and the activation of the MLP give INT8 tokens at once, q, k and v
    are one product, and so are gate and up, where their residual columns agree. Attention itself,
    rotary embeddings, the KV cache, embeddings and head stay those of transformers, and so do
    names, parameters and ``state_dict``: saving, loading, moving, copying, ``generate``, static
    caches, ``torch.compile`` and CUDA graphs work as before. `unfuse_` takes all of it back.

    Layers are known by their modules: of Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma to Gemma-3 and
    what is made like them. Each norm and activation is tried on random numbers, and each layer on
    its input in a small run of the model: it has to equal to the bit what the same operations give
    unfused, and the original but for roundings. What does not stays as it is, and the report says
    why. Layers that are fused already stay so.

    A fused layer infers alone: in training mode it raises a RuntimeError, and so does whatever asks
    for a derivative. It refuses to run once one of its projections has been replaced, as by an
    adapter; adapters on ``o_proj`` and ``down_proj`` are taken. Hooks on its norms, on the MLP as a
    whole and on its projections are not called with hidden states.

    Args:
        model: holds layers of transformers 5 that `quantize_` has quantized, or a checkpoint has
            brought.
        example: a small input, as ``calibration`` of `quantize_` has them; None to make one up from
            the model's config.

    Returns:
        what is fused and what is not.

    Raises:
        ValueError: the model has no decoder layer.
    """
    paths = paths_of_modules(model)
    layers = {names[0]: module for module, names in paths.items() if is_decoder_layer(module)}
    if not layers:
        raise ValueError("model: expected one with decoder layers of self_attn and mlp, got none")
    fused = [name for name, layer in layers.items() if isinstance(layer, FusedLayer)]
    found: dict[str, Parts] = {}
    left: dict[str, str] = {}
    for name in (name for name in layers if name not in fused):
        try:
            found[name] = examine(layers[name])
        except Unfit as unfit:
            left[name] = str(unfit)
    training = [module for module in model.modules() if module.training]
    errors: dict[str, float] = {}
    model.eval()
    try:
        with _attention_without_cache(model):
            calls, problem = _calls(model, {name: layers[name] for name in found}, example)
            for name, parts in found.items():
                if name not in calls:
                    left[name] = problem or "the small run of the model did not call it once"
                    continue
                try:
                    errors[name] = _fuse_checked(layers[name], parts, calls.pop(name))
                except Unfit as unfit:
                    left[name] = str(unfit)
    finally:
        for module in training:
            module.training = True
    fused = [name for name in layers if name in fused or name in errors]
    apart = {
        f"{name}.{owner}": reason
        for name in fused
        for owner in ("self_attn", "mlp")
        if (reason := _why_apart(getattr(layers[name], owner)))
    }
    left = {name: left[name] for name in layers if name in left}
    return FusionReport(tuple(fused), left, apart, errors)


@contextmanager
def _attention_without_cache(model: nn.Module) -> Iterator[None]:
    """Attention over a `LiquidCache` is transformers' own meanwhile, as the small run has no cache.

    Attention is no part of what is fused.
    """
    ours = [
        module
        for module in model.modules()
        if is_from_transformers(module)
        and getattr(module.config, "_attn_implementation", None) == _ATTENTION
    ]
    for module in ours:
        cast(Any, module).set_attn_implementation("eager")
    try:
        yield
    finally:
        for module in reversed(ours):
            cast(Any, module).set_attn_implementation(_ATTENTION)


def _calls(
    model: nn.Module, layers: dict[str, nn.Module], example: Tensor | Mapping[str, Any] | None
) -> tuple[dict[str, Call], str]:
    """Input and output of each layer in a small run of the model, or why there are none."""
    problem = "no input could be made up for the model: give an example"
    if not layers:
        return {}, ""
    for what, (args, kwargs) in small_inputs(model, example):
        calls: dict[str, Call | None] = {}
        handles = [
            layer.register_forward_hook(_recorder(calls, name), with_kwargs=True)
            for name, layer in layers.items()
        ]
        try:
            model(*args, **kwargs)
            return {name: call for name, call in calls.items() if call is not None}, ""
        except Exception as error:  # of the model's own
            problem = f"the model does not run on {what}: {type(error).__name__}: {error}"
        finally:
            for handle in handles:
                handle.remove()
    return {}, problem


def _recorder(calls: dict[str, Call | None], name: str):
    def record(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        # Called twice, a layer may depend on what it has kept.
        calls[name] = None if name in calls else (args, kwargs, output)

    return record


def _fuse_checked(layer: Any, parts: Parts, call: Call) -> float:
    """Fuse a layer and return how far it is off; or leave it as it was.

    Raises:
        Unfit: what it computes is not what it computed.
    """
    args, kwargs, expected = call
    if not isinstance(expected, Tensor):
        raise Unfit(f"it returns a {type(expected).__name__}, where a Tensor is expected")
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise Unfit("it takes no hidden_states as its first argument")
    if not args:
        kwargs = {key: value for key, value in kwargs.items() if key != "hidden_states"}
        args = (hidden,)
    fuse_layer(layer, parts.fusion, parts.qkv, parts.gate_up)
    try:
        y = layer(*args, **kwargs)
        layer.fusion = replace(parts.fusion, composite=True)
        composite = layer(*args, **kwargs)
        layer.fusion = parts.fusion
        if not torch.equal(y, composite):
            raise Unfit("fused, it gives other bits than the same operations one by one")
        difference, added, whole = (
            t.double().norm().item() for t in (y - expected, expected - hidden, expected)
        )
        if not difference <= TOLERANCE * added + _STEP * whole:
            raise Unfit(
                f"fused, it is off by {difference / max(added, 1e-30):.1%} of what it adds to the "
                f"hidden states, at most {TOLERANCE:.0%} expected"
            )
    except Exception as error:
        with suppress(KeyError):
            unfuse_layer(layer)
        if isinstance(error, Unfit):
            raise
        raise Unfit(f"fused, it does not run: {type(error).__name__}: {error}") from None
    return difference / added if added else 0.0


def _why_apart(owner: Any) -> str:
    """Why the projections of a fused layer are not one product; empty if they are."""
    projections = owner._modules[PROJECTIONS]
    if len(projections.parts) == 1 or (len(projections.merged) == 1 and not projections.alone):
        return ""
    return projections.why_apart
