"""Experts of quantized models give the same bits on the GPU as on the CPU, saved and loaded."""

import copy

import pytest
import torch
from problems import DEVICE, assert_equal

import liquidgemm

E, TOP_K = 8, 2


def model_of(kind: str, dtype: torch.dtype, **fields) -> torch.nn.Module:
    """Two layers, eight experts; sizes that are no multiples of 64."""
    transformers = pytest.importorskip("transformers", minversion="5")
    sizes = {
        "vocab_size": 256,
        "hidden_size": 240,
        "intermediate_size": 200,
        "moe_intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 60,
        "num_experts": E,
        "num_local_experts": E,
        "num_experts_per_tok": TOP_K,
        **fields,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.dim() == 3:
                torch.nn.init.normal_(parameter, std=0.05)
    return model.to(dtype).eval()


def experts_of(model: torch.nn.Module) -> dict[str, liquidgemm.LiquidExperts]:
    return {n: m for n, m in model.named_modules() if isinstance(m, liquidgemm.LiquidExperts)}


@torch.inference_mode()
def captured(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, tuple]:
    """(arguments, output) of every layer of experts in one forward pass."""
    calls = {}
    hooks = [
        layer.register_forward_hook(lambda m, x, y, name=name: calls.update({name: (x, y)}))
        for name, layer in experts_of(model).items()
    ]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_outputs_of_experts_are_those_of_the_cpu(tmp_path, kind, dtype):
    """For 1 to 96 tokens; after a round trip through a folder."""
    model = model_of(kind, dtype)
    report = liquidgemm.quantize_(model, progress=False)
    assert not report.verification.faults
    assert len(experts_of(model)) == 2
    liquidgemm.save_quantized(model, tmp_path)
    on_gpu = liquidgemm.load_quantized(tmp_path).to(DEVICE)
    for rows, columns in ((1, 1), (1, 7), (3, 32)):
        generator = torch.Generator().manual_seed(rows)
        ids = torch.randint(0, 256, (rows, columns), generator=generator)
        for name, (arguments, expected) in captured(model, ids).items():
            layer = on_gpu.get_submodule(name)
            got = layer(*(argument.to(DEVICE) for argument in arguments))
            assert_equal(got.cpu(), expected, f"{name} {rows} x {columns}")


def test_generates_on_the_gpu():
    model = model_of("Qwen3Moe", torch.bfloat16)
    liquidgemm.quantize_(model, progress=False)
    on_gpu = copy.deepcopy(model).to(DEVICE)
    ids = torch.arange(16, device=DEVICE).view(2, 8)
    tokens = on_gpu.generate(ids, max_new_tokens=8, do_sample=False)
    assert tokens.shape == (2, 16)
    again = on_gpu.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(tokens, again)


@torch.inference_mode()
def test_quantized_on_the_gpu_to_the_same_codes_as_saved():
    """Quantizing where the model is: the layer computes what its own codes say, on both."""
    model = model_of("Mixtral", torch.bfloat16).to(DEVICE)
    report = liquidgemm.quantize_(model, progress=False)
    assert not report.verification.faults
    (layer, *_) = experts_of(model).values()
    x = torch.randn(33, 240, dtype=torch.bfloat16)
    ids = torch.rand(33, E).argsort(1)[:, :TOP_K]
    weights = torch.rand(33, TOP_K)
    got = layer(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE)).cpu()
    assert_equal(got, copy.deepcopy(layer).cpu()(x, ids, weights), "experts")


@torch.inference_mode()
def test_graph_replay_with_another_routing():
    layer = liquidgemm.LiquidExperts.from_quantized(
        [liquidgemm.quantize_weight(torch.randn(160, 240)) for _ in range(E)],
        [liquidgemm.quantize_weight(torch.randn(240, 80)) for _ in range(E)],
    ).to(DEVICE)
    x = torch.randn(9, 240, device=DEVICE, dtype=torch.bfloat16)
    ids = torch.zeros(9, TOP_K, device=DEVICE, dtype=torch.int64)
    weights = torch.rand(9, TOP_K, device=DEVICE)
    layer(x, ids, weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, ids, weights)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        ids.copy_(torch.randint(-1, E + 1, (9, TOP_K), generator=generator))
        x.copy_(torch.randn(9, 240, generator=generator))
        y.fill_(float("nan"))
        graph.replay()
        assert_equal(y, layer(x, ids, weights), f"routing {seed}")


@torch.inference_mode()
def test_slices_on_the_gpu():
    layer = liquidgemm.LiquidExperts.from_quantized(
        [liquidgemm.quantize_weight(torch.randn(256, 240)) for _ in range(E)],
        [liquidgemm.quantize_weight(torch.randn(240, 128)) for _ in range(E)],
    )
    x, weights = torch.randn(17, 240, dtype=torch.bfloat16), torch.rand(17, TOP_K)
    ids = torch.rand(17, E).argsort(1)[:, :TOP_K]
    for part in (layer.narrow_experts(2, 3), layer.narrow(64, 64)):
        expected = part(x, ids, weights)
        got = copy.deepcopy(part).to(DEVICE)(x.to(DEVICE), ids.to(DEVICE), weights.to(DEVICE))
        assert_equal(got.cpu(), expected, f"{part}")
