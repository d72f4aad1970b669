"""vLLM's plug-in: quantization method "liquidgemm" for models that vLLM serves.

`register` is the entry point of the group ``vllm.general_plugins``: vLLM calls it in each of its
processes. Nothing here is imported before.
"""


def register() -> None:
    """Make ``quant_method: liquidgemm`` and ``--quantization liquidgemm`` known to vLLM."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import LiquidGemmConfig

    register_quantization_config(LiquidGemmConfig.METHOD)(LiquidGemmConfig)
