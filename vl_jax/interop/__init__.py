"""Published checkpoints: weight files, the folders that hold them, and rules that map them to our trees."""
