"""What a stage minimises: one frozen dataclass a file (see ``objective``)."""
