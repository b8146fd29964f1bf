"""Encoders of sounds: wav2vec 2.0 reads the waveform itself."""
