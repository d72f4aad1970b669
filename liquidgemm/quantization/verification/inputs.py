"""A small input for a model: of calibration data, or made up from what its config says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...nn._modules import imported, is_from_transformers
from ..calibration.trees import map_tensors

TOKENS = 32
SEQUENCES = 2
_SAMPLES = 4000  # of audio, enough for the strides of any feature encoder
_SEED = 20

Arguments = tuple[tuple, dict[str, Any]]

# Arguments whose second dimension is the token, if their shape is [B, T] like that of the ids.
_BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "labels")


def small_inputs(
    model: nn.Module, batch: Tensor | Mapping | None
) -> Iterator[tuple[str, Arguments]]:
    """Inputs to try, the best first, each with a word on what it is."""
    if batch is not None:
        yield "the first of the calibration data", _placed(model, _cut(batch))
        return
    adapters = imported("peft")
    inner: Any = model
    if adapters is not None and isinstance(model, adapters.PeftModel):
        inner = inner.get_base_model()
    if is_from_transformers(inner):
        made = _made_up(inner)
        if made:
            yield f"made up: {', '.join(made)}", _placed(inner, made)
        main = {key: value for key, value in made.items() if key == inner.main_input_name}
        if main and len(main) < len(made):
            yield f"made up: {inner.main_input_name}", _placed(inner, main)
        yield "transformers' dummy_inputs", _placed(inner, inner.dummy_inputs)


def _cut(batch: Tensor | Mapping[str, Any]) -> Tensor | dict[str, Any]:
    """A few sequences of a few tokens, where it is clear which dimensions those are."""
    if isinstance(batch, Tensor):
        batch = batch[:SEQUENCES]
        return batch if batch.is_floating_point() or batch.dim() != 2 else batch[:, :TOKENS]
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    lengths = {len(value) for value in tensors.values() if value.dim()}
    cut = dict(batch)
    if len(lengths) == 1 and all(value.dim() for value in tensors.values()):
        cut |= {key: value[:SEQUENCES] for key, value in tensors.items()}
    # Masks are alike, and placeholders of images stand anywhere: those are not cut.
    if tensors.keys() <= set(_BY_TOKEN) and len({v.shape for v in tensors.values()}) == 1:
        mask = cut.get("attention_mask")
        if mask is None or (mask.dim() == 2 and mask[:, :TOKENS].any(1).all()):
            cut |= {key: cut[key][:, :TOKENS] for key in tensors}
    return cut


def _placed(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> Arguments:
    """As arguments on the model's device; floats that were made up get its dtype."""
    floats = next((p for p in model.parameters() if p.is_floating_point()), None)
    device = torch.device("cpu") if floats is None else floats.device
    if isinstance(batch, Tensor):
        return (batch.to(device),), _no_cache(model)
    moved = map_tensors(dict(batch), lambda t: t.to(device))
    if is_from_transformers(model):
        dtype = cast(torch.dtype, model.dtype)
        for key, value in moved.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                moved[key] = value.to(dtype)
    return (), moved | _no_cache(model)


def _no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def _made_up(model: nn.Module) -> dict[str, Tensor]:
    """The arguments of forward, among those known here, that the config tells the size of."""
    generator = torch.Generator().manual_seed(_SEED)
    accepted = inspect.signature(model.forward).parameters
    found = {}
    for name, make in _MAKERS.items():
        wanted = name in accepted and (name != "decoder_input_ids" or _has_decoder(model))
        value = make(model.config, generator) if wanted else None
        if value is not None:
            found[name] = value
    # Of what is instead of another input, the main one counts.
    main = model.main_input_name
    alternatives = [name for name in ("input_values", "input_features") if name in found]
    for name in alternatives:
        if name != main and (main in found or name != alternatives[0]):
            del found[name]
    if "input_ids" in found and main in ("input_values", "input_features"):
        del found["input_ids"]
    return found


def _has_decoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _of(config: Any, *names: str) -> Any:
    """The first of these settings that the config or one of its parts has."""
    parts = [config, *(v for k, v in vars(config).items() if k.endswith("_config"))]
    for name in names:
        for part in parts:
            if isinstance(value := getattr(part, name, None), int | list | tuple):
                return value
    return None


def _ids(config: Any, generator: torch.Generator) -> Tensor | None:
    """Token ids ``[1, T]`` without those that mean something; the last one ends the sequence."""
    size = _of(config, "vocab_size")
    if not isinstance(size, int):
        return None
    parts = [config, *(v for k, v in vars(config).items() if k.endswith("_config"))]
    special = {
        value
        for part in parts
        for key, value in getattr(part, "__dict__", {}).items()
        if key.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    allowed = [i for i in range(min(size, 1000)) if i not in special] or [0]
    # Some models count positions from an offset.
    longest = _of(config, "max_target_positions", "max_position_embeddings", "n_positions")
    length = min(TOKENS, (longest or TOKENS + 4) - 4)
    chosen = torch.randint(len(allowed), (1, max(2, length)), generator=generator)
    ids = torch.tensor(allowed)[chosen]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < size and _of(config, "is_encoder_decoder"):
        ids[:, -1] = end
    return ids


def _pixels(config: Any, generator: torch.Generator) -> Tensor | None:
    size = _of(config, "image_size")
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size[:2]
    channels = _of(config, "num_channels", "in_channels") or 3
    return torch.randn(1, channels, height, width, generator=generator)


def _features(config: Any, generator: torch.Generator) -> Tensor | None:
    bins, positions = _of(config, "num_mel_bins"), _of(config, "max_source_positions")
    if bins is None or positions is None:
        return None
    return torch.randn(1, bins, 2 * positions, generator=generator)


def _audio(config: Any, generator: torch.Generator) -> Tensor | None:
    if _of(config, "conv_stride") is None:
        return None
    return torch.randn(1, _SAMPLES, generator=generator)


_MAKERS: dict[str, Callable[[Any, torch.Generator], Tensor | None]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _audio,
}
