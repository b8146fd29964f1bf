"""A rehearsal of a run on devices that are not there: does it fit, what is where, what travels, how long."""
