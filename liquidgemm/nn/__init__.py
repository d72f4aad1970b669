"""What a quantized layer is, and how it takes the place of a float one."""
