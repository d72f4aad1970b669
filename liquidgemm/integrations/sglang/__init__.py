"""SGLang's plug-in: quantization method "liquidgemm" for models that SGLang serves.

`register` is the entry point of the group ``sglang.srt.plugins``: SGLang calls it in each of its
processes. Nothing here is imported before.
"""


def register() -> None:
    """Make ``quant_method: liquidgemm`` known to SGLang, which has no call of its own for that."""
    from sglang.srt.layers import linear, quantization

    from .config import LiquidGemmConfig
    from .foreign import ForeignLiquidLinearMethod
    from .linear import LiquidLinearMethod
    from .online import OnlineLiquidLinearMethod

    name = LiquidGemmConfig.METHOD
    methods = LiquidLinearMethod, OnlineLiquidLinearMethod, ForeignLiquidLinearMethod
    if name in quantization.QUANTIZATION_METHODS:
        return
    try:
        from sglang.srt.arg_groups.choices import add_quantization_method_choices
    except ImportError:  # before 0.5.17 or so
        from sglang.srt.server_args import add_quantization_method_choices

    # The first is what all others are made of, the second the copy that is looked up.
    quantization.BASE_QUANTIZATION_METHODS[name] = LiquidGemmConfig
    quantization.QUANTIZATION_METHODS[name] = LiquidGemmConfig
    linear.WEIGHT_LOADER_V2_SUPPORTED += [method.__name__ for method in methods]
    add_quantization_method_choices([name])
