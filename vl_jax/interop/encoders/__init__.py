"""Published encoders of texts and sounds: their configs as ours, and where each tensor goes."""
