"""What differs from layer to layer, and among the experts of one layer."""
