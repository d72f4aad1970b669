"""What the numbers of a weight format mean, and how they are stored: one module per format."""
