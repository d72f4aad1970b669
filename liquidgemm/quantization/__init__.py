"""How a whole model is quantized, what of it, and how well."""
