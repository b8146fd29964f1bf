"""The processors of published checkpoints."""
