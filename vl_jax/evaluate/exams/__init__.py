"""Published exams: what a model is asked, how its answers are read, and how they are judged."""
