"""Sample identity, grouping of batches, and the split into forget and retain data."""
