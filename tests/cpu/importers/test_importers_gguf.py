"""GGUF files: against the library that defines the format, and transformers' own loader."""

import gguf
import numpy as np
import pytest
import tiny_models
import torch
import transformers
from gguf.quants import dequantize, quantize

import liquidgemm
from liquidgemm import import_checkpoint, load_quantized

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 96,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
TOKENS = torch.arange(24).view(2, 12) % SIZES["vocab_size"]


def name_in_gguf(key: str) -> str:
    stem, _, what = key.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{what}"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{PARTS[part]}.{what}"


def in_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys as the converter of llama.cpp stores them."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(path, model, kind="Q8_0", arch="llama", settings=(), extra=(), change=None) -> None:
    """The model as a file of llama.cpp's converter and quantizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, value in settings:
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    for key, value in model.state_dict().items():
        name, rows = name_in_gguf(key), value.float().numpy()
        if arch == "llama" and ".self_attn.q_proj." in key:
            rows = in_pairs(rows, config.num_attention_heads)
        if arch == "llama" and ".self_attn.k_proj." in key:
            rows = in_pairs(rows, config.num_key_value_heads)
        if rows.ndim == 2:
            found = gguf.GGMLQuantizationType[kind]
            packed = quantize(rows, found)
            if change is not None:
                packed = change(name, packed)
            writer.add_tensor(name, packed, raw_dtype=found)
        else:
            writer.add_tensor(name, rows)
    for name, rows in extra:
        writer.add_tensor(name, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(5)
    return tiny_models.make("Llama", **SIZES)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits.float()


def weights_of(path) -> dict[str, torch.Tensor]:
    """The quantized matrices as the library expands them."""
    reader = gguf.GGUFReader(path)
    return {
        t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy())
        for t in reader.tensors
        if len(t.shape) == 2
    }


@pytest.mark.parametrize(
    ("kind", "arch"),
    [("Llama", "llama"), ("Qwen2", "qwen2"), ("Qwen3", "qwen3")],
)
def test_models_are_those_of_transformers(tmp_path, kind, arch):
    """Names, rows of rotary embeddings, biases, norms of heads: the logits of its own loader."""
    torch.manual_seed(3)
    # What transformers makes of a Qwen3's file has heads of 128.
    model = tiny_models.make(kind, **SIZES | ({"head_dim": 128} if kind == "Qwen3" else {}))
    for parameter in model.parameters():  # biases, too, are not zero
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() == 1 else 0.1)
    write(tmp_path / "m.gguf", model, arch=arch)
    report = import_checkpoint(tmp_path / "m.gguf", tmp_path / "out", progress=False)
    assert f"{kind}ForCausalLM" in report.loaded_as
    assert len(report.layers) == 2 * 7 + 1
    assert max(layer.error for layer in report.layers) < 0.01
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits(theirs)
    assert ((logits(ours) - expected).norm() / expected.norm()).item() < 0.05
    floats = liquidgemm.dequantize_(ours)
    assert ((logits(floats) - expected).norm() / expected.norm()).item() < 0.02


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_types(tmp_path, llama, kind, bits):
    """The reported error is the true one, towards what the library itself expands."""
    write(tmp_path / "m.gguf", llama, kind)
    report = import_checkpoint(tmp_path / "m.gguf", tmp_path / "out", False, fine_bits=bits)
    found = load_quantized(tmp_path / "out", tiny_models.make("Llama", **SIZES))
    expected = weights_of(tmp_path / "m.gguf")
    for layer in report.layers:
        linear = found.get_submodule(layer.name)
        values = linear.dequantize()
        source = expected[name_in_gguf(f"{layer.name}.weight")]
        if ".q_proj" in layer.name or ".k_proj" in layer.name:
            heads = 4 if ".q_proj" in layer.name else 2
            values = torch.from_numpy(in_pairs(values.numpy(), heads))
        error = ((values - source).norm() / source.norm()).item()
        assert layer.error == pytest.approx(error, rel=1e-3)
        assert layer.group_size == 32
        assert 0 < error < (0.01 if bits == 8 else 0.15)
        assert bool(linear.quantized_weight().augment) == (bits == 8)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_blocks_of_256(tmp_path, llama, kind):
    """Random blocks, as the library only reads these types."""
    found = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[found]
    generator = np.random.default_rng(1)
    blocks = generator.integers(0, 256, (64 * 256 // block, size), dtype=np.uint8)
    scales = generator.uniform(0.001, 0.01, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    # Where the 16-bit scales lie.
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(kind, 0)
    blocks[:, at : at + 2] = scales[:, :2]
    if kind in ("Q2_K", "Q4_K", "Q5_K"):
        blocks[:, at + 2 : at + 4] = scales[:, 2:]
    path = tmp_path / "m.gguf"
    model = tiny_models.make("Llama", **SIZES | {"hidden_size": 64, "head_dim": 16})
    extra = [("blk.0.ffn_down.weight", blocks.reshape(64, -1))]
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in (
        ("block_count", 2),
        ("context_length", 128),
        ("embedding_length", 64),
        ("feed_forward_length", 256),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
    ):
        writer.add_uint32(f"llama.{name}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    for key, value in model.state_dict().items():
        name = name_in_gguf(key)
        if name != extra[0][0]:
            writer.add_tensor(name, value.float().numpy())
    writer.add_tensor(*extra[0], raw_dtype=found)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    report = import_checkpoint(path, tmp_path / "out", False)
    (layer,) = report.layers
    expected = torch.from_numpy(dequantize(blocks.reshape(64, -1), found))
    loaded = load_quantized(tmp_path / "out", model)
    weight = loaded.get_submodule(layer.name).dequantize()
    error = ((weight - expected).norm() / expected.norm()).item()
    assert layer.name == "model.layers.0.mlp.down_proj"
    assert layer.error == pytest.approx(error, rel=1e-3)
    assert error < 0.02


def llama3_divisors(factor: float) -> np.ndarray:
    config = transformers.LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    plain = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return (plain / scaled).float().numpy()


def test_frequencies_of_llama_3(tmp_path, llama):
    divisors = llama3_divisors(8.0)
    write(tmp_path / "m.gguf", llama, extra=[("rope_freqs.weight", divisors)])
    import_checkpoint(tmp_path / "m.gguf", tmp_path / "out", False)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rope_parameters["rope_type"] == "llama3"
    assert config.rope_parameters["factor"] == 8
    write(tmp_path / "n.gguf", llama, extra=[("rope_freqs.weight", 1.1 * divisors)])
    with pytest.raises(ValueError, match=r"rope_freqs.weight: expected the divisors of a Llama 3"):
        import_checkpoint(tmp_path / "n.gguf", tmp_path / "out2", False)
    assert not (tmp_path / "out2").exists()


def nan_scale(name, packed):
    if name == "blk.1.ffn_up.weight":
        packed = packed.copy()
        packed[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    return packed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "gemma3"}, "general.architecture: expected one of llama, qwen2, qwen3, got 'gem"),
        ({"settings": [("llama.expert_count", 8)]}, "llama.expert_count: expected settings whose"),
        ({"settings": [("llama.rope.scaling.type", "yarn")]}, "llama.rope.scaling.type: expected"),
        ({"settings": [("split.count", 3)]}, "split.count: expected a model in one file, got 3"),
        (
            {"extra": [("blk.0.ffn_gate_exps.weight", np.zeros((2, 4, 32), np.float32))]},
            "blk.0.ffn_gate_exps.weight: expected a tensor of a decoder without experts",
        ),
        ({"extra": [("blk.7.attn_norm.weight", np.zeros(128, np.float32))]}, "unexpected"),
        ({"change": nan_scale}, r"blk.1.ffn_up.weight: expected finite values, got a NaN"),
    ],
)
def test_refused(tmp_path, llama, change, message):
    write(tmp_path / "m.gguf", llama, **change)
    with pytest.raises(ValueError, match=message):
        import_checkpoint(tmp_path / "m.gguf", tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


def test_damaged_files(tmp_path, llama):
    write(tmp_path / "m.gguf", llama)
    content = (tmp_path / "m.gguf").read_bytes()
    for size in (0, 3, 20, 200, 2000, len(content) - 40):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"cut.gguf: (truncated|expected a folder or a GGUF)"):
            import_checkpoint(tmp_path / "cut.gguf", tmp_path / "out", False)
    with pytest.raises(ValueError, match="fine_bits: expected 8, 4 or None, got 6"):
        import_checkpoint(tmp_path / "m.gguf", tmp_path / "out", False, fine_bits=6)
    assert not (tmp_path / "out").exists()
