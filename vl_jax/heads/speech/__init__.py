"""Speech that heads make: spectrograms from texts, and sounds from spectrograms."""
