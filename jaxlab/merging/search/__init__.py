"""The search for the operator, weights and parameters with which an injection shows its skill."""
