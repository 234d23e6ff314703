"""Label Words are Anchors (EMNLP 2023): claims I1 to I8."""
