"""A quantized language model gives the same bits on the GPU as on the CPU, layer by layer."""

import copy

import pytest
import torch
from problems import DEVICE, assert_equal

import liquidgemm


def tiny_llama(dtype: torch.dtype) -> torch.nn.Module:
    """Random weights; sizes that are no multiples of 64, biases, grouped heads."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed: no model to run"
    )
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=240,
        intermediate_size=504,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # they start as zeros
                torch.nn.init.normal_(parameter)
    return model.to(dtype).eval()


def liquid_layers(model: torch.nn.Module) -> dict[str, liquidgemm.LiquidLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, liquidgemm.LiquidLinear)}


@torch.inference_mode()
def captured_calls(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, tuple]:
    """(input, output) of every quantized layer in one forward pass."""
    calls = {}
    hooks = [
        layer.register_forward_hook(lambda m, x, y, name=name: calls.update({name: (x[0], y)}))
        for name, layer in liquid_layers(model).items()
    ]
    model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    return calls


@torch.inference_mode()
def stages(layer: liquidgemm.LiquidLinear, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that one layer computes from its input."""
    x8, x_scale = liquidgemm.quantize_activation(x)
    sums = liquidgemm.gemm(x8, x_scale, layer.packed, layer.scale, out_dtype=torch.int32)
    return {"x8": x8, "x_scale": x_scale, "sums": sums, "y": layer(x)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("quantized_on", ["cpu", DEVICE])
def test_equals_the_cpu(quantized_on: str, dtype: torch.dtype) -> None:
    """CHECKLIST 1: with the inputs of a forward pass on the CPU, of 3 x 17 tokens and of one."""
    model = tiny_llama(dtype).to(quantized_on)
    report = liquidgemm.quantize_(model, progress=False)
    assert len(report.quantized) == 3 * 7
    on_cpu = model.to("cpu")
    on_gpu = copy.deepcopy(model).to(DEVICE)
    gpu_layers = liquid_layers(on_gpu)
    for shape in ((3, 17), (1, 1)):
        ids = torch.arange(shape[0] * shape[1]).view(shape) * 5 % 256
        calls = captured_calls(on_cpu, ids)
        assert calls.keys() == set(report.quantized)
        for name, (x, y) in calls.items():
            expected = stages(on_cpu.get_submodule(name), x)
            assert_equal(expected["y"], y, f"{name}: repeated on the CPU")
            for stage, actual in stages(gpu_layers[name], x.to(DEVICE)).items():
                assert_equal(actual.cpu(), expected[stage], f"{name} {stage} {shape} {dtype}")


def test_checkpoint_written_on_the_gpu(tmp_path) -> None:
    """CHECKLIST 19: a model on the GPU saves what it was, to the bit, and loads on the CPU."""
    model = tiny_llama(torch.bfloat16)
    liquidgemm.quantize_(model, progress=False)
    expected = model.state_dict()
    liquidgemm.save_quantized(copy.deepcopy(model).to(DEVICE), tmp_path)
    loaded = liquidgemm.load_quantized(tmp_path).state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert_equal(tensor, expected[name], name)
