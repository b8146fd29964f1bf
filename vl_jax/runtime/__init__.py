"""What a process of this machine needs before it computes, and arrays that need not lie in memory."""
