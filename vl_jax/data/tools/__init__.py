"""Tools that look at data or convert it."""
