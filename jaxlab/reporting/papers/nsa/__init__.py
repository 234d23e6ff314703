"""Native Sparse Attention (ACL 2025): claims N1 to N5."""
