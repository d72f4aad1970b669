"""What serving engines have in common: layers that are fused, sliced and named their way."""
