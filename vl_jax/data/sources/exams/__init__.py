"""Published exams as they are distributed: which files there are, and what a question in them is."""
