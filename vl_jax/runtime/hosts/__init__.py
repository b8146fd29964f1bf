"""The hosts of a job that computes together: how they find each other, agree, and notice who is gone.

cluster      what the environment says: how many processes there are, which this is, where the first is
rendezvous   they meet before jax starts: who is missing is named, versions are compared
joined       they agree on facts, tell the others why they end, and end together
pulse        each gives signs of life; one that gives none ends the run of all
log          what each writes, in a file of its own
"""
