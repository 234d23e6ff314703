"""Where batches come from: every source is a pure function of (seed, step), so that a resumed run reads the same."""
