"""Text from a model: how tokens are chosen, the cache filled and extended, beams, whole answers."""
