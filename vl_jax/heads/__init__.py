"""What a joint model says of its streams: one file a head (see ``build``)."""
