"""Where a block can be smoothed: the linears that share an input, and the module that scales it.

Sites are known by the names that models of transformers have, or found by structure: what computes
the input of a linear is looked for among the norms and linears that ran before it. Either way, each
is tried on a copy of the block with arbitrary factors before it counts: the inputs of its linears
have to be divided by them, and all else that the block computes has to stay as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from ...nn._modules import is_linear, linear_at, weight_of
from ..config import LiquidConfig
from ..experts import SeparateExperts
from .blocks import Call, find_stages, run_call
from .effects import attributes_of
from .smooth import Site, fold_into_source, head_layout, site_layout
from .trees import tensors, without_caches
from .units import Unit

_SAME = 1e-3  # relative distance of outputs that are the same but for the order of operations
_FOLDED = ("weight", "bias")
_LEAST_EXPONENT = -8  # of the factors that are tried; the largest is 1
_NEAREST = 4  # linear layers before another that are tried: values come after queries and keys

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
        head_layout(weight, sizes[site.linears[0]], getattr(parent, "head_dim", None))
    except ValueError as error:
        raise ValueError(f"smooth: {_words(site)}: {error}") from None


def _words(site: Site) -> str:
    return f"{site.source} into {', '.join(site.linears)}"


class Sites:
    """Where each unit can be smoothed.

    Attributes:
        unsmoothed: by name of a layer, why nothing can be folded into it; with ``smooth=True``.

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
        self.unsmoothed: dict[str, str] = {}

    def observe(self, unit: Unit, args: tuple, kwargs: dict) -> None:
        """Take note of a call in the float model."""
        named = isinstance(self._config.smooth, dict)
        block = self._model.get_submodule(unit.name)
        if self._config.smooth and (not named or find_sites(block, self._config)):
            call = Call(args, without_caches(kwargs), writes=True)  # as it may
            self._seen.setdefault(unit.name, (unit, call.cloned()))

    def find(self) -> None:
        """Try all of them on the calls that were seen.

        Raises:
            ValueError: a pair that the config names would change what a block computes.
        """
        for name, (unit, call) in self._seen.items():
            block = unit.copy(self._model, self._device, {})
            trials = Trials(block, partial(_run, call), unit.shared_parameters(self._model))
            usable, refused = trials.usable(find_sites(block, self._config))
            if isinstance(self._config.smooth, dict):
                if refused:
                    site, why = next(iter(refused.items()))
                    raise ValueError(f"smooth: {_words(site)}: {why}, in {name or 'the model'}")
            else:
                stages, _ = find_stages(block, _linears(block, unit), call)
                outside = list(tensors(call.on(block)[:2]))
                found, why_not = sites_of(trials, stages, outside, usable, refused)
                usable += found
                self.unsmoothed |= {unit.outer(layer): why for layer, why in why_not.items()}
            self._sites[name] = usable
        self._seen.clear()

    def of(self, unit: Unit) -> list[Site]:
        return self._sites.get(unit.name, [])


def _linears(block: nn.Module, unit: Unit) -> dict[str, nn.Module]:
    """The layers of a unit by their names within it, but for those of experts."""
    experts = tuple(f"{n}." for n, m in block.named_modules() if isinstance(m, SeparateExperts))
    names = [unit.inner(layer) for layer in unit.layers]
    return {n: block.get_submodule(n) for n in names if not n.startswith(experts)}


def _run(call: Call, block: nn.Module) -> list[Tensor]:
    given = run_call(block, call, attributes_of(block))
    return [t for t in tensors(given) if t.is_floating_point()]


@dataclass
class Trace:
    """A run of a block.

    Attributes:
        outputs: all that it gives and leaves behind.
        inputs: of each linear layer, one for each time that it was called.
        given: what each norm and linear layer has given at first, in the order of their calls.
    """

    outputs: list[Tensor]
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)


class Trials:
    """Tries sites on copies of a block.

    Args:
        run: all that a block gives and leaves behind.
        shared: names of parameters that modules outside of the block use as well.
    """

    def __init__(
        self,
        block: nn.Module,
        run: Callable[[nn.Module], list[Tensor]],
        shared: Collection[str] = (),
    ) -> None:
        self.block, self._run, self._shared = block, run, shared
        self._expected: Trace | None = None

    @property
    def expected(self) -> Trace:
        """The block as it is."""
        if self._expected is None:
            self._expected = _trace(self.block, self._run)
        return self._expected

    def usable(self, sites: Sequence[Site]) -> tuple[list[Site], dict[Site, str]]:
        """The sites that can be folded, and why others cannot."""
        refused = {site: why for site in sites if (why := self.refusal(site))}
        return [site for site in sites if site not in refused], refused

    @torch.no_grad()
    def refusal(self, site: Site) -> str:
        """Why a site cannot be folded; "" if it can.

        The block may give the same although the pair is wrong, where its branch is small beside
        the residual stream. So the inputs of all linear layers are compared as well.
        """
        folded = {f"{name}.{key}" for name in (site.source, *site.linears) for key in _FOLDED}
        if used := sorted(folded & set(self._shared)):
            return f"{used[0]} is used outside of the block too"
        trial = copy.deepcopy(self.block)
        try:
            heads, repeats, size = layout = site_layout(trial, site)
        except ValueError as error:
            return str(error)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(heads, 1, size, generator=generator, device="cpu")
        # Mostly far below 1, so that what the source gives grows: activations such as GELU are
        # almost linear where it is small.
        m = torch.exp2(_LEAST_EXPONENT + (1 - _LEAST_EXPONENT) * drawn)
        source = trial.get_submodule(site.source)
        m = m.expand(heads, repeats, size).reshape(-1).to(weight_of(source).device)
        try:
            fold_into_source(source, m, layout)
        except Exception as error:  # it is called to see what its weight does, whatever it takes
            return f"{site.source} does not say how it scales: {type(error).__name__}: {error}"
        for name in site.linears:
            linear_at(trial, name).weight.mul_(m)
        expected, actual = self.expected, _trace(trial, self._run)
        for name, inputs in expected.inputs.items():
            scaled = [x / m for x in inputs] if name in site.linears else inputs
            off = max(map(_off, actual.inputs[name], scaled), default=0.0)
            if off >= _SAME:
                if name in site.linears:
                    return f"what {site.source} gives does not scale the input of {name}"
                return f"what {site.source} gives is used elsewhere too: by {name}"
        off = max(map(_off, actual.outputs, expected.outputs), default=0.0)
        if off >= _SAME:
            return f"what {site.source} gives is used elsewhere too: output off by {off:.1e}"
        return ""


@torch.no_grad()
def _trace(block: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> Trace:
    trace = Trace([])

    def record(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: Mapping, output: object) -> None:
            if is_linear(module):
                x = args[0] if args else kwargs["input"]
                trace.inputs.setdefault(name, []).append(x.clone())  # activations may be in place
            if isinstance(output, Tensor) and output.is_floating_point():
                trace.given.setdefault(name, output.clone())

        return hook

    handles = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in block.named_modules()
        if _may_scale(module)
    ]
    try:
        trace.outputs = run(block)
    finally:
        for handle in handles:
            handle.remove()
    return trace


def _may_scale(module: nn.Module) -> bool:
    """Whether channels of what it gives may be scaled by its weight: norms, linear layers."""
    if is_linear(module):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 1


def sites_of(
    trials: Trials,
    stages: Sequence[Sequence[str]],
    outside: Sequence[Tensor],
    known: Sequence[Site],
    refused: Mapping[Site, str],
) -> tuple[list[Site], dict[str, str]]:
    """Sites of a block that no name tells, and for the linears without any, why there is none.

    Args:
        stages: linears that share an input, in the order of their calls.
        outside: what the block is given.
        known: sites that are settled.
        refused: sites that were tried, and why they cannot be folded.
    """
    found: list[Site] = []
    why_not: dict[str, str] = {}
    for stage in stages:
        if any(set(site.linears) == set(stage) for site in known):
            continue
        x = trials.expected.inputs[stage[0]][0]
        if any(_is_same(x, given) for given in outside):
            why_not |= dict.fromkeys(stage, "its input comes from outside of its block")
            continue
        tried = {site: why for site, why in refused.items() if set(site.linears) == set(stage)}
        for source in _candidates(trials, stage):
            site = Site(source, tuple(stage))
            if site in tried:
                continue
            if why := trials.refusal(site):
                tried[site] = why
            else:
                found.append(site)
                break
        else:
            nothing = "no norm or linear layer of its size comes before it in its block"
            why_not |= dict.fromkeys(stage, next(iter(tried.values()), nothing))
    return found, why_not


def _is_same(x: Tensor, other: Tensor) -> bool:
    return x.numel() == other.numel() and torch.equal(other.reshape(x.shape).to(x.dtype), x)


def _candidates(trials: Trials, stage: Sequence[str]) -> Iterator[str]:
    """Modules that may compute the input of a stage: those that ran last before it first.

    A norm gives it as it is. Between a linear layer and it there may be what leaves factors of
    channels as they are, such as attention for values, or a product with an activation.
    """
    x = trials.expected.inputs[stage[0]][0]
    order = list(trials.expected.given)
    linears = []
    for name in reversed(order[: order.index(stage[0])]):
        module = trials.block.get_submodule(name)
        if is_linear(module):
            linears.append(name)
            continue
        if _is_same(x, trials.expected.given[name]):
            yield name
    for name in linears[:_NEAREST]:
        try:
            site_layout(trials.block, Site(name, tuple(stage)))
        except ValueError:
            continue
        yield name


def _off(actual: Tensor, expected: Tensor) -> float:
    finite = expected.isfinite()
    norm = expected[finite].norm().clamp_min(torch.finfo(torch.float32).tiny)
    return ((actual[finite] - expected[finite]).norm() / norm).item()
