"""What mixing algorithms have learned."""
