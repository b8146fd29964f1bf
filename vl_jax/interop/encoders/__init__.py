"""Published encoders: their configs as ours, and where each of their tensors goes."""
