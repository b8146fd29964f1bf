"""Pictures that heads make: flows from noise, the networks that follow them, and the head."""
