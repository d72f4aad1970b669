"""Calibration: quantizing a model with the help of data, behind `liquidgemm.quantize_`.

- `driver`: unit by unit, stage by stage; `units` are the blocks of a model and what lies outside,
  `record` finds the order of their calls, `flow` brings batches from one to the next, `blocks` runs
  them, `simulate` stands in for the kernel, `resume` keeps finished ones.
- `gate` judges the result on held-out data, by a `measure` that fits the model.
- `layer`: one weight, by `moments` (second moments of inputs) and `gptq` (codes, residual columns).
- `sites`: where `smooth` can fold something into a model; it and `rotate` do, without changing its
  function; `tune`: a block fitted to the float one, its
  `codes` among it; `distill`: the whole model.
- `data`: what a model is given; `masks`: what of it is padding; `trees`: tensors in what modules
  take and give.
- `plan`: what would become of each layer; `report`: what came of it.
"""
