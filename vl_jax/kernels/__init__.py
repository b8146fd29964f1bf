"""Token kernels: each file holds a public function, its plain-JAX reference, and the implementations."""
