"""Where files are: folders that cannot be renamed, buckets, and the copies of them here."""
