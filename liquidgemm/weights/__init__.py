"""What a quantized weight is, and how its numbers are chosen without data."""
