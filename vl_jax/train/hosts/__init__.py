"""What several hosts that train together have to do beside what one does."""
