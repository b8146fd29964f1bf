"""What is done to gradients and updates on their way to the parameters."""
