"""What conformance looks at: a scheme in a small layer, its decisions, and what must hold of them."""
