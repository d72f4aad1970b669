"""Smoothing: factors that move outliers of activations into the weights, at no run-time cost.

For a layer whose input x comes from a norm or linear, ``W x = (W m)(x / m)``: m goes into the
columns of W, 1 / m into the gain of the norm or the rows of the linear. ``m = max|x|^alpha /
max|W|^(1 - alpha)`` (SmoothQuant, arXiv 2211.10438, as used by QServe, arXiv 2405.04532), where
alpha is searched per site for the least error at the output, through the quantizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor, nn

from ...nn._modules import is_linear, linear_at, weight_of
from ...weights.quantize import quantize_weight
from ...weights.weight import dequantize_weight
from ..config import LiquidConfig
from .blocks import Call, run_call
from .effects import attributes_of
from .moments import round_activation
from .simulate import SimulatedLinear
from .trees import tensors, without_caches
from .units import Unit

_ALPHAS = (0.15, 0.3, 0.45, 0.6, 0.75)
_SAMPLE_TOKENS = 384
_SAMPLE_ROWS = 192
_SAME = 1e-3  # relative distance of outputs that are the same but for the order of operations
_FOLDED = ("weight", "bias")
_RANGE = 1e4  # factors stay within a range that no dtype minds


@dataclass(frozen=True)
class Site:
    """Linears with one input, and the module whose output, scaled, is that input."""

    source: str
    linears: tuple[str, ...]


# Names within a block, by the attributes of transformers' models. Of the sites that share their
# linears the first whose modules are all there counts.
_KNOWN = (
    # Gemma 2 and 3: its post_attention_layernorm ends the attention branch.
    Site("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    # Llama, Qwen, Mistral, Gemma
    Site("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Site("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    Site("self_attn.v_proj", ("self_attn.o_proj",)),
    Site("mlp.up_proj", ("mlp.down_proj",)),
    # Phi-3: fused projections
    Site("input_layernorm", ("self_attn.qkv_proj",)),
    Site("post_attention_layernorm", ("mlp.gate_up_proj",)),
    # GPT-2, GPT-NeoX, OPT style: a norm before each branch, an activation between the linears
    Site("ln_1", ("attn.c_attn",)),
    Site("ln_2", ("mlp.c_fc",)),
    Site("ln_1", ("attn.q_proj", "attn.k_proj", "attn.v_proj")),
    Site("ln_1", ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj")),
    Site("input_layernorm", ("attention.query_key_value",)),
    Site("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    Site("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
)


def find_sites(block: nn.Module, config: LiquidConfig) -> list[Site]:
    """Where a block can be smoothed: as the config says, or by the names in it."""
    modules = dict(block.named_modules())
    if not config.smooth:
        return []
    if isinstance(config.smooth, dict):
        named = [Site(source, tuple(names)) for source, names in config.smooth.items()]
        return [s for s in named if all(name in modules for name in (s.source, *s.linears))]
    sites: list[Site] = []
    for site in _KNOWN:
        taken = {name for other in sites for name in other.linears}
        if site.source not in modules or taken & set(site.linears):
            continue
        if all(is_linear(modules.get(name)) for name in site.linears):
            sites.append(site)
    return sites


def check_pairs(model: nn.Module, units: list[Unit], config: LiquidConfig) -> None:
    """That each pair of a config that names them is in some block, and of kinds and sizes that fit.

    Raises:
        ValueError: naming smooth and the pair.
    """
    if not isinstance(config.smooth, dict):
        return
    blocks = [model.get_submodule(unit.name) for unit in units]
    known = [dict(block.named_modules()) for block in blocks]
    for source, linears in config.smooth.items():
        site = Site(source, tuple(linears))
        names = (source, *linears)
        holding = [m for m in known if all(name in m for name in names)]
        if not holding:
            wrong = next((n for n in names if not any(n in m for m in known)), None)
            got = repr(wrong) if wrong else "names that no block has all of"
            raise ValueError(f"smooth: expected names within a block, got {got}: {_words(site)}")
        for modules in holding:
            _check_pair(site, modules)


def _check_pair(site: Site, modules: dict[str, nn.Module]) -> None:
    sizes: dict[str, int] = {}
    for name in site.linears:
        linear = modules[name]
        if not isinstance(linear, nn.Linear):
            kind = type(linear).__name__
            raise ValueError(f"smooth: {name}: expected an nn.Linear, got {kind}: {_words(site)}")
        sizes[name] = linear.in_features
    source = modules[site.source]
    weight = getattr(source, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() > 2 or isinstance(source, nn.Embedding):
        raise ValueError(
            f"smooth: {site.source}: expected a norm with a weight or an nn.Linear, got "
            f"{type(source).__name__}: {_words(site)}"
        )
    if weight.dim() == 2 and not isinstance(source, nn.Linear):
        kind = type(source).__name__
        raise ValueError(
            f"smooth: {site.source}: expected an nn.Linear, got {kind}: {_words(site)}"
        )
    if len({*sizes.values()}) > 1:
        raise ValueError(f"smooth: expected linears of one input size, got {sizes}: {_words(site)}")
    parent = modules[site.source.rpartition(".")[0]]
    try:
        _groups(weight, sizes[site.linears[0]], getattr(parent, "head_dim", None))
    except ValueError as error:
        raise ValueError(f"smooth: {_words(site)}: {error}") from None


def _words(site: Site) -> str:
    return f"{site.source} into {', '.join(site.linears)}"


class Sites:
    """Where each unit can be smoothed.

    Raises:
        ValueError: at construction, for a pair that the config names and that cannot be.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[Unit],
        config: LiquidConfig,
        device: torch.device | str | None = None,
    ) -> None:
        check_pairs(model, units, config)
        self._model, self._config, self._device = model, config, device
        self._seen: dict[str, tuple[Unit, Call]] = {}
        self._sites: dict[str, list[Site]] = {}

    def observe(self, unit: Unit, args: tuple, kwargs: dict) -> None:
        """Take note of a call in the float model."""
        if self._config.smooth and find_sites(self._model.get_submodule(unit.name), self._config):
            call = Call(args, without_caches(kwargs), writes=True)  # as it may
            self._seen.setdefault(unit.name, (unit, call.cloned()))

    def find(self) -> None:
        """Try all of them on the calls that were seen.

        Raises:
            ValueError: a pair that the config names would change what a block computes.
        """
        for name, (unit, call) in self._seen.items():
            block = unit.copy(self._model, self._device, {})
            usable, refused = usable_sites(
                block,
                find_sites(block, self._config),
                partial(_run, call),
                unit.shared_parameters(self._model),
            )
            if refused and isinstance(self._config.smooth, dict):
                site, why = next(iter(refused.items()))
                raise ValueError(f"smooth: {_words(site)}: {why}, in {name or 'the model'}")
            self._sites[name] = usable
        self._seen.clear()

    def of(self, unit: Unit) -> list[Site]:
        return self._sites.get(unit.name, [])


def _run(call: Call, block: nn.Module) -> list[Tensor]:
    given = run_call(block, call, attributes_of(block))
    return [t for t in tensors(given) if t.is_floating_point()]


def _groups(source: Tensor, wide: int, head_size: int | None) -> tuple[int, int, int]:
    """``(heads, repeats, size)``: how outputs of the source become the inputs of a linear.

    Args:
        source: the weight of the source.
        wide: in_features of the linear.
        head_size: features of a head, if there are heads.
    """
    own = source.shape[0]
    if own == wide:
        return 1, 1, wide
    if source.dim() < 2 or not head_size or own % head_size or wide % own:
        raise ValueError(f"expected a source of {wide} features, or of fewer heads, got {own}")
    return own // head_size, wide // own, head_size


def choose_factors(
    x: Tensor,
    amax: Tensor,
    mean_square: Tensor,
    weights: list[Tensor],
    layout: tuple[int, int, int],
    config: LiquidConfig,
) -> tuple[Tensor | None, float | None]:
    """The factors of least output error: ``[K]``, or None if not to smooth is best, and alpha.

    Args:
        x: float32 ``[T, K]``, a sample of the inputs.
        amax, mean_square: of each input feature over all tokens, ``[K]``.
        weights: float32 ``[N, K]`` each, all of the layers with this input.
        layout: as of `_groups`; factors of repeated heads are tied.
    """
    rows = torch.cat([w[:: max(1, len(w) * len(weights) // _SAMPLE_ROWS)] for w in weights])
    expected = x @ rows.T
    wmax = torch.stack([w.abs().amax(0) for w in weights]).amax(0)

    def error(m: Tensor | None) -> float:
        scaled, inputs, squares = rows, x, mean_square
        if m is not None:
            scaled, inputs, squares = rows * m, x / m, mean_square / m.square()
        importance = squares if squares.any() else None
        quantized = dequantize_weight(
            quantize_weight(scaled, config.group_size, "search", importance)
        )
        return (round_activation(inputs) @ quantized.T - expected).square().sum().item()

    best, best_alpha, least = None, None, error(None)
    for alpha in _ALPHAS:
        m = _factors(amax, wmax, alpha, layout)
        if (e := error(m)) < least:
            best, best_alpha, least = m, alpha, e
    return best, best_alpha


def _factors(amax: Tensor, wmax: Tensor, alpha: float, layout: tuple[int, int, int]) -> Tensor:
    def tied(values: Tensor) -> Tensor:
        heads, repeats, size = layout
        return values.view(heads, repeats, size).amax(1, keepdim=True)

    a, w = tied(amax), tied(wmax)
    usable = (a > 0) & (w > 0)
    a, w = torch.where(usable, a, 1), torch.where(usable, w, 1)
    m = a.pow(alpha) / w.pow(1 - alpha)
    m = m / m[usable].log().mean().exp() if usable.any() else torch.ones_like(m)
    m = torch.where(usable, m, 1).clamp(1 / _RANGE, _RANGE)
    heads, repeats, size = layout
    return m.expand(heads, repeats, size).reshape(-1)


@torch.no_grad()
def fold_into_source(source: nn.Module, m: Tensor, layout: tuple[int, int, int]) -> None:
    """Divide what the source gives by m ``[K]``."""
    heads, repeats, size = layout
    if repeats > 1 or isinstance(source, nn.Linear | SimulatedLinear):
        m = m.view(heads, repeats, size)[:, 0].reshape(-1)
    if isinstance(source, SimulatedLinear):
        source.divide_outputs(m)
        return
    weight = weight_of(source)
    if isinstance(source, nn.Linear):
        weight.div_(m.unsqueeze(1))
    elif _gain_is_one_plus(source):
        weight.copy_((1 + weight) / m - 1)
    else:
        weight.div_(m)
    if (bias := getattr(source, "bias", None)) is not None:
        bias.div_(m)


def _gain_is_one_plus(norm: nn.Module) -> bool:
    """Whether a norm multiplies by ``1 + weight``, as Gemma's do: asked of the norm itself."""
    probe = copy.deepcopy(norm)
    weight = weight_of(probe).zero_()
    if (bias := getattr(probe, "bias", None)) is not None:
        bias.zero_()
    ramp = torch.arange(weight.numel(), dtype=weight.dtype, device=weight.device)
    return bool(probe(ramp.unsqueeze(0)).any())


def site_layout(block: nn.Module, site: Site) -> tuple[int, int, int]:
    source = weight_of(block.get_submodule(site.source))
    wide = linear_at(block, site.linears[0]).in_features
    parent = block.get_submodule(site.source.rpartition(".")[0])
    return _groups(source, wide, getattr(parent, "head_dim", None))


def sample_rows(inputs: list[Tensor], count: int = _SAMPLE_TOKENS) -> Tensor:
    """About ``count`` rows spread evenly over the inputs."""
    total = sum(len(x) for x in inputs)
    step = max(1, total // count)
    return torch.cat([x[::step] for x in inputs]).float()[: 2 * count]


def smooth_site(
    block: nn.Module, site: Site, inputs: list[Tensor], config: LiquidConfig
) -> tuple[list[Tensor], float | None]:
    """Choose the factors of a site and fold them in; the inputs as they are now, and alpha."""
    layout = site_layout(block, site)
    linears = [linear_at(block, name) for name in site.linears]
    amax = torch.stack([x.abs().amax(0) for x in inputs]).amax(0).float()
    tokens = sum(len(x) for x in inputs)
    mean_square = reduce(torch.add, (x.float().square().sum(0) for x in inputs)) / tokens
    weights = [linear.weight.float() for linear in linears]
    m, alpha = choose_factors(sample_rows(inputs), amax, mean_square, weights, layout, config)
    if m is None:
        return inputs, None
    fold_into_source(block.get_submodule(site.source), m, layout)
    for linear in linears:
        linear.weight.mul_(m)
    return [x / m for x in inputs], alpha


@torch.no_grad()
def usable_sites(
    block: nn.Module,
    sites: list[Site],
    run: Callable[[nn.Module], list[Tensor]],
    shared: Collection[str] = (),
) -> tuple[list[Site], dict[Site, str]]:
    """The sites that can be folded without changing what a block computes, and why others cannot.

    That is tried with arbitrary factors, on a copy: the output of a norm may go elsewhere too.

    Args:
        run: all that a block gives and leaves behind.
        shared: names of parameters that modules outside of the block use as well.
    """
    expected, usable, refused = run(block), [], {}
    for site in sites:
        trial = copy.deepcopy(block)
        folded = {f"{name}.{key}" for name in (site.source, *site.linears) for key in _FOLDED}
        if used := sorted(folded & set(shared)):
            refused[site] = f"{used[0]} is used outside of the block too"
            continue
        try:
            heads, repeats, size = layout = site_layout(trial, site)
        except ValueError as error:
            refused[site] = str(error)
            continue
        generator = torch.Generator().manual_seed(0)
        m = torch.rand(heads, 1, size, generator=generator, device="cpu").add_(0.5)
        source = trial.get_submodule(site.source)
        m = m.expand(heads, repeats, size).reshape(-1).to(weight_of(source).device)
        fold_into_source(source, m, layout)
        for name in site.linears:
            linear_at(trial, name).weight.mul_(m)
        off = max(map(_off, run(trial), expected))
        if off < _SAME:
            usable.append(site)
        else:
            refused[site] = (
                f"what {site.source} gives is used elsewhere too: output off by {off:.1e}"
            )
    return usable, refused


def _off(actual: Tensor, expected: Tensor) -> float:
    finite = expected.isfinite()
    norm = expected[finite].norm().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual[finite] - expected[finite]).norm() / norm).item()
