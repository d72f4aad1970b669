"""Calibration: quantizing a model with the help of text, behind `liquidgemm.quantize_`.

- `driver`: block by block, stage by stage; `blocks` finds and runs them, `simulate` stands in for
  the kernel, `resume` keeps finished blocks, `gate` judges the result.
- `layer`: one weight, by `moments` (second moments of inputs) and `gptq` (codes, residual columns).
- `smooth`, `rotate`: what is folded into a model without changing its function; `tune`: scales.
- `data`: texts to tokens; `report`: what came of it.
"""
