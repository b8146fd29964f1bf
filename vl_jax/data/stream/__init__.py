"""The endless stream of training batches, and the prompts of an evaluation."""
