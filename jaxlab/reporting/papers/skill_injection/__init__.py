"""Investigating Cross-Modal Skill Injection (ACL 2026): claims M1 to M5."""
