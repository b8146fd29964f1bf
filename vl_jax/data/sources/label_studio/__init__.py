"""Label Studio: what people marked and answered there."""
