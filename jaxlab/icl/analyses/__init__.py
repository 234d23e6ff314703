"""The analyses of `run.py icl`, one a module; README.md beside this file tells how one is added."""
