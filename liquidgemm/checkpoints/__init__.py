"""How a quantized model is saved and loaded, so that nothing is lost or overwritten."""
