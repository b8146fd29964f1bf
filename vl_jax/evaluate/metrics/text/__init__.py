"""Metrics of texts: answers, captions, transcripts. One metric a file."""
