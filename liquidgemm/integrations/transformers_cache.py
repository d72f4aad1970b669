"""transformers' cache and attention function over quantized keys and values.

    model.set_attn_implementation("liquidgemm")
    cache = LiquidCache(model.config, max_cache_len=4096, format="int8")
    model.generate(**inputs, past_key_values=cache)

The cache gives the attention function no tensors but a `_Written`, which knows the layer's cache
and what was just written to it. Attention is of one of three kinds:

- one new token, or a few: the kernel, over the quantized cache;
- many, and nothing before them: torch's SDPA, over these keys and values as they came;
- many, and something before them (chunks of a prompt): SDPA, over the dequantized cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kv import KVCache
from ..kv._ops import MAX_ROWS
from ..kv.format import FORMATS

NAME = "liquidgemm"
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class _Written:
    """What `LiquidLayer.update` returns in place of keys and values.

    Attributes:
        keys, values: of the new tokens, as they came, ``[B, H, L, D]``.
        first: whether nothing was in the cache before them.
    """

    layer: LiquidLayer
    keys: Tensor
    values: Tensor
    first: bool

    def __getattr__(self, name: str):
        raise AttributeError(
            f"{name}: past_key_values is a LiquidCache, which needs "
            f"model.set_attn_implementation('{NAME}')"
        )


class LiquidLayer(CacheLayerMixin):
    """Keys and values of one layer: a `KVCache` of constant size, and its sequences' lengths."""

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(self, max_cache_len: int, format: str, centered: bool) -> None:
        super().__init__()
        self.max_cache_len, self.format, self.centered = max_cache_len, format, centered
        self.is_empty = True
        self.tokens = 0  # as far as the host has counted: replays of a graph do not pass here

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.shape != value_states.shape:
            raise ValueError(
                f"value_states: expected shape {list(key_states.shape)} like key_states, got "
                f"{list(value_states.shape)}"
            )
        self.batch_size, heads, _, head_dim = key_states.shape
        self.device, self.dtype = key_states.device, key_states.dtype
        self.cache = KVCache.allocate(
            self.format, self.batch_size, heads, self.max_cache_len, head_dim, self.device
        )
        if self.centered:
            center = torch.zeros(self.batch_size, heads, head_dim, device=self.device)
            self.cache = replace(self.cache, k_center=center)
        self.lengths = torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
        if not torch.compiler.is_compiling():
            for tensor in (*self.cache.tensors, self.cache.k_center, self.lengths):
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[_Written, _Written]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, new, _ = key_states.shape
        if batch != self.batch_size:
            raise ValueError(
                f"past_key_values: expected {self.batch_size} sequences, as the cache was first "
                f"used with, got {batch}"
            )
        if not torch.compiler.is_compiling():
            self.tokens += new
            if self.tokens > self.max_cache_len:
                raise ValueError(
                    f"max_cache_len: expected at least {self.tokens}, got {self.max_cache_len}"
                )
        first, self.is_empty = self.is_empty, False
        if first and self.centered and self.cache.k_center is not None:
            self.cache.k_center.copy_(key_states.float().mean(2))
        self.lengths.add_(new)
        self.cache.write_(key_states.transpose(1, 2), value_states.transpose(1, 2), self.lengths)
        written = _Written(self, key_states, value_states, first)
        return written, written

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_seq_length(self) -> Tensor | int:
        return self.lengths[0] if self.is_initialized else 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length  # its name in older versions

    def reset(self) -> None:
        """Forgets all tokens; memory stays."""
        self.is_empty, self.tokens = True, 0
        if self.is_initialized:
            self.lengths.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens, as many as the argument, which may be negative."""
        self.tokens -= abs(tokens_to_remove)
        self.lengths.sub_(abs(tokens_to_remove))

    def offload(self) -> None:
        raise NotImplementedError("LiquidCache: expected to stay on its device, got offloading")

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("LiquidCache: expected greedy search or sampling, got beams")


class LiquidCache(Cache):
    """A static cache of quantized keys and values, for ``past_key_values`` of `generate`.

    The model has to have ``model.set_attn_implementation("liquidgemm")``. Memory is allocated when
    the first tokens come. Sequences of a batch are padded on the left. Layers with a sliding window
    keep all tokens, and look at those of the window. The keys of int8 and int4 are centered on the
    mean of the first call's, the prompt's, per sequence, but in models that cap their scores.

    Args:
        config: of the model.
        max_cache_len: tokens per sequence, of prompt and answer together.
        format: "int8", "int4", "fp8", "bfloat16" or "float16".

    Raises:
        ValueError: another format, or a model with layers of another kind than attention.
    """

    def __init__(self, config: PreTrainedConfig, max_cache_len: int, format: str = "int8") -> None:
        if format not in FORMATS:
            raise ValueError(f"format: expected {' or '.join(FORMATS)}, got {format!r}")
        if max_cache_len < 1:
            raise ValueError(f"max_cache_len: expected at least 1, got {max_cache_len}")
        config = config.get_text_config(decoder=True)
        types = getattr(config, "layer_types", None)
        types = types or ["full_attention"] * config.num_hidden_layers
        for kind in types:
            if kind not in _LAYER_TYPES:
                names = " or ".join(_LAYER_TYPES)
                raise ValueError(f"config.layer_types: expected {names}, got {kind}")
        capped = getattr(config, "attn_logit_softcapping", None) is not None
        centered = FORMATS[format].params is not None and not capped
        super().__init__(layers=[LiquidLayer(max_cache_len, format, centered) for _ in types])


def attention_mask(
    batch_size: int,
    q_length: int,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs,
) -> Tensor | None:
    """What `attention_forward` is given as its mask: how much of each sequence is padding, or None.

    Looked at on the host for a prompt alone: while tokens are decoded, nothing waits for the GPU.
    """
    if use_vmap:
        raise ValueError("attention_mask: expected causal attention, got a mask function on top")
    if attention_mask is None:
        return None
    attention_mask = attention_mask.bool()
    if q_length > 1:
        if attention_mask.all():
            return None
        if (attention_mask[:, :-1] & ~attention_mask[:, 1:]).any():
            raise ValueError("attention_mask: expected padding on the left only, got it elsewhere")
    starts = (attention_mask.cumsum(-1) == 0).sum(-1, dtype=torch.int32)
    return starts.view(batch_size, 1, 1, 1)  # what has 4 dimensions, models leave as it is


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: _Written,
    value: _Written,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query ``[B, heads, L, D]`` gives ``[B, L, heads, D]``."""
    if not isinstance(key, _Written):
        raise ValueError(
            "past_key_values: expected a LiquidCache with attn_implementation 'liquidgemm', got "
            "none or another"
        )
    if dropout or s_aux is not None or position_bias is not None or is_causal is False:
        raise ValueError(
            "attention: expected causal, without dropout, sinks and biases of positions"
        )
    starts = None if attention_mask is None else attention_mask.reshape(-1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window, softcap = sliding_window or 0, softcap or 0.0
    layer, cache = key.layer, key.layer.cache
    queries, rows = query.shape[2], query.shape[1] // cache.k.shape[1] * query.shape[2]
    if queries == 1 or (not key.first and rows <= MAX_ROWS):
        out = cache.attention(
            query.transpose(1, 2),
            layer.lengths,
            scale,
            starts=starts,
            window=window,
            softcap=softcap,
        )
        return out, None
    if key.first:
        keys, values = key.keys, key.values
        before: int | Tensor = 0
    else:
        keys, values = (one.to(query.dtype) for one in cache.read())
        before = layer.lengths[0] - queries
    if key.first and starts is None and not softcap and not 0 < window < queries:
        out = nn.functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
    else:
        out = _masked(query, keys, values, before, starts, scale, window, softcap)
    return out.transpose(1, 2).contiguous(), None


def _masked(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    before: Tensor | int,
    starts: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """Attention of queries that come after `before` tokens, with an explicit mask."""
    at = torch.arange(query.shape[2], device=query.device)[:, None] + before
    token = torch.arange(keys.shape[2], device=query.device)
    seen = token <= at
    if window:
        seen &= token > at - window
    if starts is not None:
        # Padding sees itself, so that it stays finite.
        seen = (seen & (token >= starts[:, None, None])) | (token == at)
        seen = seen[:, None]
    group = query.shape[1] // keys.shape[1]
    keys, values = (one.repeat_interleave(group, 1) for one in (keys, values))
    if not softcap:
        return nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, scale=scale
        )
    scores = softcap * torch.tanh((query @ keys.transpose(2, 3)).float() * scale / softcap)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(values.dtype) @ values


ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, attention_mask)
