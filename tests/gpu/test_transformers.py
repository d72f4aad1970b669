"""transformers and PEFT on the GPU: loading, a static cache with and without compiling, LoRA."""

import copy

import pytest
import torch
from problems import DEVICE, assert_equal

import liquidgemm

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama of two layers, quantized on the CPU and saved by save_pretrained."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        pad_token_id=0,
        eos_token_id=None,
        initializer_range=0.1,  # logits far enough apart for greedy answers to be the same
    )
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "float")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        root / "float", quantization_config=liquidgemm.LiquidGemmConfig()
    )
    model.save_pretrained(root / "quantized")
    return root


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=DEVICE, **options)


def liquid_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, liquidgemm.LiquidLinear)}


def test_loads_onto_the_gpu(folder, tmp_path):
    """The bits of the checkpoint arrive, and come back from there."""
    on_cpu = transformers.AutoModelForCausalLM.from_pretrained(folder / "quantized").state_dict()
    model = load(folder / "quantized")
    assert len(liquid_layers(model)) == 14
    assert all(tensor.is_cuda for tensor in (*model.parameters(), *model.buffers()))
    model.save_pretrained(tmp_path)
    for state in (model.state_dict(), load(tmp_path).state_dict()):
        assert state.keys() == on_cpu.keys()
        for key, tensor in state.items():
            assert_equal(tensor.cpu(), on_cpu[key], key)


def test_quantizes_as_it_loads_onto_the_gpu(folder):
    model = load(folder / "float", quantization_config=liquidgemm.LiquidGemmConfig())
    expected = load(folder / "float")
    liquidgemm.quantize_(expected, progress=False)
    state = model.state_dict()
    for key, tensor in expected.state_dict().items():
        assert_equal(state[key], tensor, key)


@torch.inference_mode()
def assert_greedy(model, sequences: torch.Tensor, prompt: int, what: str) -> None:
    """Every token after the prompt is the likeliest one, up to the rounding of bfloat16.

    With e the largest error of bfloat16 logits against float32 ones, logits that are off by at most
    2 e can prefer a token whose true logit is 4 e below the best.
    """
    logits = model(sequences).logits.float()
    exact = copy.deepcopy(model).to(torch.float32)(sequences).logits
    error = (logits - exact).abs().max()
    exact = exact[:, prompt - 1 : -1]
    best = exact.amax(-1)
    lost = best - exact.gather(-1, sequences[:, prompt:, None]).squeeze(-1)
    assert lost.max() <= 4 * error, f"{what}: {lost.max()} below the best, error {error}"
    chance = (best.unsqueeze(-1) - exact <= 4 * error).float().mean()
    assert chance < 0.05, f"any {chance:.0%} of the tokens would pass: the test is void"


@pytest.mark.parametrize("compiled", [False, True])
def test_generates_with_a_static_cache(folder, compiled):
    """Compiled: whole graphs only, in CUDA graphs; the second call replays them."""
    model = load(folder / "quantized")
    ids = torch.arange(2 * 9, device=DEVICE).view(2, 9) * 7 % 512
    options = {"max_new_tokens": 16, "do_sample": False, "cache_implementation": "static"}
    if compiled:
        options["compile_config"] = transformers.CompileConfig(
            mode="reduce-overhead", fullgraph=True, dynamic=False
        )
    else:
        options["disable_compile"] = True
    found = [model.generate(ids, **options) for _ in range(2)]
    assert found[0].shape == (2, 25)
    assert_equal(found[1], found[0], "generated again")
    assert_greedy(model, found[0], 9, "compiled" if compiled else "eager")


def test_lora_trains(folder):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = load(folder / "quantized")
    layers = liquid_layers(model)
    before = {f"{n}.{k}": t.clone() for n, m in layers.items() for k, t in m.state_dict().items()}
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert len(trained) == 2 * 8
    assert all(p.is_cuda for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids = torch.arange(4 * 32, device=DEVICE).view(4, 32) * 11 % 512
    losses = []
    for _ in range(30):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses
    for name, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            assert_equal(tensor, before[f"{name}.{key}"], f"{name}.{key}")


def test_an_8_bit_optimizer_trains_adapters():
    """bitsandbytes' kernels on the gradients of ours: as tests/cpu has it on the CPU."""
    from adapters import check_8_bit_optimizer

    check_8_bit_optimizer(DEVICE)
