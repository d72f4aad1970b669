"""Experts in an engine, saved by us and quantized while they are loaded."""

from __future__ import annotations

from pathlib import Path

SETTINGS = {"skip": ["lm_head", "*self_attn*"]}  # so that what reaches the experts is much the same


def experts(check, folder: Path) -> None:
    """Each layer gives to the bit what `LiquidExperts` of the same model gives offline."""
    import torch

    import liquidgemm
    from liquidgemm.integrations.vllm.experts import ExpertsMethod

    router(check)
    floats = model_of(check)
    plain = check.logits(floats)
    floats.save_pretrained(folder / "floats")
    liquidgemm.quantize_(floats, liquidgemm.LiquidConfig(**SETTINGS), progress=False, verify=False)
    liquidgemm.save_quantized(floats, folder / "saved")
    wanted = check.logits(floats)
    layers = [m for m in floats.modules() if isinstance(m, liquidgemm.LiquidExperts)]
    found, apply = [], ExpertsMethod.apply

    def noting(self, layer, x, topk_weights, topk_ids, *args, **kwargs):
        y = apply(self, layer, x, topk_weights, topk_ids, *args, **kwargs)
        found.append([t.clone() for t in (x, topk_ids, topk_weights, y)])
        return y

    ExpertsMethod.apply = noting  # in an engine without graphs
    overrides = {"quantization_config": {"quant_method": "liquidgemm", "config": SETTINGS}}
    loading = {"quantization": "liquidgemm", "hf_overrides": overrides}
    for kind, options in (("saved", {}), ("floats", loading)):
        llm = check.engine(
            folder / kind, enable_prefix_caching=False, enforce_eager=True, **options
        )
        found.clear()
        # Not required: with random routers a token's experts are near-ties, and others elsewhere.
        check.near(check.twice(llm), wanted, plain, f"experts, {kind}", required=False)
        same = [
            torch.equal(layers[i % len(layers)](x, ids, weights), y)
            for i, (x, ids, weights, y) in enumerate(found)
        ]
        check.note("calls of experts", len(same))
        check.require(
            all(same) and len(same) >= len(layers),
            f"experts, {kind}: each layer gives the bits of LiquidExperts",
        )
        del llm
        check.allocated()


def model_of(check):
    import torch
    import transformers

    tiny = check.options.tiny
    config = transformers.Qwen3MoeConfig(
        vocab_size=check.vocabulary,
        hidden_size=128 if tiny else 1024,
        intermediate_size=256,
        moe_intermediate_size=64 if tiny else 512,
        num_experts=8 if tiny else 32,
        num_experts_per_tok=2 if tiny else 8,
        num_hidden_layers=2 if tiny else 4,
        num_attention_heads=4 if tiny else 16,
        num_key_value_heads=2 if tiny else 4,
        head_dim=32 if tiny else 64,
        norm_topk_prob=True,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    with torch.device(check.options.device):
        model = transformers.Qwen3MoeForCausalLM(config).bfloat16().eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def router(check) -> None:
    """vLLM's choice of experts in torch, where its own library of MoE kernels was not brought."""
    import torch
    from vllm import _custom_ops

    if check.options.device == "cpu":
        return
    there = hasattr(torch.ops._moe_C, "topk_softmax")
    check.note("vLLM's MoE kernels", "there" if there else "not there: the router in torch")
    if there:
        return

    def topk_softmax(weights, ids, indices, gating, renormalize=False, bias=None) -> None:
        if bias is not None:
            raise NotImplementedError("e_score_correction_bias")
        top = gating.float().softmax(-1).topk(ids.shape[1], -1)
        values = top.values / top.values.sum(-1, keepdim=True) if renormalize else top.values
        weights.copy_(values)
        ids.copy_(top.indices)

    _custom_ops.topk_softmax = topk_softmax
